"""Low-rank adapters alone are trained, and merged they compute what they computed beside the layers."""

import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import fx, nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset
from toys import Net, task
from zoo import ZOO, build

import slivo
from slivo import edits, losses
from slivo.distill import distill, lora, lora_targets, merge_lora, tap
from slivo.errors import RecipeError, SlivoError
from slivo.graph.copies import duplicate
from slivo.train import OptimizerSpec, fit

NONE_TO_ADAPT = {"LanguageModel", "NormalizedWeights"}


def run(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(inputs, dict):
            found = model(**inputs)
            return getattr(found, "logits", found)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def trained(model):
    """The same with adapters that a training might have left; their first factor alone was random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapters(model):
    return [name for name, each in model.named_parameters() if each.requires_grad]


def kinds(model):
    """The classes of modules; copies of graphs are called otherwise than they are."""
    return [None if isinstance(each, fx.GraphModule) else type(each) for each in model.modules()]


def assert_merge_is_exact(student, inputs, **options):
    before = {name: each.clone() for name, each in student.state_dict().items()}
    adapted = lora(student, rank=2, **options)
    assert all(".lora_" in name for name in adapters(adapted))
    first, said = run(student, inputs), run(adapted, inputs)
    torch.testing.assert_close(said, first, rtol=1e-12, atol=1e-12)  # sums of recurrent layers vary with addresses
    said = run(trained(adapted), inputs)
    merged = merge_lora(adapted)
    torch.testing.assert_close(run(merged, inputs), said, rtol=1e-9, atol=1e-9)
    leaves = zip(pytree.tree_leaves(said), pytree.tree_leaves(first), strict=True)
    assert any(isinstance(one, torch.Tensor) and not torch.allclose(one, other) for one, other in leaves)
    assert list(merged.state_dict()) == list(before)
    assert kinds(merged) == kinds(student)
    assert all(torch.equal(each, before[name]) for name, each in student.state_dict().items())
    assert edits.record(merged) == edits.record(adapted) == edits.record(student)
    torch.testing.assert_close(run(adapted, inputs), said, rtol=1e-12, atol=1e-12)
    return merged


@pytest.mark.parametrize("name", sorted({*ZOO} - NONE_TO_ADAPT))
def test_merged_adapters_compute_what_they_did_beside_the_layers(name):
    assert_merge_is_exact(*build(name))


@pytest.mark.parametrize("name", sorted(NONE_TO_ADAPT))
def test_a_network_without_layers_to_adapt_is_refused(name):
    with pytest.raises(SlivoError, match=f"{name} has no layer inside to put low-rank adapters beside; '.*' (has|sha)"):
        lora(build(name)[0])


IDS = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def small(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    if kind == "vit":
        config = {name: value for name, value in SMALL.items() if name != "vocab_size"}
        return hf.ViTForImageClassification(hf.ViTConfig(**config, image_size=8, patch_size=4))
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    if kind == "mixtral":
        return hf.MixtralForCausalLM(
            hf.MixtralConfig(**SMALL, num_local_experts=2, num_key_value_heads=2, experts_implementation="eager")
        )
    model = hf.BertForMaskedLM if kind == "bert, masked" else hf.BertForSequenceClassification
    return model(hf.BertConfig(**SMALL, max_position_embeddings=16))


HEADS = {
    "bert": "classifier", "bert, masked": "decoder", "gpt2": "lm_head", "llama": "lm_head", "mixtral": "lm_head",
    "vit": "classifier",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_models_of_transformers_keep_their_head_and_merge_exactly(kind):
    model = small(kind).double().eval()
    chosen = lora_targets(model)
    assert not any(path.endswith(HEADS[kind]) for path in chosen)
    assert sum("1." in path for path in chosen) >= 4
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8).double()} if kind == "vit" else {"input_ids": IDS}
    assert_merge_is_exact(model, inputs)


class Inside(nn.Module):
    """One layer, and one more that nobody mistakes for it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(1, 1)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1).mean(1, keepdim=True))


LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear, no bias": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv1d, pointwise": (nn.Conv1d(4, 6, 1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 5), padding=(1, 2)), (2, 4, 7, 7)),
    "conv2d, same": (nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 7, 7)),
    "conv2d, pointwise": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 7)),
    "conv2d, one wide": (nn.Conv2d(4, 6, (1, 3)), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(4, 6, (1, 3, 2)), (2, 4, 5, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_kind_of_layer_merges_exactly(layer):
    made, shape = layer
    assert_merge_is_exact(Inside(made).double(), torch.randn(shape).double(), targets=["layer"], alpha=3.0)


class OwnWay(nn.Linear):
    def forward(self, x):
        return super().forward(x / 2)


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


REFUSED = {
    "has 2 groups": nn.Conv2d(4, 6, 3, groups=2),
    "has a dilation": nn.Conv1d(4, 6, 3, dilation=2),
    "pads by 'reflect'": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "has a kernel of 1 x 1 x 1, which PEFT cannot merge": nn.Conv3d(4, 6, 1),
    "has a kernel of 1 x 1 x 2, which PEFT": nn.Conv3d(4, 6, (1, 1, 2)),
    "has a forward of its own": OwnWay(2, 2),
    "has no weight of its own": parametrizations.weight_norm(nn.Linear(2, 2)),
    "is no linear layer or convolution": nn.ConvTranspose2d(2, 2, 1),
    "is no linear": nn.MultiheadAttention(4, 2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_layers_whose_adapters_could_not_be_merged_are_refused(reason):
    with pytest.raises(SlivoError, match=f"'layer' matches no layer that can have low-rank adapters: 'layer' {reason}"):
        lora(Inside(REFUSED[reason]), ["layer"])
    if not isinstance(REFUSED[reason], nn.MultiheadAttention):
        assert lora_targets(Inside(REFUSED[reason])) == ["head"]


def test_layers_that_are_not_called_or_whose_weight_is_others_too_are_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    again = nn.Sequential(*[nn.Linear(3, 3)] * 2, nn.Linear(3, 3), nn.Linear(3, 3))
    for model in (tied, again):
        with pytest.raises(SlivoError, match="'0' shares its weight with another layer"):
            lora(model, ["0"])
        assert not {"0", "1"} & {*lora_targets(model)}
    with pytest.raises(SlivoError, match=r"'layer.out_proj' is computed with by PyTorch's attention"):
        lora(Inside(nn.MultiheadAttention(4, 2)), ["layer.*"])
    with pytest.raises(SlivoError, match="'layer' has a forward of its own"):
        lora(Inside(patched()), ["layer"])
    with pytest.raises(SlivoError, match=r"Linear has no layer inside to put low-rank adapters beside$"):
        lora(nn.Linear(2, 2))


def test_exact_zeros_are_not_filled():
    net = Net(16)
    sparse = slivo.sparsify(net, task().example_inputs, pattern="2:4", only=["second"])
    assert "second.0" not in lora_targets(sparse)
    with pytest.raises(SlivoError, match=r"'second.0' has zeros on record"):
        lora(sparse, ["second.0"])


def test_globs_choose_whole_paths():
    net = nn.Sequential()
    net.fc, net.block, net.head = nn.Linear(4, 4), nn.Module(), nn.Linear(4, 4)
    net.block.fc, net.block.norm = nn.Linear(4, 4), nn.LayerNorm(4)
    assert adapters(lora(net, ["fc"])) == ["fc.lora_A.default.weight", "fc.lora_B.default.weight"]
    assert {name.split(".lora")[0] for name in adapters(lora(net, ["block.*", "fc"]))} == {"fc", "block.fc"}
    assert {name.split(".lora")[0] for name in adapters(lora(net, "**"))} == {"fc", "block.fc", "head"}
    assert {name.split(".lora")[0] for name in adapters(lora(net))} == {"fc", "block.fc"}
    for targets, said in (
        ([], "targets is empty"),
        (["block.norm"], "'block.norm' is no linear layer"),
        (["blok"], "the student \\(Sequential\\) has no module 'blok'; did you mean 'block'"),
    ):
        with pytest.raises(SlivoError, match=said):
            lora(net, targets)


def test_rank_and_alpha_mean_what_they_do_in_peft():
    net, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6).double()
    adapted = trained(lora(net, rank=3, alpha=12))
    a, b = (adapted.get_parameter(f"0.lora_{each}.default.weight") for each in "AB")
    assert (a.shape, b.shape) == ((3, 6), (5, 3))
    expected = x @ (net[0].weight + 12 / 3 * b @ a).T + net[0].bias
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(merge_lora(adapted)(x), expected)
    plain = trained(lora(net, rank=3))
    torch.testing.assert_close(plain(x), x @ (net[0].weight + b @ a).T + net[0].bias)


def test_randomness_is_seeded_and_put_back():
    net = nn.Sequential(nn.Linear(6, 5))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = lora(net), lora(net), lora(net, seed=1)
    assert torch.equal(torch.rand(3), expected)
    name = "0.lora_A.default.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    dropped = lora(net, dropout=0.5).train()
    x = torch.ones(1, 6)
    trained(dropped)
    assert not torch.equal(dropped(x), dropped(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rank": 0}, "rank is 0"), ({"rank": 2.5}, "rank is 2.5"), ({"dropout": 1.0}, "dropout is 1.0")],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(RecipeError, match=said):
        lora(Net(4), **options)


def test_what_required_gradients_does_so_again():
    net = Net(8)
    net.first.requires_grad_(False)
    before = {name: each.requires_grad for name, each in net.named_parameters()}
    adapted = duplicate(lora(net))
    assert {name.partition(".lora")[0] for name in adapters(adapted)} == {"first.0", "second.0"}
    merged = merge_lora(adapted)
    assert {name: each.requires_grad for name, each in merged.named_parameters()} == before
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(run(merge_lora(lora(merged)), torch.ones(2, 12)), run(merged, torch.ones(2, 12)))


def test_a_graph_that_calls_modules_is_adapted_as_they_are():
    net = Net(8).double().eval()
    net.first.requires_grad_(False)
    merged = assert_merge_is_exact(fx.symbolic_trace(net), torch.randn(3, 12).double())
    assert isinstance(merged, fx.GraphModule)
    assert not any(each.requires_grad for each in merged.first.parameters())
    assert all(each.requires_grad for each in merged.second.parameters())


def test_there_is_one_set_of_adapters_to_merge():
    with pytest.raises(SlivoError, match="Net has low-rank adapters; merge them first"):
        lora(lora(Net(8)))
    with pytest.raises(SlivoError, match="Net has no low-rank adapters"):
        merge_lora(Net(8))
    broken = lora(Net(8))
    with torch.no_grad():
        broken.get_parameter("second.0.lora_B.default.weight").fill_(torch.inf)
    with pytest.raises(SlivoError, match=r"second.0: NaNs detected"):
        merge_lora(broken)


def test_without_peft_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SlivoError, match=r"peft is not installed .* pip install 'slivo\[lora\]'"):
        lora(Net(8))


def points():
    made = task()
    return torch.stack([x for x, _ in made.train]), torch.tensor([y for _, y in made.train])


def accurate(width, seed):
    """A network that learned the points."""
    torch.manual_seed(seed)
    net = Net(width)
    data = DataLoader(TensorDataset(*points()), batch_size=32)
    fit(net, data, lambda model, batch: {"ce": F.cross_entropy(model(batch[0]), batch[1])}, epochs=2)
    return net


def test_a_pruned_student_learns_by_adapters_alone_and_is_saved(tmp_path):
    teacher = accurate(16, 0)
    x = points()[0]
    student = slivo.prune(teacher, x[:2], keep=slivo.Budget(params=0.4))
    adapted = lora(student, rank=2)

    def behind(model):
        with torch.no_grad(), tap(model, ["second.0"]) as ours, tap(teacher, ["second.0"]):
            said = F.kl_div(model(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean").item()
            assert list(ours) == ["second.0"]
            return said

    start = behind(adapted)
    result = distill(
        adapted, teacher, task(), [losses.kd(weight=1.0), losses.hint(at="second.0", weight=0.1)], epochs=6,
        optimizer=OptimizerSpec("adamw", lr=0.05), label_weight=0,
    )  # fmt: skip
    frozen = dict(adapted.named_parameters())
    for name, each in result.model.named_parameters():
        assert torch.equal(each, frozen[name]) == (".lora_" not in name), name
    assert behind(result.model) < 0.8 * start
    merged = merge_lora(result.model)
    torch.testing.assert_close(run(merged, x), run(result.model, x), rtol=1e-4, atol=1e-5)
    assert edits.record(merged) == edits.record(student) != ()
    again = slivo.load(slivo.save(merged, tmp_path / "student"), factory=lambda: Net(16))
    assert torch.equal(run(again, x), run(merged.eval(), x))
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", ["ResNet", "Transformer", "TorchEncoder", "Windows", "Shuffle"])
def test_pruned_networks_merge_exactly_and_keep_their_edits(name, tmp_path):
    model, inputs = build(name)
    student = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6))
    merged = assert_merge_is_exact(student, inputs)
    again = slivo.load(slivo.save(merged, tmp_path / "student"), factory=lambda: build(name)[0])
    torch.testing.assert_close(run(again, inputs), run(merged, inputs), rtol=0, atol=0)
