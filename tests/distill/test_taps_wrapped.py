"""Taps see the same in a model that is compiled or wrapped, and the new module where one was replaced."""

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn

import slivo
from slivo import losses
from slivo.distill import distillation, tap
from slivo.distill.taps import match, unwrapped
from slivo.errors import SlivoError
from slivo.graph.capture import trying


class Net(nn.Module):
    def __init__(self, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3), nn.ReLU()) for _ in range(2))
        self.first, self.head = nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.relu(self.first(x.mean((2, 3)))))


X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PATHS = ["stem.0", "stages.*", "first", ""]


@contextmanager
def quietly(model):
    """Let PyTorch's compiler warn of what it imports, and batch norms be as before."""
    with warnings.catch_warnings(), trying(model):
        warnings.simplefilter("ignore")
        yield


def compiled(model, x=X, **options):
    with quietly(model):
        made = torch.compile(model, **{"backend": "eager", "fullgraph": True, **options})
        made(x)  # so that there is compiled code, which knows of no hooks
    return made


def in_place(model):
    with quietly(model):
        model.compile(backend="eager", fullgraph=True)
        model(X)
    return model


def by_forward(model):
    with quietly(model):
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        model(X)
    return model


def by_stages(model):
    """As training by regions has it: blocks are compiled, what is around them is not."""
    model.stages[1] = compiled(model.stages[1], torch.randn(1, 6, 6, 6))
    return model


def data_parallel(model):
    return nn.DataParallel(model, device_ids=[])


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of one process, as a launcher makes it."""
    address = tmp_path_factory.mktemp("group") / "meeting"
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {
    "compiled": compiled,
    "by autograd": lambda model: compiled(model, backend="aot_eager"),
    "in place": in_place,
    "by forward": by_forward,
    "by stages": by_stages,
    "data parallel": data_parallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "both": lambda model: compiled(data_parallel(model), fullgraph=False),
    "both, inside": lambda model: data_parallel(compiled(model)),
}


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@torch.no_grad()
def test_what_is_seen_is_that_of_the_model_itself(wrap):
    plain, model = Net().eval(), wrap(Net().eval())
    with tap(plain, PATHS) as expected:
        out = plain(X)
    for _ in range(2):
        with tap(model, PATHS) as seen:
            assert torch.equal(model(X), out)
        assert list(seen) == list(expected) == ["stem.0", "stages.0", "stages.1", "first", ""]
        assert all(torch.equal(seen[path], expected[path]) for path in seen)
        assert hooks(model) == 0
    torch.testing.assert_close(model(X), out)
    assert isinstance(unwrapped(model), Net)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_paths_are_those_of_the_model_itself(wrap):
    plain, model = Net(), wrap(Net())
    for pattern in ("**", "*", "stages.*", "stages.1.0", "**.0", ""):
        assert match(model, pattern) == [*dict.fromkeys(match(plain, pattern))], pattern
    refusals = []
    for each in (plain, model):
        with pytest.raises(SlivoError, match=r"\(Net\) has no module 'stage.1'") as refused:
            match(each, "stage.1")
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1]


def test_what_the_compiler_puts_into_a_path_may_be_there():
    model = compiled(Net())
    assert match(model, "_orig_mod.stages.0") == match(model, "_orig_mod.stages.0*") == ["stages.0"]


@pytest.mark.parametrize("wrap", [compiled, in_place, by_stages])
def test_after_an_error_there_are_no_hooks_and_code_is_compiled_again(wrap):
    model = wrap(Net())
    with pytest.raises(RuntimeError), tap(model, ["stem"]):
        model(torch.randn(4, 2, 8, 8))
    assert hooks(model) == 0
    seen = []

    def count(graph, _):
        seen.append(graph)
        return graph.forward

    again = torch.compile(nn.Linear(2, 2), backend=count)
    with tap(again, [""]) as found:
        again(torch.ones(1, 2))
    assert not seen
    assert list(found) == [""]
    again(torch.ones(1, 2))
    assert len(seen) == 1


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def forward(model, batch):
    return model(batch[0])


BATCH = X, torch.tensor([0, 1, 2, 0])


def objective(teacher, student, *terms):
    return distillation(teacher, forward, loss, terms).prepare(student, BATCH)


@pytest.mark.parametrize("wrapped", ["student", "teacher", "both"])
def test_losses_and_gradients_are_those_of_the_models_themselves(wrapped):
    terms = losses.kd(weight=0.9), losses.hint(at="stages.*", weight=0.5), losses.attention_transfer(at="stem.2")
    found = []
    for wraps in ((), ("student", "both"), ("teacher", "both")):
        student, teacher = Net(6, seed=1).train(), Net(10, seed=2)
        ours = compiled(student) if wrapped in wraps[:1] or (wrapped == "both" and wraps) else student
        theirs = compiled(teacher) if wrapped == "teacher" and "teacher" in wraps else teacher
        with objective(theirs, ours, *terms) as made:
            parts = made(ours, BATCH)
        sum(parts.values()).backward()
        found.append((parts, [each.grad for each in student.parameters()]))
        assert hooks(ours) == hooks(theirs) == 0
    for parts, gradients in found[1:]:
        assert list(parts) == list(found[0][0])
        torch.testing.assert_close(parts, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])


def expected_hint(student, teacher, path):
    with tap(student, [path]) as ours, tap(teacher, [path]) as theirs, torch.no_grad():
        student(X), teacher.eval()(X)
    return F.mse_loss(ours[path], theirs[path])


def step(made, student):
    parts = made(student, BATCH)
    return parts["hint@first"].detach()


def test_a_module_that_was_swapped_is_read_at_the_next_step():
    student, teacher = Net(6, seed=1).eval(), Net(6, seed=2).eval()
    made = objective(teacher, student, losses.hint(at="first", weight=1.0))
    before = step(made, student)
    u, s, v = torch.linalg.svd(student.first.weight.detach(), full_matrices=False)
    pair = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 8))
    with torch.no_grad():
        pair[0].weight.copy_(s[:2, None] * v[:2])
        pair[1].weight.copy_(u[:, :2])
        pair[1].bias.copy_(student.first.bias)
    student.first = pair
    after = step(made, student)
    assert not torch.isclose(after, before)
    torch.testing.assert_close(after, expected_hint(student, teacher, "first"))
    assert hooks(student) == 0


@pytest.mark.parametrize("wrap", [lambda model: model, compiled])
def test_a_student_that_was_cut_is_read_at_the_next_step(wrap):
    student, teacher = Net(6, seed=1).eval(), Net(6, seed=2).eval()
    made = objective(teacher, student, losses.hint(at="first", weight=1.0))
    before = step(made, student)
    small = slivo.prune(student, X, keep=slivo.Budget(params=0.6), exclude=["first"])
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in student.parameters())
    after = step(made, wrap(small))
    assert not torch.isclose(after, before)
    torch.testing.assert_close(after, expected_hint(small, teacher, "first"))


@pytest.mark.parametrize("scheme", ["int8-weights", "int8-static"])
def test_a_quantized_student_is_read_at_the_next_step(scheme):
    student, teacher = Net(6, seed=1).eval(), Net(6, seed=2).eval()
    made = objective(teacher, student, losses.hint(at="first", weight=1.0))
    before = step(made, student)
    rounded = slivo.quantize(student, scheme, batches=[(X,)])
    after = step(made, rounded)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.2, atol=0.02)
    torch.testing.assert_close(after, expected_hint(rounded, teacher, "first"))
