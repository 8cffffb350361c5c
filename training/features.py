"""Encoder outputs computed once: with a frozen encoder, a training step then costs no more than the decoder."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.modeling_depict import DepictSemanticSegmenterOutput, segmentation_loss
from depict_hf.vit import LayerRecord
from depict_hf.windows import pad_to_multiple

from .augmentation import IGNORE_INDEX
from .data import SegmentationDataset, sample_generator


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

    def forward(self, features: Tensor, labels: Tensor | None = None) -> DepictSemanticSegmenterOutput:
        """Decode features `(batch, grid_height, grid_width, hidden)`; labels `(batch, height, width)` of their area."""
        logits = self.decoder(features.flatten(1, 2).to(self.decoder_dtype), tuple(features.shape[1:3]))
        loss = None
        if labels is not None:
            loss = segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)
        return DepictSemanticSegmenterOutput(loss=loss, logits=logits)

    @property
    def decoder_dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype


class FeatureDataset(torch.utils.data.Dataset):
    """Features of whole images, `features` `(grid_height, grid_width, hidden)` float16, and their `labels`.

    In training (`crop_size` given) an item is a random square of patches, mirrored with probability one half, with
    the labels of the same area at the encoder's input size, `(crop_size, crop_size)`, 255 beyond the image. What is
    drawn depends on seed, epoch and index alone. In evaluation it is the whole image with labels at its own size.

    Args:
        model: Its encoder computes what `folder` does not hold yet.
        samples: Photographs and label maps.
        image_processor: Prepares them for the encoder.
        folder: Where features are kept, one file per image, in a subfolder that is named after everything they depend
            on; an interrupted run continues there.
        crop_size: Side in pixels of training squares, rounded down to whole patches.
        seed: Of crops and mirror images.
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
        self.samples = samples
        self.image_processor = image_processor
        self.patch_size = model.config.encoder_patch_size
        self.crop = None if crop_size is None else crop_size // self.patch_size
        self.seed = seed
        self.epoch = 0
        self.folder = folder / fingerprint(model.encoder, samples, image_processor, autocast)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._encode_missing(model, autocast)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.crop is None:
            return {"features": self._read(index, "plain"), "labels": self.samples[index]["labels"]}
        generator = sample_generator(self.seed, self.epoch, index)
        mirror = bool(torch.rand((), generator=generator) < 0.5)
        features = self._read(index, "mirrored" if mirror else "plain")
        sample = self.samples[index]
        labels = self.image_processor(sample["image"], segmentation_maps=sample["labels"])["labels"][0]
        return self._crop(features, labels.flip(-1) if mirror else labels, generator)

    def _crop(self, features: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """A random square of patches and the labels of the same area."""
        grid_height, grid_width = features.shape[:2]
        bottom, right = (side * self.patch_size for side in (grid_height, grid_width))
        labels = F.pad(labels, (0, right - labels.shape[1], 0, bottom - labels.shape[0]), value=IGNORE_INDEX)
        top, left = (
            int(torch.randint(max(side - self.crop, 0) + 1, (), generator=generator))
            for side in (grid_height, grid_width)
        )
        rows = slice(top * self.patch_size, (top + self.crop) * self.patch_size)
        columns = slice(left * self.patch_size, (left + self.crop) * self.patch_size)
        return {
            "features": features[top : top + self.crop, left : left + self.crop].contiguous(),
            "labels": labels[rows, columns].contiguous(),
        }

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def _read(self, index: int, view: str) -> Tensor:
        return load_file(self._path(index))[view]

    @torch.inference_mode()
    def _encode_missing(self, model: DepictForSemanticSegmentation, autocast: bool) -> None:
        """Compute and write features, of mirror images too where they are trained on."""
        missing = [index for index in range(len(self)) if not self._path(index).is_file()]
        encoder = model.encoder.eval()
        for index in tqdm(missing, desc="Features", mininterval=10):
            pixel_values = self.image_processor(self.samples[index]["image"], return_tensors="pt")["pixel_values"]
            views = {"plain": pixel_values}
            if self.crop is not None:
                views["mirrored"] = pixel_values.flip(-1)
            features = {}
            for name, view in views.items():
                view = pad_to_multiple(view.to(model.device), self.patch_size)
                with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
                    patches, grid_size = encoder(view, LayerRecord())
                features[name] = patches[0].unflatten(0, grid_size).to("cpu", torch.float16).contiguous()
            # Under another name until it is whole, so that a killed run leaves no half-written file.
            partial = self._path(index).with_suffix(".partial")
            save_file(features, partial)
            partial.rename(self._path(index))


def fingerprint(
    encoder: nn.Module, samples: SegmentationDataset, image_processor: DepictImageProcessor, autocast: bool
) -> str:
    """A name for everything that features depend on: weights, data, preparation and precision."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    digest.update(samples.dataset._fingerprint.encode())
    digest.update(image_processor.to_json_string().encode())
    digest.update(str(autocast).encode())
    return digest.hexdigest()[:16]
