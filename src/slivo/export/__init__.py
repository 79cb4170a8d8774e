"""Export to the formats of other runtimes; every export is checked against its source model."""

from slivo.export import onnx

__all__ = ["onnx"]
