"""Models written in Keras 3, run by its PyTorch backend: they are modules of PyTorch then."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "pip install keras"


def networks() -> dict[str, Any]:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    if keras.backend.backend() != "torch":
        raise ImportError(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=torch")
    return {
        "cnn-3": lambda: build(lambda: cnn((16, 32, 48)), torch.randn(2, 32, 32, 3)),
        "cnn-2": lambda: build(lambda: cnn((16, 32)), torch.randn(2, 32, 32, 3)),
        "resnet": lambda: build(resnet, torch.randn(2, 32, 32, 3)),
        "bert-like": lambda: build(bert, torch.randint(60, (2, 9))),
    }


def build(model: Callable[[], nn.Module], inputs: Tensor) -> tuple[nn.Module, Tensor]:
    """Make a model whose layers are named alike each time; Keras counts on otherwise, and parameters have its names."""
    import keras

    keras.utils.clear_session()
    return model(), inputs


def cnn(widths: tuple[int, ...]) -> nn.Module:
    """Convolution and pooling, as often as there are widths, and two dense layers."""
    from keras import Input, Sequential, layers

    stack: list[Any] = [Input((32, 32, 3))]
    for width in widths:
        stack += [layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
    return Sequential([*stack, layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10)])


def resnet() -> nn.Module:
    from keras import Input, Model, layers

    inputs = Input((32, 32, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    for width, stride in ((16, 1), (32, 2), (48, 2)):
        skip = x if stride == 1 else layers.Conv2D(width, 1, strides=stride)(x)
        y = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(y))
        x = layers.ReLU()(layers.Add()([skip, y]))
    return Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def bert() -> nn.Module:
    """Embeddings of tokens and positions, two post-norm blocks, and a classifier on the first token."""
    from keras import Input, Model, layers, ops

    inputs = Input((9,), dtype="int64")
    positions = layers.Embedding(9, 32)(ops.arange(9))
    x = layers.LayerNormalization()(layers.Embedding(60, 32)(inputs) + positions)
    for _ in range(2):
        y = layers.MultiHeadAttention(num_heads=4, key_dim=8)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, y]))
        y = layers.Dense(32)(layers.Dense(64, activation="gelu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
    return Model(inputs, layers.Dense(5)(x[:, 0]))
