"""Quantization: weights as integer codes, activations rounded to what integer kernels compute with."""

from slivo.quantize.post import SCHEMES, quantize

__all__ = ["SCHEMES", "quantize"]
