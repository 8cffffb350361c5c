"""Models side by side under corruptions: every model on the clean split and on the same corrupted photographs."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from accelerate import PartialState

from ..evaluation import (
    Corruption,
    Observer,
    class_names,
    evaluate_under,
    load_samples,
    load_with_overrides,
    percent,
    settings,
)

NAME_LENGTH = 20


def compare_models(arguments: argparse.Namespace, corruptions: Sequence[Corruption], state: PartialState) -> dict:
    """Evaluate the models of the command line, one after the other.

    Returns:
        `dataset`, `split`, `num_images`, and `models`: by name the record of `evaluate` without corruption, with
        `corruptions` (of `under_corruption`) and `summary` (of `summarize`).

    Raises:
        OSError: If a model or the data cannot be had.
        ValueError: If arguments do not fit the data, or models have different classes or one name.
    """
    if len(set(arguments.models)) < len(arguments.models):
        raise ValueError(f"Got the models {', '.join(arguments.models)}, needed each only once.")
    protocol, execution = settings(arguments, state)
    names, records = None, {}
    for name in arguments.models:
        model, image_processor = load_with_overrides(arguments, name, state)
        own_names = class_names(model.config)
        if names not in (None, own_names):
            raise ValueError(f"{name} and {arguments.models[0]} have different classes, needed the same.")
        names = own_names
        samples = load_samples(arguments, names, bool(image_processor.do_reduce_labels), state)

        def announce(corruption: Corruption | None, name: str = name) -> Sequence[Observer]:
            if corruption is not None and state.is_main_process:
                print(f"{name}: {corruption}", file=sys.stderr, flush=True)
            return ()

        record = evaluate_under(corruptions, model, image_processor, samples, protocol, execution, announce)
        records[name] = record | {"summary": summarize(record, record["corruptions"])}
    return {
        "dataset": arguments.dataset,
        "split": arguments.split,
        "num_images": record["num_images"],
        "models": records,
    }


def summarize(clean: dict, corruptions: Sequence[dict]) -> dict:
    """Return the means of the mean IoU of one model.

    Args:
        clean: Its record without corruption.
        corruptions: Its results of `under_corruption`.

    Returns:
        `per_corruption`, each the mean over its severities; `mean_corrupted`, the mean of these; `retention`, that as a
        fraction of the clean one. None where nothing is labelled, and for the retention where the clean one is 0.
    """
    names = dict.fromkeys(each["corruption"] for each in corruptions)
    per_corruption = {
        name: _mean([each["mean_iou"] for each in corruptions if each["corruption"] == name]) for name in names
    }
    mean_corrupted = _mean(list(per_corruption.values()))
    retention = mean_corrupted / clean["mean_iou"] if clean["mean_iou"] and mean_corrupted is not None else None
    return {"per_corruption": per_corruption, "mean_corrupted": mean_corrupted, "retention": retention}


def render_comparison(record: dict) -> str:
    """Lay the mean IoU of compared models side by side, in percent, corruptions by the mean over severities."""
    models = list(record["models"].values())
    severities = sorted({each["severity"] for each in models[0]["corruptions"]})
    headings = _short_names(list(record["models"]))
    width = max(len(name) for name in [*models[0]["summary"]["per_corruption"], "mean corrupted"])
    rows = [("clean", [each["mean_iou"] for each in models])]
    for name in models[0]["summary"]["per_corruption"]:
        rows.append((name, [each["summary"]["per_corruption"][name] for each in models]))
    rows.append(("mean corrupted", [each["summary"]["mean_corrupted"] for each in models]))
    rows.append(("retained", [each["summary"]["retention"] for each in models]))
    columns = [max(6, len(heading)) for heading in headings]
    lines = [
        f"mean IoU in percent, {record['num_images']} images, severities {', '.join(map(str, severities))}",
        "  ".join([f"{'':{width}}", *(f"{each:>{size}}" for each, size in zip(headings, columns, strict=True))]),
    ]
    for name, values in rows:
        cells = (f"{percent(value):>{size}}" for value, size in zip(values, columns, strict=True))
        lines.append("  ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


def _short_names(models: list[str]) -> list[str]:
    """Name models by the last parts of their names where these differ, else by the ends of the names."""
    last = [Path(name).name for name in models]
    chosen = last if len(set(last)) == len(last) else models
    return [name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :] for name in chosen]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None
