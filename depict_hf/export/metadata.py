"""What an exported file says about itself, in the file and as JSON beside it."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..configuration_depict import DepictConfig
from ..modeling_depict import DepictForSemanticSegmentation
from .graph import ExportedGraph

# Of the JSON inside programs of `torch.export`, as `extra_files` names it.
METADATA_FILE = "depict.json"


def describe(
    graph: ExportedGraph,
    config: DepictConfig,
    settings: dict[str, Any],
    file_format: str,
    precision: str,
    size: tuple[int, int] | None,
    channels: int,
) -> dict[str, Any]:
    """Gather all that is needed to use a file without this package.

    Args:
        config: Configuration of the model.
        settings: Settings of the image processor, resizing to `size` where that is fixed.
        file_format: "onnx" or "torch-export".
        precision: A key of `check.TOLERANCES`.
        size: (height, width) pixels of the input, or None where it may have any.
        channels: Number of channels of the input.

    Returns:
        Names as in the model's and the image processor's configurations; None for what does not apply.
    """
    photographs = graph.preprocessing is not None
    any_size = "any" if graph.has_pixel_logits else f"any multiple of {graph.patch_size}"
    sides = size or (any_size, any_size)
    sizes = {"batch": "any", "channels": channels, "height": sides[0], "width": sides[1]}
    layout = ("batch", "height", "width", "channels") if photographs else ("batch", "channels", "height", "width")
    is_window = size is not None and config.window_size is not None
    logits = "height, width" if graph.has_pixel_logits else f"height / {graph.patch_size}, width / {graph.patch_size}"
    outputs = {"logits": f"float32 (batch, {config.num_labels}, {logits})"}
    if graph.labels:
        outputs["labels"] = f"{str(graph.label_dtype).removeprefix('torch.')} (batch, height, width)"
    return {
        "made_by": f"depict-hf {_version()}",
        "version": _version(),
        "training_scenes": config.training_scenes,
        "class_names": [config.id2label[index] for index in range(config.num_labels)],
        "protocol": _protocol(graph, size, is_window),
        "usage": _usage(graph, config, settings, size, is_window),
        "precision": precision,
        "input": {
            "name": "pixel_values",
            "type": "uint8" if photographs else "float32",
            "layout": layout,
            "shape": [sizes[name] for name in layout],
            "color_order": "RGB" if channels == 3 else None,
        },
        "outputs": outputs,
        "size": settings["size"] if settings["do_resize"] else None,
        "resize_inside": bool(graph.size),
        "rescale_factor": settings["rescale_factor"] if settings["do_rescale"] else None,
        "image_mean": list(settings["image_mean"]) if settings["do_normalize"] else None,
        "image_std": list(settings["image_std"]) if settings["do_normalize"] else None,
        "normalization_inside": photographs,
        "window_size": config.window_size,
        "window_stride": None if config.window_size is None else config.window_stride or config.window_size,
        "windows_inside": graph.windows,
        "patch_size": graph.patch_size,
        "temperature": config.temperature,
        "format": file_format,
    }


def _protocol(graph: ExportedGraph, size: tuple[int, int] | None, is_window: bool) -> str:
    if graph.windows:
        return "windows inside"
    if is_window:
        return "one window"
    return "whole image of any size" if size is None else "whole image of one size"


def _usage(
    graph: ExportedGraph,
    config: DepictConfig,
    settings: dict[str, Any],
    size: tuple[int, int] | None,
    is_window: bool,
) -> str:
    """Say what to do with a photograph, and what the file does with it."""
    steps = []
    if settings["do_resize"] and not graph.size:
        target = settings["size"]
        if target.get("height"):
            steps.append(f"resize to {target['height']} x {target['width']} pixels (height x width)")
        else:
            bound = f", the longer one to {target['longest_edge']} at most" if target.get("longest_edge") else ""
            steps.append(f"resize the shorter side to {target['shortest_edge']} pixels{bound}")
    if is_window:
        steps.append(
            f"cut windows of {config.window_size} x {config.window_size} pixels every "
            f"{config.window_stride or config.window_size}, the last ones flush with the border"
        )
    if graph.preprocessing is None:
        if settings["do_rescale"]:
            steps.append(f"multiply by {settings['rescale_factor']:.6g}")
        if settings["do_normalize"]:
            steps.append(f"subtract {list(settings['image_mean'])} and divide by {list(settings['image_std'])}")
        steps.append("put the channels first")
    inside = []
    if graph.size:
        inside.append("resizes")
    if graph.preprocessing is not None:
        inside.append("normalises")
    if graph.windows:
        inside.append(
            f"cuts windows of {graph.window_size} pixels every {graph.window_stride}, averages their logits where they "
            "overlap"
        )
    else:
        inside.append("sees the whole window" if is_window else "sees the whole image in one pass")
    covered = "for every pixel of the input" if graph.has_pixel_logits else "for every patch of the input"
    before = f"Upright RGB photograph: {'; '.join(steps)}. " if steps else "Upright RGB photographs, as they are. "
    after = " Upsample the windows' logits bilinearly and average them where they overlap." if is_window else ""
    return f"{before}The file {', '.join(inside)} and gives logits {covered}.{after}"


def flat(metadata: dict[str, Any]) -> dict[str, str]:
    """Flatten it for ONNX, whose metadata is text: everything but text as JSON; what does not apply is left out."""
    kept = {name: value for name, value in metadata.items() if value is not None}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in kept.items()}


def find_license(model: DepictForSemanticSegmentation) -> str:
    """Find the licence of a model's weights: as its configuration or the card it was loaded with says, else "unknown".

    The card is the README.md in the folder, or in the Hub's repository, that the model came from.
    """
    stated = getattr(model.config, "license", None)
    if stated:
        return str(stated)
    source = model.name_or_path
    if not source:
        return "unknown"
    if Path(source).is_dir():
        card = Path(source) / "README.md"
        if not card.is_file():
            return "unknown"
    else:
        try:
            card = Path(cached_file(source, "README.md"))
        except OSError:  # no card, no connection, or a folder that is gone
            return "unknown"
    from huggingface_hub import ModelCard

    stated = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict().get("license")
    return str(stated) if stated else "unknown"


def _version() -> str:
    try:
        return version("depict-hf")
    except PackageNotFoundError:
        return "unknown (run from source code)"
