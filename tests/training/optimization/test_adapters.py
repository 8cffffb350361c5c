"""Adapters change nothing at first, are all of the encoder that learns, and disappear into the weights."""

import sys

import pytest
import torch
from conftest import tiny_model

from training.optimization.adapters import add_adapters, has_adapters, merge_adapters


def randomize(model) -> None:
    """Give the adapters values, as if they had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def test_new_adapters_leave_the_outputs_alone(pixel_values):
    model = tiny_model("sa")
    expected = model(pixel_values).logits
    add_adapters(model, rank=2, alpha=4)
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=0, rtol=0)


def test_adapters_and_decoder_alone_are_trainable():
    model = tiny_model("sa")
    decoder = {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    add_adapters(model, rank=2, alpha=4, num_frozen=1)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = trainable - decoder
    assert trainable >= decoder
    assert all("lora_" in name and name.startswith("encoder.layers.1.") for name in adapters)
    assert any(".mlp.fc2." in name for name in adapters)
    assert {parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name} == {2}


@torch.no_grad()
def test_merged_adapters_are_part_of_the_weights(pixel_values):
    """weight + alpha / rank * B A, and a plain model again."""
    model = tiny_model("sa")
    names = model.state_dict().keys()
    before = model.encoder.layers[0].mlp.fc1.weight.clone()
    add_adapters(model, rank=2, alpha=3)
    randomize(model)
    layer = model.encoder.layers[0].mlp.fc1
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = model(pixel_values).logits
    assert has_adapters(model)
    merge_adapters(model)
    assert not has_adapters(model)
    assert model.state_dict().keys() == names
    torch.testing.assert_close(model.encoder.layers[0].mlp.fc1.weight, before + 1.5 * product)
    torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-4, rtol=1e-4)


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora_rank=2 needs peft: pip install '\.\[lora\]'"):
        add_adapters(tiny_model("sa"), rank=2, alpha=4)
