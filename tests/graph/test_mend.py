"""Cut models whose Python code holds sizes: which stay modules, and how."""

from __future__ import annotations

import logging

import pytest
import torch
from oracles.permutation import error, outputs
from torch import fx, nn
from zoo import build

import slivo
from slivo import edits
from slivo.graph.copies import duplicate


@pytest.mark.parametrize(
    "name", ["AmbiguousAttributes", "HalvesRotary", "SizesReadOff", "Halves", "ComplexRotary", "stacked_lstm"]
)
def test_attributes_are_found(name, caplog):
    model, inputs = build(name)
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert type(small) is type(model)
    assert not any(isinstance(module, fx.GraphModule) for module in small.modules())
    assert not [record for record in caplog.records if record.name == "slivo"]


def test_parts_are_replaced_where_no_attribute_helps():
    model, inputs = build("Coupled")
    small = slivo.prune(model.train(), inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert type(small) is type(model)
    assert [isinstance(block, fx.GraphModule) for block in small.blocks] == [True, True]
    assert all(block.training for block in small.blocks)
    again = edits.replay(build("Coupled")[0], edits.from_json(edits.to_json(edits.record(small))))
    again.load_state_dict(small.state_dict())
    assert error(outputs(again.eval(), inputs), outputs(small.eval(), inputs)) == 0


def test_parts_keep_what_is_shared_and_what_is_not_stored():
    """A module that stands in a replaced part and elsewhere says its new size; a cache stays out of checkpoints."""
    model, inputs = build("Keeping")
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert all(isinstance(block, fx.GraphModule) for block in small.blocks)
    assert small.conv.weight is small.blocks[0].conv.weight
    assert small.conv.groups == small.conv.out_channels == len(small.conv.weight) < 16
    constants = {"blocks.0.lifted_tensor_0", "blocks.1.lifted_tensor_0"}  # which the blocks' code makes
    assert set(small.state_dict()) == set(model.state_dict()) | constants
    assert len(model.blocks[0].places) == 1  # as before it ran
    again = edits.replay(build("Keeping")[0], edits.from_json(edits.to_json(edits.record(small))))
    again.load_state_dict(small.state_dict())
    assert error(outputs(again.eval(), inputs), outputs(small.eval(), inputs)) == 0


def test_a_search_leaves_no_tensors_without_values():
    """It runs on shapes alone, and what this model keeps of a run would be one."""
    model, inputs = build("Keeping")
    before = outputs(model, inputs)
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert not any(tensor.is_meta for each in (model, small) for tensor in each.buffers())
    assert error(outputs(model, inputs), before) == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_attention_alone_is_replaced_in_an_encoder(layers):
    """The encoder reads numbers off its attention, and has a fused way past it that knows nothing of a cut."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))
    model, x = nn.Sequential(*model, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 6)
    small = slivo.prune(model, x, keep=slivo.Budget(macs=0.5), scope="uniform")
    replaced = [name for name, module in small.named_modules() if isinstance(module, fx.GraphModule)]
    assert replaced == [f"1.layers.{number}.self_attn" for number in range(layers)]
    for each in (small, duplicate(small)):
        attention = each.get_submodule(replaced[0])
        assert attention.batch_first is True
        with torch.no_grad():
            quick = each(x)
        assert torch.equal(quick, small(x).detach())


def test_parts_can_be_cut_again():
    model, inputs = build("Coupled")
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.7), scope="uniform")
    smaller = slivo.prune(small, inputs, keep=slivo.Budget(params=0.6), scope="uniform")
    assert slivo.trace(smaller, inputs).params < slivo.trace(small, inputs).params
    assert type(smaller) is type(model)


def test_code_of_the_network_itself_makes_it_a_graph(caplog):
    caplog.set_level(logging.WARNING, "slivo")
    model, inputs = build("HardCoded")
    small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.6))
    assert isinstance(small, fx.GraphModule)
    assert "cannot be mended" in caplog.text


def test_a_module_called_twice_has_no_graph_of_its_own(caplog):
    """Its inputs may differ, so the whole network becomes a graph."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(x).view(x.shape[0], 8, -1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.flat, self.head = nn.Conv2d(3, 8, 1), Flat(), nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            y = self.flat(self.flat(x)[..., None])
            return self.head(y.mean(-1))

    x = torch.randn(2, 3, 4, 4)
    caplog.set_level(logging.ERROR, "slivo")
    small = slivo.prune(Net(), x, keep=slivo.Budget(params=0.6))
    assert isinstance(small, fx.GraphModule)
    assert small(x).shape == (2, 2)
