"""What the README's figures come from: decoders compared, speed and memory measured."""

from .baseline import StraightforwardModel
from .benchmark_cases import (
    PUBLISHED_SCALES,
    PUBLISHED_WINDOW,
    Task,
    build_model,
    dtype_name,
    end_to_end,
    in_dtypes,
    other_models,
    random_photo,
    stages,
    training_step,
)
from .comparison_report import build_report, load_runs, plot_report, render_markdown
from .costs import cost_table
from .exponent import EXPONENT_SIZES, measure_exponents, render_exponents

__all__ = [
    "EXPONENT_SIZES",
    "PUBLISHED_SCALES",
    "PUBLISHED_WINDOW",
    "StraightforwardModel",
    "Task",
    "build_model",
    "build_report",
    "cost_table",
    "dtype_name",
    "end_to_end",
    "in_dtypes",
    "load_runs",
    "measure_exponents",
    "other_models",
    "plot_report",
    "random_photo",
    "render_exponents",
    "render_markdown",
    "stages",
    "training_step",
]
