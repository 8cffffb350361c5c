"""A model as captum's methods want it: images in, one score per image and class out."""

import torch
from torch import Tensor, nn

from ..modeling_depict import DepictForSemanticSegmentation
from ..vit import LayerRecord
from ..windows import pad_to_multiple
from .steps import check_index


def forward_for_attribution(
    model: DepictForSemanticSegmentation, patch: tuple[int, int] | None = None, area: Tensor | None = None
) -> nn.Module:
    """Wrap a model so that captum can attribute a class score to pixels, patches or layers.

    A pixel's worth for one patch's class, and what the tokens before the decoder's last LayerNorm do for it, in three
    lines each:

        forward = forward_for_attribution(model, patch=(12, 20))
        occlusion = captum.attr.Occlusion(forward)
        pixels = occlusion.attribute(pixel_values, (3, 14, 14), strides=(3, 14, 14), target=label)

        gradients = captum.attr.IntegratedGradients(forward)
        pixels = gradients.attribute(pixel_values, target=label, internal_batch_size=4)

        layers = captum.attr.LayerGradientXActivation(forward, model.decoder.norm)
        tokens = layers.attribute(pixel_values, target=label, attribute_to_layer_input=True)

    Layers are to be chosen among modules with one tensor in and one out, such as LayerNorms: decoder layers return
    tuples.

    Beside `contributions` and `source_contributions`, for one patch and its class:

        row = 12 * recording.grid_size[1] + 20
        ours = [source_contributions(model, recording, layer, row, label) for layer in range(num_layers)]

    Both describe the same forward pass and find mostly the same for the patch itself. They differ on its surroundings,
    since gradients and occlusion let everything move that contributions hold fixed: attention weights, class tokens,
    the last LayerNorm, and the scores of other classes, against which logits are normalised. Two cases are clear: in
    "linear", gradient times activation of the encoder's last LayerNorm is our term "encoder". In the other decoders,
    gradient times activation before the decoder's last LayerNorm sums to nearly nothing, since a cosine does not depend
    on a token's length; our terms sum to the cosine.

    Args:
        model: A model in evaluation mode. Every input is processed whole, `config.window_size` does not apply.
        patch: (row, column) on the patch grid whose logits are returned; or
        area: `(grid_height, grid_width)`, booleans: patches over which logits are averaged. By default over all.

    Returns:
        A module from `(batch, channels, height, width)` to `(batch, num_labels)`, differentiable; it shares the model's
        weights, and captum's `target` is the class.

    Raises:
        ValueError: If patch and area are both given, or area is no map of booleans with at least one patch; on a call
            if they do not fit the grid.
    """
    if patch is not None and area is not None:
        raise ValueError(f"Got patch={patch} and an area; needed at most one of them.")
    if area is not None and (area.dtype != torch.bool or area.ndim != 2 or not area.any()):
        raise ValueError(
            f"Got an area of shape {tuple(area.shape)} and dtype {area.dtype}, needed booleans (grid_height, "
            "grid_width), at least one of them true."
        )
    return _AttributionForward(model, patch, area).train(model.training)


class _AttributionForward(nn.Module):
    def __init__(self, model: DepictForSemanticSegmentation, patch: tuple[int, int] | None, area: Tensor | None):
        super().__init__()
        self.model = model
        self.patch = patch
        self.area = area

    def forward(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        pixel_values = pad_to_multiple(pixel_values.to(model.dtype), model.config.encoder_patch_size)
        patches, grid_size = model.encoder(pixel_values, LayerRecord())
        logits = model.decoder(patches, grid_size)
        if self.patch is not None:
            check_index("row", self.patch[0], grid_size[0], "grid's height")
            check_index("column", self.patch[1], grid_size[1], "grid's width")
            return logits[:, :, self.patch[0], self.patch[1]]
        if self.area is None:
            return logits.mean((2, 3))
        if tuple(self.area.shape) != tuple(grid_size):
            raise ValueError(f"Got an area of shape {tuple(self.area.shape)}, but the grid is {tuple(grid_size)}.")
        return logits[:, :, self.area.to(logits.device)].mean(2)
