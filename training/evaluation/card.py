"""The card of a trained recipe, from the records beside it."""

from pathlib import Path

from depict_hf.hub import render_card as render_any_card
from depict_hf.writing import write_whole


def write_card(folder: Path, note: str | None = None) -> Path:
    """Write or replace `README.md` of a trained model's folder, as the Hub shows it, from the records beside it.

    Args:
        folder: With `recipe.json` and `evaluation.json` of `training.train` and, if several scales were evaluated,
            `evaluation_multi_scale.json`; whatever else `depict_hf.hub.render_card` knows is shown, too.
        note: A paragraph that comes first.

    Raises:
        FileNotFoundError: If one of the first two records is missing.
    """
    path = folder / "README.md"
    write_whole(render_card(folder, note), path)
    return path


def render_card(folder: Path, note: str | None = None) -> str:
    """Return what `write_card` writes."""
    for name in ("recipe.json", "evaluation.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, needed the records of training.train.")
    return render_any_card(folder, note)
