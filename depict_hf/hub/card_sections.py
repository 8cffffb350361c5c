"""Sections of a card, each from the records of a folder; one without records is an empty list."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .tables import percent, pipe_table, render_table, text_of

if TYPE_CHECKING:
    from .card import Records

# Of a recipe, what a reader asks for first; all of it is in recipe.json.
_SHOWN = {
    "model": ("encoder", "backbone", "decoder_type", "start_from", "freeze_encoder"),
    "data": ("size", "crop_size"),
    "optimization": ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "weight_decay", "seed"),
    "hardware": ("precision",),
}


def results(records: "Records") -> list[str]:
    """Protocol and mean of every evaluation, classes of the first, and what it ran on."""
    if not records.evaluations:
        return []
    record = next(iter(records.evaluations.values()))
    lines = [_protocol(each, name) for name, each in records.evaluations.items()]
    lines += ["", "IoU and accuracy in percent:", "", "```text", render_table(record), "```"]
    lines += ["", f"`evaluation.json` is the record. {_environment(record)}"]
    return [*lines, *_texts(records, "results")]


def published(records: "Records") -> list[str]:
    """Figures of the paper, which nobody measured here."""
    found = records.get("published")
    if not found:
        return []
    rows = [[f"{each['dataset']}, {each['protocol']}", f"{each['mean_iou_percent']:.1f}"] for each in found["figures"]]
    table = pipe_table(["data set, protocol", "mIoU, the paper's"], rows) if rows else []
    return [*table, *([""] if table else []), found["note"]]


def calibration(records: "Records") -> list[str]:
    """Temperature, and calibration before and after it, also of evaluations that measured it."""
    record = records.get("calibration")
    if not record:
        return []
    lines = [
        f"Scores are divided by a temperature of {record['temperature']:g} before probabilities are read from them; "
        f"labels do not depend on it. It was fitted on {record['num_images']} images of the {record['split']} split, "
        f"in {record['precision']}, to {record['after']['num_pixels']:,} of their {record['labelled_pixels']:,} "
        f"labelled pixels; the figures of the {record['split']} split are of these same pixels. `calibration.json` is "
        "the record.",
        "",
    ]
    header = [
        "images",
        "temperature",
        "calibration error (%)",
        "negative log-likelihood (nats)",
        "Brier score",
        "area under risk and coverage (%)",
    ]
    measured: list[tuple[Mapping[str, Any], Any]] = [(record, record["before"]), (record, record["after"])]
    for each in records.evaluations.values():
        measured += [(each, each[name]) for name in ("uncalibrated", "calibration") if name in each]
    rows = [
        [
            f"{each['split']}, {each['num_images']} images",
            f"{figures['temperature']:g}",
            percent(figures["expected_calibration_error"]).strip(),
            f"{figures['negative_log_likelihood']:.4f}",
            f"{figures['brier_score']:.4f}",
            percent(figures["risk_coverage"]["area"]).strip(),
        ]
        for each, figures in measured
    ]
    return [*lines, *pipe_table(header, rows), *_texts(records, "calibration"), *_pictures(records, "calibration")]


def robustness(records: "Records") -> list[str]:
    """Corrupted photographs, and what noise and the like do, each from its record."""
    lines: list[str] = []
    for name, record in records.evaluations.items():
        rows = [
            [f"{each['corruption']}, severity {each['severity']}"]
            + [percent(each[figure]).strip() for figure in ("mean_iou", "retention")]
            for each in record.get("corruptions") or ()
        ]
        if rows:
            lines += [*([""] if lines else []), f"On {record['num_images']} images of the {record['split']} split:", ""]
            untouched = ["none", percent(record["mean_iou"]).strip(), "100.00"]
            lines += pipe_table(["corruption", "mIoU (%)", "retained (%)"], [untouched, *rows])
            lines += ["", f"The record is `evaluation{f'_{name}'.replace(' ', '_') if name else ''}.json`."]
    verdict = records.get("robustness").get("verdict")
    if verdict:
        lines += [*([""] if lines else []), f"{verdict} `robustness.json` is the record."]
    texts = _texts(records, "robustness")
    return [*lines, *(texts if lines else texts[1:])]


def white_box(records: "Records") -> list[str]:
    """Verdicts on the paper's claims, by group of models and claim."""
    verdicts = records.get("white_box").get("verdicts")
    if not verdicts:
        return []
    claims = list(dict.fromkeys(claim for each in verdicts.values() for claim in each))
    rows = [[claim, *(each.get(claim, "-") for each in verdicts.values())] for claim in claims]
    table = pipe_table(["claim", *verdicts], rows, numeric_from=len(verdicts) + 1)
    return [*table, "", "`white_box.json` is the record; how the claims are tested stands in its card."]


def verification(records: "Records") -> list[str]:
    """What was checked here, and how; of a converted model also what the conversion found."""
    lines = [f"- {text}" for text in records.get("card").get("verified", ())]
    conversion = records.get("conversion")
    if conversion:
        lines += [f"- {text}" for text in conversion["report"]]
        lines += [f"- SHA-256 of the file that was converted: `{conversion['checkpoint_sha256']}`"]
        lines += [f"- {conversion['warning']}"] if conversion.get("warning") else []
    return lines


def cost(records: "Records") -> list[str]:
    """Time and memory of the evaluations; estimated time of training."""
    rows = [
        [
            name or each["precision"],
            f"{each['images_per_second']:.3g}",
            f"{each['peak_memory_bytes'][_memory(each)] / 1e9:.2f}",
            _machine(each),
        ]
        for name, each in records.evaluations.items()
        if each.get("images_per_second") and each.get("peak_memory_bytes")
    ]
    header = ["evaluation", "images a second", "peak memory (GB)", "on"]
    lines = pipe_table(header, rows) if rows else []
    estimate = records.get("cost")
    if estimate:
        hours = ", ".join(f"{value:.3g} in {name}" for name, value in estimate["hours"]["1"].items())
        lines += [*([""] if lines else []), *_estimate(estimate, hours)]
    return lines


def _estimate(estimate: Mapping[str, Any], hours: str) -> list[str]:
    return [
        f"{estimate['parameters']:,} parameters. Training: {estimate['steps']:,} steps of {estimate['batch_size']} "
        f"images, {estimate['flops_per_step'] / 1e12:.2f} TFLOPs each; estimated, not measured, hours on one "
        f"A100-class card: {hours}.",
        "",
        estimate["note"],
    ]


def limits(records: "Records") -> list[str]:
    """What it cannot do, in words and pictures."""
    lines = [f"- {text}" for text in records.get("card").get("limits", ())]
    texts, pictures = _texts(records, "limits"), _pictures(records, "limits")
    worst = next((name for name in ("worst.png", "worst.jpg") if name in records.files), None)
    if worst and not pictures:
        pictures = ["", f"![The images with the lowest IoU: photograph, label map, prediction]({worst})"]
    lines += texts + pictures
    return lines[1:] if lines and not lines[0] else lines


def training(records: "Records") -> list[str]:
    """The recipe's main settings, and what a person says of the run."""
    lines = list(records.get("card").get("training", ()))
    run = records.get("recipe")
    if run:
        settings = [
            [f"`{name}`", run["recipe"][section][name]]
            for section, names in _SHOWN.items()
            for name in names
            if run["recipe"].get(section, {}).get(name) is not None
        ]
        lines += [*([""] if lines else []), *pipe_table(["field", "value"], settings, numeric_from=2)]
        lines += ["", "Everything that the run depended on is in `recipe.json`."]
    return lines


def data_and_licence(records: "Records") -> list[str]:
    return list(records.get("card").get("data", ()))


def _texts(records: "Records", section: str) -> list[str]:
    """Paragraphs and tables that `card.json` adds to a section, each after an empty line.

    A table says its `text` and `header`; its rows are those of this name (`rows`) in `earlier.json`, which holds what
    was measured without a record of its own.
    """
    lines: list[str] = []
    for each in records.get("card").get("more", {}).get(section, ()):
        if isinstance(each, str):
            lines += ["", each]
        else:
            lines += ["", each["text"], "", *pipe_table(each["header"], records.get("earlier")[each["rows"]])]
    return lines


def _pictures(records: "Records", section: str) -> list[str]:
    found = records.get("card").get("pictures", {}).get(section, ())
    return [line for each in found for line in ("", f"![{each['text']}]({each['file']})")]


def _protocol(record: Mapping[str, Any], name: str) -> str:
    protocol = record["protocol"]
    sides = " and ".join(f"{name.replace('_', ' ')} {side}" for name, side in protocol["size"].items())
    windows = f"windows of {protocol['window_size']} at stride {protocol['window_stride'] or protocol['window_size']}"
    scales = ", ".join(f"{scale:g}" for scale in protocol["scales"])
    mirrored = " and their mirror images" if protocol["flip"] else ""
    classes = protocol.get("classes")
    shared = f" over the {len(classes)} classes that both have" if classes else ""
    sizes = f"sizes: {sides}; {windows if protocol['window_size'] else 'whole images'}; scales {scales}{mirrored}"
    return (
        f"- mIoU {percent(record['mean_iou']).strip()}{shared} on {record['num_images']} images of the "
        f"{record['split']} split ({name + '; ' if name else ''}{sizes}; {record['precision']}); "
        f"{record['metric_definition']}."
    )


def _environment(record: Mapping[str, Any]) -> str:
    found = record["environment"]
    return (
        f"Code {found['commit'] or 'without a commit'}, torch {found['torch']}, transformers {found['transformers']}, "
        f"{found['gpu'] or 'on a CPU'}."
    )


def _memory(record: Mapping[str, Any]) -> str:
    return "cuda" if record["peak_memory_bytes"].get("cuda") else "resident"


def _machine(record: Mapping[str, Any]) -> str:
    found = record["environment"]
    return text_of(found["gpu"] or f"CPU, {found.get('cpu_threads', '?')} threads")
