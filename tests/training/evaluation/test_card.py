"""Cards of trained recipes say what their records say."""

import json

import pytest
from huggingface_hub import ModelCard

from depict_hf.hub.claims import unbacked_claims
from training.evaluation import write_card
from training.evaluation.card import render_card
from training.evaluation.records import render_table


def records(folder) -> dict:
    recipe = {
        "name": "ade20k_vit_tiny_sa",
        "data": {"train_split": "train", "size": 512, "crop_size": 448},
        "model": {"encoder": None, "backbone": "facebook/dinov2-small", "decoder_type": "sa", "freeze_encoder": True},
        "optimization": {"epochs": 3, "learning_rate": 0.02, "seed": 7},
        "hardware": {"precision": "bf16"},
    }
    run = {"recipe": recipe, "dataset": "me/streets", "data": {"train": {"images": 367}}}
    record = {
        "mean_iou": 0.4567,
        "mean_accuracy": 0.5,
        "overall_accuracy": 0.75,
        "per_class_iou": {"road": 0.4567, "sky": None},
        "per_class_accuracy": {"road": 0.5, "sky": None},
        "protocol": {
            "size": {"shortest_edge": 512, "longest_edge": 2048},
            "window_size": 448,
            "window_stride": None,
            "scales": [1.0],
            "flip": False,
        },
        "precision": "float32",
        "metric_definition": "pixels counted",
        "num_images": 233,
        "split": "test",
        "environment": {"commit": "abc", "torch": "2.0", "transformers": "5.0", "gpu": None},
    }
    (folder / "recipe.json").write_text(json.dumps(run))
    (folder / "evaluation.json").write_text(json.dumps(record))
    return record


def test_a_card_shows_its_records(tmp_path):
    record = records(tmp_path)
    text = write_card(tmp_path).read_text()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: image-segmentation\n")
    assert render_table(record) in text
    assert "on the train split of me/streets, 367 images" in text
    assert "- mIoU 45.67 on 233 images of the test split" in text
    assert "windows of 448 at stride 448; scales 1; float32" in text
    for line in (
        "| `crop_size` | 448 |",
        "| `learning_rate` | 0.02 |",
        "| `freeze_encoder` | true |",
        "| `seed` | 7 |",
    ):
        assert line in text
    assert "`encoder`" not in text  # none
    assert "mirror" not in text


def test_several_scales_and_a_note(tmp_path):
    record = records(tmp_path)
    protocol = record["protocol"] | {"scales": [0.5, 1.75], "flip": True, "window_size": None}
    several = record | {"mean_iou": 0.5, "protocol": protocol}
    (tmp_path / "evaluation_multi_scale.json").write_text(json.dumps(several))
    text = write_card(tmp_path, "Random weights.").read_text()
    assert "# ade20k_vit_tiny_sa\n\nRandom weights.\n\nA semantic" in text
    assert "- mIoU 50.00 on 233" in text and "whole images; scales 0.5, 1.75 and their mirror images" in text


def test_figures_on_other_data_are_not_said_of_the_models_own(tmp_path):
    """Fails if an evaluation with a table of classes enters `model-index` under the data set of the card."""
    record = records(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"dataset": {"type": "streets", "name": "Streets"}}))
    table = {"road": ["lane", "road"], "sky": ["sky"]}
    other = record | {"mean_iou": 0.6, "dataset": "me/facades", "protocol": record["protocol"] | {"classes": table}}
    (tmp_path / "evaluation_facades.json").write_text(json.dumps(other))
    text = write_card(tmp_path).read_text()
    found = {each.metric_value: each.dataset_type for each in ModelCard(text).data.eval_results}
    assert (found[45.67], found[60.0]) == ("streets", "me/facades")
    assert "- mIoU 60.00 over the 2 classes that both have on 233 images of the test split (facades; " in text


def test_corruptions_may_have_an_evaluation_of_their_own(tmp_path):
    """Fails if a table of corruptions hides on how few images it was measured."""
    record = records(tmp_path)
    under = {"corruption": "fog", "severity": 3, "mean_iou": 0.25, "retention": 0.625}
    few = record | {"mean_iou": 0.4, "num_images": 58, "corruptions": [under]}
    (tmp_path / "evaluation_on_few_images.json").write_text(json.dumps(few))
    section = write_card(tmp_path).read_text().partition("## Robustness\n\n")[2].splitlines()
    assert section[0] == "On 58 images of the test split:"
    assert section[4:6] == ["| none | 40.00 | 100.00 |", "| fog, severity 3 | 25.00 | 62.50 |"]
    assert section[7] == "The record is `evaluation_on_few_images.json`."


def test_records_are_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe\.json"):
        write_card(tmp_path)


def test_sections_come_and_go_with_their_records(tmp_path):
    """Fails if a card has an empty section, or hides a record that lies beside it."""

    def sections() -> list[str]:
        return [line[3:] for line in render_card(tmp_path).splitlines() if line.startswith("## ")]

    record = records(tmp_path)
    assert sections() == ["Use", "Classes", "Results", "Training", "Citation"]
    record |= {"images_per_second": 4.0, "peak_memory_bytes": {"resident": 2e9, "cuda": None}}
    record["corruptions"] = [{"corruption": "fog", "severity": 3, "mean_iou": 0.25, "retention": 0.5}]
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    (tmp_path / "robustness.json").write_text(json.dumps({"verdict": "Nothing breaks."}))
    (tmp_path / "white_box.json").write_text(json.dumps({"verdicts": {"a": {"rates": "holds"}, "b": {"rates": "-"}}}))
    (tmp_path / "worst.png").write_bytes(b"")
    (tmp_path / "card.json").write_text(
        json.dumps({"license": "mit", "data": ["Of my own."], "dataset": {"type": "a/b"}})
    )
    text = render_card(tmp_path)
    expected = ["Use", "Classes", "Results", "Robustness", "White box", "Cost", "Limits", "Training"]
    assert sections() == [*expected, "Data and licence", "Citation"]
    for line in (
        "2: road, sky.",
        "| fog, severity 3 | 25.00 | 50.00 |",
        "Nothing breaks. `robustness.json` is the record.",
        "| rates | holds | - |",
        "| float32 | 4 | 2.00 | CPU, ? threads |",
    ):
        assert line in text.splitlines()
    assert "](worst.png)" in text and "Of my own." in text
    [result, *_] = ModelCard(text).data.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type) == ("image-segmentation", "a/b", "mean_iou")
    assert result.metric_value == 45.67 and ModelCard(text).data.license == "mit"
    assert unbacked_claims(text, tmp_path) == []
