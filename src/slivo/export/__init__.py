"""Export to the formats of other runtimes; every export is checked against its source model."""

from slivo.export import onnx
from slivo.export.bench import RUNTIMES, Row, bench

__all__ = ["RUNTIMES", "Row", "bench", "onnx"]
