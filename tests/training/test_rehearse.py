"""Rows of the paper rehearsed: the smallest as a user would, on tiny squares; made data, reductions, failures."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from depict_hf.configuration_depict import ENCODER_PRESETS
from depict_hf.labels import class_names
from training import rehearse, train
from training.data import load_dataset_splits, open_samples
from training.evidence import rehearsal
from training.evidence.costs import ASSUMED_SCALING, training_cost
from training.evidence.made_data import make_dataset
from training.evidence.rehearsal import Rehearsal, distances
from training.evidence.rehearsal_setup import (
    overrides_of,
    reduce_recipe,
    rows_of_the_paper,
    take_data,
    windows_of,
    write_random_encoder,
)
from training.evidence.rehearsal_table import render_rehearsals
from training.recipe_model import build_model
from training.recipes import RECIPES, get_recipe

# The real encoder on squares of 16 patches, by the published overlap of windows.
SMALL = [
    "size=64",
    "crop_size=64",
    "window_size=64",
    "window_stride=64",
    "final_window_stride=32",
    "final_size=64",
    "batch_size=2",
    "num_workers=0",
]
STAGES = [
    "reading",
    "encoder",
    "training",
    "resuming",
    "single-scale",
    "multi-scale",
    "card",
    "published format",
]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, dict]:
    """The smallest row of the paper, rehearsed from the command line on made data; its folder and its record."""
    folder = tmp_path_factory.mktemp("rehearsal")
    data, output, record = folder / "ade20k", folder / "output", folder / "record.json"
    make_dataset("ade20k", data, 10, 2, (48, 80))
    command = ["ade20k_vit_tiny_sa", str(data), str(output), "--rehearse", "--record", str(record), *SMALL]
    assert train.main(command) == 0
    return output, json.loads(record.read_text())


def test_every_step_of_the_smallest_row_works(rehearsed):
    _, record = rehearsed
    assert [each["stage"] for each in record["stages"]] == STAGES
    results = {each["stage"]: each["result"] for each in record["stages"]}
    assert results["reading"] == "ADE20K (SceneParse150) in its official layout: train 10, validation 2"
    assert results["training"].startswith("10 steps, last loss ")
    assert results["resuming"] == "from checkpoint-8, ends with the same weights, bit for bit"
    assert results["single-scale"] == "single-scale on 2 images: shorter side 64, windows of 64 at stride 32"
    assert results["published format"].endswith("with the same weights, bit for bit, and with the same protocol")
    assert "random numbers" in record["started_from"]
    small = get_recipe("ade20k_vit_tiny_sa").override(SMALL)
    assert record["cost"]["flops_per_step"] == record["rehearsed"]["flops_per_step"]
    assert record["cost"]["flops_per_step"] == training_cost(small).flops_per_step
    assert record["rehearsed"]["encoder"] == "vit_tiny_patch16_384"
    assert record["rehearsed"]["peak_bytes"] is None or record["rehearsed"]["peak_bytes"] > 0
    # Two images a step cannot be divided among eight cards.
    assert list(record["cost"]["hours"]) == ["1"]


def test_a_rehearsal_leaves_what_training_leaves(rehearsed):
    """The model at the published protocol, both records, and a card that shows them and says what it started from."""
    output, record = rehearsed
    single, several = (
        json.loads((output / "run" / name).read_text()) for name in ("evaluation.json", "evaluation_multi_scale.json")
    )
    assert (single["num_images"], several["num_images"]) == (2, 1)
    assert several["protocol"]["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and several["protocol"]["flip"]
    assert several["protocol"]["size"] == {"shortest_edge": 64, "longest_edge": 256}
    card = (output / "run" / "README.md").read_text()
    assert record["started_from"] in card and "and their mirror images" in card
    assert "| `encoder` | vit_tiny_patch16_384 |" in card and "| `learning_rate` | 0.001 |" in card
    assert not list((output / "run").glob("checkpoint-*")) and not (output / "published").exists()
    assert "== resuming" in (output / "rehearsal.log").read_text()


def refused(tmp_path, capsys, *arguments: str) -> str:
    assert train.main([*arguments, "--rehearse"]) == 1
    return capsys.readouterr().err


def test_a_run_that_starts_over_is_found_out(tmp_path, monkeypatch, capsys, datasets_cache):
    original = train.main

    def forgetful(command):
        if "--resume" in command:
            for folder in Path(command[2]).glob("checkpoint-*"):
                folder.rename(tmp_path / folder.name)
        return original(command)

    make_dataset("ade20k", tmp_path / "data", 10, 2, (48, 80))
    monkeypatch.setattr(rehearsal.train, "main", forgetful)
    places = [str(tmp_path / "data"), str(tmp_path / "output")]
    assert rehearse.rehearse_one(["ade20k_vit_tiny_sa", *places, "--rehearse", *SMALL]) == 1
    message = capsys.readouterr().err
    assert "The rehearsal failed at resuming: The run went on from None, needed checkpoint-8." in message


def test_distances_of_weights(tmp_path):
    """Euclidean over all weights: 3 and 4 make 5."""
    start = {"a": torch.zeros(2), "b": torch.zeros(1)}
    (tmp_path / "middle").mkdir()
    save_file(start, tmp_path / "middle" / "model.safetensors")
    save_file({"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([4.0])}, tmp_path / "whole")
    save_file({"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([3.5])}, tmp_path / "resumed")
    assert distances(tmp_path / "whole", tmp_path / "resumed", tmp_path / "middle") == (0.5, 5.0)
    save_file({"a": torch.zeros(2)}, tmp_path / "resumed")
    with pytest.raises(RuntimeError, match="other weights"):
        distances(tmp_path / "whole", tmp_path / "resumed", tmp_path / "middle")


def test_what_cannot_be_rehearsed_is_refused(tmp_path, capsys, monkeypatch):
    assert "is no row of the paper" in refused(tmp_path, capsys, "camvid_dinov2_small_sa")
    assert "Unknown recipe 'ade20k_vit_tini_sa'" in refused(tmp_path, capsys, "ade20k_vit_tini_sa")
    (tmp_path / "mine").write_text("")
    message = refused(tmp_path, capsys, "ade20k_vit_tiny_sa", str(tmp_path), str(tmp_path))
    assert "is not an empty folder" in message
    message = refused(tmp_path, capsys, "ade20k_vit_tiny_sa", "--record", str(tmp_path / "mine"))
    assert "mine exists; add --overwrite" in message
    monkeypatch.setattr(rehearsal, "check_disk", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    assert "error: no room" in refused(tmp_path, capsys, "ade20k_vit_tiny_sa", *SMALL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Got several processes" in refused(tmp_path, capsys, "ade20k_vit_tiny_sa")


@pytest.mark.parametrize(
    ("dataset", "layout"),
    [("ade20k", "ADE20K (SceneParse150)"), ("cityscapes", "Cityscapes"), ("pascal_context", "Pascal Context")],
)
def test_made_data_are_read_as_their_owners_lay_them_out(dataset, layout, tmp_path, datasets_cache):
    splits = load_dataset_splits(make_dataset(dataset, tmp_path, 3, 2, (40, 60)))
    assert splits.layout == f"{layout} in its official layout"
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 2}
    samples = open_samples(splits, "train", class_names(dataset), reduce_labels=dataset == "ade20k")
    seen = set()
    for index, sample in enumerate(samples):
        shape = (60, 40) if index == 1 and dataset != "cityscapes" else (40, 60)
        assert tuple(sample["labels"].shape) == shape and tuple(sample["image"].shape) == (3, *shape)
        labels = sample["labels"].numpy()
        # One class in each of 6 x 6 cells, by whose colour the photograph is told; it gets brighter to the right.
        assert len(np.unique(labels[: shape[0] // 6, : shape[1] // 6])) == 1
        assert sample["image"].float().mean((0, 1))[-1] > 0
        seen |= set(labels.ravel().tolist())
    ids = seen - {255}
    assert ids <= set(range(len(class_names(dataset)))) and len(ids) > 10
    assert (255 in seen) == (dataset != "pascal_context")  # whose background is a class


def test_a_recipe_is_reduced_as_little_as_needed():
    tiny, large = get_recipe("ade20k_vit_tiny_sa"), get_recipe("ade20k_vit_large_640_sa")
    assert reduce_recipe(tiny, 64 * 2**30) == (tiny, [])
    small, sentences = reduce_recipe(large, 64 * 2**30)
    assert (small.model.encoder, small.optimization.batch_size) == ("vit_large_patch16_384", 1)
    assert sentences == ["1 images a step instead of 8"]
    smaller, sentences = reduce_recipe(large, 7 * 2**30)
    assert (smaller.model.encoder, smaller.optimization.batch_size) == ("vit_base_patch16_384", 1)
    assert "does not fit into the 7.0 GiB of free memory" in sentences[1]
    base = get_recipe("ade20k_vit_base_sa")
    assert reduce_recipe(base, 64 * 2**30)[0].optimization.batch_size == 2


def test_somebodys_data_are_taken_from_the_first_image_on(dataset_folder, tmp_path):
    """The fixture has 5 training images: three batches of 8 cannot be made of them, one of 5 can."""
    recipe = get_recipe("ade20k_vit_tiny_sa")
    small, found, reduced = take_data(recipe, dataset_folder)
    assert (small.optimization.batch_size, small.optimization.epochs) == (5, 10)
    assert (small.data.train_split, small.data.test_split) == ("train[:5]", "validation[:2]")
    assert found.endswith("train 5, validation 3, test 2") and "5 images a step, as there are no more" in reduced
    small, _, _ = take_data(recipe.replace(batch_size=2, validation_split="test[1:]"), dataset_folder)
    assert (small.optimization.epochs, small.data.train_split) == (5, "train[:4]")
    assert (small.data.validation_split, small.data.test_split) == ("test[1:]", "test[1:]")
    small, _, reduced = take_data(recipe.replace(validation_split="val"), dataset_folder)
    assert small.data.test_split == "train[:2]" and "as there is no val split" in reduced[-2]
    with pytest.raises(ValueError, match=r"Got train_split='train\[:3\]', needed one of the splits"):
        take_data(recipe.replace(train_split="train[:3]"), dataset_folder)


@pytest.mark.parametrize("name", ["cityscapes_vit_large_mask_transformer", "ade20k_vit_small_ca"])
def test_a_reduced_recipe_is_one_command_line(name):
    recipe = get_recipe(name)
    changed = recipe.replace(batch_size=1, push_to_hub=None, num_workers=0, train_split="train[:5]", photometric=False)
    assert get_recipe(name).override(overrides_of(changed)) == changed
    assert overrides_of(recipe) == []


def test_random_encoders_are_read_as_pretrained_ones(tmp_path):
    """At 384 pixels, as timm's are: position embeddings are resized, and a classifier is there to be dropped."""
    timm = pytest.importorskip("timm", reason="timm says what its own names are")
    folder = write_random_encoder("vit_tiny_patch16_384", tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    timm.create_model("vit_tiny_patch16_384").load_state_dict(weights, strict=True)
    recipe = get_recipe("ade20k_vit_tiny_sa").override(SMALL).replace(backbone=str(folder))
    model = build_model(recipe)
    assert torch.equal(model.encoder.layers[11].mlp.fc1.weight, weights["blocks.11.mlp.fc1.weight"])
    assert weights["pos_embed"].shape[1] == 1 + 24 * 24
    assert model.encoder.embeddings.position_embeddings.shape[1] == 1 + 4 * 4


@pytest.mark.parametrize(
    ("name", "size", "scale", "windows"),
    [
        ("cityscapes_vit_large_sa", (1024, 2048), 1.0, 2 * 3),
        ("cityscapes_vit_large_sa", (1024, 2048), 0.5, 1 * 3),  # 512 x 1024, enlarged to 768 x 1536
        ("ade20k_vit_small_sa", (512, 683), 1.0, 1 * 2),
        ("ade20k_vit_small_sa", (512, 683), 1.75, 2 * 3),  # 896 x 1195
        ("pascal_context_vit_large_sa", (375, 500), 1.0, 2 * 2),  # 520 x 693
    ],
)
def test_windows_of_the_published_protocol(name, size, scale, windows):
    assert windows_of(get_recipe(name), size, scale) == windows
    assert windows_of(get_recipe(name), size[::-1], scale) == windows


def test_all_rows_are_rehearsed_in_turn(tmp_path, monkeypatch, rehearsed, capsys):
    """What has a record is not rehearsed again; what fails does not stop the others; the table has all records."""
    started = []

    def run(command):
        name, path = command[3], Path(command[-1])
        started.append(name)
        assert command[1:3] == ["-m", "training.train"] and command[4:6] == ["--rehearse", "--record"]
        if name != "ade20k_vit_small_ca":
            path.write_text(json.dumps(rehearsed[1] | {"recipe": name}))
        return SimpleNamespace(returncode=int(name == "ade20k_vit_small_ca"))

    monkeypatch.setattr(subprocess, "run", run)
    tmp_path = tmp_path / "records"
    assert rehearse.main([str(tmp_path), "ade20k_vit_small_ca"]) == 1  # the folder is made, and holds no table
    assert not list(tmp_path.iterdir())
    started.clear()
    (tmp_path / "ade20k_vit_tiny_sa.json").write_text(json.dumps(rehearsed[1]))
    names = ["ade20k_vit_tiny_sa", "ade20k_vit_small_ca", "ade20k_vit_small_sa"]
    assert rehearse.main([str(tmp_path), *names]) == 1
    assert started == names[1:]
    assert "1 rehearsals failed: ade20k_vit_small_ca" in capsys.readouterr().err
    table = (tmp_path / "README.md").read_text()
    assert "| ade20k_vit_tiny_sa | vit_tiny_patch16_384 | 2 of 2 |" in table and "| ade20k_vit_small_sa |" in table
    assert "the same weights, bit for bit" in table and "small_ca" not in table
    assert rehearse.main([str(tmp_path), "ade20k_vit_huge_sa"]) == 1
    assert "Unknown recipe 'ade20k_vit_huge_sa'" in capsys.readouterr().err


def test_the_table_shows_the_records(rehearsed):
    record = json.loads(json.dumps(rehearsed[1]))
    record["cost"]["hours"]["8"] = {"float32": 12.345, "TF32": 2.0, "bf16": 1.0}
    record["rehearsed"]["peak_bytes"] = 5 * 2**30
    record["seconds"] = 90.0
    [first, second] = [line for line in render_rehearsals([record]).splitlines() if line.startswith("| ade20k")]
    flops = f"{record['cost']['flops_per_step'] / 1e12:.2f}"
    assert first.split(" | ")[3:6] == [flops, "5.0", "1.5"]
    assert "| 12.3 | 2 | 1 |" in second and second.endswith("| - |")
    assert f"8 cards at {ASSUMED_SCALING[8]:.0%} each" in render_rehearsals([record])


def test_rows_of_the_paper_are_all_recipes_with_a_published_encoder():
    rows = rows_of_the_paper()
    assert rows[0].startswith("ade20k_vit_tiny") and len(rows) == 18
    assert set(rows) == {name for name in RECIPES if get_recipe(name).model.encoder in ENCODER_PRESETS}


def test_a_stage_that_fails_says_where_and_shows_the_log(tmp_path):
    said = []
    under_way = Rehearsal(get_recipe("ade20k_vit_tiny_sa"), tmp_path, say=said.append)
    with under_way.stage("reading") as found:
        print("seen")
        found["result"] = "three images"
    with pytest.raises(RuntimeError, match=r"(?s)failed at training: no memory.*step 3"), under_way.stage("training"):
        print("step 3")
        raise ValueError("no memory")
    assert [each["stage"] for each in under_way.stages] == ["reading"] and "three images" in said[0]
    assert (tmp_path / "rehearsal.log").read_text() == "== reading\nseen\n== training\nstep 3\n"


def test_help_of_a_rehearsal_is_its_own(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--rehearse", "--help"])
    assert stopped.value.code == 0 and "made data if none" in capsys.readouterr().out
