"""Render the cards of models from the records beside them: `python -m training.cards FOLDER ...`.

Of this repository: `python -m training.cards model_cards depict_hf/default_model`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .evidence.model_cards import write_model_card, write_model_cards


def main(argv: Sequence[str] | None = None) -> int:
    """Write the cards of folders, and their index.

    Returns:
        0 if all went well, 1 if a record or a card is at fault.
    """
    parser = argparse.ArgumentParser(prog="python -m training.cards", description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="of one model, with card.json, or with a folder for each model, to which the paper's are added",
    )
    arguments = parser.parse_args(argv)
    try:
        for folder in arguments.folders:
            single = (folder / "card.json").is_file()
            for path in [write_model_card(folder)] if single else write_model_cards(folder):
                print(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
