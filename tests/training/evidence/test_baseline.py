"""The straightforward way gives what the package gives: label maps, logits, loss and gradients, on the same weights."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model

from depict_hf import DepictForSemanticSegmentation
from depict_hf.inference import segment
from training.evidence.baseline import StraightforwardModel


def smooth_photo(height: int, width: int) -> np.ndarray:
    noise = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(5)) * 255
    photo = F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 255)
    return photo[0].permute(1, 2, 0).to(torch.uint8).numpy()


@pytest.mark.parametrize(
    ("scales", "flip", "window_stride"),
    [((1.0,), False, None), ((1.0,), False, 20), ((0.5, 1.0, 1.75), True, 20)],
    ids=["whole", "windows", "multi-scale"],
)
def test_label_maps_agree(decoder_type, scales, flip, window_stride, image_processor):
    """The photograph is larger than the processor's size, so that it is resized, and no multiple of the patch."""
    window_size = None if window_stride is None else 32
    model = tiny_model(decoder_type, window_size=window_size, window_stride=window_stride)
    photo = smooth_photo(45, 70)
    expected = StraightforwardModel(model).segment(image_processor, photo, scales, flip)
    [segmentation] = segment(model, image_processor, [photo], scales, flip)
    assert expected.unique().numel() > 1
    assert (segmentation == expected).float().mean() >= 0.999


def test_logits_agree(decoder_type):
    """Sides that are no multiples of the patch, on another grid than the position embeddings'."""
    model = tiny_model(decoder_type, use_distillation_token=True)
    pixel_values = torch.randn(2, 3, 30, 44)
    torch.testing.assert_close(
        StraightforwardModel(model).forward(pixel_values), model(pixel_values).logits, atol=1e-5, rtol=1e-4
    )


def test_loss_and_gradients_agree(decoder_type, pixel_values):
    model = tiny_model(decoder_type).train()
    labels = torch.randint(0, 5, (2, 32, 48), generator=torch.Generator().manual_seed(2))
    labels[:, :4] = 255
    loss = model(pixel_values, labels=labels).loss
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    straightforward = StraightforwardModel(model).loss(pixel_values, labels)
    straightforward.backward()
    torch.testing.assert_close(straightforward, loss, atol=1e-6, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)


def test_other_activations_are_refused():
    model = DepictForSemanticSegmentation(tiny_config(hidden_act="relu"))
    with pytest.raises(ValueError, match="pass one with the native encoder and hidden_act='gelu'"):
        StraightforwardModel(model)
