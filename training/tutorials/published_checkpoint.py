# %% [markdown]
# # The authors' checkpoint, and the paper's evaluation
#
# A file of the published code, `checkpoint.pth` with `variant.yml` beside it, becomes a model folder whose protocol is
# that of the paper: size, windows, normalisation. If you have the authors' file and ADE20K, set both names below and
# skip the cell that makes stand-ins; `python -m training.reproduce CHECKPOINT DATASET` then compares with the paper's
# row in one command. The stand-ins are a random ViT-Tiny in the same file format and two made images in ADE20K's
# layout, whose score means nothing.

# %%
from pathlib import Path

import torch

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor, load_model
from depict_hf.cli import main as depict
from depict_hf.labels import class_names
from depict_hf.to_published import write_published
from training.evaluate import main as evaluate
from training.evidence.made_data import make_dataset

WORK = Path("published_checkpoint")
CHECKPOINT = WORK / "authors" / "checkpoint.pth"
DATASET = WORK / "ade20k"

# %% [markdown]
# ## Stand-ins for the files
#
# `write_published` is the way back: any native model of ours as a file that the published code reads.

# %%
torch.manual_seed(0)
names = dict(enumerate(class_names("ade20k")))
config = DepictConfig.from_preset("vit_tiny_patch16_384", decoder_type="sa", id2label=names)
write_published(DepictForSemanticSegmentation(config), DepictImageProcessor(), CHECKPOINT.parent, "ade20k")
make_dataset("ade20k", DATASET, num_train=1, num_validation=2, size=(512, 683))

# %% [markdown]
# ## Convert
#
# What the file is, which protocol it gets and whether anything was left over is printed. Nothing in it is executed.

# %%
MODEL = WORK / "model"
assert depict(["convert", str(CHECKPOINT), str(MODEL)]) == 0
model, image_processor = load_model(str(MODEL))
print(image_processor.size, model.config.window_size, model.config.window_stride)

# %% [markdown]
# ## Evaluate as the paper does
#
# The model folder has the protocol, so that nothing needs to be set. The paper's multi-scale figures are of
# `--scales 0.5 0.75 1 1.25 1.5 1.75 --flip`. ADE20K numbers its classes from 1; the image processor knows.

# %%
OPTIONS = ["--split", "validation", "--workers", "0"]
assert evaluate([str(MODEL), str(DATASET), *OPTIONS, "--output", str(WORK / "single_scale.json")]) == 0

# %% [markdown]
# `training/MIGRATION.md` says which command of the published code is which of ours.
