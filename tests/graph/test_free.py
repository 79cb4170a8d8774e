"""Outputs keep their sizes unless the user says otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slivo
from slivo.errors import SlivoError
from slivo.graph.capture import capture, output_names
from slivo.prune import cut, plan


class Backbone(nn.Module):
    """Gives out features beside what it is for."""

    def __init__(self, form: str = "mapping") -> None:
        super().__init__()
        self.form, self.body, self.head = form, nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        features = self.body(x).relu()
        scores = self.head(features)
        forms = {
            "mapping": {"scores": scores, "more": {"features": features}},
            "tuple": (scores, [features]),
            "one": features,
        }
        return forms[self.form]


X = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("mapping", ["output.scores", "output.more.features"]),
        ("tuple", ["output.0", "output.1.0"]),
        ("one", ["output"]),
    ],
)
def test_outputs_have_names(form, names):
    model = Backbone(form)
    assert output_names(capture(model, X)) == names
    assert slivo.trace(model, X)["body out"].fixed == "an output of the network"
    assert slivo.trace(model, X, free=[names[-1]])["body out"].fixed is None
    small = slivo.prune(model, X, keep=slivo.Budget(params=0.6), free=["output*"], only=["body"])
    assert small.body.out_features < 16


def test_what_is_not_free_is_kept():
    small = slivo.prune(Backbone(), X, keep=slivo.Budget(macs=0.5), free=["*.features"])
    out = small(X)
    assert out["scores"].shape == (2, 3)
    assert out["more"]["features"].shape == (2, small.body.out_features) == (2, 8)
    found = plan(Backbone(), X, keep=slivo.Budget(macs=0.5), free=["*.features"])
    assert cut(Backbone(), X, found, free=["*.features"]).body.out_features == 8


def test_an_output_that_is_not_there_is_told():
    with pytest.raises(
        SlivoError, match=r"'logits' matches no output of the model; it gives out output\.scores, output"
    ):
        slivo.trace(Backbone(), X, free=["logits"])
