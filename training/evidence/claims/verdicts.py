"""The hypotheses of a plan, tested on what `output` holds: everything that table, figure and verdicts show, as JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...evaluation import environment
from .noise import load_noise
from .plan import Plan
from .runs import best_rate
from .statistics import Difference, accuracy_difference, holm, retention_difference

SEGMENTER, LINEAR = "mask_transformer", "linear"
PRIMARY, SECONDARY = ("sa",), ("ca", "cbsa")
# Hypothesis, the decoder compared with, what is compared, and the margin of the plan that the difference may miss.
ACCURACY = (("H1", SEGMENTER, True), ("H4", LINEAR, False))
ROBUSTNESS = (("H3a", "relative"), ("H3b", "absolute"))


@dataclass(frozen=True)
class Hypothesis:
    """One hypothesis on one data set.

    Args:
        hypothesis: "H1", "H3a", "H3b" or "H4".
        dataset: Name of the data set in the plan.
        decoder, against: What is compared.
        quantity: "test mIoU", or "retained mIoU, relative noise" or "... absolute noise".
        bound: The hypothesis is that the difference is greater.
        matters: The smallest difference that matters.
        difference: What was found.
    """

    hypothesis: str
    dataset: str
    decoder: str
    against: str
    quantity: str
    bound: float
    matters: float
    difference: Difference


def build_claims(plan: Plan, output: Path) -> dict[str, Any]:
    """Gather runs, costs and noise of a whole plan, and judge its hypotheses.

    Args:
        output: Folder of `run_grid`, with `costs.json`.

    Returns:
        `settings`, `costs`, and `datasets`: by name and decoder the rates and trials, and mean and deviation over seeds
        of the scores; `tests` with differences, intervals, p-values and verdicts, and `parameters` (H2); `pending`,
        what the plan asks for and `output` does not hold.

    Raises:
        ValueError: If runs come from another plan.
    """
    runs = {name: load_dataset_runs(plan, output / name) for name in plan.datasets}
    noise = {name: load_noise(plan, output / name) for name in plan.datasets}
    judged = judged_decoders(plan, [run for _, missing in (*runs.values(), *noise.values()) for run in missing])
    tests, pending = [], []
    for name in plan.datasets:
        pending += [f"{name}: {run}" for run in runs[name][1]] + [f"{name}: noise on {run}" for run in noise[name][1]]
        tests += accuracy_tests(plan, name, output / name, judged)
        tests += robustness_tests(plan, name, noise[name][0], judged)
    costs_path = output / "costs.json"
    costs = json.loads(costs_path.read_text(encoding="utf-8")) if costs_path.is_file() else None
    if costs is None:
        pending.append("costs")
    return {
        "plan": plan.digest,
        "settings": asdict(plan),
        "costs": costs,
        "datasets": {
            name: {decoder: summarize(plan, decoder, own) for decoder, own in found.items() if own}
            for name, (found, _) in runs.items()
        },
        "parameters": [] if costs is None else judge_parameters(costs),
        "tests": judge(plan, tests),
        "pending": pending,
        "environment": environment(),
    }


def judged_decoders(plan: Plan, missing: Sequence[str]) -> list[str]:
    """Name DEPICT's decoders of the families that can be judged: nothing that a test of the family needs is missing.

    Part of a family would be corrected for fewer tests than the plan has.

    Args:
        missing: Names of runs that any data set lacks, or lacks the noise on.
    """
    unfinished = {each for each in plan.learning_rates if any(run.startswith(f"{each}_") for run in missing)}
    families = [[each for each in family if each in plan.learning_rates] for family in (PRIMARY, SECONDARY)]
    return [each for own in families if not unfinished & {*own, SEGMENTER, LINEAR} for each in own]


def load_dataset_runs(plan: Plan, folder: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Return the records of one data set by decoder, and the names of planned runs that are not there.

    Raises:
        ValueError: If the folder holds runs of another plan.
    """
    noted = folder / "plan.json"
    if noted.is_file() and json.loads(noted.read_text(encoding="utf-8"))["digest"] != plan.digest:
        raise ValueError(f"{folder} holds runs of another plan; give the plan that they were made by.")
    runs: dict[str, list[dict]] = {}
    missing = []
    for decoder, rates in plan.learning_rates.items():
        names = [f"{decoder}_trial_{rate:g}" for rate in rates] + [f"{decoder}_seed{seed}" for seed in plan.seeds]
        paths = {name: folder / "runs" / f"{name}.json" for name in names}
        missing += [name for name, path in paths.items() if not path.is_file()]
        runs[decoder] = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.is_file()]
    return runs, missing


def summarize(plan: Plan, decoder: str, runs: Sequence[dict]) -> dict[str, Any]:
    """Return rate, trials, scores by seed with mean and deviation, losses, and the fastest seed's seconds."""
    trials = {run["learning_rate"]: run["validation"]["mean_iou"] for run in runs if run["trial"]}
    seeds = {run["seed"]: run for run in runs if not run["trial"]}
    best = best_rate(trials) if trials else None
    losses = [run["losses"] for run in seeds.values()]
    scores = {
        f"{split}_{kind}": spread([run[split][kind] for run in seeds.values()])
        for split in ("validation", "test")
        for kind in ("mean_iou", "boundary_iou")
    }
    return {
        "learning_rate": best,
        "at_edge": best in (min(plan.learning_rates[decoder]), max(plan.learning_rates[decoder])),
        "trials": {f"{rate:g}": score for rate, score in sorted(trials.items())},
        "seeds": sorted(seeds),
        **scores,
        "test_by_seed": {str(seed): run["test"]["mean_iou"] for seed, run in sorted(seeds.items())},
        # Other work on the machine, and pauses, only ever add to it.
        "training_seconds": min((run["seconds"]["training"] for run in seeds.values()), default=None),
        "losses": [round(statistics.fmean(each), 5) for each in zip(*losses, strict=True)],
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and sample standard deviation, None where there are too few values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def accuracy_tests(plan: Plan, dataset: str, folder: Path, judged: Sequence[str]) -> list[Hypothesis]:
    """Compare the decoders judged with Segmenter and a linear layer by test mIoU, as far as the plan has these."""
    counts = {
        decoder: np.stack(
            [np.load(folder / "runs" / f"{decoder}_seed{seed}.npz")["test_confusion"] for seed in plan.seeds]
        )
        for decoder in (*judged, *(each for each in (SEGMENTER, LINEAR) if judged and each in plan.learning_rates))
    }
    margin = plan.margins["accuracy"]
    return [
        Hypothesis(
            hypothesis,
            dataset,
            decoder,
            against,
            "test mIoU",
            -margin if not_worse else 0.0,
            margin,
            accuracy_difference(counts[decoder], counts[against], plan.resamples),
        )
        for decoder in judged
        for hypothesis, against, not_worse in ACCURACY
        if against in counts
    ]


def robustness_tests(plan: Plan, dataset: str, noise: Mapping[str, dict], judged: Sequence[str]) -> list[Hypothesis]:
    """Compare the decoders judged with Segmenter by what noise, as of `load_noise`, leaves of their mIoU."""
    return [
        Hypothesis(
            hypothesis,
            dataset,
            decoder,
            SEGMENTER,
            f"retained mIoU, {kind} noise",
            0.0,
            plan.margins["robustness"],
            retention_difference(
                retained(plan, noise[decoder], kind),
                retained(plan, noise[SEGMENTER], kind),
                plan.resamples,
            ),
        )
        for decoder in judged
        for hypothesis, kind in ROBUSTNESS
        if SEGMENTER in noise
    ]


def retained(plan: Plan, by_seed: dict, kind: str) -> np.ndarray:
    """Return `(seeds, draws)`: mIoU with noise as a share of that without, averaged over the plan's levels."""
    shares = []
    for seed in plan.seeds:
        record = by_seed[str(seed)]
        levels = [record[kind][f"{level:g}"] for level in getattr(plan.noise, kind)]
        shares.append(np.mean(levels, axis=0) / record["clean"])
    return np.stack(shares)


def judge(plan: Plan, tests: Sequence[Hypothesis]) -> list[dict]:
    """Correct p-values within each family, and say of every hypothesis whether it is supported."""
    records = []
    for family, decoders in (("primary", PRIMARY), ("secondary", SECONDARY)):
        own = [test for test in tests if test.decoder in decoders]
        if not own:
            continue
        opposite = holm([test.difference.p_not_above(test.bound) for test in own])
        itself = holm([test.difference.p_not_below(test.bound) for test in own])
        for test, p_opposite, p_itself in zip(own, opposite, itself, strict=True):
            verdict = "supported" if p_opposite < plan.level else "contradicted" if p_itself < plan.level else "open"
            records.append(
                {
                    "family": family,
                    **{name: getattr(test, name) for name in Hypothesis.__dataclass_fields__ if name != "difference"},
                    "difference": test.difference.value,
                    "by_seed": list(test.difference.by_seed),
                    "interval": list(test.difference.interval()),
                    "p_opposite": p_opposite,
                    "p_itself": p_itself,
                    "verdict": verdict,
                }
            )
    return records


def judge_parameters(costs: dict) -> list[dict]:
    """Judge H2: whether each decoder of DEPICT has less than a tenth of Segmenter's parameters, on every data set."""
    judged = []
    for dataset, decoders in costs["datasets"].items():
        for decoder in (*PRIMARY, *SECONDARY):
            if decoder in decoders and SEGMENTER in decoders:
                ratio = decoders[decoder]["parameters"] / decoders[SEGMENTER]["parameters"]
                verdict = "supported" if ratio < 0.1 else "contradicted"
                judged.append({"dataset": dataset, "decoder": decoder, "ratio": ratio, "verdict": verdict})
    return judged
