"""Cached features against the encoder itself, and training squares against whole images."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_fake_cuda, tiny_config, tiny_model
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.vit import LayerRecord
from training.data.features import DecoderOnFeatures, FeatureDataset, encode
from training.data.samples import SegmentationDataset
from training.recipes import camvid_dinov2_small

# Photographs of 30 x 44 pixels: 32 x 48 after padding, 4 x 6 patches of 8.
PROCESSOR = DepictImageProcessor(size={"height": 30, "width": 44})


@pytest.fixture
def samples() -> SegmentationDataset:
    """The label of each pixel is a number of its patch and column: a wrong area gives wrong ids."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:30, :44]
    ids = (rows // 8 * 60 + columns).astype(np.uint8)
    photos = [Image.fromarray(rng.integers(0, 256, (30, 44, 3), dtype=np.uint8)) for _ in range(3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    columns = {"image": photos, "label": [Image.fromarray(ids)] * 3}
    dataset = datasets.Dataset.from_dict(columns, features=features, split="train")
    return SegmentationDataset(dataset, num_labels=255)


def padded(samples, index, mirror=False):
    pixel_values = PROCESSOR(samples[index]["image"], return_tensors="pt")["pixel_values"]
    return F.pad(pixel_values.flip(-1) if mirror else pixel_values, (0, 4, 0, 2))


def test_the_decoder_gives_the_whole_models_logits(samples, tmp_path):
    """float16 storage is the only difference; gradients reach the shared decoder."""
    model = tiny_model("sa", num_labels=5)
    dataset = FeatureDataset(model, samples, PROCESSOR, tmp_path)
    item = dataset[1]
    decoder = DecoderOnFeatures(model)
    logits = decoder(item["features"][None]).logits
    torch.testing.assert_close(logits, model(padded(samples, 1)).logits, atol=2e-2, rtol=0)
    logits = decoder(item["features"][None], input_size=item["input_size"][None]).logits
    expected = model(padded(samples, 1)[..., :30, :44]).logits
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=0)
    assert torch.equal(item["labels"], samples[1]["labels"])

    labels = torch.randint(0, 5, (1, 32, 48))
    loss = decoder(item["features"][None], labels).loss
    torch.testing.assert_close(loss, model(padded(samples, 1), labels=labels).loss, atol=1e-2, rtol=0)
    loss.backward()
    assert model.decoder.class_tokens.grad.abs().sum() > 0
    assert not any(name.startswith("encoder") for name, _ in decoder.named_parameters())


def test_squares_hold_features_and_labels_of_one_area(samples, tmp_path):
    model = tiny_model("linear")
    dataset = FeatureDataset(model, samples, PROCESSOR, tmp_path, crop_size=23, seed=3)  # two patches of 8
    corners = set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        item = dataset[0]
        assert item["labels"].shape == (16, 16)
        found = []
        for mirror in (False, True):
            patches = model.encoder(padded(samples, 0, mirror), LayerRecord())[0][0].unflatten(0, (4, 6))
            labels = samples[0]["labels"].flip(-1) if mirror else samples[0]["labels"]
            labels = F.pad(labels, (0, 4, 0, 2), value=255)
            for top in range(3):
                for left in range(5):
                    square = patches[top : top + 2, left : left + 2]
                    if torch.allclose(square, item["features"].float(), atol=1e-2):
                        found.append((mirror, top, left))
                        rows, columns = slice(8 * top, 8 * top + 16), slice(8 * left, 8 * left + 16)
                        assert torch.equal(item["labels"], labels[rows, columns].byte())
        assert len(found) == 1
        corners.add(found[0])
    assert {corner[0] for corner in corners} == {False, True}
    assert len({corner[1:] for corner in corners}) > 4


def test_samples_depend_on_seed_epoch_and_index_alone(samples, tmp_path):
    model = tiny_model("linear")
    first, second, other = (
        FeatureDataset(model, samples, PROCESSOR, tmp_path, crop_size=16, seed=seed) for seed in (0, 0, 1)
    )
    items = [[dataset[index]["labels"] for index in range(3)] for dataset in (first, second, other)]
    assert all(torch.equal(*pair) for pair in zip(items[0], items[1], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(items[0], items[2], strict=True))


def test_features_are_computed_once_and_after_an_interruption_completed(samples, tmp_path, monkeypatch):
    model = tiny_model("linear")
    dataset = FeatureDataset(model, samples, PROCESSOR, tmp_path)
    expected = dataset[2]["features"]
    files = sorted(dataset.folder.iterdir())
    assert [path.name for path in files] == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    files[2].unlink()
    calls = []
    monkeypatch.setattr(model.encoder, "forward", lambda *a, f=model.encoder.forward: calls.append(1) or f(*a))
    assert torch.equal(FeatureDataset(model, samples, PROCESSOR, tmp_path)[2]["features"], expected)
    assert len(calls) == 1


def test_other_weights_or_another_size_have_other_features(samples, tmp_path):
    model = tiny_model("linear")
    before = FeatureDataset(model, samples, PROCESSOR, tmp_path)
    larger = FeatureDataset(model, samples, DepictImageProcessor(size={"height": 64, "width": 48}), tmp_path)
    assert larger[0]["features"].shape == (8, 6, 24)
    with torch.no_grad():
        model.encoder.norm.weight[0] += 1
    after = FeatureDataset(model, samples, PROCESSOR, tmp_path)
    assert len({before.folder, larger.folder, after.folder}) == 3
    assert not torch.equal(before[0]["features"], after[0]["features"])


@needs_fake_cuda
def test_features_are_computed_on_the_accelerator():
    """Fake CUDA tensors raise where devices mix and where a value is read back to the host."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"), no_init_weights():
            encoder = DepictForSemanticSegmentation(tiny_config("linear")).encoder.eval()
        features = encode(encoder, torch.rand(1, 3, 30, 44, device="cuda"), 8, autocast=False)
    assert (features.device.type, features.dtype, tuple(features.shape)) == ("cuda", torch.float16, (4, 6, 24))


def test_caching_needs_a_frozen_encoder():
    with pytest.raises(ValueError, match="freeze the encoder or do not cache"):
        camvid_dinov2_small("sa").override(["cache_features=true", "freeze_encoder=false"])
