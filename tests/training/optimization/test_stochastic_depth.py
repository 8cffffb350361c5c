"""Branches are dropped by image and step, however the images are divided, and at the right rate."""

import pytest
import torch
from conftest import enable_checkpointing, tiny_model

from training.optimization.stochastic_depth import draw, share_stochastic_depth

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return tiny_model("sa", drop_path_rate=0.5).train()


def logits(model, modules, pixel_values, positions, step=3):
    draw(modules, seed=0, step=step, positions=positions, device=CPU)
    return model(pixel_values).logits


@torch.no_grad()
def test_images_have_the_same_branches_in_one_pass_and_in_several(model):
    modules = share_stochastic_depth(model)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = logits(model, modules, images, range(4))
    for position in range(4):
        alone = logits(model, modules, images[position, None], [position])
        torch.testing.assert_close(alone[0], together[position], atol=1e-5, rtol=0)
    assert not torch.allclose(logits(model, modules, images, range(4), step=4), together)
    model.eval()
    expected = tiny_model("sa", drop_path_rate=0.5)
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images).logits, expected.eval()(images).logits, atol=0, rtol=0)


def test_kept_branches_are_scaled_and_the_rate_is_met(model):
    [module] = share_stochastic_depth(model)  # the first block's rate is 0
    draw([module], seed=1, step=0, positions=range(1000), device=CPU)
    branches = torch.ones(1000, 2, 3)
    outputs = [module(branches) for _ in range(2)]
    for output in outputs:
        assert set(output.unique().tolist()) == {0.0, 2.0}
        assert output.mean().item() == pytest.approx(1, abs=0.1)
        assert torch.equal(output, output[:, :1, :1].expand_as(output))  # an image's branch as a whole
    assert not torch.equal(*outputs)


def test_a_pass_that_checkpointing_repeats_drops_the_same(model):
    modules = share_stochastic_depth(model)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            enable_checkpointing(model)
        logits(model, modules, images, range(2)).square().mean().backward()
        gradients.append([each.grad.clone() for each in model.parameters() if each.grad is not None])
    for checkpointed, plain in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)
