"""The training loss against formulas written out pixel by pixel."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_fake_cuda
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from depict_hf.modeling_depict import segmentation_loss
from depict_hf.resampling import BAND_ELEMENTS
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


TERMS = {
    "plain": {},
    "weighted": {"class_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])},
    "focal": {"focal_gamma": 0.5},
    "dice": {"dice_weight": 0.7},
    "all": {"class_weights": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0]), "focal_gamma": 2.0, "dice_weight": 0.7},
}


def dense_loss(logits, labels, class_weights=None, focal_gamma=0.0, dice_weight=0.0):
    """The loss on full-size scores, by PyTorch's own differentiation."""
    log_p = F.interpolate(logits, labels.shape[-2:], mode="bilinear").log_softmax(1)
    kept = labels != 255
    one_hot = F.one_hot(torch.where(kept, labels, 0).long(), logits.shape[1]).movedim(-1, 1) * kept[:, None]
    weights = torch.ones(logits.shape[1]) if class_weights is None else class_weights
    weights = one_hot * weights.to(logits.dtype)[:, None, None]
    loss = -(weights * (1 - log_p.exp()) ** focal_gamma * log_p).sum() / weights.sum()
    p, area = log_p.exp() * kept[:, None], one_hot.sum((2, 3))
    dice = 1 - 2 * (p * one_hot).sum((2, 3)) / (p.sum((2, 3)) + area)
    present = area > 0
    return loss + dice_weight * ((dice * present).sum(1) / present.sum(1)).mean()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("grid", [(3, 4), (18, 20)], ids=["coarse", "of one size"])
def test_bands_give_the_value_and_gradient_of_full_size_scores(terms, grid, monkeypatch):
    """In float64, over bands of three rows; labels as bytes, one class in no image, another in one only."""
    monkeypatch.setitem(BAND_ELEMENTS, "cpu", 3 * 2 * 5 * 20)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, *grid, generator=generator, dtype=torch.float64).mul(3).requires_grad_()
    labels = torch.randint(0, 3, (2, 18, 20), generator=generator, dtype=torch.uint8)
    labels[0, :5, :7] = 4
    labels[torch.rand(2, 18, 20, generator=generator) < 0.2] = 255
    expected = dense_loss(logits, labels, **terms)
    loss = RecipeLoss(**terms)(logits, labels)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    [gradient] = torch.autograd.grad(loss * 3, logits)
    torch.testing.assert_close(gradient, 3 * torch.autograd.grad(expected, logits)[0], atol=1e-14, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(RecipeLoss(**terms)(logits, labels), loss, atol=0, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [each for each in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(each)]
        self.elements = max([self.elements, *(each.numel() for each in made)])
        return result


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_no_full_size_scores_are_made(terms):
    """512 x 512 pixels and 20 classes; a band has at most 2**19 scores."""
    logits = torch.randn(1, 20, 32, 32, requires_grad=True)
    terms = terms | ({"class_weights": torch.rand(20)} if "class_weights" in terms else {})
    labels = torch.randint(0, 20, (1, 512, 512), dtype=torch.uint8)
    with LargestTensor() as largest:
        RecipeLoss(**terms)(logits, labels).backward()
    assert largest.elements <= 2**19 < 20 * 512 * 512 / 8


@needs_fake_cuda
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_losses_stay_on_the_accelerator(terms):
    """Fake CUDA tensors raise where devices mix and where a value is read back to the host."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.randn(2, 5, 4, 6, device="cuda", requires_grad=True)
        labels = torch.randint(0, 5, (2, 32, 48), device="cuda", dtype=torch.uint8)
        loss = RecipeLoss(**terms)
        total = loss.label_weight(labels)
        value = loss(logits, labels, total)
    [gradient] = value.grad_fn.saved_tensors  # computed already; PyTorch's own backward pass needs a driver
    assert value.device.type == total.device.type == gradient.device.type == "cuda"
    assert tuple(gradient.shape) == (4, 2, 5, 48)


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
