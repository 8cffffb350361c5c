"""How each kind of case is read: a right result gives facts about it, everything else raises.

Each reader takes the folder with the files, and the description of the case.
"""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor, load_model
from depict_hf.conversion import convert_checkpoint
from depict_hf.familiarity import load_familiarity
from depict_hf.inference import read_photo, segment
from depict_hf.photo_files import MAX_PHOTO_PIXELS
from depict_hf.unfinished import UNFINISHED

Facts = dict[str, Any]


class Wrong(Exception):
    """A result that is not right, and passed as if it were."""


class Refusal(Exception):
    """A command ended with another status than 0 and this line."""


def read_photograph(folder: Path, case: dict[str, Any]) -> Facts:
    """Read `file`, by name or, with `opened`, as an open file, of at most `max_pixels`.

    With `cut_from`, the name of a sound file, whose beginning `file` is, a picture must be that of the sound one.
    """
    path = folder / case["file"]
    limit = case.get("max_pixels", MAX_PHOTO_PIXELS)
    photo, note = read_photo(io.BytesIO(path.read_bytes()) if case.get("opened") else path, limit)
    pixels = np.asarray(photo)
    if photo.mode != "RGB" or pixels.dtype != np.uint8 or photo.width * photo.height > limit:
        raise Wrong(f"a photograph of mode {photo.mode} and size {photo.size}")
    if "cut_from" in case:
        whole = np.asarray(read_photo(folder / case["cut_from"])[0])
        if not np.array_equal(whole, pixels):
            raise Wrong("a photograph that was cut off passed with other pixels")
    corners = [pixels[row, column].tolist() for row in (0, -1) for column in (0, -1)]
    mean = [float(round(each, 2)) for each in pixels.mean((0, 1))]
    return {"size": list(photo.size), "mean": mean, "corners": corners, "note": note is not None}


def read_label_map(folder: Path, case: dict[str, Any]) -> Facts:
    """Read the label map `file` of `classes` classes with the photograph `photograph`."""
    from training.data.reading import LabelEncoding, read_pair

    encoded = ({"path": str(folder / case[name]), "bytes": None} for name in ("photograph", "file"))
    image, labels = read_pair(*encoded, LabelEncoding.counted(case["classes"]))
    values, counts = labels.unique(return_counts=True)
    if labels.shape != image.shape[1:] or labels.dtype != torch.int64:
        raise Wrong(f"labels {tuple(labels.shape)} {labels.dtype} of an image {tuple(image.shape)}")
    if ((labels < 0) | ((labels >= case["classes"]) & (labels != 255))).any():
        raise Wrong(f"labels {values.tolist()} of {case['classes']} classes")
    counts_by_id = {str(key): count for key, count in zip(values.tolist(), counts.tolist(), strict=True)}
    return {"size": list(labels.shape), "pixels": counts_by_id, "row": labels[len(labels) // 2].tolist()}


def read_model(folder: Path, case: dict[str, Any]) -> Facts:
    """Load a model folder as `how` says, and segment a photograph with it where it is small.

    With `damaged_weights`, weights that load must be those of the sound files.
    """
    if case["how"] == "familiarity":
        found = load_familiarity(folder)
        return {"directions": None if found is None else list(found.directions.shape)}
    if case["how"] == "convert":
        model, image_processor = convert_checkpoint(folder, protocol=case.get("protocol", "published"))
    elif case["how"] == "from_pretrained":
        model = DepictForSemanticSegmentation.from_pretrained(folder)
        image_processor = DepictImageProcessor.from_pretrained(folder)
    else:
        model, image_processor = load_model(folder)
    if case.get("damaged_weights"):
        sound = _sound_weights(case["base"], case["how"])
        state = model.state_dict()
        wrong = [name for name, value in sound.items() if name not in state or not torch.equal(value, state[name])]
        if wrong:
            raise Wrong(f"damaged weights were loaded: {wrong[:3]}")
    config = model.config
    if max(filter(None, dict(image_processor.size or {}).values()), default=999) <= 128 and not config.window_size:
        photo = np.add.outer(np.arange(20), np.arange(30))[..., None].repeat(3, -1).astype(np.uint8)
        [labels] = segment(model.eval(), image_processor, [photo])
        if labels.shape != (20, 30) or labels.min() < 0 or labels.max() >= config.num_labels:
            raise Wrong(f"a segmentation of shape {tuple(labels.shape)} with {labels.unique().tolist()}")
    return {"classes": config.num_labels, "decoder": config.decoder_type}


@cache
def _sound_weights(base: str, how: str) -> dict[str, torch.Tensor]:
    from .cases import BASES

    read = convert_checkpoint if how == "convert" else load_model
    return dict(read(BASES / base)[0].state_dict())


def read_data(folder: Path, case: dict[str, Any]) -> Facts:
    """Open a data set, without what cannot be read where `skip` says so, and read the first sample of each split."""
    from training.data import count_pixels, open_data

    with captured():
        opened = open_data(folder, skip_unreadable=case.get("skip", False))
        for name, samples in opened.samples.items():
            sample = samples[0]
            labels = sample["labels"]
            if labels.shape != sample["image"].shape[1:]:
                raise Wrong(f"labels of shape {tuple(labels.shape)} in split {name}")
            if ((labels < 0) | ((labels >= len(opened.class_names)) & (labels != 255))).any():
                raise Wrong(f"labels {labels.unique().tolist()} in split {name}")
        fault = [line for line in str(opened).split("\n") if not line.isprintable()]
        if fault:
            raise Wrong(f"a description that cannot be printed: {fault[0]!r}")
        pixels = {name: count_pixels(samples).tolist() for name, samples in opened.samples.items()}
    images = {name: len(samples) for name, samples in opened.samples.items()}
    return {"classes": list(opened.class_names), "images": images, "pixels": pixels}


def read_configuration(folder: Path, case: dict[str, Any]) -> Facts:
    """Make a `DepictConfig` of `fields`, which must come back from its file."""
    config = DepictConfig(**case["fields"])
    config.save_pretrained(folder)
    # Compared as text, since NaN is not NaN; the order of fields is of no account.
    found, made = (sorted(each.to_dict().items()) for each in (DepictConfig.from_pretrained(folder), config))
    if repr(found) != repr(made):
        raise Wrong("a configuration that does not come back from its JSON")
    return {name: getattr(config, name) for name in case["fields"] if name not in ("backbone_config", "dtype")}


def read_image_processor(folder: Path, case: dict[str, Any]) -> Facts:
    """Make an image processor of `settings` and process a photograph with it, unless it is told to make it large."""
    image_processor = DepictImageProcessor(**{"size": {"shortest_edge": 16}} | case["settings"])
    if max(filter(None, dict(image_processor.size or {}).values()), default=0) > 1000:
        return {"size": dict(image_processor.size)}
    photo = torch.arange(20 * 30).reshape(1, 20, 30).repeat(3, 1, 1).remainder(256).to(torch.uint8)
    pixel_values = image_processor(photo, return_tensors="pt")["pixel_values"]
    if pixel_values.ndim != 4 or not pixel_values.isfinite().all():
        raise Wrong(f"pixel values of shape {tuple(pixel_values.shape)} that are not all finite")
    return {"shape": list(pixel_values.shape)}


def read_recipe(folder: Path, case: dict[str, Any]) -> Facts:
    """Override fields of a recipe, as `overrides` of a command line or as `values` of Python."""
    from training.optimization.same_run import as_json
    from training.recipes import get_recipe

    recipe = get_recipe(case["recipe"])
    recipe = recipe.override(case["overrides"]) if "overrides" in case else recipe.replace(**case["values"])
    values = as_json(recipe)
    numbers = [each for section in values.values() if isinstance(section, dict) for each in section.values()]
    if any(isinstance(each, float) and not math.isfinite(each) for each in numbers):
        raise Wrong("a recipe with values that are not finite")
    return {}


def read_command(folder: Path, case: dict[str, Any]) -> Facts:
    """Run a command line in the folder; `arguments` begin with a command of `depict`, or the module of another.

    Whatever comes of it, files in `must_exist` are there afterwards, and nothing unfinished is left.
    """
    name, *arguments = case["arguments"]
    with _chdir(folder), captured() as streams:
        try:
            status = _main(name)(arguments)
        except SystemExit as end:  # of argparse, whose lines are its own
            raise Refusal(f"argparse exits with {end.code}") from end
    out, errors = (stream.buffer.getvalue().decode(errors="surrogateescape") for stream in streams)
    lost = [each for each in case.get("must_exist", []) if not (folder / each).is_file()]
    left = [str(path.relative_to(folder)) for path in folder.rglob(f"*{UNFINISHED}*")]
    text = (out + errors).replace("\t", "").replace("\r", "")
    obeyed = [line for line in text.split("\n") if not line.isprintable()]
    if lost or left or obeyed or status not in (0, 1, 2) or "Traceback" in errors:
        raise Wrong(
            f"status {status}; lost {lost}; left unfinished {left}; not printable {obeyed[:2]}; printed {out[-2000:]} "
            f"{errors[-2000:]}"
        )
    if status:
        raise Refusal(f"exit {status}: {(errors.strip() or 'no word').splitlines()[-1]}")
    written = [path for path in folder.rglob("*.json") if path.is_file()]
    for path in written:
        if not path.read_bytes().strip():
            raise Wrong(f"{path.name} is empty")
    return {"status": status}


def _main(name: str) -> Callable[[list[str]], int]:
    from depict_hf.cli import TRAINING_COMMANDS
    from depict_hf.cli import main as depict

    if name.startswith("training."):
        return import_module(name).main
    if name in TRAINING_COMMANDS:  # here of the repository, wherever `depict_hf.training` is installed
        training = import_module(f"training.{TRAINING_COMMANDS[name].module}")
        return lambda arguments: training.main(arguments, f"depict {name}")
    return lambda arguments: depict([name, *arguments])


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """Keep what is printed, in streams that can do what those of a terminal can."""
    streams = (_stream(), _stream())
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield streams
        for stream in streams:
            stream.flush()


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    """Do as `contextlib.chdir` does, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


READERS: dict[str, Callable[[Path, dict[str, Any]], Facts]] = {
    "photograph": read_photograph,
    "label_map": read_label_map,
    "model": read_model,
    "data": read_data,
    "configuration": read_configuration,
    "image_processor": read_image_processor,
    "recipe": read_recipe,
    "command": read_command,
}
# What each of them may raise, by the documentation of what it calls.
DOCUMENTED: dict[str, tuple[type[Exception], ...]] = {
    "photograph": (OSError, ValueError),
    "label_map": (ValueError,),
    "model": (OSError, ValueError),
    "data": (OSError, ValueError),
    "configuration": (ValueError,),
    "image_processor": (ValueError,),
    "recipe": (FileNotFoundError, ValueError),
    "command": (Refusal,),
}
