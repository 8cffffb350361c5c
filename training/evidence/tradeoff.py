"""What a model costs and reaches when it is run in different ways: sizes, windows, scales, precisions, exports."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from depict_hf.hub.tables import pipe_table
from depict_hf.loading import load_model, override_protocol
from depict_hf.quality import QUALITIES
from depict_hf.writing import write_json, write_whole

from ..data import SegmentationDataset
from ..evaluation import Execution, Protocol, environment, evaluate, write_figure
from .paper import PUBLISHED_SCALES

RECORD_NAME, CARD_NAME, FIGURE_NAME = "tradeoff.json", "README.md", "tradeoff.png"
# Shares of the model's own size.
SIZES = (0.5, 0.75, 1.25)
TITLES = ["", "model, precision, size, stride, scales", "ms", "mIoU", "best", "--quality"]


@dataclass(frozen=True)
class Point:
    """One way to run a model, by what `depict segment` takes; None is as the model's files say.

    Args:
        model: Folder, Hub name or "default".
        backend: "pytorch" or "onnxruntime".
        dtype: Of weights and computation.
        size: Pixels of the shorter side.
        window_stride: Pixels from window to window.
        scales, flip: Sizes relative to `size` whose scores are averaged, and whether with mirror images.
        quality: What `depict segment --quality` calls it, if it has a name; no part of what is run.
    """

    model: str
    backend: str = "pytorch"
    dtype: str = "float32"
    size: int | None = None
    window_stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    quality: str = ""

    @property
    def name(self) -> str:
        """All of it in words, by which it is found again in a record."""
        parts = [
            Path(self.model).name,
            "ONNX Runtime" if self.backend == "onnxruntime" else self.dtype,
            f"size {self.size or 'as shipped'}",
            f"stride {self.window_stride or 'as shipped'}",
        ]
        if self.scales != (1.0,):
            parts.append("scales " + " ".join(f"{scale:g}" for scale in self.scales))
        return ", ".join([*parts, *(["mirrored"] if self.flip else [])])


def points_of(model: str, size: int, window: int | None, stride: int | None, patch_size: int) -> list[Point]:
    """Return the ways to run a model that are compared, those of `depict_hf.quality.QUALITIES` among them.

    Args:
        size: Its own, pixels of the shorter side.
        window: Side of its windows; None where it takes whole images.
        stride: Pixels from window to window; where its windows lie side by side, they are also tried half as far apart.
        patch_size: Of its encoder; sizes, and strides that are not its own, are multiples of it.
    """
    native = Point(model, dtype="bfloat16")
    strides: list[int | None] = [None]
    if window is not None:
        own = stride or window
        strides = [window, own if own < window else window // 2 // patch_size * patch_size]
    best = QUALITIES["best"]
    points = [replace(native, dtype="float32", window_stride=strides[0])]
    for each in strides:
        plain = replace(native, window_stride=each)
        points += [plain, replace(plain, scales=best.scales, flip=best.flip)]
        points += [replace(plain, size=round(share * size / patch_size) * patch_size) for share in SIZES]
    points.append(replace(native, window_stride=strides[-1], scales=PUBLISHED_SCALES, flip=True))
    named: dict[Point, list[str]] = {}
    for name, quality in QUALITIES.items():
        apart = window if window is None or not quality.overlap else stride or window
        point = replace(native, window_stride=apart, scales=quality.scales, flip=quality.flip)
        named.setdefault(point, []).append(name)
    return [replace(point, quality=", ".join(named.get(point, []))) for point in points]


def measure_points(
    points: Iterable[Point], samples: SegmentationDataset, max_images: int | None, record: dict, folder: Path
) -> dict:
    """Evaluate every point that a record lacks, and write the record after each.

    Args:
        samples: The split.
        max_images: Evaluate at most so many, evenly spaced.
        record: What was measured before; see `new_record`.
        folder: Gets `RECORD_NAME`.

    Raises:
        OSError, ValueError, ImportError: If a model cannot be loaded or run that way.
    """
    for point in points:
        if point.name in record["points"]:
            continue
        model, image_processor = load_model(point.model, dtype=point.dtype, backend=point.backend)
        override_protocol(model, image_processor, point.size, window_stride=point.window_stride)
        protocol = Protocol(point.scales, point.flip, max_images=1)
        execution = Execution(batch_size_images=1)
        evaluate(model, image_processor, samples, protocol, execution)  # warms up
        found = evaluate(model, image_processor, samples, replace(protocol, max_images=max_images), execution)
        figures = {
            "mean_iou": found["mean_iou"],
            "milliseconds": 1000 / found["images_per_second_model_alone"],
            "num_images": found["num_images"],
        }
        record["points"][point.name] = asdict(point) | {"model": Path(point.model).name} | figures
        write_json(record, folder / RECORD_NAME)
        print(f"{point.name}: {100 * figures['mean_iou']:.2f} in {figures['milliseconds']:.0f} ms", flush=True)
    return record


def new_record(dataset: str, split: str, max_images: int | None, folder: Path) -> dict[str, Any]:
    """Return the record in a folder, or one without any point.

    Raises:
        ValueError: If the folder's is of other images.
    """
    images = {"dataset": dataset, "split": split, "max_images": max_images}
    path = folder / RECORD_NAME
    if not path.is_file():
        return images | {"environment": environment(), "points": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    found = {name: record[name] for name in images}
    if found != images:
        raise ValueError(f"{path} is of {found}, but the command has {images}; take another folder, or delete it.")
    return record


def front(points: Mapping[str, Mapping]) -> list[str]:
    """Name the points that no other is at once as fast and more accurate than, or as accurate and faster; by time."""
    ordered = sorted(points, key=lambda name: (points[name]["milliseconds"], -points[name]["mean_iou"]))
    best, kept = float("-inf"), []
    for name in ordered:
        if points[name]["mean_iou"] > best:
            best = points[name]["mean_iou"]
            kept.append(name)
    return kept


def render_tradeoff(record: Mapping) -> str:
    """Lay out all points by time, as Markdown; mIoU in percent."""
    points = record["points"]
    kept = front(points)
    rows = [
        [
            str(index),
            name,
            f"{points[name]['milliseconds']:.0f}",
            f"{100 * points[name]['mean_iou']:.2f}",
            "yes" if name in kept else "",
            points[name]["quality"],
        ]
        for index, name in enumerate(by_time(points), 1)
    ]
    count = next(iter(points.values()))["num_images"]
    where = record["environment"]
    lines = [
        "# Cost against accuracy",
        "",
        f"{count} images of the {record['split']} split of {record['dataset']}, one at a time: milliseconds from "
        f"photograph to label map, on average, and mIoU in percent. {where['cpu_threads']} threads of a CPU, torch "
        f"{where['torch']}. Best: no other is as fast and more accurate, or as accurate and faster.",
        "",
        *([record["about"], ""] if "about" in record else []),
        *pipe_table(TITLES, rows, numeric_from=2),
        "",
        f"![mIoU against milliseconds]({FIGURE_NAME})",
    ]
    return "\n".join(lines) + "\n"


def by_time(points: Mapping[str, Mapping]) -> list[str]:
    """Name all points, the fastest first, as table and picture number them."""
    return sorted(points, key=lambda name: points[name]["milliseconds"])


def draw_tradeoff(record: Mapping, path: Path) -> None:
    """Draw mIoU against milliseconds, numbered as in the table, with a line through the best points.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib; install the extra: pip install 'depict-hf[plots]'.") from error
    points = record["points"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_coordinates(points, front(points)), "-", color="C1", label="best")
    models = sorted({each["model"] for each in points.values()})
    for index, model in enumerate(models):
        own = [name for name, each in points.items() if each["model"] == model]
        axes.plot(*_coordinates(points, own), "os^Dv"[index % 5], color="C0", alpha=0.7, label=model)
    for number, name in enumerate(by_time(points), 1):
        [x], [y] = _coordinates(points, [name])
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.set(xscale="log", xlabel="milliseconds a photograph", ylabel="mIoU (%)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write_figure(figure, path, dpi=100)


def _coordinates(points: Mapping[str, Mapping], names: Sequence[str]) -> tuple[list[float], list[float]]:
    return [points[name]["milliseconds"] for name in names], [100 * points[name]["mean_iou"] for name in names]


def write_tradeoff(record: Mapping, folder: Path) -> None:
    """Write table and picture beside a record.

    Raises:
        OSError: If they cannot be written.
        ImportError: If matplotlib is missing.
    """
    write_whole(render_tradeoff(record), folder / CARD_NAME)
    draw_tradeoff(record, folder / FIGURE_NAME)
