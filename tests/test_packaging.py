"""What an installed package holds: every module under one name, whether installed from a wheel or in place."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Run in an empty folder. The default model is to be found from anywhere, and the name `training` stays everybody's own.
USE = """
import importlib.util, sys, warnings
from pathlib import Path
import numpy as np
import depict_hf, depict_hf.training
expected = Path(sys.argv[1]).resolve()
for module in (depict_hf, depict_hf.training):
    assert expected in Path(module.__file__).resolve().parents, module.__file__
assert importlib.util.find_spec("training") is None
from depict_hf.training.recipes import get_recipe
assert get_recipe("ade20k_vit_tiny_sa").model.decoder_type == "sa"
photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
model, image_processor = depict_hf.default_model()
[label_map] = depict_hf.segment(model, image_processor, [photo])
assert label_map.shape == (40, 60)
demo = Path(depict_hf.__file__).parent / "demo"
assert (demo / "web" / "viewer.js").is_file() and len(list((demo / "examples").glob("*.jpg"))) == 3
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from depict_hf.training.metrics import MeanIoU
assert MeanIoU.__module__ == "depict_hf.training.evaluation.metrics"
"""
COMMANDS = ("train", "evaluate", "compare", "robustness", "benchmark", "throughput")


def run(python: Path, *arguments: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([python, *arguments], capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def copy_of_repository(folder: Path) -> Path:
    """What a build reads, so that it leaves nothing behind in the repository."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("depict_hf", "training"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def test_every_package_is_listed():
    """Fails if a new folder of modules is in the repository but not in the wheel."""
    listed = re.search(r"^packages = \[(.*?)\]", (REPOSITORY / "pyproject.toml").read_text(), re.M | re.S)
    found = []
    for root, name in (("depict_hf", "depict_hf"), ("training", "depict_hf.training")):
        for file in (REPOSITORY / root).rglob("__init__.py"):
            found.append(".".join([name, *file.parent.relative_to(REPOSITORY / root).parts]))
    assert sorted(re.findall(r'"([\w.]+)"', listed[1])) == sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--editable"]], ids=["wheel", "editable"])
def test_installed_package_works_from_an_empty_folder(options, tmp_path):
    """In an environment of its own, which borrows the dependencies but not another installation of this package."""
    pytest.importorskip("setuptools", minversion="77", reason="builds without a network need setuptools installed")
    source = copy_of_repository(tmp_path / "source")
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=empty).strip())
    # A line in a .pth file puts the folder on the path, but the .pth files in that folder are not read.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(Path(sys.executable), *install, "--ignore-installed", *options, str(source), folder=empty)
    run(python, "-c", USE, str(source if options else packages), folder=empty)
    for command in COMMANDS:
        assert "usage:" in run(python, "-m", f"depict_hf.training.{command}", "--help", folder=empty)
    assert "learning_rate" in run(python, "-m", "depict_hf.training.recipes", "ade20k_vit_tiny_sa", folder=empty)
    assert "segment" in run(environment / "bin" / "depict", "--help", folder=empty)


def test_what_is_shipped_stays_small():
    """Fails if something large lands in the package; the model that is shipped is counted apart."""
    packages = [REPOSITORY / "depict_hf", REPOSITORY / "training"]
    files = [path for package in packages for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sizes = {path: path.stat().st_size for path in files}
    model = sum(size for path, size in sizes.items() if "default_model" in path.parts)
    assert model < 50e6
    assert sum(sizes.values()) - model < 2.5e6
    assert [path for path, size in sizes.items() if size > 2**20] == [
        REPOSITORY / "depict_hf" / "default_model" / "model.safetensors"
    ]
