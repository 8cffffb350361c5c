"""Why a model gave a photograph its classes: numbers for every patch, and a page for people.

`explain` runs the photograph window by window, as `segment` does, and reads each window's record with the instruments
of `depict_hf.analysis`. `Explanation.numbers` is for JSON, `Explanation.page()` one self-contained HTML file.
"""

from .explanation import Explanation, explain
from .layout import Layout
from .readings import Patches

__all__ = ["Explanation", "Layout", "Patches", "explain"]
