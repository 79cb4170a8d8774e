"""Losses between transformers against their papers, in NumPy and float64; no padding changes them."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slivo import losses
from slivo.distill import distillation, tokens
from slivo.distill.tokens import attention_maps, attention_relation, hidden, hidden_mse, relation
from slivo.errors import RecipeError, ShapeError

BATCH, LENGTH = 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0]])


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def ref_hidden(student, teacher, mask):
    values = [
        1 - s @ t / math.sqrt((s @ s) * (t @ t))
        for rows in zip(student, teacher, mask, strict=True)
        for s, t, counts in zip(*rows, strict=True)
        if counts
    ]
    return np.mean(values)


def ref_hidden_mse(student, teacher, mask):
    values = [
        (s - t) ** 2
        for rows in zip(student, teacher, mask, strict=True)
        for s, t, counts in zip(*rows, strict=True)
        if counts
    ]
    return np.mean(values)


def ref_attention_maps(student, teacher, mask):
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (each.mean(1, keepdims=True) for each in (student, teacher))
    values = [
        (student[b, h, i, j] - teacher[b, h, i, j]) ** 2
        for b, h, i, j in np.ndindex(*teacher.shape)
        if mask[b, i] and mask[b, j]
    ]
    return np.mean(values)


def log_softmax(values):
    return values - np.log(np.exp(values).sum())


def ref_attention_relation(student, teacher, mask, heads=8):
    values = []
    for b in range(len(mask)):
        counted = [i for i in range(mask.shape[1]) if mask[b, i]]
        for head in range(heads):
            logs = []
            for queries, keys in (student, teacher):
                width = queries.shape[-1] // heads
                part = slice(head * width, (head + 1) * width)
                q, k = queries[b, counted, part], keys[b, counted, part]
                logs.append([log_softmax(np.array([row @ other for other in k]) / math.sqrt(width)) for row in q])
            values += [(np.exp(p) * (p - q)).sum() for q, p in zip(*logs, strict=True)]
    return np.mean(values)


def ref_relation(student, teacher, mask, heads=8):
    return ref_attention_relation((student, student), (teacher, teacher), mask, heads)


STATES = [((BATCH, LENGTH, 4), (BATCH, LENGTH, 4))]
# Widths, and numbers of heads, may differ where it is relations that are compared.
WIDTHS = [((BATCH, LENGTH, 8), (BATCH, LENGTH, 24)), ((BATCH, LENGTH, 16), (BATCH, LENGTH, 16))]
SQUARE = (LENGTH, LENGTH)
REFERENCES = {
    "hidden": (ref_hidden, STATES, [{}]),
    "hidden_mse": (ref_hidden_mse, STATES, [{}]),
    "attention_maps": (ref_attention_maps, [((BATCH, 2, *SQUARE), (BATCH, heads, *SQUARE)) for heads in (2, 3)], [{}]),
    "relation": (ref_relation, WIDTHS, [{}, {"heads": 1}, {"heads": 4}]),
    "attention_relation": (ref_attention_relation, WIDTHS, [{}, {"heads": 2}]),
}
LOSSES = [
    name
    for name, value in vars(tokens).items()
    if inspect.isfunction(value) and value.__module__ == tokens.__name__ and name[0] != "_"
]
CASES = [
    (name, *shapes, options)
    for name, (_, places, choices) in REFERENCES.items()
    for shapes in places
    for options in choices
]


def activations(name, ours, theirs, *, seed=0, dtype=torch.float64):
    """Return what a loss compares: one tensor each, or queries and keys."""
    if name != "attention_relation":
        return draw(ours, theirs, seed=seed, dtype=dtype)
    values = draw(ours, ours, theirs, theirs, seed=seed, dtype=dtype)
    return values[:2], values[2:]


def mapped(function, activation):
    return [function(each) for each in activation] if isinstance(activation, list) else function(activation)


def tensors(activation):
    return activation if isinstance(activation, list) else [activation]


def shortened(name, each):
    """Leave the last two tokens out."""
    return each[..., :3, :3] if name == "attention_maps" else each[:, :3]


def cut(each, *, size, rows, dtype):
    return (size * each[:rows]).to(dtype).requires_grad_()


def test_every_loss_has_a_reference():
    assert sorted(REFERENCES) == sorted(LOSSES)
    assert set(LOSSES) <= set(losses.names())


@pytest.mark.parametrize(("name", "ours", "theirs", "options"), CASES)
@pytest.mark.parametrize("mask", [None, MASK, MASK.bool()])
def test_is_the_formula_of_its_paper(name, ours, theirs, options, mask):
    student, teacher = activations(name, ours, theirs)
    found = getattr(tokens, name)(student, teacher, mask, **options)
    arrays = [mapped(torch.Tensor.numpy, each) for each in (student, teacher)]
    counted = np.ones((BATCH, LENGTH)) if mask is None else mask.numpy()
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(REFERENCES[name][0](*arrays, counted, **options), rel=1e-10)


@pytest.mark.parametrize(("name", "ours", "theirs", "options"), CASES)
def test_gradient_is_the_slope_and_the_teacher_has_none(name, ours, theirs, options):
    student, teacher = activations(name, ours, theirs)
    function, pair = getattr(tokens, name), isinstance(student, list)
    leaves = [each.requires_grad_() for each in tensors(student)]
    assert torch.autograd.gradcheck(
        lambda *values: function(list(values) if pair else values[0], teacher, MASK, **options), leaves, fast_mode=True
    )
    held = [each.requires_grad_() for each in tensors(teacher)]
    function(student, teacher, MASK, **options).backward()
    assert all(each.grad is None for each in held)
    assert all(each.grad.norm() > 0 for each in leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_is_zero_for_a_student_like_its_teacher(name):
    ours, theirs = REFERENCES[name][1][-1]
    student, teacher = activations(name, ours, theirs)
    function = getattr(tokens, name)
    assert function(student, teacher, MASK) > 0
    assert function(teacher, teacher, MASK).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [0.0, 1e30, math.nan, math.inf])
def test_padding_changes_neither_value_nor_slope(name, garbage):
    # Two samples of three tokens; to have five, they are padded with anything.
    student, teacher = activations(name, *REFERENCES[name][1][0], dtype=torch.float32)
    mask = torch.tensor([[True, True, True, False, False]]).expand(BATCH, -1)
    function = getattr(tokens, name)
    short = [mapped(lambda each: shortened(name, each), each) for each in (student, teacher)]
    padded = [mapped(torch.clone, each) for each in (student, teacher)]
    for each in (*tensors(padded[0]), *tensors(padded[1])):
        rest = each[:, :, 3:] if name == "attention_maps" else each[:, 3:]
        rest.fill_(garbage)
    slopes = []
    for pair, counted in ((short, None), (padded, mask)):
        leaves = [each.detach().clone().requires_grad_() for each in tensors(pair[0])]
        value = function(leaves if isinstance(pair[0], list) else leaves[0], pair[1], counted)
        slopes.append([value.detach(), *(shortened(name, each) for each in torch.autograd.grad(value, leaves))])
    for found, expected in zip(slopes[1], slopes[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_zeros_extremes_and_nothing_that_counts_give_finite_values_and_slopes(name):
    ours, theirs = REFERENCES[name][1][-1]
    nobody = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    cases = ((None, BATCH), (MASK, BATCH), (nobody, BATCH), (None, 1), (None, 0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for size in (1e4, -1e4, 0.0, 1.0):
            for mask, rows in cases:
                pair = activations(name, ours, theirs, dtype=torch.float32)
                student, teacher = (
                    mapped(partial(cut, size=sign, rows=rows, dtype=dtype), each)
                    for each, sign in zip(pair, (size, -1.0), strict=True)
                )
                value = getattr(tokens, name)(student, teacher, mask)
                assert value.isfinite()
                assert value.dtype == torch.float32
                if mask is nobody or not rows:
                    assert value == 0
                if dtype == torch.float32:
                    assert all(each.isfinite().all() for each in torch.autograd.grad(value, tensors(student)))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_single(name):
    student, teacher = activations(name, *REFERENCES[name][1][0], dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(tokens, name)(student, teacher, MASK)
    wide = [mapped(torch.Tensor.float, each) for each in (student, teacher)]
    torch.testing.assert_close(found, getattr(tokens, name)(*wide, MASK))


def test_states_without_tokens_have_no_padding():
    student, teacher = draw((BATCH, 4), (BATCH, 4))
    expected = ref_hidden(student[:, None].numpy(), teacher[:, None].numpy(), np.ones((BATCH, 1)))
    assert hidden(student, teacher, MASK).item() == pytest.approx(expected)
    student, teacher = draw((BATCH, 4, 2, 3), (BATCH, 4, 2, 3))
    rows = [each.flatten(2).transpose(1, 2) for each in (student, teacher)]
    for function in (hidden, hidden_mse):
        torch.testing.assert_close(function(student, teacher, MASK), function(*rows))


def test_widths_may_differ_with_an_adapter():
    student, teacher = draw((BATCH, LENGTH, 3), (BATCH, LENGTH, 4), dtype=torch.float32)
    layer = nn.Linear(3, 4)
    for function in (hidden, hidden_mse):
        torch.testing.assert_close(function(student, teacher, MASK, layer), function(layer(student), teacher, MASK))
        with pytest.raises(ShapeError, match="differ in features; give an adapter"):
            function(student, teacher, MASK)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_scores_that_a_model_has_masked_do_not_count(low):
    student, teacher = draw((1, 2, 3, 3), (1, 2, 3, 3), dtype=torch.float32)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    expected = (student - teacher)[..., ~causal].square().mean()
    found = attention_maps(student.masked_fill(causal, low).requires_grad_(), teacher.masked_fill(causal, low))
    torch.testing.assert_close(found.detach(), expected)
    halves = student.half(), teacher.half().masked_fill(causal, torch.finfo(torch.float16).min)
    torch.testing.assert_close(attention_maps(*halves), expected, rtol=1e-2, atol=1e-3)


def test_with_its_own_heads_the_attention_is_the_models():
    queries, keys, values = draw(*[(2, 4, LENGTH, 3)] * 3)
    own = (queries @ keys.transpose(2, 3) / math.sqrt(3)).softmax(-1)
    torch.testing.assert_close(F.scaled_dot_product_attention(queries, keys, values), own @ values)
    others = draw((2, LENGTH, 8), (2, LENGTH, 8), seed=1)
    theirs = [each.unflatten(-1, (4, 2)).transpose(1, 2) for each in others]
    probabilities = (theirs[0] @ theirs[1].transpose(2, 3) / math.sqrt(2)).softmax(-1)
    expected = F.kl_div(own.log(), probabilities, reduction="none").sum(-1).mean()
    torch.testing.assert_close(attention_relation([queries, keys], others, heads=4), expected)


def test_turns_of_a_whole_head_do_not_matter_to_relations():
    student, teacher = draw((BATCH, LENGTH, 4), (BATCH, LENGTH, 6))
    turn = torch.linalg.qr(draw((4, 4))[0]).Q
    torch.testing.assert_close(relation(student @ turn, teacher, heads=1), relation(student, teacher, heads=1))


def test_what_does_not_fit_is_refused():
    states, longer = torch.ones(2, 3, 8), torch.ones(2, 4, 8)
    for function in (hidden, hidden_mse):
        with pytest.raises(ShapeError, match="not of the same tokens"):
            function(states, longer)
        with pytest.raises(ShapeError, match=r"mask has shape \(2, 4\); .* shape \(2, 3\)"):
            function(states, states, torch.ones(2, 4))
    for wrong in (states, torch.ones(2, 3, 4, 5), torch.ones(2, 2, 5, 5)):
        with pytest.raises(ShapeError, match=r"attention|do not fit"):
            attention_maps(torch.ones(2, 2, 4, 4), wrong)
    with pytest.raises(ShapeError, match="of the same batch and tokens"):
        relation(states, longer)
    with pytest.raises(ShapeError, match=r"3 heads do not divide the 8 features"):
        relation(states, states, heads=3)
    with pytest.raises(ShapeError, match=r"must be \(batch, tokens, features\)"):
        relation(torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ShapeError, match=r"mask has shape \(2, 4\)"):
        relation(states, states, torch.ones(2, 4))
    with pytest.raises(ShapeError, match="there are 1 places of the student and 1 of the teacher; give the queries"):
        attention_relation([states], [states])
    with pytest.raises(RecipeError, match="heads is 0"):
        relation(states, states, heads=0)


class Encoder(nn.Module):
    """An attention block, as transformers have it."""

    def __init__(self, width, heads):
        super().__init__()
        self.embed, self.query, self.key, self.value = (nn.Linear(width if i else 3, width) for i in range(4))
        self.heads, self.head = heads, nn.Linear(width, 2)

    def forward(self, x, mask):
        x = self.embed(x)
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())
        return self.head(out.transpose(1, 2).flatten(2))


def test_a_transformer_learns_from_one_of_other_width_and_heads():
    torch.manual_seed(0)
    student, teacher = Encoder(8, 2), Encoder(24, 3)
    batch = {"x": torch.randn(BATCH, LENGTH, 3), "attention_mask": MASK}

    def run(model, batch):
        return model(batch["x"], batch["attention_mask"])

    terms = [
        losses.kd(temperature=1, weight=1.0),
        losses.relation(at="value"),
        losses.attention_relation(at={"query": "query", "key": "key"}, heads=4),
        losses.hidden_mse(at="embed"),
        losses.hidden(at="embed"),
    ]
    made = distillation(teacher, run, lambda output, _: output.mean(), terms, label_weight=0).prepare(student, batch)
    optimizer = torch.optim.Adam([*student.parameters(), *made.parameters()], lr=0.03)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        parts = made(student, batch)
        sum(parts.values()).backward()
        optimizer.step()
        history.append({name: part.item() for name, part in parts.items()})
    assert list(parts) == ["kd", "relation@value", "attention_relation@query+key", "hidden_mse@embed", "hidden@embed"]
    assert all(history[-1][name] < 0.5 * history[0][name] for name in parts)
    # What is padding has no part in any of them.
    parts = made(student, batch | {"x": batch["x"].masked_fill(MASK[..., None] == 0, 7.0)})
    before = made(student, batch)
    for name in parts:
        torch.testing.assert_close(parts[name], before[name])
