"""Noise on weights and features: what it falls on, how large it is, and that nothing of it stays."""

import pytest
import torch
from conftest import CLASSES, save_labelled_by, save_model, tiny_model

from training.data import SegmentationDataset, load_dataset_splits
from training.evaluation import Execution, evaluate
from training.evidence import noise
from training.evidence.perturbations import encoding_once

WITH_ATTENTION = ("sa", "ca", "cbsa", "mask_transformer")
SIGMAS = {"absolute": [0.0, 0.5], "relative": [0.0, 0.3]}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("noise")
    folder = save_labelled_by(root / "dataset", save_model(root / "model", "sa"))
    return SegmentationDataset(load_dataset_splits(str(folder))["test"], len(CLASSES))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("target", noise.TARGETS)
def test_without_noise_it_is_the_evaluated_score_and_weights_return(decoder_type, target, samples, image_processor):
    """Fails if the encoder's output, windows or labels differ from the normal path, or a weight keeps some noise."""
    model = tiny_model(decoder_type, window_size=28, window_stride=14)
    before = weights(model)
    photos = noise.encode_photos(model, image_processor, samples, range(len(samples)))
    record = noise.measure_noise(model, photos, target, SIGMAS, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if decoder_type == "linear" and target != "feature-noise":
        assert "decoder of type 'linear' has no" in record["left_out"]
        return
    expected = evaluate(model, image_processor, samples, execution=Execution(batch_size_images=1))["mean_iou"]
    assert record["clean"] == expected
    for scale in noise.TARGETS[target]:
        still, moved = record["scores"][scale]
        assert still == [expected, expected]
        assert moved[0] != moved[1] and expected not in moved


@pytest.mark.parametrize("decoder_type", WITH_ATTENTION)
def test_what_is_left_without_attention(decoder_type, samples, image_processor):
    """Fails if a matrix keeps its weights, or another parameter loses them."""
    model = tiny_model(decoder_type)
    photos = noise.encode_photos(model, image_processor, samples, range(len(samples)))
    record = noise.measure_noise(model, photos, "attention-noise", {"absolute": [0.1], "relative": [0.1]}, 1)
    for layer in (*model.decoder.layers, *getattr(model.decoder, "cross_layers", ())):
        if decoder_type == "mask_transformer":
            torch.nn.init.zeros_(layer.attention.qkv.weight)
            torch.nn.init.zeros_(layer.attention.projection.weight)
        elif decoder_type == "cbsa":
            torch.nn.init.zeros_(layer.projection.weight)
            torch.nn.init.zeros_(layer.output.weight)
        else:
            torch.nn.init.zeros_(layer.projection)
    expected = evaluate(model, image_processor, samples, execution=Execution(batch_size_images=1))["mean_iou"]
    assert record["removed"] == expected


def test_weights_return_after_an_error():
    model = tiny_model("mask_transformer")
    before, matrices = weights(model), noise.attention_matrices(model)
    normal = {name: torch.ones_like(matrix) for name, matrix in matrices.items()}
    with pytest.raises(RuntimeError, match="on purpose"), noise.added(matrices, normal):
        assert not torch.equal(
            model.state_dict()["decoder.layers.0.attention.qkv.weight"][0],
            before["decoder.layers.0.attention.qkv.weight"][0],
        )
        raise RuntimeError("on purpose")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("decoder_type", "names", "count"),
    [
        ("sa", {"layers.0.projection", "layers.1.projection"}, 2 * 32 * 24),
        (
            "ca",
            {f"{part}.{index}.projection" for part in ("layers", "cross_layers") for index in (0, 1)},
            2 * 32 * 24 + 2 * 16 * 24,
        ),
        ("cbsa", {f"layers.{index}.{name}" for index in (0, 1) for name in ("projection", "output")}, 4 * 32 * 24),
        (
            "mask_transformer",
            {f"layers.{index}.{name}" for index in (0, 1) for name in ("query", "key", "value", "output")},
            8 * 24 * 24,
        ),
    ],
)
def test_attention_parameters_are_the_matrices_named(decoder_type, names, count):
    model = tiny_model(decoder_type)
    before, matrices = weights(model), noise.attention_matrices(model)
    assert matrices.keys() == names
    with noise.added(matrices, {name: torch.ones_like(matrix) for name, matrix in matrices.items()}):
        changed = {name: value - before[name] for name, value in model.state_dict().items()}
    assert sum(int((value != 0).sum()) for value in changed.values()) == count
    for name, value in changed.items():
        assert not value.any() or torch.allclose(value, torch.ones_like(value), atol=1e-6), name


def test_relative_noise_is_sigma_times_the_root_mean_square(samples, image_processor, monkeypatch):
    """Of each matrix alone: query, key and value are stored as one."""
    model = tiny_model("mask_transformer")
    model.decoder.layers[0].attention.qkv.weight.data[:24] *= 100  # the query's
    matrices = {name: matrix.clone() for name, matrix in noise.attention_matrices(model).items()}
    given = []
    added = noise.added

    def watched(tensors, noise_by_name):
        given.append(noise_by_name)
        return added(tensors, noise_by_name)

    monkeypatch.setattr(noise, "added", watched)
    photos = noise.encode_photos(model, image_processor, samples, [0])
    sigmas = {"absolute": [0.2], "relative": [0.2]}
    record = noise.measure_noise(model, photos, "attention-noise", sigmas, 1)
    absolute, relative, _ = given
    for name, matrix in matrices.items():
        size = matrix.square().mean().sqrt()
        torch.testing.assert_close(relative[name], absolute[name] * size)
        assert record["root_mean_squares"][name] == pytest.approx(size.item())
        assert absolute[name].std().item() == pytest.approx(0.2, rel=0.15)  # 576 numbers
    assert record["root_mean_squares"]["layers.0.query"] > 50 * record["root_mean_squares"]["layers.0.key"]


def test_draws_are_those_of_every_other_model_and_differ_among_themselves():
    one, two = torch.zeros(40, 30), torch.ones(40, 30)
    first = noise.standard_normal("layers.0.projection", 0, one)
    assert torch.equal(first, noise.standard_normal("layers.0.projection", 0, two))
    others = [
        noise.standard_normal("layers.0.projection", 1, one),
        noise.standard_normal("layers.1.projection", 0, one),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_feature_noise_is_relative_to_each_photograph(samples, image_processor, monkeypatch):
    model = tiny_model("linear")
    photos = noise.encode_photos(model, image_processor, samples, [1, 3])
    given = []
    count = noise.confusion

    def watched(model, photo, patches=None):
        given.append((photo, patches))
        return count(model, photo, patches)

    monkeypatch.setattr(noise, "confusion", watched)
    record = noise.measure_noise(model, photos, "feature-noise", {"relative": [0.5]}, 1)
    sizes = []
    for photo, patches in given:
        if patches is not None:
            [batch] = photo.batches
            size = batch.patches.square().mean().sqrt().item()
            assert (patches[0] - batch.patches).square().mean().sqrt().item() == pytest.approx(0.5 * size, rel=0.1)
            sizes.append(size)
    assert record["root_mean_squares"]["features"] == pytest.approx(sum(sizes) / 2)


def test_label_maps_are_reduced_to_the_pixels_at_centres():
    labels = torch.arange(6 * 9).view(6, 9)
    assert noise.reduce_labels(labels, 2).tolist() == [[10, 13, 16], [37, 40, 43]]
    assert noise.reduce_labels(labels, 6) is labels and noise.reduce_labels(labels, None) is labels


def test_scores_at_reduced_label_maps(samples, image_processor):
    model = tiny_model("sa")
    [photo] = noise.encode_photos(model, image_processor, samples, [0], label_size=8)
    assert photo.labels.shape == (8, 12)
    logits = model(image_processor(samples[0]["image"], return_tensors="pt")["pixel_values"]).logits
    resized = torch.nn.functional.interpolate(logits, (8, 12), mode="bilinear")[0].argmax(0)
    labelled = photo.labels != 255
    found = noise.confusion(model, photo)
    assert found.sum() == labelled.sum()
    assert found.diagonal().sum() == (resized == photo.labels)[labelled].sum()


def test_models_of_one_encoder_run_it_once(samples, image_processor, pixel_values):
    """Fails if another input gets a stored output, or the encoder keeps its memory afterwards."""
    first, second = tiny_model("sa"), tiny_model("linear")
    second.encoder = first.encoder
    calls = []
    first.encoder.norm.register_forward_hook(lambda *_: calls.append(1))
    plain = [model(pixel_values).logits for model in (first, second)] + [first(pixel_values + 1).logits]
    assert len(calls) == 3
    with torch.inference_mode(), encoding_once([first, second]):
        shared = [model(pixel_values).logits for model in (first, second)] + [first(pixel_values + 1).logits]
    assert len(calls) == 5
    assert all(torch.equal(a, b) for a, b in zip(plain, shared, strict=True))
    first(pixel_values)
    assert len(calls) == 6


def test_refusals(samples, image_processor):
    model = tiny_model("sa")
    with pytest.raises(ValueError, match="label size of 0 pixels"):
        noise.encode_photos(model, image_processor, samples, [0], label_size=0)
    photos = noise.encode_photos(model, image_processor, samples, [0])
    photos[0].labels.fill_(255)
    with pytest.raises(ValueError, match="has a labelled pixel"):
        noise.measure_noise(model, photos, "attention-noise", SIGMAS, 1)
