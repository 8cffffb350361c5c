"""Figures that a card claims, and whether the result files beside it hold them."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# Half a unit of the last digit that is printed, and what binary numbers add to that.
_HALF_UNIT = 0.5 + 1e-6
_NUMBER = re.compile(
    r"(?<![\w./-])[-+]?\d{1,3}(?:,\d{3})+(?![\w,])|(?<![\w./-])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w/])"
)
_METRIC = r"(?:mIoU|mean[ _-]IoU|IoU|(?:pixel |overall |mean )?accuracy)"
_FIGURE = r"\d+\.\d+|\d+(?= ?%)"
_IN_PROSE = re.compile(
    rf"{_METRIC}\W{{0,3}}(?:\w+ ){{0,2}}?(?P<after>{_FIGURE})|(?P<before>{_FIGURE}) ?%? (?:points of )?{_METRIC}",
    re.IGNORECASE,
)
# A table that says one of these is one of results: its whole numbers have to be backed, too.
_RESULTS = re.compile(r"\b(?:m?IoU|acc(?:uracy|\.)?|dice|recall|precision|F1|AP)(?!\w)", re.IGNORECASE)


# Percent; beside results also milliseconds, and millions and milliards of operations or parameters.
_SCALES = (1, 100)
_FURTHER_SCALES = (1000, 1e-6, 1e-9)


class Claim(NamedTuple):
    """A figure on a card: the number as it is printed, what it is said of, where it stands, and if that is a result."""

    number: str
    label: str
    place: str
    of_results: bool = True

    def __str__(self) -> str:
        return f"{self.label + ' ' if self.label else ''}{self.number} ({self.place})"


def unbacked_claims(card: str, folder: Path) -> list[Claim]:
    """Find the figures of a card that no result file backs.

    Figures are the values of its `model-index`, the numbers in its tables (whole ones only where the table is one of
    IoU, accuracy or the like), and those in a sentence beside the name of a metric. A figure is backed by a number in
    a file of JSON that is equal to it, in its unit or in percent, rounded to the digits that are printed; in tables of
    other things also in milliseconds, or in millions or milliards. Where keys of the files say what a figure is of, as
    the name of a class or a metric does, only numbers below such keys count.

    Args:
        card: Text of the `README.md`.
        folder: Folder whose `.json` files, also in folders below it, are the results. Settings (`config.json`,
            `preprocessor_config.json`) and `card.json` are none.

    Returns:
        The claims without backing, in the order of the card.
    """
    numbers = _Numbers(folder)
    metadata, body = split_card(card)
    return [claim for claim in (*_indexed(metadata), *_printed(body)) if not numbers.back(claim)]


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Separate the metadata at the top of a card from its text.

    Raises:
        ValueError: If the metadata are not YAML.
    """
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if not found:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of README.md are not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata of README.md are {type(metadata).__name__}, needed names with values.")
    return metadata, card[found.end() :]


class _Numbers:
    """All numbers in the result files of a folder, by the names they stand below."""

    def __init__(self, folder: Path):
        self.all: set[float] = set()
        self.below: dict[str, set[float]] = {}
        for path in sorted(folder.rglob("*.json")):
            if path.name not in ("config.json", "preprocessor_config.json", "card.json"):
                self._add(json.loads(path.read_text(encoding="utf-8")), frozenset())

    def _add(self, value: Any, names: frozenset[str]) -> None:
        if isinstance(value, Mapping):
            for name, each in value.items():
                self._add(each, names | {_plain(str(name))})
        elif isinstance(value, list):
            for each in value:
                self._add(each, names)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            self.all.add(value)
            for name in names:
                self.below.setdefault(name, set()).add(value)

    def back(self, claim: Claim) -> bool:
        text = claim.number.replace(",", "")
        if not _NUMBER.fullmatch(text):
            return False
        digits = len(text.partition("e")[0].partition(".")[2]) - int(text.partition("e")[2] or 0)
        tolerance = min(_HALF_UNIT * 10**-digits, _HALF_UNIT)
        numbers = self.below.get(_plain(claim.label), self.all)
        scales = _SCALES if claim.of_results else (*_SCALES, *_FURTHER_SCALES)
        return any(abs(number * scale - float(text)) <= tolerance for number in numbers for scale in scales)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[`*_]", " ", name).split()).casefold()


def _indexed(metadata: Mapping[str, Any]) -> Iterator[Claim]:
    for model in metadata.get("model-index") or ():
        for result in model.get("results") or ():
            for metric in result.get("metrics") or ():
                yield Claim(str(metric.get("value")).rstrip("%").strip(), str(metric.get("type")), "model-index")


def _printed(body: str) -> Iterator[Claim]:
    """Find numbers in tables, be they of pipes or of aligned text, and beside metrics in sentences."""
    for kind, block in _blocks(body):
        if kind == "table":
            of_results = bool(_RESULTS.search(block))
            for line in block.splitlines():
                cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if "|" in line else None
                cells = re.split(r"\s{2,}", line.strip()) if cells is None else cells
                for number in (found[0] for cell in cells[1:] for found in _NUMBER.finditer(cell)):
                    if of_results or "." in number:
                        yield Claim(number, cells[0], "table", of_results)
        else:
            for found in _IN_PROSE.finditer(" ".join(block.split())):
                yield Claim(found["after"] or found["before"], "", f"text: {found[0]}")


def _blocks(body: str) -> Iterator[tuple[str, str]]:
    """Split a text into tables and prose; code in a language is neither."""
    prose: list[str] = []
    lines = iter(body.splitlines())
    for line in lines:
        fence = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
        if not fence and not line.lstrip().startswith("|"):
            prose.append(line)
            continue
        yield "prose", "\n".join(prose)
        prose = []
        block = [] if fence else [line]
        for following in lines:
            if following.strip().startswith(fence[1]) if fence else not following.lstrip().startswith("|"):
                prose += [] if fence else [following]
                break
            block.append(following)
        if not fence or fence[2] in ("", "text"):
            yield "table", "\n".join(block)
    yield "prose", "\n".join(prose)
