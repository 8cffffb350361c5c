# %% [markdown]
# # What the white box shows
#
# The decoder is read step by step on one photograph: does it compress, which layer and head made a patch what it is,
# and what is a symmetry of a white box but not of a black one. The equations are those of Wen and Li (NeurIPS 2024);
# the instruments only observe, and change no number that the model computes.

# %%
import torch

from depict_hf import default_model
from depict_hf.analysis import (
    analyze,
    contributions,
    rate_curves,
    rotate_heads,
    rotated_across_heads,
    subspace_statistics,
)
from depict_hf.cli import main as depict

PHOTO = "tests/data/street.jpg"
model, image_processor = default_model()
recording = analyze(model, image_processor, PHOTO, window=0)

# %% [markdown]
# ## Does it compress?
#
# Each layer is meant as a gradient step on the coding rate of the patch tokens: a low rate means few dimensions. The
# rate after each layer, in nats, of all tokens together and of their projections onto the heads' subspaces:

# %%
curves = rate_curves(model, recording)
print("all tokens:", [round(rate, 1) for rate in curves.patch_rates_nats[0].tolist()])
assert curves.patch_compression_nats is not None  # a black box has no subspaces
for layer, (rate, after) in enumerate(curves.patch_compression_nats[0].tolist()):
    print(f"on the subspaces of layer {layer}: {rate:.1f} before its step, {after:.1f} after it")

# %% [markdown]
# ## Why this class?
#
# A patch gets the class whose token it is most aligned with. That cosine splits exactly into the encoder's part and one
# term of each head of each layer.

# %%
row, column = recording.grid_size[0] // 2, recording.grid_size[1] // 2
patch = row * recording.grid_size[1] + column
scores = recording.logits[0, :, row, column]
label = int(scores.argmax())
print(f"the patch in the middle is {model.config.id2label[label]}")
split = contributions(model, recording, [patch], [label])
for term, value in zip(split.terms, split.values[0, :, 0, 0].tolist(), strict=True):
    print(f"{value:+.3f} {term}")
print(f"sum: {split.values[0, :, 0, 0].sum():.4f}")

# %% [markdown]
# ## Are the subspaces orthonormal?
#
# The theory wants each head's projection to be an orthonormal basis, and different heads to be incoherent. How far are
# they from it, beside random matrices of the same shape? (0 would be exactly.)

# %%
for layer, statistics in enumerate(subspace_statistics(model)):
    deviations = [round(value, 2) for value in statistics.deviations.tolist()]
    coherent = round(statistics.overlaps.fill_diagonal_(0).max().item(), 2)
    print(f"layer {layer}: from orthonormal {deviations}, largest overlap of two heads {coherent}")
    if statistics.random is not None:
        deviations = [round(value, 2) for value in statistics.random.deviations.tolist()]
        print(f"  random matrices: {deviations}, {statistics.random.overlaps.fill_diagonal_(0).max():.2f}")

# %% [markdown]
# ## A symmetry of the white box
#
# A subspace has no preferred axes: turning each head's basis within itself must not move the logits. Mixing the axes of
# several heads is no symmetry, and does.


# %%
def logits() -> torch.Tensor:
    return analyze(model, image_processor, PHOTO, window=0).logits


before = logits()
with rotated_across_heads(model, torch.Generator().manual_seed(0)):
    print(f"across heads, the logits move by up to {(logits() - before).abs().max():.3f}")
rotate_heads(model, torch.Generator().manual_seed(0))
moved = (logits() - before).abs().max()
print(f"within heads, by up to {moved:.1e}")
assert moved < 1e-3

# %% [markdown]
# ## The same as a page
#
# Masks, confidence, and for any patch you click: which head looked where, what made it that class, what it nearly was.

# %%
assert depict(["explain", PHOTO, "--output", "white_box/street.html", "--overwrite"]) == 0
