"""The card of a model, as the Hub shows it, from the files in its folder: one template for every model of this package.

Nothing is computed or typed in here: figures come from result files, settings from the model's and the run's files,
and what only a person can say from `card.json`. A section that has none of them is left out. `RESULTS` names the files.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .card_sections import (
    calibration,
    cost,
    data_and_licence,
    limits,
    published,
    results,
    robustness,
    training,
    verification,
    white_box,
)
from .tables import percent, render_table, text_of

__all__ = ["RESULTS", "percent", "render_card", "render_table"]

RESULTS = {
    "card": "what a person says: title, summary, use, license, dataset, limits, pictures, data, ...",
    "config": "the model's settings: its classes and decoder",
    "recipe": "the run that trained it, of `training.train`",
    "evaluation": "of `depict evaluate`; so are `evaluation_NAME.json`, of the same model in other ways",
    "calibration": "of `depict calibrate`",
    "robustness": "of `python -m training.robustness --card`",
    "white_box": "of `python -m training.white_box --card`",
    "cost": "estimated cost of training, of `training.evidence.costs`",
    "published": "the paper's figures, which are not measured here",
    "earlier": "figures whose runs left no record of their own, with their origin",
    "conversion": "what `depict convert` read and found",
}
_DECODERS = {
    "sa": "DEPICT's white-box decoder with self-attention",
    "ca": "DEPICT's white-box decoder with cross-attention",
    "cbsa": "the white-box decoder of CBSA, whose cost grows nearly in proportion to the number of patches",
    "mask_transformer": "Segmenter's mask transformer, the black-box counterpart of DEPICT",
    "linear": "a linear decoder",
}
_CITATIONS = {
    "DEPICT": """@inproceedings{wen2024rethinking,
  title     = {Rethinking Decoders for Transformer-based Semantic Segmentation: A Compression Perspective},
  author    = {Wen, Qishuai and Li, Chun-Guang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}""",
    "Segmenter": """@inproceedings{strudel2021segmenter,
  title     = {Segmenter: Transformer for Semantic Segmentation},
  author    = {Strudel, Robin and Garcia, Ricardo and Laptev, Ivan and Schmid, Cordelia},
  booktitle = {International Conference on Computer Vision},
  year      = {2021}
}""",
}


class Records(NamedTuple):
    """What lies in a folder: records of `RESULTS` by name, evaluations in their order, and names of all its files."""

    found: dict[str, Any]
    evaluations: dict[str, Mapping[str, Any]]
    files: frozenset[str]

    def get(self, name: str) -> dict[str, Any]:
        return self.found.get(name) or {}


def render_card(folder: str | Path, note: str | None = None, name: str | None = None) -> str:
    """Write a card from the files in a model's folder; see `RESULTS`.

    Args:
        folder: Of a model, or one of `model_cards/`.
        note: A paragraph that comes first.
        name: What the model is loaded by; "FOLDER_OR_NAME" where that is not known yet.

    Returns:
        Markdown with metadata, among them `model-index` of what was measured.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is no JSON, or says neither `title` nor which model it is.
    """
    folder = Path(folder)
    records = read_records(folder)
    title = _title(folder, records)
    sections: dict[str, Callable[[Any], list[str]]] = {
        "Use": lambda found: _use(found, name or "FOLDER_OR_NAME"),
        "Classes": _classes,
        "Results": results,
        "The paper's figures": published,
        "Calibration": calibration,
        "Robustness": robustness,
        "White box": white_box,
        "Verified": verification,
        "Cost": cost,
        "Limits": limits,
        "Training": training,
        "Data and licence": data_and_licence,
        "Citation": _citation,
    }
    lines = ["---", *_metadata(title, records), "---", "", f"# {title}", "", *([note, ""] if note else [])]
    lines += [_summary(records)]
    for heading, section in sections.items():
        written = section(records)
        lines += ["", f"## {heading}", "", *written] if written else []
    return "\n".join(lines) + "\n"


def read_records(folder: Path) -> Records:
    """Read the records of a folder.

    Raises:
        ValueError: If one is no JSON.
    """

    def read(path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); write it again, or take it out.") from error

    found = {name: read(folder / f"{name}.json") for name in RESULTS if (folder / f"{name}.json").is_file()}
    evaluations = {"": found["evaluation"]} if "evaluation" in found else {}
    for path in sorted(folder.glob("evaluation_*.json")):
        evaluations[path.stem.removeprefix("evaluation_").replace("_", " ")] = read(path)
    return Records(found, evaluations, frozenset(path.name for path in folder.iterdir()))


def _title(folder: Path, records: Records) -> str:
    if "title" in records.get("card"):
        return records.get("card")["title"]
    if records.get("recipe"):
        return records.get("recipe")["recipe"]["name"]
    if not records.get("config"):
        raise ValueError(f"{folder} holds neither card.json with a title, nor recipe.json, nor config.json of a model.")
    name = records.get("conversion").get("name") or folder.absolute().name
    return name if name != "model" else "A model of depict-hf"


def _metadata(title: str, records: Records) -> list[str]:
    card = records.get("card")
    metadata: dict[str, Any] = {
        name: card[name] for name in ("license", "license_name", "license_link") if name in card
    }
    metadata |= {"library_name": "transformers", "pipeline_tag": "image-segmentation"}
    if "base_model" in card:
        metadata["base_model"] = card["base_model"]
    metadata["tags"] = card.get("tags") or ["depict", "semantic-segmentation"]
    index = [result for name, each in records.evaluations.items() for result in _indexed(name, each, card)]
    if index:
        metadata["model-index"] = [{"name": title, "results": index}]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120).rstrip("\n").split("\n")


def _indexed(name: str, record: Mapping[str, Any], card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe an evaluation as the Hub's `model-index` does: task, data set, and metrics in percent."""
    labels = {"mean_iou": "mIoU", "mean_accuracy": "mean accuracy", "overall_accuracy": "overall accuracy"}
    metrics = [
        {"type": kind, "value": round(100 * record[kind], 2), "name": f"{label}{f' ({name})' if name else ''}"}
        for kind, label in labels.items()
        if record.get(kind) is not None
    ]
    # The card's data are those of the model's own classes; a table of classes stands for other data.
    dataset = {} if record["protocol"].get("classes") else card.get("dataset") or {}
    source = Path(str(record.get("dataset") or "unknown"))
    kind = dataset.get("type") or (source.name if source.is_absolute() else str(source))
    described = {"type": kind, "name": dataset.get("name") or kind, "split": record["split"]}
    task = {"type": "image-segmentation", "name": "Semantic segmentation"}
    return [{"task": task, "dataset": described, "metrics": metrics}] if metrics else []


def _summary(records: Records) -> str:
    """Say in a paragraph what the model is."""
    card, run, config = records.get("card"), records.get("recipe"), records.get("config")
    if "summary" in card:
        return card["summary"]
    classes = _class_names(records)
    if run:
        recipe, trained = run["recipe"], run.get("data", {})
        training_split = recipe["data"]["train_split"]
        images = trained.get(training_split, {}).get("images")
        source = Path(str(run["dataset"]))
        return (
            f"A semantic segmentation model of {len(classes)} classes, trained by the recipe `{recipe['name']}` on the "
            f"{training_split} split of {source.name if source.is_absolute() else source}"
            f"{f', {images} images' if images else ''}. Its licence depends on those of the data and of the encoder's "
            "weights."
        )
    backbone = config.get("backbone_config") or {}
    layers, width = (config.get(name) or backbone.get(name) for name in ("num_hidden_layers", "hidden_size"))
    encoder = backbone.get("model_type", "vit")
    return (
        f"A semantic segmentation model of {len(classes)} classes: {_DECODERS[config.get('decoder_type', 'sa')]}, on "
        f"an encoder ({encoder}) of {layers} layers and width {width}. How it was trained is not recorded."
    )


def _use(records: Records, name: str) -> list[str]:
    card = records.get("card")
    if "use" in card:
        return list(card["use"])
    return [
        "```python",
        "from transformers import pipeline",
        "",
        f'segmenter = pipeline("image-segmentation", model="{name}", trust_remote_code=True)',
        'for found in segmenter("photo.jpg"):',
        '    print(found["label"], found["mask"].getbbox())',
        "```",
        "",
        "`trust_remote_code` runs the code in this repository; with the package `depict-hf` installed, "
        "`import depict_hf` takes its place, and there is",
        "",
        "```sh",
        f"depict segment photo.jpg --model {name}",
        "```",
    ]


def _class_names(records: Records) -> list[str]:
    if records.get("config"):
        labels = records.get("config").get("id2label") or {}
        return [labels[key] for key in sorted(labels, key=int)]
    if records.get("card").get("classes"):
        return list(records.get("card")["classes"])
    return list(next(iter(records.evaluations.values()), {}).get("per_class_iou", ()))


def _classes(records: Records) -> list[str]:
    names = _class_names(records)
    return [f"{len(names)}: {', '.join(text_of(name) for name in names)}."] if names else []


def _citation(records: Records) -> list[str]:
    kind = records.get("card").get("decoder_type") or records.get("config").get("decoder_type")
    kind = kind or (records.get("recipe").get("recipe") or {}).get("model", {}).get("decoder_type")
    names = ["Segmenter"] if kind in ("mask_transformer", "linear") else ["DEPICT"]
    return ["```bibtex", *(_CITATIONS[name] for name in names), "```"]
