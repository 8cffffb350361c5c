"""Photographs and label maps in folders, or side by side, known by usual words in their names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from ..imagefolder import SPLIT_NAMES
from .colors import resolve_colors
from .found import Found, Tree, listed, words

_IMAGE_WORDS = r"images?|imgs?|photos?|photographs?|pictures?|rgb|inputs?|sat"
_LABEL_WORDS = (
    r"masks?|labels?|annotations?|annots?|annos?|gts?|(?:ground)?truth|segs?|segmentations?|labelmaps?|labelimage|"
    r"targets?|trimaps?|mattes?|semantics?"
)
# Say nothing of their own beside the words above.
_FILLERS = r"jpe?g|png|data|files?|maps?|ground|class|set|split|part|ids?"
_AT_ENDS = f"(?:{_IMAGE_WORDS}|{_LABEL_WORDS}|ground|map)"
_PREFIX = re.compile(rf"^{_AT_ENDS}[_\-. ]+", re.IGNORECASE)
_SUFFIX = re.compile(rf"[_\-. ]+{_AT_ENDS}$", re.IGNORECASE)


@dataclass(frozen=True)
class _File:
    """A picture: which split and kind its folders say, the other folders, and its name without suffix."""

    path: Path
    split: str | None
    kind: str | None
    rest: tuple[str, ...]

    @property
    def stem(self) -> str:
        return self.path.stem


def find_pairs(tree: Tree) -> Found | None:
    """Find folders such as `images` and `masks`, or label maps beside photographs; None where there are neither.

    Words in the names of folders say what they hold and of which split, in whichever order: `images/train`,
    `train/images`, `train_images`. Names of photographs and label maps are equal, or differ by such a word at an end:
    `1.jpg` and `1_mask.png`. Without folders of splits, lists of names, such as `train.txt`, tell them.

    Raises:
        ValueError: If no names agree, a photograph has several label maps, or label maps have colours of unknown
            meaning.
    """
    files = [_classified(tree.relative(path), path) for path in tree.images]
    images = [each for each in files if each.kind == "image"]
    labels = [each for each in files if each.kind == "label"]
    loose = [each for each in files if each.kind is None]
    if labels:
        images, unused = (images, loose) if images else (loose, [])
    else:
        images, labels = _side_by_side(images or loose)
        unused = loose if images and images[0].kind else []
    if not labels or not images:
        return None
    matched, left_images, left_labels = _match(tree, images, labels)
    notes = [
        _left_out(tree, files, kind)
        for files, kind in (
            (left_images, "without a label map"),
            (left_labels, "that are label maps without a photograph"),
            (unused, "in folders that are neither of photographs nor of label maps"),
        )
        if files
    ]
    splits = _by_split(tree, matched)
    class_names, colored = tree.class_names(), resolve_colors(tree.folder, [b.path for _, b in matched])
    drawn = dict(zip((label.path for _, label in matched), colored.paths, strict=True))
    layout = f"photographs in {_folders(tree, images)} and label maps in {_folders(tree, labels)}"
    if images[0].path.parent == labels[0].path.parent:
        layout = f"photographs and label maps side by side in {_folders(tree, images)}"
    return Found(
        layout + (f", coloured as {colored.source} says" if colored.source else ""),
        {name: [(image, drawn[label]) for image, label in pairs] for name, pairs in splits.items()},
        colored.class_names or class_names,
        notes=(*notes, *colored.notes),
    )


def _classified(relative: PurePath, path: Path) -> _File:
    split = kind = None
    rest = []
    for part in relative.parts[:-1]:
        found = words(part)
        usual = f"{_IMAGE_WORDS}|{_LABEL_WORDS}|{_FILLERS}"
        if not found or not all(word in SPLIT_NAMES or re.fullmatch(usual, word) for word in found):
            rest.append(part)
            continue
        split = next((SPLIT_NAMES[word] for word in found if word in SPLIT_NAMES), split)
        if any(re.fullmatch(_LABEL_WORDS, word) for word in found):
            kind = "label"
        elif any(re.fullmatch(_IMAGE_WORDS, word) for word in found):
            kind = "image"
    return _File(path, split, kind, tuple(rest))


def _bare(stem: str) -> str:
    """Return a name without words such as "mask" at its ends."""
    while (shorter := _SUFFIX.sub("", _PREFIX.sub("", stem))) != stem:
        stem = shorter
    return stem


def _is_label_name(stem: str) -> bool:
    """Whether a word at an end of a file's name says that it is a label map."""
    ends = re.split(r"[_\-. ]+", stem.lower())
    named = any(re.fullmatch(_LABEL_WORDS, each) for each in (ends[0], ends[-1]))
    return len(ends) > 1 and (named or ends[-2:] == ["label", "map"])


def _side_by_side(files: list[_File]) -> tuple[list[_File], list[_File]]:
    """Tell photographs and label maps of one folder by words in their names, else by .jpg and .png of one name."""
    labels = [each for each in files if _is_label_name(each.stem)]
    if not labels:
        photographs = {each.path.with_suffix("") for each in files if each.path.suffix.lower() in (".jpg", ".jpeg")}
        labels = [
            each for each in files if each.path.suffix.lower() == ".png" and each.path.with_suffix("") in photographs
        ]
    paths = {each.path for each in labels}
    return [each for each in files if each.path not in paths], labels


def _match(
    tree: Tree, images: list[_File], labels: list[_File]
) -> tuple[list[tuple[_File, _File]], list[_File], list[_File]]:
    """Match pairs, in the order of the photographs, and find files without a counterpart.

    Names are compared within split and folder, without the split, or alone, whichever finds most.
    """
    places: tuple[Callable[[_File], tuple], ...] = (
        lambda each: (each.split, each.rest),
        lambda each: (each.rest,),
        lambda each: (),
    )
    attempts = [_candidates(images, labels, place) for place in places]
    attempts += [_candidates_by_affix(images, labels)] if not any(map(any, attempts)) else []
    candidates = max(attempts, key=lambda each: (sum(len(found) == 1 for found in each), sum(map(bool, each))))
    if not any(candidates):
        raise ValueError(
            f"Found {len(images)} photographs, such as {tree.relative(images[0].path)}, and {len(labels)} label maps, "
            f"such as {tree.relative(labels[0].path)}, in {tree.folder}, but no two have the same name; name each "
            "label map as its photograph, with another suffix, or with the same ending, such as _mask, before it."
        )
    found: dict[Path, list[_File]] = {}
    for label, possible in zip(labels, candidates, strict=True):
        if len(possible) > 1:
            names = " and ".join(str(tree.relative(each.path)) for each in possible[:3])
            raise ValueError(
                f"The label map {tree.relative(label.path)} could belong to {names}; give photographs different "
                "names, or remove one of them."
            )
        for image in possible:
            found.setdefault(image.path, []).append(label)
    for path, several in found.items():
        if len(several) > 1:
            names = " and ".join(str(tree.relative(each.path)) for each in several[:3])
            raise ValueError(
                f"{tree.relative(path)} has {len(several)} label maps, {names}; needed is one for each photograph: "
                "move the others out of the folder."
            )
    pairs = [(image, found[image.path][0]) for image in images if image.path in found]
    left_labels = [label for label, possible in zip(labels, candidates, strict=True) if not possible]
    return pairs, [image for image in images if image.path not in found], left_labels


def _candidates(images: list[_File], labels: list[_File], place: Callable[[_File], tuple]) -> list[list[_File]]:
    """Find for each label map the photographs in the same place of its name, or of its name without such words."""
    by_stem: dict[tuple, list[_File]] = {}
    by_bare: dict[tuple, list[_File]] = {}
    for image in images:
        by_stem.setdefault((*place(image), image.stem), []).append(image)
        by_bare.setdefault((*place(image), _bare(image.stem)), []).append(image)
    return [
        by_stem.get((*place(label), label.stem)) or by_bare.get((*place(label), _bare(label.stem)), [])
        for label in labels
    ]


def _candidates_by_affix(images: list[_File], labels: list[_File]) -> list[list[_File]]:
    """Do the same where all names of label maps, or all of photographs, have one beginning and one end more.

    So are `street_P.png` and `street.png` in some data sets. Only an addition that fits every label map counts.
    """
    for longer, shorter, labels_are_longer in ((labels, images, True), (images, labels, False)):
        by_stem: dict[str, list[_File]] = {}
        for each in longer:
            by_stem.setdefault(each.stem, []).append(each)
        example = longer[0].stem
        for name in sorted({each.stem for each in shorter if each.stem in example}, key=len, reverse=True):
            before, _, after = example.partition(name)
            partners = {each.path: by_stem.get(f"{before}{each.stem}{after}", []) for each in shorter}
            if labels_are_longer:
                by_label: dict[Path, list[_File]] = {}
                for image in images:
                    for label in partners[image.path]:
                        by_label.setdefault(label.path, []).append(image)
                found = [by_label.get(label.path, []) for label in labels]
            else:
                found = [partners[label.path] for label in labels]
            if len(labels) > 1 and all(found):
                return found
    return [[] for _ in labels]


def _split_lists(tree: Tree, pairs: list[tuple[_File, _File]]) -> list[str | None]:
    """Find splits by lists such as `train.txt` that name every photograph exactly once; else None for each."""
    by_name: dict[str, list[str]] = {}
    for path in tree.with_suffix(".txt"):
        split = SPLIT_NAMES.get(path.stem.lower())
        if split is not None:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.strip():
                    by_name.setdefault(Path(line.split()[0]).stem, []).append(split)
    found = [by_name.get(image.stem, []) for image, _ in pairs]
    return [each[0] for each in found] if all(len(each) == 1 for each in found) else [None] * len(pairs)


def _by_split(tree: Tree, pairs: list[tuple[_File, _File]]) -> dict[str, list[tuple[Path, Path]]]:
    names = [image.split or label.split for image, label in pairs]
    if not any(names):
        names = _split_lists(tree, pairs)
    if any(names) and not all(names):
        index = names.index(None)
        raise ValueError(
            f"{names.count(None)} of {len(names)} photographs, such as {tree.relative(pairs[index][0].path)}, lie in "
            "no folder of a split (train, val, test), but others do; put all into such folders, or none."
        )
    splits: dict[str, list[tuple[Path, Path]]] = {}
    for name in ("train", "validation", "test"):
        inside = [(a.path, b.path) for (a, b), split in zip(pairs, names, strict=True) if (split or "train") == name]
        if inside:
            splits[name] = inside
    return splits


def _folders(tree: Tree, files: list[_File]) -> str:
    """Name the folders of some files, in words."""
    folders = dict.fromkeys(tree.relative(each.path).parent.as_posix() for each in files)
    return listed([f"{each}/" if each != "." else "the folder itself" for each in folders], 3)


def _left_out(tree: Tree, files: list[_File], kind: str) -> str:
    return f"{len(files)} files {kind} are left out: {listed([str(tree.relative(each.path)) for each in files])}"
