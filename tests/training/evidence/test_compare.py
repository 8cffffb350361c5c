"""The comparison of decoders: statistics against their definitions, and whole runs on a tiny backbone."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, save_backbone, save_scenes, tiny_model
from PIL import Image

from depict_hf import DepictImageProcessor
from depict_hf.configuration_depict import published_decoder_fields
from depict_hf.inference import segment
from depict_hf.vit import LayerRecord
from depict_hf.windows import pad_to_multiple
from training import compare as command_module
from training.data.features import DecoderOnFeatures
from training.evaluation.metrics import MeanIoU
from training.evidence import compare
from training.evidence.comparison_report import (
    build_report,
    judge_claim,
    paired_difference,
    render_markdown,
    t_quantile,
)

RUN_FIELDS = [
    f"class_names={','.join(CLASSES)}",
    "size=42",
    "crop_size=28",
    "batch_size=2",
    "warmup_steps=1",
    "precision=float32",
]


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The command sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory) -> str:
    """Photographs of 37 x 50 pixels, which is no multiple of the patch."""
    return str(save_scenes(tmp_path_factory.mktemp("scenes"), 37, 50, {"train": 5, "validation": 2, "test": 2}))


@pytest.fixture(scope="module")
def larger_backbone_folder(tmp_path_factory) -> str:
    return str(save_backbone(tmp_path_factory.mktemp("backbone"), image_size=42))


@pytest.fixture(scope="module")
def command(scenes_folder, larger_backbone_folder):
    """The command line with an output folder and further arguments."""

    def arguments(output: Path, *further: str) -> list[str]:
        fixed = ["--backbone", larger_backbone_folder, "--steps", "5", "--rates", "0.001", "0.01"]
        overrides = [argument for argument in further if "=" in argument]
        return [scenes_folder, str(output), *RUN_FIELDS, *overrides, *fixed, *further[len(overrides) :]]

    return arguments


@pytest.fixture(scope="module")
def compared(tmp_path_factory, command) -> Path:
    output = tmp_path_factory.mktemp("compared")
    assert command_module.main(command(output, "--decoders", "mask_transformer", "--seeds", "0", "1")) == 0
    assert command_module.main(command(output, "--decoders", "sa", "--seeds", "0", "1")) == 0
    return output


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_run_is_a_file(compared):
    names = [f"{kind}_{run}" for kind in ("mask_transformer", "sa") for run in ("seed0", "seed1")]
    names += [f"{kind}_trial_lr{rate}" for kind in ("mask_transformer", "sa") for rate in ("0.001", "0.01")]
    assert sorted(path.name for path in (compared / "runs").iterdir()) == sorted(f"{name}.json" for name in names)
    trials = {rate: read(compared / "runs" / f"sa_trial_lr{rate}.json") for rate in ("0.001", "0.01")}
    assert all(trial["test"] is None and trial["settings"]["seed"] == compare.TRIAL_SEED for trial in trials.values())
    best = max(trials, key=lambda rate: trials[rate]["validation"]["mean_iou"])
    runs = [read(compared / "runs" / f"sa_seed{seed}.json") for seed in (0, 1)]
    assert [run["settings"]["learning_rate"] for run in runs] == [float(best)] * 2
    assert runs[0]["losses"] != runs[1]["losses"]
    assert len(runs[0]["losses"]) == 5
    assert runs[0]["settings_hash"] != runs[1]["settings_hash"]


def test_report_of_two_processes_has_all_runs(compared):
    report = read(compared / "comparison.json")
    assert list(report["decoders"]) == ["mask_transformer", "sa"]
    scores = {
        name: [read(compared / "runs" / f"{name}_seed{seed}.json")["test"]["mean_iou"] for seed in (0, 1)]
        for name in ("mask_transformer", "sa")
    }
    for name, (first, second) in scores.items():
        summary = report["decoders"][name]
        assert summary["test"]["mean"] == pytest.approx((first + second) / 2)
        assert summary["test"]["deviation"] == pytest.approx(abs(first - second) / math.sqrt(2))
    difference = report["differences"][0]
    expected = [ours - theirs for ours, theirs in zip(scores["sa"], scores["mask_transformer"], strict=True)]
    assert (difference["first"], difference["second"]) == ("sa", "mask_transformer")
    assert list(difference["by_seed"].values()) == pytest.approx(expected)
    assert (compared / "comparison.md").read_text() == render_markdown(report)
    with Image.open(compared / "comparison.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 0


def test_one_seed_alone_gives_its_numbers_again(compared, command, tmp_path):
    """Neither the other decoders' runs nor the other seeds' enter into a run."""
    assert command_module.main(command(tmp_path, "--decoders", "sa", "--seeds", "1")) == 0
    first, second = (read(folder / "runs" / "sa_seed1.json") for folder in (compared, tmp_path))
    for name in ("settings", "settings_hash", "losses", "validation", "test"):
        assert first[name] == second[name], name


def test_finished_runs_are_skipped_and_missing_ones_made(compared, command, monkeypatch):
    path = compared / "runs" / "sa_seed0.json"
    before = read(path)
    path.unlink()
    trained = []
    train = compare.train_decoder
    monkeypatch.setattr(compare, "train_decoder", lambda *a: trained.append(a[0]) or train(*a))
    assert command_module.main(command(compared, "--decoders", "sa", "mask_transformer", "--seeds", "0", "1")) == 0
    assert [(recipe.model.decoder_type, recipe.optimization.seed) for recipe in trained] == [("sa", 0)]
    assert read(path)["losses"] == before["losses"]


def test_report_only_trains_and_measures_nothing(compared, command, monkeypatch):
    before = (compared / "comparison.md").read_text()
    (compared / "comparison.md").unlink()
    monkeypatch.setattr(compare, "build_model", None)
    assert command_module.main(command(compared, "--report-only")) == 0
    assert (compared / "comparison.md").read_text() == before


def test_runs_with_other_settings_are_not_taken(compared, command, capsys):
    arguments = command(compared, "--decoders", "sa", "--seeds", "0")
    arguments[arguments.index("--steps") + 1] = "7"
    assert command_module.main(arguments) == 1
    assert "(steps=5 there, 7 here); choose another OUTPUT, or delete the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["focal_gamma=2"], "'focal_gamma=2', which a comparison cannot change; did you mean"),
        (["--seeds", "1000"], "Got seed 1000, which chooses the learning rates; take another"),
        (["--steps", "0"], "Got steps=0, needed at least 1"),
        (["batch_size=6"], "Got 5 training images, needed at least one batch of 6"),
        (["--report-only"], "holds no finished runs"),
    ],
)
def test_what_cannot_be_compared_is_refused(command, tmp_path, capsys, further, message):
    assert command_module.main(command(tmp_path, *further)) == 1
    assert message in capsys.readouterr().err


def test_killed_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, killed)
    with pytest.raises(KeyboardInterrupt):
        compare.write_whole("{}", tmp_path / "sa_seed0.json")
    assert list(tmp_path.glob("*.json")) == []


def test_batches_are_permutations_that_depend_on_the_seed():
    batches = list(compare.training_batches(7, 3, 5, seed=1))
    assert [epoch for epoch, _ in batches] == [0, 0, 1, 1, 2]
    epochs = [batches[0][1] + batches[1][1], batches[2][1] + batches[3][1]]
    assert all(len(set(order)) == 6 and set(order) <= set(range(7)) for order in epochs)
    assert epochs[0] != epochs[1]
    assert batches == list(compare.training_batches(7, 3, 5, seed=1))
    assert batches != list(compare.training_batches(7, 3, 5, seed=2))


@pytest.mark.parametrize("photo_size", [(37, 50), (40, 48)])
def test_prediction_from_features_is_that_of_the_whole_model(decoder_type, photo_size):
    """To the pixel, where features are kept in float32; the second size needs no padding."""
    model = tiny_model(decoder_type)
    processor = DepictImageProcessor(size={"height": photo_size[0], "width": photo_size[1]})
    photo = np.random.default_rng(3).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    pixel_values = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        patches, grid_size = model.encoder(pad_to_multiple(pixel_values, 8), LayerRecord())
        features, input_size = patches[0].unflatten(0, grid_size), torch.tensor(photo_size)
        prediction = compare.predict(DecoderOnFeatures(model), features, input_size, (61, 83))
    assert torch.equal(prediction, segment(model, processor, [photo])[0])
    assert len(prediction.unique()) > 1


def test_evaluation_on_the_cache_is_that_of_the_whole_model(command, scenes_folder, larger_backbone_folder, tmp_path):
    """float16 storage moves a few pixels of the 3700 at most."""
    recipe = compare.comparison_recipe("sa", larger_backbone_folder, RUN_FIELDS)
    data = compare.load_data(recipe, scenes_folder, tmp_path)
    torch.manual_seed(0)
    model = compare.build_model(recipe).eval()
    torch.nn.init.normal_(model.decoder.class_tokens)
    torch.nn.init.normal_(model.decoder.mask_norm.bias, std=0.1)
    metric, samples = MeanIoU(len(CLASSES)), data.test.features.samples
    photos = [samples[index]["image"].permute(1, 2, 0).numpy() for index in range(2)]
    processor = data.test.features.image_processor
    metric.add_batch(predictions=segment(model, processor, photos), references=data.test.labels)
    expected, found = metric.compute(), compare.evaluate_decoder(DecoderOnFeatures(model), data.test)
    assert found["mean_iou"] == pytest.approx(expected["mean_iou"], abs=2e-3)
    assert list(found["per_class_iou"].values()) == pytest.approx(expected["per_category_iou"].tolist(), abs=5e-3)
    assert list(found["per_class_iou"]) == list(CLASSES)
    assert sum(value > 0 for value in found["per_class_iou"].values()) > 1


def test_a_decoder_learns(scenes_folder, larger_backbone_folder, tmp_path, monkeypatch):
    """Gradients are cleared between steps, the seed is that of the crops, and the schedule ends at zero."""
    recipe = compare.comparison_recipe("linear", larger_backbone_folder, RUN_FIELDS)
    recipe = recipe.replace(learning_rate=0.05, seed=5)
    data = compare.load_data(recipe, scenes_folder, tmp_path)
    optimizers = []
    create = compare.create_optimizer
    monkeypatch.setattr(compare, "create_optimizer", lambda *a: optimizers.append(create(*a)) or optimizers[0])
    decoder, losses = compare.train_decoder(recipe, 80, data.training)
    assert np.mean(losses[-20:]) < 0.8 * math.log(5)
    assert (data.training.seed, data.training.epoch) == (5, 39)
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert [group["lr"] for group in optimizers[0].param_groups] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_costs_are_those_of_the_formulas(larger_backbone_folder):
    """sa: three layers with two projections and two attention products each, then cosines; attention is most of it."""
    recipes = {
        name: compare.comparison_recipe(name, larger_backbone_folder, RUN_FIELDS)
        for name in ("sa", "ca", "mask_transformer", "linear")
    }
    costs = compare.measure_costs(recipes, (9, 12), repetitions=1)
    width, classes, patches, inner = 24, 5, 108, 300
    tokens = patches + classes
    layer = 2 * 2 * tokens * width * inner + 2 * 2 * tokens * tokens * inner
    sa = costs["decoders"]["sa"]
    assert sa["flops"] == 3 * layer + 2 * patches * classes * width
    norms = 2 * width * 4 + 2 * classes
    assert sa["parameters"] == 3 * (inner * width + 1) + classes * width + norms
    config = compare.build_model(recipes["ca"]).config
    inner, cross = config.decoder_num_heads * config.decoder_head_dim, config.decoder_num_heads
    cross *= config.decoder_cross_head_dim
    layers = config.decoder_num_layers * (4 * patches * width * inner + 4 * patches * patches * inner)
    reading = 2 * (patches + 2 * classes) * width * cross + 4 * classes * patches * cross
    expected = layers + config.decoder_cross_num_layers * reading + 2 * patches * classes * width
    assert costs["decoders"]["ca"]["flops"] == expected
    block = 2 * tokens * 12 * width * width + 2 * 2 * tokens * tokens * width
    projections = 2 * (patches + patches + classes) * width * width
    expected = 2 * block + projections + 2 * patches * classes * width
    assert costs["decoders"]["mask_transformer"]["flops"] == expected
    assert costs["decoders"]["linear"]["flops"] == 2 * patches * width * classes
    assert costs["grid_size"] == [9, 12]
    assert all(decoder["milliseconds"] > 0 for decoder in costs["decoders"].values())


def test_segmenters_decoder_is_the_published_one(larger_backbone_folder):
    """On a backbone of transformers too: not as deep as DEPICT's."""
    config = compare.build_model(
        compare.comparison_recipe("mask_transformer", larger_backbone_folder, RUN_FIELDS)
    ).config
    assert (config.decoder_num_layers, config.decoder_num_heads, config.decoder_dropout) == (2, 1, 0.1)
    assert published_decoder_fields("mask_transformer", 384)["decoder_num_heads"] == 6
    assert published_decoder_fields("sa", 384) == {}


@pytest.mark.parametrize("freedom", [1, 2, 4, 30, 200])
def test_quantiles_hold_95_percent_of_the_density(freedom):
    """With t = sqrt(v) tan(a) the density is proportional to cos(a)^(v - 1); fails for a one-sided quantile."""

    def area(limit: float) -> float:
        angles = torch.linspace(0, limit, 20001, dtype=torch.float64)
        return float(torch.trapezoid(angles.cos() ** (freedom - 1), angles))

    inside = area(math.atan(t_quantile(freedom) / math.sqrt(freedom))) / area(math.pi / 2)
    assert inside == pytest.approx(0.95, abs=1e-6)


def test_difference_is_paired_by_seed():
    """Differences 1, 2, 3 in percent: mean 2, deviation 1, interval 2 +- 4.303 / sqrt(3)."""
    difference = paired_difference({0: 0.41, 2: 0.53, 1: 0.52, 9: 0.1}, {2: 0.50, 1: 0.50, 0: 0.40})
    assert list(difference["by_seed"]) == ["0", "1", "2"]
    assert list(difference["by_seed"].values()) == pytest.approx([0.01, 0.02, 0.03])
    half = 0.04302652730 / math.sqrt(3)
    assert difference["mean"] == pytest.approx(0.02)
    assert difference["interval"] == pytest.approx([0.02 - half, 0.02 + half])
    assert paired_difference({0: 0.5}, {0: 0.4})["interval"] is None
    many = paired_difference(dict.fromkeys(range(40), 0.5), {seed: 0.4 + seed / 1000 for seed in range(40)})
    assert len(many["by_seed"]) == 40 and many["interval"][0] < many["mean"] < many["interval"][1]


@pytest.mark.parametrize(
    ("interval", "accuracy"),
    [([0.0, 0.02], "supported"), ([-0.03, -0.01], "contradicted"), ([-0.01, 0.02], "open"), (None, "open")],
)
def test_claim_follows_the_interval(interval, accuracy):
    decoders = {"sa": {"parameters": 9}, "mask_transformer": {"parameters": 100}}
    claim = judge_claim({"first": "sa", "second": "mask_transformer", "interval": interval}, decoders)
    assert claim == {"decoder": "sa", "parameter_ratio": 0.09, "smaller": True, "accuracy": accuracy}
    decoders["sa"]["parameters"] = 10
    assert not judge_claim({"first": "sa", "second": "mask_transformer", "interval": None}, decoders)["smaller"]


def a_run(decoder: str, seed: int, score: float, rate: float = 0.01, trial: bool = False, steps: int = 5) -> dict:
    scores = {"mean_iou": score, "per_class_iou": {"sky": score, "road": None}}
    settings = {"decoder_type": decoder, "seed": seed, "learning_rate": rate, "steps": steps}
    settings |= {"batch_size": 2, "crop_size": 28, "size": 42}
    run = {"name": f"{decoder}_{seed}", "trial": trial, "settings": settings, "validation": scores, "test": scores}
    return run | {"seconds": {"training": 1.0}, "losses": [1.0] * steps}


def costs_of(**parameters: int) -> dict:
    decoders = {name: {"parameters": count, "flops": 10**9, "milliseconds": 1.0} for name, count in parameters.items()}
    return {"grid_size": [3, 4], "threads": 1, "decoders": decoders}


def test_table_shows_the_report():
    runs = [a_run("sa", seed, score) for seed, score in enumerate((0.50, 0.52))]
    runs += [a_run("sa", 9, score, rate, trial=True) for rate, score in ((0.001, 0.3), (0.01, 0.4))]
    runs += [a_run("mask_transformer", seed, score) for seed, score in enumerate((0.40, 0.41))]
    table = render_markdown(build_report(runs, costs_of(sa=9000, mask_transformer=100000)))
    assert "| sa | 9,000 | 1.00 | 1.0 | 0.01 (edge of the grid) | 0.001: 30.00, 0.01: 40.00 | 2 |" in table
    assert "| 51.00 ± 1.41 |" in table
    assert "| sa - mask_transformer | +10.50 | +4.15 to +16.85 | +10.00, +11.00 |" in table
    assert '- sa: "at least as accurate" is supported' in table
    assert "9.0 % of Segmenter's decoder parameters, under a tenth" in table
    assert "| sky | 40.50 | 51.00 |\n| road | - | - |" in table


def test_report_refuses_runs_that_differ_and_missing_costs():
    runs = [a_run("sa", 0, 0.5), a_run("linear", 0, 0.5, steps=6)]
    with pytest.raises(ValueError, match="Runs sa_0 and linear_0 have other settings"):
        build_report(runs, costs_of(sa=1, linear=1))
    with pytest.raises(ValueError, match="The costs of linear were not measured"):
        build_report([runs[0], a_run("linear", 0, 0.5)], costs_of(sa=1))


def test_tables_in_the_repository_are_made_from_their_records():
    for path in (Path(__file__).parents[3] / "model_cards").glob("*/comparison.json"):
        assert path.with_suffix(".md").read_text() == render_markdown(read(path)), path
