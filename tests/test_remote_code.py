"""Saved models in transformers' own tools: pipelines, with the package and, as remote code, without it."""

import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from conftest import tiny_model

from depict_hf import DepictImageProcessor

SCRIPT = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "depict_hf":
            raise ModuleNotFoundError(name)

folder, output, installed = sys.argv[1], sys.argv[2], sys.argv[3] == "installed"
if installed:
    import depict_hf
else:
    sys.meta_path.insert(0, Hidden())

import numpy as np
from transformers import pipeline

segmenter = pipeline("image-segmentation", model=folder, trust_remote_code=not installed)
assert type(segmenter.model).__module__.startswith("depict_hf." if installed else "transformers_modules.")
assert type(segmenter.image_processor).__module__.startswith("depict_hf." if installed else "transformers_modules.")
wide = [f"{folder}/wide.png"] * 3
results = segmenter(wide, batch_size=2) + [segmenter(f"{folder}/high.png")]
labels = [[segment["label"] for segment in result] for result in results]
maps = [sum((index + 1) * (np.array(s["mask"]) == 255) for index, s in enumerate(result)) for result in results]
assert labels[0] == labels[2] and (maps[0] == maps[2]).all(), "batches change the result"
np.savez(output, wide=maps[0], high=maps[3], wide_labels=labels[0], high_labels=labels[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    names = {0: "sky", 1: "road", 2: "car", 3: "tree", 4: "sign"}
    model = tiny_model("sa", id2label=names, label2id={v: k for k, v in names.items()}, window_size=32)
    model.save_pretrained(folder)
    DepictImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise).resize((60, 40))
    image.save(folder / "wide.png")
    image.rotate(90, expand=True).save(folder / "high.png")
    return folder


def run(folder, output, mode):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(output.parent / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(output), mode],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return dict(np.load(output)), result.stderr


def test_pipelines_give_the_same_masks_without_the_package(folder, tmp_path):
    installed, log = run(folder, tmp_path / "installed.npz", "installed")
    remote, remote_log = run(folder, tmp_path / "remote.npz", "remote")
    for name, value in installed.items():
        assert np.array_equal(remote[name], value), name
    assert installed["wide"].shape == (40, 60) and installed["high"].shape == (60, 40)
    # Masks are numbered from 1: 0 would be a pixel that no mask covers, larger numbers one that two cover.
    assert set(np.unique(installed["wide"])) == set(range(1, len(installed["wide_labels"]) + 1))
    assert set(installed["wide_labels"]) <= {"sky", "road", "car", "tree", "sign"}
    for text in (log, remote_log):
        assert not any(word in text.lower() for word in ("error", "warn", "not supported")), text


def test_masks_equal_the_processors_own(folder, tmp_path):
    maps, _ = run(folder, tmp_path / "maps.npz", "installed")
    processor, model = DepictImageProcessor.from_pretrained(folder), tiny_model("sa", window_size=32)
    photo = PIL.Image.open(folder / "wide.png")
    outputs = model(**processor(photo, return_tensors="pt"))
    [expected] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 60)])
    ids = np.unique(expected.numpy())
    assert np.array_equal(ids[maps["wide"] - 1], expected.numpy())
