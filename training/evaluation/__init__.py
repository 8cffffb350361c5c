"""Data set-level mIoU, corrupted photographs, worst images, pictures, measurements, and records of all of these."""

from .arguments import (
    add_data_arguments,
    check_outputs,
    end_processes,
    load_samples,
    load_with_overrides,
    settings,
    start_processes,
)
from .calibration import Calibration, CalibrationObserver, check_diagram, draw_reliability
from .card import write_card
from .corruptions import CORRUPTIONS, SEVERITIES, Corruption, parse_corruptions
from .evaluate_split import (
    METRIC_DEFINITION,
    Execution,
    Observer,
    Protocol,
    ScoreObserver,
    evaluate,
    evaluate_under,
    spread,
    under_corruption,
)
from .measurement import count_flops, interleaved_seconds, log_slope, matrix_product, peak_extra_bytes, wait_for
from .metrics import EvaluateMeanIoU, MeanIoU, compare_metrics, largest_difference, scores
from .pictures import sample_picture, write_picture
from .records import (
    class_names,
    describe,
    describe_calibration,
    environment,
    flush_every_line,
    percent,
    render_table,
    write_figure,
    write_json,
    write_whole,
)
from .report import draw_curves, render_report
from .shared_classes import open_shared_samples, read_shared_classes
from .temperature import PixelSample, figures_at, fit_temperature
from .worst_images import WorstImages, check_sheet, save_sheet

__all__ = [
    "CORRUPTIONS",
    "METRIC_DEFINITION",
    "SEVERITIES",
    "Calibration",
    "CalibrationObserver",
    "Corruption",
    "EvaluateMeanIoU",
    "Execution",
    "MeanIoU",
    "Observer",
    "PixelSample",
    "Protocol",
    "ScoreObserver",
    "WorstImages",
    "add_data_arguments",
    "check_diagram",
    "check_outputs",
    "check_sheet",
    "class_names",
    "compare_metrics",
    "count_flops",
    "describe",
    "describe_calibration",
    "draw_curves",
    "draw_reliability",
    "end_processes",
    "environment",
    "evaluate",
    "evaluate_under",
    "figures_at",
    "fit_temperature",
    "flush_every_line",
    "interleaved_seconds",
    "largest_difference",
    "load_samples",
    "load_with_overrides",
    "log_slope",
    "matrix_product",
    "open_shared_samples",
    "parse_corruptions",
    "peak_extra_bytes",
    "percent",
    "read_shared_classes",
    "render_report",
    "render_table",
    "sample_picture",
    "save_sheet",
    "scores",
    "settings",
    "spread",
    "start_processes",
    "under_corruption",
    "wait_for",
    "write_card",
    "write_figure",
    "write_json",
    "write_picture",
    "write_whole",
]
