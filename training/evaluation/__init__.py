"""Data set-level mIoU, corrupted photographs, worst images, pictures, measurements, and records of all of these."""

from .corruptions import CORRUPTIONS, SEVERITIES, Corruption, parse_corruptions
from .evaluator import Execution, Protocol, evaluate, spread, under_corruption
from .measurement import count_flops, interleaved_seconds, log_slope, matrix_product, peak_extra_bytes
from .metrics import EvaluateMeanIoU, MeanIoU, largest_difference, scores
from .pictures import sample_picture, write_picture
from .records import environment, percent, render_table, write_json, write_whole
from .worst_images import WorstImages

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "Corruption",
    "EvaluateMeanIoU",
    "Execution",
    "MeanIoU",
    "Protocol",
    "WorstImages",
    "count_flops",
    "environment",
    "evaluate",
    "interleaved_seconds",
    "largest_difference",
    "log_slope",
    "matrix_product",
    "parse_corruptions",
    "peak_extra_bytes",
    "percent",
    "render_table",
    "sample_picture",
    "scores",
    "spread",
    "under_corruption",
    "write_json",
    "write_picture",
    "write_whole",
]
