"""What a run of one's own classes leaves for people: curves, and a text with figures, settings and what comes next."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..settings import text_of
from .records import percent, write_figure


def draw_curves(history: Sequence[Mapping], path: Path) -> bool:
    """Draw the loss, and the mean IoU on the validation split, over the minutes.

    Args:
        history: Events with `stage`, `seconds`, and `loss` or `mean_iou`; others are passed over.
        path: Path of the picture.

    Returns:
        Whether it was drawn; matplotlib may be missing, which a line on stdout then says.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(
            f"{path.name} is not drawn, as matplotlib is not installed (pip install 'depict-hf[plots]'); its numbers "
            "are in history.jsonl."
        )
        return False
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for axes, name, factor, title in (
        (losses, "loss", 1, "Training loss"),
        (scores, "mean_iou", 100, "Validation mIoU in percent"),
    ):
        for stage in dict.fromkeys(event["stage"] for event in history if name in event):
            events = [event for event in history if event["stage"] == stage and name in event]
            minutes = [event["seconds"] / 60 for event in events]
            values = [factor * event[name] for event in events]
            marker = "o" if name == "mean_iou" else None
            axes.plot(minutes, values, marker=marker, alpha=0.5 if name == "loss" else 1, label=stage)
            if name == "loss":
                axes.plot(minutes, smoothed(values), color=axes.lines[-1].get_color())
        axes.set(title=title, xlabel="minutes")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    write_figure(figure, path, dpi=120)
    return True


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Average exponentially all values so far, the last of which counts `1 - weight`, corrected for the beginning."""
    average, total, smooth = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        smooth.append(average / total)
    return smooth


def render_report(
    record: Mapping,
    train_pixels: Sequence[int],
    test_pixels: Sequence[int],
    history: Sequence[Mapping],
    start: Sequence[str],
    reasons: Sequence[str],
    stages: Sequence[tuple[str, object]],
    run: Mapping,
) -> str:
    """Write the report in Markdown.

    Args:
        record: What `evaluate` returned, on the test split, with `model`, `dataset` and `split`.
        train_pixels, test_pixels: Pixels of each class; the latter in the images that were evaluated.
        history: As for `draw_curves`.
        start: Lines on what training started from.
        reasons: Lines on what was chosen and why.
        stages: Names and recipes.
        run: `data` and `output`, as the command had them, `spent_seconds`, whether `curves` were drawn, and
            `chosen_by_test`: whether the test split is also the validation split.
    """
    lines = ["# A model of your own classes", ""]
    lines += [
        f"Mean IoU {_percent(record['mean_iou'])} % on {record['num_images']} images of the split {record['split']}; "
        f"{_percent(record['overall_accuracy'])} % of the labelled pixels are right. "
        f"{run['spent_seconds'] / 60:.1f} minutes in all.",
        "",
        "The best weights were chosen by these very images, as there is no test split, so that the figures are better "
        "than those on other photographs; bring some that are kept apart."
        if run["chosen_by_test"]
        else "None of these images was trained on, and nothing was chosen by them.",
        "",
        "| class | IoU in % | accuracy in % | pixels in training | pixels evaluated |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for index, (name, iou) in enumerate(record["per_class_iou"].items()):
        accuracy = record["per_class_accuracy"][name]
        counts = f"{train_pixels[index]:,} | {test_pixels[index]:,}"
        lines.append(f"| {name} | {_percent(iou)} | {_percent(accuracy)} | {counts} |")
    lines += ["", "IoU: of all pixels that are, or were taken for, a class, the share of which both holds."]
    few = 0.005 * sum(train_pixels)
    rare = [name for name, count in zip(record["per_class_iou"], train_pixels, strict=True) if count < few]
    if rare:
        lines += [f"Few pixels to learn from (under 0.5 % of all): {', '.join(rare)}; more images of them would help."]
    lines += ["", "`worst.png` shows the images with the lowest IoU: photograph, label map, prediction."]
    if run["curves"]:
        lines += ["", "![Loss and validation mIoU over the minutes](curves.png)"]
    lines += ["", "## What it started from", "", "```text", *start, "```"]
    lines += ["", "## What was chosen, and why", "", *(f"- {reason}" for reason in reasons)]
    best: dict[str, Mapping] = {}
    for event in history:
        if "mean_iou" in event:
            best[event["stage"]] = max(best.get(event["stage"], event), event, key=lambda each: each["mean_iou"])
    for name, event in best.items():
        lines.append(
            f"- Best weights of the stage {name}: after step {event['step']}, validation mIoU "
            f"{_percent(event['mean_iou'])} %."
        )
    lines += ["", "Settings, each of which can be given as `section.field=value` behind the command:", ""]
    lines += _settings_table(stages)
    lines += [
        "",
        "## How to go on",
        "",
        "```sh",
        f"depict segment PHOTO --model {run['output']}",
        f"depict evaluate {run['output']} {run['data']}",
        f"depict train {run['data']} NEW_FOLDER --from {run['output']} --minutes 60   # train it further",
        f"depict export {run['output']} FOLDER",
        "```",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        "import depict_hf",
        "",
        f'segmenter = pipeline("image-segmentation", model="{run["output"]}")',
        'masks = segmenter("PHOTO.jpg")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return percent(fraction).strip()


def _settings_table(stages: Sequence[tuple[str, object]]) -> list[str]:
    from ..recipe import SECTIONS

    lines = ["| field | " + " | ".join(name for name, _ in stages) + " |", "| --- |" + " --- |" * len(stages)]
    for section, kind in SECTIONS.items():
        for name in kind.__dataclass_fields__:
            if name in ("class_names", "backbone", "epochs", "evaluate_every_epochs", "push_to_hub", "report_to"):
                continue
            values = [text_of(getattr(getattr(recipe, section), name)) for _, recipe in stages]
            lines.append(f"| {section}.{name} | {' | '.join(values)} |")
    return lines
