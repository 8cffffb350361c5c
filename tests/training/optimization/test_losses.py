"""The training loss against formulas written out pixel by pixel."""

import math

import pytest
import torch
import torch.nn.functional as F

from depict_hf.modeling_depict import segmentation_loss
from training.optimization.losses import RecipeLoss, balanced_weights
from training.recipes import camvid_dinov2_small

LABELS = torch.tensor([[[0, 1, 255], [2, 2, 255]], [[1, 1, 1], [0, 255, 255]]])


@pytest.fixture
def logits():
    return torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(0)) * 2


def pixels(logits):
    """Probabilities and label of every labelled pixel, image by image."""
    return [
        [
            (logits[image, :, row, column].double().softmax(0).tolist(), LABELS[image, row, column].item())
            for row in range(2)
            for column in range(3)
            if LABELS[image, row, column] != 255
        ]
        for image in range(2)
    ]


def test_plain_loss_is_the_models_own():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = 255
    torch.testing.assert_close(RecipeLoss()(logits, labels), segmentation_loss(logits, labels, 255))


def test_class_weights_and_focal_exponent(logits):
    weights = torch.tensor([0.5, 2.0, 1.0])
    terms = [(weights[label].item(), p[label]) for image in pixels(logits) for p, label in image]
    expected = sum(-w * (1 - p) ** 1.5 * math.log(p) for w, p in terms) / sum(w for w, _ in terms)
    loss = RecipeLoss(weights, focal_gamma=1.5)
    assert loss(logits, LABELS).item() == pytest.approx(expected, rel=1e-5)
    assert loss.label_weight(LABELS).item() == pytest.approx(2 * 0.5 + 4 * 2.0 + 2 * 1.0)
    assert RecipeLoss().label_weight(LABELS).item() == 8


def test_another_divisor(logits):
    """Parts of a step are divided by the weight of the whole step, so that they add up to its mean."""
    loss = RecipeLoss(torch.tensor([0.5, 2.0, 1.0]))
    whole = loss(logits, LABELS)
    weight = loss.label_weight(LABELS)
    parts = [loss(logits[[index]], LABELS[[index]], weight) for index in range(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_dice_is_averaged_over_the_classes_of_each_image(logits):
    losses = []
    for image in pixels(logits):
        present = {label for _, label in image}
        dice = []
        for index in present:
            overlap = sum(p[index] for p, label in image if label == index)
            areas = sum(p[index] for p, _ in image) + sum(label == index for _, label in image)
            dice.append(1 - 2 * overlap / areas)
        losses.append(sum(dice) / len(dice))
    expected = RecipeLoss()(logits, LABELS).item() + 0.7 * sum(losses) / 2
    assert RecipeLoss(dice_weight=0.7)(logits, LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_labelled_gives_zero(logits):
    ignored = torch.full_like(LABELS, 255)
    logits.requires_grad_()
    loss = RecipeLoss(torch.ones(3), focal_gamma=2.0, dice_weight=1.0)(logits, ignored)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_gradient_of_a_certain_pixel_is_finite():
    """1 - p is zero there, and a fractional power of it has no finite slope."""
    logits = torch.tensor([100.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    RecipeLoss(focal_gamma=0.5)(logits, torch.zeros(1, 1, 1, dtype=torch.long)).backward()
    assert torch.isfinite(logits.grad).all()


def test_balanced_weights():
    counts = torch.tensor([600, 300, 100, 0])
    frequencies = [0.6, 0.3, 0.1]
    raw = [f**-0.5 for f in frequencies]
    mean = sum(w * f for w, f in zip(raw, frequencies, strict=True))
    expected = torch.tensor([*(w / mean for w in raw), 0.0])
    torch.testing.assert_close(balanced_weights(counts, 0.5), expected)
    torch.testing.assert_close(balanced_weights(counts, 0.0)[:3], torch.ones(3))


def test_ignored_pixels_change_nothing(logits):
    changed = torch.where((LABELS == 255)[:, None], 9.0, logits)
    loss = RecipeLoss(torch.tensor([0.5, 2.0, 1.0]), focal_gamma=1.0, dice_weight=1.0)
    torch.testing.assert_close(loss(changed, LABELS), loss(logits, LABELS))
    assert F.cross_entropy(changed, LABELS, ignore_index=255) == F.cross_entropy(logits, LABELS, ignore_index=255)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, "2 class_weights for 11 classes"),
        ({"class_weights": (1.0,) * 11, "class_balance": 0.5}, "class_weights and class_balance"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0, needed at least 0"),
    ],
)
def test_recipe_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        camvid_dinov2_small("sa").replace(**fields)
