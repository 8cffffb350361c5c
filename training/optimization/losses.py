"""The training loss of a recipe: cross-entropy, optionally weighted by class, focal, and joined by a dice term."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.resampling import product_dtype, resize_bilinear, upsampling_bands, without_autocast


class RecipeLoss:
    """Mean focal cross-entropy plus `dice_weight` times the dice loss, over the pixels that are not ignored.

    Args:
        class_weights: `(num_labels,)`; pixels count by the weight of their class, and the mean is over the weights.
            All count alike if None.
        focal_gamma: Exponent of `1 - p` before the logarithm of p, the probability of the pixel's class (Lin et al.,
            ICCV 2017); 0 is cross-entropy.
        dice_weight: Weight of one minus the dice coefficient of probabilities, averaged over the classes that occur in
            an image, then over the images (Milletari et al., 3DV 2016).
    """

    def __init__(self, class_weights: Tensor | None = None, focal_gamma: float = 0.0, dice_weight: float = 0.0):
        self.class_weights = class_weights
        self.focal_gamma = focal_gamma
        self.dice_weight = dice_weight

    def label_weight(self, labels: Tensor) -> Tensor:
        """Sum the weights of all pixels that are not ignored; count them where there are no class weights.

        Args:
            labels: Of any shape.
        """
        return _pixel_weights(labels, self._weights_on(labels.device), torch.float32).sum()

    def __call__(self, logits: Tensor, labels: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """Return a scalar, float32 (float64 for logits in float64); zero where every pixel is ignored.

        Args:
            logits: `(batch, num_labels, h, w)`; upsampled bilinearly to the labels' size.
            labels: `(batch, height, width)`, ids or 255, integers.
            label_weight: What the sum over pixels is divided by; that of `labels` if omitted.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        label_weight = self.label_weight(labels) if label_weight is None else label_weight
        divisor = label_weight.to(logits.dtype).clamp(min=torch.finfo(torch.float32).tiny)
        wide = resize_bilinear(logits, (logits.shape[-2], labels.shape[-1]))
        return _LossByBands.apply(
            wide, labels, divisor, self._weights_on(labels.device), self.focal_gamma, self.dice_weight
        )

    def _weights_on(self, device: torch.device) -> Tensor | None:
        """Return the class weights on a device, where they then stay: a copy at every step would have it waited for."""
        if self.class_weights is not None and self.class_weights.device != device:
            self.class_weights = self.class_weights.to(device, non_blocking=True)
        return self.class_weights


def balanced_weights(pixel_counts: Tensor, exponent: float) -> Tensor:
    """Weigh classes by their frequency to the power of minus `exponent`, with mean 1 over all labelled pixels.

    Args:
        pixel_counts: `(num_labels,)`, labelled pixels of each class. A class without any gets weight 0.
        exponent: 0 weighs all pixels alike, 1 all classes alike.
    """
    frequencies = pixel_counts.double() / pixel_counts.sum()
    weights = torch.where(frequencies > 0, frequencies**-exponent, 0.0)
    return (weights / (weights * frequencies).sum()).float()


def _pixel_weights(labels: Tensor, class_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return how much each pixel counts, in the labels' shape: its class's weight or 1, and 0 where it is ignored."""
    kept = labels != IGNORE_LABEL
    if class_weights is None:
        return kept.to(dtype)
    return kept * class_weights.to(dtype)[torch.where(kept, labels, 0).long()]


class _LossByBands(torch.autograd.Function):
    """The loss of logits upsampled in height, which exist for a band of rows at a time.

    Gradients are brought back to the coarse rows while a band's probabilities are there, in the forward pass. The
    gradient of the dice term depends on sums over the whole image, so that it takes a pass over all bands before.

    Notation: p is the probability of a class at a pixel and l its logarithm, both of the pixel's own class where no
    other is meant.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        labels: Tensor,
        divisor: Tensor,
        class_weights: Tensor | None,
        focal_gamma: float,
        dice_weight: float,
    ) -> Tensor:
        """Sum over pixels by `divisor`, plus the dice term.

        Args:
            logits: `(batch, num_labels, h, width)`, float32 or float64.
            labels: `(batch, height, width)`, integers.
        """
        needs_gradient = ctx.needs_input_grad[0]
        rows = logits.permute(2, 0, 1, 3).contiguous()
        gradient = torch.zeros_like(rows) if needs_gradient else None
        total = logits.new_zeros(())
        with without_autocast(logits.device):
            dice, dice_slopes = logits.new_zeros(()), None
            if dice_weight:
                dice, dice_slopes = _dice(rows, labels)
            for operator, used, log_p, band in _probability_bands(rows, labels):
                targets, kept = _targets(band)
                weights = _pixel_weights(band, class_weights, log_p.dtype)
                l = log_p.gather(2, targets)  # noqa: E741
                penalty, slope = _focal(l, focal_gamma)
                total += (penalty * weights).sum()
                if gradient is None:
                    continue
                p = log_p.exp_()
                # A softmax brings a slope s of l to the scores as s at the pixel's own class, minus s p at every class.
                slope = slope * weights / divisor
                if dice_slopes is None:
                    scores = p.mul_(-slope)
                else:
                    overlap, area = (each * dice_weight for each in dice_slopes)
                    # In the dice term the slopes of p are `area` at every class, and `overlap` more at the own one.
                    own = overlap.expand(*p.shape[:2], -1, p.shape[3]).gather(2, targets) * l.exp() * kept
                    mean = torch.einsum("rbcw,bc->rbw", p, area[:, :, 0])[:, :, None] * kept + own
                    scores = p.mul_(area * kept - mean - slope)
                    slope = slope + own
                scores.scatter_add_(2, targets, slope)
                gradient[used] += torch.tensordot(operator.T, scores.to(operator.dtype), dims=1)
            total = total / divisor + dice_weight * dice
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = ctx.saved_tensors
        return (gradient * grad_output).permute(1, 2, 0, 3), None, None, None, None, None


def _probability_bands(rows: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, slice, Tensor, Tensor]]:
    """Upsample logits in height, band by band.

    Args:
        rows: `(h, batch, num_labels, width)`.
        labels: `(batch, height, width)`.

    Yields:
        The operator `(rows of the band, rows used)`, the coarse rows used, the logarithm of probabilities
        `(rows of the band, batch, num_labels, width)`, and labels `(rows of the band, batch, 1, width)`.
    """
    dtype = product_dtype(rows.dtype, rows.device)
    for band, operator, used in upsampling_bands(len(rows), labels.shape[1], rows[0].numel(), rows, dtype):
        scores = torch.tensordot(operator, rows[used].to(dtype), dims=1).to(rows.dtype)
        yield operator, used, scores.log_softmax(dim=2), labels[:, band].transpose(0, 1)[:, :, None]


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class ids to gather by, int64, 0 where a pixel is ignored, and whether each is not."""
    kept = labels != IGNORE_LABEL
    return torch.where(kept, labels, 0).long(), kept


def _focal(l: Tensor, gamma: float) -> tuple[Tensor, Tensor]:  # noqa: E741
    """Return -(1 - p)^gamma l and its derivative with respect to l, by the logarithm l of the probability p."""
    if not gamma:
        return -l, torch.full_like(l, -1)
    rest = -torch.expm1(l)
    factor = rest**gamma
    # The second summand vanishes where p reaches 1, though a power below 0 alone would not.
    steep = gamma * l * l.exp() * rest.clamp(min=torch.finfo(l.dtype).tiny) ** (gamma - 1)
    return -factor * l, steep - factor


def _dice(rows: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute the dice loss, and how fast it grows with the probabilities it depends on.

    Args:
        rows: Logits as for `_probability_bands`.
        labels: Labels as there.

    Returns:
        The loss, a scalar; its slopes `(batch, num_labels, 1)`: additionally at the pixels of a class, and at all.
    """
    _, batch, num_labels, _ = rows.shape
    overlap, area, count = (rows.new_zeros(batch, num_labels) for _ in range(3))
    for _, _, log_p, band in _probability_bands(rows, labels):
        targets, kept = _targets(band)
        kept = kept.to(rows.dtype)
        p = log_p.exp_()
        area += torch.einsum("rbcw,rbw->bc", p, kept[:, :, 0])
        # (rows, batch, 1, width) to (batch, pixels)
        targets, own, kept = (each.transpose(0, 1).flatten(1) for each in (targets, p.gather(2, targets) * kept, kept))
        overlap.scatter_add_(1, targets, own)
        count.scatter_add_(1, targets, kept)
    area += count
    present = (count > 0).to(rows.dtype)
    share = present / (present.sum(dim=1, keepdim=True).clamp(min=1) * batch)
    bounded = area.clamp(min=1)
    loss = (share * (1 - 2 * overlap / bounded)).sum()
    slopes = -2 * share / bounded, 2 * share * overlap / bounded**2 * (area >= 1)
    return loss, (slopes[0][:, :, None], slopes[1][:, :, None])
