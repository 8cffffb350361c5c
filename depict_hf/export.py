"""Models as files that run without this package: ONNX graphs, and programs of `torch.export`."""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import DepictForSemanticSegmentation
from .vit import LayerRecord, ViTEncoder, resize_positions
from .windows import resize_bilinear

FILE_NAMES = {"onnx": "model.onnx", "torch-export": "model.pt2"}

# What an exported file may differ from the model by, in logits relative to the largest: float32 rounding stays far
# below it, a size that was wrongly fixed while tracing far above.
TOLERANCE = 1e-3


class ExportedFile(NamedTuple):
    """What `export_model` wrote.

    Attributes:
        path: Of the file.
        size: (height, width) pixels that its input is bound to, or None.
        output_names: As in `ExportedGraph`.
    """

    path: Path
    size: tuple[int, int] | None
    output_names: list[str]


class ExportedGraph(nn.Module):
    """What an exported file computes: from a batch of images, a dict of named tensors.

    Input and outputs:
        pixel_values: `(batch, channels, height, width)` float32, as `DepictImageProcessor` makes them.
        logits: `(batch, num_labels, height / patch, width / patch)`, scores of all classes over exactly the input
            image. Where `pad` is set, `patch_logits` in its place: `(batch, num_labels, ceil(height / patch),
            ceil(width / patch))`, over the input padded at the bottom and right to multiples of the patch.
        labels: Only where asked for: `(batch, height, width)` class ids of exactly the input image's pixels; uint8, or
            int64 where there are more than 256 classes.

    Args:
        model: In evaluation mode; its windows are not part of the graph.
        labels: Whether label maps are an output.
        pad: Whether inputs are zero-padded to multiples of the patch, so that they may have any size; without it,
            both sides must be such multiples.
    """

    def __init__(self, model: DepictForSemanticSegmentation, labels: bool, pad: bool):
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.patch_size = model.config.encoder_patch_size
        self.label_dtype = torch.uint8 if model.config.num_labels <= 256 else torch.int64
        self.labels, self.pad = labels, pad
        self.output_names = ["patch_logits" if pad else "logits", *(["labels"] if labels else [])]

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        height, width = pixel_values.shape[-2:]
        patch = self.patch_size
        if self.pad:
            # Unconditional, unlike `windows.pad_to_multiple`: a graph cannot ask whether there is something to pad.
            padded = F.pad(pixel_values, (0, -width % patch, 0, -height % patch))
        else:
            # Changes nothing, but fails where the sides are no multiples; convolution would drop their last pixels.
            cut = (*pixel_values.shape[:2], height // patch, patch, width // patch, patch)
            padded = pixel_values.reshape(cut).reshape(pixel_values.shape)
        patches, grid_size = self.encoder(padded, LayerRecord())
        logits = self.decoder(patches, grid_size, LayerRecord())
        outputs = [logits]
        if self.labels:
            full = resize_bilinear(logits, tuple(padded.shape[-2:]))[..., :height, :width]
            outputs.append(full.argmax(dim=1).to(self.label_dtype))
        return dict(zip(self.output_names, outputs, strict=True))


def export_model(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    folder: str | Path,
    file_format: str = "onnx",
    size: tuple[int, int] | None = None,
    labels: bool = False,
    int8: bool = False,
) -> ExportedFile:
    """Write a model as one file that computes `ExportedGraph` in float32, with its settings beside it.

    The batch is always free. A model with windows is exported for one window; `inference.segment` cuts windows out and
    merges their logits. Any other model takes images of any size ("onnx") or any multiples of the patch
    ("torch-export", whose programs cannot leave padding free; a backbone that compares its input with the size of its
    own position embeddings, as DINOv2 does, refuses exactly that size). `size` fixes one size instead. Where the size
    is fixed, position embeddings are resized once, here; in a program of "torch-export", a backbone's are not.

    What was written is run on a random image and compared with the model; `int8` comes after that.

    Args:
        model: On any device, in any mode and precision; not changed.
        image_processor: Saved beside the file; where `size` fixes the input, so does the saved one.
        folder: Where to write; created if missing.
        file_format: A key of `FILE_NAMES`.
        size: (height, width) pixels of the input, processed as one image.
        labels: Whether label maps at the input's size are an output.
        int8: For "onnx", whether weights of linear layers are kept as 8-bit integers, one scale for each output, and
            multiplied as such with their inputs, which are rounded to 8 bits by their range in each call.

    Raises:
        ValueError: If an argument has no meaning here, or the exporter cannot export this model truthfully.
        ImportError: If the packages of the extra `onnx` are missing.
    """
    if file_format not in FILE_NAMES:
        raise ValueError(f"Unknown format {file_format!r}; choose one of {', '.join(FILE_NAMES)}.")
    if int8 and file_format != "onnx":
        raise ValueError(f'Got int8 for format {file_format!r}, needed "onnx".')
    if file_format == "onnx":
        from .onnx_backend import require_onnx

        require_onnx("onnx", "onnxscript", "onnxruntime")
    # Written out, attention is what ONNX Runtime computes fastest; PyTorch has fused kernels.
    model = _copy_for_export(model, "eager" if file_format == "onnx" else "sdpa")
    size, settings = _settle_size(model, image_processor, size)
    if size is None:
        pad = file_format == "onnx"
    else:
        patch_size = model.config.encoder_patch_size
        pad = any(side % patch_size for side in size)
        _bake_positions(model, tuple(-(-side // patch_size) for side in size))
    graph = ExportedGraph(model, labels, pad)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAMES[file_format]
    channels = _num_channels(model)
    try:
        program = _trace(graph, channels, size)
        if file_format == "onnx":
            _write_onnx(program, graph.output_names, path, free_size=size is None)
        else:
            torch.export.save(program, path)
        _verify(graph, path, channels, size)
        if int8:
            _quantize(path)
    # Exporters raise errors of many kinds, mostly where a backbone's input size is left free.
    except Exception as error:
        path.unlink(missing_ok=True)
        if size is None:
            what, remedy = "images of any size", "fix one with size=(height, width), --size on the command line"
        else:
            what, remedy = f"images of {size[0]}x{size[1]} pixels", "try another size, format or backbone"
        message = f"This model cannot be exported for {what} ({type(error).__name__}: {error}); {remedy}."
        raise ValueError(message) from error
    model.config.to_json_file(folder / "config.json")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ExportedFile(path, size, graph.output_names)


def _copy_for_export(model: DepictForSemanticSegmentation, attention: str) -> DepictForSemanticSegmentation:
    """A frozen copy in float32 on the CPU, whose configuration names neither remote code nor a local path."""
    model = copy.deepcopy(model).float().eval().cpu().requires_grad_(False)
    model.set_attn_implementation(attention)
    vars(model.config).pop("auto_map", None)
    model.config.dtype = torch.float32
    if model.config.backbone_config is not None:
        model.config.backbone_config._name_or_path = ""
    return model


def _settle_size(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, size: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, dict]:
    """(height, width) pixels that the graph is bound to, or None, and the image processor's settings for it.

    A size other than the model's window takes the place of the windows, which are removed from the model's
    configuration.
    """
    settings = image_processor.to_dict()
    settings.pop("auto_map", None)
    config = model.config
    window = None if config.window_size is None else (config.window_size, config.window_size)
    if size is None or size == window:
        return window, settings
    if min(size) < 1:
        raise ValueError(f"Got size={size}, needed positive pixels (height, width).")
    config.window_size = config.window_stride = None
    return size, settings | {"do_resize": True, "size": {"height": size[0], "width": size[1]}}


def _num_channels(model: DepictForSemanticSegmentation) -> int:
    config = model.config
    return config.num_channels if config.backbone_config is None else config.backbone_config.num_channels


def _bake_positions(model: DepictForSemanticSegmentation, grid_size: tuple[int, int]) -> None:
    """Resize the native encoder's position embeddings for good; backbones keep theirs."""
    if isinstance(model.encoder, ViTEncoder):
        embeddings = model.encoder.embeddings
        resized = resize_positions(embeddings.position_embeddings, embeddings.grid_size, grid_size)
        embeddings.position_embeddings = nn.Parameter(resized, requires_grad=False)
        embeddings.grid_size = grid_size


def _trace(graph: ExportedGraph, channels: int, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """Trace with a free batch and, unless `size` fixes them, free sides."""
    patch_size = graph.patch_size
    if size is not None:
        sides = {}
    elif graph.pad:
        sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    else:
        sides = {
            axis: patch_size * torch.export.Dim(name, min=2) for axis, name in ((2, "grid_height"), (3, "grid_width"))
        }
    # Lengths that differ from each other, so that none is taken for another one.
    example = torch.zeros(2, channels, *(size or (11 * patch_size - graph.pad, 13 * patch_size - graph.pad)))
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC} | sides}
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)


def _write_onnx(program: torch.export.ExportedProgram, output_names: list[str], path: Path, free_size: bool) -> None:
    with _quiet("onnxscript", "onnx_ir"):
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=output_names,
            dynamic_shapes={"pixel_values": {0: "batch"} | ({2: "height", 3: "width"} if free_size else {})},
        )
    # Weights beyond protobuf's 2 GB still go to a file of their own.
    converted.save(path, external_data=False)


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
    """Only errors of these loggers; the exporter reports every node that it could not simplify."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _verify(graph: ExportedGraph, path: Path, channels: int, size: tuple[int, int] | None) -> None:
    """Compare the file with the model, on one image of another size than the traced one where sizes are free.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    size = size or (16 * graph.patch_size, 9 * graph.patch_size)
    pixel_values = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    if path.suffix == ".onnx":
        from .onnx_backend import start_session

        session = start_session(path)
        logits = torch.from_numpy(session.run(graph.output_names[:1], {"pixel_values": pixel_values.numpy()})[0])
    else:
        logits = torch.export.load(path).module()(pixel_values)[graph.output_names[0]]
    with torch.no_grad():
        expected = graph(pixel_values)[graph.output_names[0]]
    difference = (logits - expected).abs().max().item() / expected.abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"on {size[0]}x{size[1]} pixels, the file's logits differ from the model's by {difference:.2g} of the "
            f"largest, where rounding explains at most {TOLERANCE:g}"
        )
