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


def test_foreign_files_in_the_folder_stay_as_they_are(tmp_path):
    """Only the three files that it writes itself are replaced, also where they are there already."""
    tiny_model("sa").save_pretrained(tmp_path / "full")
    DepictImageProcessor().save_pretrained(tmp_path / "full")
    half = tmp_path / "half"
    half.mkdir()
    foreign = {
        "train.py": "print('mine')\n",
        "modeling_depict.py": "# an old copy\n",
        "metadata.json": '{"auto_map":  {"a": 1}}',
        "list.json": "[1,2]",
        "broken.json": "{",
        "notes/config.json": '{"auto_map": 1}',
    }
    (half / "notes").mkdir()
    for name, text in foreign.items():
        (half / name).write_text(text)
    (half / "config.json").write_text("{")  # of an interrupted run: replaced
    for _ in range(2):
        save_half_precision(tmp_path / "full", half)
        for name, text in foreign.items():
            assert (half / name).read_text() == text, name
        written = {path.name for path in half.iterdir()} - {name.partition("/")[0] for name in foreign}
        assert written == {"config.json", "model.safetensors", "preprocessor_config.json"}
        assert "auto_map" not in (half / "config.json").read_text()
        assert DepictForSemanticSegmentation.from_pretrained(half).config.decoder_type == "sa"
