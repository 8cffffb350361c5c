"""One tiny model and one non-square input for all tests."""

import pytest
import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor

DECODER_TYPES = ("sa", "ca", "cbsa", "mask_transformer", "linear")


def tiny_config(decoder_type: str = "sa", **overrides) -> DepictConfig:
    fields = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "decoder_type": decoder_type,
        "decoder_num_layers": 2,
        "decoder_num_heads": 2,
        "decoder_head_dim": 16,
        "decoder_cross_num_layers": 2,
        "decoder_cross_head_dim": 8,
        "num_labels": 5,
    }
    return DepictConfig(**(fields | overrides))


def tiny_model(decoder_type: str = "sa", **overrides) -> DepictForSemanticSegmentation:
    """A model whose random logits differ from pixel to pixel, in evaluation mode."""
    torch.manual_seed(0)
    model = DepictForSemanticSegmentation(tiny_config(decoder_type, initializer_range=0.3, **overrides))
    return model.eval()


@pytest.fixture(params=DECODER_TYPES)
def decoder_type(request) -> str:
    return request.param


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Two images of 32 x 48 pixels: 4 x 6 patches."""
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def image_processor() -> DepictImageProcessor:
    return DepictImageProcessor(size={"shortest_edge": 32})
