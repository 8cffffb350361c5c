"""What every command that evaluates takes, and what it makes of that: protocol, samples, processes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from depict_hf.loading import BACKENDS, DTYPES

from ..data import SegmentationDataset, load_dataset_splits, open_samples
from .evaluate_split import Execution, Protocol


def start_processes() -> PartialState:
    """Join the processes that were launched together, on the CPU where nothing is faster or accelerate was told so."""
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command that evaluates has; `settings` and `load_samples` read them."""
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-images", type=int, metavar="N", help="only so many, evenly spaced over the split")
    parser.add_argument("--image-column")
    parser.add_argument("--label-column")
    parser.add_argument(
        "--reduce-labels",
        action=argparse.BooleanOptionalAction,
        help="ignore label 0 and shift the others down by one; as the image processor does, if neither is given",
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave out images that cannot be decoded instead of refusing"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="sizes relative to the model's own")
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and computation (%(default)s)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="pytorch", help="onnxruntime: the model is a folder of `depict export`"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the record")


def settings(arguments: argparse.Namespace, state: PartialState) -> tuple[Protocol, Execution]:
    """Make protocol and execution of the arguments that `add_data_arguments` added.

    Raises:
        ValueError: If a number is out of its range.
    """
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"Got --{option} {getattr(arguments, name)}, needed at least {least}.")
    protocol = Protocol(tuple(arguments.scales), arguments.flip, max_images=arguments.max_images)
    return protocol, Execution(arguments.batch_size, arguments.workers, state)


def load_samples(
    arguments: argparse.Namespace, class_names: Sequence[str], reduce_labels: bool, state: PartialState
) -> SegmentationDataset:
    """Open the split that the arguments of `add_data_arguments` name.

    Args:
        class_names: The model's, in the order of their ids.
        reduce_labels: Where the arguments leave it open.

    Raises:
        OSError: If there is no such dataset.
        ValueError: If there is no such split, its columns are neither given nor found, or images are at fault.
    """
    with state.main_process_first():
        splits = load_dataset_splits(arguments.dataset)
        # The other processes find what the main process found while it read all images.
        return open_samples(
            splits,
            arguments.split,
            class_names,
            arguments.image_column,
            arguments.label_column,
            reduce_labels if arguments.reduce_labels is None else arguments.reduce_labels,
            arguments.skip_unreadable,
            arguments.workers,
        )
