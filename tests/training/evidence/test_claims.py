"""The planned experiment: its parts against definitions written out, and a whole tiny plan."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, save_backbone, save_scenes, tiny_model
from scipy.ndimage import binary_erosion

from depict_hf.inference import segment
from training import claims as command_module
from training.data import open_data
from training.evaluation.metrics import MeanIoU
from training.evidence.claims import build_claims, read_plan, render_claims, run_grid
from training.evidence.claims.maps import boundary_counts, count_maps
from training.evidence.claims.runs import best_rate
from training.evidence.claims.statistics import Difference, accuracy_difference, holm, mean_iou, retention_difference
from training.evidence.claims.tokens import MovingPart, entering_tokens, shuffled
from training.evidence.claims.verdicts import Hypothesis, judge
from training.recipe_model import build_model

PLAN = Path(__file__).parents[3] / "model_cards" / "claims" / "PLAN.md"
ALL = ("sa", "ca", "cbsa", "mask_transformer", "linear")
TINY = {
    "moving_blocks": 1,
    "datasets": {"scenes": {"squares_per_image": 2, "class_names": None}},
    "size": 42,
    "crop_size": 28,
    "batch_size": 2,
    "warmup_steps": 1,
    "learning_rates": {name: [1e-3, 1e-2] for name in ("sa", "mask_transformer", "linear")},
    "seeds": [0, 1],
    "resamples": 200,
    "noise": {"relative": [0.5], "absolute": [0.1], "draws": 3, "images": 2},
}


def write_plan(folder: Path, **changes) -> Path:
    """The plan of the repository with other settings."""
    text = PLAN.read_text(encoding="utf-8")
    before, rest = text.split("```json\n", 1)
    block, after = rest.split("```", 1)
    path = folder / "PLAN.md"
    path.write_text(f"{before}```json\n{json.dumps(json.loads(block) | changes)}\n```{after}", encoding="utf-8")
    return path


def test_a_plan_is_read_as_it_stands():
    plan = read_plan(PLAN)
    assert plan.seeds == (0, 1, 2, 3, 4) and plan.moving_blocks == 4 and plan.noise.draws == 10
    assert {len(rates) for rates in plan.learning_rates.values()} == {4}
    recipe = plan.recipe("sa", 1e-3, 3, None, CLASSES)
    assert recipe.optimization.learning_rate * recipe.optimization.encoder_rate_factor == pytest.approx(1e-4)
    assert recipe.optimization.seed == 3 and recipe.model.backbone == "facebook/dinov2-small"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": {"sa": [1e-3], "linear": [1e-3, 1e-2]}}, "as many for each"),
        ({"learning_rates": {"upernet": [1e-3]}}, "upernet"),
        ({"seeds": [0, 1000]}, "needed another one"),
        ({"seeds": [3, 3]}, "each once"),
        ({"epochs": 3}, "unknown.*epochs"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_plan(write_plan(tmp_path, **changes))


def test_any_change_of_the_settings_changes_the_digest(tmp_path):
    (tmp_path / "other").mkdir()
    assert read_plan(write_plan(tmp_path)).digest == read_plan(PLAN).digest
    other = write_plan(tmp_path / "other", level=0.01)
    assert read_plan(other).digest != read_plan(PLAN).digest


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return str(save_backbone(tmp_path_factory.mktemp("backbone"), image_size=42))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    folder = save_scenes(tmp_path_factory.mktemp("scenes"), 37, 50, {"train": 5, "validation": 2, "test": 3})
    (folder / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, backbone, scenes) -> tuple[Path, Path]:
    """The plan and the output of a whole tiny grid."""
    folder = tmp_path_factory.mktemp("claims")
    plan = write_plan(folder, **TINY)
    run_grid(read_plan(plan), folder / "output", {"scenes": scenes}, backbone)
    return plan, folder / "output"


def test_the_moving_part_continues_as_the_whole_model(backbone, tmp_path):
    """Float32, so that a block too many, a norm left out or a prefix token kept would show."""
    plan = read_plan(write_plan(tmp_path, **TINY))
    model = build_model(plan.recipe("sa", 1e-3, 0, backbone, CLASSES)).eval()
    pixel_values = torch.randn(3, 3, 28, 28)
    with torch.inference_mode():
        whole = model(pixel_values).logits
        part = MovingPart(model, 1).eval()(entering_tokens(model, pixel_values, 1))
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)


def test_other_encoders_and_too_many_blocks_are_refused(backbone, tmp_path):
    with pytest.raises(ValueError, match="Dinov2Backbone"):
        MovingPart(tiny_model("sa"), 1)
    model = build_model(read_plan(write_plan(tmp_path, **TINY)).recipe("sa", 1e-3, 0, backbone, CLASSES))
    with pytest.raises(ValueError, match="moving blocks"):
        MovingPart(model, 12)


def test_batches_hold_every_square_once_in_an_order_of_the_seed():
    first, again, other = (list(shuffled(7, 2, seed)) for seed in (0, 0, 1))
    assert first == again != other
    flat = [index for batch in first for index in batch]
    assert len(flat) == 6 == len(set(flat)) and set(flat) < set(range(7))


def test_scores_are_those_of_the_saved_model(finished, scenes):
    """Saved weights, cached tokens and windows together predict what `segment` does with the folder, up to bfloat16."""
    from depict_hf.loading import load_model

    _, output = finished
    run = json.loads((output / "scenes" / "runs" / "linear_seed1.json").read_text())
    model, processor = load_model(output / "scenes" / "models" / "linear_seed1")
    samples = open_data(scenes).samples["test"]
    metric = MeanIoU(len(CLASSES))
    for index in range(len(samples)):
        sample = samples[index]
        [labels] = segment(model, processor, [sample["image"].permute(1, 2, 0).numpy()])
        metric.add_batch(predictions=[labels], references=[sample["labels"]])
    assert run["test"]["mean_iou"] == pytest.approx(metric.compute()["mean_iou"], abs=0.02)


def test_only_what_the_plan_moves_has_moved(finished, backbone):
    from safetensors.torch import load_file

    _, output = finished
    trained = load_file(output / "scenes" / "models" / "sa_seed0" / "model.safetensors")
    start = load_file(Path(backbone) / "model.safetensors")
    moved = {
        name
        for name, value in start.items()
        if not torch.equal(value, trained[f"encoder.backbone.{name.removeprefix('dinov2.')}"])
    }
    last = max(int(name.split("layer.")[1].split(".")[0]) for name in start if "layer." in name)
    assert moved and all(f"layer.{last}." in name or "layernorm" in name for name in moved)


def test_trials_do_not_see_the_test_split_and_choose_by_validation(finished):
    _, output = finished
    runs = {path.stem: json.loads(path.read_text()) for path in (output / "scenes" / "runs").glob("*.json")}
    assert len(runs) == 3 * (2 + 2)
    trials = {run["learning_rate"]: run for name, run in runs.items() if name.startswith("sa_trial")}
    assert all("test" not in run for run in trials.values())
    best = max(sorted(trials), key=lambda rate: trials[rate]["validation"]["mean_iou"])
    assert runs["sa_seed0"]["learning_rate"] == runs["sa_seed1"]["learning_rate"] == best
    assert best_rate({0.1: 0.5, 0.01: 0.5, 1.0: 0.4}) == 0.01


def test_a_grid_goes_on_and_refuses_another_plan(finished, scenes, backbone, tmp_path):
    plan, made = finished
    output = shutil.copytree(made, tmp_path / "output")
    path = output / "scenes" / "runs" / "linear_seed0.json"
    before, kept = path.read_text(), (output / "scenes" / "runs" / "sa_seed0.json").stat().st_mtime_ns
    path.unlink()
    (output / "scenes" / "models" / "sa_seed1" / "model.safetensors").unlink()  # no longer needed
    run_grid(read_plan(plan), output, {"scenes": scenes}, backbone)
    again, first = json.loads(path.read_text()), json.loads(before)
    assert again["losses"] == first["losses"] and again["test"] == first["test"]
    assert (output / "scenes" / "runs" / "sa_seed0.json").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="weight_decay"):
        run_grid(read_plan(write_plan(tmp_path, **TINY, weight_decay=0.5)), output, {"scenes": scenes}, backbone)
    with pytest.raises(ValueError, match="mars"):
        run_grid(read_plan(plan), output, {"mars": scenes}, backbone)


def test_confusion_is_that_of_the_metric():
    generator = torch.Generator().manual_seed(0)
    maps = [[torch.randint(0, 4, (9, 7), generator=generator) for _ in range(2)] for _ in range(3)]
    for _, labels in maps:
        labels[0, :3] = 255
    counts, metric = count_maps(maps, 4), MeanIoU(4)
    metric.add_batch(predictions=[each[0] for each in maps], references=[each[1] for each in maps])
    assert counts.scores("abcd")["mean_iou"] == pytest.approx(metric.compute()["mean_iou"], abs=1e-12)
    assert counts.confusion.shape == (3, 4, 4)


def test_boundaries_are_what_erosion_removes():
    """By the published definition, class by class: a mask without its erosion, where the border erodes too."""
    rng = np.random.default_rng(0)
    labels, prediction = (np.kron(rng.integers(0, 3, (6, 8)), np.ones((20, 20), int)) for _ in range(2))
    labels[:30, :10] = 255
    width = round(0.02 * np.hypot(*labels.shape))
    assert width > 1
    both, either = boundary_counts(prediction, labels, 3)
    square = np.ones((2 * width + 1, 2 * width + 1))
    for index in range(3):
        edges = [
            mask & ~binary_erosion(mask, square) & (labels != 255) for mask in (labels == index, prediction == index)
        ]
        assert both[index] == (edges[0] & edges[1]).sum() > 0
        assert either[index] == (edges[0] | edges[1]).sum()


def random_counts(seeds: int, images: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, (seeds, images, 3, 3))


def test_differences_and_their_resamples_follow_the_definition():
    first, second = random_counts(3, 6, 0), random_counts(3, 6, 1)
    found = accuracy_difference(first, second, 300, seed=5)

    def score(counts: np.ndarray) -> float:
        total = counts.sum(axis=0)
        hits = total.diagonal()
        return float((hits / (total.sum(0) + total.sum(1) - hits)).mean())

    by_seed = [score(one) - score(other) for one, other in zip(first, second, strict=True)]
    np.testing.assert_allclose(found.by_seed, by_seed, atol=1e-12)
    assert found.value == pytest.approx(np.mean(by_seed))
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(2000):
        seeds, images = rng.integers(3, size=3), rng.integers(6, size=6)
        drawn.append(np.mean([score(first[seed][images]) - score(second[seed][images]) for seed in seeds]))
    many = accuracy_difference(first, second, 4000, seed=5)
    np.testing.assert_allclose(many.interval(), np.quantile(drawn, [0.025, 0.975]), atol=0.01)
    assert many.p_not_above(0.0) == pytest.approx(np.mean(np.array(drawn) <= 0), abs=0.04)


def test_equal_decoders_differ_by_nothing():
    counts = random_counts(2, 4, 3)
    found = accuracy_difference(counts, counts, 50)
    assert found.value == 0 and found.interval() == (0, 0)
    assert found.p_not_above(0.0) == 1 and found.p_not_above(-0.01) == pytest.approx(1 / 51)
    with pytest.raises(ValueError, match="same seeds"):
        accuracy_difference(counts, counts[:1], 50)


def test_retained_shares_are_compared_by_seed_and_draw():
    first = np.array([[0.5, 0.6], [0.7, 0.8]])
    found = retention_difference(first, first - np.array([[0.1], [0.3]]), 400)
    assert found.value == pytest.approx(0.2) and found.by_seed == pytest.approx((0.1, 0.3))
    assert found.interval() == pytest.approx((0.1, 0.3))


def test_holm_multiplies_by_what_is_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_mean_iou_leaves_out_classes_that_are_nowhere():
    assert mean_iou(np.array([[2, 0, 0], [2, 4, 0], [0, 0, 0]])) == pytest.approx((2 / 4 + 4 / 6) / 2)


def made_test(shift: float, bound: float = 0.0, decoder: str = "sa") -> Hypothesis:
    """A hypothesis whose resamples lie around a difference, with a deviation of one point."""
    resampled = shift + 0.01 * np.random.default_rng(0).standard_normal(10_000)
    return Hypothesis(
        "H1", "camvid", decoder, "linear", "test mIoU", bound, 0.01, Difference(shift, (shift,), resampled)
    )


@pytest.mark.parametrize(
    ("shift", "bound", "verdict"),
    [(0.05, 0.0, "supported"), (0.005, 0.0, "open"), (-0.05, 0.0, "contradicted"), (0.02, -0.01, "supported")],
)
def test_verdicts_follow_the_corrected_p_values(shift, bound, verdict):
    [record] = judge(read_plan(PLAN), [made_test(shift, bound)])
    assert record["verdict"] == verdict and record["family"] == "primary"


def test_a_family_makes_each_of_its_tests_harder():
    """Two points up, once alone and once among four that say nothing."""
    plan = read_plan(PLAN)
    assert judge(plan, [made_test(0.02)])[0]["verdict"] == "supported"
    many = judge(plan, [made_test(0.02), *[made_test(0.0)] * 4, made_test(0.02, decoder="ca")])
    assert [record["verdict"] for record in many] == ["open"] * 5 + ["supported"]


def test_the_command_goes_from_plan_to_verdicts(finished, scenes, backbone, capsys):
    plan, output = finished
    before = torch.get_num_threads()
    arguments = [str(plan), str(output), f"scenes={scenes}", "--backbone", backbone]
    try:
        assert command_module.main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    assert "The plan is done." in capsys.readouterr().out
    claims = json.loads((output / "claims.json").read_text())
    assert claims["pending"] == [] and claims["plan"] == read_plan(plan).digest
    tests = {test["hypothesis"]: test for test in claims["tests"]}
    assert set(tests) == {"H1", "H3a", "H3b", "H4"}
    runs = [json.loads((output / "scenes" / "runs" / f"{name}_seed1.json").read_text()) for name in ("sa", "linear")]
    assert tests["H4"]["by_seed"][1] == pytest.approx(runs[0]["test"]["mean_iou"] - runs[1]["test"]["mean_iou"])
    folder = output / "scenes" / "noise"
    noise = [json.loads((folder / f"{name}_seed0.json").read_text()) for name in ("sa", "mask_transformer")]
    for each in noise:  # The draws differ: fails if a cache of rounded weights hides the noise.
        assert len({each["clean"], *each["relative"]["0.5"]}) > 1
    shares = [np.mean(each["absolute"]["0.1"]) / each["clean"] for each in noise]
    assert tests["H3b"]["by_seed"][0] == pytest.approx(shares[0] - shares[1])
    [parameters] = claims["parameters"]
    costs = claims["costs"]["datasets"]["scenes"]
    assert parameters["ratio"] == costs["sa"]["parameters"] / costs["mask_transformer"]["parameters"]
    text = (output / "README.md").read_text()
    assert text == render_claims(claims)
    for test in claims["tests"]:
        assert f"{test['hypothesis']} ({test['family']}): **{test['verdict']}**" in text
    assert (output / "claims.png").stat().st_size > 10_000


def test_what_is_missing_is_said(finished, tmp_path):
    plan, _ = finished
    claims = build_claims(read_plan(plan), tmp_path)
    assert len(claims["pending"]) == 3 * (2 + 2) + 2 * 2 + 1 and claims["tests"] == []
    assert "17 of the planned parts are missing" in render_claims(claims)


def test_a_family_is_judged_as_soon_as_all_it_needs_is_there(finished, tmp_path):
    """Here `ca` and `cbsa` are still to run: fails if they hold up the verdicts on `sa`, or are judged in part."""
    _, output = finished
    plan = read_plan(write_plan(tmp_path, **TINY | {"learning_rates": {name: [1e-3, 1e-2] for name in ALL}}))
    copy = shutil.copytree(output, tmp_path / "output")
    (copy / "scenes" / "plan.json").unlink()
    judged = build_claims(plan, copy)
    assert [(test["decoder"], test["hypothesis"]) for test in judged["tests"]] == [
        ("sa", "H1"),
        ("sa", "H4"),
        ("sa", "H3a"),
        ("sa", "H3b"),
    ]
    assert len([each for each in judged["pending"] if each != "costs"]) == 2 * (2 + 2) + 2 * 2
    (copy / "scenes" / "noise" / "sa_seed1.json").unlink()
    assert build_claims(plan, copy)["tests"] == []


@pytest.mark.parametrize(("arguments", "message"), [(["scenes"], "NAME=DATASET"), (["mars=there"], "mars")])
def test_wrong_arguments_end_in_a_line(finished, tmp_path, capsys, arguments, message):
    plan, _ = finished
    assert command_module.main([str(plan), str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_reasons_are_looked_for_in_models_and_in_other_starts(finished, scenes, backbone, tmp_path, capsys):
    """Fails if a change does not reach the run, the planned runs are not beside it, or figures are of other models."""
    from depict_hf.analysis import step_sizes
    from depict_hf.loading import load_model

    plan, output = finished
    copy = shutil.copytree(output, tmp_path / "output")
    arguments = [
        str(plan),
        str(copy),
        f"scenes={scenes}",
        "--backbone",
        backbone,
        "--explore",
        "sa",
        "mask_transformer",
    ]
    before = torch.get_num_threads()
    try:
        assert command_module.main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    found = json.loads((copy / "exploration.json").read_text())["scenes"]
    assert set(found) == {"sa", "mask_transformer"}
    model, _ = load_model(copy / "scenes" / "models" / "sa_seed1")
    assert found["sa"]["models"]["1"]["step_sizes"] == step_sizes(model).mean(dim=1).tolist()
    run = json.loads((copy / "scenes" / "runs" / "sa_seed1.json").read_text())
    name = found["sa"]["class_name"]
    assert found["sa"]["models"]["1"]["class_iou"] == run["test"]["per_class_iou"][name]
    assert found["sa"]["changed"]["as planned"]["1"]["mean_iou"] == run["validation"]["mean_iou"]
    starts = {
        change: json.loads((copy / "scenes" / "exploration" / f"sa_{change}_seed1.json").read_text())
        for change in ("positive", "small", "wide")
    }
    # After so few steps the start still shows.
    planned = found["sa"]["models"]["1"]["step_sizes"]
    assert starts["positive"]["step_sizes"] == pytest.approx([abs(step) for step in planned], abs=0.1)
    assert starts["small"]["step_sizes"] == pytest.approx([0.1 * step for step in planned], abs=0.1)
    assert starts["wide"]["largest_probability"] > found["sa"]["models"]["1"]["largest_probability"] + 0.1
    text = (copy / "EXPLORATION.md").read_text()
    assert "exploratory" in text and f"{100 * starts['wide']['validation']['mean_iou']:.2f}" in text
    assert command_module.main([*arguments[:-2], "linear"]) == 1
    assert "needed decoders with layers" in capsys.readouterr().err


def test_the_largest_probability_is_reached_by_one_cosine_apart_from_all_others():
    from training.evidence.claims.exploration import largest_probability

    model = tiny_model("sa")
    norm = model.decoder.mask_norm
    with torch.no_grad():
        norm.weight.fill_(1.3)
    cosines = torch.full((model.config.num_labels,), 0.1)
    cosines[0] = 0.9
    assert largest_probability(model) == pytest.approx(norm(cosines).softmax(0)[0].item(), abs=1e-3)
