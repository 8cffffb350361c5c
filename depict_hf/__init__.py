"""DEPICT, the white-box decoder for semantic segmentation, for the Hugging Face ecosystem.

`default_model()` gives the model that is shipped, `load_model(name)` any other, each with its image processor;
`load_photo(path)` reads a photograph, `segment(model, image_processor, photos)` gives label maps, `segment_stream` of
any number of them. `DepictForSemanticSegmentation`, `DepictConfig` and `DepictImageProcessor` are used as all models of
transformers are: `from_pretrained`, `save_pretrained`, `pipeline("image-segmentation")`, `Trainer`. The instruments of
the white box are in `depict_hf.analysis`; the command line is `depict --help`.

Importing the package costs milliseconds: its names are loaded when they are used. It registers the classes with
`AutoConfig`, `AutoModelForSemanticSegmentation` and `AutoImageProcessor`, whether transformers is imported before or
after it, and marks them to travel with saved models, which then load with `trust_remote_code=True` elsewhere.
"""

import threading
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .registration import register_with_transformers

if TYPE_CHECKING:
    from .configuration_depict import DepictConfig
    from .image_processing_depict import DepictImageProcessor
    from .inference import load_photo, segment, segment_stream
    from .loading import default_model, load_model
    from .modeling_depict import DepictForSemanticSegmentation

__all__ = [
    "DepictConfig",
    "DepictForSemanticSegmentation",
    "DepictImageProcessor",
    "default_model",
    "load_model",
    "load_photo",
    "segment",
    "segment_stream",
]

_MODULE_OF = {
    "DepictConfig": "configuration_depict",
    "DepictForSemanticSegmentation": "modeling_depict",
    "DepictImageProcessor": "image_processing_depict",
    "default_model": "loading",
    "load_model": "loading",
    "load_photo": "inference",
    "segment": "inference",
    "segment_stream": "inference",
}

# transformers and torchvision cannot be imported by several threads at once.
_loading = threading.RLock()


def __getattr__(name: str):
    """Import a public name, or a module of the package, the first time that it is used."""
    if name in _MODULE_OF:
        with _loading:
            value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        with _loading:
            return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
