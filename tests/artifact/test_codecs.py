"""Streams and codecs: everything comes back bit by bit, in about as few bytes as its entropy says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from slivo.artifact import frequencies
from slivo.artifact.choice import distinct, smallest
from slivo.artifact.codecs import Plan, coded, put_together, take_apart
from slivo.artifact.streams import CODINGS, MalformedError, Stream, decode, encode, estimate, squeeze

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12)


@st.composite
def words(draw: st.DrawFn) -> np.ndarray:
    """Words of any width: few different ones or many, few zeros or many, in groups or anywhere."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    shape = draw(SHAPES)
    book = draw(st.lists(st.integers(0, 2 ** (8 * width) - 1), min_size=1, max_size=draw(st.sampled_from([1, 2, 9]))))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    high = 2 ** (8 * width) - 1
    found = random.choice(np.array(book, f"u{width}"), shape) if draw(st.booleans()) else None
    found = random.integers(0, high, shape, f"u{width}", endpoint=True) if found is None else found
    kept = random.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    return np.asarray(np.where(kept, found, 0), f"u{width}")


@settings(deadline=None, max_examples=80)
@given(words(), st.booleans())
def test_tensors_come_back_bit_by_bit(found: np.ndarray, floating: bool) -> None:
    flat = found.reshape(-1)
    plan, streams = smallest(flat, found.shape, floating=floating)
    again = put_together(streams, found.shape, plan, width=found.itemsize, floating=floating)
    assert again.dtype == found.dtype
    assert np.array_equal(again, flat)


@settings(deadline=None, max_examples=80)
@given(words(), st.data())
def test_every_plan_that_fits_is_right(found: np.ndarray, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, max(0, found.ndim - 1)))
    positions = data.draw(st.sampled_from(["all", "mask", "gaps", "groups"]))
    sizes: tuple[int, ...] = (data.draw(st.integers(1, 255)),) if positions == "gaps" else ()
    if positions == "groups":
        # At most two of four are left.
        fitting = found.ndim > 0 and found.shape[dim] % 4 == 0
        positions, sizes = ("groups", (2, 4)) if fitting else ("all", ())
        if fitting:
            found = np.moveaxis(found.copy(), dim, -1)
            found[..., 1::4] = found[..., 2::4] = 0
            found = np.ascontiguousarray(np.moveaxis(found, -1, dim))
    plan = Plan(positions, data.draw(st.sampled_from(["words", "codebook"])), dim, sizes)
    floating = data.draw(st.booleans())
    streams = coded(take_apart(found.reshape(-1), found.shape, plan, floating=floating), found.nbytes)
    again = put_together(streams, found.shape, plan, width=found.itemsize, floating=floating)
    assert np.array_equal(again, found.reshape(-1))


def symbols(kind: str, count: int, top: int) -> np.ndarray:
    random = np.random.default_rng(count + top)
    found = {
        "uniform": random.integers(0, top, count),
        "skewed": np.minimum(random.geometric(min(1.0, 8 / top), count) - 1, top - 1),
        "steps": np.arange(count) // 100 % top,
        "same": np.full(count, top - 1),
        "ends": np.where(random.random(count) < 0.5, 0, top - 1),
    }[kind]
    return found.astype("u1" if top <= 256 else "u2")


@pytest.mark.parametrize("ans", [True, False])
@pytest.mark.parametrize("top", [1, 2, 3, 7, 16, 33, 100, 256, 257, 5000, 65536])
def test_streams_come_back(top: int, ans: bool) -> None:
    for kind in ("uniform", "skewed", "steps", "same", "ends"):
        for count in (0, 1, 2, 3, 7, 8, 9, 1000, 5000):
            given = symbols(kind, count, top)
            stream = encode(given, ans=ans)
            assert stream.coding in CODINGS
            again = decode(stream, given.itemsize)
            assert again.dtype == given.dtype
            assert np.array_equal(again, given)
            assert len(stream.data) <= given.nbytes


def entropy(given: np.ndarray) -> float:
    """Bytes that independent symbols of these frequencies take at least."""
    counts = np.unique(given, return_counts=True)[1]
    return float((counts * np.log2(len(given) / counts)).sum() / 8)


def test_every_coding_is_the_best_of_some_stream() -> None:
    sparse = (np.random.default_rng(0).random((3, 2000)) < 0.003).astype("u1")
    given = [
        *(symbols("uniform", 3000, 2**bits) for bits in range(1, 9)),
        *(symbols("uniform", 1500, 2**bits) for bits in range(9, 15)),
        symbols("same", 10, 4), symbols("skewed", 3000, 32), symbols("steps", 3000, 200),
    ]  # fmt: skip
    found = {encode(each).coding for each in given}
    found |= {encode(np.tile(sparse[0] * high, 40), ans=False).coding for high in (1, 3, 15)}
    found.add(encode(symbols("uniform", 200_000, 2**15), ans=False).coding)
    long = [np.random.default_rng(high).choice(high + 1, 30_000, p=p) for high, p in SKEWED.items()]
    found |= {encode(each.astype("u1"), ans=False).coding for each in long}
    assert found == CODINGS


# Shares of symbols of which Huffman codes need several in a byte.
SKEWED = {
    1: [0.9, 0.1],
    3: [0.85, 0.05, 0.05, 0.05],
    15: [0.65, *[0.35 / 15] * 15],
}


@pytest.mark.parametrize("top", [2, 5, 32, 200])
def test_entropy_coding_is_near_the_entropy(top: int) -> None:
    given = symbols("skewed", 40_000, top) if top > 5 else symbols("uniform", 40_000, top) // 2
    bound, table = entropy(given), top / 2 + 10
    assert bound <= len(encode(given).data) <= 1.004 * bound + table
    assert len(encode(given, ans=False).data) <= 1.06 * bound + 2 * table
    assert estimate(np.bincount(given)) == pytest.approx(bound, rel=0.01, abs=table)


def test_frequencies_say_probabilities_to_a_tenth() -> None:
    counts = np.random.default_rng(0).integers(0, 1000, 300) * (np.arange(300) % 7 > 0)
    table = frequencies.measure(counts)
    assert frequencies.unpack(frequencies.pack(table), 300) == (table, len(frequencies.pack(table)))
    weights = frequencies.weights(table)
    shares = counts[counts > 0] / counts.sum()
    assert np.array_equal(weights > 0, counts > 0)
    assert np.allclose(weights[counts > 0] / 2**30, shares, rtol=2 ** (1 / 8) - 1 + 1e-6)
    # All words are whole numbers, whatever the machine.
    assert np.array_equal(weights, weights.astype(np.int64))
    # The greatest code is for what is rarer than can be said.
    assert frequencies.measure(np.array([1, 2**40]))[0] == 120
    assert frequencies.weights([120])[0] == 1


@pytest.mark.parametrize(
    ("shape", "density", "codec"),
    [
        ((300, 784), 0.08, "gaps + codebook"),
        ((64, 64, 3, 3), 0.5, "mask"),
        ((64, 64), 1.0, "dense"),
    ],
)
def test_the_codec_is_the_one_that_one_expects(shape: tuple[int, ...], density: float, codec: str) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=shape).astype("f4")
    if "codebook" in codec:
        values = np.round(values).astype("f4") + np.float32(0.25)
    values = np.where(random.random(shape) < density, values, np.float32(0))
    assert smallest(values.view("u4").reshape(-1), shape, floating=True)[0].name == codec


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_patterns_are_found_along_their_dimension(dim: int) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(32, 32, 32)).astype("f4")
    groups = np.moveaxis(values, dim, -1).reshape(-1, 4)
    groups = np.where(np.argsort(np.argsort(abs(groups), 1), 1) >= 2, groups, 0)
    values = np.ascontiguousarray(np.moveaxis(groups.reshape(32, 32, 32), -1, dim)).astype("f4")
    plan, streams = smallest(values.view("u4").reshape(-1), values.shape, floating=True)
    assert (plan.positions, plan.dim) in {("groups", dim), ("mask", dim)}
    # log2(6) bits for each four, and the values.
    values_alone = encode_all(values[values != 0])
    positions = 32**3 / 4 * np.log2(6) / 8
    assert sum(len(each.data) for each in streams) <= 1.03 * positions + values_alone


def encode_all(values: np.ndarray) -> int:
    words = values.view("u4").reshape(-1)
    return sum(len(each.data) for each in coded(take_apart(words, words.shape, Plan(), floating=True), words.nbytes))


def test_empty_columns_are_found_along_their_dimension() -> None:
    random = np.random.default_rng(0)
    values = np.where(random.random(400) < 0.1, random.integers(1, 9, (500, 400)), 0).astype("u1")
    plan, streams = smallest(values.reshape(-1), values.shape, floating=False)
    assert plan.dim == 0
    assert sum(len(each.data) for each in streams) < 1.1 * 500 * 40 * 3 / 8 + 100


def test_distinct_words_are_counted_until_there_are_too_many() -> None:
    given = np.random.default_rng(0).integers(0, 300, 3000).astype("u4")
    assert np.array_equal(distinct(given), np.unique(given))
    assert distinct(given, 100) is None
    assert np.array_equal(distinct(given.astype("u2")), np.unique(given))
    assert distinct(given.astype("u2"), 100) is None


def test_a_codebook_of_more_than_256_words() -> None:
    given = np.random.default_rng(0).normal(0, 60, 30_000).round().astype("f4")
    plan, streams = smallest(given.view("u4"), given.shape, floating=True)
    assert plan.values == "codebook"
    assert streams[1].count == 30_000
    bound = entropy(given)
    assert bound < sum(len(each.data) for each in streams) < 1.01 * bound + 2.5 * len(np.unique(given))


RAW = Stream("raw", 4, b"\1\2\3\4")


@pytest.mark.parametrize(
    ("stream", "width", "told"),
    [
        (Stream("raw", 5, b"1234"), 1, "4 bytes where 5 are needed"),
        (Stream("raw", 4, b"1234"), 2, "4 bytes where 8 are needed"),
        (Stream("same", 5, b"12"), 1, "2 bytes where 1 are needed"),
        (Stream("bits3", 8, b"12"), 1, "2 bytes where 3 are needed"),
        (Stream("bits3", 8, b"123"), 2, "not known for numbers of 2 bytes"),
        (Stream("zstd9", 8, b"123"), 1, "not known for numbers of 1 bytes"),
        (Stream("zstd4", 8, b"123"), 2, "not known for numbers of 2 bytes"),
        (Stream("zstd", 8, b"123"), 1, "cannot be read"),
        (Stream("zstd", 8, squeeze(b"1234567")), 1, "says that it holds 7 bytes"),
        (Stream("zstd", 8, squeeze(b"12345678") + b"x"), 1, "cannot be read"),
        (Stream("zstd2", 9, squeeze(b"12")), 1, "says that it holds 2 bytes"),
        (Stream("ans", 8, b"\0"), 1, "cut off"),
        (Stream("ans", 8, b"\0\5\1"), 1, "cut off"),
        (Stream("ans", 8, b"\0\1\x77\1\1\1"), 1, "frequencies are none"),
        (Stream("ans", 8, b"\0\1\x7e\1\1\1\1"), 1, "frequencies are none"),
        (Stream("ans", 8, b"\xff\1\x77\1\1\1\1"), 1, "frequencies are none"),
        (Stream("ans", 8, b"\0\1\x77\0\0\0\0"), 1, "ends as none does"),
        (Stream("ans", 2, b"\0\1\x77" + b"\1" * 40), 1, "more than its symbols"),
    ],
)
def test_what_is_no_stream_is_refused(stream: Stream, width: int, told: str) -> None:
    with pytest.raises(MalformedError, match=told):
        decode(stream, width)


def one(*values: int, count: int | None = None) -> Stream:
    return Stream("raw", len(values) if count is None else count, bytes(values))


@pytest.mark.parametrize(
    ("plan", "streams", "told"),
    [
        (Plan(), [RAW, RAW], "2 streams, which are not those of dense"),
        (Plan(), [one(1, 2, 3)], r"hold \[3\] values where 4"),
        (Plan("mask"), [one(0x50), RAW], r"hold \[4\] values where 2"),
        (Plan("mask"), [one(0x50, 0), one(1, 2)], "do not fit mask"),
        (Plan("mask", sizes=(1,)), [one(0x50), one(1, 2)], "do not fit mask"),
        (Plan("mask", dim=2), [one(0x50), one(1, 2)], "no dimension 2"),
        (Plan("gaps"), [one(0), one(1)], "do not fit gaps"),
        (Plan("gaps", sizes=(0,)), [one(0), one(1)], "do not fit gaps"),
        (Plan("gaps", sizes=(256,)), [one(0), one(1)], "do not fit gaps"),
        (Plan("gaps", sizes=(3,)), [one(*[0] * 5), one(1)], "do not fit gaps"),
        (Plan("gaps", sizes=(3,)), [one(4), one(1)], "gap of 4 is greater than 3"),
        (Plan("gaps", sizes=(3,)), [one(2, 2), one(1, 1)], "lead to position 6 of 4"),
        (Plan("gaps", sizes=(3,)), [one(0, 0), one(1)], r"hold \[1\] values where 2"),
        (Plan("groups"), [one(0), one(1)], "do not fit"),
        (Plan("groups", sizes=(2, 2)), [one(0), one(1)], "do not fit"),
        (Plan("groups", sizes=(1, 32)), [one(0), one(1)], "do not fit"),
        (Plan("groups", sizes=(8, 16)), [one(0), one(1)], "do not fit"),
        (Plan("groups", dim=1, sizes=(1, 4)), [one(0), one(1)], "do not fit"),
        (Plan("groups", dim=1, sizes=(1, 2)), [one(0), one(1)], "do not fit"),
        (Plan("groups", dim=1, sizes=(1, 2)), [one(0, 2), one(1, 1)], "pattern 2 of 2"),
        (Plan(values="codebook"), [one(1, 2), one(0, 1, 2, 0)], "number 2 of a codebook of 2"),
        (Plan(values="codebook"), [one(1, 2), one(0, 1, 1)], "2 bytes for 3 entries does not fit 4"),
        (Plan(values="codebook"), [one(1, 2, 3, 4, 5), one(0, 1, 1, 1)], "5 bytes for 4 entries does not fit 4"),
    ],
)
def test_what_is_no_tensor_is_refused(plan: Plan, streams: list[Stream], told: str) -> None:
    with pytest.raises(MalformedError, match=told):
        put_together(streams, (2, 2), plan, width=1, floating=False)


def test_a_codebook_has_whole_words() -> None:
    with pytest.raises(MalformedError, match="3 bytes for 4 entries"):
        put_together([one(1, 2, 3), one(0, 0, 0, 0)], (4,), Plan(values="codebook"), width=2, floating=False)
