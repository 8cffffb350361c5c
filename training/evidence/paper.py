"""Published figures, row by row, and whether a published file gives its row's again."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depict_hf import DepictConfig
from depict_hf.configuration_depict import ENCODER_PRESETS
from depict_hf.conversion import Conversion, convert_with_report
from depict_hf.to_published import published_dataset

from ..data import load_dataset_splits, open_samples
from ..evaluation import Execution, Protocol, class_names, evaluate, percent

# Sizes relative to the protocol's own, each also mirrored: `set_multiscale_mode`, segm/data/base.py in
# rstrudel/segmenter@20d1bfa.
PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# Points of mIoU. Figures are printed with one decimal, which accounts for 0.05; the rest is for another decoder of JPEG
# and another order of sums.
TOLERANCE_POINTS = 0.1
# Images of the official validation splits. Of Pascal Context its authors count 5105, and the lists that are derived
# from theirs may have one less.
VALIDATION_IMAGES = {"ade20k": (2000,), "cityscapes": (500,), "pascal_context": (5104, 5105)}
_DEPICT = "Wen and Li 2024 (arXiv 2411.03033)"
_SEGMENTER = "model zoo of rstrudel/segmenter"


@dataclass(frozen=True)
class PaperRow:
    """What is published of one model; none of it was measured here.

    Args:
        model: Its name there.
        dataset: Key of `conversion.PUBLISHED_SIZES`.
        decoder_type: As of `DepictConfig`.
        encoder: Shape of the encoder: patch size, width, layers, heads, whether it has a distillation token.
        crop_size: Side in pixels of its training squares.
        single_scale, multi_scale: mIoU on the validation split in percent, with one decimal.
        source: Where it is published.
        num_images: Images that the split may have.
    """

    model: str
    dataset: str
    decoder_type: str
    encoder: tuple[int, int, int, int, bool]
    crop_size: int
    single_scale: float
    multi_scale: float
    source: str
    num_images: tuple[int, ...]

    def figure(self, multi_scale: bool) -> float:
        return self.multi_scale if multi_scale else self.single_scale


def _row(
    model: str, dataset: str, kind: str, encoder: str, crop_size: int, single: float, multi: float, source: str
) -> PaperRow:
    shape = ENCODER_PRESETS[encoder]
    return PaperRow(model, dataset, kind, shape, crop_size, single, multi, source, VALIDATION_IMAGES[dataset])


_LARGE = "vit_large_patch16_384"
_MASK = "mask_transformer"
PAPER_ROWS = (
    _row("DEPICT-SA, ViT-L", "ade20k", "sa", _LARGE, 640, 52.9, 54.3, _DEPICT),
    _row("DEPICT-SA, ViT-L", "cityscapes", "sa", _LARGE, 768, 78.8, 81.0, _DEPICT),
    _row("DEPICT-SA, ViT-L", "pascal_context", "sa", _LARGE, 480, 57.9, 58.6, _DEPICT),
    _row("Seg-T-Mask/16", "ade20k", _MASK, "vit_tiny_patch16_384", 512, 38.1, 38.8, _SEGMENTER),
    _row("Seg-S-Mask/16", "ade20k", _MASK, "vit_small_patch16_384", 512, 45.3, 46.9, _SEGMENTER),
    _row("Seg-B-Mask/16", "ade20k", _MASK, "vit_base_patch16_384", 512, 48.5, 50.0, _SEGMENTER),
    _row("Seg-B/8", "ade20k", "linear", "vit_base_patch8_384", 512, 49.5, 50.5, _SEGMENTER),
    _row("Seg-L-Mask/16", "ade20k", _MASK, _LARGE, 640, 51.8, 53.6, _SEGMENTER),
    _row("Seg-B(DeiT)/16", "ade20k", "linear", "deit_base_distilled_patch16_384", 512, 47.1, 48.1, _SEGMENTER),
    _row("Seg-B(DeiT)-Mask/16", "ade20k", _MASK, "deit_base_distilled_patch16_384", 512, 48.7, 50.1, _SEGMENTER),
    _row("Seg-L-Mask/16", "pascal_context", _MASK, _LARGE, 480, 58.1, 59.0, _SEGMENTER),
    _row("Seg-L-Mask/16", "cityscapes", _MASK, _LARGE, 768, 79.1, 81.3, _SEGMENTER),
)


def find_row(config: DepictConfig, dataset: str | None, rows: Sequence[PaperRow] = PAPER_ROWS) -> PaperRow | None:
    """Find the row of a converted model by data set, decoder, encoder and training squares; None if there is none.

    Args:
        config: As `convert_checkpoint` makes it; `window_size` is the side of the training squares.
        dataset: Of the model's classes, see `published_dataset`.
    """
    shape = (
        config.patch_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.use_distillation_token,
    )
    key = (dataset, config.decoder_type, shape, config.window_size)
    return next((row for row in rows if (row.dataset, row.decoder_type, row.encoder, row.crop_size) == key), None)


def reproduce(
    checkpoint: str | Path,
    dataset: str,
    variant: str | Path | None = None,
    multi_scale: bool = False,
    split: str = "validation",
    execution: Execution | None = None,
    max_images: int | None = None,
    expected: float | None = None,
    tolerance_points: float = TOLERANCE_POINTS,
    im_size: int | None = None,
    rows: Sequence[PaperRow] = PAPER_ROWS,
) -> dict[str, Any]:
    """Convert a published file, evaluate it by the published protocol, and compare with its row.

    Args:
        checkpoint, variant: As for `convert_checkpoint`.
        dataset: Name on the Hub or folder, as for `load_dataset_splits`.
        multi_scale: Whether all of `PUBLISHED_SCALES` and their mirror images are averaged.
        max_images: Evaluate only so many, which are then compared with nothing.
        expected: Published figure in percent, for a file that has no row here.
        tolerance_points: Up to this difference in points of mIoU the figure counts as reproduced.
        im_size: Pixels of the shorter side, instead of the protocol's.
        rows: Among which the file's row is looked for.

    Returns:
        A record ready for JSON: `verdict`, which `judge` gives, `difference_points`, `paper`, the row, `conversion`,
        the lines on the conversion, and `evaluation`, the record of `evaluate`.

    Raises:
        FileNotFoundError: If a file or the data set is not there.
        ValueError: If files or data are at fault, or do not fit each other.
    """
    if tolerance_points < 0:
        raise ValueError(f"Got a tolerance of {tolerance_points} points, needed at least 0.")
    execution = Execution() if execution is None else execution
    conversion = convert_with_report(checkpoint, variant, im_size=im_size)
    model = conversion.model
    if execution.state is not None:
        model = model.to(execution.state.device)
    known = published_dataset(model)
    row = find_row(model.config, known, rows)
    _say(execution, *conversion.report, conversion.warning or "", _describe_row(row, known, conversion))
    # The other processes find what the main process found while it read all images.
    with nullcontext() if execution.state is None else execution.state.main_process_first():
        samples = open_samples(
            load_dataset_splits(dataset),
            split,
            class_names(model.config),
            reduce_labels=known == "ade20k",  # as its owners write label maps, in whatever layout
            num_workers=execution.num_workers,
        )
    protocol = Protocol(PUBLISHED_SCALES if multi_scale else (1.0,), flip=multi_scale, max_images=max_images)
    record = evaluate(model, conversion.image_processor, samples, protocol, execution)
    record |= {"model": str(checkpoint), "dataset": str(dataset), "split": split}
    figure = expected if expected is not None else row.figure(multi_scale) if row else None
    counts = row.num_images if row and expected is None else VALIDATION_IMAGES.get(known or "", ())
    measured = 100 * record["mean_iou"] if record["mean_iou"] is not None else None
    return {
        "verdict": judge(measured, figure, tolerance_points, record["num_images"], counts),
        "measured_percent": measured,
        "published_percent": figure,
        "published_by": None if figure is None else "as given" if expected is not None or not row else row.source,
        "difference_points": None if figure is None or measured is None else measured - figure,
        "tolerance_points": tolerance_points,
        "multi_scale": multi_scale,
        "paper": asdict(row) if row else None,
        "conversion": [*conversion.report, *([conversion.warning] if conversion.warning else [])],
        "evaluation": record,
    }


def judge(
    measured: float | None, published: float | None, tolerance: float, num_images: int, counts: Sequence[int] = ()
) -> str:
    """Say what a measured figure means beside the published one; both in percent.

    Args:
        counts: Numbers of images that the published figure may be of; any if there are none.

    Returns:
        "no figure": nothing is published to compare with. "not comparable": other images were evaluated than those
        of the published figure. "reproduced" up to the tolerance, else "not reproduced".
    """
    if published is None:
        return "no figure"
    if measured is None or (counts and num_images not in counts):
        return "not comparable"
    # Decimal figures are no exact binary numbers.
    return "reproduced" if abs(measured - published) <= tolerance + 1e-9 else "not reproduced"


def describe_reproduction(record: dict[str, Any]) -> str:
    """Say the result of `reproduce` in a sentence."""
    protocol = "multi-scale" if record["multi_scale"] else "single-scale"
    measured = f"{protocol} mIoU {percent(record['evaluation']['mean_iou']).strip()} measured here"
    if record["verdict"] == "no figure":
        return f"{measured}; no published figure is known for this file (--expected gives one)."
    published = f"{record['published_percent']:.1f} published ({record['published_by']})"
    images = record["evaluation"]["num_images"]
    if record["verdict"] == "not comparable":
        return f"{measured} on {images} images; {published}, of other images, so that they cannot be compared."
    difference = f"{record['difference_points']:+.2f} points"
    return f"{record['verdict']}: {measured}, {published}, {difference}; tolerance {record['tolerance_points']:g}."


def _describe_row(row: PaperRow | None, known: str | None, conversion: Conversion) -> str:
    if row:
        figures = f"{row.single_scale} single-scale, {row.multi_scale} multi-scale"
        return f"published row: {row.model} on {row.dataset}, mIoU {figures} ({row.source}; not measured here)"
    config = conversion.model.config
    return (
        f"published row: none for data set {known}, decoder {config.decoder_type}, {config.num_hidden_layers} layers "
        f"of width {config.hidden_size} and patches of {config.patch_size}, squares of {config.window_size}"
    )


def _say(execution: Execution, *lines: str) -> None:
    if execution.state is None or execution.state.is_main_process:
        print("\n".join(line for line in lines if line))
