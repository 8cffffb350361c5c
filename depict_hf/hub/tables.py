"""Figures as text: percentages, and the table of a record of `evaluate`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def percent(fraction: float | None) -> str:
    """A fraction as a percentage of six characters with two decimals; None is a "-"."""
    return f"{'-':>6}" if fraction is None else f"{100 * fraction:6.2f}"


def render_table(record: Mapping[str, Any]) -> str:
    """Per-class IoU and accuracy of a record of `evaluate`, in percent."""
    width = max(len(name) for name in [*record["per_class_iou"], "overall accuracy"])
    lines = [f"{'class':{width}}  {'IoU':>6}  {'acc.':>6}"]
    for name, iou in record["per_class_iou"].items():
        lines.append(f"{name:{width}}  {percent(iou)}  {percent(record['per_class_accuracy'][name])}")
    lines.append(f"{'mean':{width}}  {percent(record['mean_iou'])}  {percent(record['mean_accuracy'])}")
    lines.append(f"{'overall accuracy':{width}}  {'':6}  {percent(record['overall_accuracy'])}")
    return "\n".join(lines)


def pipe_table(header: Sequence[str], rows: Sequence[Sequence[Any]], numeric_from: int = 1) -> list[str]:
    """A table of Markdown, with columns from `numeric_from` on aligned to the right."""
    rule = ["---" if index < numeric_from else "---:" for index in range(len(header))]
    return [f"| {' | '.join(map(text_of, row))} |" for row in (header, rule, *rows)]


def text_of(value: Any) -> str:
    """Text as it is, without what would end a cell of a table or a line; anything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")
