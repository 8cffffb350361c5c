"""A folder that becomes a Space on Hugging Face: the page, the package itself, a model and the Space's card."""

import re
import shutil
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from ..export import find_license
from ..loading import DEFAULT_MODEL, load_model
from ..results import knowledge
from ..writing import check_folder, whole_folder

GRADIO = "6.31.0"  # The release that the page was tested with, which Spaces install.
PYTHON = "3.12"

_APP = '''"""The Space's entrance: `python app.py` shows the page of `depict demo`."""

from depict_hf.demo import serve
from depict_hf.loading import fastest_device

if __name__ == "__main__":
    serve({model!r}, fastest_device(), host="0.0.0.0")
'''

_CARD = """---
title: DEPICT
emoji: 🔍
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
{license}short_description: Every pixel's class, and why it got it
tags: [semantic-segmentation, interpretability, depict]
---

# DEPICT: every pixel's class, and why

Drop a photograph: the model labels every pixel, says how sure it is and what it nearly was, and explains, layer by
layer and head by head, how it came to that. DEPICT is a decoder for semantic segmentation that can be read (Wen and Li,
NeurIPS 2024).

{knowledge} Photographs are deleted an hour after they came.

`python app.py` shows the same page on any machine with Python {python}, after
`pip install "gradio=={gradio}" -r requirements.txt`.
"""

# Files of a model's folder that a model needs, and its card.
_MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "README.md")
_NOT_NEEDED = ("__pycache__", "training", "default_model")


def write_space(folder: Path, model: str = "default") -> None:
    """Write a folder that needs nothing but to be uploaded as a Space with the SDK Gradio.

    It holds `app.py`, `requirements.txt`, `README.md` with the Space's settings, this package and, unless the model is
    one of the Hub, the model.

    Args:
        folder: New or empty.
        model: Folder, Hub name or "default". It is loaded once, so that a damaged one is found here.

    Raises:
        ValueError: If the folder holds something, or the model cannot be loaded.
        OSError: If it cannot be written.
        ImportError: If this package is not installed, so that nothing says what it requires.
    """
    check_folder(folder)
    lines = _requirements()
    loaded, _ = load_model(model)
    license_name = find_license(loaded)
    source = DEFAULT_MODEL if model == "default" else Path(model)
    package = Path(__file__).parents[1]
    with whole_folder(folder) as space:
        shutil.copytree(package, space / package.name, ignore=shutil.ignore_patterns(*_NOT_NEEDED))
        if model == "default":
            _copy_model(source, space / package.name / source.name)
        elif source.is_dir():
            _copy_model(source, space / "model")
            model = "model"
        card = _CARD.format(
            gradio=GRADIO,
            python=PYTHON,
            license="" if license_name == "unknown" else f"license: {license_name}\n",
            knowledge=knowledge(loaded.config),
        )
        texts = {
            "app.py": _APP.format(model=model),
            "requirements.txt": "\n".join(lines) + "\n",
            "README.md": card,
            ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        }
        for name, text in texts.items():
            (space / name).write_text(text, encoding="utf-8")


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir()
    for pattern in _MODEL_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, target)


def _requirements() -> list[str]:
    """List what this package requires without extras; Gradio comes with the Space's SDK."""
    try:
        declared = requires("depict-hf") or []
    except PackageNotFoundError as error:
        raise ImportError(
            "What depict-hf requires is only known where it is installed; pip install it, and write the Space again."
        ) from error
    return [line for line in declared if not re.search(r";.*\bextra\b", line)]
