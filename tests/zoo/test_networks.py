"""The networks that ship have the shapes and sizes that they say."""

import pytest
import torch
from torch import nn

from slivo.zoo import mlp, small_cnn


@pytest.mark.parametrize("width", [1, 8, 64])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, 5)])
def test_small_cnn_maps_images_to_logits(width, channels, size):
    model = small_cnn(width, classes=7, in_channels=channels).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_small_cnn_is_as_large_as_it_says():
    model = small_cnn()
    macs = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, y: macs.append(y[0].numel() * m.weight[0].numel()))
    model.eval()(torch.zeros(1, 1, 8, 8))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 0.48
    assert round(sum(macs) / 1e6, 1) == 4.1


def test_mlp_has_the_layers_asked_for():
    model = mlp(12, 8, 6, 3, dropout=0.1)
    assert [(layer.in_features, layer.out_features) for layer in model if isinstance(layer, nn.Linear)] == [
        (12, 8),
        (8, 6),
        (6, 3),
    ]
    assert sum(isinstance(layer, nn.Dropout) for layer in model) == 2
    assert model(torch.zeros(5, 3, 2, 2)).shape == (5, 3)
    with pytest.raises(ValueError, match="at least"):
        mlp(3)
