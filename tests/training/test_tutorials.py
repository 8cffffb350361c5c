"""Every tutorial runs from top to bottom as it stands, beside the repository's files, and becomes a notebook."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "training" / "tutorials"
TUTORIALS = sorted(path for path in FOLDER.glob("*.py") if path.read_text(encoding="utf-8").startswith("# %%"))
# What each prints that could not be there if one of its steps had gone wrong.
SEEN = {
    "dinov3_backbone": r"BackboneEncoder \['sky'.*\]",
    "lora": r"1,014,157 of 23,070,733 parameters move[\s\S]*the merged model computes the same",
    "onnx_without_torch": r"(building|road): \d\d\.\d%",
    "own_classes": r"mean IoU: 0\.[5-9][\s\S]*'00_overlay\.png'[\s\S]*'model\.onnx'",
    "published_checkpoint": r"shortest_edge=512, .*\) 512 480\n[\s\S]*hood, exhaust hood[\s\S]*2 images",
    "white_box": r"the patch in the middle is \w+[\s\S]*within heads, by up to [\d.]+e-0[4-9][\s\S]*street\.html",
}


def test_all_tutorials_are_listed():
    assert [path.stem for path in TUTORIALS] == sorted(SEEN)
    page = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    assert [name for name in SEEN if f"training.tutorials.{name}`" not in page] == []


# These train, export or read a model of real size, about half a minute each on one core.
LONG = {"dinov3_backbone", "onnx_without_torch", "own_classes", "white_box"}


def runs() -> list:
    return [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in sorted(SEEN)]


@pytest.mark.parametrize("name", runs())
def test_it_runs(name, tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", f"training.tutorials.{name}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.search(SEEN[name], done.stdout), done.stdout[-4000:]
    # It writes into a folder of its own name, and nowhere else.
    assert {path.name for path in tmp_path.iterdir()} == {"tests", name}


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_becomes_a_notebook(path):
    jupytext = pytest.importorskip("jupytext", reason="pip install jupytext converts the scripts")
    notebook = jupytext.read(path)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and notebook.cells[0].source.startswith("# ")
    assert kinds.count("code") >= 2
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, path.name, "exec")  # a cell that was cut within a block would not
