"""What `depict segment` writes and says about photographs."""

import argparse
import io
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor
from tqdm import tqdm

from .configuration_depict import IGNORE_LABEL, DepictConfig
from .familiarity import load_familiarity
from .formats import class_boxes, coco_file, geojson_file
from .inference import MAX_BATCH_PIXELS, segment_files
from .interruption import Interruption
from .labels import colors_for, find_classes
from .loading import fastest_device, load_model, model_source, override_protocol
from .photo_files import allowed_pixels
from .photo_files import shown as shown_name
from .photographs import RESULT_SUFFIXES, Photograph, Processes
from .quality import QUALITIES
from .resuming import Outcome, Results
from .visualization import class_shares, confidence_image, draw_confidence, label_image, overlay
from .windows import Segmentation
from .writing import DiskFullError, Existing, UnwritableError, encode_picture, is_full, write_all

NAMES_IN_A_LINE = 24


@dataclass(frozen=True)
class ResultWriter:
    """Writes the results of photographs, one after the other.

    Args:
        config: Configuration of the model, for its class names.
        kinds: Results wanted, keys of `photographs.RESULT_SUFFIXES`.
        classes: Ids of the classes to keep; pixels of all others become 255, which is no class. None keeps all.
        palette: As for `labels.colors_for`.
        alpha: Weight of the colours in the overlay.
        confidence_bits: 8 or 16, of the files of confidence and margin, a probability of 1 being their largest value;
            None writes none. They and the picture of the confidence are about the most probable class of all of the
            model's, whichever `classes` are kept.
    """

    config: DepictConfig
    kinds: Sequence[str]
    classes: Sequence[int] | None = None
    palette: str = "auto"
    alpha: float = 0.5
    confidence_bits: int | None = None

    def write(
        self, photograph: Photograph, photo: PIL.Image.Image, segmentation, existing: Existing = "replace"
    ) -> dict[str, Any]:
        """Write one photograph's files, none of which is there before all are on the disk.

        Args:
            photo: The photograph itself, upright.
            segmentation: `(height, width)` class ids, tensor or array; with `confidence_bits`, the `Segmentation` that
                also holds confidence and margin.
            existing: What happens to files that are there already, as for `writing.write_all`.

        Returns:
            `width`, `height`, `shares` of the image by class name, largest first, `boxes` by class name, each left,
            top, right and bottom in pixels, right and bottom excluded, and `files`; with `confidence_bits`,
            `mean_confidence` over all pixels, a probability.

        Raises:
            DiskFullError, UnwritableError: As `writing.write_all`.
        """
        bits = self.confidence_bits
        labels = segmentation if bits is None else segmentation.labels
        ids = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
        names = [self.config.id2label[index] for index in range(self.config.num_labels)]
        if self.classes is not None:
            ids = np.where(np.isin(ids, list(self.classes)), ids, IGNORE_LABEL)
        files = {kind: photograph.result(kind) for kind in self.kinds}
        colors = colors_for(self.config.id2label, self.palette)
        contents: dict[Path, bytes | str] = {}
        for kind, path in files.items():
            if kind == "overlay":
                contents[path] = encode_picture(overlay(photo, ids, colors, names, self.alpha), path)
            elif kind == "png":
                contents[path] = encode_picture(label_image(ids, colors), path)
            elif kind == "npy":
                contents[path] = _encode_array(ids.astype(np.uint8))
            elif kind == "coco":
                contents[path] = json.dumps(coco_file(ids, names, photograph.path.name, photograph.number))
            elif kind == "geojson":
                contents[path] = json.dumps(geojson_file(ids, names))
        if bits is not None:
            contents |= _encode_certainty(photograph, segmentation, bits)
        write_all(contents, existing)
        record = summary(ids, names, None if bits is None else segmentation.confidence)
        return {**record, "files": [str(path) for path in contents]}


def summary(ids: np.ndarray, names: list[str], confidence: Tensor | None = None) -> dict[str, Any]:
    """Say in numbers what a label map holds.

    Args:
        ids: `(height, width)`, class ids; 255 is no class.
        names: Names by class id.
        confidence: Probabilities of the labels, `(height, width)`, where they are known.

    Returns:
        `width`, `height`, `shares` and `boxes` by class name and, with `confidence`, `mean_confidence`, as of
        `ResultWriter.write`.
    """
    mean = {} if confidence is None else {"mean_confidence": round(float(confidence.double().mean()), 6)}
    return {
        "width": ids.shape[1],
        "height": ids.shape[0],
        "shares": {name: round(share, 6) for name, share in class_shares(ids, names)},
        "boxes": {names[index]: list(box) for index, box in class_boxes(ids, len(names)).items()},
        **mean,
    }


def _encode_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _encode_certainty(photograph: Photograph, certainty: Segmentation, bits: int) -> dict[Path, bytes]:
    pictures = {
        "confidence": confidence_image(certainty.confidence, bits),
        "margin": confidence_image(certainty.margin, bits),
        "confidence_picture": draw_confidence(certainty.confidence),
    }
    paths = {kind: photograph.result(kind) for kind in pictures}
    return {path: encode_picture(pictures[kind], path) for kind, path in paths.items()}


def table(record: dict[str, Any]) -> str:
    """Lay out the shares of a record of `ResultWriter.write`, a line a class, and the mean confidence where known."""
    lines = [f"  {100 * share:6.2f} %  {name}" for name, share in record["shares"].items()]
    if "mean_confidence" in record:
        lines.append(f"  {100 * record['mean_confidence']:6.2f} %  mean probability of the labels")
    return "\n".join(lines)


def knowledge(config: DepictConfig) -> str:
    """Say in one line what a model was trained on, as far as its config says, and on its classes."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    listed = ", ".join(names[:NAMES_IN_A_LINE])
    if len(names) > NAMES_IN_A_LINE:
        listed += f" and {len(names) - NAMES_IN_A_LINE} more"
    trained = f"was trained on {config.training_scenes} and " if config.training_scenes else ""
    return f"The model {trained}gives every pixel one of {len(names)} classes: {listed}."


def segment_share(
    args: argparse.Namespace,
    results: Results,
    processes: Processes,
    share: Sequence[tuple[Photograph, Existing]],
    interruption: Interruption,
) -> Outcome:
    """Segment photographs, write their results, and say what `depict segment` says.

    Args:
        args: Of `depict segment`.
        results: Those of this process's photographs.
        share: The photographs to be segmented, as `Results.choose` chose them.
        interruption: Asked before each photograph whether it is the end.

    Raises:
        OSError, ValueError, ImportError: If the model cannot be loaded, or options do not fit it.
    """
    device = args.device
    if device == "auto":
        device = fastest_device(processes.local_rank) if args.backend == "pytorch" else "cpu"
    model, image_processor = load_model(args.model, device, args.dtype, args.backend)
    quality = QUALITIES[args.quality]
    stride = args.window_stride
    if stride is None:
        stride = quality.window_stride(model.config.window_size if args.window_size is None else args.window_size)
    override_protocol(model, image_processor, args.size, args.window_size, stride)
    if processes.rank == 0 and args.backend == "pytorch":
        print(f"depict: computes in {str(model.dtype).removeprefix('torch.')} on {device}", file=sys.stderr)
    config = model.config
    names = [config.id2label[index] for index in range(config.num_labels)]
    classes = None if args.classes is None else find_classes(args.classes, names)
    # Exports hold no encoder of their own that could be asked.
    familiarity = load_familiarity(model_source(args.model)) if args.backend == "pytorch" else None
    kinds = [kind for kind in results.kinds if kind in RESULT_SUFFIXES]
    writer = ResultWriter(config, kinds, classes, args.palette, args.alpha, args.confidence)
    by_path = {each.path: (each, existing) for each, existing in share}
    args.output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        results.begin_to_replace()

    def finish(path: Path, photo, segmentation) -> dict:
        photograph, existing = by_path[path]
        try:
            record = writer.write(photograph, photo, segmentation, existing)
        except UnwritableError as error:
            # A full disk is the end; anything else may concern this photograph alone.
            if isinstance(error, DiskFullError):
                raise
            return {"error": str(error)}
        return record | (familiarity.judge(model, image_processor, photo) if familiarity else {})

    num_failed = 0
    max_batch_pixels = MAX_BATCH_PIXELS if args.max_batch_pixels is None else args.max_batch_pixels
    max_photo_pixels = allowed_pixels(args.max_photo_pixels)
    scales, flip = quality.scales if args.scales is None else args.scales, args.flip or quality.flip
    options = (scales, flip, max_batch_pixels, args.confidence is not None, max_photo_pixels)
    files = segment_files(model, image_processor, by_path, finish, *options, stopped=lambda: bool(interruption))
    progress = tqdm(files, total=len(share), disable=len(share) == 1 or processes.rank > 0, unit="photo")
    last = time.monotonic()
    try:
        with interruption.in_hand(), closing(files), closing(progress):
            for file in progress:
                photograph, _ = by_path[file.path]
                name, shown = photograph.name, photograph.shown
                record: dict[str, Any] = {"file": name}
                record |= file.result if file.error is None else {"error": str(file.error)}
                # One photograph that cannot be read or written must not lose the others.
                if "error" in record:
                    num_failed += 1
                    progress.write(f"depict: {shown}: {record['error']}", file=sys.stderr)
                else:
                    record["seconds"] = round(time.monotonic() - last, 3)
                    if file.note is not None:
                        record["note"] = file.note
                    for text in filter(None, (file.note, record.get("warning"))):
                        progress.write(f"depict: {shown}: {text}", file=sys.stderr)
                last = time.monotonic()
                if args.json:
                    progress.write(json.dumps(record))
                    sys.stdout.flush()
                elif "error" not in record:
                    progress.write(f"{shown} -> {', '.join(map(shown_name, record['files']))}\n{table(record)}")
    except OSError as error:
        # Also where what is printed goes to a file.
        if not is_full(error):
            raise
        return Outcome(num_failed, error)
    if processes.rank == 0 and not interruption:
        print(knowledge(config), file=sys.stderr if args.json else sys.stdout)
    return Outcome(num_failed)
