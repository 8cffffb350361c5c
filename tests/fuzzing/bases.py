"""Small sound files of every kind, which cases damage: photographs, models, published checkpoints, data sets."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
import yaml
from conftest import save_backbone

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.familiarity import Familiarity
from depict_hf.to_published import published_state_dict, write_published

HEIGHT, WIDTH = 16, 24
CLASSES = ("sky", "road", "tree")


def scene(seed: int = 0) -> np.ndarray:
    """A photograph of ramps and little noise: uint8 `(HEIGHT, WIDTH, 3)`, unlike its mirror images."""
    ramps = np.add.outer(5 * np.arange(HEIGHT), 3 * np.arange(WIDTH))[..., None] + [0, 30, 60]
    return (ramps + np.random.default_rng(seed).integers(0, 8, ramps.shape)).astype(np.uint8)


def label_map(seed: int = 0) -> np.ndarray:
    """Ids 0, 1 and 2 in blocks of 8 pixels, and 255 in a corner: uint8 `(HEIGHT, WIDTH)`."""
    ids = np.random.default_rng(seed).permutation(6).reshape(2, 3).repeat(8, 0).repeat(8, 1).astype(np.uint8) % 3
    ids[:2, :2] = 255
    return ids


def encode(image: PIL.Image.Image, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def photographs() -> dict[str, bytes]:
    """Encode the scene in every format that is opened, in the modes that it has, and in some that stay closed."""
    rgb = PIL.Image.fromarray(scene())
    grey = rgb.convert("L")
    rgba = rgb.copy()
    rgba.putalpha(grey)
    palette = rgb.quantize(16)
    deep = PIL.Image.fromarray(scene()[..., 0].astype(np.uint16) * 257)
    floats = PIL.Image.fromarray(scene()[..., 0].astype(np.float32))
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    modes = {
        "rgb": rgb,
        "grey": grey,
        "bilevel": rgb.convert("1"),
        "palette": palette,
        "rgba": rgba,
        "la": rgba.convert("LA"),
        "cmyk": rgb.convert("CMYK"),
        "deep": deep,
        "whole": PIL.Image.fromarray(scene()[..., 0].astype(np.int32) * 3),
        "floats": floats,
    }
    wanted = {
        "png": ("PNG", ("rgb", "grey", "bilevel", "palette", "rgba", "la", "deep"), {}),
        "jpg": ("JPEG", ("rgb", "grey", "cmyk"), {}),
        "webp": ("WEBP", ("rgb", "rgba"), {}),
        "avif": ("AVIF", ("rgb", "rgba"), {}),
        "gif": ("GIF", ("grey", "palette"), {}),
        "bmp": ("BMP", ("rgb", "grey", "palette", "bilevel", "rgba"), {}),
        "ppm": ("PPM", ("rgb", "grey", "bilevel", "floats"), {}),
        "jp2": ("JPEG2000", ("rgb", "grey", "rgba", "deep"), {}),
        "tif": ("TIFF", ("rgb", "grey", "bilevel", "palette", "rgba", "cmyk", "deep", "whole", "floats"), {}),
    }
    files = {
        f"{mode}.{suffix}": encode(modes[mode], image_format, **options)
        for suffix, (image_format, names, options) in wanted.items()
        for mode in names
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"rgb-{compression}.tif"] = encode(rgb, "TIFF", compression=compression)
    several = {"save_all": True, "append_images": [rgb.rotate(180), rgb]}
    return files | {
        "bilevel-group4.tif": encode(modes["bilevel"], "TIFF", compression="group4"),
        "tiled.tif": encode(rgb, "TIFF", tiffinfo={322: 16, 323: 16}),
        "big.tif": encode(rgb, "TIFF", big_tiff=True),
        "exif.tif": encode(rgb, "TIFF", exif=exif),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True),
        "exif.jpg": encode(rgb, "JPEG", exif=exif),
        "restarts.jpg": encode(rgb, "JPEG", restart_marker_rows=1),
        "exif.png": encode(rgb, "PNG", exif=exif),
        "profile.png": encode(rgb, "PNG", icc_profile=bytes(300)),
        "transparency.png": encode(palette, "PNG", transparency=bytes(range(16))),
        "lossless.webp": encode(rgb, "WEBP", lossless=True),
        "exif.webp": encode(rgb, "WEBP", exif=exif),
        "exif.avif": encode(rgb, "AVIF", exif=exif),
        "raw.j2k": encode(rgb, "JPEG2000", no_jp2=True),
        "animation.gif": encode(rgb, "GIF", **several),
        "animation.png": encode(rgb, "PNG", **several),
        "animation.webp": encode(rgb, "WEBP", **several),
        "pages.tif": encode(rgb, "TIFF", **several),
        "previews.mpo": encode(rgb, "MPO", **several),
        "plain.ppm": b"P3 4 3 255 " + b" ".join(b"%d" % (index * 7 % 256) for index in range(36)),
        "foreign.tga": encode(rgb, "TGA"),
        "foreign.eps": encode(grey, "EPS"),
        "foreign.spider": encode(floats, "SPIDER"),
    }


def save_photographs(folder: Path) -> None:
    for name, data in photographs().items():
        (folder / name).write_bytes(data)


def save_model_folder(folder: Path) -> None:
    """A model of this package with the native encoder, and what it knows of its training photographs."""
    config = DepictConfig(
        image_size=16,
        patch_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        decoder_num_layers=1,
        decoder_num_heads=2,
        decoder_head_dim=4,
        id2label=dict(enumerate(CLASSES)),
        window_size=16,
        window_stride=8,
        initializer_range=0.3,
    )
    _save(config, folder)
    vectors = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    Familiarity.fit(vectors, num_directions=4).save(folder)


def save_backbone_model(folder: Path) -> None:
    """A model of this package around an encoder of transformers."""
    from transformers import Dinov2Config

    backbone = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7, mlp_ratio=1
    )
    fields = {"decoder_num_heads": 2, "decoder_head_dim": 4, "id2label": dict(enumerate(CLASSES))}
    _save(DepictConfig(backbone_config=backbone, decoder_type="linear", **fields), folder)


def _save(config: DepictConfig, folder: Path) -> None:
    torch.manual_seed(0)
    DepictForSemanticSegmentation(config).save_pretrained(folder)
    DepictImageProcessor(size={"shortest_edge": 16}).save_pretrained(folder)
    for path in folder.glob("*.py"):  # copies of this package's code, which no case needs
        path.unlink()


def save_published(folder: Path, decoder_type: str) -> None:
    """A checkpoint of the published code without the ImageNet classifier, which nobody reads and is most of it."""
    config = DepictConfig(
        image_size=64,
        patch_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        decoder_type=decoder_type,
        decoder_num_layers=1,
        decoder_num_heads=1,
        num_labels=3,
        window_size=64,
        window_stride=64,
        decoder_head_dim=100,
    )
    torch.manual_seed(0)
    model = DepictForSemanticSegmentation(config)
    image_processor = DepictImageProcessor(size={"shortest_edge": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    write_published(model, image_processor, folder, "ade20k")
    state = {name: each for name, each in published_state_dict(model).items() if not name.startswith("encoder.head")}
    torch.save({"model": state, "n_cls": 3}, folder / "checkpoint.pth")
    settings = yaml.unsafe_load((folder / "variant.yml").read_text())
    (folder / "variant.yml").write_text(yaml.dump(settings))


def _photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(scene(seed)).save(path)


def _labels(path: Path, seed: int, colored: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = label_map(seed)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    PIL.Image.fromarray(colors[ids % 255] if colored else ids).save(path)


def save_pairs(folder: Path) -> None:
    """Photographs and label maps in folders of splits."""
    for split, count in (("train", 2), ("val", 2), ("test", 1)):
        for index in range(count):
            seed = index + 10 * len(split)
            _photo(folder / split / "images" / f"{index}.png", seed)
            _labels(folder / split / "masks" / f"{index}.png", seed)
    (folder / "classes.txt").write_text("\n".join(CLASSES))


def save_colored(folder: Path) -> None:
    """Label maps whose colours mean classes, by a table."""
    for index in range(3):
        _photo(folder / "images" / f"{index}.png", index)
        _labels(folder / "masks" / f"{index}.png", index, colored=True)
    (folder / "classes.csv").write_text("name,r,g,b\nsky,0,0,0\nroad,255,0,0\ntree,0,255,0\n")


def save_metadata(folder: Path) -> None:
    """Files named by metadata.jsonl."""
    for index in range(3):
        _photo(folder / f"{index}.png", index)
        _labels(folder / f"m{index}.png", index)
    rows = [json.dumps({"file_name": f"{index}.png", "label_file_name": f"m{index}.png"}) for index in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def save_voc(folder: Path) -> None:
    """The folders of Pascal VOC."""
    for index in range(3):
        _photo(folder / "JPEGImages" / f"{index}.png", index)
        _labels(folder / "SegmentationClass" / f"{index}.png", index)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n")
    (lists / "val.txt").write_text("2\n")


def save_ade(folder: Path) -> None:
    """The folders of ADE20K."""
    for name in ("training", "validation"):
        _photo(folder / "images" / name / "ADE_0.jpg", len(name))
        _labels(folder / "annotations" / name / "ADE_0.png", len(name))


def save_camvid(folder: Path) -> None:
    """The folders of CamVid."""
    for split in ("train", "val", "test"):
        _photo(folder / split / "0.png", len(split))
        _labels(folder / f"{split}annot" / "0.png", len(split))


def save_coco(folder: Path) -> None:
    """Polygons and run lengths."""
    for index in range(3):
        _photo(folder / "images" / f"{index}.png", index)
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, 20, HEIGHT * WIDTH - 20]}
    polygon = [[1, 1, 8, 1, 8, 8]]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": (1, 7)[i % 2], "segmentation": polygon if i else runs, "iscrowd": 0}
            for i in range(3)
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances.json").write_text(json.dumps(content))


def save_panoptic(folder: Path) -> None:
    """PNGs of segment ids."""
    (folder / "panoptic").mkdir()
    for index in range(3):
        _photo(folder / "images" / f"{index}.png", index)
        segments = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        segments[..., 0] = 1 + label_map(index) % 2
        PIL.Image.fromarray(segments).save(folder / "panoptic" / f"{index}.png")
    segments_info = [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 7}]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(3)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [{"image_id": i, "file_name": f"{i}.png", "segments_info": segments_info} for i in range(3)],
    }
    (folder / "panoptic.json").write_text(json.dumps(content))


def save_labelme(folder: Path) -> None:
    """A JSON file beside each photograph, with shapes of every kind."""
    mask = base64.b64encode(encode(PIL.Image.new("L", (4, 4), 255), "PNG")).decode()
    for index, kind in enumerate(("rectangle", "circle", "mask", "line")):
        _photo(folder / f"{index}.png", index)
        shapes = [
            {"label": "cat", "points": [[1, 1], [8, 1], [8, 8]], "shape_type": "polygon"},
            {"label": "dog", "points": [[1, 2], [4, 5]], "shape_type": kind, "mask": mask if kind == "mask" else None},
        ]
        content = {"shapes": shapes, "imagePath": f"{index}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        (folder / f"{index}.json").write_text(json.dumps(content))


def save_cvat(folder: Path) -> None:
    """One XML file with polygons, boxes and run lengths."""
    body = ""
    for index in range(3):
        _photo(folder / "images" / f"{index}.png", index)
        body += (
            f'<image id="{index}" name="{index}.png" width="{WIDTH}" height="{HEIGHT}">'
            '<polygon label="cat" points="1,1;8,1;8,8" z_order="0"/>'
            '<box label="dog" xtl="1" ytl="2" xbr="5" ybr="6" rotation="10"/>'
            '<mask label="dog" rle="2,2" left="1" top="1" width="2" height="2"/></image>'
        )
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("cat", "dog"))
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    (folder / "annotations.xml").write_text(f"<annotations>{meta}{body}</annotations>")


def save_hub(folder: Path) -> None:
    """A data set as the Hub has it: Parquet, and names in the head of its README."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    (folder / "data").mkdir()
    for split, count in (("train", 2), ("test", 1)):
        columns = {
            "image": [PIL.Image.fromarray(scene(index)) for index in range(count)],
            "label": [PIL.Image.fromarray(label_map(index)) for index in range(count)],
        }
        dataset = datasets.Dataset.from_dict(columns, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(CLASSES))
    (folder / "README.md").write_text(f"---\nid2label:\n{names}---\ntext\n")


DATA_SETS: dict[str, Callable[[Path], None]] = {
    "pairs": save_pairs,
    "colored": save_colored,
    "metadata": save_metadata,
    "voc": save_voc,
    "ade": save_ade,
    "camvid": save_camvid,
    "coco": save_coco,
    "panoptic": save_panoptic,
    "labelme": save_labelme,
    "cvat": save_cvat,
    "hub": save_hub,
}
BASES: dict[str, Callable[[Path], object]] = {
    "photographs": save_photographs,
    "model": save_model_folder,
    "backbone": lambda folder: save_backbone(
        folder, hidden_size=8, num_hidden_layers=1, image_size=14, patch_size=7, mlp_ratio=1
    ),
    "backbone_model": save_backbone_model,
    "published_sa": lambda folder: save_published(folder, "sa"),
    "published_linear": lambda folder: save_published(folder, "linear"),
    **DATA_SETS,
}


def save_bases(folder: Path) -> None:
    """Write all of them below a folder, each into one of its name."""
    for name, save in BASES.items():
        (folder / name).mkdir(parents=True)
        save(folder / name)
