"""What came of a plan, as Markdown and as a picture, from the JSON of `verdicts.build_claims` alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..comparison_report import block_means

TITLE = "# The paper's claim, tested in the paper's regime: what came out"
SENTENCES = {
    "H1": "`{decoder}` is not less accurate than Segmenter by {matters} or more",
    "H3a": "`{decoder}` keeps more of its mIoU than Segmenter under noise relative to each matrix",
    "H3b": "`{decoder}` keeps more of its mIoU than Segmenter under absolute noise",
    "H4": "`{decoder}` is more accurate than a linear layer",
}


def render_claims(claims: dict) -> str:
    """Write tables and verdicts; shares in percent."""
    lines = [
        TITLE,
        "",
        "The hypotheses, data and tests are those of [PLAN.md](PLAN.md), which was committed before; the figures are "
        "those of `claims.json`, made by",
        "",
        "```sh",
        "python -m training.claims model_cards/claims/PLAN.md OUTPUT camvid=CAMVID labelmefacade=LABELMEFACADE",
        "```",
        "",
    ]
    if claims["pending"]:
        lines += [f"Not finished: {len(claims['pending'])} of the planned parts are missing.", ""]
    lines += ["## Verdicts", "", *verdict_lines(claims), ""]
    if claims["tests"]:
        lines += ["## Differences", "", *difference_table(claims["tests"]), ""]
    for name, decoders in claims["datasets"].items():
        if any(each["seeds"] for each in decoders.values()):
            lines += [f"## {name}", "", *decoder_table(name, decoders, claims), ""]
    if claims["costs"] is not None:
        lines += ["![Accuracy against parameters, and loss](claims.png)", ""]
    if not claims["pending"]:
        lines += ["Why it came out so was looked at afterwards: [EXPLORATION.md](EXPLORATION.md).", ""]
    return "\n".join(lines)


def verdict_lines(claims: dict) -> list[str]:
    """Write one line per hypothesis and data set, whatever its verdict."""
    lines = [
        f"- {each['dataset']}, H2 (`{each['decoder']}`): **{each['verdict']}**. The decoder has "
        f"{100 * each['ratio']:.1f} % of Segmenter's parameters."
        for each in claims["parameters"]
    ]
    for test in claims["tests"]:
        sentence = SENTENCES[test["hypothesis"]].format(decoder=test["decoder"], matters=points(test["matters"]))
        lines.append(
            f"- {test['dataset']}, {test['hypothesis']} ({test['family']}): **{test['verdict']}**. "
            f"Claimed: {sentence}. Found: {signed(test['difference'])} points, 95 % interval "
            f"{signed(test['interval'][0])} to {signed(test['interval'][1])}{size_remark(test)}."
        )
    return lines or ["No hypothesis can be judged yet."]


def size_remark(test: dict) -> str:
    """Say where a difference, whichever way it goes, is smaller than what matters."""
    if abs(test["difference"]) >= test["matters"]:
        return ""
    return f"; that is less than the {points(test['matters'])} needed to matter"


def difference_table(tests: Sequence[dict]) -> list[str]:
    """Lay out all tests with their p-values after correction."""
    rows = [
        "| data | | difference of the | points | 95 % interval | by seed | p (opposite) | p (itself) | verdict |",
        "|---|---|---|---:|---|---|---:|---:|---|",
    ]
    for test in tests:
        cells = (
            test["dataset"],
            test["hypothesis"],
            f"{test['quantity']}, {test['decoder']} - {test['against']}",
            signed(test["difference"]),
            f"{signed(test['interval'][0])} to {signed(test['interval'][1])}",
            ", ".join(map(signed, test["by_seed"])),
            f"{test['p_opposite']:.4f}",
            f"{test['p_itself']:.4f}",
            test["verdict"],
        )
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, "", "p-values are one-sided and corrected by Holm's method within their family."]


def decoder_table(dataset: str, decoders: dict, claims: dict) -> list[str]:
    """Lay out scores and costs of the decoders on one data set."""
    costs = {} if claims["costs"] is None else claims["costs"]["datasets"][dataset]
    rows = [
        "| decoder | parameters | GFLOPs | ms alone | ms whole | rate | trials (rate: validation) | validation | "
        "test | test boundary IoU | training, s |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, each in decoders.items():
        cost = costs.get(name)
        measured = (
            ["-"] * 4
            if cost is None
            else [
                f"{cost['parameters']:,}",
                f"{cost['flops'] / 1e9:.2f}",
                f"{cost['decoder_milliseconds']:.0f}",
                f"{cost['milliseconds']:.0f}",
            ]
        )
        rate = "-" if each["learning_rate"] is None else f"{each['learning_rate']:g}"
        cells = (
            name,
            *measured,
            f"{rate} (edge)" if each["at_edge"] else rate,
            ", ".join(f"{rate}: {100 * score:.2f}" for rate, score in each["trials"].items()) or "-",
            with_deviation(each["validation_mean_iou"]),
            with_deviation(each["test_mean_iou"]),
            with_deviation(each["test_boundary_iou"]),
            "-" if each["training_seconds"] is None else f"{each['training_seconds']:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    seeds = max(len(each["seeds"]) for each in decoders.values())
    note = f"Mean and standard deviation over {seeds} seeds, in percent; the time of the seed that was trained fastest."
    return [*rows, "", note]


def with_deviation(summary: dict) -> str:
    """Write mean and deviation in percent."""
    if summary["mean"] is None:
        return "-"
    deviation = summary["deviation"]
    return f"{100 * summary['mean']:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def signed(share: float) -> str:
    return f"{100 * share:+.2f}"


def points(share: float) -> str:
    value = 100 * share
    return f"{value:g} point{'' if value == 1 else 's'}"


def draw_claims(claims: dict, path: Path) -> None:
    """Draw test mIoU against decoder parameters, and the training loss, a row for each data set.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If costs are not measured yet.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib; install the extra: pip install 'depict-hf[plots]'.") from error
    if claims["costs"] is None:
        raise ValueError("Got claims without costs, which the picture needs.")
    figure = Figure(figsize=(10, 3.6 * len(claims["datasets"])), layout="constrained")
    panels = figure.subplots(len(claims["datasets"]), 2, squeeze=False)
    for (name, decoders), (accuracy, learning) in zip(claims["datasets"].items(), panels, strict=True):
        for index, (decoder, each) in enumerate(decoders.items()):
            if not each["seeds"]:
                continue
            parameters = claims["costs"]["datasets"][name][decoder]["parameters"]
            scores = [100 * score for score in each["test_by_seed"].values()]
            accuracy.plot([parameters] * len(scores), scores, ".", color=f"C{index}", alpha=0.4)
            accuracy.plot(parameters, statistics.fmean(scores), "o", color=f"C{index}", label=decoder)
            learning.plot(*block_means(each["losses"]), color=f"C{index}", label=decoder)
        accuracy.set(xscale="log", xlabel="decoder parameters", ylabel="test mIoU (%)")
        accuracy.set_title(f"{name}: mean over seeds, and each seed", fontsize="medium")
        learning.set(yscale="log", xlabel="optimiser steps", ylabel="training loss")
        learning.set_title(f"{name}: mean over seeds", fontsize="medium")
        for axes in (accuracy, learning):
            axes.grid(alpha=0.3)
            axes.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
