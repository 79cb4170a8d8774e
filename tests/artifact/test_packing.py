"""Packed files: what goes in comes out, in few bytes, or one is told why not."""

from __future__ import annotations

import json
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slivo
from slivo import edits
from slivo.artifact import PackedFile, read, size_bytes, verify
from slivo.artifact.container import DTYPES, FORMAT, MAGIC, PRELUDE, _digest, write_packed
from slivo.artifact.streams import expand, squeeze
from slivo.edits.quantize import Quantize, QuantSpec
from slivo.errors import ArtifactError, SlivoError

MANIFEST = {"format": 1, "factory": None, "args": {}, "edits": [], "tied": {}, "meta": {}}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def written(file: Path, **tensors: torch.Tensor) -> Path:
    write_packed(file, MANIFEST, tensors.items())
    return file


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32),
)
def test_all_dtypes_and_all_bits_come_back(dtype: str, shape: list[int], density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    size = DTYPES[dtype].itemsize
    # All bits: infinities, numbers that are none with what they carry, minus zero.
    data = random.integers(0, 2 if dtype == "bool" else 256, (*shape, size), "u1")
    data = np.asarray(np.where(random.random((*shape, 1)) < density, data, 0), "u1")
    tensor = torch.from_numpy(data.reshape(-1)).view(DTYPES[dtype]).reshape(shape)
    with tempfile.TemporaryDirectory() as folder, PackedFile(written(Path(folder) / "a.slivo", x=tensor)) as file:
        assert same(file.tensor("x"), tensor)


def test_layouts_of_memory_do_not_matter(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4, 5)
    views = {"t": tensor.permute(2, 0, 1), "s": tensor[::2, 1:, ::3], "c": torch.randn(3, dtype=torch.cfloat).conj()}
    with PackedFile(written(tmp_path / "a.slivo", **views)) as file:
        assert all(torch.equal(file.tensor(name), each) for name, each in views.items())
        file.tensor("t").add_(1)  # is memory of its own


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net, x = toys.net(8), torch.randn(4, 12)
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: net,
        "pruned": lambda: slivo.prune(net, x, keep=slivo.Budget(params=0.6)),
        "sparse": lambda: slivo.sparsify(net, sparsity=0.9),
        "quantized": lambda: slivo.quantize(net, batches=[x]),
        "sparse and quantized": lambda: slivo.quantize(slivo.sparsify(net, sparsity=0.5), batches=[x]),
        "tied": tied,
        "half": nn.Linear(12, 5).half,
    }
    return makers[name]().eval()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("name", ["plain", "pruned", "sparse", "quantized", "sparse and quantized", "tied", "half"])
def test_models_come_back_bit_by_bit(tmp_path: Path, name: str) -> None:
    model = network(name)
    base = {"tied": tied, "half": lambda: network("half")}.get(name, lambda: toys.net(8))
    file, folder = tmp_path / "net.slivo", tmp_path / "net"
    packed = slivo.pack(model, file, meta={"note": "é"})
    slivo.save(model, folder, meta={"note": "é"})
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    again = slivo.load(file, factory=base)
    names = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    found = {**dict(again.named_parameters(remove_duplicate=False)), **dict(again.named_buffers())}
    assert found.keys() == names.keys()
    assert all(same(found[key], value) for key, value in names.items())
    x = torch.randint(0, 50, (3,)) if name == "tied" else torch.randn(3, 12).to(torch.half if name == "half" else None)
    assert torch.equal(again(x), model(x))
    assert edits.record(again) == edits.record(model)
    # From the folder, the file is the same; from the file, the folder.
    assert slivo.pack(folder, tmp_path / "other.slivo").bytes == packed.bytes == size_bytes(file)
    assert (tmp_path / "other.slivo").read_bytes() == file.read_bytes()
    slivo.unpack(file, folder)
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before
    assert read(file) == {key: value for key, value in read(folder).items() if key != "tensors_sha256"}


def test_tied_tensors_are_in_the_file_once(tmp_path: Path) -> None:
    packed = slivo.pack(network("tied"), tmp_path / "a.slivo")
    assert [each.name for each in packed.tensors] == ["0.weight"]
    again = slivo.load(tmp_path / "a.slivo", factory=tied)
    assert again[1].weight is again[0].weight


def test_the_table_adds_up_to_the_file(tmp_path: Path) -> None:
    packed = slivo.pack(network("sparse"), tmp_path / "a.slivo")
    assert packed.bytes == (tmp_path / "a.slivo").stat().st_size
    assert packed.header_bytes + sum(each.packed_bytes for each in packed.tensors) == packed.bytes
    assert packed.tensors[0].offset == packed.header_bytes
    for one, other in zip(packed.tensors, packed.tensors[1:], strict=False):
        assert other.offset == one.offset + one.packed_bytes
    model = network("sparse")
    assert packed.dense_bytes == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert packed.ratio == pytest.approx(packed.dense_bytes / packed.bytes)
    count = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert packed.bits == pytest.approx(8 * packed.bytes / count)
    assert packed.tensors[0].bits == pytest.approx(8 * packed.tensors[0].packed_bytes / packed.tensors[0].count)


def test_shared_and_sparse_weights_take_what_their_entropy_says(tmp_path: Path) -> None:
    """Layers as Deep Compression leaves them: 92 % zeros, and 31 other values."""
    draw = torch.Generator().manual_seed(0)
    tensors, bound, books = {}, 0.0, 0
    for name, shape in (("fc1.weight", (300, 784)), ("fc2.weight", (100, 300)), ("fc3.weight", (10, 100))):
        index = (torch.randn(shape, generator=draw) * 5 + 15).round().clamp(0, 30).long()
        kept = torch.rand(shape, generator=draw) < 0.08
        tensors[name] = torch.where(kept, torch.randn(31, generator=draw)[index], 0)
        share = kept.double().mean()
        bound -= float(kept.numel() * (share * share.log2() + (1 - share) * (1 - share).log2())) / 8
        used = torch.unique(index[kept], return_counts=True)[1].double()
        bound += float((used * (used.sum() / used).log2()).sum()) / 8
        books += 4 * len(used)
    file = written(tmp_path / "a.slivo", **tensors)
    with PackedFile(file) as opened:
        assert all(same(opened.tensor(name), each) for name, each in tensors.items())
        found = opened.packed
    assert found.tensors[0].codec == "gaps + codebook"
    # The whole file: header, checksums and the frequencies of all symbols among it.
    assert bound + books < found.bytes < 1.02 * bound + books + 450
    assert found.bytes < 1.05 * bound + books
    assert found.ratio > 40


def test_codes_of_few_bits_are_packed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    for width in (2, 4, 8):
        edited = edits.apply(model, Quantize({"0": QuantSpec(weight_bits=width)}))
        packed = slivo.pack(edited, tmp_path / "a.slivo")
        codes = next(each for each in packed.tensors if each.name == "0.weight_codes")
        assert codes.bits < width + 0.1


def test_a_model_that_cannot_be_packed_is_told(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for bad in (torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        with pytest.raises(ArtifactError, match=r"x is .*what can be packed is dense"):
            written(tmp_path / "a.slivo", x=bad)
    with pytest.raises(ArtifactError, match="must be JSON values"):
        slivo.pack(model, tmp_path / "a.slivo", meta={"a": object()})
    with pytest.raises(ArtifactError, match="room for 32 MiB"):
        slivo.pack(model, tmp_path / "a.slivo", meta={"a": "x" * 2**25})
    assert list(tmp_path.iterdir()) == []


def test_places_that_do_not_fit_are_told(tmp_path: Path) -> None:
    folder, file = tmp_path / "net", tmp_path / "net.slivo"
    slivo.save(nn.Linear(2, 2), folder)
    slivo.pack(folder, file)
    for call, told in (
        (lambda: slivo.pack(folder, folder), "is a folder; a packed artifact is a file: net.slivo, say"),
        (lambda: slivo.pack(file, tmp_path / "b.slivo"), "is a file; give the folder of an artifact"),
        (lambda: slivo.pack(folder, file, factory="a:b"), "says itself how it is made"),
        (lambda: slivo.pack(folder, file, meta={}), "says itself how it is made"),
        (lambda: slivo.pack(tmp_path / "no", file), "no is no slivo artifact"),
        (lambda: slivo.unpack(folder, tmp_path / "b"), "is no file; give one that slivo pack wrote"),
        (lambda: slivo.unpack(file, tmp_path), "exists and is no slivo artifact"),
        (lambda: PackedFile(tmp_path / "no"), "no cannot be read: No such file"),
    ):
        with pytest.raises(ArtifactError, match=told):
            call()
    with PackedFile(file) as opened, pytest.raises(ArtifactError, match=r"no tensor 'x'; it has bias, weight …"):
        opened.tensor("x")
    (tmp_path / "text").write_text("dear")
    with pytest.raises(ArtifactError, match="is no packed artifact"):
        slivo.load(tmp_path / "text")


def test_what_packing_needs_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slivo.artifact import streams

    monkeypatch.setitem(sys.modules, "zstandard", None)
    streams._zstandard.cache_clear()
    with pytest.raises(SlivoError, match=r"zstandard is not installed .* pip install 'slivo\[pack\]'"):
        slivo.pack(nn.Linear(2, 2), tmp_path / "a.slivo")


def forged(file: Path, **changes: Any) -> Path:
    """Change values of a file's header, and seal it again."""
    content = file.read_bytes()
    length = PRELUDE.unpack_from(content)[-2]
    header = json.loads(expand(content[PRELUDE.size : PRELUDE.size + length], None))
    header.update(changes)
    return sealed(file, json.dumps({key: value for key, value in header.items() if value is not ...}).encode())


def sealed(file: Path, text: bytes, version: int = FORMAT, needs: tuple[int, ...] = (0, 1, 0)) -> Path:
    content = file.read_bytes()
    length = PRELUDE.unpack_from(content)[-2]
    header = squeeze(text)
    prelude = PRELUDE.pack(MAGIC, version, *needs, len(header), b"")[:-8]
    file.write_bytes(prelude + _digest(prelude, header) + header + content[PRELUDE.size + length :])
    return file


def test_a_newer_format_says_which_version_reads_it(tmp_path: Path) -> None:
    file = sealed(written(tmp_path / "a.slivo", x=torch.zeros(2)), b"\x00", FORMAT + 1, (7, 3, 1))
    with pytest.raises(
        ArtifactError, match=r"format 2, which slivo 7\.3\.1 or later reads; this version reads up to 1"
    ):
        slivo.load(file)
    file = forged(written(tmp_path / "b.slivo", x=torch.zeros(2)), format=99)
    with pytest.raises(ArtifactError, match="format 99; this version reads up to 1: upgrade"):
        slivo.load(file)


ROW = ["x", "float32", [2], ["all", "words", 0], [["raw", 2, 2]] * 4, "00"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"edits": ...}, "edits is missing"),
        ({"edits": {}}, "edits is missing from its header, or of the wrong kind"),
        ({"edits": [1]}, "one of its edits is no object"),
        ({"tied": {"a": 1}}, "tied tensors has no name"),
        ({"factory": 1}, "factory is missing"),
        ({"tensors": ...}, "table of tensors is none"),
        ({"tensors": [1]}, "line of its table of tensors cannot be read"),
        ({"tensors": [ROW[:-1]]}, "cannot be read"),
        ({"tensors": [[1, *ROW[1:]]]}, "cannot be read"),
        ({"tensors": [["\ud800", *ROW[1:]]]}, "cannot be read"),
        ({"tensors": [["x", "qint8", *ROW[2:]]]}, "x has dtype 'qint8', which is not known here"),
        ({"tensors": [["x", [], *ROW[2:]]]}, "not known here"),
        ({"tensors": [["x", "float32", [2], ["all", "spell", 0], *ROW[4:]]]}, "codec that is not known here"),
        ({"tensors": [["x", "float32", [2], ["half", "words", 0], *ROW[4:]]]}, "codec that is not known here"),
        ({"tensors": [["x", "float32", [2], ROW[3], [["rar", 2, 2]] * 4, "00"]]}, "codec that is not known here"),
        ({"tensors": [["x", "float32", [-2], *ROW[3:]]]}, "cannot be read"),
        ({"tensors": [["x", "float32", [True], *ROW[3:]]]}, "cannot be read"),
        ({"tensors": [["x", "float32", [2**59, 4, 0], *ROW[3:]]]}, "a shape that no tensor has"),
        ({"tensors": [["x", "float32", [1] * 65, *ROW[3:]]]}, "a shape that no tensor has"),
        ({"tensors": [["x", "float32", [2**50], *ROW[3:]]]}, "bytes, which are not those that its header says"),
        ({"tensors": [ROW, ROW]}, "two tensors 'x'"),
        ({"tensors": []}, "bytes, which are not those that its header says"),
    ],
)
def test_headers_that_do_not_hold_together_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    file = forged(written(tmp_path / "a.slivo", x=torch.tensor([1.5, -2.25])), **changes)
    with pytest.raises(ArtifactError, match=f"a.slivo is damaged: .*{told}.*; restore it from a copy"):
        PackedFile(file)


@pytest.mark.parametrize("text", [b"{", b"[]", b"1", b"[" * 10_000, b"\xff\xfe", b'{"a": ' + b"1" * 5000 + b"}"])
def test_headers_that_are_no_object_are_refused(tmp_path: Path, text: bytes) -> None:
    file = sealed(written(tmp_path / "a.slivo", x=torch.zeros(2)), text)
    with pytest.raises(ArtifactError, match="is damaged"):
        verify(file)


def test_the_start_of_a_file_is_checked(tmp_path: Path) -> None:
    file = written(tmp_path / "a.slivo", x=torch.randn(20))
    whole = file.read_bytes()
    for length, told in ((0, "no packed artifact"), (12, "cut off"), (60, "cut off"), (len(whole) - 1, "bytes, which")):
        file.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=told):
            verify(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(ArtifactError, match="bytes, which are not those"):
        verify(file)


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.slivo"
    slivo.pack(network("sparse"), file)
    whole = file.read_bytes()
    for position in range(0, len(whole), 3):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(ArtifactError, match=r"damaged|format|artifact"):
            verify(file)
    file.write_bytes(whole)
    verify(file)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    file = written(tmp_path / "a.slivo", x=torch.randn(20_000))
    with PackedFile(file) as opened:
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(ArtifactError, match="x is damaged: the file has become shorter"):
            opened.tensor("x")


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    zeros = torch.zeros(2**20)
    file = written(tmp_path / "a.slivo", x=zeros)
    # A byte for each 4096, though a few would do.
    assert file.stat().st_size == (zeros.nbytes - 2**20) // 4096
    with PackedFile(file) as opened:
        assert torch.equal(opened.tensor("x"), zeros)
        row = opened.packed.tensors[0]
    how = [row.plan.positions, row.plan.values, 0]
    many = [
        [f"x{n}", row.dtype, [2**18], how, [[c, min(n, 2**18), b] for c, n, b in row.streams], "00"] for n in range(9)
    ]
    with pytest.raises(ArtifactError, match="bytes, which are not those that its header says"):
        PackedFile(forged(written(tmp_path / "b.slivo", x=torch.zeros(9)), tensors=many))


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        str(n): torch.randn(2**16, generator=draw) * (torch.rand(2**16, generator=draw) < 0.1) for n in range(24)
    }
    file = written(tmp_path / "a.slivo", **tensors)
    one = tensors["0"].nbytes
    with PackedFile(file) as opened:
        opened.tensor("0")  # what is imported at first use
        tracemalloc.start()
        assert list(opened) == list(tensors)
        for name in reversed(list(opened)):
            assert same(opened.tensor(name), tensors[name])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # All would be 24.
    assert peak < 8 * one


def test_mutated_files_give_an_error_or_the_right_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    script = import_module("fuzz_pack")
    found, bad = script.fuzz(300, 0, tmp_path)
    sys.modules.pop("fuzz_pack")
    assert not bad
    assert {end for _, end in found} <= {"error", "right"}
    assert len({kind for kind, _ in found}) == 8


def test_packed_files_are_the_same_from_one_run_to_the_next(tmp_path: Path) -> None:
    contents = [slivo.pack(network(name), tmp_path / "a").path.read_bytes() for name in ("sparse", "sparse")]
    assert contents[0] == contents[1]
