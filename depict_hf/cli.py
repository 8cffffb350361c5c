"""The command `depict`: segment photographs, convert published checkpoints."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

DEFAULT_MODEL = Path(__file__).parent / "default_model"
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all went well, 1 if a photograph could not be segmented, 2 if the command could not start.
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (OSError, ValueError) as error:
        print(f"depict: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="depict", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    segment = commands.add_parser("segment", help="label every pixel of photographs")
    segment.set_defaults(command=segment_photos)
    segment.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="image file, or folder of image files")
    segment.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or Hub name; default: the one shipped")
    segment.add_argument("--output", type=Path, default=Path("segmented"), help="folder for results (%(default)s)")
    segment.add_argument("--scales", type=float, nargs="+", default=[1.0], help="sizes relative to the model's own")
    segment.add_argument("--flip", action="store_true", help="average with the mirror image")
    segment.add_argument("--alpha", type=float, default=0.5, help="weight of the colours in the overlay (%(default)s)")
    segment.add_argument("--device", default="cpu", help="cpu, cuda, mps, ... (%(default)s)")

    convert = commands.add_parser("convert", help="turn a published checkpoint.pth into a model folder")
    convert.set_defaults(command=convert_published)
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint.pth, or the folder with it")
    convert.add_argument("output", type=Path, metavar="OUT", help="folder for the model; new or empty")
    convert.add_argument("--variant", type=Path, help="variant.yml; default: the one beside the checkpoint")
    convert.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to this repository")
    return parser


def segment_photos(args: argparse.Namespace) -> int:
    """Write an overlay with a legend and a palette image of class ids per photograph; print each class's share."""
    import torch
    from tqdm import tqdm

    from . import DepictForSemanticSegmentation, DepictImageProcessor

    paths = list(_expand(args.photos))
    if args.model == str(DEFAULT_MODEL) and not DEFAULT_MODEL.is_dir():
        raise FileNotFoundError("This installation carries no model; name one with --model FOLDER_OR_HUB_NAME.")
    model = DepictForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
    image_processor = DepictImageProcessor.from_pretrained(args.model)
    args.output.mkdir(parents=True, exist_ok=True)

    num_failed = 0
    progress = tqdm(list(zip(paths, _unique_stems(paths), strict=True)), disable=len(paths) == 1, unit="photo")
    for path, stem in progress:
        # One photograph that cannot be read must not lose the others. These are what reading one raises: missing or
        # truncated files and unknown formats (OSError), broken contents (ValueError, SyntaxError), or sizes
        # beyond PIL's limit.
        try:
            report = _segment_one(path, stem, model, image_processor, args)
        except (OSError, ValueError, SyntaxError, _decompression_bomb()) as error:
            num_failed += 1
            progress.write(f"depict: {path}: {error}", file=sys.stderr)
        else:
            progress.write(report)
    return 1 if num_failed else 0


def _segment_one(path: Path, stem: str, model, image_processor, args: argparse.Namespace) -> str:
    """Segment one photograph, write its pictures and return its table."""
    from .inference import load_photo, segment
    from .labels import colors_for
    from .visualization import class_shares, label_image, overlay

    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    colors = colors_for(names)
    photo = load_photo(path)
    [segmentation] = segment(model, image_processor, [photo], args.scales, args.flip)
    pictures = {
        args.output / f"{stem}_overlay.png": overlay(photo, segmentation, colors, names, args.alpha),
        args.output / f"{stem}_labels.png": label_image(segmentation, colors),
    }
    for target, picture in pictures.items():
        picture.save(target)
    rows = [f"  {100 * share:6.2f} %  {name}" for name, share in class_shares(segmentation, names)]
    return "\n".join([f"{path} -> {', '.join(map(str, pictures))}", *rows])


def convert_published(args: argparse.Namespace) -> int:
    """Convert a checkpoint of the authors of DEPICT or Segmenter and save it, and upload it if asked."""
    from .conversion import convert_checkpoint

    if args.output.is_dir() and any(args.output.iterdir()):
        raise ValueError(f"{args.output} is not empty; choose a new folder, so that nothing is overwritten.")
    model, image_processor = convert_checkpoint(args.checkpoint, args.variant)
    model.save_pretrained(args.output)
    image_processor.save_pretrained(args.output)
    config = model.config
    print(
        f"{args.checkpoint} -> {args.output}: decoder {config.decoder_type}, {config.num_labels} classes, "
        f"{model.num_parameters() / 1e6:.1f} million parameters, window {config.window_size} / {config.window_stride}"
    )
    if args.push_to_hub:
        model.push_to_hub(args.push_to_hub)
        image_processor.push_to_hub(args.push_to_hub)
        print(f"Uploaded to {args.push_to_hub}")
    return 0


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


def _unique_stems(paths: Iterable[Path]) -> list[str]:
    """A name for the results of each photograph; photographs of one name are numbered."""
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 1
        while stem in stems:
            number += 1
            stem = f"{path.stem}_{number}"
        stems.append(stem)
    return stems


def _decompression_bomb() -> type[Exception]:
    import PIL.Image

    return PIL.Image.DecompressionBombError


if __name__ == "__main__":
    sys.exit(main())
