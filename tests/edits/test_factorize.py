"""The edit that puts thin layers in: they do what the layer did, and its JSON says all that a file needs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from slivo import edits
from slivo.edits.factorize import Factorize, Factors
from slivo.errors import ArtifactError, SlivoError
from slivo.factorize.passes import fill_
from slivo.factorize.sites import Site
from slivo.factorize.solve import basis, pieces

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": (2, 3), "stride": 2, "padding": 1, "padding_mode": "reflect", "bias": False},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "dilation": 2},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2), "padding_mode": "replicate"},
    {"kernel_size": (4, 2), "padding": "same"},
    {"kernel_size": (3, 2), "padding": "valid", "stride": 3},
]


def whole(layer: nn.Module, kind: str) -> nn.Module:
    """Thin layers that lose nothing."""
    ranks = Site("", layer).most(kind)
    new = edits.apply(nn.Sequential(layer), Factorize({"0": Factors(kind, ranks)}))[0]
    fill_(new, pieces(basis(kind, layer.weight), ranks))
    return new


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("options", "kind"), list(product(CONVOLUTIONS, ["outputs", "inputs", "spatial", "tucker2"])))
def test_thin_convolutions_do_what_the_convolution_did(options: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, **options).double()
    new, x = whole(layer, kind), torch.randn(2, 3, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(new(x), layer(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(new(x[0]), layer(x[0]), atol=1e-10, rtol=0)
    assert [each.bias is not None for each in new] == [False] * (len(new) - 1) + [layer.bias is not None]


@pytest.mark.parametrize("kind", ["outputs", "inputs"])
def test_in_one_dimension_too(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2, padding_mode="circular").double()
    x = torch.randn(2, 4, 30, dtype=torch.float64)
    torch.testing.assert_close(whole(layer, kind)(x), layer(x), atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", CONVOLUTIONS[:5])
def test_four_layers_of_a_canonical_decomposition_have_its_places(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 5, **options).double()
    edit = Factorize({"0": Factors("cp", (4,))})
    new = edits.apply(nn.Sequential(layer), edit)
    terms = [torch.randn(size, 4, dtype=torch.float64) for size in layer.weight.shape]
    out, into, column, row = terms
    fill_(new[0], [into.T[..., None, None], column.T[:, None, :, None], row.T[:, None, None], out[..., None, None]])
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("or,ir,yr,xr->oiyx", *terms))
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64)
    torch.testing.assert_close(new(x), layer(x), atol=1e-10, rtol=0)


def test_dtype_mode_and_what_is_trained_are_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 6, dtype=torch.bfloat16), nn.Linear(6, 4))
    net[0].weight.requires_grad_(False)
    new = edits.apply(net.eval(), Factorize({"0": Factors("svd", (2,)), "1": Factors("svd", (1,))}))
    assert [each.weight.dtype for each in new[0]] == [torch.bfloat16] * 2
    assert not any(each.weight.requires_grad for each in new[0])
    assert all(each.weight.requires_grad for each in new[1])
    assert not any(each.training for each in new.modules())
    assert new[1][1].bias.equal(net[1].bias)
    assert new[0][0].weight.isnan().all()  # until somebody fills it in


def test_a_shared_layer_is_shared_still_and_one_alone_is_replaced() -> None:
    layer = nn.Linear(4, 4)
    net = nn.ModuleDict({"one": layer, "other": nn.ModuleDict({"again": layer})})
    new = edits.apply(net, Factorize({"one": Factors("svd", (1,))}))
    assert new["one"] is new["other"]["again"]
    assert isinstance(edits.apply(layer, Factorize({"": Factors("svd", (1,))})), nn.Sequential)


def test_shapes_are_said_on_the_meta_device() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, device="meta"))
    new = edits.apply(net, Factorize({"0": Factors("tucker2", (2, 4))}))
    assert [tuple(each.weight.shape) for each in new[0]] == [(2, 3, 1, 1), (4, 2, 3, 3), (8, 4, 1, 1)]
    assert all(each.is_meta for each in new.parameters())


def test_json_says_it_all() -> None:
    edit = Factorize({"a.b": Factors("tucker2", (2, 3)), "": Factors("svd", (1,))}, {"head": "its weight is tied"})
    (again,) = edits.from_json(edits.to_json([edit]))
    assert again == edit


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "wavelet", "ranks": [2]},
        {"kind": "svd", "ranks": [2, 3]},
        {"kind": "tucker2", "ranks": [2]},
        {"kind": "svd", "ranks": [0]},
        {"kind": "svd", "ranks": [True]},
        {"kind": "svd", "ranks": ["2"]},
        {"kind": "svd"},
    ],
)
def test_malformed_json_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="malformed"):
        edits.from_json([{"kind": "factorize", "modules": {"0": data}}])


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ReLU(), "svd"),
        (nn.Linear(4, 4), "outputs"),
        (nn.Conv2d(4, 4, 3), "svd"),
        (nn.Conv2d(4, 4, 3, groups=2), "outputs"),
        (nn.Conv1d(4, 4, 3), "spatial"),
        (nn.ConvTranspose2d(4, 4, 3), "outputs"),
    ],
)
def test_factors_of_another_layer_are_refused(layer: nn.Module, kind: Any) -> None:
    with pytest.raises(SlivoError, match=f"0 is a {type(layer).__name__}; '{kind}' is not for it"):
        edits.apply(nn.Sequential(layer), Factorize({"0": Factors(kind, (1,))}))
