"""What a recipe may say: every key, its type, its range and its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SHARE = "a share between 0 and 1 (0.5 keeps half)"
_AT_LEAST_ONE = "a whole number, 1 or more"
_GLOBS = "a list of globs over axis names and module paths"
_LAYERS = "a list of globs over names of layers and module paths"
_REFERENCE = "'package.module:callable' or the folder of an artifact"

Portion = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Width = Annotated[float, Field(ge=0, le=1)] | Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A mapping of a recipe; keys that it does not know are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Optimizer(Part):
    """Optimizer of a training; see `slivo.train.OptimizerSpec`.

    Without a learning rate it is 0.1 for SGD and 0.001 for AdamW from scratch, and a tenth of that for weights that are
    trained already.
    """

    kind: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd or adamw")
    lr: Annotated[float, Field(gt=0)] | None = Field(default=None, description="a learning rate above 0")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="0 up to, not including, 1")
    nesterov: bool = Field(default=True, description="true or false")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=5e-4, description="0 or above")
    decay_vectors: bool = Field(default=False, description="true or false")
    schedule: Literal["one-cycle", "cosine", "constant"] = Field(
        default="one-cycle", description="one-cycle, cosine or constant"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.2, description="a share of the steps, 0 up to 1")


class Fit(Part):
    """A training by the task's own loss."""

    epochs: Count = Field(description=_AT_LEAST_ONE)
    batch_size: Count = Field(default=64, description=_AT_LEAST_ONE)
    optimizer: Optimizer = Field(default=Optimizer(), description="a mapping with kind, lr, …")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto, fp32 or bf16")


def _as_loss(value: object) -> object:
    """Allow ``kd`` and ``{kd: }`` for ``{kd: {}}``."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict):
        return {name: {} if arguments is None else arguments for name, arguments in value.items()}
    return value


Loss = Annotated[
    dict[str, dict[str, Any]],
    Field(min_length=1, max_length=1),
    BeforeValidator(_as_loss, json_schema_input_type=str | dict[str, dict[str, Any] | None]),
]


def _as_mapping(value: object) -> object:
    """Allow ``true`` for an empty mapping, and ``false`` for none."""
    return ({} if value else None) if isinstance(value, bool) else value


class Cache(Part):
    """Answers of the teacher, kept on disk while the run lasts, so that each is asked for once."""

    views: Count = Field(default=1, description="a whole number, 1 or more; data that are augmented need several")
    top_k: Count | None = Field(default=None, description="how many of the output's classes are kept, 1 or more")
    features: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="float32, float16 or bfloat16"
    )


class Lora(Part):
    """Adapters of low rank that are trained in place of the student's weights, and added to them afterwards."""

    targets: list[str] = Field(
        default=[], description="a list of globs over paths of layers; left out for all but the head"
    )
    rank: Count = Field(default=8, description=_AT_LEAST_ONE)
    alpha: Annotated[float, Field(gt=0)] | None = Field(default=None, description="above 0; the rank if left out")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="0 up to, not including, 1")


class Distill(Fit):
    """A training by the task's loss and by what the teacher says."""

    losses: Annotated[list[Loss], Field(min_length=1)] = Field(
        description="a list of losses, such as [{kd: {temperature: 4.0}}]; `slivo losses` lists them"
    )
    cache: Annotated[Cache | None, BeforeValidator(_as_mapping, json_schema_input_type=bool | Cache | None)] = Field(
        default=None, description="true, or a mapping with views, top_k and features"
    )
    label_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="the weight of the task's own loss, 0 or above"
    )
    lora: Annotated[Lora | None, BeforeValidator(_as_mapping, json_schema_input_type=bool | Lora | None)] = Field(
        default=None, description="true, or a mapping with targets, rank, alpha and dropout"
    )


class Keep(Part):
    """What may stay of the student, as shares of what it has when the stage starts; all that are given are held.

    Latency is measured at batch 1, in PyTorch, on the machine at hand.
    """

    macs: Portion | None = Field(default=None, description=SHARE)
    params: Portion | None = Field(default=None, description=SHARE)
    bytes: Portion | None = Field(default=None, description=SHARE)
    latency: Portion | None = Field(default=None, description=SHARE)
    latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="milliseconds at batch 1, above 0, in place of latency"
    )


class Schedule(Part):
    """How a budget is approached."""

    kind: Literal["linear", "exponential", "cubic"] = Field(default="cubic", description="linear, exponential or cubic")
    steps: Count = Field(default=1, description=_AT_LEAST_ONE)


class Pressure(Fit):
    """A training before the cut, by labels, that makes small what will go; see `slivo.prune.pressure`.

    The first four find out what can go, and need a strength; ``greg`` and ``hspg`` are told by the cut's criterion.
    """

    kind: Literal["l1", "l2", "slimming", "group_lasso", "greg", "hspg"] = Field(
        description="l1, l2, slimming, group_lasso, greg or hspg"
    )
    strength: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="above 0; of greg the largest, 1 if left out; hspg has none"
    )
    steps: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="of greg and hspg, by when: a share of the training, 0.5 if left out"
    )


class Controlled(Part):
    """How far validation lets a cut go; see `slivo.prune.iterate`."""

    max_drop: Annotated[float, Field(ge=0, le=1)] = Field(
        description="how much of the task's metric on the validation data may be lost, 0 to 1"
    )
    halvings: Annotated[int, Field(ge=0)] = Field(default=3, description="how often the rate may be halved, 0 or more")


class Prune(Part):
    """Cut channels, heads and units out of the student, in one or several steps."""

    criterion: str = Field(default="l2", description="the name of a criterion; `slivo criteria` lists them")
    scope: Literal["global", "uniform", "isomorphic"] = Field(
        default="global", description="global, uniform or isomorphic"
    )
    keep: Keep | None = Field(
        default=None, description="a mapping with macs, params, bytes or latency; left out for what the target asks"
    )
    schedule: Schedule = Field(default=Schedule(), description="a mapping with kind and steps")
    recover: Distill | None = Field(default=None, description="a mapping as that of distill; trained after each step")
    pressure: Pressure | None = Field(
        default=None, description="a mapping with kind, strength, epochs, …; trained before each step"
    )
    controlled: Controlled | None = Field(
        default=None, description="a mapping with max_drop; steps that lose more are taken back"
    )
    only: list[str] = Field(default=[], description=_GLOBS)
    exclude: list[str] = Field(default=[], description=_GLOBS)
    min_width: Width | dict[str, Width] = Field(
        default=0.1, description="a share of an axis (0.1 is a tenth), a count, or a mapping of globs to these"
    )
    round_to: Count = Field(default=1, description=_AT_LEAST_ONE)
    refit: bool = Field(default=False, description="true to set what stays by least squares after each cut")
    samples: Count = Field(default=512, description=_AT_LEAST_ONE)

    @property
    def cuts(self) -> int:
        """How many steps of a run prune; a stage that validation controls is one step, which tries several cuts."""
        return self.schedule.steps if self.controlled is None else 1


class Drop(Part):
    """Take out the blocks that change least what passes through them; the share is of what the student has then."""

    keep: Keep = Field(description="a mapping with macs, params or bytes")
    only: list[str] = Field(default=[], description="a list of globs over paths of blocks")
    exclude: list[str] = Field(default=[], description="a list of globs over paths of blocks")
    samples: Count = Field(default=512, description=_AT_LEAST_ONE)


class Sparsify(Part):
    """Set the least important weights to zero; trainings that come after it keep the zeros."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="a share of zeros, 0 to below 1; left out for N:M patterns, which have their own"
    )
    pattern: str = Field(default="unstructured", description="unstructured, N:M as 2:4, or blocks as 4x4")
    criterion: str = Field(default="l1", description="the name of a criterion that scores single weights")
    scope: Literal["global", "layer", "row"] = Field(default="global", description="global, layer or row")
    permute: bool = Field(default=False, description="true to search an order of channels for an N:M pattern first")
    only: list[str] = Field(default=[], description="a list of globs over names of parameters and module paths")
    exclude: list[str] = Field(default=[], description="a list of globs over names of parameters and module paths")
    samples: Count = Field(default=512, description=_AT_LEAST_ONE)


class Share(Part):
    """Let the weights of each tensor take few different values; trainings that come after it train these."""

    clusters: Count | dict[str, Count] = Field(
        default=16, description="a number of values besides zero, 1 or more, or a mapping of globs to these"
    )
    codebook: Literal["kmeans", "powers-of-two"] = Field(default="kmeans", description="kmeans or powers-of-two")
    init: Literal["linear", "density", "quantile"] = Field(default="linear", description="linear, density or quantile")
    groups: Count = Field(default=1, description=_AT_LEAST_ONE)
    vectors: bool = Field(default=False, description="true to share the values of biases and scales of norms, too")
    weighed: bool = Field(default=False, description="true to weigh each weight by the square of its gradient")
    only: list[str] = Field(default=[], description="a list of globs over names of parameters and module paths")
    exclude: list[str] = Field(default=[], description="a list of globs over names of parameters and module paths")
    samples: Count = Field(default=512, description=_AT_LEAST_ONE)


class Factorize(Part):
    """Put products of thin layers in the place of wide ones; the share that stays is of what the student has then."""

    keep: Keep | None = Field(default=None, description="a mapping with macs, params, bytes or latency")
    energy: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="a share between 0 and 1 of each layer's squared output, in place of keep"
    )
    by: Literal["loss", "sensitivity"] = Field(default="loss", description="loss or sensitivity")
    method: Literal["auto", "channel", "spatial", "tucker2", "cp"] = Field(
        default="auto", description="auto, channel, spatial, tucker2 or cp"
    )
    only: list[str] = Field(default=[], description=_LAYERS)
    exclude: list[str] = Field(default=[], description=_LAYERS)
    round_to: Count = Field(default=1, description=_AT_LEAST_ONE)
    samples: Annotated[int, Field(ge=0)] = Field(default=512, description="a whole number; 0 for the weights alone")


class Quantize(Part):
    """Store weights as integers."""

    scheme: str = Field(default="int8-static", description="the name of a scheme")
    weight_bits: Annotated[int, Field(ge=2, le=8)] | None = Field(default=None, description="2 to 8; the scheme's own")
    group_size: Count | Literal["channel", "tensor"] | None = Field(
        default=None, description="a count of weights with one scale, channel, or tensor; of schemes of weights alone"
    )
    symmetric: bool | None = Field(default=None, description="false for zero points; of schemes of weights alone")
    method: Literal["round", "gptq", "awq"] | None = Field(
        default=None, description="round, gptq or awq; of schemes of weights alone"
    )
    samples: Count = Field(default=512, description=_AT_LEAST_ONE)
    exclude: list[str] = Field(default=[], description="a list of globs over module paths")
    equalize: bool = Field(default=False, description="true to give channels weights of like ranges first")
    smooth: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="a share from 0 to 1")
    correct_bias: bool = Field(default=False, description="true to take shifts of means back by biases")
    aware: Distill | None = Field(
        default=None, description="a mapping as that of distill; the network is trained with its rounding first"
    )


class Joint(Distill):
    """One training in which channels, or weights, vanish and rounding is rehearsed; then they go, and integers come.

    Of ``prune``, ``sparsify`` and ``quantize`` those that are given happen at once; ``prune`` and ``sparsify`` exclude
    each other.
    """

    prune: Prune | None = Field(default=None, description="a mapping with criterion, keep, …; what is to vanish")
    sparsify: Sparsify | None = Field(default=None, description="a mapping with sparsity, …")
    quantize: Quantize | None = Field(default=None, description="a mapping with weight_bits, …")
    vanish: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="by when all is gone: a share of the training, 0.5 if left out"
    )


class Export(Part):
    """Write teacher and student for another runtime, or the student as one coded file."""

    to: Literal["onnx", "packed"] = Field(default="onnx", description="onnx or packed")


class Until(Part):
    """When rounds end: at these shares of the teacher's costs, all of them, or where validation forbids more.

    A round that loses too much is taken back, and the next goes at half the pace: each keep to the power of a half, and
    half the learning rate.
    """

    macs: Portion | None = Field(default=None, description=SHARE)
    params: Portion | None = Field(default=None, description=SHARE)
    bytes: Portion | None = Field(default=None, description=SHARE)
    max_drop: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="how much of the task's metric on the validation data may be lost, 0 to 1"
    )
    halvings: Annotated[int, Field(ge=0)] = Field(default=2, description="how often the pace may be halved, 0 or more")


class Teach(Part):
    """The student as it is now becomes the teacher; the recipe's own student starts."""


class Repeat(Part):
    """Several rounds of the same stages."""

    times: Count = Field(description=_AT_LEAST_ONE)
    until: Until | None = Field(default=None, description="a mapping with macs, params, bytes and max_drop")
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(description="a list of stages")


class Layers(Part):
    """The same stages for one part of the network after the other; the prune stage cuts that part alone."""

    groups: Count | None = Field(default=None, description="a number of parts, from the input to the output")
    modules: Annotated[list[list[str]], Field(min_length=1)] | None = Field(
        default=None, description="a list with one list of globs for each part"
    )
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(description="a list of stages")


class Stage(Part):
    """One stage: a mapping with one key, the kind of the stage."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    prune: Prune | None = Field(default=None, description="a mapping with criterion, keep, …")
    drop: Drop | None = Field(default=None, description="a mapping with keep, …")
    distill: Distill | None = Field(default=None, description="a mapping with losses, epochs, …")
    finetune: Fit | None = Field(default=None, description="a mapping with epochs, …")
    sparsify: Sparsify | None = Field(default=None, description="a mapping with sparsity, pattern, …")
    share: Share | None = Field(default=None, description="a mapping with clusters, codebook, …")
    factorize: Factorize | None = Field(default=None, description="a mapping with keep or energy, …")
    quantize: Quantize | None = Field(default=None, description="a mapping with scheme, …")
    joint: Joint | None = Field(default=None, description="a mapping with losses, epochs, prune, quantize, …")
    teach: Annotated[Teach | None, BeforeValidator(_as_mapping, json_schema_input_type=bool | Teach | None)] = Field(
        default=None, description="true"
    )
    export: Export | None = Field(default=None, description="a mapping with to")
    repeat: Repeat | None = Field(default=None, description="a mapping with times and stages")
    layers: Layers | None = Field(default=None, description="a mapping with groups or modules, and stages")

    @property
    def given(self) -> dict[str, Part]:
        """The keys that were given, with what they hold; a valid stage has one."""
        return {name: value for name, value in self if value is not None}


class TaskPart(Part):
    """What is to be learned, and from which data."""

    kind: str = Field(description="a kind of task, such as image-classification")
    data: str = Field(description="a data set that ships, such as digits, or 'package.module:callable'")
    options: dict[str, Any] = Field(default={}, description="a mapping of arguments of the data set")


class Teacher(Part):
    """The network to learn from."""

    model: str = Field(description=_REFERENCE)
    args: dict[str, Any] = Field(default={}, description="a mapping of arguments of the model")
    fit: Fit | None = Field(
        default=None, description="a mapping with epochs, …; left out for a model that is trained already"
    )


class Committee(Part):
    """Networks that teach beside the teacher; in distillations they speak with one voice."""

    others: Annotated[list[Teacher], Field(min_length=1)] = Field(description="a list of mappings as that of teacher")
    voices: Literal["equal", "confidence", "learned"] | list[Annotated[float, Field(ge=0)]] = Field(
        default="equal", description="equal, confidence, learned, or a list with a number for each, the teacher first"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=4.0, description="above 0, that of the losses: probabilities are averaged at it"
    )


class Inherit(Part):
    """First weights of the student, taken from the teacher; see `slivo.distill.inherit`."""

    layers: dict[str, str] | None = Field(
        default=None, description="a mapping of the student's modules to the teacher's"
    )
    widths: Literal["cut", "svd"] = Field(default="cut", description="cut or svd")


class Student(Part):
    """The network that is made smaller: a copy of the teacher, or another."""

    from_: Literal["teacher"] | None = Field(default=None, alias="from", description="teacher")
    model: str | None = Field(default=None, description=_REFERENCE)
    args: dict[str, Any] = Field(default={}, description="a mapping of arguments of the model")
    inherit: Annotated[Inherit | None, BeforeValidator(_as_mapping, json_schema_input_type=bool | Inherit | None)] = (
        Field(default=None, description="true, or a mapping with layers and widths")
    )


class Goal(Part):
    """What the student must reach; costs are shares of the teacher's."""

    macs: Portion | None = Field(default=None, description=SHARE)
    params: Portion | None = Field(default=None, description=SHARE)
    bytes: Portion | None = Field(default=None, description=SHARE)
    latency: Portion | None = Field(default=None, description=f"{SHARE}, at batch 1")
    latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="milliseconds at batch 1, above 0"
    )
    runtime: Literal["eager", "compile", "onnxruntime", "openvino"] | None = Field(
        default=None, description="what latency is measured on: eager, compile, onnxruntime or openvino"
    )
    max_drop: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="how much of the task's metric may be lost, 0 to 1 (0.01 is one point)"
    )


class Range(Part):
    """Numbers of which a search takes one; whole ones if both bounds are."""

    low: int | float = Field(description="a number")
    high: int | float = Field(description="a number above low")
    log: bool = Field(default=False, description="true to take small numbers as often as large ones")


Choices = Annotated[list[Any], Field(min_length=1)]
Cost = Literal["macs", "params", "bytes", "latency"]


class Search(Part):
    """What `slivo search` varies, and what it looks for; other commands pass it by."""

    vary: dict[str, Choices | Range] | None = Field(
        default=None, description="a mapping of keys such as target.macs to lists of values, or to low, high and log"
    )
    widths: bool | None = Field(default=None, description="true to set widths by sensitivity; true without vary")
    strategies: list[str] | None = Field(default=None, description="a list of recipes that ship; all without vary")
    objectives: Annotated[list[Cost], Field(min_length=1)] = Field(
        default=["macs"], description="a list of costs that are to be low: macs, params, bytes or latency"
    )
    margin: Annotated[float, Field(ge=0)] = Field(default=0.05, description="a share of the metric, 0 or above")


class Recipe(Part):
    """A whole recipe."""

    name: str = Field(default="", description="a name for the run")
    task: TaskPart | None = Field(default=None, description="a mapping with kind and data")
    teacher: Teacher | None = Field(default=None, description="a mapping with model, args and fit")
    committee: Committee | None = Field(default=None, description="a mapping with others, and voices")
    student: Student = Field(
        default=Student.model_validate({"from": "teacher"}), description="a mapping with from, or model"
    )
    target: Goal = Field(
        default=Goal(), description="a mapping with macs, params, bytes, latency, latency_ms, runtime, max_drop"
    )
    stages: Annotated[list[Stage], Field(min_length=1)] = Field(description="a list of stages")
    search: Search | None = Field(default=None, description="a mapping with vary, widths, strategies, objectives")

    def plain(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready data with every default filled in, as YAML would spell it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


Repeat.model_rebuild()
Layers.model_rebuild()
