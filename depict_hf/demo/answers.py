"""What the page answers about a photograph; nothing here knows of pages, browsers or Gradio.

One `Demo` serves all visitors at once: it never changes after it was loaded. What belongs to a visitor is in the
`Answer` that the visitor got.
"""

import base64
import copy
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from ..explain import explain
from ..familiarity import Familiarity, load_familiarity
from ..image_processing_depict import DepictImageProcessor
from ..inference import read_photo, score_stream
from ..labels import colors_for
from ..loading import load_model, model_source, override_protocol
from ..modeling_depict import DepictForSemanticSegmentation
from ..passes import check_photo
from ..results import knowledge, summary
from ..visualization import Color, label_image
from ..windows import CoarseScores, label_views
from ..writing import encode_picture

# Pixels of a photograph's file unless the owner of the page says otherwise; cameras of phones mostly stay below.
MAX_PHOTO_PIXELS = 2**25
# Pixels that the model gets at the largest scale: a strip of paper scanned lengthwise shall not keep others waiting.
MAX_MODEL_PIXELS = 2**23
# Pixels that an explanation takes apart, patch by patch and head by head, which costs more than labels do.
MAX_EXPLAINED_PIXELS = 2**21
LONGEST_SIDE = 1280  # Pixels of the picture on the page; labels are computed, read and saved at the photograph's size.
MOST_OVERLAP = 75  # Percent of a window's side: every pixel is then computed 16 times.


class Sizes(NamedTuple):
    """Scales relative to the model's own size, whether mirror images are added, and what to call it."""

    scales: tuple[float, ...]
    flip: bool
    label: str


# The pixels of them all, against those of one size, say how much longer they take.
SIZES = {
    "one": Sizes((1.0,), False, "one"),
    "three": Sizes((0.75, 1.0, 1.25), False, "three (3 times as long)"),
    "six": Sizes((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True, "six and mirror images, as published (17 times as long)"),
}


@dataclass(frozen=True)
class Choices:
    """What a visitor chose.

    Attributes:
        sizes: A key of `SIZES`.
        overlap: Percent of a window's side that the next one covers again, 0 to `MOST_OVERLAP`; None is the model's.
    """

    sizes: str = "one"
    overlap: int | None = None


@dataclass(frozen=True)
class Reading:
    """What is known of one pixel.

    Attributes:
        x, y: The pixel, from the top left corner of the upright photograph.
        label: Name of its class.
        confidence: Probability of that class.
        runner_up: Name of the likeliest other class; None where the model has one class only.
        runner_up_probability: Its probability.
    """

    x: int
    y: int
    label: str
    confidence: float
    runner_up: str | None
    runner_up_probability: float

    def sentence(self) -> str:
        """Say it to people, in one line."""
        found = f"{self.label}, {100 * self.confidence:.1f} %"
        second = f"; next would be {self.runner_up}, {100 * self.runner_up_probability:.1f} %" if self.runner_up else ""
        return f"{found}{second} (x {self.x}, y {self.y})"


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model says about a photograph.

    Attributes:
        views: Coarse scores of every scale and mirror image, on the CPU; small, whatever the photograph's size.
        labels: `(height, width)` class ids, uint8, as of `segment`.
        names: Names by class id.
        colors: RGB in 0 to 255 by class id.
        temperature: Divides scores before probabilities are taken from them.
        picture: The photograph for the page, JPEG, its longer side `LONGEST_SIDE` pixels at most.
        record: For JSON: `file`, `model`, `protocol` (scales, flip, window_size, window_stride), `classes` (id, name,
            color, share, mean_confidence; those that occur, largest share first), and the keys of `results.summary`;
            where they apply, `note`, `distance` and `warning` as of `depict segment --json`.
    """

    views: Sequence[CoarseScores]
    labels: np.ndarray
    names: list[str]
    colors: list[Color]
    temperature: float
    picture: bytes
    record: dict[str, Any]

    @torch.inference_mode()
    def read(self, x: Any, y: Any) -> Reading:
        """Read one pixel of the photograph.

        Args:
            x, y: Whole numbers, from the left and from the top; whatever else a browser sends is refused.

        Raises:
            ValueError: If there is no such pixel.
        """
        height, width = self.labels.shape
        if not (isinstance(x, int) and isinstance(y, int) and 0 <= x < width and 0 <= y < height):
            raise ValueError(f"Got the pixel x={x!r}, y={y!r}, needed one of the {width} x {height} of the photograph.")
        shares = [(view.at(y, x).double() / self.temperature).softmax(dim=-1) for view in self.views]
        probabilities = torch.stack(shares).mean(dim=0)
        # The label is decided without temperature, so that with it, another class may be the likeliest.
        label = int(self.labels[y, x])
        others = probabilities.clone()
        others[label] = -1
        second = int(others.argmax()) if len(others) > 1 else None
        return Reading(
            x,
            y,
            self.names[label],
            float(probabilities[label]),
            None if second is None else self.names[second],
            0.0 if second is None else float(probabilities[second]),
        )

    def label_map(self) -> bytes:
        """Return the label map as `depict segment` writes it: a palette PNG whose values are class ids."""
        return encode_picture(label_image(self.labels, self.colors), "labels.png")

    def for_page(self) -> dict[str, Any]:
        """Return what the page draws: a picture, class ids at its size as grey PNG, classes, and files to download."""
        with PIL.Image.open(io.BytesIO(self.picture)) as picture:
            size = picture.size
        ids = PIL.Image.fromarray(self.labels).resize(size, PIL.Image.Resampling.NEAREST)
        stem = Path(self.record["file"]).stem
        record = json.dumps(self.record, indent=2, allow_nan=False) + "\n"
        return {
            "width": self.labels.shape[1],
            "height": self.labels.shape[0],
            "picture": _url("image/jpeg", self.picture),
            "ids": _url("image/png", encode_picture(ids, "ids.png")),
            "classes": self.record["classes"],
            "files": [
                {"name": f"{stem}_labels.png", "what": "label map (PNG)", "url": _url("image/png", self.label_map())},
                {"name": f"{stem}.json", "what": "JSON", "url": _url("application/json", record.encode())},
            ],
        }


@dataclass(frozen=True, eq=False)
class Demo:
    """A model as all visitors share it.

    Attributes:
        name: What the model is called.
        model: In evaluation mode.
        image_processor: Its own.
        familiarity: What is kept of its training images, where anything is.
        max_photo_pixels: Pixels that a photograph's file may declare.
    """

    name: str
    model: DepictForSemanticSegmentation
    image_processor: DepictImageProcessor
    familiarity: Familiarity | None = None
    max_photo_pixels: int = MAX_PHOTO_PIXELS

    @classmethod
    def load(cls, name: str, device: str = "cpu", max_photo_pixels: int | None = None) -> "Demo":
        """Load a model by its folder, Hub name or as "default", in float32.

        Raises:
            ValueError, OSError: As `load_model`; and if it has more classes than a palette image.
        """
        model, image_processor = load_model(name, device)
        label_image(np.zeros((1, 1), np.uint8), colors_for(model.config.id2label))
        familiarity = load_familiarity(model_source(name))
        return cls(name, model, image_processor, familiarity, max_photo_pixels or MAX_PHOTO_PIXELS)

    @property
    def knowledge(self) -> str:
        """What the model was trained on and which classes it has, in a line."""
        return knowledge(self.model.config)

    @property
    def overlap(self) -> int | None:
        """Percent of a window's side that the next one covers in the model's own protocol; None without windows."""
        config = self.model.config
        if config.window_size is None:
            return None
        return round(100 * (1 - (config.window_stride or config.window_size) / config.window_size))

    def answer(self, path: str | Path, choices: Choices = Choices()) -> Answer:
        """Segment a photograph, with labels and probabilities equal to those of `segment`.

        Raises:
            ValueError, OSError: If the file cannot be read, or has or would be resized to too many pixels; one line.
            MemoryError: If there is not enough memory for it.
        """
        photo, note = read_photo(path, self.max_photo_pixels)
        model, image_processor = self._model_for(choices), self.image_processor
        scales, flip, _ = SIZES[choices.sizes]
        [views] = score_stream(model, image_processor, [photo], scales, flip, max_photo_pixels=MAX_MODEL_PIXELS)
        with torch.inference_mode():
            certainty = label_views(views, True, model.config.temperature)
        assert certainty.confidence is not None
        labels, confidence = certainty.labels.cpu().numpy(), certainty.confidence.cpu()
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        colors = colors_for(model.config.id2label)
        found = summary(labels, names, confidence)
        record = {
            "file": Path(path).name,
            "model": self.name,
            "protocol": {
                "scales": list(scales),
                "flip": flip,
                "window_size": model.config.window_size,
                "window_stride": model.config.window_stride,
            },
            **found,
            "classes": _classes(labels, confidence.numpy(), names, colors),
            **({} if note is None else {"note": note}),
            **(self.familiarity.judge(model, image_processor, photo) if self.familiarity else {}),
        }
        on_cpu = [replace(view, mosaic=view.mosaic.cpu()) for view in views]
        return Answer(on_cpu, labels, names, colors, model.config.temperature, _picture(photo), record)

    def explanation(self, path: str | Path, choices: Choices = Choices(), at: tuple[int, int] | None = None) -> str:
        """Write the page that `depict explain` writes, at one scale, whatever was chosen.

        Args:
            path: Of the photograph.
            choices: Of which the overlap counts.
            at: (x, y), the pixel at which the page opens.

        Raises:
            ValueError, OSError, MemoryError: As `answer`; and if the model has one class only.
        """
        photo, _ = read_photo(path, self.max_photo_pixels)
        model, image_processor = self._model_for(choices), self.image_processor
        check_photo(photo.height, photo.width, model, image_processor, (1.0,), MAX_EXPLAINED_PIXELS)
        return explain(model, image_processor, photo, at, name=Path(path).name).page()

    def _model_for(self, choices: Choices) -> DepictForSemanticSegmentation:
        """Return a model that shares all weights with everybody's but has windows of its own."""
        window = self.model.config.window_size
        if window is None or choices.overlap is None or choices.overlap == self.overlap:
            return self.model
        if not 0 <= choices.overlap <= MOST_OVERLAP:
            raise ValueError(f"Got an overlap of {choices.overlap} %, needed 0 to {MOST_OVERLAP}.")
        model = copy.copy(self.model)
        model.config = copy.deepcopy(self.model.config)
        stride = max(1, round(window * (100 - choices.overlap) / 100))
        override_protocol(model, self.image_processor, window_stride=stride)
        return model


def _classes(labels: np.ndarray, confidence: np.ndarray, names: list[str], colors: list[Color]) -> list[dict[str, Any]]:
    counts = np.bincount(labels.ravel(), minlength=len(names))
    sums = np.bincount(labels.ravel(), confidence.ravel(), minlength=len(names))
    return [
        {
            "id": index,
            "name": names[index],
            "color": list(colors[index]),
            "share": round(counts[index] / labels.size, 6),
            "mean_confidence": round(sums[index] / counts[index], 6),
        }
        for index in np.argsort(-counts, kind="stable").tolist()
        if counts[index]
    ]


def _picture(photo: PIL.Image.Image) -> bytes:
    picture = photo.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
