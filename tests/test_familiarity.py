"""The distance of photographs from those that a model was trained on."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictImageProcessor, cli, default_model
from depict_hf.familiarity import Familiarity, fit_familiarity, load_familiarity, photograph_vector
from depict_hf.loading import DEFAULT_MODEL

STREET = Path(__file__).parent / "data" / "street.jpg"


def test_distance_is_that_of_the_normal_distribution():
    """Against the Mahalanobis distance with the covariance written out."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(50, 6, generator=generator) * torch.tensor([5.0, 3.0, 1.0, 1.0, 0.9, 1.1]) + 2
    fitted = Familiarity.fit(vectors, num_directions=2)
    across = torch.eye(6) - fitted.directions.T @ fitted.directions
    covariance = fitted.directions.T @ fitted.variances.diag() @ fitted.directions + fitted.rest * across
    for vector in (vectors[0], torch.full((6,), 9.0)):
        centred = vector - fitted.mean
        expected = (centred @ covariance.inverse() @ centred / 6).sqrt()
        assert fitted.distance(vector) == pytest.approx(expected.item(), rel=1e-4)
    squares = [fitted.distance(vector) ** 2 for vector in vectors]
    assert np.mean(squares) == pytest.approx(1, abs=0.05)


def test_it_needs_more_images_than_directions():
    with pytest.raises(ValueError, match="Got 9 images for 8 directions"):
        Familiarity.fit(torch.zeros(9, 24))


def test_it_is_kept_in_the_models_folder(tmp_path):
    model, image_processor = tiny_model(), DepictImageProcessor(size={"shortest_edge": 32})
    rng = np.random.default_rng(0)
    photos = [PIL.Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(12)]
    model.save_pretrained(tmp_path)
    assert load_familiarity(tmp_path) is None
    fitted = fit_familiarity(model, image_processor, photos, threshold=3)
    fitted.save(tmp_path)
    loaded = load_familiarity(tmp_path)
    vector = photograph_vector(model, image_processor, photos[0])
    assert vector.shape == (24,)
    assert loaded.distance(vector) == pytest.approx(fitted.distance(vector), rel=1e-4) and loaded.threshold == 3
    assert set(loaded.judge(model, image_processor, photos[0])) == {"distance"}
    assert "is unlike those" in loaded.judge(model, image_processor, PIL.Image.new("RGB", (60, 40)))["warning"]


def unlike_streets() -> dict[str, PIL.Image.Image]:
    """A page of text, noise, and a drawing."""
    page = PIL.Image.new("RGB", (600, 800), "white")
    draw = PIL.ImageDraw.Draw(page)
    for top in range(40, 760, 20):
        draw.text((40, top), "The quick brown fox jumps over the lazy dog, and so does everybody else.", fill="black")
    noise = np.random.default_rng(0).integers(0, 256, (360, 480, 3), dtype=np.uint8)
    chart = PIL.Image.new("RGB", (480, 360), "white")
    draw = PIL.ImageDraw.Draw(chart)
    for index in range(8):
        draw.rectangle((40 + 50 * index, 320 - 30 * index, 75 + 50 * index, 320), fill=(30 * index, 90, 200))
    return {"page": page, "noise": PIL.Image.fromarray(noise), "chart": chart}


def test_the_default_model_warns_of_what_is_no_street(tmp_path, capsys):
    photos = {name: tmp_path / f"{name}.png" for name in unlike_streets()}
    for name, picture in unlike_streets().items():
        picture.save(photos[name])
    street = str(STREET)
    options = ["--output", str(tmp_path / "out"), "--format", "npy", "--size", "140", "--window-size", "none"]
    assert cli.main(["segment", street, *map(str, photos.values()), *options]) == 0
    captured = capsys.readouterr()
    for path in photos.values():
        assert f"depict: {path}: this photograph is unlike those that the model was trained on" in captured.err
    assert f"depict: {street}" not in captured.err
    assert "was trained on road scenes filmed from a car in Cambridge (CamVid)" in captured.out.splitlines()[-1]


def test_half_precision_sees_the_same_distance():
    """Fails if the threshold of float32 does not hold for `--dtype bfloat16`."""
    photo, familiarity = PIL.Image.open(str(STREET)), load_familiarity(DEFAULT_MODEL)
    distances = [familiarity.judge(*default_model(dtype=dtype), photo)["distance"] for dtype in ("float32", "bfloat16")]
    assert distances[0] == pytest.approx(distances[1], abs=0.05)
