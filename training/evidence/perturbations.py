"""Groups of models under noise, corruptions and other views of the photographs, as sections of one record."""

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.vit import LayerRecord

from ..data import SegmentationDataset
from ..evaluation import (
    Corruption,
    Execution,
    Protocol,
    class_names,
    environment,
    evaluate,
    load_samples,
    load_with_overrides,
    settings,
    spread,
)
from .noise import SIGMAS, TARGETS, encode_photos, measure_noise

SECTIONS = (*TARGETS, "corruptions", "views")
SCALES = (0.5, 0.75, 1.25)
BRIGHTNESS = (0.4, 0.7, 1.5)


@dataclass(frozen=True)
class Group:
    """Models of one kind, trained on different seeds.

    Args:
        name: For tables and curves.
        models: Folders or Hub names; in groups that are compared, models of the same seed stand at the same place.
    """

    name: str
    models: tuple[str, ...]


def parse_groups(models: Sequence[str], groups: Sequence[str]) -> list[Group]:
    """Return the groups of a command line.

    Args:
        models: Models that are groups of their own, named by the last part of their names.
        groups: NAME=MODEL,MODEL,...

    Raises:
        ValueError: If one is not of that form, or a name or model occurs twice.
    """
    found = [Group(Path(model).name, (model,)) for model in models]
    for text in groups:
        name, equals, members = text.partition("=")
        names = tuple(filter(None, members.split(",")))
        if not name or not equals or not names:
            raise ValueError(f"Got --group {text!r}, needed NAME=MODEL,MODEL,... such as sa=runs/sa_0,runs/sa_1.")
        found.append(Group(name, names))
    if not found:
        raise ValueError("Got no model; name at least one, or a --group of them.")
    for kind, each in (
        ("group", [group.name for group in found]),
        ("model", [model for group in found for model in group.models]),
    ):
        repeated = sorted({name for name in each if each.count(name) > 1})
        if repeated:
            raise ValueError(f"Got the {kind} {', '.join(repeated)} more than once, needed each only once.")
    return found


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured."""

    model: DepictForSemanticSegmentation
    image_processor: DepictImageProcessor
    samples: SegmentationDataset


def load_groups(arguments: argparse.Namespace, groups: Sequence[Group], state: PartialState) -> dict[str, Loaded]:
    """Load all models, by name. Models with equal encoders share one.

    Raises:
        OSError: If a model or the data cannot be had.
        ValueError: If models have different classes, or the models of a group different decoders.
    """
    loaded: dict[str, Loaded] = {}
    encoders: dict[str, Any] = {}
    for group in groups:
        for name in group.models:
            model, image_processor = load_with_overrides(arguments, name, state)
            if not isinstance(model, DepictForSemanticSegmentation):
                raise ValueError(f"{name} is an export, whose weights are not at hand; give the model it was made of.")
            names = class_names(model.config)
            first = next(iter(loaded), name)
            if first in loaded and names != class_names(loaded[first].model.config):
                raise ValueError(f"{name} and {first} have different classes, needed the same.")
            kinds = {loaded[each].model.config.decoder_type for each in group.models if each in loaded}
            if kinds - {model.config.decoder_type}:
                raise ValueError(
                    f"The group {group.name} mixes decoders of types {', '.join(kinds)} and "
                    f"{model.config.decoder_type}; give each a group of its own."
                )
            model.encoder = encoders.setdefault(_digest(model.encoder), model.encoder)
            samples = load_samples(arguments, names, bool(image_processor.do_reduce_labels), state)
            loaded[name] = Loaded(model, image_processor, samples)
    return loaded


def _digest(module: torch.nn.Module) -> str:
    summary = hashlib.sha256(type(module).__name__.encode())
    for name, value in sorted(module.state_dict().items()):
        summary.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        summary.update(value.detach().cpu().float().numpy().tobytes())
    return summary.hexdigest()


@contextmanager
def encoding_once(models: Sequence[DepictForSemanticSegmentation]) -> Iterator[None]:
    """Within it, an encoder computes an input once, however many models share it; results are kept in memory.

    What is kept are the outputs themselves, so that no number changes.
    """
    encoders: list[Any] = list({id(model.encoder): model.encoder for model in models}.values())
    for encoder in encoders:
        encoder.forward = partial(_recall, encoder.forward, {})  # an attribute of the instance, before the class's
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward


def _recall(forward, known: dict, pixel_values: Tensor, record: LayerRecord) -> tuple[Tensor, tuple[int, int]]:
    if record.keep_hidden_states or record.keep_attentions:
        return forward(pixel_values, record)
    digest = hashlib.sha1(pixel_values.cpu().float().numpy().tobytes()).digest()
    key = (tuple(pixel_values.shape), pixel_values.dtype, digest)
    if key not in known:
        known[key] = forward(pixel_values, record)
    return known[key]


@dataclass(frozen=True)
class Brightness:
    """Multiply all values of a photograph, as stored (sRGB), by a factor; what exceeds white is clipped."""

    factor: float

    def __call__(self, image: Tensor, index: int) -> Tensor:
        return (image.float() * self.factor).round().clamp(0, 255).to(torch.uint8)

    def __str__(self) -> str:
        return f"brightness x{self.factor:g}"


def view_protocols(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, protocol: Protocol
) -> dict[str, tuple[Protocol, int | None]]:
    """Return the views by name: a protocol, and the window in pixels, or None for whole photographs.

    "other crops" are windows of half the shorter side without overlap for a model that takes whole photographs, and
    whole photographs for one that takes windows.
    """
    window = model.config.window_size
    views: dict[str, tuple[Protocol, int | None]] = {
        f"scale {scale:g}": (replace(protocol, scales=(scale,)), window) for scale in SCALES
    }
    size = dict(image_processor.size)
    sides = [side for name, side in size.items() if side is not None and not name.startswith("longest")]
    patch = model.config.encoder_patch_size
    views["other crops"] = (protocol, max(1, min(sides) // 2 // patch) * patch if window is None else None)
    return views | {str(each): (replace(protocol, corruption=each), window) for each in map(Brightness, BRIGHTNESS)}


def measure_section(
    section: str,
    loaded: Mapping[str, Loaded],
    arguments: argparse.Namespace,
    corruptions: Sequence[Corruption],
    state: PartialState,
) -> dict:
    """Measure one section for all models.

    Args:
        section: One of `SECTIONS`.
        arguments: Of the command line: data, `draws`, `sigmas`, `relative_sigmas`, `label_size`.
        corruptions: For the section of that name.

    Returns:
        A record ready for JSON: `num_images`, `protocol`, `environment`, `seconds`, `models` by name; for noise
        what `measure_noise` returned, with `draws`, `label_size` and `sigmas` beside the models; for corruptions and
        views `clean` and `scores`, mean IoU by name.

    Raises:
        ValueError: If arguments are out of range or do not fit each other.
    """
    started_in, start = environment(), time.perf_counter()
    protocol, execution = settings(arguments, state)
    if protocol.scales != (1.0,) or protocol.flip:
        raise ValueError("Robustness is measured at one scale without flips; leave out --scales and --flip.")
    first = next(iter(loaded.values()))
    num_images = len(spread(len(first.samples), protocol.max_images))
    record = {
        "num_images": num_images,
        "protocol": {
            "size": {name: side for name, side in dict(first.image_processor.size).items() if side is not None},
            "window_size": first.model.config.window_size,
            "window_stride": first.model.config.window_stride,
        },
        "environment": started_in,
    }
    with torch.inference_mode():
        if section in TARGETS:
            record |= _noise(section, loaded, arguments, protocol, state)
        else:
            record |= {"models": _changed_photographs(section, loaded, corruptions, protocol, execution)}
    return record | {"seconds": time.perf_counter() - start}


def _noise(
    section: str,
    loaded: Mapping[str, Loaded],
    arguments: argparse.Namespace,
    protocol: Protocol,
    state: PartialState,
) -> dict:
    if state.num_processes > 1:
        raise ValueError(f"Got {state.num_processes} processes; noise is measured by one, start several commands.")
    if arguments.draws < 1:
        raise ValueError(f"Got --draws {arguments.draws}, needed at least 1.")
    sigmas = {
        scale: list(given or SIGMAS[scale])
        for scale, given in (("absolute", arguments.sigmas), ("relative", arguments.relative_sigmas))
        if scale in TARGETS[section]
    }
    for values in sigmas.values():
        if values != sorted(set(values)) or values[0] < 0:
            raise ValueError(f"Got noise levels {values}, needed ascending numbers from 0 on, each once.")
    models = {}
    with encoding_once([each.model for each in loaded.values()]):
        for name, each in loaded.items():
            indices = spread(len(each.samples), protocol.max_images)
            options = (indices, arguments.label_size, arguments.max_batch_pixels)
            photos = encode_photos(each.model, each.image_processor, each.samples, *options)
            begin = time.perf_counter()
            models[name] = measure_noise(each.model, photos, section, sigmas, arguments.draws)
            print(f"{section}: {name}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return {"draws": arguments.draws, "label_size": arguments.label_size, "sigmas": sigmas, "models": models}


def _changed_photographs(
    section: str,
    loaded: Mapping[str, Loaded],
    corruptions: Sequence[Corruption],
    protocol: Protocol,
    execution: Execution,
) -> dict:
    passes: dict[str, dict[str, tuple[Protocol, int | None]]] = {}
    for name, each in loaded.items():
        window = each.model.config.window_size
        changes = (
            view_protocols(each.model, each.image_processor, protocol)
            if section == "views"
            else {str(change): (replace(protocol, corruption=change), window) for change in corruptions}
        )
        passes[name] = {"clean": (protocol, window), **changes}
    results: dict[str, dict[str, float]] = {name: {} for name in loaded}
    # Change by change, so that models of one encoder find its outputs, and only those of one change are kept.
    for change in next(iter(passes.values())):
        begin = time.perf_counter()
        with encoding_once([each.model for each in loaded.values()]):
            for name, each in loaded.items():
                changed, window = passes[name][change]
                with windows_of(each.model, window):
                    found = evaluate(each.model, each.image_processor, each.samples, changed, execution)
                if found["mean_iou"] is None:
                    raise ValueError("No photograph has a labelled pixel; take more, or another split.")
                results[name][change] = found["mean_iou"]
        if execution.state is None or execution.state.is_main_process:
            print(f"{section}: {change}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return {name: {"clean": scores.pop("clean"), "scores": scores} for name, scores in results.items()}


@contextmanager
def windows_of(model: DepictForSemanticSegmentation, window: int | None) -> Iterator[None]:
    """Let a model take windows of this side without overlap, or None for whole photographs; its own ones stay."""
    config = model.config
    saved = config.window_size, config.window_stride
    if window != config.window_size:
        config.window_size, config.window_stride = window, window
    try:
        yield
    finally:
        config.window_size, config.window_stride = saved
