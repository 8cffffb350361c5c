"""What the runs of `training.compare` say: statistics, paired differences, the claim; as JSON, table and plot."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..evaluation import write_figure

BASELINE = "mask_transformer"
DEPICT = ("sa", "ca")
CLAIM = "DEPICT is at least as accurate as Segmenter with under a tenth of its decoder parameters"
# Settings in which the runs of one comparison may differ.
VARYING = ("decoder_type", "learning_rate", "seed")


def load_runs(folder: Path) -> list[dict]:
    """Return the records of all finished runs, by file name; `trial` tells the ones that chose a learning rate.

    Raises:
        FileNotFoundError: If there are none.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no finished runs; run the comparison without --report-only first.")
    return [{"name": path.stem, "trial": "_trial_" in path.stem} | json.loads(path.read_text()) for path in paths]


def build_report(runs: Sequence[dict], costs: dict) -> dict:
    """Gather everything that table and plot show.

    Args:
        runs: As `load_runs` gives them.
        costs: As `training.compare.measure_costs` gives them.

    Returns:
        `settings` common to all runs, `costs`, per decoder a summary in `decoders`, `differences`, `claims`, `runs`.

    Raises:
        ValueError: If runs differ in more than decoder, learning rate and seed, or a decoder's cost was not measured.
    """
    shared = [{key: value for key, value in run["settings"].items() if key not in VARYING} for run in runs]
    for run, settings in zip(runs, shared, strict=True):
        if settings != shared[0]:
            raise ValueError(
                f"Runs {runs[0]['name']} and {run['name']} have other settings; compare runs of one budget only."
            )
    names = sorted({run["settings"]["decoder_type"] for run in runs if not run["trial"]})
    missing = [name for name in names if name not in costs["decoders"]]
    if missing:
        raise ValueError(f"The costs of {', '.join(missing)} were not measured; run the comparison's command again.")
    decoders = {name: summarize_decoder(name, runs) | costs["decoders"][name] for name in names}
    scores = {name: scores_by_seed(name, runs) for name in names}
    differences = [
        {"first": first, "second": second} | paired_difference(scores[first], scores[second])
        for first, second in compared_pairs(names)
    ]
    return {
        "settings": shared[0],
        "costs_measured_on": {key: value for key, value in costs.items() if key != "decoders"},
        "decoders": decoders,
        "differences": differences,
        "claims": [judge_claim(each, decoders) for each in differences if is_claim(each)],
        "runs": list(runs),
    }


def summarize_decoder(name: str, runs: Sequence[dict]) -> dict:
    """Return the learning rate and its trials, and validation and test mIoU over the seeds of one decoder."""
    own = [run for run in runs if run["settings"]["decoder_type"] == name]
    trials = {f"{run['settings']['learning_rate']:g}": run["validation"]["mean_iou"] for run in own if run["trial"]}
    seeds = [run for run in own if not run["trial"]]
    rates = sorted({run["settings"]["learning_rate"] for run in seeds})
    per_class = {label: [run["test"]["per_class_iou"][label] for run in seeds] for label in class_labels(seeds)}
    return {
        "learning_rates": rates,
        "trials": trials,
        "seeds": sorted(run["settings"]["seed"] for run in seeds),
        "validation": mean_and_deviation([run["validation"]["mean_iou"] for run in seeds]),
        "test": mean_and_deviation([run["test"]["mean_iou"] for run in seeds]),
        "test_per_class": {
            label: None if None in values else statistics.fmean(values) for label, values in per_class.items()
        },
        "seconds_per_run": statistics.fmean(run["seconds"]["training"] for run in seeds),
    }


def class_labels(runs: Sequence[dict]) -> list[str]:
    return list(runs[0]["test"]["per_class_iou"])


def scores_by_seed(name: str, runs: Sequence[dict]) -> dict[int, float]:
    """Return the test mIoU by seed."""
    return {
        run["settings"]["seed"]: run["test"]["mean_iou"]
        for run in runs
        if not run["trial"] and run["settings"]["decoder_type"] == name
    }


def mean_and_deviation(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and sample standard deviation; None where one value has none."""
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None}


def paired_difference(first: dict[int, float], second: dict[int, float]) -> dict:
    """Subtract `second` from `first` by common seeds: each, their mean, and its 95 % interval by Student's t.

    The interval is None below two common seeds, and a single point where all differences are the same.
    """
    seeds = sorted(first.keys() & second.keys())
    values = [first[seed] - second[seed] for seed in seeds]
    mean, interval = statistics.fmean(values) if values else None, None
    if len(values) > 1:
        half = t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        interval = [mean - half, mean + half]
    return {"by_seed": dict(zip(map(str, seeds), values, strict=True)), "mean": mean, "interval": interval}


def t_quantile(freedom: float, confidence: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t: between minus this and this lies `confidence` of the distribution.

    Args:
        freedom: Degrees of freedom, at least 1.
        confidence: A fraction.

    Raises:
        ImportError: If scipy is missing.
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("Intervals need scipy; install the extra: pip install 'depict-hf[train]'.") from error
    return float(t.ppf((1 + confidence) / 2, freedom))


def compared_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pair "sa" with every other decoder, and the other DEPICT decoder with Segmenter's."""
    pairs = [("sa", name) for name in names if name != "sa"] if "sa" in names else []
    return pairs + [("ca", BASELINE)] * ("ca" in names and BASELINE in names)


def is_claim(difference: dict) -> bool:
    return difference["first"] in DEPICT and difference["second"] == BASELINE


def judge_claim(difference: dict, decoders: dict) -> dict:
    """Judge the claim for one DEPICT decoder.

    Returns:
        `decoder`; `parameter_ratio` to Segmenter's; `smaller`, whether that is under a tenth; `accuracy`: "supported"
        where the whole interval of the difference is at least zero, "contradicted" where it is below zero, else
        "open".
    """
    interval = difference["interval"]
    ratio = decoders[difference["first"]]["parameters"] / decoders[BASELINE]["parameters"]
    if interval is None or interval[0] < 0 <= interval[1]:
        accuracy = "open"
    else:
        accuracy = "supported" if interval[0] >= 0 else "contradicted"
    return {"decoder": difference["first"], "parameter_ratio": ratio, "smaller": ratio < 0.1, "accuracy": accuracy}


def render_markdown(report: dict) -> str:
    """Write the report's tables and what they say of the claim; IoU in percent."""
    settings, measured = report["settings"], report["costs_measured_on"]
    grid = "x".join(map(str, measured["grid_size"]))
    most = max(len(decoder["seeds"]) for decoder in report["decoders"].values())
    lines = [
        "# Decoders compared on one frozen encoder",
        "",
        f"{settings['steps']} optimiser steps of {settings['batch_size']} crops of {settings['crop_size']} pixels, "
        f"images at {settings['size']} pixels, up to {most} seeds; learning rate by validation mIoU with one trial per "
        f"rate, on a seed of its own. Test: single scale, photographs' own size, mIoU in percent, mean and standard "
        f"deviation over seeds. FLOPs (two per multiply-add of matrix products) and milliseconds: the decoder on a "
        f"grid of {grid} patches, float32, {measured['threads']} CPU thread(s).",
        "",
        "| decoder | parameters | GFLOPs | ms | learning rate | trials (rate: validation) | seeds | val | test |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|",
        *(decoder_row(name, decoder) for name, decoder in report["decoders"].items()),
        "",
        "| test mIoU | difference | 95 % interval | by seed |",
        "|---|---:|---:|---|",
        *map(difference_row, report["differences"]),
        "",
        "Differences are paired by seed, which sets initial weights, order and crops; intervals (Student's t) cover "
        "seeds only, not other data, encoders or budgets.",
        "",
        f"The claim: {CLAIM}.",
        "",
        *(f"- {claim_sentence(claim)}" for claim in report["claims"]),
        *([] if report["claims"] else [f"- Not tested: it needs a DEPICT decoder and {BASELINE}."]),
        "",
        f"| test IoU | {' | '.join(report['decoders'])} |",
        "|---|" + "---:|" * len(report["decoders"]),
        *class_rows(report["decoders"]),
    ]
    return "\n".join(lines) + "\n"


def decoder_row(name: str, decoder: dict) -> str:
    trials = ", ".join(f"{rate}: {percent(score)}" for rate, score in by_rate(decoder["trials"]))
    rates = ", ".join(f"{rate:g}" for rate in decoder["learning_rates"])
    if at_edge(decoder):
        rates += " (edge of the grid)"
    cells = (
        name,
        f"{decoder['parameters']:,}",
        f"{decoder['flops'] / 1e9:.2f}",
        f"{decoder['milliseconds']:.1f}",
        rates,
        trials or "-",
        len(decoder["seeds"]),
        with_deviation(decoder["validation"]),
        with_deviation(decoder["test"]),
    )
    return f"| {' | '.join(map(str, cells))} |"


def by_rate(trials: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(trials.items(), key=lambda trial: float(trial[0]))


def at_edge(decoder: dict) -> bool:
    """Whether a better rate may lie beyond the grid."""
    rates = [rate for rate, _ in by_rate(decoder["trials"])]
    return bool(rates) and any(f"{rate:g}" in (rates[0], rates[-1]) for rate in decoder["learning_rates"])


def difference_row(difference: dict) -> str:
    interval = difference["interval"]
    cells = (
        f"{difference['first']} - {difference['second']}",
        "-" if difference["mean"] is None else f"{100 * difference['mean']:+.2f}",
        "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}",
        ", ".join(f"{100 * value:+.2f}" for value in difference["by_seed"].values()) or "-",
    )
    return f"| {' | '.join(cells)} |"


def claim_sentence(claim: dict) -> str:
    size = "" if claim["smaller"] else "not "
    accuracy = {
        "supported": "is supported: the whole interval of the difference is at least zero",
        "contradicted": "is contradicted: the whole interval of the difference is below zero",
        "open": "is neither supported nor contradicted: the interval of the difference includes zero, or is missing",
    }[claim["accuracy"]]
    return (
        f'{claim["decoder"]}: "at least as accurate" {accuracy}. It has {100 * claim["parameter_ratio"]:.1f} % of '
        f"Segmenter's decoder parameters, {size}under a tenth."
    )


def class_rows(decoders: dict) -> list[str]:
    labels = next(iter(decoders.values()))["test_per_class"]
    return [
        f"| {label} | {' | '.join(percent(decoder['test_per_class'][label]) for decoder in decoders.values())} |"
        for label in labels
    ]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def with_deviation(summary: dict) -> str:
    deviation = summary["deviation"]
    return percent(summary["mean"]) + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def plot_report(report: dict, path: Path) -> None:
    """Plot test mIoU against decoder parameters, and the training loss, as one picture file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib; install the extra: pip install 'depict-hf[plots]'.") from error

    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, learning = figure.subplots(1, 2)
    for index, (name, decoder) in enumerate(report["decoders"].items()):
        seeds = [run for run in report["runs"] if not run["trial"] and run["settings"]["decoder_type"] == name]
        scores = [100 * run["test"]["mean_iou"] for run in seeds]
        test = decoder["test"]
        accuracy.plot([decoder["parameters"]] * len(scores), scores, ".", color=f"C{index}", alpha=0.4)
        accuracy.errorbar(
            decoder["parameters"],
            100 * test["mean"],
            yerr=100 * (test["deviation"] or 0),
            fmt="o",
            capsize=4,
            color=f"C{index}",
            label=name,
        )
        losses = [statistics.fmean(values) for values in zip(*(run["losses"] for run in seeds), strict=True)]
        steps, means = block_means(losses)
        learning.plot(steps, means, color=f"C{index}", label=name)
    accuracy.set(xscale="log", xlabel="decoder parameters", ylabel="test mIoU (%)")
    accuracy.set_title("Mean and standard deviation over seeds, and each seed", fontsize="medium")
    learning.set(yscale="log", xlabel="optimiser steps", ylabel="training loss")
    learning.set_title("Mean over seeds", fontsize="medium")
    for axes in (accuracy, learning):
        axes.grid(alpha=0.3)
        axes.legend()
    write_figure(figure, path, dpi=120)


def block_means(losses: Sequence[float], blocks: int = 40) -> tuple[list[int], list[float]]:
    """Return the last step and mean of each of at most `blocks` parts of about equal length."""
    length = -(-len(losses) // blocks)
    starts = range(0, len(losses), length)
    return (
        [min(start + length, len(losses)) for start in starts],
        [statistics.fmean(losses[start : start + length]) for start in starts],
    )
