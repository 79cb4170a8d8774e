"""Losses on parts of activation maps against their papers, in NumPy and float64, and what must be true of all."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from slivo import losses
from slivo.distill import distillation, maps
from slivo.distill.adapt import made_by, make
from slivo.distill.maps import ab, cwd, fsp, ickd, ofd, review, vid
from slivo.errors import RecipeError, ShapeError

MAPS = (4, 3, 2, 5)


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def softmax(values, temperature):
    powers = np.exp(values / temperature)
    return powers / powers.sum()


def ref_ofd(student, teacher):
    target = teacher.copy()
    for channel in range(teacher.shape[1]):
        values = teacher[:, channel].ravel()
        target[:, channel] = np.maximum(values.reshape(target[:, channel].shape), values[values < 0].mean())
    pairs = zip(student.ravel(), target.ravel(), strict=True)
    return np.mean([0 if s <= t <= 0 else (s - t) ** 2 for s, t in pairs])


def ref_ab(student, teacher, margin=1.0):
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
    return total / student.size


def ref_cwd(student, teacher, temperature=4.0):
    total, count = 0.0, 0
    for sample_s, sample_t in zip(student, teacher, strict=True):
        for s, t in zip(sample_s, sample_t, strict=True):
            p, q = softmax(t.ravel(), temperature), softmax(s.ravel(), temperature)
            total, count = total + sum(p * np.log(p / q)), count + 1
    return temperature**2 * total / count


def ref_ickd(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        grams = []
        for each in (s, t):
            rows = each.reshape(len(each), -1)
            gram = np.array([[a @ b for b in rows] for a in rows])
            grams.append([row / math.sqrt(sum(row * row)) for row in gram])
        total += sum(((a - b) ** 2).sum() for a, b in zip(*grams, strict=True)) / len(s)
    return total / len(student)


def array(tensor):
    return tensor.detach().double().numpy()


def channelwise(layer, values):
    """A 1x1 convolution or a linear layer, on channels that are second."""
    weight = array(layer.weight).reshape(layer.weight.shape[:2])
    found = np.stack([sum(weight[o, i] * values[:, i] for i in range(weight.shape[1])) for o in range(len(weight))], 1)
    return found + array(layer.bias).reshape(1, -1, *[1] * (values.ndim - 2))


def ref_vid(student, teacher, adapter):
    for layer in adapter.mean:
        student = np.maximum(student, 0) if isinstance(layer, nn.ReLU) else channelwise(layer, student)
    total = 0.0
    for channel, alpha in enumerate(array(adapter.scale)):
        variance = math.log1p(math.exp(alpha)) + 1e-5
        errors = (teacher[:, channel] - student[:, channel]) ** 2
        total += ((errors / variance + math.log(variance)) / 2).sum()
    return total / teacher.size


def shrunk(values, size):
    """Average over a coarser grid, place by place."""
    out = np.zeros((*values.shape[:2], *size))
    for place in np.ndindex(*size):
        spans = [slice(i * a // b, -(-(i + 1) * a // b)) for i, a, b in zip(place, values.shape[2:], size, strict=True)]
        out[(slice(None), slice(None), *place)] = values[(slice(None), slice(None), *spans)].mean(
            tuple(range(2, values.ndim))
        )
    return out


def ref_fsp(student, teacher):
    def flow(first, second):
        size = [min(pair) for pair in zip(first.shape[2:], second.shape[2:], strict=True)]
        first, second = shrunk(first, size), shrunk(second, size)
        return np.array([[[(a * b).mean() for b in y] for a in x] for x, y in zip(first, second, strict=True)])

    total = 0.0
    for index in range(len(student) - 1):
        difference = flow(*student[index : index + 2]) - flow(*teacher[index : index + 2])
        total += (difference**2).sum() / len(difference)
    return total


def convolved(layers, values):
    """A convolution without bias, with zeros around, and then a batch norm by the batch itself."""
    weight, norm = array(layers[0].weight), layers[1]
    side = weight.shape[-1]
    wide = np.pad(values, [(0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2])
    out = np.zeros((len(values), len(weight), *values.shape[2:]))
    for y, x in np.ndindex(*values.shape[2:]):
        out[:, :, y, x] = np.einsum("bcij,ocij->bo", wide[:, :, y : y + side, x : x + side], weight)
    mean, variance = (each((0, 2, 3), keepdims=True) for each in (out.mean, out.var))
    gain, shift = (array(each).reshape(1, -1, 1, 1) for each in (norm.weight, norm.bias))
    return gain * (out - mean) / np.sqrt(variance + norm.eps) + shift


def enlarged(values, size):
    """The nearest neighbor of each place."""
    rows, columns = ([i * old // new for i in range(new)] for old, new in zip(values.shape[2:], size, strict=True))
    return values[:, :, rows][:, :, :, columns]


def ref_review(student, teacher, adapter):
    total, above = 0.0, None
    for index in reversed(range(len(student))):
        here = convolved(adapter.enter[index], student[index])
        if above is not None:
            above = enlarged(above, here.shape[2:])
            shares = 1 / (1 + np.exp(-channelwise(adapter.choose[index], np.concatenate([here, above], 1))))
            here = here * shares[:, :1] + above * shares[:, 1:]
        above = here
        found = convolved(adapter.leave[index], enlarged(here, teacher[index].shape[2:]))
        levels, weights = [((found - teacher[index]) ** 2).mean()], [1.0]
        for side in (4, 2, 1):
            if side < min(found.shape[2:]):
                coarse = [shrunk(each, (side, side)) for each in (found, teacher[index])]
                levels.append(((coarse[0] - coarse[1]) ** 2).mean())
                weights.append(weights[-1] / 2)
        total += sum(a * b for a, b in zip(levels, weights, strict=True)) / sum(weights)
    return total


REFERENCES = {
    "ofd": (ref_ofd, [{}]),
    "ab": (ref_ab, [{}, {"margin": 0.3}]),
    "cwd": (ref_cwd, [{}, {"temperature": 1.0}]),
    "ickd": (ref_ickd, [{}]),
    "vid": (ref_vid, [{}]),
    "fsp": (ref_fsp, [{}]),
    "review": (ref_review, [{}]),
}
LOSSES = [
    name
    for name, value in vars(maps).items()
    if inspect.isfunction(value) and value.__module__ == maps.__name__ and name[0] != "_"
]
PAIRS = [(name, options) for name, (_, choices) in REFERENCES.items() for options in choices]
SINGLE = ["ofd", "ab", "cwd", "ickd", "vid"]
SEVERAL = ["fsp", "review"]
# Sizes of two places, where the number of channels and the sizes of space differ.
OURS, THEIRS = [(4, 2, 9, 6), (4, 3, 5, 3)], [(4, 3, 9, 6), (4, 4, 5, 6)]


def activations(name, *, seed=0, dtype=torch.float64):
    """Return what a loss compares, of the student and of the teacher."""
    if name in SINGLE:
        return draw(MAPS, MAPS, seed=seed, dtype=dtype)
    values = draw(*OURS, *THEIRS, seed=seed, dtype=dtype)
    return values[:2], values[2:]


def call(name, student, teacher, adapter=None, **options):
    """Call a loss, with an adapter if it needs one."""
    function = getattr(maps, name)
    if adapter is None and made_by(function):
        adapter = make(function, options, student, teacher, seed=0)
    return function(student, teacher, *([adapter] if made_by(function) else []), **options)


def test_every_loss_has_a_reference():
    assert sorted(REFERENCES) == sorted(LOSSES) == sorted(SINGLE + SEVERAL)
    assert set(LOSSES) <= set(losses.names())


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_is_the_formula_of_its_paper(name, options):
    student, teacher = activations(name)
    function, reference = getattr(maps, name), REFERENCES[name][0]
    adapter = make(function, options, student, teacher, seed=0) if made_by(function) else None
    arrays = [array(each) if name in SINGLE else [array(one) for one in each] for each in (student, teacher)]
    if name == "fsp":
        arrays[0] = [channelwise(layer, one) for layer, one in zip(adapter, arrays[0], strict=True)]
    found = call(name, student, teacher, adapter, **options)
    more = [adapter] if name in ("vid", "review") else []
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(float(reference(*arrays, *more, **options)), rel=1e-10)


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_gradient_is_the_slope_and_the_teacher_has_none(name, options):
    student, teacher = activations(name)
    several = name in SEVERAL
    adapter = make(getattr(maps, name), options, student, teacher, seed=0) if made_by(getattr(maps, name)) else None
    ours = [each.requires_grad_() for each in (student if several else [student])]
    assert torch.autograd.gradcheck(
        lambda *values: call(name, list(values) if several else values[0], teacher, adapter, **options),
        ours,
        fast_mode=several,
    )
    theirs = [each.requires_grad_() for each in (teacher if several else [teacher])]
    call(name, student, teacher, adapter, **options).backward()
    assert all(each.grad is None for each in theirs)
    assert all(each.grad.norm() > 0 for each in ours)
    for parameter in adapter.parameters() if adapter else ():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cwd", "ickd", "fsp"])
def test_is_zero_for_a_student_like_its_teacher(name):
    _, teacher = activations(name)
    assert call(name, teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    changed = [teacher[0], teacher[1] * 1.1] if name == "fsp" else teacher + torch.arange(5.0)
    assert call(name, changed, teacher) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_is_a_mean_over_samples_in_any_order(name):
    student, teacher = activations(name)
    adapter = make(getattr(maps, name), {}, student, teacher, seed=0) if made_by(getattr(maps, name)) else None
    pick = (lambda each, rows: [one[rows] for one in each]) if name in SEVERAL else (lambda each, rows: each[rows])
    expected = call(name, student, teacher, adapter)
    for rows in ([2, 0, 3, 1], [0, 1, 2, 3] * 2):
        torch.testing.assert_close(call(name, pick(student, rows), pick(teacher, rows), adapter), expected)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 3, 2, 2, 3), (4, 3)])
def test_tokens_are_places_and_features_channels(name, shape):
    student, teacher = draw(shape, shape)
    if name in ("cwd", "ickd") and len(shape) == 2:
        with pytest.raises(ShapeError, match=r"activations \(4, 3\) have no places"):
            call(name, student, teacher)
        return
    arrays = [array(each.transpose(1, 2) if each.dim() == 3 else each) for each in (student, teacher)]
    adapter = make(vid, {}, student, teacher, seed=0)
    more = [adapter] if name == "vid" else []
    expected = float(REFERENCES[name][0](*arrays, *more))
    assert call(name, student, teacher, adapter).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    student, teacher = activations(name)
    halves = [each.half() if name in SINGLE else [one.half() for one in each] for each in (student, teacher)]
    adapter = make(getattr(maps, name), {}, *halves, seed=0) if made_by(getattr(maps, name)) else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(name, *halves, adapter)
    assert found.dtype == torch.float32
    single = [each.float() if name in SINGLE else [one.float() for one in each] for each in halves]
    torch.testing.assert_close(found, call(name, *single, adapter))


@pytest.mark.parametrize("name", LOSSES)
def test_zeros_extremes_and_few_samples_give_finite_values_and_slopes(name):
    base = activations(name, dtype=torch.float32)[0]
    for ours, theirs in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e4, -1e4), (-1e4, 1e4), (1.0, -1.0)):
        for size in (0, 1, 3):
            student = [
                (torch.randn(one[:size].shape) * ours).requires_grad_() for one in (base if name in SEVERAL else [base])
            ]
            teacher = [torch.full_like(one, theirs, requires_grad=False) for one in student]
            for dtype in (torch.float32, torch.float16):
                pair = [[one.to(dtype) for one in each] for each in (student, teacher)]
                value = call(name, *(pair if name in SEVERAL else [each[0] for each in pair]))
                assert value.isfinite()
                assert value.dtype == torch.float32
                # Slopes of this size have no place in half precision.
                if dtype == torch.float32 or abs(ours) <= 1:
                    assert all(each.isfinite().all() for each in torch.autograd.grad(value, student))


@pytest.mark.parametrize("name", ["ofd", "ab", "cwd", "ickd"])
def test_channels_may_differ_with_an_adapter(name):
    student, teacher = draw((4, 2, 2, 5), MAPS, dtype=torch.float32)
    layer = nn.Conv2d(2, 3, 1)
    torch.testing.assert_close(
        getattr(maps, name)(student, teacher, layer), getattr(maps, name)(layer(student), teacher)
    )
    with pytest.raises(ShapeError, match="differ in features; give an adapter"):
        getattr(maps, name)(student, teacher)


@pytest.mark.parametrize("name", SINGLE)
def test_maps_are_pooled_to_the_smaller_size(name):
    student, teacher = draw((4, 3, 4, 8), (4, 3, 2, 4))
    small = torch.from_numpy(shrunk(student.numpy(), (2, 4)))
    torch.testing.assert_close(call(name, student, teacher), call(name, small, teacher))


def test_margin_is_the_mean_of_the_negative_part_as_the_papers_is_of_a_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    shift, spread = torch.tensor([0.5, -0.3]), torch.tensor([1.0, 2.0])
    teacher = shift + spread * torch.randn(200_000, 2, generator=generator)
    density = torch.exp(-((shift / spread) ** 2) / 2) / math.sqrt(2 * math.pi)
    expected = shift - spread * density / torch.distributions.Normal(0, 1).cdf(-shift / spread)
    # The mean of 60 000 values or more, of a spread up to 2.
    torch.testing.assert_close(maps._margins(teacher)[0], expected, atol=0.02, rtol=0)
    positive = torch.ones(3, 2)
    assert (maps._margins(positive) == 0).all()


def test_ofd_lets_the_student_be_below_where_the_teacher_is_off():
    teacher = torch.tensor([[-1.0, 2.0], [-3.0, 1.0]])
    # The margins are -2 and 0: the targets are -1, -2 and 2, 1.
    assert ofd(torch.tensor([[-5.0, 2.0], [-2.5, 1.0]]), teacher) == 0
    assert ofd(torch.tensor([[0.0, 2.0], [-2.0, 3.0]]), teacher).item() == pytest.approx((1 + 4) / 4)


def test_ab_asks_for_signs_alone():
    student, teacher = draw(MAPS, MAPS)
    torch.testing.assert_close(ab(student, 100 * teacher), ab(student, teacher.sign()))
    assert ab(2 * teacher.sign(), teacher) == 0
    with pytest.raises(RecipeError, match="margin is 0"):
        ab(student, teacher, margin=0.0)


def test_cwd_does_not_see_constants_added_to_a_channel():
    student, teacher = draw(MAPS, MAPS)
    shifts = torch.arange(3.0).view(3, 1, 1)
    torch.testing.assert_close(cwd(student + shifts, teacher - 5), cwd(student, teacher))
    # T² keeps it up: a hot softmax gives half the variance of the difference over the places of a channel.
    difference = (student - teacher).flatten(2)
    limit = difference.var(-1, correction=0).mean() / 2
    torch.testing.assert_close(cwd(student, teacher, temperature=1e5), limit, rtol=1e-4, atol=0)
    with pytest.raises(RecipeError, match="temperature is 0"):
        cwd(student, teacher, temperature=0.0)


def test_ickd_does_not_see_the_order_of_places_or_the_scale():
    student, teacher = draw(MAPS, MAPS)
    torch.testing.assert_close(ickd(3 * student.flip(-1), teacher), ickd(student, 0.1 * teacher))


def test_vid_begins_with_a_variance_of_5_and_learns_what_cannot_be_predicted():
    torch.manual_seed(0)
    student = torch.randn(256, 4)
    teacher = torch.cat([student[:, :1], torch.randn(256, 1)], 1)
    adapter = make(vid, {}, student, teacher, seed=0)
    variance = nn.functional.softplus(adapter.scale) + 1e-5
    torch.testing.assert_close(variance, torch.full((2,), 5.0))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = vid(student, teacher, adapter)
        loss.backward()
        optimizer.step()
    known, noise = (nn.functional.softplus(adapter.scale) + 1e-5).tolist()
    assert known < noise / 4
    assert loss < 0


def test_fsp_is_the_product_of_channels_worked_by_hand():
    # One sample, one channel each, two places: flows are (1·3 + 2·4) / 2 = 5.5 and (1·1 + 1·1) / 2 = 1.
    ours = [torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]])]
    theirs = [torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)]
    assert call("fsp", ours, theirs).item() == pytest.approx(4.5**2)
    # Tokens are places.
    tokens = [[each.flatten(2).transpose(1, 2) for each in side] for side in (ours, theirs)]
    assert call("fsp", *tokens).item() == pytest.approx(4.5**2)


def test_review_reaches_a_teacher_whose_maps_come_from_the_students():
    torch.manual_seed(0)
    student = [torch.randn(8, 3, 8, 8), torch.randn(8, 4, 4, 4)]
    teacher = [torch.tanh(torch.randn(5, 3) @ student[0].flatten(2)).view(8, 5, 8, 8), student[1][:, :2]]
    adapter = make(review, {}, student, teacher, seed=0)
    before = review(student, teacher, adapter).item()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.04)
    for _ in range(60):
        optimizer.zero_grad()
        review(student, teacher, adapter).backward()
        optimizer.step()
    assert review(student, teacher, adapter) < before / 3


def test_review_passes_what_is_above_down():
    student, teacher = activations("review")
    adapter = make(review, {}, student, teacher, seed=0)
    last = student[1].clone().requires_grad_()
    sizes = [each.shape[2:] for each in teacher]
    (slope,) = torch.autograd.grad(adapter([student[0], last], sizes)[0].square().sum(), last)
    assert slope.norm() > 0


@pytest.mark.parametrize("function", [fsp, review])
def test_places_that_do_not_fit_are_refused(function):
    one, other = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4)
    with pytest.raises(ShapeError, match="there are 2 places of the student and 1 of the teacher"):
        function([one, one], [one], [])
    with pytest.raises(ShapeError, match="there are 2 places of the student and 1 of the teacher"):
        make(function, {}, [one, one], [one], seed=0)
    with pytest.raises(ShapeError, match="must be maps" if function is review else "one number of dimensions"):
        function([one, other], [one, other], [nn.Identity(), nn.Identity()])
    with pytest.raises(ShapeError, match="do not fit"):
        function([one, one], [one[:1], one[:1]], [nn.Identity(), nn.Identity()])


def test_an_adapter_that_makes_other_sizes_is_refused():
    maps_of = [torch.ones(2, 3, 4, 4)]
    with pytest.raises(ShapeError, match=r"fused maps \(2, 3, 2, 2\) and the teacher's \(2, 3, 4, 4\) differ"):
        review(maps_of, maps_of, lambda maps, sizes: [maps[0][..., :2, :2]])


def test_adapters_of_places_are_a_function_of_the_seed_alone():
    student, teacher = activations("fsp")
    torch.manual_seed(1)
    first = make(fsp, {}, student, teacher, seed=3)
    torch.manual_seed(2)
    again, other = (make(fsp, {}, student, teacher, seed=seed) for seed in (3, 4))
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert not torch.equal(first[0].weight[0], first[1].weight[0, :2])


class Stages(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width))
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", [*LOSSES, "crd", "queue_kl"])
def test_a_narrower_network_learns_by_it(name):
    torch.manual_seed(0)
    student, teacher = Stages(4), Stages(6)
    batch = torch.randn(16, 1, 8, 8)
    at = {"first": "first", "second": "second"}
    made = distillation(
        teacher,
        lambda model, x: model(x),
        lambda output, _: output.mean(),
        [losses.build({name: {"at": at, "weight": 1.0}})],
        label_weight=0,
    ).prepare(student, batch)
    optimizer = torch.optim.Adam([*student.parameters(), *made.parameters()], lr=0.02)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(made(student, batch).values())
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    # A likelihood has no 0 to fall to, and its variances fall slowly from 5.
    assert values[-1] < (values[0] - 0.1 if name == "vid" else 0.9 * values[0])
    assert len(made.adapters) == (1 if name in SEVERAL else 2)


def test_one_value_a_channel_is_normalized_by_what_was_seen_before():
    # The batch itself has no variance then, as in the rest of an epoch at the last stage of a network.
    student, teacher = ([each] for each in draw((1, 3, 1, 1), (1, 4, 1, 1), dtype=torch.float32))
    adapter = make(review, {}, student, teacher, seed=0)
    before = {name: buffer.clone() for name, buffer in adapter.named_buffers()}
    leaf = student[0].requires_grad_()
    value = review([leaf], teacher, adapter)
    assert torch.autograd.grad(value, leaf)[0].norm() > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in adapter.named_buffers())
    wider, higher = ([each.repeat(2, 1, 1, 1)] for each in (student[0].detach(), teacher[0]))
    review(wider, higher, adapter)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in adapter.named_buffers())
