"""Losses by name: what there is comes from the functions, and whatever is wrong is refused before any training."""

import inspect
import math

import pytest
import torch

from slivo import losses
from slivo.distill import ClassMap, Ramp, Term, contrast, features, logits, maps, relations, tokens
from slivo.errors import RecipeError

MODULES = (logits, features, maps, relations, contrast, tokens)
ON_LOGITS = [name for name in losses.names() if hasattr(logits, name)]
PLACED = [name for name in losses.names() if name not in ON_LOGITS]


def spec(name, **options):
    """Return what a recipe says of a loss, with a place if it needs one."""
    return {name: {**({"at": "layer1"} if name in PLACED else {}), **options}}


def test_names_are_the_public_functions():
    assert losses.names() == sorted(losses.names())
    assert {"kd", "dkd", "hint", "rkd_distance"} <= set(losses.names())
    for name in losses.names():
        (home,) = [module for module in MODULES if getattr(vars(module).get(name), "__module__", "") == module.__name__]
        assert inspect.getdoc(getattr(home, name)).partition("\n")[0].endswith(".")
    assert set(losses.names()) | {"build", "describe", "names", "Loss"} == set(dir(losses))


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_can_be_built_by_name_and_by_function(name):
    options = {"at": "layer1"} if name in PLACED else {}
    built, called = losses.build({name: options}), getattr(losses, name)(**options)
    assert built == called
    weight = "auto" if name in PLACED else 1.0
    assert built == Term(next(vars(module)[name] for module in MODULES if name in vars(module)), {}, weight, **options)
    assert built.name == name
    builder = getattr(losses, name)
    assert builder.__name__ == name
    assert builder.__doc__.startswith(next(each.summary for each in losses.describe() if each.name == name))


def test_descriptions_say_all_options_and_defaults():
    described = {each.name: each for each in losses.describe()}
    assert list(described) == losses.names()
    assert described["kd"].parameters == (
        "temperature: float = 4.0",
        "weight: weight = 1.0",
        "at: path = ''",
        "head: head = None",
        "class_map: indices = None",
        "class_dim: dimension = None",
        "mask: part = None",
    )
    activations = ("weight: weight = 'auto'", "at: path", "head: head = None")
    assert described["hint"].parameters == activations
    assert described["rkd_angle"].parameters == ("chunk: int = 32", *activations)
    assert described["relation"].parameters == ("heads: int = 8", *activations, "mask: part = None")
    assert described["dkd"].parameters[-2:] == ("labels: part = None", "mask: part = None")
    assert all(each.summary for each in described.values())
    # The defaults that are shown are valid.
    for name, each in described.items():
        numbers = {
            option.split(":")[0]: float(option.split("= ")[1]) if ": float" in option else int(option.split("= ")[1])
            for option in each.parameters
            if ": float = " in option or ": int = " in option
        }
        losses.build(spec(name, **numbers))


def test_options_reach_the_term():
    term = losses.build({"dkd": {"alpha": 2, "beta": 1, "weight": 3, "at": "head", "class_map": [1, None, 0]}})
    assert term.params == {"alpha": 2.0, "beta": 1.0}
    assert isinstance(term.params["alpha"], float)
    assert (term.weight, term.at, term.class_map) == (3.0, "head", ClassMap((1, None, 0)))
    term = losses.build({"dkd": {"head": {"kinds": 1}, "labels": "kind", "mask": "1.known"}})
    assert (term.head, term.labels, term.mask) == ({"kinds": 1}, "kind", "1.known")
    assert losses.build({"kd": {"class_dim": 1}}).class_dim == 1
    assert losses.build({"kd": {"class_dim": None}}) == losses.kd()
    assert losses.hint(head=["a", "b"]).head == ("a", "b")
    assert losses.build({"kd": None}) == losses.build({"kd": {}}) == losses.kd()
    assert losses.sp(at=["a", "b.*"]).at == ("a", "b.*")
    assert losses.kd(class_map=ClassMap((0, 1))).class_map == ClassMap((0, 1))
    assert losses.kd(class_map=None).class_map is None
    merged = {"teacher": [1, [0, 2], None], "unmapped": "other"}
    assert losses.build({"kd": {"class_map": merged}}).class_map == ClassMap((1, (0, 2), None), "other")
    assert losses.kd(class_map=[[3, 4], 0]).class_map == ClassMap(((3, 4), 0))
    assert losses.rkd_angle(at="x", chunk=8).params == {"chunk": 8}
    ramped = {"temperature": {"start": 8, "end": 2}, "weight": Ramp(0, 1, until=0.5)}
    assert losses.build({"kd": ramped}) == losses.kd(temperature=Ramp(8, 2), weight=Ramp(0, 1, until=0.5))
    assert losses.hint(at="x", weight="auto").weight == "auto"
    # Right for other widths than a trial's.
    assert losses.relation(at="x", heads=12).params == {"heads": 12}


@pytest.mark.parametrize("wrong", [{}, {"kd": {}, "mse": {}}, "kd", None, ["kd"]])
def test_a_loss_is_one_name_with_options(wrong):
    with pytest.raises(RecipeError, match=r"a loss is .*; write one name with its options, as {kd: {weight: 0.9}}"):
        losses.build(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kdd": {}}, "no loss is called 'kdd'; did you mean .*kd"),
        ({"xyzzy": {}}, "no loss is called 'xyzzy'; there are .*cka, .*standardized_kd"),
        ({1: {}}, "no loss is called 1"),
        ({"kd": 0.9}, r"options of loss kd are 0.9; write names with values"),
        ({"kd": ["temperature"]}, "options of loss kd are"),
        ({"kd": {"temprature": 4}}, "loss kd has no option 'temprature'; did you mean temperature"),
        (
            {"kd": {"xyzzy": 4}},
            "has no option 'xyzzy'; there are temperature, weight, at, head, class_map, class_dim, mask",
        ),
        ({"kd": {1: 4}}, "has no option 1"),
        ({"hint": {"at": "a", "class_map": [0, 1]}}, "loss hint has no option 'class_map'"),
        ({"hint": {}}, "loss hint needs 'at': the path of the module to compare"),
        ({"sp": None}, "loss sp needs 'at'"),
        ({"kd": {"temperature": "hot"}}, "kd.temperature is 'hot'; it must be a number"),
        ({"kd": {"temperature": True}}, "kd.temperature is True; it must be a number"),
        ({"kd": {"temperature": None}}, "kd.temperature is None; it must be a number"),
        ({"rkd_angle": {"at": "a", "chunk": 1.5}}, "rkd_angle.chunk is 1.5; it must be a whole number"),
        ({"rkd_angle": {"at": "a", "chunk": True}}, "rkd_angle.chunk is True; it must be a whole number"),
        ({"hint": {"at": 1}}, r"hint.at is 1; it must be a module's path, two \(student, teacher\), or a mapping"),
        ({"hint": {"at": ["a", "b", "c"]}}, "hint.at is"),
        ({"hint": {"at": ["a", 1]}}, "hint.at is"),
        ({"kd": {"head": []}}, r"head of kd is \[\]; it must be the name or place of an output, a pair"),
        ({"kd": {"head": {}}}, "head of kd is {}"),
        ({"kd": {"head": ["a", "b", "c"]}}, "head of kd is"),
        ({"kd": {"head": True}}, "head of kd is True"),
        ({"kd": {"head": {"a": 1.5}}}, "head of kd is {'a': 1.5}"),
        ({"kd": {"head": "a", "at": "layer1"}}, "kd is at 'layer1' and of head 'a'; give one of both"),
        ({"kd": {"class_dim": 1.0}}, "kd.class_dim is 1.0; it must be the number of a dimension"),
        ({"hint": {"at": "a", "class_dim": 1}}, "loss hint has no option 'class_dim'"),
        ({"kd": {"mask": True}}, "mask of kd is True; it must be a part of the batch, by name or place, or a function"),
        ({"dkd": {"labels": ["a"]}}, r"labels of dkd is \['a'\]"),
        ({"sp": {"mask": "a", "at": "b"}}, "loss sp has no option 'mask'"),
        ({"kd": {"class_map": 3}}, "kd.class_map is 3; it must be a list with the teacher's class"),
        ({"kd": {"class_map": "ab"}}, "kd.class_map is 'ab'"),
        ({"kd": {"class_map": {"student": [0, 1]}}}, "kd.class_map is .*it must be a list .* or null"),
        ({"kd": {"class_map": {"teacher": [0, 1], "unmapped": "lost"}}}, "unmapped is 'lost'; it must be 'left out'"),
        ({"kd": {"class_map": [0, 0]}}, r"kd.class_map: class map \[0, 0\] must give two or more different"),
        ({"kd": {"weight": 0}}, "weight of kd is 0.0; it must be above 0"),
        ({"kd": {"weight": "much"}}, "kd.weight is 'much'; it must be a number"),
        ({"kd": {"temperature": 0}}, "loss kd: temperature is 0.0; it must be a number above 0"),
        ({"kd": {"temperature": math.nan}}, "loss kd: temperature is nan"),
        ({"jsd": {"beta": 1}}, "loss jsd: beta is 1.0; it must be above 0 and below 1"),
        ({"skewed_kl": {"alpha": 1}}, "loss skewed_kl: alpha is 1.0; it must be 0 or above and below 1"),
        ({"dkd": {"alpha": -1}}, "loss dkd: alpha is -1.0; it must be 0 or above"),
        ({"dist": {"gamma": -1}}, "loss dist: gamma is -1.0; it must be 0 or above"),
        (
            {"kd": {"temperature": {"start": 8}}},
            "kd.temperature is {'start': 8}; a ramp has start and end, and may have",
        ),
        ({"kd": {"temperature": {"start": 8, "end": 2, "until": 3}}}, "kd.temperature: .*until"),
        ({"kd": {"temperature": {"start": 8, "end": 0}}}, "loss kd: temperature is 0.0; it must be a number above 0"),
        ({"ab": {"at": "a", "margin": 0}}, "loss ab: margin is 0.0; it must be a number above 0"),
        ({"cwd": {"at": "a", "temperature": 0}}, "loss cwd: temperature is 0.0; it must be a number above 0"),
        ({"crd": {"at": "a", "temperature": 0}}, "loss crd: temperature is 0.0; it must be a number above 0"),
        ({"crd": {"at": "a", "features": 0}}, "loss crd: features is 0 and queue 0; features must be 1 or more"),
        ({"queue_kl": {"at": "a", "queue": -1}}, "loss queue_kl: .*queue -1; .*queue 0 or more"),
        ({"queue_kl": {"at": "a", "temperature": -1}}, "loss queue_kl: temperature is -1.0"),
        ({"relation": {"at": "a", "heads": 0}}, "loss relation: heads is 0; it must be 1 or more"),
        ({"attention_relation": {"at": "a", "heads": -1}}, "loss attention_relation: heads is -1"),
        ({"rkd_angle": {"at": "a", "chunk": 0}}, "loss rkd_angle: chunk is 0; it must be 1 or more"),
        ({"correlation_congruence": {"at": "a", "gamma": 0}}, "loss correlation_congruence: gamma is 0.0"),
    ],
)
def test_what_is_wrong_is_refused_with_what_is_allowed(wrong, message):
    with pytest.raises(RecipeError, match=message):
        losses.build(wrong)
    ((name, options),) = wrong.items()
    if name in losses.names() and isinstance(options, dict) and all(isinstance(option, str) for option in options):
        with pytest.raises(RecipeError, match=message):
            getattr(losses, name)(**options)


def test_names_that_are_no_losses_are_no_attributes():
    for name in ("kdd", "_hidden", "center", "Tensor"):
        assert not hasattr(losses, name)
    with pytest.raises(AttributeError, match=r"module 'slivo.losses' has no loss 'kdd'; did you mean .*kd"):
        _ = losses.kdd


def test_building_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    for name in losses.names():
        losses.build(spec(name))
    assert torch.equal(torch.get_rng_state(), state)
