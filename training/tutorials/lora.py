# %% [markdown]
# # LoRA: low-rank adapters in an encoder that stays as it is
#
# Only a low-rank product in each linear layer of the encoder moves, and the decoder. That needs a fraction of the
# optimiser's memory, and the adapters are merged at the end, so that the model is as fast as before. Needs
# `pip install ".[lora]"`. In a recipe, `lora_rank=8 freeze_encoder=false` is all of it.

# %%
from pathlib import Path

import PIL.Image
import torch
from transformers import Trainer, TrainingArguments

from depict_hf import DepictForSemanticSegmentation, DepictImageProcessor
from training.optimization import add_adapters, merge_adapters, optimizer_groups
from training.starting import start_from
from training.tutorials.drawn_scenes import CLASSES, draw_scenes

WORK = Path("lora")
DATA = draw_scenes(WORK / "data", count=8)
start = start_from("default", CLASSES)
model = start.model
square = {"height": 112, "width": 112}
processor = DepictImageProcessor(size=square, image_mean=start.image_mean, image_std=start.image_std)

# %% [markdown]
# ## Add the adapters
#
# Their products are zero at first: the model computes what it did.


# %%
class Scenes(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.photos = sorted((folder / "images").iterdir())

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        photo = self.photos[index]
        labels = photo.parents[1] / "masks" / f"{photo.stem}.png"
        inputs = processor(PIL.Image.open(photo), segmentation_maps=PIL.Image.open(labels), return_tensors="pt")
        return {name: value[0] for name, value in inputs.items()}


data = Scenes(DATA)
pixel_values = data[0]["pixel_values"][None]
with torch.inference_mode():
    before = model.eval()(pixel_values).logits
add_adapters(model, rank=8, alpha=16)
with torch.inference_mode():
    torch.testing.assert_close(model(pixel_values).logits, before)
trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(f"{trainable:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters move")

# %% [markdown]
# ## Train
#
# `optimizer_groups` leaves out what does not move.

# %%
arguments = TrainingArguments(
    str(WORK / "run"),
    max_steps=12,
    per_device_train_batch_size=4,
    logging_steps=4,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
optimizer = torch.optim.AdamW(optimizer_groups(model, learning_rate=1e-3, encoder_rate_factor=1.0))
trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("loss:", losses)

# %% [markdown]
# ## Merge and save
#
# The products are added to the weights they belong to. What is saved is a plain model: it loads without peft.

# %%
with torch.inference_mode():
    trained = model.eval()(pixel_values).logits
merge_adapters(model)
model.save_pretrained(WORK / "model")
processor.save_pretrained(WORK / "model")
loaded = DepictForSemanticSegmentation.from_pretrained(WORK / "model").eval()
with torch.inference_mode():
    torch.testing.assert_close(loaded(pixel_values).logits, trained, atol=1e-4, rtol=1e-4)
print("the merged model computes the same")
