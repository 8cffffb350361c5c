"""A page in the browser on which a model is tried: `depict demo`, and a folder that becomes a Space.

`Demo` computes what the page shows and needs no Gradio; `build_page` makes the page, `serve` shows it, and
`write_space` writes a folder for Hugging Face Spaces.
"""

from typing import TYPE_CHECKING

from .answers import Answer, Choices, Demo, Reading
from .space import write_space

if TYPE_CHECKING:
    from .page import build_page, serve

__all__ = ["Answer", "Choices", "Demo", "Reading", "build_page", "serve", "write_space"]


def __getattr__(name: str):
    """Import what needs Gradio only when it is asked for."""
    if name in ("build_page", "serve"):
        try:
            from . import page
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise ImportError("The demo's page needs Gradio: pip install 'depict-hf[demo]'") from error
        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
