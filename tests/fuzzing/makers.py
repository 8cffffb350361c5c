"""New cases of each kind, made of sound files by chance.

Each maker writes the files of one case into an empty folder, and returns its description.
"""

import contextlib
import dataclasses
import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bases import CLASSES, DATA_SETS
from .cases import BASES
from .mutations import (
    TEXTS,
    VALUES,
    damaged_archive,
    damaged_bytes,
    damaged_json,
    damaged_png,
    damaged_safetensors,
    damaged_text,
    damaged_value,
    damaged_yaml,
)

Case = dict[str, Any]
_STRANGE_NAMES = ("\udce9", "a\nb", "\x1b[31m", "-x", "%s", "a'b\"c", "é☃", "x" * 200)


def _sound(name: str) -> list[Path]:
    return sorted(path for path in (BASES / name).rglob("*") if path.is_file())


def _damaged_picture(rng: random.Random, path: Path) -> tuple[str, bytes]:
    data = path.read_bytes()
    if path.suffix == ".png" and rng.random() < 0.3:
        return "chunks", damaged_png(rng, data)
    return damaged_bytes(rng, data, [each.read_bytes() for each in rng.sample(_sound("photographs"), 3)])


def photographs(rng: random.Random, folder: Path) -> Case:
    """A damaged photograph: read by itself, as a label map, or by `depict segment` between two sound ones."""
    path = rng.choice(_sound("photographs"))
    how, data = _damaged_picture(rng, path)
    kind = rng.choices(["photograph", "label_map", "command"], [16, 3, 1])[0]
    if kind == "command":
        name = "1" + rng.choice([path.suffix, f"{rng.choice(_STRANGE_NAMES)}{path.suffix}"])
        folder /= "photos"
        folder.mkdir()
        for neighbour in ("0.png", "2.png"):
            (folder / neighbour).write_bytes((BASES / "photographs" / "rgb.png").read_bytes())
        (folder / name).write_bytes(data)
        arguments = ["segment", "photos", "--model", "model", "--format", "png", "--dtype", "float32"]
        found = ["segmented/0_labels.png", "segmented/2_labels.png"]
        return {"kind": kind, "base": ".", "arguments": arguments, "must_exist": found}
    name = f"damaged{path.suffix}"
    (folder / name).write_bytes(data)
    if kind == "label_map":
        return {"kind": kind, "base": "photographs/rgb.png", "photograph": "rgb.png", "file": name, "classes": 3}
    case: Case = {"kind": kind, "file": name, "opened": rng.random() < 0.5}
    if how == "cut" and path.name != "plain.ppm":  # whose last number may lose digits
        case |= {"base": f"photographs/{path.name}", "cut_from": path.name}
    if rng.random() < 0.7:
        case["max_pixels"] = 2**22  # what is larger only takes longer
    return case


def _damaged_file(rng: random.Random, path: Path) -> bytes:
    """Damage a file by what it holds, or its bytes."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.85:
        known = ("to_dict", "num_labels", "dtype", "quantization_config", "auto_map", "window_size", "backbone", "size")
        text = damaged_json(rng, data.decode(), (*known, "attribute_map", "per_layer_config", "problem_type", "a"))
        return text.encode("utf-8", "surrogatepass")
    if path.suffix == ".yml" and rng.random() < 0.85:
        return damaged_yaml(rng, data.decode()).encode("utf-8", "surrogatepass")
    if path.suffix == ".safetensors" and rng.random() < 0.4:
        return damaged_safetensors(rng, data)
    if path.suffix == ".pth" and rng.random() < 0.4:
        return damaged_archive(rng, data)
    if path.suffix == ".txt" and rng.random() < 0.8:
        return damaged_text(rng, data.decode()).encode("utf-8", "surrogatepass")
    return _damaged_picture(rng, path)[1]


def weights(rng: random.Random, folder: Path) -> Case:
    """A model folder, or a published checkpoint, one file of which is damaged."""
    base = rng.choice(["model", "model", "backbone_model", "published_sa", "published_linear"])
    names = [path.name for path in _sound(base)]
    # Settings have more ways to be wrong than the bytes of weights.
    name = rng.choice([*names, *(each for each in names if not each.endswith(("safetensors", "pth")))])
    path = BASES / base / name
    # Of weights, either the bytes, which a checksum tells, or what they say, with all that belongs to it.
    damaged_weights = name in ("model.safetensors", "checkpoint.pth") and rng.random() < 0.6
    if damaged_weights:
        others = [(BASES / base / each).read_bytes() for each in names]
        (folder / name).write_bytes(damaged_bytes(rng, path.read_bytes(), others)[1])
    else:
        (folder / name).write_bytes(_damaged_file(rng, path))
    if base.startswith("published"):
        how = "convert"
    else:
        how = "familiarity" if name.startswith("familiarity") else rng.choice(["load_model", "from_pretrained"])
    case: Case = {"kind": "model", "base": base, "how": how, "damaged_weights": damaged_weights}
    return case | {"protocol": rng.choice(["published", "training"])}


def data_sets(rng: random.Random, folder: Path) -> Case:
    """A data set in any layout with one to three files damaged, missing, or no files."""
    base = rng.choice(list(DATA_SETS))
    case: Case = {"kind": "data", "base": base, "skip": rng.random() < 0.5, "without": [], "special": {}}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = _sound(base)
        texts = [path for path in files if path.suffix in (".json", ".jsonl", ".xml", ".csv", ".txt", ".md")]
        path = rng.choice(texts if texts and rng.random() < 0.6 else files)
        name = str(path.relative_to(BASES / base))
        place, how = folder / name, rng.random()
        place.parent.mkdir(parents=True, exist_ok=True)
        if name in case["without"] or name in case["special"]:
            continue
        if how < 0.06:
            case["without"].append(name)
            place.unlink(missing_ok=True)
        elif how < 0.1:
            case["special"][name] = rng.choice(["folder", "pipe", "socket", f"link:{path.name}", "link:nowhere"])
        elif how < 0.12:
            strange = rng.choice(_STRANGE_NAMES) + path.suffix
            (place.parent / strange).write_bytes(path.read_bytes())
        elif path.suffix == ".json" and how < 0.85:
            place.write_text(damaged_json(rng, path.read_text()), errors="surrogatepass")
        elif path in texts and how < 0.85:
            place.write_text(damaged_text(rng, path.read_text()), errors="surrogatepass")
        elif path.suffix == ".png" and how < 0.4:
            place.write_bytes(rng.choice(_sound("photographs")).read_bytes())
        else:
            place.write_bytes(_damaged_picture(rng, path)[1])
    return case


def settings(rng: random.Random, folder: Path) -> Case:
    """A configuration, an image processor or a recipe with a value of another type or out of its range."""
    from depict_hf import DepictConfig
    from training.recipe import SECTIONS
    from training.recipes import RECIPES

    kind = rng.choice(["configuration", "image_processor", "recipe"])
    if kind == "configuration":
        known = json.loads(DepictConfig().to_json_string(use_diff=False))
        fields = rng.sample(sorted(DepictConfig.__dataclass_fields__), rng.choice([1, 1, 2]))
        return {"kind": kind, "fields": {name: _value(rng, known.get(name)) for name in fields}}
    if kind == "image_processor":
        known = json.loads((BASES / "model" / "preprocessor_config.json").read_text())
        name = rng.choice([*known, "crop_size", "pad_size", "do_convert_rgb", "do_antialias", "do_reduce_labels", "a"])
        return {"kind": kind, "settings": {name: _value(rng, known.get(name))}}
    overrides = []
    for _ in range(rng.choice([1, 1, 2])):
        section, fields = rng.choice(list(SECTIONS.items()))
        name = rng.choice(dataclasses.fields(fields)).name
        value = rng.choice(
            [str(rng.choice(VALUES)), *rng.sample(TEXTS, 2), f"{rng.choice(VALUES)},{rng.choice(VALUES)}"]
        )
        text = f"{rng.choice([name, f'{section}.{name}'])}={value}"
        overrides.append(damaged_text(rng, text) if rng.random() < 0.1 else text)
    case: Case = {"kind": kind, "recipe": rng.choice([*RECIPES])}
    if rng.random() < 0.7:
        return case | {"overrides": overrides}
    return case | {"values": {name: _value(rng, None)}}


def _value(rng: random.Random, sound: Any) -> Any:
    if rng.random() < 0.3 and isinstance(sound, (dict, list)):
        return damaged_value(rng, sound)
    return rng.choice(VALUES)


# Of a recipe, for one step on the smallest data.
RECIPE = (
    f"class_names={','.join(CLASSES)} size=14 crop_size=14 window_size=14 window_stride=7 epochs=1 batch_size=2 "
    "warmup_steps=1 evaluate_every_epochs=1 num_workers=0 precision=float32 cache_features=false"
)
# Command lines that end well, and options that each may have, with values that do.
_COMMANDS: tuple[tuple[str, str], ...] = (
    (
        "segment pairs/train/images --model model --dtype float32",
        "--format:png --format:npy,coco,geojson --classes:sky,road --confidence --confidence:16 --json --recursive "
        "--palette:distinct --alpha:0.3 --resume --overwrite --scales:0.5 --flip --size:20 --window-size:16 "
        "--window-size:none --window-stride:8 --max-batch-pixels:512 --max-photo-pixels:9999 --device:cpu --output:out "
        "--dtype:bfloat16 --backend:onnxruntime",
    ),
    (
        "convert published_sa out",
        "--overwrite --variant:published_sa/variant.yml --protocol:training --im-size:64 "
        "--class-names:pairs/classes.txt",
    ),
    (
        "export model out --format torch-export",
        "--overwrite --size:16:16 --dynamic --preprocess --labels --fp16 --int8 "
        "--photo:photographs/rgb.png --license:mit",
    ),
    ("explain photographs/rgb.png --model model", "--at:3:4 --class:sky --json --output:out.html --overwrite"),
    (
        "evaluate model pairs --workers 0",
        "--split:validation --split:train[:1] --max-images:1 --image-column:image --label-column:label --reduce-labels "
        "--skip-unreadable --scales:0.5:1 --flip --size:20 --window-size:none --window-stride:8 --max-batch-pixels:99 "
        "--dtype:bfloat16 --batch-size:2 --output:out.json --overwrite --corruption:noise:1 --contact-sheet:sheet.png "
        "--worst:1 --calibration --calibration:diagram.png --metric:own",
    ),
    (
        "calibrate model pairs --workers 0",
        "--split:test --max-images:1 --scales:0.5 --flip --size:20 --window-size:none "
        "--seed:3 --diagram:diagram.png --output:out.json --overwrite --batch-size:1",
    ),
    (
        "train pairs out --from model --max-steps 1",
        "--classes:sky,road,tree --decoder:linear --resume --epochs:1 --minutes:0.1",
    ),
    (
        f"training.train camvid_dinov2_small_sa pairs out --backbone backbone {RECIPE}",
        "--resume "
        "learning_rate=0.1 seed=3 decoder_type=linear precision=bf16 accumulation_steps=2 class_balance=0.5 "
        "cache_features=true freeze_encoder=true report_to=none keep_best=true flip=false",
    ),
)


# Files that these commands read.
_READ = (
    *("model/config.json", "model/config.json", "model/preprocessor_config.json", "model/model.safetensors"),
    *("model/familiarity.safetensors", "pairs/train/images/0.png", "pairs/train/masks/0.png", "pairs/classes.txt"),
    *("pairs/test/masks/0.png", "published_sa/variant.yml", "published_sa/checkpoint.pth", "backbone/config.json"),
    "photographs/rgb.png",
)


def commands(rng: random.Random, folder: Path) -> Case:
    """A command line with options added, changed, repeated or without their value, or with a damaged file to read."""
    # The two that train take as long as all others together.
    line, options = rng.choices(_COMMANDS, [8, 8, 2, 8, 8, 6, 2, 2])[0]
    arguments = shlex.split(line)
    for option in rng.sample(options.split(), rng.choice([0, 1, 1, 2, 3])):
        arguments += option.split(":") if option.startswith("--") else [option]
    if rng.random() < 0.3:
        path = BASES / rng.choice(_READ)
        (folder / path.relative_to(BASES)).parent.mkdir(parents=True)
        (folder / path.relative_to(BASES)).write_bytes(_damaged_file(rng, path))
    else:
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            _damage_one(rng, arguments)
    return {"kind": "command", "base": ".", "arguments": _bounded(arguments)}


def _damage_one(rng: random.Random, arguments: list[str]) -> None:
    """Change one of the arguments, but for the first, which names the command."""
    place, how = rng.randrange(1, len(arguments)), rng.random()
    old = arguments[place]
    values = [*map(str, VALUES), *TEXTS, "pairs", "model", "nowhere", "photographs/rgb.jpg", "pairs/classes.txt"]
    new = rng.choice([each for each in values if "\0" not in each])
    if how < 0.1:
        del arguments[place]
    elif how < 0.2:
        arguments.insert(place, old)
    elif how < 0.3:
        arguments[place] = damaged_text(rng, old).replace("\0", "")
    elif how < 0.5 and "=" in old:
        arguments[place] = f"{old.partition('=')[0]}={new}"
    else:
        arguments[place] = new
    # No place outside of the folder.
    arguments[:] = [each.replace("..", "").lstrip("/") for each in arguments]


def _bounded(arguments: list[str]) -> list[str]:
    """Take back what would be done as asked, in hours or with thousands of processes."""
    result = list(arguments)
    for index, each in enumerate(arguments):
        name, _, value = each.partition("=")
        if each in ("--epochs", "--max-steps", "--minutes", "--workers") and index + 1 < len(arguments):
            value, place = arguments[index + 1], index + 1
        elif name.rpartition(".")[2] in ("epochs", "num_workers"):
            place = index
        else:
            continue
        with contextlib.suppress(ValueError):
            if float(value) > 1:
                result[place] = result[place].replace(value, "1")
    if arguments[0] in ("segment", "explain") and "--model" not in result[:-1]:
        result += ["--model", "model"]  # the default one takes longer
    if arguments[0] == "train" and not {"--epochs", "--max-steps", "--minutes"} & set(result[:-1]):
        result += ["--max-steps", "1"]
    return result


MAKERS: dict[str, Callable[[random.Random, Path], Case]] = {
    "photographs": photographs,
    "weights": weights,
    "data": data_sets,
    "settings": settings,
    "commands": commands,
}
