"""The command `depict`: segment photographs; train, evaluate, convert and export models."""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from .interruption import Interruption, Terminated, ending_at_once
from .options import (
    add_convert_arguments,
    add_demo_arguments,
    add_explain_arguments,
    add_export_arguments,
    add_push_arguments,
    add_segment_arguments,
)
from .photo_files import allowed_pixels, shown, shown_lines
from .photographs import (
    CONFIDENCE_SUFFIXES,
    PHOTO_SUFFIXES,
    Processes,
    find_photographs,
    standard_input,
)
from .resuming import Outcome, Results, how_to_go_on
from .threads import spin_briefly
from .writing import check_file, check_folder, whole_folder, write_json, write_whole

__all__ = ["PHOTO_SUFFIXES", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 if a photograph could not be segmented or the disk is full, 2 if the command could not
        start, 130 after SIGINT, 143 after SIGTERM; for `TRAINING_COMMANDS` what they return.
    """
    spin_briefly()
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and classes that its encoding does not know
    try:
        with ending_at_once():
            if argv and argv[0] in TRAINING_COMMANDS:
                return _training_module(argv[0]).main(argv[1:], f"depict {argv[0]}")
            args = _parser().parse_args(argv)
            args.arguments = argv
            return COMMANDS[args.command].run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"depict: {shown_lines(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        from .passes import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print("depict: there is not enough memory; take a smaller image, or close other programs.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        print(f"depict: stopped by {number.name}; nothing is left half-written; start it again.", file=sys.stderr)
        return 128 + number


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
        from .versions import version_line

        print(version_line())
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


def segment_photos(args: argparse.Namespace) -> int:
    """Label every pixel of photographs, write pictures and label maps, and print the share of each class.

    Processes started by `torchrun -m depict_hf segment ...` or `accelerate launch -m depict_hf segment ...` share the
    photographs; together they write what one process writes. SIGINT and SIGTERM end the run after the photographs in
    hand, a second SIGINT at once.
    """
    processes = Processes.launched()
    kinds = list(dict.fromkeys(args.format or ["overlay", "png"]))
    interruption, outcome = Interruption(), Outcome()
    with ExitStack() as stack:
        if Path("-") in args.photos:
            if processes.count > 1:
                raise ValueError("Standard input cannot be shared by several processes; run without a launcher.")
            piped = stack.enter_context(standard_input())
            args.photos = [piped if path == Path("-") else path for path in args.photos]
        written = [*kinds, *CONFIDENCE_SUFFIXES] if args.confidence else kinds
        photographs = find_photographs(args.photos, args.output, written, args.recursive)
        share = processes.share(photographs)
        results = Results(share, written, args.output)
        left = results.choose(args.resume, args.overwrite)
        if args.resume:
            print(
                f"depict: done before: {_of_photographs(len(share) - len(left), results, processes)}", file=sys.stderr
            )
        if left:
            from .results import segment_share

            outcome = segment_share(args, results, processes, left, interruption)
    total = None
    if not interruption and not outcome.full:
        with interruption.in_hand():
            total = processes.total(outcome.num_failed, lambda: bool(interruption))
    if total is None:
        reason = f"stopped: {outcome.full.strerror}" if outcome.full else f"stopped by {interruption.name}"
        failed = f", {outcome.num_failed} failed" if outcome.num_failed else ""
        done = f"done: {_of_photographs(results.num_done(), results, processes)}{failed}"
        go_on = how_to_go_on(args.arguments) if processes.count == 1 else "the same command and --resume"
        room = "make room, and " if outcome.full else ""
        print(f"depict: {reason}; {done}; {room}go on with: {go_on}", file=sys.stderr)
        return 1 if outcome.full else interruption.status
    if processes.rank == 0:
        Results(photographs, written, args.output).end()
    return 1 if total else 0


def _of_photographs(number: int, results: Results, processes: Processes) -> str:
    share = "" if processes.count == 1 else f" of process {processes.rank + 1} of {processes.count}"
    return f"{number} of {len(results.photographs)} photographs{share}"


def convert_published(args: argparse.Namespace) -> int:
    """Convert a checkpoint of the authors of DEPICT or Segmenter and save it, and upload it if asked."""
    from .conversion import convert_with_report

    check_folder(args.output, args.overwrite)
    conversion = convert_with_report(args.checkpoint, args.variant, args.protocol, args.im_size, args.class_names)
    model, image_processor = conversion.model, conversion.image_processor
    with whole_folder(args.output, replace=args.overwrite) as folder:
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        write_json(conversion.record(), folder / "conversion.json")
    print(shown_lines(f"{args.checkpoint} -> {args.output}: " + "\n  ".join(conversion.report)))
    if conversion.warning:
        print(f"depict: {shown(conversion.warning)}", file=sys.stderr)
    if args.push_to_hub:
        from .hub import push

        print(f"Uploaded: {push(args.output, args.push_to_hub)}")
    return 0


def push_model(args: argparse.Namespace) -> int:
    """Check a model's folder and upload it to the Hugging Face Hub in one commit, with the code that loads it.

    Refused are weights that are damaged or not finite, a card that claims figures which no result file (.json) in the
    folder holds, and what does not load back with equal logits, with this package and without it.
    """
    from .hub import prepared, upload

    with prepared(args.folder, repository=args.repository) as ready:
        if args.dry_run:
            print(ready.report())
            return 0
        for note in ready.notes:
            print(f"depict: {note}", file=sys.stderr)
        options = {name: getattr(args, name) for name in ("private", "revision", "tag", "overwrite")}
        print(f"Uploaded: {upload(ready, args.repository, **options)}")
    return 0


def export_file(args: argparse.Namespace) -> int:
    """Write a model as one file that needs none of this package, and compare it with the model on a photograph."""
    from .export import export_model
    from .loading import load_model

    check_folder(args.output, args.overwrite)
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
        overwrite=args.overwrite,
    )
    print(shown_lines(f"{args.model} -> {exported.report()}"))
    if exported.metadata["protocol"] == "one window" and args.format == "onnx":
        print("  hint       --dynamic --preprocess --labels makes a file from whole photographs to label maps")
    return 0


def explain_photo(args: argparse.Namespace) -> int:
    """Write a page that shows how every part of a photograph came to its class; it needs nothing but a browser."""
    from .explain import explain
    from .inference import UNREADABLE, read_photo
    from .loading import load_model

    output = args.output or (None if args.json else Path(f"{args.photo.stem}_explained.html"))
    if output is not None and os.path.realpath(output) == os.path.realpath(args.photo):
        raise ValueError(f"{shown(output)} is the photograph and would be overwritten; change --output.")
    check_file(output, args.overwrite)
    try:
        photo, note = read_photo(args.photo, allowed_pixels(None))
    except UNREADABLE as error:
        raise ValueError(f"{shown(args.photo)}: {error}") from error
    if note is not None:
        print(f"depict: {shown(args.photo)}: {note}", file=sys.stderr)
    model, image_processor = load_model(args.model)
    at = tuple(args.at) if args.at else None
    explanation = explain(model, image_processor, photo, at, args.class_name, shown(args.photo.name))
    text = json.dumps(explanation.numbers, allow_nan=False) if args.json else explanation.page()
    if output is None:
        print(text)
    else:
        write_whole(text, output, "replace" if args.overwrite else "refuse")
        print(f"{shown(args.photo)} -> {shown(output)}")
    return 0


def print_information(args: argparse.Namespace) -> int:
    """Print versions, extras and what computes here, for a report of a fault; it names no folders and no users."""
    from .versions import describe_installation

    for line in describe_installation():
        print(line)
    return 0


def show_demo(args: argparse.Namespace) -> int:
    """Show a page in the browser on which photographs are segmented and explained, until Ctrl-C; no network is needed.

    Any number of visitors may use it at once; photographs are computed one after the other. With --space, write a
    folder for Hugging Face Spaces instead.
    """
    if args.space is not None:
        from .demo import write_space

        write_space(args.space, args.model)
        print(f"{args.model} -> {shown(args.space)}: hf upload USER/NAME {shown(args.space)} . --repo-type space")
        return 0
    from .demo import serve
    from .loading import fastest_device

    device = fastest_device() if args.device == "auto" else args.device
    serve(args.model, device, args.host, args.port, args.max_photo_pixels)
    return 0


COMMANDS = {
    "segment": Command("label every pixel of photographs", add_segment_arguments, segment_photos),
    "convert": Command("turn a published checkpoint.pth into a model folder", add_convert_arguments, convert_published),
    "explain": Command(
        "show why a photograph got its classes, on a page for people", add_explain_arguments, explain_photo
    ),
    "demo": Command("show a page in the browser to try a model on", add_demo_arguments, show_demo),
    "export": Command("write a model as a file that runs without this package", add_export_arguments, export_file),
    "push": Command("upload a model folder to the Hugging Face Hub", add_push_arguments, push_model),
    "info": Command("print versions, for reports of faults", lambda parser: None, print_information),
}
# These read their own arguments: `depict evaluate ...` is `python -m training.evaluate ...` of the repository.
TRAINING_COMMANDS = {
    "train": TrainingCommand("own_classes", "train a model for the classes of one's own label maps"),
    "evaluate": TrainingCommand("evaluate", "measure a model on a data set"),
    "calibrate": TrainingCommand("calibrate", "fit the temperature of a model's confidences to a data set"),
}


if __name__ == "__main__":
    sys.exit(main())
