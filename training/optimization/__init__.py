"""How weights move: Trainer, losses, parameter groups, rates, averages, adapters, checkpoints."""

from .adapters import add_adapters, merge_adapters
from .attention import PlainAttention
from .checkpoints import check_output, discard_unfinished, find_checkpoint, warn_once
from .groups import (
    SCALE_PARAMETERS,
    TOKENS,
    count_encoder_blocks,
    create_optimizer,
    create_scheduler,
    encoder_block,
    freeze_encoder_blocks,
    optimizer_groups,
    parameter_groups,
    rate_factor,
)
from .losses import RecipeLoss, balanced_weights
from .pace import Budget, Pace, PacedTrainer, ProgressLine, clock_time
from .same_run import check_same_run, write_run_record
from .sharding import check_sharding
from .trainer import SegmentationTrainer

__all__ = [
    "SCALE_PARAMETERS",
    "TOKENS",
    "Budget",
    "Pace",
    "PacedTrainer",
    "PlainAttention",
    "ProgressLine",
    "RecipeLoss",
    "SegmentationTrainer",
    "add_adapters",
    "balanced_weights",
    "check_output",
    "check_same_run",
    "check_sharding",
    "clock_time",
    "count_encoder_blocks",
    "create_optimizer",
    "create_scheduler",
    "discard_unfinished",
    "encoder_block",
    "find_checkpoint",
    "freeze_encoder_blocks",
    "merge_adapters",
    "optimizer_groups",
    "parameter_groups",
    "rate_factor",
    "warn_once",
    "write_run_record",
]
