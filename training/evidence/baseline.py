"""The published way of running a model, written out plainly: what `training.benchmark` compares with.

Attention forms softmax(q k^T) and multiplies it with v; logits of all classes are upsampled to full size, soft-maxed
and only then compared; windows run one by one; the training loss is taken on full-size logits. Nothing here calls the
package's own layers: weights are read by name, so that what is gained there is not gained here.

Source:
    segm/model and segm/engine.py in rstrudel/segmenter@20d1bfa, model/ in QishuaiWen/DEPICT@6c66e2b, and
    CBSA_semantic_segmentation/segm/model in QishuaiWen/CBSA@042c7f9, read for what they compute.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.windows import enlarge_to_window, window_corners


class StraightforwardModel:
    """The arithmetic of a `DepictForSemanticSegmentation` with native encoder, on the same parameters.

    Dropout and stochastic depth are left out; give the model none where the two are to be compared in training.

    Args:
        model: Shares its parameters, so that gradients of `loss` arrive there.

    Raises:
        ValueError: If the model has another encoder or another activation than the published code.
    """

    def __init__(self, model: DepictForSemanticSegmentation):
        if model.config.backbone_config is not None or model.config.hidden_act != "gelu":
            raise ValueError(
                "Got a model with another encoder than the published code's, which is all that is written out here; "
                "pass one with the native encoder and hidden_act='gelu'."
            )
        self.config = model.config
        self.weights = dict(model.named_parameters())

    @torch.no_grad()
    def segment(
        self,
        image_processor: DepictImageProcessor,
        photo: np.ndarray,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> Tensor:
        """Label map `(height, width)` of a photograph, `(height, width, 3)` uint8, on the CPU.

        Args:
            image_processor: Its `size`, `image_mean` and `image_std` are used.
            photo: One photograph.
            scales, flip: As for `depict_hf.inference.segment`.
        """
        size = photo.shape[:2]
        total = torch.zeros(self.config.num_labels, *size, device=self._device)
        for scale in scales:
            image = self._prepare(image_processor, photo, scale)
            for mirrored in (False, True) if flip else (False,):
                logits = self._image_logits(image.flip(-1) if mirrored else image)
                logits = F.interpolate(logits, size=size, mode="bilinear")[0]
                total += (logits.flip(-1) if mirrored else logits).softmax(dim=0)
        return (total / (len(scales) * (1 + flip))).argmax(dim=0).cpu()

    def loss(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy on full-size logits."""
        return F.cross_entropy(self.forward(pixel_values), labels, ignore_index=self.config.semantic_loss_ignore_index)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits `(batch, num_labels, height, width)` at the size of the input."""
        height, width = pixel_values.shape[-2:]
        patch_size = self.config.patch_size
        padded = F.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
        logits = self.decode(*self.encode(padded))
        return F.interpolate(logits, size=padded.shape[-2:], mode="bilinear")[..., :height, :width]

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return patch tokens `(batch, patches, hidden)` and (grid_height, grid_width) of images of whole patches."""
        prefix = "encoder.embeddings"
        projection = self.weights[f"{prefix}.projection.weight"], self.weights[f"{prefix}.projection.bias"]
        patches = F.conv2d(pixel_values, *projection, stride=self.config.patch_size)
        grid_height, grid_width = patches.shape[-2:]
        grid_size = (grid_height, grid_width)
        names = ["cls_token", "distillation_token"] if self.config.use_distillation_token else ["cls_token"]
        extra = [self.weights[f"{prefix}.{name}"].expand(len(patches), -1, -1) for name in names]
        tokens = torch.cat([*extra, patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self._positions(grid_size, len(extra))
        for index in range(self.config.num_hidden_layers):
            tokens = self._block(
                tokens, f"encoder.layers.{index}", self.config.num_attention_heads, self.config.layer_norm_eps
            )
        return self._norm(tokens, "encoder.norm", self.config.layer_norm_eps)[:, len(extra) :], grid_size

    def decode(self, patches: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Return logits `(batch, num_labels, grid_height, grid_width)` of patch tokens."""
        kind = self.config.decoder_type
        layers = range(self.config.decoder_num_layers)
        if kind == "linear":
            return _to_grid(self._linear(patches, "decoder.classifier"), grid_size)
        if kind == "ca":
            for index in layers:
                patches = patches + self._subspace(patches, f"decoder.layers.{index}")
            patches = self._norm(patches, "decoder.norm")
            classes = self.weights["decoder.class_tokens"].expand(len(patches), -1, -1)
            for index in range(self.config.decoder_cross_num_layers):
                classes = classes + self._subspace(patches, f"decoder.cross_layers.{index}", classes)
            return self._scores(patches, self._norm(classes, "decoder.class_norm"), grid_size)
        if kind == "mask_transformer":
            patches = self._linear(patches, "decoder.input_projection")
        tokens = torch.cat([patches, self.weights["decoder.class_tokens"].expand(len(patches), -1, -1)], dim=1)
        for index in layers:
            name = f"decoder.layers.{index}"
            if kind == "sa":
                tokens = tokens + self._subspace(tokens, name)
            elif kind == "cbsa":
                tokens = tokens + self._contract_and_broadcast(tokens, grid_size, name)
            else:
                tokens = self._block(tokens, name, self.config.decoder_num_heads)
        tokens = self._norm(tokens, "decoder.norm")
        patches, classes = tokens[:, : -self.config.num_labels], tokens[:, -self.config.num_labels :]
        if kind == "mask_transformer":
            patches = patches @ self.weights["decoder.patch_projection"]
            classes = classes @ self.weights["decoder.class_projection"]
        return self._scores(patches, classes, grid_size)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def _prepare(self, image_processor: DepictImageProcessor, photo: np.ndarray, scale: float) -> Tensor:
        """Return the photograph at one scale, `(1, 3, height, width)`, normalised and at least of a window's size."""
        image = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
        bounds = {name: int(side * scale) for name, side in dict(image_processor.size).items()}
        height, width = photo.shape[:2]
        size = image_processor.resize_size(height, width, bounds)
        if size != (height, width):
            image = F.interpolate(image, size=size, mode="bilinear").round()
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
        )
        image = ((image / 255 - mean) / std).to(self._device)
        return image if self.config.window_size is None else enlarge_to_window(image, self.config.window_size)

    def _image_logits(self, image: Tensor) -> Tensor:
        """Return logits `(1, num_labels, height, width)` of one image: windows one by one, averaged in overlaps."""
        side = self.config.window_size
        if side is None:
            return self.forward(image)
        height, width = image.shape[-2:]
        size = (height, width)
        corners = window_corners(size, side, self.config.window_stride or side)
        windows = torch.zeros(len(corners), self.config.num_labels, side, side, device=image.device)
        for index, (top, left) in enumerate(corners):
            windows[index] = self.forward(image[..., top : top + side, left : left + side])[0]
        total = torch.zeros(self.config.num_labels, *size, device=image.device)
        count = torch.zeros(1, *size, device=image.device)
        for logits, (top, left) in zip(windows, corners, strict=True):
            total[:, top : top + side, left : left + side] += logits
            count[:, top : top + side, left : left + side] += 1
        return (total / count)[None]

    def _positions(self, grid_size: tuple[int, int], num_extra: int) -> Tensor:
        positions = self.weights["encoder.embeddings.position_embeddings"]
        if self.config.grid_size == grid_size:
            return positions
        grid = positions[:, num_extra:].unflatten(1, self.config.grid_size).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=grid_size, mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([positions[:, :num_extra], grid], dim=1)

    def _block(self, tokens: Tensor, name: str, num_heads: int, eps: float = 1e-5) -> Tensor:
        """Run an ordinary transformer block."""
        qkv = self._linear(self._norm(tokens, f"{name}.norm1", eps), f"{name}.attention.qkv")
        query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        context = (_weights(query, key) @ value).transpose(1, 2).flatten(2)
        tokens = tokens + self._linear(context, f"{name}.attention.projection")
        hidden = F.gelu(self._linear(self._norm(tokens, f"{name}.norm2", eps), f"{name}.mlp.fc1"))
        return tokens + self._linear(hidden, f"{name}.mlp.fc2")

    def _subspace(self, tokens: Tensor, name: str, queries: Tensor | None = None) -> Tensor:
        """Make one step of MSSA, or of MSCA where there are queries."""
        projection = self.weights[f"{name}.projection"]
        keys = self._heads(self._norm(tokens, f"{name}.norm") @ projection.T)
        queries = keys if queries is None else self._heads(queries @ projection.T)
        context = (_weights(queries, keys) @ keys).transpose(1, 2).flatten(2)
        return self.weights[f"{name}.step_size"] * (context @ projection)

    def _contract_and_broadcast(self, tokens: Tensor, grid_size: tuple[int, int], name: str) -> Tensor:
        """Make one step of CBSA."""
        projected = self._norm(tokens, f"{name}.norm") @ self.weights[f"{name}.projection.weight"].T
        patches = projected[:, : -self.config.num_labels].unflatten(1, grid_size).permute(0, 3, 1, 2)
        representatives = self._heads(F.adaptive_avg_pool2d(patches, (10, 10)).flatten(2).transpose(1, 2))
        projected = self._heads(projected)
        contraction = _weights(representatives, projected)
        rate = self.weights[f"{name}.representative_step_size"]
        representatives = representatives + rate * (contraction @ projected)
        update = _weights(representatives, representatives) @ representatives
        update = self.weights[f"{name}.step_size"] * (contraction.transpose(-1, -2) @ update)
        return self._linear(update.transpose(1, 2).flatten(2), f"{name}.output")

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.config.decoder_num_heads, -1)).transpose(1, 2)

    def _scores(self, patches: Tensor, classes: Tensor, grid_size: tuple[int, int]) -> Tensor:
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        return _to_grid(self._norm(patches @ classes.transpose(1, 2), "decoder.mask_norm"), grid_size)

    def _linear(self, tokens: Tensor, name: str) -> Tensor:
        return F.linear(tokens, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, tokens: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(tokens, weight.shape, weight, bias, eps)


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Return attention weights, `(batch, heads, queries, keys)`."""
    return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(dim=-1)


def _to_grid(scores: Tensor, grid_size: tuple[int, int]) -> Tensor:
    return scores.transpose(1, 2).unflatten(2, grid_size)
