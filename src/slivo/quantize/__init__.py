"""Quantization: weights as integer codes, activations rounded to what integer kernels compute with."""

from slivo.quantize.post import SCHEMES, WEIGHTS, quantize

__all__ = ["SCHEMES", "WEIGHTS", "quantize"]
