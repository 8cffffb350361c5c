"""The command `depict`: segment photographs; train, evaluate, convert and export models."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from .photographs import (
    CONFIDENCE_SUFFIXES,
    PHOTO_SUFFIXES,
    RESULT_SUFFIXES,
    Processes,
    find_photographs,
    standard_input,
)

__all__ = ["PHOTO_SUFFIXES", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 if a photograph could not be segmented, 2 if the command could not start; for
        `TRAINING_COMMANDS` what they return.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in TRAINING_COMMANDS:
            return _training_module(argv[0]).main(argv[1:], f"depict {argv[0]}")
        args = _parser().parse_args(argv)
        return COMMANDS[args.command].run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"depict: {error}", file=sys.stderr)
        return 2


class Command(NamedTuple):
    """One line of help, what adds the arguments, and what runs the command and returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class TrainingCommand(NamedTuple):
    """The module of the training package whose `main` takes the arguments, and one line of help."""

    module: str
    help: str


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="depict", description=__doc__)
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.help, description=command.run.__doc__))
    for name, each in TRAINING_COMMANDS.items():
        subparsers.add_parser(name, help=each.help)
    return parser


class _Version(argparse.Action):
    """Prints the version of the installed package, which is looked up only when it is asked for."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"depict-hf {version('depict-hf')}")
        except PackageNotFoundError:
            print("depict-hf, not installed: run from its source code")
        parser.exit()


def _training_module(command: str):
    """Import the module behind a training command: part of an installed package, beside it in the repository.

    Raises:
        ImportError: If it is in neither place, or packages that it needs are missing.
    """
    module = TRAINING_COMMANDS[command].module
    for package in ("depict_hf.training", "training"):
        try:
            return import_module(f"{package}.{module}")
        except ModuleNotFoundError as error:
            if error.name not in (package, f"{package}.{module}"):
                raise ImportError(f"{error}; `depict {command}` needs it: pip install 'depict-hf[train]'") from error
    raise ImportError(f"`depict {command}` is not part of this installation; install depict-hf from its wheel.")


def _segment_arguments(parser: argparse.ArgumentParser) -> None:
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

    protocol = parser.add_argument_group("protocol", "How photographs are read: as the model's files say, unless told.")
    protocol.add_argument("--scales", type=float, nargs="+", default=[1.0], help="sizes relative to the model's own")
    protocol.add_argument("--flip", action="store_true", help="average with the mirror image")
    protocol.add_argument("--size", type=int, metavar="N", help="pixels of the shorter side")
    protocol.add_argument("--window-size", type=_window, metavar="N", help="pixels, or none for whole images")
    protocol.add_argument("--window-stride", type=int, metavar="N", help="pixels from one window to the next")

    execution = parser.add_argument_group("execution")
    execution.add_argument("--max-batch-pixels", type=int, metavar="N", help="that share a pass; bounds the memory")
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


def segment_photos(args: argparse.Namespace) -> int:
    """Label every pixel of photographs, write pictures and label maps, and print the share of each class.

    Processes started by `torchrun -m depict_hf segment ...` or `accelerate launch -m depict_hf segment ...` share the
    photographs; together they write what one process writes.
    """
    processes = Processes.launched()
    kinds = list(dict.fromkeys(args.format or ["overlay", "png"]))
    with ExitStack() as stack:
        if Path("-") in args.photos:
            if processes.count > 1:
                raise ValueError("Standard input cannot be shared by several processes; run without a launcher.")
            piped = stack.enter_context(standard_input())
            args.photos = [piped if path == Path("-") else path for path in args.photos]
        written = [*kinds, *CONFIDENCE_SUFFIXES] if args.confidence else kinds
        photographs = find_photographs(args.photos, args.output, written, args.recursive)
        share = processes.share(photographs)
        num_failed = 0
        if share:
            from .results import segment_share

            num_failed = segment_share(args, kinds, processes, share)
    return 1 if processes.total(num_failed) else 0


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth, or the folder with it")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the model; new or empty")
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
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to this repository")


def convert_published(args: argparse.Namespace) -> int:
    """Convert a checkpoint of the authors of DEPICT or Segmenter and save it, and upload it if asked."""
    from .conversion import convert_with_report

    _check_empty(args.output)
    conversion = convert_with_report(args.checkpoint, args.variant, args.protocol, args.im_size, args.class_names)
    model, image_processor = conversion.model, conversion.image_processor
    model.save_pretrained(args.output)
    image_processor.save_pretrained(args.output)
    print(f"{args.checkpoint} -> {args.output}: " + "\n  ".join(conversion.report))
    if conversion.warning:
        print(f"depict: {conversion.warning}", file=sys.stderr)
    if args.push_to_hub:
        model.push_to_hub(args.push_to_hub)
        image_processor.push_to_hub(args.push_to_hub)
        print(f"Uploaded to {args.push_to_hub}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder, Hub name or 'default'")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the file; new or empty")
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


def export_file(args: argparse.Namespace) -> int:
    """Write a model as one file that needs none of this package, and compare it with the model on a photograph."""
    from .export import export_model
    from .loading import load_model

    _check_empty(args.output)
    model, image_processor = load_model(args.model)
    exported = export_model(
        model,
        image_processor,
        args.output,
        args.format,
        tuple(args.size) if args.size else None,
        args.labels,
        args.int8,
        fp16=args.fp16,
        dynamic=args.dynamic,
        preprocess=args.preprocess,
        photo=args.photo,
        license=args.license,
    )
    print(f"{args.model} -> {exported.report()}")
    if exported.metadata["protocol"] == "one window" and args.format == "onnx":
        print("  hint       --dynamic --preprocess --labels makes a file from whole photographs to label maps")
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
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


def explain_photo(args: argparse.Namespace) -> int:
    """Write a page that shows how every part of a photograph came to its class; it needs nothing but a browser."""
    from .explain import explain
    from .inference import UNREADABLE, load_photo
    from .loading import load_model

    output = args.output or (None if args.json else Path(f"{args.photo.stem}_explained.html"))
    if output is not None and output.resolve() == args.photo.resolve():
        raise ValueError(f"{output} is the photograph and would be overwritten; change --output.")
    try:
        photo = load_photo(args.photo)
    except UNREADABLE as error:
        raise ValueError(f"{args.photo}: {error}") from error
    model, image_processor = load_model(args.model)
    at = tuple(args.at) if args.at else None
    explanation = explain(model, image_processor, photo, at, args.class_name, args.photo.name)
    text = json.dumps(explanation.numbers, allow_nan=False) if args.json else explanation.page()
    if output is None:
        print(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(f"{args.photo} -> {output}")
    return 0


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; choose a new one, so that nothing is overwritten.")


COMMANDS = {
    "segment": Command("label every pixel of photographs", _segment_arguments, segment_photos),
    "convert": Command("turn a published checkpoint.pth into a model folder", _convert_arguments, convert_published),
    "explain": Command(
        "show why a photograph got its classes, on a page for people", _explain_arguments, explain_photo
    ),
    "export": Command("write a model as a file that runs without this package", _export_arguments, export_file),
}
# These read their own arguments: `depict evaluate ...` is `python -m training.evaluate ...` of the repository.
TRAINING_COMMANDS = {
    "train": TrainingCommand("own_classes", "train a model for the classes of one's own label maps"),
    "evaluate": TrainingCommand("evaluate", "measure a model on a data set"),
    "calibrate": TrainingCommand("calibrate", "fit the temperature of a model's confidences to a data set"),
}


if __name__ == "__main__":
    sys.exit(main())
