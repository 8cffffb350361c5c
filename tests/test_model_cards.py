"""Tables in the README and on the cards are those of the measured records beside them."""

import json
from pathlib import Path

import pytest

from depict_hf import DepictConfig
from depict_hf.cli import DEFAULT_MODEL
from training.evaluate import render_table

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "model_cards").iterdir())


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_cards_show_their_record(folder):
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert render_table(record) in (folder / "README.md").read_text(encoding="utf-8")
    assert record["num_images"] > 0 and record["metric_definition"]


def test_the_readme_shows_the_default_models_record():
    config = DepictConfig.from_pretrained(DEFAULT_MODEL)
    records = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in CARDS]
    [record] = [each for each in records if list(each["per_class_iou"]) == list(config.id2label.values())]
    assert render_table(record) in (ROOT / "README.md").read_text(encoding="utf-8")
