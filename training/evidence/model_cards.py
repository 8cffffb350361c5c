"""The cards in `model_cards/`: those of the paper's models are made from recipes and `PAPER_ROWS`, all are rendered.

`python -m training.cards model_cards` writes them; nothing is trained or measured for it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from depict_hf.hub import render_card
from depict_hf.hub.tables import pipe_table
from depict_hf.writing import write_json, write_whole

from ..recipe import Recipe
from ..recipes import get_recipe
from .costs import cost_of, describe_assumptions
from .paper import PAPER_ROWS, PaperRow

# Of the paper, with DEPICT's two decoders each: `ade20k_vit_tiny_sa`, ...
ROWS = (
    "ade20k_vit_tiny",
    "ade20k_vit_small",
    "ade20k_vit_base",
    "ade20k_vit_large_640",
    "cityscapes_vit_large",
    "pascal_context_vit_large",
)
DECODERS = {"sa": "self-attention", "ca": "cross-attention"}
_DATA = {"ade20k": "ADE20K", "cityscapes": "Cityscapes", "pascal_context": "Pascal Context"}
_SIZES = {"tiny": "ViT-T/16", "small": "ViT-S/16", "base": "ViT-B/16", "large": "ViT-L/16"}
_AUTHORS = "[QishuaiWen/DEPICT](https://github.com/QishuaiWen/DEPICT)"


def paper_model_names() -> list[str]:
    """Name the recipes of the paper's models that have a card, in the order of the index."""
    return [f"{row}_{kind}" for row in ROWS for kind in DECODERS]


def paper_records(name: str) -> dict[str, dict[str, Any]]:
    """Return what a card of a model of the paper is rendered from, by file name, ready for JSON.

    Args:
        name: Of a recipe, one of `paper_model_names`.

    Raises:
        ValueError: If there is no such recipe.
    """
    recipe = get_recipe(name)
    row = _row(recipe)
    found = {"card.json": _card(recipe, row), "cost.json": cost_of(recipe) | {"note": describe_assumptions()}}
    return found | ({"published.json": _published(row)} if row else {})


def card_folders(root: Path) -> list[Path]:
    """Find the folders of `model_cards/` whose card is rendered by `depict_hf.hub.render_card`."""
    return sorted(path.parent for path in root.glob("*/card.json"))


def write_model_card(folder: Path) -> Path:
    """Write or replace the card of one folder, from what lies in it; returns the card's path.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If a record cannot be read.
    """
    write_whole(render_card(folder), folder / "README.md")
    return folder / "README.md"


def write_model_cards(root: Path) -> Iterator[Path]:
    """Write the records and cards of the paper's models, render all others, and the index; yields each card's path.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If a record cannot be read.
    """
    for name in paper_model_names():
        for file, record in paper_records(name).items():
            write_json(record, root / name / file)
    for folder in card_folders(root):
        yield write_model_card(folder)
    write_whole(render_index(root), root / "README.md")
    yield root / "README.md"


def render_index(root: Path) -> str:
    """Write `model_cards/README.md` from what lies beside it: models with their figures, then everything else."""
    rows = []
    for folder in sorted(card_folders(root), key=_in_order):
        card = _read(folder / "card.json") or {}
        record, published = _read(folder / "evaluation.json"), _read(folder / "published.json")
        papers = (published or {}).get("figures", [])
        figures = [f"{each['mean_iou_percent']:.1f} ({each['protocol']})" for each in papers]
        measured = f"{100 * record['mean_iou']:.2f} ({record['dataset']}, {record['split']})" if record else "-"
        rows.append([f"[{card['title']}]({folder.name}/README.md)", measured, ", ".join(figures) or "-"])
    others = [
        f"- [{path.relative_to(root)}]({path.relative_to(root)})"
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder not in card_folders(root)
        for path in sorted(folder.rglob("*.md"), key=_is_no_readme)[:1] or sorted(folder.rglob("*.json"))[:1]
    ]
    lines = [
        "# Models and measurements",
        "",
        "A card for each model, rendered from the JSON beside it by `python -m training.cards model_cards`; figures "
        "are mIoU in percent. Those of the paper (Wen and Li, NeurIPS 2024) stand in a column of their own and were "
        "not measured here; `-` is where there is none.",
        "",
        *pipe_table(["model", "measured here", "the paper's"], rows, numeric_from=3),
        "",
        "The paper's models are not stored here: their cards say how to get the authors' file and convert it, or to "
        "train by the recipe, and `python -m training.reproduce CHECKPOINT DATASET` compares with the paper's figure.",
        "",
        "Beside them, comparisons, costs and plans, each with its record:",
        "",
        *others,
        "",
        "`depict push DIR REPO` uploads a model with such a card, and refuses one whose figures no record holds.",
    ]
    return "\n".join(lines) + "\n"


def _is_no_readme(path: Path) -> tuple[bool, str]:
    return path.name != "README.md", str(path)


def _in_order(folder: Path) -> tuple[bool, int, str]:
    names = paper_model_names()
    return folder.name in names, names.index(folder.name) if folder.name in names else 0, folder.name


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _dataset(recipe: Recipe) -> str:
    return next(name for name in _DATA if recipe.name.startswith(name))


def _size(recipe: Recipe) -> str:
    return next(text for name, text in _SIZES.items() if f"_vit_{name}" in recipe.name)


def _row(recipe: Recipe) -> PaperRow | None:
    """The paper's figures of a recipe, where they are recorded; the encoder's width tells sizes apart."""
    widths = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
    width = next(each for name, each in widths.items() if f"_vit_{name}" in recipe.name)
    key = (_dataset(recipe), recipe.model.decoder_type, width, recipe.data.crop_size)
    return next(
        (row for row in PAPER_ROWS if (row.dataset, row.decoder_type, row.encoder[1], row.crop_size) == key), None
    )


def _published(row: PaperRow) -> dict[str, Any]:
    figures = [
        {"dataset": _DATA[row.dataset], "protocol": protocol, "mean_iou_percent": row.figure(protocol == "multi-scale")}
        for protocol in ("single-scale", "multi-scale")
    ]
    return {"figures": figures, "note": f"{row.model}: {row.source}. The paper's figures, not measured here."}


def _card(recipe: Recipe, row: PaperRow | None) -> dict[str, Any]:
    kind, data, size = recipe.model.decoder_type, _DATA[_dataset(recipe)], _size(recipe)
    attention = DECODERS[kind]
    ours = recipe.name
    if _dataset(recipe) == "ade20k":
        source = (
            f"The authors link files of DEPICT-SA and DEPICT-CA that were trained on ADE20K in {_AUTHORS}; which sizes "
            "of encoders are among them is not known here. A file is a folder with `checkpoint.pth` and `variant.yml`, "
            "here CHECKPOINT:"
        )
    else:
        source = (
            f"{_AUTHORS} links files for ADE20K alone, so that this model has to be trained, as below. A file that was "
            "trained with the authors' code is a folder with `checkpoint.pth` and `variant.yml`, here CHECKPOINT:"
        )
    return {
        "title": f"DEPICT-{kind.upper()}, {size}, {data}",
        "summary": f"Labels photographs with the {len(recipe.data.class_names)} classes of {data}: DEPICT's white-box "
        f"decoder with {attention} on {size}, trained together on squares of {recipe.data.crop_size} pixels. Nobody "
        "has trained or measured it here, and no weights of it are stored here; this card says how to get it.",
        "license": "unknown",
        "base_model": recipe.model.backbone,
        "tags": ["depict", "semantic-segmentation", _dataset(recipe).replace("_", "-")],
        "decoder_type": kind,
        "classes": list(recipe.data.class_names),
        "use": [
            source,
            "",
            "```sh",
            "depict convert CHECKPOINT OUT",
            "depict segment street.jpg --model OUT",
            "```",
            "",
            f"`python -m training.reproduce CHECKPOINT DATASET` measures it by the protocol of the published figures "
            f"(`--multi-scale` for six scales with mirror images), with {data} in its owner's layout.",
        ],
        "verified": [
            "The arithmetic: small models with random weights that the authors' code made are converted, and give its "
            "logits and loss within 1e-4, its gradients within 2e-3, and its label maps at one and at several scales "
            "(`tests/test_conversion.py`, `tests/test_published_protocol.py`).",
            f"The recipe can be rehearsed: `python -m training.train {ours} --rehearse` goes once through reading, ten "
            "steps, resuming, both protocols, card, and conversion to the authors' format and back, in minutes.",
            f"Not {'the figures' if row else 'any figure, of which none of the paper is recorded here, either'}: "
            "neither a file of the authors nor the data set in full was at hand.",
        ],
        "training": [
            f"`python -m training.train {ours} DATASET OUTPUT`; every field is explained by "
            f"`python -m training.recipes {ours}`.",
        ],
        "data": [
            f"{data}, whose owners set the terms for its images and labels. The code of the authors and of this "
            "package is under the MIT licence; the authors' files of weights name no licence that is known here, and "
            f"the encoder starts from `{recipe.model.backbone}`, which has terms of its own.",
        ],
    }
