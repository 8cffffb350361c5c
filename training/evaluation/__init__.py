"""Data set-level mIoU, corrupted photographs, worst images, pictures, measurements, and records of all of these."""

from .arguments import add_data_arguments, load_samples, load_with_overrides, settings, start_processes
from .corruptions import CORRUPTIONS, SEVERITIES, Corruption, parse_corruptions
from .evaluate_split import (
    METRIC_DEFINITION,
    Execution,
    Observer,
    Protocol,
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
    environment,
    flush_every_line,
    percent,
    render_table,
    write_json,
    write_whole,
)
from .report import draw_curves, render_report
from .worst_images import WorstImages, check_sheet, save_sheet

__all__ = [
    "CORRUPTIONS",
    "METRIC_DEFINITION",
    "SEVERITIES",
    "Corruption",
    "EvaluateMeanIoU",
    "Execution",
    "MeanIoU",
    "Observer",
    "Protocol",
    "WorstImages",
    "add_data_arguments",
    "check_sheet",
    "class_names",
    "compare_metrics",
    "count_flops",
    "describe",
    "draw_curves",
    "environment",
    "evaluate",
    "evaluate_under",
    "flush_every_line",
    "interleaved_seconds",
    "largest_difference",
    "load_samples",
    "load_with_overrides",
    "log_slope",
    "matrix_product",
    "parse_corruptions",
    "peak_extra_bytes",
    "percent",
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
    "write_json",
    "write_picture",
    "write_whole",
]
