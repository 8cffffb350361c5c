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
    from PIL.Image import DecompressionBombError
    from tqdm import tqdm

    from .inference import load_photo

    paths = list(_expand(args.photos))
    targets = _targets(paths, args.output)
    model, image_processor = _load_model(args.model, args.device)
    args.output.mkdir(parents=True, exist_ok=True)

    num_failed = 0
    progress = tqdm(list(zip(paths, targets, strict=True)), disable=len(paths) == 1, unit="photo")
    for path, (overlay_path, labels_path) in progress:
        # One photograph that cannot be read must not lose the others. These are what reading one raises: missing or
        # truncated files and unknown formats (OSError), broken contents (ValueError; SyntaxError from PIL's readers of
        # EXIF and PNG), or sizes beyond PIL's limit. What goes wrong later is no fault of the photograph.
        try:
            photo = load_photo(path)
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
            num_failed += 1
            progress.write(f"depict: {path}: {error}", file=sys.stderr)
            continue
        table = _segment_one(photo, overlay_path, labels_path, model, image_processor, args)
        progress.write(f"{path} -> {overlay_path}, {labels_path}\n{table}")
    return 1 if num_failed else 0


def _load_model(name: str, device: str):
    """Model in float32 and its image processor; every weight must come from the files.

    Raises:
        OSError: If there is no default model.
        ValueError: If the model cannot be loaded whole, or not to this device.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from . import DepictForSemanticSegmentation, DepictImageProcessor

    if name == str(DEFAULT_MODEL) and not DEFAULT_MODEL.is_dir():
        raise FileNotFoundError("This installation carries no model; name one with --model FOLDER_OR_HUB_NAME.")
    # Missing files, wrong settings, damaged weights, weights of other shapes or no such device (AssertionError where
    # torch was built without it).
    try:
        model, loading = DepictForSemanticSegmentation.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        image_processor = DepictImageProcessor.from_pretrained(name)
        model = model.eval().to(device)
    except (OSError, ValueError, StrictDataclassError, SafetensorError, RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot load the model {name} to {device}: {error}") from error
    # transformers only logs these, and fills missing weights with random numbers.
    for kind in ("missing_keys", "unexpected_keys"):
        if loading[kind]:
            keys = ", ".join(sorted(loading[kind])[:3])
            raise ValueError(f"{name} does not hold the weights its config.json describes; {kind}: {keys}, ...")
    return model, image_processor


def _segment_one(photo, overlay_path: Path, labels_path: Path, model, image_processor, args: argparse.Namespace) -> str:
    """Segment one photograph, write its pictures and return its table."""
    from .inference import segment
    from .labels import colors_for
    from .visualization import class_shares, label_image, overlay

    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    colors = colors_for(model.config.id2label)
    [segmentation] = segment(model, image_processor, [photo], args.scales, args.flip)
    overlay(photo, segmentation, colors, names, args.alpha).save(overlay_path)
    label_image(segmentation, colors).save(labels_path)
    return "\n".join(f"  {100 * share:6.2f} %  {name}" for name, share in class_shares(segmentation, names))


def convert_published(args: argparse.Namespace) -> int:
    """Convert a checkpoint of the authors of DEPICT or Segmenter and save it, and upload it if asked."""
    from .conversion import convert_checkpoint

    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"{args.output} is not an empty folder; choose a new one, so that nothing is overwritten.")
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
