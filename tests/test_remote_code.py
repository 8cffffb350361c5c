"""Saved models in transformers' own tools: pipelines, with the package and, as remote code, without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


QUESTION = "[y/N]"
COMMIT = "0123456789" * 4
LOAD = """
import sys
installed, trust = sys.argv[1] == "installed", sys.argv[2] == "trusted" or None
if installed:
    import depict_hf
else:
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "depict_hf":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Hidden())
from transformers import AutoImageProcessor, AutoProcessor, pipeline

for name in sys.argv[3:]:
    segmenter = pipeline("image-segmentation", model=name, trust_remote_code=trust)
    processors = [kind.from_pretrained(name, trust_remote_code=trust) for kind in (AutoImageProcessor, AutoProcessor)]
    for each in (segmenter.model, segmenter.image_processor, *processors):
        print("LOADED", type(each).__module__.partition(".")[0], type(each).__name__)
"""
CLASSES = ["DepictForSemanticSegmentation", *["DepictImageProcessor"] * 3]


@pytest.fixture(scope="module")
def hub_name(folder, tmp_path_factory):
    """The folder as a repository that was pulled from the Hub: its cache, and its name there."""
    repository = tmp_path_factory.mktemp("hub") / "models--me--depict"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository.parent, "me/depict"


def load_in_terminal(arguments: list[str], cache: Path, modules: Path, terminal: bool) -> tuple[int, str]:
    """Exit code and all that is printed; on a terminal, a question is answered with no."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", LOAD, *arguments]
    if not terminal:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        result = subprocess.run(command, **streams, text=True, env=environment, timeout=300)
        return result.returncode, result.stdout
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    controller, terminal_end = pty.openpty()
    process = subprocess.Popen(
        command, stdin=terminal_end, stdout=terminal_end, stderr=terminal_end, env=environment, start_new_session=True
    )
    os.close(terminal_end)
    printed, answered = b"", False
    while True:
        try:
            part = os.read(controller, 2**16)
        except OSError:  # how Linux says that the other end is closed
            part = b""
        if not part:
            break
        printed += part
        if QUESTION.encode() in printed and not answered:
            answered = True
            os.write(controller, b"n\n")
    os.close(controller)
    return process.wait(timeout=300), printed.decode()


@pytest.mark.parametrize("terminal", [False, True])
class TestQuestions:
    """Of a folder, and of the same as it is pulled from the Hub."""

    @pytest.fixture
    def load(self, folder, hub_name, tmp_path, terminal):
        cache, name = hub_name
        return lambda package, trust: load_in_terminal(
            [package, trust, str(folder), name], cache, tmp_path / "modules", terminal
        )

    def test_nothing_is_asked_where_the_package_is_imported(self, load):
        """transformers looks for a video processor, too, and takes the code of the image processor for one."""
        code, printed = load("installed", "default")
        assert QUESTION not in printed and code == 0, printed
        assert re.findall(r"LOADED depict_hf (\w+)", printed) == 2 * CLASSES

    def test_trusted_code_loads_without_the_package(self, load):
        code, printed = load("missing", "trusted")
        assert QUESTION not in printed and code == 0, printed
        assert re.findall(r"LOADED transformers_modules (\w+)", printed) == 2 * CLASSES

    def test_without_package_and_trust_transformers_refuses(self, load):
        """On a terminal transformers itself asks before that, here about the model's own code."""
        code, printed = load("missing", "default")
        assert code == 1 and "LOADED" not in printed
        assert "Please pass the argument `trust_remote_code=True` to allow custom code to be run." in printed
