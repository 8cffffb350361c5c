"""Encoder outputs computed once: with a frozen encoder, a training step then costs no more than the decoder."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.modeling_depict import DepictSemanticSegmenterOutput, segmentation_loss
from depict_hf.vit import LayerRecord
from depict_hf.windows import merge_windows, pad_to_multiple
from depict_hf.writing import write_whole

from .samples import EpochDataset, SegmentationDataset, sample_generator


class DecoderOnFeatures(nn.Module):
    """A model's decoder, shared with it, on features that its encoder computed earlier.

    Args:
        model: The whole model; its encoder is not part of this module, nor of its checkpoints.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: DepictForSemanticSegmentation):
        super().__init__()
        self.config = model.config
        self.decoder = model.decoder

    def forward(
        self, features: Tensor, labels: Tensor | None = None, input_size: Tensor | None = None
    ) -> DepictSemanticSegmenterOutput:
        """Decode features, as the model decodes the image that they come from.

        Args:
            features: `(batch, grid_height, grid_width, hidden)`.
            labels: `(batch, height, width)` of the same area.
            input_size: `(batch, 2)`, height and width in pixels of the images, equal in a batch, where the grid also
                covers padding; logits are then upsampled and cropped to that size.
        """
        grid_height, grid_width = features.shape[1:3]
        logits = self.decoder(features.flatten(1, 2).to(self.decoder_dtype), (grid_height, grid_width))
        if input_size is not None:
            height, width = input_size[0].tolist()  # on the host, or it has the accelerator waited for
            patch_size = self.config.encoder_patch_size
            padded_size = (grid_height * patch_size, grid_width * patch_size)
            logits = merge_windows([logits], [(0, 0)], (height, width), padded_size)
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)
        return DepictSemanticSegmenterOutput(loss=loss, logits=logits)

    @property
    def decoder_dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype


class FeatureDataset(EpochDataset):
    """Features of whole images, `features` `(grid_height, grid_width, hidden)` float16, and their `labels`.

    In training (`crop_size` given) an item is a random square of patches, mirrored with probability one half, with
    the labels of the same area at the encoder's input size, `(crop_size, crop_size)` uint8, 255 beyond the image.
    What is drawn depends on seed, epoch and index alone. In evaluation it is the whole image, labels at its own size,
    and the `input_size` (height, width) that the features were computed at.

    Args:
        model: Its encoder computes what `folder` does not hold yet, on the device that it is on.
        samples: Photographs and label maps.
        image_processor: Prepares them for the encoder.
        folder: Where features are kept, one file per image, in a subfolder that is named after everything they depend
            on; an interrupted run continues there.
        crop_size: Side in pixels of training squares, rounded down to whole patches.
        seed: Seed of crops and mirror images.
        autocast: Whether the encoder computes in bfloat16.
    """

    def __init__(
        self,
        model: DepictForSemanticSegmentation,
        samples: SegmentationDataset,
        image_processor: DepictImageProcessor,
        folder: Path,
        crop_size: int | None = None,
        seed: int = 0,
        autocast: bool = False,
    ):
        super().__init__()
        self.samples = samples
        self.image_processor = image_processor
        self.patch_size = model.config.encoder_patch_size
        self.crop = None if crop_size is None else crop_size // self.patch_size
        self.seed = seed
        self.folder = folder / fingerprint(model.encoder, samples, image_processor, autocast)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._encode_missing(model, autocast)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.crop is not None:
            return self._crop(index, self.crop)
        features, input_size = self.read_whole(index)
        return {"features": features, "labels": self.samples.read_or_blank(index)["labels"], "input_size": input_size}

    def read_whole(self, index: int) -> tuple[Tensor, Tensor]:
        """Read the features of a whole image and its `input_size`; labels are decoded from the data.

        Returns:
            Features, `(grid_height, grid_width, hidden)`; (height, width) in pixels of what was encoded, int64.

        Raises:
            ValueError: If its file is damaged or gone.
        """
        with self._opened(index) as file:
            input_size = torch.tensor(file.get_slice("labels").get_shape())
            return file.get_tensor("plain"), input_size

    def _crop(self, index: int, crop: int) -> dict[str, Tensor]:
        """Read a random square of `crop` x `crop` patches and the labels of the same area, and nothing else."""
        generator = sample_generator(self.seed, self.epoch, index)
        mirror = bool(torch.rand((), generator=generator) < 0.5)
        with self._opened(index) as file:
            features, labels = (file.get_slice(name) for name in ("mirrored" if mirror else "plain", "labels"))
            grid_height, grid_width, _ = features.get_shape()
            top, left = (
                int(torch.randint(max(side - crop, 0) + 1, (), generator=generator))
                for side in (grid_height, grid_width)
            )
            bottom, right = min(top + crop, grid_height), min(left + crop, grid_width)
            side = self.patch_size
            area = (top * side, left * side, bottom * side, right * side)
            return {"features": features[top:bottom, left:right], "labels": _label_area(labels, area, mirror)}

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        try:
            with safe_open(self._path(index), framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The features of {self.samples.name(index)} in {self._path(index)} cannot be read ({error}); delete "
                "that file, and they are computed again when training goes on with --resume."
            ) from error

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    @torch.inference_mode()
    def _encode_missing(self, model: DepictForSemanticSegmentation, autocast: bool) -> None:
        """Compute and write features, of mirror images too where they are trained on, and labels at their size."""
        missing = [index for index in range(len(self)) if not self._path(index).is_file()]
        encoder = model.encoder.eval()
        for index in tqdm(missing, desc="Features", mininterval=10, disable=not missing):
            sample = self.samples[index]
            # The labels of samples are reduced already.
            maps = {"segmentation_maps": sample["labels"], "do_reduce_labels": False}
            inputs = self.image_processor(sample["image"], **maps, return_tensors="pt")
            pixel_values = inputs["pixel_values"]
            views = {"plain": pixel_values}
            if self.crop is not None:
                views["mirrored"] = pixel_values.flip(-1)
            tensors = {"labels": inputs["labels"][0].to(torch.uint8)}  # ids end at 255, which is ignored
            for name, view in views.items():
                tensors[name] = encode(encoder, view.to(model.device), self.patch_size, autocast).cpu()
            try:
                write_whole(save(tensors), self._path(index))
            except OSError as error:
                raise OSError(
                    f"The features of image {index + 1} of {len(self)} cannot be written to {self.folder} ({error}); "
                    "make room there, or choose another folder or cache_features=false. Those that are there are kept."
                ) from error


def encode(encoder: nn.Module, pixel_values: Tensor, patch_size: int, autocast: bool) -> Tensor:
    """Compute the features of one image, on its device.

    Args:
        encoder: Encoder of the model.
        pixel_values: `(1, channels, height, width)`; padded to whole patches.
        patch_size: Side of a patch in pixels.
        autocast: Whether to compute in bfloat16.

    Returns:
        `(grid_height, grid_width, hidden)`, float16.
    """
    with torch.autocast(pixel_values.device.type, dtype=torch.bfloat16, enabled=autocast):
        patches, grid_size = encoder(pad_to_multiple(pixel_values, patch_size), LayerRecord())
    return patches[0].unflatten(0, grid_size).to(torch.float16).contiguous()


def _label_area(labels, area: tuple[int, int, int, int], mirror: bool) -> Tensor:
    """Cut the (top, left, bottom, right) pixels out of a label map or its mirror image, 255 beyond it, uint8."""
    top, left, bottom, right = area
    height, width = labels.get_shape()
    below, beside = max(bottom - height, 0), max(right - width, 0)
    first, last = (width - right + beside, width - left) if mirror else (left, right - beside)
    found = labels[top : bottom - below, first:last]
    return F.pad(found.flip(-1) if mirror else found, (0, beside, 0, below), value=IGNORE_LABEL)


def fingerprint(
    encoder: nn.Module, samples: SegmentationDataset, image_processor: DepictImageProcessor, autocast: bool
) -> str:
    """Return a name for everything that features depend on: weights, data, preparation and precision."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    digest.update(samples.fingerprint.encode())
    digest.update(image_processor.to_json_string().encode())
    digest.update(str(autocast).encode())
    return digest.hexdigest()[:16]
