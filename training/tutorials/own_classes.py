# %% [markdown]
# # From your own photographs and masks to a file you can ship
#
# A folder of photographs with label maps becomes a model of your classes, a report to trust, masks of new photographs,
# and an ONNX file that runs without PyTorch. Here the photographs are drawn; put your own folder in place of `DATA`.
# Every step is also a command for the shell: `depict train DATA OUT` and so on.

# %%
import json
from pathlib import Path

from depict_hf.cli import main as depict
from training.data import open_data
from training.tutorials.drawn_scenes import draw_scenes

WORK = Path("own_classes")
DATA = draw_scenes(WORK / "data")

# %% [markdown]
# ## Look at the data first
#
# The layout is found by itself: here `images/` and `masks/` with names that agree, and `classes.txt` with the names. A
# split by a hash of the names is made where there is none. What cannot be trained on would be named here, all of it at
# once: masks of 0 and 255, masks of another size, classes without a pixel, images in two splits.

# %%
print(open_data(str(DATA)))

# %% [markdown]
# ## Train
#
# Only what depends on the classes is made anew: the encoder of the model that is shipped is kept. Settings follow from
# the data, the machine and the time. `--minutes 60` is a good length for photographs; for these drawings a few steps of
# small images are enough, set by hand at the end of the line.

# %%
OUT = WORK / "model"
BY_HAND = ["data.size=196", "data.crop_size=196", "optimization.batch_size=4"]
assert depict(["train", str(DATA), str(OUT), "--max-steps", "12", *BY_HAND]) == 0

# %% [markdown]
# `report.md` says what was chosen and why, and the IoU of each class on images that were not trained on. `curves.png`
# and `worst.png` are there to be looked at.

# %%
print((OUT / "report.md").read_text(encoding="utf-8")[:900])

# %% [markdown]
# ## Measure, segment, ship
#
# `evaluate` gives the table for any split or data set, `segment` the masks of photographs, `export` one file with
# resizing and normalisation inside, which has been compared with PyTorch by the time it is there.

# %%
assert depict(["evaluate", str(OUT), str(DATA), "--output", str(WORK / "evaluation.json"), "--workers", "0"]) == 0
print("mean IoU:", json.loads((WORK / "evaluation.json").read_text(encoding="utf-8"))["mean_iou"])

# %%
assert depict(["segment", str(DATA / "images" / "00.jpg"), "--model", str(OUT), "--output", str(WORK / "masks")]) == 0
print(sorted(path.name for path in (WORK / "masks").iterdir()))

# %%
assert depict(["export", str(OUT), str(WORK / "shipped"), "--dynamic", "--preprocess", "--labels"]) == 0
print(sorted(path.name for path in (WORK / "shipped").iterdir()))

# %% [markdown]
# `onnx_without_torch` shows the program that uses such a file.
