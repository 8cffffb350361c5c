"""The record of the white box's claims as a card: definitions, values, margins, verdicts, figure."""

from collections.abc import Mapping
from pathlib import Path

from ..evaluation import write_figure, write_json, write_whole
from .white_box import NORMALIZATIONS
from .white_box_claims import (
    CAPTURED,
    CLAIMS,
    COMPACT,
    INCOHERENT,
    NEAR,
    UNDEFINED,
    Claim,
    is_below_zero,
    judge,
    values,
)

RECORD_NAME = "white_box.json"
FIGURE_NAME = "white_box.png"


def write_card(record: dict, folder: Path) -> None:
    """Write record, card and figure into a folder.

    Raises:
        ImportError: If matplotlib is missing; all but the figure is written by then.
    """
    verdicts = {
        name: {claim: each["verdict"] for claim, each in judge(record, name).items()} for name in record["groups"]
    }
    write_json(record | {"verdicts": verdicts}, folder / RECORD_NAME, indent=0)
    write_whole(render_card(record), folder / "README.md")
    plot_card(record, folder / FIGURE_NAME)


def render_card(record: Mapping) -> str:
    """Write the card, in Markdown, from the record alone."""
    verdicts = {name: judge(record, name) for name in record["groups"]}
    sides = ", ".join(f"{name.replace('_', ' ')} {side}" for name, side in record["size"].items())
    lines = [
        "# The white box, opened: do its claims hold?",
        "",
        "| claim | " + " | ".join(record["groups"]) + " |",
        "|---|" + "---|" * len(record["groups"]),
        *(
            f"| {claim.statement} | {' | '.join(each[claim.name]['verdict'] for each in verdicts.values())} |"
            for claim in CLAIMS
        ),
        "",
        *(f"- {sentence}" for sentence in _sentences(verdicts)),
        "",
        f"![Rates over the layers, and what the other claims are tested by]({FIGURE_NAME})",
        "",
        f"{record['num_images']} images of {record['dataset']}, split {record['split']}, {sides} pixels, each taken "
        "whole. Models, by group: "
        + ", ".join(
            f"{name} ({group['decoder_type']}, {len(group['models'])} trained)"
            for name, group in record["groups"].items()
        )
        + ". Untrained: a decoder of the same configuration with fresh weights on the "
        "same encoder.",
        "",
        *([record["about"], ""] if "about" in record else []),
        "```sh",
        record["command"],
        "```",
        *_definitions(record),
    ]
    for claim in CLAIMS:
        lines += ["", f"## {claim.name}", "", f"Claim: {claim.statement}", "", *_values_table(record, claim)]
        lines += ["", *_tests_table(record, claim, verdicts)]
    return "\n".join(lines) + "\n"


def _sentences(verdicts: Mapping) -> list[str]:
    """Say of every claim which tests each group meets and fails."""
    sentences = []
    for claim in CLAIMS:
        parts = []
        for group, claims in verdicts.items():
            each = claims[claim.name]
            if each["verdict"] == UNDEFINED:
                continue
            met, failed = (", ".join(each[key]) or "nothing" for key in ("met", "failed"))
            parts.append(f"{group} {each['verdict']} (met: {met}; failed: {failed})")
        if parts:
            sentences.append(f"{claim.name}: {'; '.join(parts)}.")
    return sentences


def _definitions(record: Mapping) -> list[str]:
    tokens = "; ".join(f"{name}: {meaning}" for name, meaning in NORMALIZATIONS.items())
    return [
        "",
        "## Definitions",
        "",
        f"Rates: R(Z) = 1/2 log det(I + dim / (count epsilon^2) Z^T Z) in nats, epsilon {record['epsilon']:g}, of the "
        "patch tokens Z; R^c sums the rates of Z P_h^T over the heads h of the layer, with head_dim for dim. A change "
        f"is the sum over the layers (in ca those of self-attention) of after minus before. Tokens are taken in three "
        f"ways: {tokens}. A verdict names those under which it holds.",
        "",
        "Subspaces: deviation is |P_h P_h^T - I| / |I| (Frobenius), averaged over heads and layers; up to a common "
        "length, its least value over all multiples of P_h P_h^T. Overlap is the mean squared cosine of the angles "
        "between the row spaces of two heads, over all pairs; random subspaces have head_dim / hidden. Layers of "
        "cross-attention count too.",
        "",
        "Class tokens: vectors as they are compared, after the last LayerNorm and projection. Deviation of their Gram "
        "matrix of cosines, as above; the shares of the patch vectors' squared length inside their span (captured) and "
        "inside the principal subspace of the same dimension (best).",
        "",
        "Masks: labels on the patch grid, where the ground truth at the patch's centre has a label. Components: parts "
        "connected over the sides of patches, per class that occurs, averaged over classes. Total variation: the share "
        "of pairs of neighbouring patches with different labels. Before the first layer: the decoder's end applied to "
        "the tokens that enter it, which it was never trained for.",
        "",
        "Verdicts: every test is a margin that has to be below zero with its whole 95 % interval. A claim holds if all "
        "tests marked as required are met, holds in part if any test is, and else does not hold. Margins of images "
        "have bootstrap intervals (2000 resamples of images and models, 2.5 and 97.5 % quantiles), margins of weights "
        "Student's t over models; of one model, weights have no interval and their value decides. Comparisons with "
        "the untrained decoder are paired by image and model, those with the linear decoder by image, with its mean "
        f"over seeds. Thresholds, fixed before looking: deviation {NEAR:g}; captured {CAPTURED:g} of best; overlap "
        f"{INCOHERENT:g} of chance; {COMPACT:g} times the ground truth.",
        "",
        f"All figures are in {RECORD_NAME}: per model, under `models` and `untrained`, `weights` and one entry of "
        "`images` per image; means of tables are those over images and models.",
    ]


def _values_table(record: Mapping, claim: Claim) -> list[str]:
    lines = ["| value | " + " | ".join(record["groups"]) + " |", "|---|" + "---:|" * len(record["groups"])]
    for name, meaning in claim.values.items():
        cells = []
        for group in record["groups"]:
            own, fresh = (values(record, group, which, name) for which in ("models", "untrained"))
            if own is None or fresh is None:
                cells.append("-")
            else:
                shown = "" if name.endswith("_truth") else f"; untrained {fresh['mean']:.3f}"
                cells.append(f"{_with_interval(own)}{shown}")
        lines.append(f"| {meaning} (`{name}`) | {' | '.join(cells)} |")
    return lines


def _tests_table(record: Mapping, claim: Claim, verdicts: Mapping) -> list[str]:
    lines = [
        "| margin, met below 0 | " + " | ".join(record["groups"]) + " |",
        "|---|" + "---:|" * len(record["groups"]),
    ]
    for test in claim.tests:
        cells = []
        for group in record["groups"]:
            margin = verdicts[group][claim.name]["tests"].get(test.name)
            outcome = "" if margin is None else "met: " if is_below_zero(margin) else "failed: "
            cells.append("-" if margin is None else outcome + _with_interval(margin))
        need = "required" if test.required else "in part"
        lines.append(f"| {test.name} ({need}): {test.formula} | {' | '.join(cells)} |")
    cells = [verdicts[group][claim.name]["verdict"] for group in record["groups"]]
    return [*lines, f"| **verdict** | {' | '.join(f'**{cell}**' for cell in cells)} |"]


def _with_interval(summary: Mapping) -> str:
    text = f"{summary['mean']:.3f}"
    if summary["interval"] is None:
        return text
    low, high = summary["interval"]
    return f"{text} ({low:.3f} to {high:.3f})"


def plot_card(record: Mapping, path: Path) -> None:
    """Draw R over the layers, the changes of R^c, and the other claims' values, of trained and untrained decoders.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib; install the extra: pip install 'depict-hf[plots]'.") from error

    figure = Figure(figsize=(14, 11), layout="constrained")
    grid = figure.subplots(3, 3)
    for column, name in enumerate(NORMALIZATIONS):
        _plot_rates(grid[0, column], record, name)
        _plot_values(grid[1, column], record, [f"compression_{name}"], ["change of R^c (nats)"])
        grid[0, column].set_title(f"R of the patch tokens, {name} (nats)", fontsize="small")
        grid[1, column].set_title(f"Change of R^c, {name}; below 0 as claimed", fontsize="small")
    _plot_values(
        grid[2, 0],
        record,
        ["deviation", "deviation_any_scale", "overlap", "chance"],
        ["not orthonormal", "any length", "overlap", "chance"],
    )
    grid[2, 0].set_title("Subspaces; low as claimed", fontsize="small")
    _plot_values(
        grid[2, 1],
        record,
        ["class_deviation", "captured", "best", "captured_centered", "best_centered"],
        ["not orthonormal", "captured", "best", "captured,\ncentred", "best,\ncentred"],
    )
    grid[2, 1].set_title("Class vectors; first low, captured near best as claimed", fontsize="small")
    _plot_values(
        grid[2, 2],
        record,
        ["variation", "variation_truth", "variation_lens"],
        ["total variation", "ground truth", "before layer 1"],
    )
    grid[2, 2].set_title("Outlines of masks; near the ground truth as claimed", fontsize="small")
    write_figure(figure, path, dpi=90)


def _plot_rates(axes, record: Mapping, name: str) -> None:
    """Before and after every layer, means over images and models; with "seen" each layer has its own LayerNorm."""
    for index, (group, each) in enumerate(record["groups"].items()):
        for which, style in (("models", "o-"), ("untrained", "o--")):
            images = [image for model in each["models"] for image in record[which][model]["images"]]
            curves = [image["curves"][f"rate_{name}"] for image in images if "curves" in image]
            if not curves:
                continue
            layers = [
                [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
                for pairs in zip(*curves, strict=True)
            ]
            label = group if which == "models" else None
            faded = 1 if which == "models" else 0.35
            for layer, pair in enumerate(layers):
                places = [layer, layer + 1]
                axes.plot(places, pair, style, color=f"C{index}", alpha=faded, label=label, markersize=3)
                label = None
    axes.set(xlabel="layers passed (dashed: untrained)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="x-small")


def _plot_values(axes, record: Mapping, names: list[str], labels: list[str]) -> None:
    """Means with intervals, filled of trained decoders, hollow of untrained ones."""
    groups = list(record["groups"])
    for index, group in enumerate(groups):
        for which in ("models", "untrained"):
            label: str | None = group if which == "models" else None
            for place, name in enumerate(names):
                found = values(record, group, which, name)
                if found is None:
                    continue
                low, high = found["interval"] or [found["mean"]] * 2
                x = place + 0.8 * (index - (len(groups) - 1) / 2) / max(1, len(groups))
                x += 0 if which == "models" else 0.06
                axes.plot([x, x], [low, high], color=f"C{index}", alpha=0.6)
                fill = f"C{index}" if which == "models" else "none"
                axes.plot([x], [found["mean"]], "o", color=f"C{index}", markerfacecolor=fill, markersize=5, label=label)
                label = None
    axes.set_xticks(range(len(names)), labels, fontsize="x-small")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.grid(alpha=0.3, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")
