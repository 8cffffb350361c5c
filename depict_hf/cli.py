"""The command `depict`: segment photographs, convert published checkpoints, export models."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 if a photograph could not be segmented, 2 if the command could not start.
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"depict: {error}", file=sys.stderr)
        return 2


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="depict", description=__doc__)
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    segment = commands.add_parser("segment", help="label every pixel of photographs")
    segment.set_defaults(command=segment_photos)
    segment.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="image file, or folder of image files")
    segment.add_argument(
        "--model", default="default", help="folder, Hub name or 'default', the model shipped (%(default)s)"
    )
    segment.add_argument("--output", type=Path, default=Path("segmented"), help="folder for results (%(default)s)")
    segment.add_argument("--scales", type=float, nargs="+", default=[1.0], help="sizes relative to the model's own")
    segment.add_argument("--flip", action="store_true", help="average with the mirror image")
    segment.add_argument("--alpha", type=float, default=0.5, help="weight of the colours in the overlay (%(default)s)")
    segment.add_argument("--device", default="cpu", help="cpu, cuda, mps, ... (%(default)s)")
    segment.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="to compute in; bfloat16 is faster where processors know it (%(default)s)",
    )
    segment.add_argument(
        "--backend",
        choices=("pytorch", "onnxruntime"),
        default="pytorch",
        help="onnxruntime: --model is a folder made by `depict export` (%(default)s)",
    )

    convert = commands.add_parser("convert", help="turn a published checkpoint.pth into a model folder")
    convert.set_defaults(command=convert_published)
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth, or the folder with it")
    convert.add_argument("output", type=Path, metavar="OUT", help="folder for the model; new or empty")
    convert.add_argument("--variant", type=Path, help="variant.yml; default: the one beside the checkpoint")
    convert.add_argument(
        "--protocol",
        choices=("published", "training"),
        default="published",
        help="sizes and windows of the published figures, or of validation during training (%(default)s)",
    )
    convert.add_argument(
        "--im-size", type=int, metavar="N", help="pixels of the shorter side, instead of the protocol's"
    )
    convert.add_argument(
        "--class-names", type=Path, metavar="FILE", help="names of the classes: .json, or .txt with one a line"
    )
    convert.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to this repository")

    export = commands.add_parser("export", help="write a model as a file that runs without this package")
    export.set_defaults(command=export_file)
    export.add_argument("model", metavar="MODEL", help="folder, Hub name or 'default'")
    export.add_argument("output", type=Path, metavar="OUT", help="folder for the file; new or empty")
    export.add_argument("--format", choices=("onnx", "torch-export"), default="onnx", help="%(default)s by default")
    export.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fix the input in pixels, processed as one image; default: one window where the model has windows, else "
        "any size (onnx) or any multiples of the patch (torch-export)",
    )
    export.add_argument("--labels", action="store_true", help="also output label maps, at the input's size")
    export.add_argument("--int8", action="store_true", help="onnx: matrix products in 8-bit integers")
    return parser


def segment_photos(args: argparse.Namespace) -> int:
    """Write an overlay with a legend and a palette image of class ids per photograph; print each class's share."""
    from tqdm import tqdm

    from .inference import segment_files
    from .loading import load_model

    paths = list(dict.fromkeys(_expand(args.photos)))
    targets = dict(zip(paths, _targets(paths, args.output), strict=True))
    model, image_processor = load_model(args.model, args.device, args.dtype, args.backend)
    args.output.mkdir(parents=True, exist_ok=True)

    def write(path: Path, photo, segmentation) -> str:
        return _write_pictures(photo, segmentation, *targets[path], model.config, args.alpha)

    num_failed = 0
    files = segment_files(model, image_processor, paths, write, args.scales, args.flip)
    progress = tqdm(files, total=len(paths), disable=len(paths) == 1, unit="photo")
    for file in progress:
        # One photograph that cannot be read must not lose the others.
        if file.error is not None:
            num_failed += 1
            progress.write(f"depict: {file.path}: {file.error}", file=sys.stderr)
            continue
        overlay_path, labels_path = targets[file.path]
        progress.write(f"{file.path} -> {overlay_path}, {labels_path}\n{file.result}")
    return 1 if num_failed else 0


def _write_pictures(photo, segmentation, overlay_path: Path, labels_path: Path, config, alpha: float) -> str:
    """Write a photograph's pictures and return its table."""
    from .labels import colors_for
    from .visualization import class_shares, label_image, overlay

    names = [config.id2label[index] for index in range(config.num_labels)]
    colors = colors_for(config.id2label)
    overlay(photo, segmentation, colors, names, alpha).save(overlay_path)
    label_image(segmentation, colors).save(labels_path)
    return "\n".join(f"  {100 * share:6.2f} %  {name}" for name, share in class_shares(segmentation, names))


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


def export_file(args: argparse.Namespace) -> int:
    """Export a model, and say what its input is."""
    from .export import export_model
    from .loading import load_model

    _check_empty(args.output)
    model, image_processor = load_model(args.model)
    size = tuple(args.size) if args.size else None
    path, size, outputs = export_model(model, image_processor, args.output, args.format, size, args.labels, args.int8)
    if size:
        sides = f"{size[0]} x {size[1]}"
    else:
        sides = "any height x any width" if args.format == "onnx" else "multiples of the patch"
    print(f"{args.model} -> {path}: pixel_values of {sides} pixels, in batches, to {', '.join(outputs)}")
    return 0


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; choose a new one, so that nothing is overwritten.")


def _expand(paths: Iterable[Path]) -> Iterable[Path]:
    """Image files as given, and those inside folders, sorted."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in PHOTO_SUFFIXES)
        if not found:
            raise ValueError(f"{path} holds no image files ({' '.join(PHOTO_SUFFIXES)}).")
        yield from found


def _targets(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Where the overlay and the labels of each photograph go; photographs of one name are numbered.

    Raises:
        ValueError: If a photograph would be overwritten.
    """
    photos = {path.resolve() for path in paths}
    # Names that differ only in case are one file on some systems.
    taken: set[str] = set()
    targets = []
    for path in paths:
        stem, number = path.stem, 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{path.stem}_{number}"
        taken.add(stem.casefold())
        targets.append((output / f"{stem}_overlay.png", output / f"{stem}_labels.png"))
        for target in targets[-1]:
            if target.resolve() in photos:
                raise ValueError(f"{target} is one of the photographs and would be overwritten; change --output.")
    return targets


if __name__ == "__main__":
    sys.exit(main())
