import json

import pytest
import torch
from conftest import tiny_model

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.hub import save_half_precision


def test_half_precision_keeps_values_and_leaves_the_code_out(tmp_path):
    model = tiny_model("ca")
    model.save_pretrained(tmp_path / "full")
    DepictImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path / "full")
    save_half_precision(tmp_path / "full", tmp_path / "half")

    loaded = DepictForSemanticSegmentation.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    assert (tmp_path / "half" / "model.safetensors").stat().st_size < 0.7 * (
        tmp_path / "full" / "model.safetensors"
    ).stat().st_size
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert DepictImageProcessor.from_pretrained(tmp_path / "half").size.shortest_edge == 48
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "auto_map" not in config and config["dtype"] == "float32"


def test_weights_beyond_half_precision_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.class_tokens[0, 0, 0] = 1e5
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"Weights of decoder\.class_tokens exceed float16"):
        save_half_precision(tmp_path / "full", tmp_path / "half")
