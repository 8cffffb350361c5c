"""The training loss of a recipe: cross-entropy, optionally weighted by class, focal, and joined by a dice term."""

import torch
import torch.nn.functional as F
from torch import Tensor

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.windows import resize_bilinear


class RecipeLoss:
    """Mean focal cross-entropy plus `dice_weight` times the dice loss, over the pixels that are not ignored.

    Args:
        class_weights: `(num_labels,)`; pixels count by the weight of their class, and the mean is over the weights.
            All count alike if None.
        focal_gamma: Exponent of `1 - p` before the logarithm of p, the probability of the pixel's class (Lin et al.,
            ICCV 2017); 0 is cross-entropy.
        dice_weight: Of one minus the dice coefficient of probabilities, averaged over the classes that occur in an
            image, then over the images (Milletari et al., 3DV 2016).
    """

    def __init__(self, class_weights: Tensor | None = None, focal_gamma: float = 0.0, dice_weight: float = 0.0):
        self.class_weights = class_weights
        self.focal_gamma = focal_gamma
        self.dice_weight = dice_weight

    def label_weight(self, labels: Tensor) -> Tensor:
        """Sum of the weights of all pixels that are not ignored; their number where there are no class weights."""
        return self._pixel_weights(labels).sum()

    def __call__(self, logits: Tensor, labels: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """A scalar, float32; zero where every pixel is ignored.

        Args:
            logits: `(batch, num_labels, h, w)`; upsampled bilinearly to the labels' size.
            labels: `(batch, height, width)`, ids or 255.
            label_weight: What the sum over pixels is divided by; that of `labels` if omitted.
        """
        log_probabilities = F.log_softmax(resize_bilinear(logits.float(), labels.shape[-2:]), dim=1)
        kept = labels != IGNORE_LABEL
        targets = torch.where(kept, labels, 0)
        log_target = log_probabilities.gather(1, targets[:, None])[:, 0]
        weights = self._pixel_weights(labels)
        penalty = -log_target
        if self.focal_gamma:
            penalty = penalty * (1 - log_target.exp()).clamp(min=0) ** self.focal_gamma
        label_weight = weights.sum() if label_weight is None else label_weight
        loss = (penalty * weights).sum() / label_weight.clamp(min=torch.finfo(torch.float32).tiny)
        if self.dice_weight:
            loss = loss + self.dice_weight * _dice_loss(log_probabilities.exp(), targets, kept)
        return loss

    def _pixel_weights(self, labels: Tensor) -> Tensor:
        kept = labels != IGNORE_LABEL
        if self.class_weights is None:
            return kept.float()
        return kept * self.class_weights.to(labels.device)[torch.where(kept, labels, 0)]


def balanced_weights(pixel_counts: Tensor, exponent: float) -> Tensor:
    """Class weights proportional to frequency to the power of minus `exponent`, of mean 1 over all labelled pixels.

    Args:
        pixel_counts: `(num_labels,)`, labelled pixels of each class. A class without any gets weight 0.
        exponent: 0 weighs all pixels alike, 1 all classes alike.
    """
    frequencies = pixel_counts.double() / pixel_counts.sum()
    weights = torch.where(frequencies > 0, frequencies**-exponent, 0.0)
    return (weights / (weights * frequencies).sum()).float()


def _dice_loss(probabilities: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    one_hot = F.one_hot(targets, probabilities.shape[1]).movedim(-1, 1) * kept[:, None]
    probabilities = probabilities * kept[:, None]
    pixels = (2, 3)
    present = one_hot.sum(pixels) > 0
    overlap = 2 * (probabilities * one_hot).sum(pixels)
    areas = probabilities.sum(pixels) + one_hot.sum(pixels)
    losses = 1 - overlap / areas.clamp(min=1)
    return ((losses * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)).mean()
