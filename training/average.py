"""Average the weights of models that were trained from one start: `python -m training.average OUT MODEL MODEL ...`.

Models of the same kind that began with the same weights, and differ in seed, order of the images or rates, often have a
mean that is better than each of them, at the cost of one. Settings and image processor are those of the first.

Source:
    Wortsman et al., "Model soups", ICML 2022, section 2: the uniform soup.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation
from depict_hf.loading import load_model
from depict_hf.photo_files import shown_lines
from depict_hf.ranges import shown
from depict_hf.writing import check_folder, whole_folder

# What says where a model came from, how it was kept from overfitting or how its predictions are used, not what its
# weights mean.
FREE_FIELDS = {
    "_name_or_path",
    "attention_probs_dropout_prob",
    "auto_map",
    "decoder_drop_path_rate",
    "decoder_dropout",
    "drop_path_rate",
    "hidden_dropout_prob",
    "temperature",
    "training_scenes",
    "transformers_version",
    "window_size",
    "window_stride",
}


@torch.no_grad()
def average(folder: Path, sources: Sequence[str]) -> DepictForSemanticSegmentation:
    """Write a model whose weights are the means of those of `sources`, taken in float64, and return it.

    Args:
        folder: Where to write; it holds the whole model or nothing.
        sources: Folders or Hub names of two models or more.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If there are fewer than two models, one cannot be loaded, or one is of another kind than the first.
    """
    if len(sources) < 2:
        raise ValueError(f"Got {len(sources)} models, needed two or more to average.")
    model, image_processor = load_model(sources[0])
    means = {name: weight.double() for name, weight in model.state_dict().items()}
    for source in sources[1:]:
        other = load_model(source)[0]
        _check_kind(source, other.config, sources[0], model.config)
        for name, weight in other.state_dict().items():
            means[name] += weight
    model.load_state_dict({name: total / len(sources) for name, total in means.items()})
    with whole_folder(folder) as fresh:
        model.save_pretrained(fresh)
        image_processor.save_pretrained(fresh)
    return model


def _check_kind(source: str, config: DepictConfig, first_source: str, first: DepictConfig) -> None:
    """Refuse a model whose weights do not mean what those of the first one do."""
    ours, theirs = _kind(first), _kind(config)
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if names:
        differing = "; ".join(f"{name}={shown(theirs.get(name))}, there {shown(ours.get(name))}" for name in names[:3])
        raise ValueError(f"Got {source}, which is of another kind than {first_source}: {differing}. Leave it out.")


def _kind(config: DepictConfig) -> dict:
    fields = config.to_dict()
    if fields.get("backbone_config"):
        fields["backbone_config"] = _without_free(fields["backbone_config"])
    return _without_free(fields)


def _without_free(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name not in FREE_FIELDS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.average", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the model")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="two or more folders or Hub names")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names")
    arguments = parser.parse_args(argv)
    try:
        check_folder(arguments.output, arguments.overwrite)
        average(arguments.output, arguments.models)
    except (OSError, ValueError) as error:
        print(f"error: {shown_lines(error)}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: the mean of {len(arguments.models)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
