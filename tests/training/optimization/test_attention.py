"""Attention written out computes what PyTorch's fused attention computes, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from training.optimization import PlainAttention


def drawn(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_those_of_the_fused_one(scale):
    """Fails on a wrong scale, a missing transposition, or weights that are normalised over queries."""
    results = []
    for context in (torch.enable_grad(), PlainAttention()):
        inputs = drawn(2, 3, 5, 4)
        with context:
            output = F.scaled_dot_product_attention(*inputs, attn_mask=None, scale=scale)
        output.pow(3).sum().backward()
        results.append([output, *(each.grad for each in inputs)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused)


def test_masked_and_causal_calls_go_the_usual_way():
    """Fails if a mask is dropped, by name or by place, or an order is."""
    query, key, value = drawn(1, 2, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with PlainAttention():
        for found in (
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
            F.scaled_dot_product_attention(query, key, value, mask),
            F.scaled_dot_product_attention(query, key, value, is_causal=True),
            F.scaled_dot_product_attention(query, key, value, None, 0.0, True),
        ):
            torch.testing.assert_close(found, expected)


class Calls(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoder_type", ["sa", "ca", "mask_transformer"])
def test_it_reaches_every_attention_of_a_model(decoder_type):
    """Fails if an encoder or decoder layer computes attention in a way that the context does not see."""
    model, pixels = tiny_model(decoder_type), torch.randn(1, 3, 32, 48)
    with Calls() as fused:
        expected = model(pixel_values=pixels).logits
    with PlainAttention(), Calls() as plain:
        torch.testing.assert_close(model(pixel_values=pixels).logits, expected)
    assert [any("scaled_dot_product" in name for name in calls.names) for calls in (fused, plain)] == [True, False]
