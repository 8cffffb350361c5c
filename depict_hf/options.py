"""What the commands of `depict` take; nothing heavy is imported for it."""

import argparse
from pathlib import Path

from .photographs import RESULT_SUFFIXES
from .quality import QUALITIES


def add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "photos", nargs="+", type=Path, metavar="PHOTO", help="image file, folder of image files, or - for stdin"
    )
    parser.add_argument("--model", default="default", help="folder, Hub name or 'default' (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("segmented"), help="folder for results (%(default)s)")

    results = parser.add_argument_group("results")
    results.add_argument(
        "--format",
        action="extend",
        type=_kinds,
        metavar="KIND[,KIND]",
        help=f"{', '.join(RESULT_SUFFIXES)} (overlay,png): a picture with a legend; class ids as palette image, as "
        "array, as COCO run lengths, as GeoJSON polygons",
    )
    results.add_argument(
        "--classes", metavar="NAME[,NAME]", help="only these; all other pixels get no class, which is 255 in label maps"
    )
    results.add_argument(
        "--confidence",
        nargs="?",
        type=_bits,
        const=8,
        metavar="8|16",
        help="also write, for every pixel, the probability of its label and that minus the next class's as grey PNG of "
        "8 (the default) or 16 bits, value / 255 or / 65535, and draw the former",
    )
    results.add_argument("--json", action="store_true", help="print one line of JSON a photograph, and nothing else")
    results.add_argument("--recursive", action="store_true", help="search sub-folders; results go to such folders too")
    results.add_argument(
        "--palette",
        choices=("auto", "official", "distinct"),
        default="auto",
        help="the data set's colours, or distinct ones, for colour-blind people too (auto: official for the classes of "
        "ADE20K, Cityscapes and Pascal Context, else distinct)",
    )
    results.add_argument("--alpha", type=float, default=0.5, help="weight of the colours in the overlay (%(default)s)")

    earlier = results.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume", action="store_true", help="leave out photographs whose results are all there, and go on"
    )
    earlier.add_argument("--overwrite", action="store_true", help="replace results that are there")

    protocol = parser.add_argument_group("protocol", "How photographs are read: as the model's files say, unless told.")
    protocol.add_argument(
        "--quality",
        choices=tuple(QUALITIES),
        default="balanced",
        help="fast: windows side by side; balanced: as the model's files say; best: three sizes and their mirror "
        "images (%(default)s); the options below outrank it",
    )
    protocol.add_argument("--scales", type=float, nargs="+", help="sizes relative to the model's own")
    protocol.add_argument("--flip", action="store_true", help="average with the mirror image")
    protocol.add_argument("--size", type=int, metavar="N", help="pixels of the shorter side")
    protocol.add_argument("--window-size", type=_window, metavar="N", help="pixels, or none for whole images")
    protocol.add_argument("--window-stride", type=int, metavar="N", help="pixels from one window to the next")

    execution = parser.add_argument_group("execution")
    execution.add_argument("--max-batch-pixels", type=int, metavar="N", help="that share a pass; bounds the memory")
    execution.add_argument(
        "--max-photo-pixels",
        type=_positive,
        metavar="N",
        help="that a photograph may have, in its file and resized for the model at any scale (134217728); bounds the "
        "memory",
    )
    execution.add_argument("--device", default="auto", help="cpu, cuda, mps, xpu, ...; auto: cuda, mps or xpu if there")
    execution.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="to compute in; auto: bfloat16 where the processor has it, which is faster, else float32",
    )
    execution.add_argument(
        "--backend",
        choices=("pytorch", "onnxruntime"),
        default="pytorch",
        help="onnxruntime: --model is a folder made by `depict export` (%(default)s)",
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth, or the folder with it")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the model; new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the model or export in OUT")
    parser.add_argument("--variant", type=Path, help="variant.yml; default: the one beside the checkpoint")
    parser.add_argument(
        "--protocol",
        choices=("published", "training"),
        default="published",
        help="sizes and windows of the published figures, or of validation during training (%(default)s)",
    )
    parser.add_argument(
        "--im-size", type=int, metavar="N", help="pixels of the shorter side, instead of the protocol's"
    )
    parser.add_argument(
        "--class-names", type=Path, metavar="FILE", help="names of the classes: .json, or .txt with one a line"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload the result, as `depict push OUT REPO` does")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, Hub name or 'default'")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the file; new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the model or export in OUT")
    parser.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="%(default)s by default")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fix the input in pixels, processed as one image; default: one window where the model has windows, else "
        "any size (onnx) or any multiples of the patch (torch-export)",
    )
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help="onnx: any size where the model has windows, too; the file cuts and merges them, all windows of an image "
        "at a time",
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="photographs as uint8 (batch, height, width, 3) go in: the file normalises and, where their size is free, "
        "resizes",
    )
    parser.add_argument("--labels", action="store_true", help="also output label maps, at the input's size")
    parser.add_argument("--fp16", action="store_true", help="weights and computation in half precision")
    parser.add_argument("--int8", action="store_true", help="onnx: matrix products in 8-bit integers")
    parser.add_argument("--photo", type=Path, help="photograph to compare file and model on; default: one that is made")
    parser.add_argument("--license", metavar="NAME", help="of the weights; default: as the model's card says")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder of the model, or 'default'")
    parser.add_argument(
        "repository", metavar="REPO", help="USER/NAME, or NAME for one of your own; created where there is none"
    )
    parser.add_argument("--private", action="store_true", help="nobody else may see it")
    parser.add_argument("--revision", metavar="REV", help="branch, made where there is none; default: the main one")
    parser.add_argument("--tag", metavar="TAG", help="name for this state of the repository")
    parser.add_argument("--overwrite", action="store_true", help="replace another model in the repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and print files, sizes and the card; nothing is sent"
    )


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="image file")
    parser.add_argument("--model", default="default", help="folder, Hub name or 'default' (%(default)s)")
    parser.add_argument(
        "--at", type=int, nargs=2, metavar=("X", "Y"), help="open the page at this pixel; default: the middle"
    )
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="open the page at this class's token")
    parser.add_argument("--json", action="store_true", help="write the numbers instead of the page")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: PHOTO_explained.html; with --json, standard output"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default", help="folder, Hub name or 'default' (%(default)s)")
    parser.add_argument("--port", type=_positive, metavar="N", help="default: the first that is free from 7860 on")
    parser.add_argument(
        "--host", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone; 0.0.0.0 lets others reach the page"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, xpu, ...; auto: cuda, mps or xpu if there")
    parser.add_argument(
        "--max-photo-pixels",
        type=_positive,
        metavar="N",
        help="that a photograph's file may have (33554432); bounds the memory",
    )
    parser.add_argument(
        "--space", type=Path, metavar="DIR", help="write a folder to upload as a Hugging Face Space, and show no page"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in RESULT_SUFFIXES:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(RESULT_SUFFIXES)}")
    return kinds


def _bits(text: str) -> int:
    if text not in ("8", "16"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 8 nor 16; name photographs before --confidence")
    return int(text)


def _window(text: str) -> int | str:
    from .loading import parse_window_size  # not before the option is given: it brings PyTorch

    return parse_window_size(text)
