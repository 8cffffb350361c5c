"""The model that comes with the package: found from anywhere, computing and fine-tuning in single precision."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor, default_model, load_model, loading
from depict_hf.loading import DEFAULT_MODEL

STREET = Path(__file__).parent / "data" / "street.jpg"


def test_it_is_found_from_anywhere(tmp_path, monkeypatch):
    """Also where a folder called `default` lies in the working directory: that one is `./default`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()
    for model, image_processor in (default_model(), load_model("default")):
        assert not model.training and model.dtype == torch.float32
        assert model.config.id2label[3] == "road" and isinstance(image_processor, DepictImageProcessor)
    with pytest.raises(ValueError, match=r"cannot load the model \./default"):
        load_model("./default")


def test_its_windows_overlap():
    """Fails if the borders of windows show in label maps again."""
    config = default_model()[0].config
    assert config.window_stride < 0.55 * config.window_size


def test_another_dtype_is_had_by_asking():
    assert default_model(dtype="bfloat16")[0].dtype == torch.bfloat16


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_MODEL", tmp_path)
    with pytest.raises(FileNotFoundError, match="carries no model; name one"):
        default_model()


def test_fine_tuning_as_the_guides_of_transformers_do_does_not_collapse():
    """Fails where the weights are left in the half precision of their file: Adam's epsilon of 1e-8 is zero there.

    Labels are the model's own, so that it starts near perfect, and three steps at a usual rate must leave it there.
    """
    model = DepictForSemanticSegmentation.from_pretrained(DEFAULT_MODEL)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    image_processor = DepictImageProcessor.from_pretrained(DEFAULT_MODEL)
    photo = PIL.Image.open(STREET).convert("RGB").resize((196, 140))
    inputs = image_processor(photo, size={"height": 140, "width": 196}, return_tensors="pt")
    with torch.no_grad():
        [labels] = image_processor.post_process_semantic_segmentation(model.eval()(**inputs), [(140, 196)])
    assert len(np.unique(labels)) > 3

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for _ in range(3):
        loss = model(**inputs, labels=labels[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        [after] = image_processor.post_process_semantic_segmentation(model.eval()(**inputs), [(140, 196)])
    assert (after == labels).float().mean() > 0.8
