"""The record of perturbed models as a card: tables, figure, verdict; the paper's figures beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluation import write_figure, write_json, write_whole
from .noise import ATTENTION_MATRICES, TARGETS
from .robustness_summary import NAMES, RULE, black_box, summarize_sections, verdict

RECORD_NAME = "robustness.json"
FIGURE_NAME = "robustness.png"
# Read off the figure of Wen and Li, NeurIPS 2024: ViT-Tiny, ADE20K; by sigma, mIoU in percent.
PAPER = {"Segmenter": {0.001: 35.4, 0.005: 6.0}, "DEPICT": {0.0: 39.3, 0.03: 31.0, 0.05: 8.0}}
PAPER_LABEL = "The paper's figures, not ours (Wen and Li, NeurIPS 2024: ViT-Tiny, ADE20K)"


def write_card(record: dict, folder: Path) -> None:
    """Write record, card and figure into a folder.

    Raises:
        ImportError: If matplotlib is missing; all but the figure is written by then.
    """
    write_json(record | {"verdict": verdict(record)}, folder / RECORD_NAME, indent=1)
    write_whole(render_card(record), folder / "README.md")
    plot_card(record, folder / FIGURE_NAME)


def render_card(record: Mapping) -> str:
    """Write the card, in Markdown, from the record alone."""
    summary = summarize_sections(record)
    lines = [
        "# What breaks: decoders under noise and other perturbations",
        "",
        f"**{verdict(record)}**",
        "",
        f"Data: {record['dataset']}, split {record['split']}. Models, by group:",
        "",
        "| group | decoder | trained models |",
        "|---|---|---:|",
        *(f"| {name} | {group['decoder_type']} | {len(group['models'])} |" for name, group in record["groups"].items()),
        "",
        *([record["about"], ""] if "about" in record else []),
        "Figures are mIoU in percent, with 95 % intervals (Student's t) in brackets, which cover training seeds and "
        "draws: sqrt(s_M^2 / M + s_D^2 / D), from the variances of the means of M seeds and of D draws, with degrees "
        "of freedom after Welch and Satterthwaite. They cover neither other images nor other encoders. Of one seed and "
        "one draw there is no interval.",
        "",
        f"![mIoU under the perturbations]({FIGURE_NAME})",
    ]
    for name, section in record["sections"].items():
        lines += ["", f"## {NAMES[name][0].upper()}{NAMES[name][1:]}", "", *_protocol(section), ""]
        lines += _noise_text(name, record, section, summary[name]) if name in TARGETS else _kinds_text(name, summary)
    return "\n".join(lines) + "\n"


def _protocol(section: Mapping) -> list[str]:
    protocol = section["protocol"]
    sides = ", ".join(f"{name.replace('_', ' ')} {side}" for name, side in protocol["size"].items())
    window = protocol["window_size"]
    how = "whole photographs" if window is None else f"windows of {window} pixels, stride {protocol['window_stride']}"
    label_size = section.get("label_size")
    scored = f"label maps reduced to a shorter side of {label_size} pixels" if label_size else "every pixel"
    lines = [f"{section['num_images']} images, {sides} pixels, {how}, one scale, scored on {scored}."]
    if section.get("command"):
        lines += ["", "```sh", section["command"], "```"]
    return lines


def _noise_text(name: str, record: Mapping, section: Mapping, summary: Mapping) -> list[str]:
    lines = [
        f"Gaussian noise N(0, sigma^2), {section['draws']} draws, the same for all models, scaled by sigma.",
        "",
    ]
    if name == "attention-noise":
        lines += ["Noise falls on these matrices and on nothing else:", ""]
        kinds = dict.fromkeys(group["decoder_type"] for group in record["groups"].values())
        lines += [
            f"- {kind}: {ATTENTION_MATRICES.get(kind, 'none, the decoder has no attention, so that it is left out')}"
            for kind in kinds
        ]
        lines += [
            "",
            "Absolute noise, the paper's kind, favours whoever has the larger weights; relative noise is sigma times "
            "the root mean square of each matrix. Neither alone is a fair comparison, so both are given. Root mean "
            "squares, mean over matrices and seeds: " + _sizes(record, section) + ".",
            "",
            "Noise can take away only what the attention gives: the row `all at zero` has the mIoU with all these "
            "matrices at zero. A decoder that loses little there is robust because it hardly uses them.",
            "",
        ]
    elif name == "class-token-noise":
        lines += [
            "On the class tokens as learned; relative noise is sigma times their root mean square, which is: "
            + _sizes(record, section)
            + ".",
            "",
        ]
    else:
        lines += [
            "On the patch tokens that the decoder reads, sigma times the root mean square of each photograph's "
            "features. Where models share an encoder, an absolute scale is the same curve: multiply sigma by "
            + _sizes(record, section)
            + ".",
            "",
        ]
    for scale, each in summary.items():
        lines += [f"### {scale.capitalize()} noise", "", *_curve_table(each["groups"])]
        missing = [
            f"- {name}: left out. {one['left_out']}" for name, one in each["groups"].items() if "left_out" in one
        ]
        lines += ["", *missing] if missing else []
        if each["differences"]:
            lines += ["", f"Share of the clean mIoU kept, difference to {black_box(record)}, in percentage points:", ""]
            lines += _difference_table(each["differences"])
        lines.append("")
    if name == "attention-noise":
        lines += [RULE, "", f"{PAPER_LABEL}, absolute noise:", "", *_paper_table(), ""]
    return lines[:-1]


def _sizes(record: Mapping, section: Mapping) -> str:
    texts = []
    for name, group in record["groups"].items():
        found = [section["models"][model].get("root_mean_squares") for model in group["models"]]
        values = [value for sizes in found if sizes for value in sizes.values()]
        if values:
            texts.append(f"{name} {sum(values) / len(values):.3g}")
    return ", ".join(texts)


def _curve_table(groups: Mapping) -> list[str]:
    shown = {name: each for name, each in groups.items() if "left_out" not in each}
    if not shown:
        return []
    first = next(iter(shown.values()))
    lines = [f"| sigma | {' | '.join(shown)} |", "|---|" + "---:|" * len(shown)]
    lines.append(f"| 0 | {' | '.join(_mean(each['clean']) for each in shown.values())} |")
    for index, point in enumerate(first["curve"]):
        cells = (_mean(each["curve"][index]["score"]) for each in shown.values())
        lines.append(f"| {point['sigma']:g} | {' | '.join(cells)} |")
    if "removed" in first:
        lines.append(f"| all at zero | {' | '.join(_mean(each['removed']) for each in shown.values())} |")
    halves = ("none" if each["half_sigma"] is None else f"{each['half_sigma']:.3g}" for each in shown.values())
    lines.append(f"| sigma at half of the clean mIoU | {' | '.join(halves)} |")
    kept = (f"{100 * each['mean_retained']:.1f} %" for each in shown.values())
    lines.append(f"| share kept, mean over the levels | {' | '.join(kept)} |")
    return lines


def _difference_table(differences: Mapping) -> list[str]:
    lines = [f"| sigma | {' | '.join(differences)} |", "|---|" + "---:|" * len(differences)]
    for row in zip(*differences.values(), strict=True):
        lines.append(f"| {row[0]['sigma']:g} | {' | '.join(_mean(each, '+.1f') for each in row)} |")
    return lines


def _paper_table() -> list[str]:
    sigmas = sorted({sigma for values in PAPER.values() for sigma in values})
    lines = [f"| sigma (paper) | {' | '.join(PAPER)} |", "|---|" + "---:|" * len(PAPER)]
    for sigma in sigmas:
        cells = (f"{values[sigma]:g}" if sigma in values else "" for values in PAPER.values())
        lines.append(f"| {sigma:g} | {' | '.join(cells)} |")
    return lines


def _kinds_text(name: str, summary: Mapping) -> list[str]:
    groups = summary[name]["groups"]
    what = (
        "Corruptions of ImageNet-C, drawn by the photograph's index alone; each kind is the mean over its severities."
        if name == "corruptions"
        else "Scale: the photograph's size before the encoder, relative to the model's own. Other crops: windows of "
        "half the shorter side instead of whole photographs, or whole photographs instead of windows. Brightness: all "
        "stored values times a factor."
    )
    lines = [what, "", f"|  | {' | '.join(groups)} |", "|---|" + "---:|" * len(groups)]
    lines.append(f"| clean | {' | '.join(_mean(each['clean']) for each in groups.values())} |")
    for kind in next(iter(groups.values()))["scores"]:
        lines.append(f"| {kind} | {' | '.join(_mean(each['scores'][kind]) for each in groups.values())} |")
    lines.append(f"| mean over kinds | {' | '.join(_mean(each['mean']) for each in groups.values())} |")
    kept = (_mean(each["retained"], ".1f") for each in groups.values())
    return [*lines, f"| relative to clean | {' | '.join(kept)} |"]


def _mean(summary: Mapping, form: str = ".2f") -> str:
    """A mean and its interval in percent."""
    if summary["mean"] is None:
        return "-"
    text = f"{100 * summary['mean']:{form}}"
    if summary["interval"] is None:
        return text
    low, high = (f"{100 * value:{form}}" for value in summary["interval"])
    return f"{text} ({low} to {high})"


def plot_card(record: Mapping, path: Path) -> None:
    """Draw all sections of the record as one picture file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib; install the extra: pip install 'depict-hf[plots]'.") from error

    summary = summarize_sections(record)
    panels: list[tuple[str, str | None]] = []
    for name, section in summary.items():
        if name in TARGETS:
            panels += [(name, scale) for scale in section]
            panels += [("paper", None)] * (name == "attention-noise")
        else:
            panels.append((name, None))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    colors = {name: f"C{index}" for index, name in enumerate(record["groups"])}
    for axes, (name, scale) in zip(grid.flat, panels, strict=False):
        if name == "paper":
            _plot_paper(axes)
        elif scale is not None:
            _plot_curves(axes, summary[name][scale]["groups"], colors)
            axes.set_title(f"{NAMES[name][0].upper()}{NAMES[name][1:]}, {scale}", fontsize="small")
        else:
            _plot_bars(axes, summary[name]["groups"], colors)
            axes.set_title(f"{NAMES[name][0].upper()}{NAMES[name][1:]}", fontsize="small")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    write_figure(figure, path, dpi=100)


def _plot_curves(axes, groups: Mapping, colors: Mapping[str, str]) -> None:
    for name, each in groups.items():
        if "left_out" in each:
            continue
        points = [{"sigma": 0.0, "score": each["clean"]}, *each["curve"]]
        _plot_line(axes, [point["sigma"] for point in points], [point["score"] for point in points], colors[name], name)
    shown = [point for each in groups.values() for point in each.get("curve", ())]
    _finish(axes, [point["sigma"] for point in shown])
    means = [point["score"]["mean"] for point in shown]
    means += [each["clean"]["mean"] for each in groups.values() if "clean" in each]
    axes.set_ylim(0, 130 * max(means, default=1))  # wide intervals of few seeds do not flatten the curves


def _plot_line(axes, sigmas: Sequence[float], means: Sequence[Mapping], color: str, label: str) -> None:
    axes.plot(sigmas, [100 * each["mean"] for each in means], "o-", markersize=3, color=color, label=label)
    if all(each["interval"] for each in means[1:]):
        ends = [each["interval"] or [each["mean"]] * 2 for each in means]
        axes.fill_between(
            sigmas, *zip(*((100 * low, 100 * high) for low, high in ends), strict=True), color=color, alpha=0.15
        )


def _finish(axes, sigmas: Sequence[float]) -> None:
    positive = [sigma for sigma in sigmas if sigma > 0]
    if positive:
        # 0 has its place left of the smallest level.
        axes.set_xscale("symlog", linthresh=min(positive))
    axes.set(xlabel="sigma", ylabel="mIoU (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")


def _plot_paper(axes) -> None:
    for (name, values), marker in zip(PAPER.items(), "s^", strict=True):
        axes.plot(list(values), list(values.values()), f"{marker}--", color="0.3", label=f"{name} (paper)")
    _finish(axes, [sigma for values in PAPER.values() for sigma in values])
    axes.set_title("The paper's figures, not ours: ViT-Tiny, ADE20K,\nattention noise, absolute", fontsize="small")


def _plot_bars(axes, groups: Mapping, colors: Mapping[str, str]) -> None:
    height = 0.8 / len(groups)
    for index, (name, each) in enumerate(groups.items()):
        means = {"clean": each["clean"], **each["scores"]}
        places = [place + index * height for place in range(len(means))]
        axes.barh(places, [100 * one["mean"] for one in means.values()], height, color=colors[name], label=name)
        axes.set_yticks([place + 0.4 - height / 2 for place in range(len(means))], list(means), fontsize="x-small")
    axes.invert_yaxis()
    axes.set(xlabel="mIoU (%)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
