"""Images a second of the training loader alone: `python -m training.throughput RECIPE DATASET [field=value ...]`.

Reads, decodes and augments as training does, in `num_workers` processes, without a model. To keep GPUs fed, the figure
times the number of training processes must exceed the images a second that they train on.
"""

import argparse
import sys
from collections.abc import Sequence

from depict_hf.photo_files import shown_lines

from .data import load_dataset_splits
from .evidence.throughput import MEASURED_SECONDS, build_loader, measure
from .recipes import get_recipe

# The names that this module had before its machinery moved into a room stay importable.
__all__ = ["MEASURED_SECONDS", "build_loader", "main", "measure"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.throughput", description=__doc__)
    parser.add_argument("recipe", help="a function of training.recipes")
    parser.add_argument("dataset", help="Hub name, or local folder (see training.data.load_dataset_splits)")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="replace fields of the recipe")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = get_recipe(arguments.recipe).override(arguments.overrides)
        loader = build_loader(recipe, load_dataset_splits(arguments.dataset, recipe.data.streaming))
        images, seconds = measure(loader)
    except (OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    print(
        f"{images / seconds:.1f} images a second: {images} images in {seconds:.1f} s, {loader.num_workers} workers, "
        f"batches of {loader.batch_size}, crops of {recipe.data.crop_size}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
