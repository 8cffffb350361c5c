"""The card of a trained recipe: what it is, how it was trained and evaluated, and how to use it, from its records."""

import json
from collections.abc import Mapping
from pathlib import Path

from .records import percent, render_table, write_whole

# Of the recipe, those that a reader asks for first; all of them are in recipe.json.
_SHOWN = {
    "model": ("encoder", "backbone", "decoder_type", "start_from", "freeze_encoder"),
    "data": ("size", "crop_size"),
    "optimization": ("epochs", "batch_size", "optimizer", "learning_rate", "schedule", "weight_decay", "seed"),
    "hardware": ("precision",),
}


def write_card(folder: Path, note: str | None = None) -> Path:
    """Write or replace `README.md` of a trained model's folder, as the Hub shows it, from the records beside it.

    Args:
        folder: With `recipe.json` and `evaluation.json` of `training.train` and, if several scales were evaluated,
            `evaluation_multi_scale.json`.
        note: A paragraph that comes first.

    Raises:
        FileNotFoundError: If one of the first two records is missing.
    """
    path = folder / "README.md"
    write_whole(render_card(folder, note), path)
    return path


def render_card(folder: Path, note: str | None = None) -> str:
    """Return what `write_card` writes."""
    run = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    several = folder / "evaluation_multi_scale.json"
    recipe = run["recipe"]
    training = run.get("data", {}).get(recipe["data"]["train_split"], {})
    images = f", {training['images']} images" if "images" in training else ""
    settings = [
        f"| `{name}` | {_text(recipe[section][name])} |"
        for section, names in _SHOWN.items()
        for name in names
        if recipe[section].get(name) is not None
    ]
    environment = record["environment"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-segmentation",
        "tags: [depict, semantic-segmentation]",
        "---",
        "",
        f"# {recipe['name']}",
        "",
        *([note, ""] if note else []),
        f"A semantic segmentation model of {len(record['per_class_iou'])} classes, trained by the recipe "
        f"`{recipe['name']}` on the {recipe['data']['train_split']} split of {run['dataset']}{images}. Its licence "
        "depends on those of the data and of the encoder's weights.",
        "",
        "```sh",
        "depict segment photo.jpg --model FOLDER",
        "```",
        "",
        "## Evaluation",
        "",
        _protocol(record),
        *([_protocol(json.loads(several.read_text(encoding="utf-8")))] if several.is_file() else []),
        "",
        "```text",
        render_table(record),
        "```",
        "",
        "## Training",
        "",
        "| field | value |",
        "|---|---|",
        *settings,
        "",
        f"Everything that the run depended on is in `recipe.json`. Code {environment['commit'] or 'without a commit'}, "
        f"torch {environment['torch']}, transformers {environment['transformers']}, "
        f"{environment['gpu'] or 'on a CPU'}.",
    ]
    return "\n".join(lines) + "\n"


def _protocol(record: Mapping) -> str:
    protocol = record["protocol"]
    sides = " and ".join(f"{name.replace('_', ' ')} {side}" for name, side in protocol["size"].items())
    windows = f"windows of {protocol['window_size']} at stride {protocol['window_stride'] or protocol['window_size']}"
    scales = ", ".join(f"{scale:g}" for scale in protocol["scales"])
    mirrored = " and their mirror images" if protocol["flip"] else ""
    return (
        f"- mIoU {percent(record['mean_iou']).strip()} on {record['num_images']} images of the {record['split']} split "
        f"(sizes: {sides}; {windows if protocol['window_size'] else 'whole images'}; scales {scales}{mirrored}; "
        f"{record['precision']}); {record['metric_definition']}."
    )


def _text(value: object) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
