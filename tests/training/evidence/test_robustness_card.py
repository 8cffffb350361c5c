"""The card of perturbed models: measured by the command, summarised, judged, rendered."""

import json

import pytest
import torch
from conftest import save_labelled_by, tiny_model

from depict_hf import DepictImageProcessor
from training import robustness as command
from training.evidence import perturbations, robustness_card, robustness_summary


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models, and a data set labelled by the first; relative names, as a card wants them."""
    root = tmp_path_factory.mktemp("card")
    encoder = tiny_model("sa").encoder
    for seed, name, kind in (
        (0, "sa_0", "sa"),
        (1, "sa_1", "sa"),
        (0, "mask_0", "mask_transformer"),
        (1, "mask_1", "mask_transformer"),
        (0, "linear_0", "linear"),
    ):
        model = tiny_model(kind)
        model.encoder = encoder
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.decoder.parameters():
            parameter.data += 0.1 * seed * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / name)
        DepictImageProcessor(size={"shortest_edge": 32}).save_pretrained(root / name)
    save_labelled_by(root / "dataset", root / "sa_0")
    return root


def test_the_command_writes_a_card_and_adds_to_it(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    card = tmp_path / "robustness_tiny"
    models = ["--group", "sa=sa_0,sa_1", "--group", "mask=mask_0,mask_1", "linear_0", "dataset"]
    common = ["--workers", "0", "--batch-size", "1", "--max-images", "2", "--card", str(card)]
    options = ["--draws", "3", "--sigmas", "0.01", "0.5", "--relative-sigmas", "0.5", "--label-size", "16"]
    about = ["--about", "Trained on two seeds."]
    assert command.main([*models, *common, *options, *about, "--perturb", "attention-noise", "feature-noise"]) == 0
    first = json.loads((card / "robustness.json").read_text())
    assert command.main([*models, *common, "--perturb", "views", "corruptions", "--corruptions", "fog:1", "fog:3"]) == 0
    record = json.loads((card / "robustness.json").read_text())
    assert list(record["sections"]) == ["attention-noise", "feature-noise", "corruptions", "views"]
    assert record["sections"]["attention-noise"] == first["sections"]["attention-noise"]
    text = (card / "README.md").read_text()
    assert text == robustness_card.render_card(record)
    assert (card / "robustness.png").stat().st_size > 10_000
    assert robustness_summary.verdict(record) in capsys.readouterr().out
    assert "linear_0: left out. A decoder of type 'linear' has no attention" in text
    assert "not ours" in text and "| 0.001 | 35.4 |  |" in text and "| 0.05 |  | 8 |" in text
    assert text.count("Trained on two seeds.") == 1 and "--about" not in text
    assert "--group sa=sa_0,sa_1" in text and str(tmp_path) not in text
    views = record["sections"]["views"]["models"]["sa_0"]
    assert list(views["scores"]) == [
        "scale 0.5", "scale 0.75", "scale 1.25", "other crops", "brightness x0.4", "brightness x0.7", "brightness x1.5"
    ]  # fmt: skip
    assert views["clean"] == record["sections"]["corruptions"]["models"]["sa_0"]["clean"]
    assert len(set(views["scores"].values())) > 4

    other = ["sa_0", "dataset", *common, "--perturb", "views"]
    assert command.main(other) == 1
    assert "holds a card of groups" in capsys.readouterr().err


def test_views_and_corruptions_are_those_of_the_evaluation(folders, monkeypatch, tmp_path):
    """Fails if models that share an encoder get each other's outputs, or a window stays set."""
    from training import evaluate

    monkeypatch.chdir(folders)
    common = ["--workers", "0", "--batch-size", "1", "--max-images", "3"]
    output = tmp_path / "all.json"
    arguments = ["sa_0", "sa_1", "dataset", *common, "--perturb", "corruptions", "views", "--corruptions", "contrast:3"]
    assert command.main([*arguments, "--output", str(output)]) == 0
    sections = json.loads(output.read_text())["sections"]
    for model in ("sa_0", "sa_1"):
        for options, found in (
            ([], sections["views"]["models"][model]["clean"]),
            (["--scales", "0.75"], sections["views"]["models"][model]["scores"]["scale 0.75"]),
            (
                ["--window-size", "16", "--window-stride", "16"],
                sections["views"]["models"][model]["scores"]["other crops"],
            ),
        ):
            alone = tmp_path / "alone.json"
            assert evaluate.main([model, "dataset", *common, *options, "--output", str(alone), "--overwrite"]) == 0
            assert json.loads(alone.read_text())["mean_iou"] == found
        alone = tmp_path / "alone.json"
        assert (
            evaluate.main(
                [model, "dataset", *common, "--corruption", "contrast:3", "--output", str(alone), "--overwrite"]
            )
            == 0
        )
        [expected] = json.loads(alone.read_text())["corruptions"]
        assert sections["corruptions"]["models"][model]["scores"]["contrast:3"] == expected["mean_iou"]


def noise_record(white: list[list[float]], black: list[list[float]], scale_sigmas=(0.0, 0.1, 0.2)) -> dict:
    """Two groups of two seeds, one scale; scores by level, the same but for a little per draw and seed."""

    def model(scores: list[float], seed: int) -> dict:
        levels = [[score + 0.001 * (seed + draw) for draw in range(3)] for score in scores]
        sizes = {"layers.0.projection": 0.05}
        scores = {"absolute": levels, "relative": levels}
        return {"clean": 0.5, "scores": scores, "removed": 0.1 + 0.2 * seed, "root_mean_squares": sizes}

    section = {
        "num_images": 3,
        "protocol": {"size": {"shortest_edge": 32}, "window_size": None, "window_stride": None},
        "draws": 3,
        "label_size": None,
        "sigmas": {"absolute": list(scale_sigmas), "relative": list(scale_sigmas)},
        "models": {
            f"{name}_{seed}": model(each, seed) for name, each in (("w", white), ("b", black)) for seed in (0, 1)
        },
    }
    groups = {
        "depict": {"decoder_type": "sa", "models": ["w_0", "w_1"]},
        "segmenter": {"decoder_type": "mask_transformer", "models": ["b_0", "b_1"]},
    }
    return {"dataset": "d", "split": "test", "groups": groups, "sections": {"attention-noise": section}}


@pytest.mark.parametrize(
    ("white", "black", "outcome"),
    [
        ([0.5, 0.4, 0.3], [0.5, 0.3, 0.3], "more robust"),
        ([0.5, 0.2, 0.3], [0.5, 0.3, 0.3], "less robust"),
        ([0.5, 0.4, 0.1], [0.5, 0.3, 0.3], "mixed"),
        ([0.6, 0.3, 0.3], [0.5, 0.3, 0.3], "undecided"),  # a difference at level 0 does not count
    ],
)
def test_verdicts(white, black, outcome):
    record = noise_record(white, black)
    sentence = (
        f"under absolute noise ({outcome}: depict) and under noise relative to each matrix's norm ({outcome}: depict)"
    )
    left = "with all of them at zero, these shares of the clean mIoU are left: depict 40 %, segmenter 40 %."
    assert f"{sentence}; {left}" in robustness_summary.verdict(record)
    assert "| all at zero | 20.00 (" in robustness_card.render_card(record)


def test_summary_of_noise():
    """Means over two seeds and three draws, by hand: 0.0015 is the mean of what seed and draw add."""
    curves = robustness_summary.summarize_sections(noise_record([0.5, 0.4, 0.1], [0.5, 0.3, 0.3]))
    each = curves["attention-noise"]["absolute"]["groups"]["depict"]
    assert [point["score"]["mean"] for point in each["curve"]] == pytest.approx([0.5015, 0.4015, 0.1015])
    assert each["curve"][1]["retained"]["mean"] == pytest.approx(0.4015 / 0.5)
    assert each["half_sigma"] == pytest.approx(0.1 + 0.1 * (0.4015 - 0.25) / 0.3)
    assert each["removed"]["mean"] == pytest.approx(0.2)
    [_, difference, _] = curves["attention-noise"]["absolute"]["differences"]["depict"]
    assert difference["mean"] == pytest.approx(0.2) and difference["interval"] == pytest.approx([0.2, 0.2])


def test_without_a_black_box_there_is_no_verdict_on_the_claim():
    record = noise_record([0.5, 0.4, 0.1], [0.5, 0.3, 0.3])
    record["groups"].pop("segmenter")
    assert robustness_summary.verdict(record).startswith("The paper's claim was not tested")
    record["sections"] = {}
    assert robustness_summary.verdict(record).startswith("Noise on the attention matrices, which")


def test_severities_count_as_one_kind():
    model = {"clean": 0.5, "scores": {"fog:1": 0.4, "fog:3": 0.2, "contrast:1": 0.1}}
    section = {"models": {"a": model, "b": {"clean": 0.25, "scores": {"fog:1": 0.2, "fog:3": 0.1, "contrast:1": 0.05}}}}
    record = {"groups": {"g": {"decoder_type": "sa", "models": ["a", "b"]}}, "sections": {"corruptions": section}}
    found = robustness_summary.summarize_sections(record)["corruptions"]["groups"]["g"]
    assert found["scores"]["fog"]["mean"] == pytest.approx((0.3 + 0.15) / 2)
    assert found["mean"]["mean"] == pytest.approx((0.2 + 0.1) / 2)
    assert found["retained"]["mean"] == pytest.approx(0.4) and found["retained"]["interval"] == pytest.approx(
        [0.4, 0.4]
    )


def test_brightness_clips():
    image = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1)
    assert perturbations.Brightness(1.5)(image, 0).flatten().tolist() == [0, 150, 255]
    assert str(perturbations.Brightness(0.4)) == "brightness x0.4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--group", "sa"], "Got --group 'sa', needed NAME=MODEL"),
        (["--group", "sa=sa_0", "--group", "sa=sa_1"], "Got the group sa more than once"),
        (["--group", "mixed=sa_0,mask_0"], "mixes decoders of types sa and mask_transformer"),
        (["sa_0", "--perturb", "feature-noise", "--draws", "0"], "Got --draws 0"),
        (["sa_0", "--perturb", "attention-noise", "--sigmas", "0.2", "0.1"], "needed ascending numbers"),
        (["sa_0", "--perturb", "views", "--flip"], "at one scale without flips"),
        (["--perturb", "views"], "Got no model"),
    ],
)
def test_command_line_refuses(folders, monkeypatch, change, message, capsys):
    monkeypatch.chdir(folders)
    assert (
        command.main(
            ["dataset", "--workers", "0", *change]
            if change[0] != "sa_0"
            else [change[0], "dataset", "--workers", "0", *change[1:]]
        )
        == 1
    )
    assert message in capsys.readouterr().err
