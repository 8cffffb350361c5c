"""How far a photograph is from those that a model was trained on: a confident map of nonsense gets a warning.

A model has to give every pixel one of its classes, and is often sure where it is wrong, on a page of text as on a road.
What the encoder makes of the photograph as a whole says more. The photograph is squeezed to a square of `GRID_SIZE`
patches a side, and the encoder's tokens are averaged to one vector. A normal distribution is laid through the vectors
of the training images: their mean, the directions in which they vary most with a variance each, and one variance for
all other directions. The distance of a photograph is its Mahalanobis distance from the mean, divided by the square root
of the number of dimensions, so that training images have about 1. Beyond a threshold there is a warning.

The vectors do not depend on windows, scales or the size of the photograph, so that one threshold serves all protocols,
and cost little: one pass of the encoder over 100 patches, where a photograph of 480 x 360 pixels has some thousands.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from safetensors.torch import save
from torch import Tensor
from transformers.utils import cached_file

from .image_processing_depict import DepictImageProcessor
from .modeling_depict import DepictForSemanticSegmentation
from .vit import LayerRecord
from .weight_files import load_checked, one_line, seal
from .writing import write_whole

FILE_NAME = "familiarity.safetensors"
GRID_SIZE = 10
NUM_DIRECTIONS = 8
THRESHOLD = 2.0


@dataclass(frozen=True)
class Familiarity:
    """What is kept of a model's training images.

    Attributes:
        mean: `(hidden,)`, of their vectors.
        directions: `(directions, hidden)`, orthonormal, in which the vectors vary most.
        variances: `(directions,)`, along each of them.
        rest: Scalar, variance along each other direction.
        threshold: Scalar, distance beyond which a photograph is unlike them.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor
    threshold: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, num_directions: int = NUM_DIRECTIONS, threshold: float = THRESHOLD) -> "Familiarity":
        """Fit it to vectors of training images.

        Args:
            vectors: `(images, hidden)`, of `photograph_vector`.

        Raises:
            ValueError: If there are not more images than directions, or not more dimensions.
        """
        count, hidden = vectors.shape
        if count <= num_directions + 1:
            raise ValueError(f"Got {count} images for {num_directions} directions, needed at least two more images.")
        if hidden <= num_directions:
            raise ValueError(
                f"Got vectors of {hidden} dimensions for {num_directions} directions, needed fewer of these."
            )
        mean = vectors.double().mean(dim=0)
        _, scales, directions = torch.linalg.svd(vectors.double() - mean, full_matrices=False)
        variances = scales.square() / (count - 1)
        rest = variances[num_directions:].sum() / (hidden - num_directions)
        kept = (mean, directions[:num_directions], variances[:num_directions], rest, torch.tensor(threshold))
        return cls(*(value.float().contiguous() for value in kept))

    def distance(self, vector: Tensor) -> float:
        """Return how far a vector `(hidden,)` is from the training images, which themselves have about 1."""
        if vector.shape != self.mean.shape:
            raise ValueError(
                f"Got a vector of shape {tuple(vector.shape)}, but {FILE_NAME} was fitted to {tuple(self.mean.shape)}; "
                "it belongs to another model: fit it to the training images again."
            )
        centred = vector.to(self.mean) - self.mean
        along = self.directions @ centred
        across = centred.square().sum() - along.square().sum()
        squared = (along.square() / self.variances).sum() + across / self.rest
        return float((squared / len(centred)).sqrt())

    def judge(
        self, model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, photo: PIL.Image.Image
    ) -> dict[str, float | str]:
        """Return a photograph's `distance`, and a `warning` where that is beyond the threshold."""
        distance = round(self.distance(photograph_vector(model, image_processor, photo)), 2)
        if distance <= self.threshold:
            return {"distance": distance}
        warning = (
            "this photograph is unlike those that the model was trained on, whose distance is about 1 where this has "
            f"{distance:g} (more than {self.threshold:g}); do not rely on the label map"
        )
        return {"distance": distance, "warning": warning}

    def save(self, folder: str | Path) -> None:
        """Write `FILE_NAME` into a model's folder."""
        path = Path(folder) / FILE_NAME
        write_whole(save({name: getattr(self, name) for name in self.__dataclass_fields__}), path)
        seal(path)


def load_familiarity(model: str | Path) -> Familiarity | None:
    """Load what a model's folder or Hub repository keeps of its training images; None where it keeps nothing.

    Raises:
        ValueError: If the file is damaged, or holds anything else.
    """
    path = cached_file(
        str(model),
        FILE_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else _checked(load_checked(path), path)


def _checked(tensors: dict[str, Tensor], path: str) -> Familiarity:
    """Return what a file holds, if its tensors fit each other and can be what they are called; ValueError else."""
    names = set(Familiarity.__dataclass_fields__)
    if set(tensors) != names:
        raise ValueError(f"{path} holds {one_line(repr(sorted(tensors)), 200)}, needed {sorted(names)}.")
    directions, hidden = tensors["directions"].shape if tensors["directions"].ndim == 2 else (-1, -1)
    shapes = {"mean": (hidden,), "directions": (directions, hidden), "variances": (directions,)}
    for name, value in tensors.items():
        if value.shape != shapes.get(name, ()) or not value.is_floating_point():
            raise ValueError(
                f"{path} holds {name} of shape {tuple(value.shape)} and {value.dtype}, needed floating point of shape "
                f"{shapes.get(name, ())}; fit it to the training images again."
            )
        if name in ("variances", "rest", "threshold") and not (value > 0).all():
            raise ValueError(f"{path} holds {name} that is not positive; fit it to the training images again.")
    return Familiarity(**tensors)


@torch.inference_mode()
def photograph_vector(
    model: DepictForSemanticSegmentation, image_processor: DepictImageProcessor, photo: PIL.Image.Image
) -> Tensor:
    """Average the tokens that the encoder gives for a photograph squeezed to a small square.

    Returns:
        `(hidden,)`, float32, on the CPU.
    """
    side = GRID_SIZE * model.config.encoder_patch_size
    pixel_values = image_processor(photo, size={"height": side, "width": side}, return_tensors="pt")["pixel_values"]
    tokens, _ = model.encoder(pixel_values.to(model.device, model.dtype), LayerRecord())
    return tokens[0].float().mean(dim=0).cpu()


def fit_familiarity(
    model: DepictForSemanticSegmentation,
    image_processor: DepictImageProcessor,
    photos: Iterable[PIL.Image.Image],
    threshold: float = THRESHOLD,
) -> Familiarity:
    """Fit `Familiarity` to the photographs that a model, in evaluation mode, was trained on."""
    vectors = [photograph_vector(model, image_processor, photo) for photo in photos]
    return Familiarity.fit(torch.stack(vectors), threshold=threshold)
