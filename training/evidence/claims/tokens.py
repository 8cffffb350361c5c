"""What does not move, computed once: tokens that enter the moving blocks, of training squares and of whole images."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Dinov2Backbone

from depict_hf import DepictForSemanticSegmentation
from depict_hf.windows import cut_windows, enlarge_to_window, merge_windows, window_corners

from ...data import Normalization, SegmentationDataset, sample_generator
from ...recipe import Recipe
from ...recipe_data import build_augmentation, build_image_processor

# Windows that share a pass.
WINDOWS = 8


class MovingPart(nn.Module):
    """The last blocks of a model's encoder and its decoder, shared with it, on tokens that enter those blocks.

    Args:
        model: The whole model, around a DINOv2 backbone.
        moving_blocks: How many blocks.

    Raises:
        ValueError: If the model has another encoder, or fewer blocks.
    """

    def __init__(self, model: DepictForSemanticSegmentation, moving_blocks: int):
        super().__init__()
        backbone = dinov2(model)
        if not 0 < moving_blocks < len(backbone.encoder.layer):
            raise ValueError(f"Got {moving_blocks} moving blocks, needed 1 to {len(backbone.encoder.layer) - 1}.")
        self.config = model.config
        # Named as in a whole model, for the groups of the optimiser.
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(backbone.encoder.layer[-moving_blocks:])
        self.encoder.layernorm = backbone.layernorm
        self.decoder = model.decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits of squares.

        Args:
            tokens: `(batch, prefix + side * side, hidden)`.

        Returns:
            `(batch, num_labels, side, side)`.
        """
        side = int((tokens.shape[1] - 1) ** 0.5)
        for layer in cast(nn.ModuleList, self.encoder.layer):
            tokens = layer(tokens)
        patches = cast(nn.LayerNorm, self.encoder.layernorm)(tokens)[:, -side * side :]
        return self.decoder(patches, (side, side))


def dinov2(model: DepictForSemanticSegmentation) -> Dinov2Backbone:
    """Return a model's backbone.

    Raises:
        ValueError: If it is no DINOv2.
    """
    backbone = getattr(model.encoder, "backbone", None)
    if not isinstance(backbone, Dinov2Backbone):
        found = type(model.encoder if backbone is None else backbone).__name__
        raise ValueError(f"Got an encoder of type {found}, needed a Dinov2Backbone, such as facebook/dinov2-small.")
    return backbone


def entering_tokens(model: DepictForSemanticSegmentation, pixel_values: Tensor, moving_blocks: int) -> Tensor:
    """Return the tokens of squares `(batch, 3, side, side)` that enter the moving blocks."""
    backbone = dinov2(model)
    tokens = backbone.embeddings(pixel_values)
    for layer in backbone.encoder.layer[:-moving_blocks]:
        tokens = layer(tokens)
    return tokens


@dataclass(frozen=True)
class Pool:
    """Training squares: every `squares_per_image` of them come from one image.

    Args:
        folder: One file per image: `tokens` `(squares, tokens, hidden)` bfloat16, `labels` `(squares, side, side)`.
        num_images: Images.
        squares_per_image: Squares of each.
    """

    folder: Path
    num_images: int
    squares_per_image: int

    def __len__(self) -> int:
        return self.num_images * self.squares_per_image

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Read squares: their tokens, float32, and their labels, int64."""
        tokens, labels = [], []
        for index in indices:
            image, square = divmod(index, self.squares_per_image)
            with safe_open(path_of(self.folder, image), framework="pt") as file:
                tokens.append(file.get_slice("tokens")[square])
                labels.append(file.get_slice("labels")[square])
        return torch.stack(tokens).float(), torch.stack(labels).long()


@dataclass(frozen=True)
class WholeImages:
    """Images of a split, as the windows that evaluation looks at.

    Args:
        folder: One file per image: `tokens` `(windows, tokens, hidden)` bfloat16, and `size`, its height and width in
            pixels when the windows were cut.
        samples: Label maps at their own size.
        window: Side of the windows in pixels.
    """

    folder: Path
    samples: SegmentationDataset
    window: int

    def __len__(self) -> int:
        return len(self.samples)

    def logits(self, part: MovingPart, index: int, size: tuple[int, int]) -> Tensor:
        """Return the logits of one image, float32, `(num_labels, *size)`."""
        with safe_open(path_of(self.folder, index), framework="pt") as file:
            tokens, (height, width) = file.get_tensor("tokens"), file.get_tensor("size").tolist()
        logits = torch.cat([part(each.float()) for each in tokens.split(WINDOWS)]).float()
        corners = window_corners((height, width), self.window, self.window)
        return merge_windows(list(logits.split(1)), corners, (height, width), self.window, size)[0]


def build_pool(
    model: DepictForSemanticSegmentation,
    recipe: Recipe,
    samples: SegmentationDataset,
    squares_per_image: int,
    moving_blocks: int,
    folder: Path,
) -> Pool:
    """Draw the squares of all training images and compute their tokens, as far as `folder` lacks them."""
    augmentation = build_augmentation(recipe)
    normalization = Normalization(recipe.data.image_mean, recipe.data.image_std)
    what = {"squares": squares_per_image, "augmentation": repr(augmentation)}
    folder = _folder(folder, model, recipe, samples, moving_blocks, what)

    def squares(index: int) -> dict[str, Tensor]:
        sample = samples[index]
        drawn = [
            augmentation(sample["image"], sample["labels"], sample_generator(0, number, index))
            for number in range(squares_per_image)
        ]
        stacked = {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
        pixel_values = normalization(stacked["pixel_values"], stacked["input_size"])
        return {"tokens": _in_passes(model, pixel_values, moving_blocks), "labels": stacked["labels"]}

    _fill(folder, len(samples), squares)
    return Pool(folder, len(samples), squares_per_image)


def build_whole_images(
    model: DepictForSemanticSegmentation,
    recipe: Recipe,
    samples: SegmentationDataset,
    moving_blocks: int,
    folder: Path,
) -> WholeImages:
    """Compute the tokens of all windows of a split's images, as far as `folder` lacks them."""
    processor, window = build_image_processor(recipe), recipe.data.crop_size
    folder = _folder(folder, model, recipe, samples, moving_blocks, {"processor": processor.to_json_string()})

    def windows(index: int) -> dict[str, Tensor]:
        pixel_values = processor(samples[index]["image"], return_tensors="pt")["pixel_values"]
        pixel_values = enlarge_to_window(pixel_values, window)
        size = (int(pixel_values.shape[-2]), int(pixel_values.shape[-1]))
        cut = cut_windows(pixel_values, window_corners(size, window, window), window)
        return {"tokens": _in_passes(model, cut, moving_blocks), "size": torch.tensor(size)}

    _fill(folder, len(samples), windows)
    return WholeImages(folder, samples, window)


def path_of(folder: Path, index: int) -> Path:
    """Return the file of an image."""
    return folder / f"{index:06d}.safetensors"


@torch.inference_mode()
def _in_passes(model: DepictForSemanticSegmentation, pixel_values: Tensor, moving_blocks: int) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [entering_tokens(model, each, moving_blocks) for each in pixel_values.split(WINDOWS)]
    return torch.cat(parts).to(torch.bfloat16).contiguous()


def _folder(
    folder: Path,
    model: DepictForSemanticSegmentation,
    recipe: Recipe,
    samples: SegmentationDataset,
    moving_blocks: int,
    what: dict,
) -> Path:
    """Return a folder named after everything that the tokens depend on."""
    digest = hashlib.sha256(json.dumps([samples.fingerprint, moving_blocks, recipe.data.crop_size, what]).encode())
    for name, value in sorted(model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.float().numpy().tobytes())
    chosen = folder / digest.hexdigest()[:16]
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def _fill(folder: Path, count: int, make) -> None:
    missing = [index for index in range(count) if not path_of(folder, index).is_file()]
    for index in tqdm(missing, desc="Tokens", mininterval=10, disable=not missing):
        # Under another name until it is whole, so that a killed run leaves no half-written file.
        partial = path_of(folder, index).with_suffix(".partial")
        save_file(make(index), partial)
        partial.rename(path_of(folder, index))


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of all indices below `count` in an order that the seed decides, without an incomplete last one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]
