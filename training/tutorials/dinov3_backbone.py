# %% [markdown]
# # A DINOv3 backbone
#
# Any backbone of transformers with a plain patch grid can carry the decoder. DINOv3 is behind a form on the Hub: once
# you have access, set `BACKBONE = "facebook/dinov3-vits16-pretrain-lvd1689m"`. So that this runs anywhere, it makes a
# small one with random weights instead, which learns little; what is done with it is the same.

# %%
import json
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from depict_hf import load_model, load_photo, segment
from depict_hf.cli import main as depict
from training.starting import start_from
from training.tutorials.drawn_scenes import CLASSES, draw_scenes

WORK = Path("dinov3_backbone")
DATA = draw_scenes(WORK / "data")
BACKBONE = WORK / "backbone"
torch.manual_seed(0)
config = DINOv3ViTConfig(
    hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=3, num_register_tokens=4
)
DINOv3ViTModel(config).save_pretrained(BACKBONE)

# %% [markdown]
# The encoder's weights are kept, the decoder's are new. The class token and the register tokens of the backbone are
# dropped before the decoder, and its patch size decides the grid.

# %%
start = start_from(str(BACKBONE), CLASSES)
print("\n".join(start.describe()))

# %% [markdown]
# ## Train, and compare decoders
#
# `--from` takes the backbone as it is. `sa` is the white box, `mask_transformer` its black-box counterpart,
# `linear` the least that can be done. Random features tell nothing about which is better; the pretrained ones would.

# %%
for decoder in ("sa", "linear"):
    command = ["train", str(DATA), str(WORK / decoder), "--from", str(BACKBONE), "--decoder", decoder]
    assert depict([*command, "--max-steps", "8"]) == 0

# %%
for decoder in ("sa", "linear"):
    record = json.loads((WORK / decoder / "evaluation.json").read_text(encoding="utf-8"))
    print(f"{decoder}: mean IoU {record['mean_iou']:.3f}")

# %% [markdown]
# The trained model carries its backbone's configuration, so that it loads like any other.

# %%
model, image_processor = load_model(str(WORK / "sa"))
[label_map] = segment(model, image_processor, [load_photo(DATA / "images" / "00.jpg")])
print(type(model.encoder).__name__, [model.config.id2label[label] for label in label_map.unique().tolist()])
