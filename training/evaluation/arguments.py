"""What every command that evaluates takes, and what it makes of that: protocol, samples, processes."""

import argparse
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.inference import MAX_BATCH_PIXELS
from depict_hf.loading import BACKENDS, DTYPES, load_model, override_protocol, parse_window_size
from depict_hf.writing import check_file

from ..data import SegmentationDataset, complete_splits, load_dataset_splits, open_samples, print_once
from .evaluate_split import Execution, Protocol

if TYPE_CHECKING:
    from depict_hf.onnx_backend import OnnxModel


def start_processes() -> PartialState:
    """Join the processes that were launched together, on the CPU where nothing is faster or accelerate was told so."""
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def end_processes() -> None:
    """Close the connections of the processes that were launched together; to be called when nothing uses them any more.

    A group of processes lives as long as anything refers to it, such as a wrapped model in a cycle of references. Left
    to the end of the interpreter, its threads would free tensors then, and the process would abort.
    """
    gc.collect()
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command that evaluates has; the other functions here read them."""
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
    parser.add_argument("--size", type=int, metavar="N", help="pixels of the shorter side; default: the model's own")
    parser.add_argument(
        "--window-size",
        type=parse_window_size,
        metavar="N|none",
        help="side of windows in pixels, none for whole images; default: the model's own",
    )
    parser.add_argument(
        "--window-stride", type=int, metavar="N", help="pixels from window to window; default: the model's overlap"
    )
    parser.add_argument(
        "--max-batch-pixels",
        type=int,
        default=MAX_BATCH_PIXELS,
        metavar="N",
        help="of the images or windows that share a forward pass; bounds the memory (%(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and computation (%(default)s)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="pytorch", help="onnxruntime: the model is a folder of `depict export`"
    )
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that decode (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the record")
    parser.add_argument("--overwrite", action="store_true", help="replace files to be written that exist")


def settings(arguments: argparse.Namespace, state: PartialState) -> tuple[Protocol, Execution]:
    """Make protocol and execution of the arguments that `add_data_arguments` added.

    Raises:
        ValueError: If a number is out of its range.
    """
    for name, least in (("batch_size", 1), ("workers", 0), ("max_batch_pixels", 1)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"Got --{option} {getattr(arguments, name)}, needed at least {least}.")
    protocol = Protocol(tuple(arguments.scales), arguments.flip, max_images=arguments.max_images)
    return protocol, Execution(arguments.batch_size, arguments.workers, state, arguments.max_batch_pixels)


def check_outputs(arguments: argparse.Namespace, state: PartialState, *more: Path | None) -> None:
    """Refuse, before anything is evaluated, `--output` and more files that cannot be written or are there already.

    Raises:
        ValueError: As `depict_hf.writing.check_file`, unless the arguments of `add_data_arguments` say `--overwrite`.
    """
    if state.is_main_process:
        for path in (arguments.output, *more):
            check_file(path, arguments.overwrite)


def load_with_overrides(
    arguments: argparse.Namespace, name: str, state: PartialState
) -> tuple["DepictForSemanticSegmentation | OnnxModel", DepictImageProcessor]:
    """Load a model and its image processor, with size and windows as the arguments of `add_data_arguments` say.

    Raises:
        OSError, ValueError, ImportError: As `load_model`; ValueError also as `override_protocol`.
    """
    model, image_processor = load_model(name, state.device, arguments.dtype, arguments.backend)
    override_protocol(model, image_processor, arguments.size, arguments.window_size, arguments.window_stride)
    return model, image_processor


def load_samples(
    arguments: argparse.Namespace, class_names: Sequence[str], reduce_labels: bool, state: PartialState
) -> SegmentationDataset:
    """Open the split that the arguments of `add_data_arguments` name.

    Args:
        class_names: The model's, in the order of their ids.
        reduce_labels: Whether 0 is ignored, where the arguments leave it open.

    Raises:
        OSError: If there is no such dataset.
        ValueError: If there is no such split, its columns are neither given nor found, or images are at fault.
    """
    with state.main_process_first():
        splits = load_dataset_splits(arguments.dataset)
        if arguments.split.partition("[")[0] not in splits:
            # As `open_data` makes it for training, so that no image is both trained and evaluated on.
            splits = complete_splits(splits, arguments.image_column, arguments.label_column)
            print_once("\n".join(splits.notes))
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
