import json

import pytest
import torch
from conftest import save_model, tiny_model
from safetensors.torch import load_file, save_file

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.hub import folder as hub_folder
from depict_hf.hub import prepared, save_half_precision
from depict_hf.hub.claims import unbacked_claims
from depict_hf.weight_files import verify


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


CARD = """---
model-index:
- name: tiny
  results:
  - metrics:
    - {type: mean_iou, value: 65.97}
---
# Tiny

It reaches 65.97 mIoU, 12 layers of width 24, at learning rate 0.5.

| class | IoU (%) |
|---|---:|
| `sky` | 90.8 |
| mean | 65.97 |

```text
class     IoU    acc.
road    94.40   96.44
```

```sh
depict segment --scales 0.123
```

| setting | value |
|---|---|
| blocks | 7 |
| milliseconds | 12.5 |
"""
RECORD = {
    "mean_iou": 0.659732,
    "per_class_iou": {"sky": 0.9080, "road": 0.94399},
    "per_class_accuracy": {"sky": 0.9493, "road": 0.96442},
    "seconds": 0.0125,
}


@pytest.mark.parametrize(
    ("honest", "claimed", "label"),
    [
        ("", "", None),
        ("value: 65.97", "value: 66.97", "mean_iou"),
        ("value: 65.97", "value: unknown", "mean_iou"),
        ("reaches 65.97 mIoU", "reaches 88.88 mIoU", ""),
        ("reaches 65.97 mIoU", "has an overall accuracy of 99 %", ""),
        ("| 90.8 |", "| 90.9 |", "`sky`"),
        ("| 90.8 |", "| 94.4 |", "`sky`"),  # which is another class's
        ("| 90.8 |", "| 90.80001 |", "`sky`"),
        ("| mean | 65.97 |", "| mean | 99 |", "mean"),
        ("94.40   96.44", "94.40   99.44", "road"),
        ("| milliseconds | 12.5 |", "| milliseconds | 11.5 |", "milliseconds"),
        ("| blocks | 7 |", "| blocks | 8 |", None),  # a whole number, of no result
        ("at learning rate 0.5", "at learning rate 0.6", None),
    ],
)
def test_figures_need_a_record(tmp_path, honest, claimed, label):
    """Fails if an invented figure passes, or an honest card or a setting is refused."""
    (tmp_path / "evaluation.json").write_text(json.dumps(RECORD))
    (tmp_path / "config.json").write_text(json.dumps({"figure": 88.88, "other": 99}))  # settings are no results
    found = unbacked_claims(CARD.replace(honest, claimed) if honest else CARD, tmp_path)
    assert [claim.label for claim in found] == ([] if label is None else [label])


def test_without_records_every_figure_is_unbacked(tmp_path):
    numbers = [claim.number for claim in unbacked_claims(CARD, tmp_path)]
    assert numbers == ["65.97", "65.97", "90.8", "65.97", "94.40", "96.44", "12.5"]


def test_what_is_wrong_with_a_folder_is_said_before_anything_is_sent(tmp_path):
    """Each in a line that names the remedy, and before the slow part, the loading elsewhere."""

    def refused(name: str, change) -> str:
        folder = save_model(tmp_path / name)
        change(folder)
        with pytest.raises(ValueError) as caught, prepared(folder):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def spoil(folder, value):
        weights = load_file(folder / "model.safetensors")
        weights["decoder.class_tokens"][0, 0, 0] = value
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def flip(folder):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    def claim(folder):
        (folder / "README.md").write_text("# A\n\n| class | IoU |\n|---|---|\n| sky | 99.9 |\n")

    assert "NaN or infinite (decoder.class_tokens: 1 of" in refused("nan", lambda folder: spoil(folder, float("nan")))
    assert "its weights have the checksum" in refused("flipped", flip)
    assert "claims figures that no result file (.json) in the folder holds: sky 99.9 (table)" in refused("claim", claim)
    other = refused("settings", lambda folder: (folder / "preprocessor_config.json").unlink())
    assert "holds no preprocessor_config.json" in other
    assert "holds no model.safetensors" in refused("weights", lambda folder: (folder / "model.safetensors").unlink())
    bad = refused("yaml", lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"))
    assert "metadata of README.md are not YAML" in bad
    broken = refused("json", lambda folder: (folder / "evaluation.json").write_text("{"))
    assert "evaluation.json is no JSON" in broken
    with pytest.raises(ValueError, match=r"nowhere holds no config\.json"), prepared(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize(
    ("name", "added", "message"),
    [
        ("decoders.py", "raise SystemError('spoilt')", "does not load where depict_hf is not installed: SystemError"),
        (
            "modeling_depict.py",
            "_former = DepictForSemanticSegmentation.forward\n"
            "def _forward(self, *arguments, **options):\n"
            "    output = _former(self, *arguments, **options)\n"
            "    output['logits'] = output['logits'] * 1.001\n"
            "    return output\n"
            "DepictForSemanticSegmentation.forward = _forward\n",
            "loads back with other logits without this package",
        ),
    ],
)
def test_code_that_computes_otherwise_elsewhere_is_refused(tmp_path, monkeypatch, name, added, message):
    folder = save_model(tmp_path / "model")
    add_code = hub_folder._add_code

    def spoilt(model, image_processor, staged):
        add_code(model, image_processor, staged)
        with (staged / name).open("a") as file:
            file.write(f"\n{added}")

    monkeypatch.setattr(hub_folder, "_add_code", spoilt)
    with pytest.raises(ValueError, match=message), prepared(folder):
        pass


def test_code_in_the_folder_is_neither_run_nor_sent_and_weights_get_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_folder, "_check_loading", lambda *given: None)
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    before = (folder / "model.safetensors").read_bytes()
    (folder / "modeling_depict.py").write_text("raise SystemExit('executed')\n")
    with prepared(folder) as ready:
        assert "executed" not in ready.files["modeling_depict.py"].read_text()
        assert verify(ready.files["model.safetensors"]).metadata["sha256"]
        assert all(each.equal(weights[name]) for name, each in load_file(ready.files["model.safetensors"]).items())
        assert "MIT License" in ready.files["LICENSE-CODE"].read_text()
    assert (folder / "model.safetensors").read_bytes() == before
