"""Models as files that run without this package: ONNX graphs, and programs of `torch.export`."""

from .check import TOLERANCES, Agreement, Tolerance
from .graph import ExportedGraph
from .metadata import find_license
from .writing import FILE_NAMES, OPSET, TOLERANCE, ExportedFile, export_model

__all__ = [
    "FILE_NAMES",
    "OPSET",
    "TOLERANCE",
    "TOLERANCES",
    "Agreement",
    "ExportedFile",
    "ExportedGraph",
    "Tolerance",
    "export_model",
    "find_license",
]
