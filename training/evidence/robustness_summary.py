"""What a record of perturbed models says: means with intervals, differences to the black box, a verdict."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from .comparison_report import BASELINE
from .intervals import crossed_mean, first_crossing, paired_difference, side_of_zero
from .noise import TARGETS

WHITE_BOXES = ("sa", "ca", "cbsa")
NAMES = {
    "attention-noise": "noise on the attention matrices",
    "class-token-noise": "noise on the class tokens",
    "feature-noise": "noise on the encoder's features",
    "corruptions": "corruptions",
    "views": "other scales, crops and brightness",
}
RULE = (
    "Rule: at each noise level above 0, the share of its own clean mIoU that a white box keeps minus the share that "
    "the black box keeps, paired by training seed and draw. A white box is more robust if the 95 % interval of this "
    "difference is wholly above zero at one level at least and wholly below at none, less robust if it is the other "
    "way round, mixed if it is both, and undecided if it is neither."
)


def summarize_sections(record: Mapping) -> dict:
    """Return, per section of a record, what tables and figures show.

    Args:
        record: `groups`, by name their `decoder_type` and `models`; `sections`, as `measure_section` makes them.

    Returns:
        Per section: for noise, by scale and group, `clean`, `curve` (per level `sigma`, `score` and `retained`, the
        share of the clean score), `removed`, with all attention matrices at zero, `half_sigma`, where the mean curve
        falls below half of the clean score, and `mean_retained` over the levels; and by scale `differences` to the
        black box, by white box. For corruptions and views, by group, `clean`, `scores` by kind, `mean`, over the
        kinds, and `retained`, that as a share of the clean score. Means are those of `crossed_mean`. A group without a
        figure has `left_out`.
    """
    return {
        name: _noise(record, section) if name in TARGETS else _kinds(record, section)
        for name, section in record["sections"].items()
    }


def _members(record: Mapping, section: Mapping) -> dict[str, list[dict]]:
    return {name: [section["models"][model] for model in group["models"]] for name, group in record["groups"].items()}


def _noise(record: Mapping, section: Mapping) -> dict:
    summary: dict[str, dict] = {}
    members = _members(record, section)
    reference = black_box(record)
    for scale, sigmas in section["sigmas"].items():
        groups: dict[str, dict] = {}
        retained: dict[str, list[list[list[float]]]] = {}
        for name, models in members.items():
            reasons = [model["left_out"] for model in models if "left_out" in model]
            if not reasons and min(model["clean"] for model in models) == 0:
                reasons = ["Its clean mIoU is 0, of which no share can be kept."]
            if reasons:
                groups[name] = {"left_out": reasons[0]}
                continue
            clean = crossed_mean([[model["clean"]] for model in models])
            retained[name] = []
            curve = []
            for index, sigma in enumerate(sigmas):
                scores = [model["scores"][scale][index] for model in models]
                shares = [
                    [score / model["clean"] for score in each] for each, model in zip(scores, models, strict=True)
                ]
                retained[name].append(shares)
                curve.append({"sigma": sigma, "score": crossed_mean(scores), "retained": crossed_mean(shares)})
            means = [point["score"]["mean"] for point in curve]
            groups[name] = {
                "clean": clean,
                "curve": curve,
                **(
                    {"removed": crossed_mean([[model["removed"]] for model in models])}
                    if all("removed" in model for model in models)
                    else {}
                ),
                "half_sigma": first_crossing(sigmas, means, clean["mean"], clean["mean"] / 2),
                "mean_retained": fmean(point["retained"]["mean"] for point in curve),
            }
        differences = {
            name: [
                {"sigma": sigma} | paired_difference(own, other)
                for sigma, own, other in zip(sigmas, retained[name], retained[reference], strict=True)
            ]
            for name in retained
            if reference in retained and record["groups"][name]["decoder_type"] in WHITE_BOXES
        }
        summary[scale] = {"groups": groups, "differences": differences}
    return summary


def _kinds(record: Mapping, section: Mapping) -> dict:
    groups: dict[str, dict] = {}
    for name, models in _members(record, section).items():
        by_kind = [_by_kind(model["scores"]) for model in models]
        means = [fmean(kinds.values()) for kinds in by_kind]
        cleans = [model["clean"] for model in models]
        groups[name] = {
            "clean": crossed_mean([[clean] for clean in cleans]),
            "scores": {kind: crossed_mean([[kinds[kind]] for kinds in by_kind]) for kind in by_kind[0]},
            "mean": crossed_mean([[mean] for mean in means]),
            "retained": crossed_mean([[mean / clean] for mean, clean in zip(means, cleans, strict=True)])
            if min(cleans) > 0
            else {"mean": None, "interval": None},
        }
    return {"groups": groups}


def _by_kind(scores: Mapping[str, float]) -> dict[str, float]:
    """Average the severities of each kind: "fog:1" and "fog:3" are both fog."""
    kinds: dict[str, list[float]] = {}
    for name, score in scores.items():
        kinds.setdefault(name.partition(":")[0], []).append(score)
    return {kind: fmean(values) for kind, values in kinds.items()}


def black_box(record: Mapping) -> str | None:
    """Return the name of the first group of Segmenter's mask transformers, if there is one."""
    names = [name for name, group in record["groups"].items() if group["decoder_type"] == BASELINE]
    return names[0] if names else None


def judge(differences: Sequence[Mapping]) -> str:
    """Apply `RULE` to the differences of one white box at all levels."""
    sides = {side_of_zero(each["interval"]) for each in differences if each["sigma"] > 0}
    if {1, -1} <= sides:
        return "mixed"
    return "more robust" if 1 in sides else "less robust" if -1 in sides else "undecided"


def verdict(record: Mapping) -> str:
    """Say in two sentences what the record shows: on the paper's claim, and on everything else."""
    summary = summarize_sections(record)
    return f"{_on_the_claim(record, summary)} {_on_the_rest(summary)}"


def _on_the_claim(record: Mapping, summary: Mapping) -> str:
    reference = black_box(record)
    if "attention-noise" not in summary:
        return "Noise on the attention matrices, which the paper's claim is about, was not measured."
    scales = summary["attention-noise"]
    if reference is None or not any(each["differences"] for each in scales.values()):
        return "The paper's claim was not tested, as it needs a white box and a black box with attention."
    clauses = []
    for scale, each in scales.items():
        outcomes: dict[str, list[str]] = {}
        for name, differences in each["differences"].items():
            outcomes.setdefault(judge(differences), []).append(name)
        found = "; ".join(f"{outcome}: {', '.join(names)}" for outcome, names in outcomes.items())
        noise = "absolute noise" if scale == "absolute" else "noise relative to each matrix's norm"
        clauses.append(f"under {noise} ({found})")
    left = [
        f"{name} {100 * each['removed']['mean'] / each['clean']['mean']:.0f} %"
        for name, each in next(iter(scales.values()))["groups"].items()
        if "removed" in each
    ]
    without = f"; with all of them at zero, these shares of the clean mIoU are left: {', '.join(left)}" if left else ""
    return f"Noise on the attention matrices, white boxes against {reference}: {' and '.join(clauses)}{without}."


def _on_the_rest(summary: Mapping) -> str:
    parts = []
    for name, section in summary.items():
        if name == "attention-noise":
            continue
        shown = section.get("relative", section)["groups"]
        shares = {
            group: each["mean_retained"] if name in TARGETS else each["retained"]["mean"]
            for group, each in shown.items()
            if "left_out" not in each
        }
        known = {group: share for group, share in shares.items() if share is not None}
        if known:
            best, worst = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
            label = f"relative {NAMES[name]}" if name in TARGETS else NAMES[name]
            ends = f"{best} {100 * known[best]:.1f} %" + (
                f", least {worst} {100 * known[worst]:.1f} %" if len(known) > 1 else ""
            )
            parts.append(f"{label} (most {ends})")
    if not parts:
        return "Nothing else was measured."
    return f"Mean share of the clean mIoU kept under {'; '.join(parts)}."
