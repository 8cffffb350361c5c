# %% [markdown]
# # ONNX in a program without torch
#
# The exported file holds everything between a photograph and its label map: resizing, normalisation, windows, the
# decoder, the largest score. Class names and licence are its metadata. What uses it needs ONNX Runtime, numpy and a
# reader of pictures.

# %%
import subprocess
import sys
from pathlib import Path

from depict_hf.cli import main as depict

WORK = Path("onnx_without_torch")
assert depict(["export", "default", str(WORK / "model"), "--dynamic", "--preprocess", "--labels"]) == 0

# %% [markdown]
# The program is started with `torch` and `depict_hf` banned, so that it is seen to need neither.

# %%
PROGRAM = """
import sys

sys.modules["torch"] = sys.modules["depict_hf"] = None  # importing either would raise

import json

import numpy as np
import onnxruntime
import PIL.Image
import PIL.ImageOps

model, photo = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
pixels = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(photo)).convert("RGB"))
[labels] = session.run(["labels"], {"pixel_values": pixels[None]})[0]
assert labels.shape == pixels.shape[:2]
for index in np.argsort(-np.bincount(labels.ravel(), minlength=len(names)))[:3]:
    print(f"{names[index]}: {(labels == index).mean():.1%}")
"""
(WORK / "program.py").write_text(PROGRAM, encoding="utf-8")
command = [sys.executable, f"{WORK}/program.py", f"{WORK}/model/model.onnx", "tests/data/street.jpg"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# Half and a third of the size come from `--fp16` and `--int8`; an export that does not agree with PyTorch on a
# photograph is refused in any case.
