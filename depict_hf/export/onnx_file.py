"""Programs of `torch.export` as ONNX files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .graph import ExportedGraph
from .metadata import flat

# Of ONNX files: the oldest that the exporter writes without conversions, known to ONNX Runtime since 1.14, OpenVINO
# since 2023 and TensorRT since 8.6; and the version of the file format that belongs to it.
OPSET = 18
IR_VERSION = 8


def write_onnx(
    program: torch.export.ExportedProgram,
    graph: ExportedGraph,
    path: Path,
    free_size: bool,
    metadata: dict[str, Any],
    int8: bool,
) -> None:
    """Write a traced program as an ONNX file, which holds no traces of the machine that made it.

    Args:
        program: What `graph.trace` returned.
        graph: What was traced.
        path: Where to write.
        free_size: Whether images of any size go in.
        metadata: What `metadata.describe` returned.
        int8: Whether weights of linear layers are rounded to 8-bit integers.
    """
    axes = {0: "batch"}
    if free_size:
        first = 2 if graph.preprocessing is None else 1
        axes |= {first: "height", first + 1: "width"}
    with _quiet("onnxscript", "onnx_ir"):
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=graph.output_names,
            dynamic_shapes={"pixel_values": axes},
        )
    assert converted is not None
    # Traces of this machine's source code, which older versions of the format do not know either.
    converted.model.graph.metadata_props.clear()
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    converted.model.ir_version = IR_VERSION
    converted.model.producer_name, converted.model.producer_version = "depict-hf", metadata["version"]
    converted.model.metadata_props.update(flat(metadata))
    # Weights beyond protobuf's 2 GB still go to a file of their own.
    converted.save(path, external_data=False)
    if int8:
        _quantize(path)


def _quantize(path: Path) -> None:
    """Round the weights of linear layers in an ONNX file, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet("root"):  # it recommends to simplify the graph first, which the exporter has done
        quantize_dynamic(
            path,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},  # products of two activations, as in attention, stay
        )


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Show only errors of these loggers; the exporter reports every node that it could not simplify."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
