"""What the README's figures come from: decoders compared, robustness, speed, memory and costs measured.

The room has one module for each command above it, with what that command measures, and the modules these build on.
"""

from .baseline import StraightforwardModel
from .benchmark_tasks import Task
from .compare import compare_decoders
from .comparison_report import build_report, load_runs, plot_report, render_markdown
from .costs import cost_table
from .exponent import EXPONENT_SIZES, measure_exponents, render_exponents
from .robustness import compare_models

__all__ = [
    "EXPONENT_SIZES",
    "StraightforwardModel",
    "Task",
    "build_report",
    "compare_decoders",
    "compare_models",
    "cost_table",
    "load_runs",
    "measure_exponents",
    "plot_report",
    "render_exponents",
    "render_markdown",
]
