"""The few small networks that recipes and benchmarks need and no library ships."""

from slivo.zoo.mlp import mlp
from slivo.zoo.small_cnn import small_cnn

__all__ = ["mlp", "small_cnn"]
