"""Writing a model as one file, and keeping it only where it agrees with the model."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor

from ..image_processing_depict import DepictImageProcessor
from ..inference import UNREADABLE, load_photo, rgb_photo
from ..modeling_depict import DepictForSemanticSegmentation
from ..photo_files import shown
from ..weight_files import CHECKSUM, file_checksum
from ..writing import is_full, whole_folder
from .check import TOLERANCES, Agreement, agreement, made_photograph, photograph_tensor, tolerance_for
from .graph import ExportedGraph, trace
from .metadata import METADATA_FILE, describe, find_license
from .onnx_file import OPSET, write_onnx

FILE_NAMES = {"onnx": "model.onnx", "torch-export": "model.pt2"}

# What a file in float32 may differ from the model by, in logits relative to the largest.
TOLERANCE = TOLERANCES["float32"].difference


class ExportedFile(NamedTuple):
    """What `export_model` wrote.

    Attributes:
        path: Path of the file.
        size: (height, width) pixels that its input is bound to, or None.
        output_names: As in `ExportedGraph`.
    """

    path: Path
    size: tuple[int, int] | None
    output_names: list[str]

    @property
    def metadata(self) -> dict[str, Any]:
        """The settings that stand in the file and beside it, and how it agreed with the model."""
        return json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))

    def report(self) -> str:
        """Say where the file is, what goes in and comes out, how to use it, and how it agreed with the model."""
        metadata = self.metadata
        given, agreed = metadata["input"], metadata["agreement"]
        if self.size:
            sides = f"{self.size[0]} x {self.size[1]}"
        elif "any" in given["shape"][1:]:
            sides = "any height x any width"
        else:
            sides = "multiples of the patch"
        opset = f", opset {metadata['opset']}" if metadata["opset"] else ""
        return (
            f"{self.path}: pixel_values of {sides} pixels, in batches, to {', '.join(self.output_names)}\n"
            f"  input      {given['type']} ({', '.join(given['layout'])})\n"
            f"  protocol   {metadata['protocol']}: {metadata['usage']}\n"
            f"  agreement  with PyTorch in float32 on {agreed['photograph']}: {agreed['text']}\n"
            f"  file       {metadata['precision']}{opset}, {self.path.stat().st_size / 1e6:.1f} MB; licence "
            f"{metadata['license']}; all this also in {self.path.with_suffix('.json').name}"
        )


def export_model(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    folder: str | Path,
    file_format: str = "onnx",
    size: tuple[int, int] | None = None,
    labels: bool = False,
    int8: bool = False,
    *,
    fp16: bool = False,
    dynamic: bool = False,
    preprocess: bool = False,
    photo: str | Path | PIL.Image.Image | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """Write a model as one file that computes `ExportedGraph`, with its settings in it and beside it.

    The batch is always free. A model with windows is exported for one window, which `inference.segment` cuts out and
    merges, or with `dynamic` for images of any size, whose windows the file cuts and merges itself. Any other model
    takes images of any size ("onnx") or any multiples of the patch ("torch-export", whose programs cannot leave padding
    free; a backbone that compares its input with the size of its own position embeddings, as DINOv2 does, refuses
    exactly that size). `size` fixes one size instead. Where the encoder always sees the same size, position embeddings
    are resized once, here; in a program of "torch-export", a backbone's are not.

    What was written is run on a photograph and compared with the model (`check.agreement`), int8 and fp16 as well.
    Until it agrees, nothing of it is in `folder`.

    Args:
        model: On any device, in any mode and precision; not changed.
        image_processor: Saved beside the file, without what the file does itself; where `size` fixes the input, so
            does the saved one.
        folder: Where to write; created if missing.
        file_format: A key of `FILE_NAMES`.
        size: (height, width) pixels of the input, processed as one image.
        labels: Whether label maps at the input's size are an output.
        int8: For "onnx", whether weights of linear layers are kept as 8-bit integers, one scale for each output, and
            multiplied as such with their inputs, which are rounded to 8 bits by their range in each call.
        fp16: Whether encoder and decoder are kept and computed in half precision; inputs and outputs stay as they are.
        dynamic: For "onnx", whether the input may have any size where the model has windows; all windows of an image
            share one pass. Other models take any size anyway, unless `size` fixes one.
        preprocess: Whether rescaling and normalisation are part of the file, whose input then is photographs,
            `(batch, height, width, channels)` uint8; where the size is free, resizing as well.
        photo: Photograph to compare on; by default one that is made.
        license: Licence of the weights; by default what the model's configuration or card says, else "unknown".
        overwrite: Whether the export takes the place of all that `folder` holds; else only files with the same names
            are replaced.

    Raises:
        UnwritableError: If the folder cannot be written to.
        ValueError: If an argument has no meaning here, `photo` cannot be read, or the exporter cannot export this model
            truthfully.
        ImportError: If the packages of the extra `onnx` are missing.
    """
    precision = "int8" if int8 else "fp16" if fp16 else "float32"
    _check_arguments(folder, file_format, size, int8, fp16, dynamic)
    # Written out, attention is what ONNX Runtime computes fastest; PyTorch has fused kernels.
    source = model
    model = _copy_for_export(model, "eager" if file_format == "onnx" else "sdpa")
    channels = _num_channels(model)
    windows = dynamic and model.config.window_size is not None
    if windows and file_format != "onnx":
        raise ValueError(
            f"Got dynamic for format {file_format!r}, whose programs cannot leave the number of windows free; choose "
            f'"onnx", or drop dynamic and cut windows of {model.config.window_size} pixels.'
        )
    seen_size, settings = _settle_size(model, image_processor, size)
    size = None if windows else seen_size
    resize = preprocess and size is None and settings["do_resize"]
    if preprocess:
        _check_preprocessing(settings, channels, resize)
    patch_size = model.config.encoder_patch_size
    # Where an image of any size is resized first, its sides are no multiples of the patch, whatever they were.
    pad = (file_format == "onnx" or resize) if size is None else any(side % patch_size for side in size)
    graph = ExportedGraph(model, labels, pad, windows, settings if preprocess else None, resize, fp16, seen_size)
    photo_values = photograph_tensor(made_photograph() if photo is None else _read_photo(photo), channels)
    metadata = describe(graph, model.config, settings, file_format, precision, size, channels)
    metadata["license"] = license or find_license(source)
    metadata["opset"] = OPSET if file_format == "onnx" else None

    folder = Path(folder)
    with whole_folder(folder, replace=overwrite) as unfinished:
        path = unfinished / FILE_NAMES[file_format]
        try:
            program = trace(graph, channels, size)
            if file_format == "onnx":
                write_onnx(program, graph, path, size is None, metadata, int8)
            else:
                # Not to the file: where the disk is full, PyTorch would end the process.
                saved = io.BytesIO()
                torch.export.save(program, saved, extra_files={METADATA_FILE: json.dumps(metadata)})
                path.write_bytes(saved.getbuffer())
            found = agreement(
                _runner(path, graph.output_names),
                model,
                DepictImageProcessor.from_dict(settings),
                photo_values,
                tolerance_for(precision, resize),
                fixed_size=size,
                multiple=1 if graph.has_pixel_logits else patch_size,
                photographs=preprocess,
                resize=resize,
                windows=windows,
                described="a made photograph" if photo is None else "the given photograph",
            )
            if not found.suffices:
                raise ValueError(f"on {found.photograph}, the file differs from the model: {found}")
        # Exporters raise errors of many kinds, mostly where a backbone's input size is left free.
        except Exception as error:
            if is_full(error):
                raise
            raise ValueError(_refusal(error, size, precision)) from error
        metadata["agreement"] = _as_json(found)
        metadata[CHECKSUM] = file_checksum(path)
        path.with_suffix(".json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
        _save_settings(model, settings, unfinished, windows, preprocess, resize)
    return ExportedFile(folder / path.name, size, graph.output_names)


def _read_photo(photo: str | Path | PIL.Image.Image) -> PIL.Image.Image:
    if isinstance(photo, PIL.Image.Image):
        return rgb_photo(photo)
    try:
        return load_photo(photo)
    except UNREADABLE as error:
        raise ValueError(f"The photograph {shown(photo)} cannot be read: {error}; give another one.") from error


def _check_arguments(
    folder: str | Path,
    file_format: str,
    size: tuple[int, int] | None,
    int8: bool,
    fp16: bool,
    dynamic: bool,
) -> None:
    if file_format not in FILE_NAMES:
        raise ValueError(f"Unknown format {file_format!r}; choose one of {', '.join(FILE_NAMES)}.")
    if Path(folder).suffix in (".onnx", ".pt2", ".json"):
        raise ValueError(
            f"Got {folder}, which looks like a file; name a folder: the file in it is called {FILE_NAMES[file_format]}."
        )
    if int8 and file_format != "onnx":
        raise ValueError(f'Got int8 for format {file_format!r}, needed "onnx".')
    if int8 and fp16:
        raise ValueError("Got int8 and fp16; choose one of them.")
    if dynamic and size is not None:
        raise ValueError(f"Got dynamic for any size together with size={size}; drop one of them.")
    if file_format == "onnx":
        from ..onnx_backend import require_onnx

        require_onnx("onnx", "onnxscript", "onnxruntime")


def _check_preprocessing(settings: dict[str, Any], channels: int, resize: bool) -> None:
    """Refuse what the image processor does and `ExportedGraph` does not."""
    for name in ("image_mean", "image_std") if settings["do_normalize"] else ():
        if len(settings[name]) not in (1, channels):
            raise ValueError(
                f"Got {name}={list(settings[name])} for a model of {channels} channels, needed one number for each; "
                "correct the image processor."
            )
    resampling = PIL.Image.Resampling(settings["resample"])
    if resize and (resampling != PIL.Image.Resampling.BILINEAR or settings["do_antialias"]):
        filtered = " with antialiasing" if settings["do_antialias"] else ""
        raise ValueError(
            f"The image processor resizes by {resampling.name.lower()}{filtered}, but files only bilinearly and "
            "without antialiasing; resize before and fix the input with size=(height, width), --size on the command "
            "line, or export without preprocess."
        )


def _settings(image_processor: DepictImageProcessor) -> dict[str, Any]:
    settings = image_processor.to_dict()
    settings.pop("auto_map", None)
    return settings


def _copy_for_export(model: DepictForSemanticSegmentation, attention: str) -> DepictForSemanticSegmentation:
    """Return a frozen copy in float32 on the CPU, whose configuration names neither remote code nor a local path."""
    model = copy.deepcopy(model).float().eval().cpu().requires_grad_(False)
    model.set_attn_implementation(attention)
    config: Any = model.config
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.dtype = torch.float32
    if config.backbone_config is not None:
        config.backbone_config._name_or_path = ""
    return model


def _settle_size(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, size: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, dict]:
    """Return (height, width) pixels that the graph is bound to, or None, and the image processor's settings for it.

    A size other than the model's window takes the place of the windows, which are removed from the model's
    configuration.
    """
    settings = _settings(image_processor)
    config = model.config
    window = None if config.window_size is None else (config.window_size, config.window_size)
    if size is None or size == window:
        return window, settings
    if min(size) < 1:
        raise ValueError(f"Got size={size}, needed positive pixels (height, width).")
    config.window_size = config.window_stride = None
    return size, settings | {"do_resize": True, "size": {"height": size[0], "width": size[1]}}


def _num_channels(model: DepictForSemanticSegmentation) -> int:
    config: Any = model.config
    return config.num_channels if config.backbone_config is None else config.backbone_config.num_channels


def _save_settings(
    model: DepictForSemanticSegmentation,
    settings: dict[str, Any],
    folder: Path,
    windows: bool,
    preprocess: bool,
    resize: bool,
) -> None:
    """Write what `--backend onnxruntime` reads: what is left to do outside of the file."""
    config = copy.deepcopy(model.config)
    if windows:
        config.window_size = config.window_stride = None
    config.to_json_file(folder / "config.json")
    if preprocess:
        settings = settings | {"do_rescale": False, "do_normalize": False}
    if resize:
        settings = settings | {"do_resize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _as_json(found: Agreement) -> dict[str, Any]:
    return {
        "text": str(found),
        "photograph": found.photograph,
        "equal_labels": found.equal_labels,
        "largest_difference": found.difference,
        "largest_logit": found.largest_logit,
        "equal_labels_needed": found.tolerance.equal_labels,
        "largest_difference_allowed": found.tolerance.difference * found.largest_logit,
    }


def _refusal(error: Exception, size: tuple[int, int] | None, precision: str) -> str:
    if precision != "float32":
        what, remedy = f"computation in {precision}", f"leave {precision} out, or give another photograph (--photo)"
    elif size is None:
        what, remedy = "images of any size", "fix one with size=(height, width), --size on the command line"
    else:
        what, remedy = f"images of {size[0]}x{size[1]} pixels", "try another size, format or backbone"
    return f"This model cannot be exported for {what} ({type(error).__name__}: {error}); {remedy}."


def _runner(path: Path, output_names: list[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Open the file as a function from its input to its outputs."""
    if path.suffix != ".onnx":
        return torch.export.load(path).module()
    from ..onnx_backend import start_session

    session = start_session(path)

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        found = session.run(output_names, {"pixel_values": pixel_values.numpy()})
        return dict(zip(output_names, map(torch.from_numpy, found), strict=True))

    return run
