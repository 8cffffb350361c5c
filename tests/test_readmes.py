"""Every code block of every README and card runs, on made data, as it stands there.

The names that stand for a reader's own things (`DATA`, `PHOTOS`, `CHECKPOINT`, ...) are files of such names here.
"""

import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import save_backbone, save_model, save_scenes
from transformers import Dinov2Config

from depict_hf import DepictConfig, DepictForSemanticSegmentation, loading
from depict_hf.cli import main as depict

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "training" / "README.md", *sorted((ROOT / "model_cards").rglob("README.md"))]
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What is added to commands so that they end in seconds on the made data, or what takes the place of an argument.
SMALL_RUN = ["size=28", "crop_size=28", "epochs=1", "batch_size=2", "warmup_steps=0", "num_workers=0", "report_to=none"]
ADDED = {
    "training.train": [*SMALL_RUN, "cache_features=false", "precision=float32", "frozen_encoder_blocks=0"],
    "training.evaluate": ["--workers", "0"],
    "training.compare": [*SMALL_RUN[:2], "batch_size=2", "precision=float32"],
    "training.benchmark": [
        "--encoder",
        "vit_tiny_patch16_384",
        "--repetitions",
        "1",
        "--seconds",
        "0",
        "--labels",
        "5",
    ],
    "training.robustness": ["--max-images", "1", "--draws", "1", "--corruptions", "fog"],
    "training.white_box": ["--max-images", "1"],
    "evaluate": ["--workers", "0"],
    "train": ["--from", "facebook/dinov2-small", "size=28", "crop_size=28", "num_workers=0"],
}
REPLACED = {
    "--minutes": ["--max-steps", "2"],
    "--steps": ["--steps", "2"],
    "--rates": ["--rates", "1e-3", "--seeds", "0", "1"],
    "--exponent": ["--exponent", "--decoder-only"],
}
# Commands that other places run, or that need what no test may have; each with the place or the reason.
ELSEWHERE = {
    "python3 -m venv": ".ci/run runs the README's own line in a clean checkout",
    "pip install": "installing needs a package registry; test_packaging.py installs the package",
    "ruff": ".ci/run",
    "mypy": ".ci/run",
    "make gpu": "needs a GPU",
    "make test-lowest": "needs another Python and a package registry",
    "make fuzz": "tests/test_fuzzing.py",
    "python -m training.claims": "takes hours; tests/training/evidence/test_claims.py runs a small plan",
    "depict demo": "tests/test_demo.py and tests/test_demo_browser.py",
    "torchrun": "tests/training/test_launch.py and tests/test_cli.py start several processes",
    "accelerate launch": "tests/training/test_launch.py starts several processes",
}


def blocks() -> list:
    """Language and text of every block, and whether it is its page's first, as parameters.

    What stands alike on several cards of models, which one template writes, runs once.
    """
    found, seen = [], set()
    for page in PAGES:
        name = page.relative_to(ROOT)
        for index, (language, text) in enumerate(BLOCKS.findall(page.read_text(encoding="utf-8"))):
            if name.parts[0] == "model_cards" and (language, text) in seen:
                continue
            seen.add((language, text))
            number = f"{name.parent.name or 'README'}-{index}-{language}"
            found.append(pytest.param(language, text, index == 0, id=number))
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A reader's folder: the repository's files as they are named there, and what the reader is said to have."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("tests", "depict_hf", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    save_scenes(folder / "DATASET", 32, 48, {"train": 5, "validation": 3, "test": 2})
    save_backbone(folder / "facebook" / "dinov2-small")
    shutil.copytree(ROOT / "tests" / "data" / "published" / "ca_vit", folder / "CHECKPOINT")
    save_shallow_default(folder / "default")
    (folder / "camvid").symlink_to(folder / "DATASET")
    save_scenes(folder / "FACADES", 32, 48, {"test": 2})
    (folder / "FACADES" / "classes.txt").write_text("sky\nbuilding\ndoor\nroad\nvarious\n")
    (folder / "CLASSES").write_text('{"sky": ["sky"], "building": ["building", "door"]}')
    for decoder_type in ("sa", "ca", "cbsa", "mask_transformer", "linear"):
        for seed in range(2):
            save_model(folder / f"{decoder_type}_seed{seed}", decoder_type)
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / "DATA" / kind).mkdir(parents=True)
    for index in range(9):
        ids = np.arange(3, dtype=np.uint8).repeat(16)[None].repeat(32, 0)
        noise = rng.integers(0, 40, (32, 48, 3))
        PIL.Image.fromarray((ids[..., None] * 80 + noise).astype(np.uint8)).save(
            folder / "DATA/images" / f"{index}.png"
        )
        PIL.Image.fromarray(ids).save(folder / "DATA/masks" / f"{index}.png")
    (folder / "DATA" / "classes.txt").write_text("road\ncar\nsky\n")
    (folder / "PHOTOS" / "town").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "data" / "street.jpg", folder / "PHOTOS" / "town" / "street.jpg")
    shutil.copy(ROOT / "tests" / "data" / "street.jpg", folder / "street.jpg")
    return folder


def save_shallow_default(folder: Path) -> None:
    """Write the model shipped, with all that lies beside it, but with two blocks of its encoder only."""
    shutil.copytree(loading.DEFAULT_MODEL, folder)
    config = DepictConfig.from_pretrained(folder)
    deep = config.backbone_config.to_dict()
    kept = {name: value for name, value in deep.items() if name not in ("stage_names", "out_features")}
    config.backbone_config = Dinov2Config(**(kept | {"num_hidden_layers": 2, "out_indices": [2]}))
    DepictForSemanticSegmentation.from_pretrained(folder, config=config).save_pretrained(folder)


@pytest.mark.parametrize(("language", "text", "first"), blocks())
def test_block_runs(language, text, first, reader, datasets_cache, monkeypatch):
    monkeypatch.chdir(reader)
    monkeypatch.setattr(loading, "DEFAULT_MODEL", reader / "default")  # which `depict calibrate` writes to
    if first:  # Whoever reads one page has no results of another.
        shutil.rmtree("segmented", ignore_errors=True)
    if language == "python":
        text = text.replace("num_train_epochs=20", "max_steps=2")
        exec(compile(text, "<README>", "exec"), {"__name__": "__main__"})
    elif language == "sh":
        for line in text.splitlines():
            run(line)
    else:
        assert language in ("text", "bibtex"), f"a block of {language!r}, which nothing runs"


def run(line: str) -> None:
    """Run one line of a shell block in this process, with what makes it small."""
    if any(line.startswith(f"{command} ") or line == command for command in ELSEWHERE):
        if "[" in line:
            check_extras(line)
        return
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"]:
        words, main = [words[2], *words[3:]], importlib.import_module(words[2]).main
        arguments = words[1:]
    else:
        assert words[0] == "depict", f"{line!r} is no command that this test knows"
        words, main = words[1:], depict
        arguments = words
    status = main(small(words[0], arguments))
    assert status == 0, f"{line} ended with {status}"


def small(command: str, arguments: list[str]) -> list[str]:
    """The arguments of a command, less what makes it long."""
    result: list[str] = []
    replaced = False
    if command == "training.benchmark":
        result = ["--sizes", "64", "128"] if "--exponent" in arguments else ["--sizes", "64", "--what", "stages"]
    for each in arguments:
        each = re.sub(r",\w+_seed[2-9]", "", each)  # two seeds of each group
        if each.startswith("--") or "=" in each:
            replaced = each in REPLACED
            result += REPLACED[each] if replaced else [each]
        elif not replaced:
            result.append(each)
    if "--quality" in result:  # of the model shipped, at half of its size
        result += ["--size", "392"]
    added = ADDED.get(command, [])
    outputs = ("OUT", "START", "MIDDLE", "OUTPUT", "OTHER", "MEAN", "FOLDER")
    output = next((each for each in result if each in outputs), None)
    if output and command in ("training.train", "training.compare", "training.average", "train", "convert", "export"):
        shutil.rmtree(output, ignore_errors=True)
        # Fields come before options, some of which would take them for further values.
        place = result.index(output) + 1
        return result[:place] + added + result[place:]
    return result + added


def check_extras(line: str) -> None:
    """The extras that a line installs exist."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\[(\w+)\]", line):
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"pyproject.toml has no extra {extra!r}"


def test_pages_name_files_that_exist():
    """A link that leads nowhere is a promise that is not kept."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a checkout, so that files that are not part of it cannot be told apart")
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                path = (page.parent / target).resolve().relative_to(ROOT)
                assert any(each == str(path) or each.startswith(f"{path}/") for each in tracked), f"{page}: {target}"
