"""A model's folder as it goes to the Hub: what of it travels, and that it is whole, loads everywhere and is honest."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.dynamic_module_utils import custom_object_save

from ..image_processing_depict import DepictImageProcessor
from ..loading import load_model, model_source
from ..modeling_depict import DepictForSemanticSegmentation
from ..weight_files import CHECKSUM, one_line, read_header, seal
from .card import render_card
from .claims import split_card, unbacked_claims

SETTINGS = ("config.json", "preprocessor_config.json")
# Of these a repository may hold any number; pictures are samples, curves and plots, tables of JSON are results.
_TRAVELLING = (".csv", ".gif", ".jpeg", ".jpg", ".json", ".jsonl", ".md", ".png", ".svg", ".txt", ".webp", ".yml")
_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
# What training leaves in a model's folder for itself.
_WORK = ("checkpoint-*", "features", "samples", "deleted", "__pycache__")
# Side in patches of what logits are compared on, so that large models take seconds, too.
_COMPARED_PATCHES = 8
# Of the largest logit: the same code and weights, but perhaps another order of sums.
_TOLERANCE = 1e-5
# Run where this package cannot be imported. What it prints goes to standard error.
_LOAD_ALONE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "depict_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import numpy, torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
folder, given, output, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
data = numpy.load(given)
pixels = image_processor(data["photo"], return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    logits = model(pixel_values=torch.from_numpy(data["part"])).logits
numpy.savez(output, pixels=pixels.numpy(), logits=logits.numpy())
"""


@dataclass(frozen=True)
class Prepared:
    """What is to be uploaded, checked.

    Args:
        files: Path of each file by its name in the repository.
        card: Text of its `README.md`.
        left_out: Names in the folder that do not travel.
        notes: Sentences on what is missing or was added.
    """

    files: Mapping[str, Path]
    card: str
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def report(self) -> str:
        """List the files with their sizes in bytes, what is left out, and the card."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        width = len(f"{sum(sizes.values()):,}")
        lines = [f"{size:>{width},}  {name}" for name, size in sizes.items()]
        lines += [f"{sum(sizes.values()):>{width},}  bytes in {len(sizes)} files"]
        lines += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), "", self.card])


@contextmanager
def prepared(folder: str | Path, note: str | None = None, repository: str | None = None) -> Iterator[Prepared]:
    """Check a model's folder, and have what of it travels ready for `upload` while the context lasts.

    The folder itself stays as it is. Weights, settings, card, licence, result files and pictures travel as they are;
    weights without a checksum get one. The code is that of this package, whatever code lies in the folder, of which
    none is executed. A card is rendered where there is none.

    Args:
        folder: Folder of a model, or "default".
        note: A paragraph for a rendered card.
        repository: Where it will go, for a rendered card.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there is no model, weights are damaged, not finite or no `.safetensors`, the card claims figures
            that no result file backs, or the folder does not load back with equal logits, here and where this package
            is not installed.
    """
    source = Path(model_source(str(folder)))
    for name in SETTINGS:
        if not (source / name).is_file():
            raise ValueError(f"{source} holds no {name}, needed the folder of a model, as save_pretrained writes it.")
    if not list(source.glob("model*.safetensors")):
        raise ValueError(f"{source} holds no model.safetensors, needed its weights; save them by save_pretrained.")
    model, image_processor = load_model(source)
    with tempfile.TemporaryDirectory(prefix="depict-push-") as place:
        staged = Path(place) / (source.resolve().name or "model")
        staged.mkdir()
        left_out = _stage_files(source, staged)
        _add_code(model, image_processor, staged)
        notes = []
        card_path = staged / "README.md"
        if card_path.is_file():
            card = card_path.read_text(encoding="utf-8")
        else:
            card = render_card(staged, note, repository)
            card_path.write_text(card, encoding="utf-8")
            notes.append("there is no README.md, so that a card is rendered from the files")
        if not split_card(card)[0].get("license"):
            notes.append("the card names no licence (license: in its first lines), without which nobody may use it")
        _check_claims(card, staged, source)
        _check_loading(model, image_processor, staged, Path(place))
        files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        yield Prepared(files, card, [name for name in left_out if name not in files], notes)


def _stage_files(source: Path, staged: Path) -> list[str]:
    """Link the files that travel, in their folders; return the names of those that do not."""
    left_out = []
    for root, folders, names in os.walk(source):
        here = Path(root).relative_to(source)
        work = [name for name in folders if name.startswith(".") or any(Path(name).match(each) for each in _WORK)]
        left_out += [f"{(here / name).as_posix()}/" for name in work if name != "__pycache__"]
        folders[:] = sorted(set(folders) - set(work))
        for name in sorted(names):
            path, target = Path(root, name), staged / here / name
            if not _travels(here / name):
                left_out.append((here / name).as_posix())
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors" and CHECKSUM not in read_header(path).metadata:
                shutil.copyfile(path, target)
                seal(target)
            else:
                target.symlink_to(path.resolve())
    return left_out


def _travels(name: Path) -> bool:
    if name.name.startswith("."):
        return False
    if name.suffix == ".safetensors":
        return len(name.parts) == 1 and name.stem.startswith(("model", "familiarity"))
    if "tfevents" in name.name:  # curves
        return True
    return name.suffix in _TRAVELLING or name.stem.upper() in _LICENCES


def _add_code(model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, staged: Path) -> None:
    """Add this package's code, name it in the settings, and add its licence."""
    for name, parts in zip(SETTINGS, ((model.config, model), (image_processor,)), strict=True):
        settings = json.loads((staged / name).read_text(encoding="utf-8"))
        before = json.dumps(settings)
        settings["auto_map"] = {}
        for part in parts:
            custom_object_save(part, staged, config=settings)
        # Where weights once lay is nobody's business.
        for each in (settings, settings.get("backbone_config") or {}):
            each.pop("_name_or_path", None)
        if json.dumps(settings) != before:
            (staged / name).unlink()
            (staged / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (staged / "LICENSE-CODE").write_text(_code_licence(), encoding="utf-8")


def _code_licence() -> str:
    """The licence of this package, from its repository or its installation.

    Raises:
        OSError: If neither has it.
    """
    path = Path(__file__).parents[2] / "LICENSE"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    try:
        text = distribution("depict-hf").read_text("licenses/LICENSE")
    except PackageNotFoundError:
        text = None
    if text is None:
        raise OSError("The licence of the code, which has to travel along, is missing here; install depict-hf again.")
    return text


def _check_claims(card: str, staged: Path, source: Path) -> None:
    try:
        unbacked = unbacked_claims(card, staged)
    except (ValueError, AttributeError, TypeError) as error:  # of metadata or results that are built otherwise
        raise ValueError(f"The card or a result file in {source} cannot be read: {one_line(error)}") from error
    if unbacked:
        more = f" and {len(unbacked) - 5} more" if len(unbacked) > 5 else ""
        raise ValueError(
            f"README.md in {source} claims figures that no result file (.json) in the folder holds: "
            f"{', '.join(map(str, unbacked[:5]))}{more}; measure them (depict evaluate ... --output evaluation.json), "
            "or take them out."
        )


def _check_loading(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, staged: Path, place: Path
) -> None:
    """Load what is to be uploaded, with this package and without it, and compare pixels and logits.

    Raises:
        ValueError: If either way fails or gives other numbers.
    """
    photo = _made_photo()
    pixels = image_processor(photo, return_tensors="pt")["pixel_values"]
    side = _COMPARED_PATCHES * model.config.encoder_patch_size
    part = pixels[..., :side, : side * 3 // 2].contiguous()
    expected = {"pixels": pixels.numpy(), "logits": _logits(model, part)}
    again, its_processor = load_model(staged)
    found = {
        "pixels": its_processor(photo, return_tensors="pt")["pixel_values"].numpy(),
        "logits": _logits(again, part),
    }
    _compare(found, expected, "with this package")
    np.savez(place / "given.npz", photo=photo, part=part.numpy())
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    arguments = [staged, place / "given.npz", place / "found.npz", torch.get_num_threads()]
    result = subprocess.run(
        [sys.executable, "-c", _LOAD_ALONE, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
    )
    if result.returncode != 0:
        last = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), "no message")
        raise ValueError(f"The folder does not load where depict_hf is not installed: {one_line(last)}")
    _compare(dict(np.load(io.BytesIO((place / "found.npz").read_bytes()))), expected, "without this package")


def _logits(model: DepictForSemanticSegmentation, part: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(pixel_values=part.to(model.device)).logits.float().cpu().numpy()


def _compare(found: Mapping[str, Any], expected: Mapping[str, np.ndarray], how: str) -> None:
    for name, value in expected.items():
        largest = float(np.abs(value).max())
        if found[name].shape != value.shape or not np.abs(found[name] - value).max() <= _TOLERANCE * max(largest, 1):
            raise ValueError(
                f"The folder loads back with other {name} {how}; save the model again by save_pretrained, from the "
                "release of depict_hf that it was made with."
            )


def _made_photo() -> np.ndarray:
    """Noise over a ramp, 48 x 80 pixels, always the same."""
    noise = np.random.default_rng(0).integers(0, 64, (48, 80, 3))
    return (noise + np.linspace(0, 191, 80)[:, None]).astype(np.uint8)
