"""Quantization: weights as integer codes, activations rounded to what integer kernels compute with."""

from slivo.quantize.equalization import equalize, smooth
from slivo.quantize.mixed import Damage, Mixed, mixed, sensitivity
from slivo.quantize.post import SCHEMES, WEIGHTS, quantize
from slivo.quantize.train import QuantizationAware, aware

__all__ = [
    "SCHEMES",
    "WEIGHTS",
    "Damage",
    "Mixed",
    "QuantizationAware",
    "aware",
    "equalize",
    "mixed",
    "quantize",
    "sensitivity",
    "smooth",
]
