"""Trained models made small enough to ship."""

import json
from pathlib import Path

import torch

from ..image_processing_depict import DepictImageProcessor
from ..modeling_depict import DepictForSemanticSegmentation
from ..writing import whole_folder


def save_half_precision(source: str | Path, folder: str | Path) -> None:
    """Copy a model and its image processor with float16 weights and without the code that travels to the Hub.

    The files say float32 for computation, so that `from_pretrained` converts the weights unless asked otherwise.
    Such a folder loads where this package is installed; it is the form of `depict_hf/default_model`. Use
    `save_pretrained` or `push_to_hub` for one that also loads with `trust_remote_code=True` elsewhere.

    Args:
        source: Folder or Hub name of the model.
        folder: Where to write; created if missing. Files of the names that are written (`config.json`,
            `model.safetensors`, `preprocessor_config.json`) are replaced, and no others are touched.

    Raises:
        ValueError: If a weight is too large for float16.
    """
    model = DepictForSemanticSegmentation.from_pretrained(source, dtype=torch.float32)
    limit = torch.finfo(torch.float16).max
    too_large = [name for name, value in model.state_dict().items() if value.abs().max() > limit]
    if too_large:
        raise ValueError(f"Weights of {', '.join(too_large[:5])} exceed float16's {limit:g}; keep float32.")
    with whole_folder(folder) as fresh:
        model.half().save_pretrained(fresh)
        DepictImageProcessor.from_pretrained(source).save_pretrained(fresh)
        for path in fresh.iterdir():
            if path.suffix == ".py":
                path.unlink()
            elif path.suffix == ".json":
                _make_portable(path)


def _make_portable(path: Path) -> None:
    """Rewrite a settings file without what refers to its surroundings."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    # How weights are stored says nothing about how to compute: transformers would load, and fine-tune, in float16.
    settings |= {"dtype": "float32"} if "dtype" in settings else {}
    # Where the backbone's weights once lay is of no use elsewhere.
    (settings.get("backbone_config") or {}).pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
