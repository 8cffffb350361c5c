"""The claims of the white box: what is measured, against the instruments and by hand, and the rule of the verdicts."""

import json

import pytest
import torch
from conftest import save_labelled_by, tiny_model

from depict_hf import DepictImageProcessor
from depict_hf.analysis import class_subspaces, rate_curves, record
from training import white_box as command
from training.evidence import white_box, white_box_card
from training.evidence import white_box_claims as claims

SUBSPACES = ("sa", "ca", "cbsa")


@pytest.mark.parametrize("decoder_type", [*SUBSPACES, "mask_transformer"])
def test_rates_are_those_of_the_instruments(decoder_type, pixel_values):
    model = tiny_model(decoder_type)
    recording = record(model, pixel_values[:1])
    found = white_box.rate_figures(model, recording)
    for name, options in (("raw", {}), ("unit", {"normalize": True}), ("seen", {"as_seen": True})):
        curves = rate_curves(model, recording, **options)
        if name != "seen":
            rates = curves.patch_rates_nats[0]
            assert found[f"rate_{name}"] == pytest.approx((rates[-1] - rates[0]).item())
        if decoder_type in SUBSPACES:
            pairs = curves.patch_compression_nats[0]
            assert found["curves"][f"compression_{name}"] == pytest.approx(pairs.numpy(), abs=1e-6)
            assert found[f"compression_{name}"] == pytest.approx((pairs[:, 1] - pairs[:, 0]).sum().item())
        else:
            assert f"compression_{name}" not in found


def test_seen_rates_take_each_layers_own_norm(pixel_values):
    """Fails if the last LayerNorm, or another layer's, is taken; or the step's tokens are not both normalised."""
    model = tiny_model("mask_transformer")
    for index, layer in enumerate(model.decoder.layers):
        layer.norm1.weight.data.fill_(2.0 + index)
    recording = record(model, pixel_values[:1])
    found = white_box.rate_figures(model, recording)["curves"]["rate_seen"]
    for index, pair in enumerate(found):
        for side, value in enumerate(pair):
            tokens = recording.patch_tokens[index + side][0].double()
            tokens = (tokens - tokens.mean(-1, keepdim=True)) / (
                tokens.var(-1, unbiased=False, keepdim=True) + 1e-5
            ).sqrt()
            tokens = (2 + index) * tokens
            gram = tokens.T @ tokens * 24 / (24 * 0.25)
            assert value == pytest.approx(0.5 * torch.logdet(torch.eye(24) + gram).item(), rel=1e-4)


def hand_made(decoder_type: str = "sa"):
    """A white box with orthonormal, mutually orthogonal heads and positive steps."""
    model = tiny_model(decoder_type, decoder_head_dim=8)
    for index, layer in enumerate(model.decoder.layers):
        torch.manual_seed(index)
        rows = torch.linalg.qr(torch.randn(24, 24))[0][:16]
        layer.projection.data.copy_(rows)
        layer.step_size.data.fill_(0.5)
    return model


def test_orthonormal_incoherent_heads():
    figures = white_box.weight_figures(hand_made())
    assert figures["deviation"] == pytest.approx(0, abs=1e-6) and figures["overlap"] == pytest.approx(0, abs=1e-6)
    assert figures["chance"] == pytest.approx(8 / 24) and figures["negative_steps"] == 0
    model = hand_made()
    model.decoder.layers[0].step_size.data.fill_(-1)
    model.decoder.layers[1].projection.data *= 2  # orthogonal, of length 2: P P^T = 4 I
    figures = white_box.weight_figures(model)
    assert figures["deviation"] == pytest.approx(3 / 2) and figures["deviation_any_scale"] == pytest.approx(0, abs=1e-3)
    assert figures["negative_steps"] == 0.5


def test_masks_by_hand():
    truth = torch.tensor([[0, 0, 1, 255], [0, 1, 0, 0], [1, 1, 0, 0]])
    labels = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 7]])
    # truth: 0 has two parts, 1 has two (a diagonal does not connect). labels, without the unlabelled patch: 0 has two,
    # 1 has two, 7 one.
    assert white_box.components_per_class(truth, truth) == 2
    assert white_box.components_per_class(labels, truth) == pytest.approx(5 / 3)
    # Of the 17 pairs of neighbours, two have an unlabelled patch.
    assert white_box.outline_share(truth, truth) == pytest.approx(7 / 15)
    assert white_box.outline_share(labels, truth) == pytest.approx(9 / 15)


def test_labels_are_those_at_the_patches_centres():
    """20 x 30 pixels at half the size of their label map; the grid reaches beyond the right side by padding."""
    model = tiny_model("linear")
    recording = record(model, torch.zeros(1, 3, 20, 35))
    assert recording.grid_size == (3, 5)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(70), indexing="ij")
    found = white_box.labels_on_grid(100 * rows + columns, recording, 8)
    expected = torch.tensor([[100 * row + column for column in (8, 24, 40, 56, 255)] for row in (8, 24)])
    assert found[:2, :4].tolist() == expected[:, :4].tolist()
    assert (found[:, 4] == 255).all() and (found[2] == 255).all()


def test_untrained_decoders_share_the_encoder_and_leave_the_generator(decoder_type):
    model = tiny_model(decoder_type)
    state = torch.random.get_rng_state()
    first, again, other = (white_box.untrained(model, seed) for seed in (5, 5, 6))  # the tiny model's is 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.encoder is model.encoder and not first.training
    for name, value in first.decoder.state_dict().items():
        assert torch.equal(value, again.decoder.state_dict()[name])
    names = [
        name
        for name, value in first.decoder.state_dict().items()
        if not torch.equal(value, other.decoder.state_dict()[name])
    ]
    assert names and any(
        not torch.equal(first.decoder.state_dict()[name], model.decoder.state_dict()[name]) for name in names
    )


def test_class_vectors_are_those_compared(pixel_values):
    model = tiny_model("sa")
    recording = record(model, pixel_values[:1])
    found = white_box.class_figures(model, recording)
    [expected] = class_subspaces(model, recording, center=True)
    assert (found["captured_centered"], found["best_centered"]) == (expected.captured, expected.best)
    assert found["span_chance"] == pytest.approx(5 / 24) and 0 < found["captured"] < found["best"] <= 1


GOOD = {
    **{f"{quantity}_{name}": -1.0 for quantity in ("rate", "compression") for name in ("raw", "unit", "seen")},
    **{"class_deviation": 0.05, "captured": 0.95, "best": 1.0, "captured_centered": 0.9, "best_centered": 0.95},
    **{"components": 1.2, "components_truth": 1.0, "variation": 0.1, "variation_truth": 0.1, "variation_lens": 0.2},
}
WEIGHTS = {"deviation": 0.05, "deviation_any_scale": 0.05, "overlap": 0.1, "chance": 0.3, "negative_steps": 0.0}
FRESH = {**GOOD, "class_deviation": 0.5, "captured": 0.5, "captured_centered": 0.4}
FRESH_WEIGHTS = {**WEIGHTS, "deviation_any_scale": 0.5, "overlap": 0.3}


def claims_record(
    kind: str = "sa", images: dict | None = None, weights: dict | None = None, spread: float = 0.0
) -> dict:
    """Two models of two images; `images` and `weights` replace figures of trained decoders."""
    groups = {"g": {"decoder_type": kind, "models": ["a", "b"]}}

    def model(figures: dict, of_weights: dict) -> dict:
        return {"weights": of_weights, "images": [{n: v + s for n, v in figures.items()} for s in (-spread, spread)]}

    own = model(GOOD | (images or {}), WEIGHTS | (weights or {}))
    fresh = model(FRESH, FRESH_WEIGHTS)
    return {"groups": groups, "models": {"a": own, "b": own}, "untrained": {"a": fresh, "b": fresh}}


def verdicts(record: dict) -> list[str]:
    return [each["verdict"] for each in claims.judge(record, "g").values()]


def test_claims_hold_where_every_required_margin_is_below_zero():
    assert verdicts(claims_record()) == ["holds"] * 4
    assert verdicts(claims_record("mask_transformer")) == ["holds", "not defined", "holds", "holds"]
    assert verdicts(claims_record("linear")) == ["not defined"] * 4


@pytest.mark.parametrize(
    ("claim", "images", "weights", "verdict", "failed"),
    [
        (0, {"rate_unit": 2.0}, {}, "holds in part", ["R falls, unit"]),
        (0, {name: 0.0 for name in GOOD if name.startswith(("rate", "compression"))}, {}, "does not hold", None),
        (1, {}, {"deviation": 0.11}, "holds in part", ["rows orthonormal"]),
        (1, {}, {"overlap": 0.16}, "holds in part", ["heads incoherent"]),
        (1, {}, {"deviation": 1, "deviation_any_scale": 0.6, "overlap": 0.3}, "does not hold", None),
        (2, {"captured_centered": 0.85}, {}, "holds in part", ["they span it, centred"]),
        (2, {"class_deviation": 0.6, "captured": 0.4, "captured_centered": 0.3}, {}, "does not hold", None),
        (3, {"variation": 0.13}, {}, "holds in part", ["not longer outlines than the ground truth"]),
        (3, {"variation": 0.3, "components": 1.3}, {}, "does not hold", None),
    ],
)
def test_verdicts_by_the_rule(claim, images, weights, verdict, failed):
    found = list(claims.judge(claims_record(images=images, weights=weights), "g").values())
    assert found[claim]["verdict"] == verdict
    assert failed is None or found[claim]["failed"] == failed
    assert [each["verdict"] for index, each in enumerate(found) if index != claim] == ["holds"] * 3


def test_an_interval_that_reaches_zero_does_not_count():
    """The mean of the change is -1, but of the two images one has +1."""
    assert verdicts(claims_record(spread=2.0))[0] == "does not hold"


def test_the_linear_decoder_is_compared_where_it_was_measured():
    record = claims_record()
    assert "fewer fragments than the linear decoder" not in claims.judge(record, "g")["Compact masks"]["tests"]
    record["groups"]["l"] = {"decoder_type": "linear", "models": ["c", "d"]}
    for name, components in (("c", 1.0), ("d", 2.0)):
        record["models"][name] = {"weights": {}, "images": [{"components": components}] * 2}
    margin = claims.judge(record, "g")["Compact masks"]["tests"]["fewer fragments than the linear decoder"]
    assert margin["mean"] == pytest.approx(1.2 - 1.5)


def test_the_command_writes_a_card(tmp_path, monkeypatch, capsys):
    """A hand-made decoder meets the claim on subspaces, one of random weights does not."""
    kinds = {
        "made": hand_made(),
        "random": tiny_model("sa"),
        "black": tiny_model("mask_transformer"),
        "lin": tiny_model("linear"),
    }
    for name, model in kinds.items():
        model.save_pretrained(tmp_path / name)
        DepictImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / name)
    save_labelled_by(tmp_path / "dataset", tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    arguments = [*kinds, "dataset", "--split", "test", "--max-images", "3", "--workers", "0", "--card", "card"]
    assert command.main([*arguments, "--about", "Made by hand."]) == 0
    record = json.loads((tmp_path / "card" / "white_box.json").read_text())
    card = (tmp_path / "card" / "README.md").read_text()
    assert card == white_box_card.render_card(record) and card in capsys.readouterr().out
    assert card.count("Made by hand.") == 1 and "--about" not in card
    assert (tmp_path / "card" / "white_box.png").stat().st_size > 10_000
    assert record["num_images"] == 3 and len(record["untrained"]["lin"]["images"]) == 3
    found = {name: claims.judge(record, name)["Subspaces"] for name in kinds}
    assert found["made"]["verdict"] == "holds" and found["black"]["verdict"] == "not defined"
    assert {"rows orthonormal", "heads incoherent"} <= set(found["random"]["failed"])
    line = next(each for each in card.splitlines() if each.startswith("| Each head's projection"))
    assert line.startswith("| Each head's projection is near orthonormal, and heads are incoherent. | holds | ")
    assert command.main(["made", "nothing-here", "--workers", "0"]) == 1
