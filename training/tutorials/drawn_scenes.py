"""Drawn street scenes with their label maps, for tutorials that need data to be there at once."""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

CLASSES = ("sky", "house", "tree", "road", "car")


def draw_scenes(folder: str | Path, count: int = 24, size: tuple[int, int] = (168, 224)) -> Path:
    """Write `count` photographs to `folder/images`, label maps to `folder/masks`, names to `folder/classes.txt`.

    Args:
        folder: Made where it is missing.
        count: Number of scenes; the same ones at every call.
        size: (height, width) in pixels.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for room in ("images", "masks"):
        (folder / room).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    for index in range(count):
        photo, labels = draw_scene(rng, size)
        photo.save(folder / "images" / f"{index:02d}.jpg", quality=92)
        labels.save(folder / "masks" / f"{index:02d}.png")
    return folder


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Return one scene of (height, width) `size`: RGB, and ids in the order of `CLASSES` in 8 bits."""
    height, width = size
    photo, labels = PIL.Image.new("RGB", (width, height)), PIL.Image.new("L", (width, height))
    colors, ids = PIL.ImageDraw.Draw(photo), PIL.ImageDraw.Draw(labels)
    horizon = int(height * rng.uniform(0.5, 0.65))

    def draw(shape: str, box: list[int], label: str, color: tuple[int, ...]) -> None:
        shade = tuple(int(value) for value in np.clip(np.add(color, rng.integers(-25, 26, 3)), 0, 255))
        getattr(colors, shape)(box, fill=shade)
        getattr(ids, shape)(box, fill=CLASSES.index(label))

    draw("rectangle", [0, 0, width, height], "sky", (150, 190, 235))
    draw("rectangle", [0, horizon, width, height], "road", (95, 95, 100))
    for left in range(0, width, width // 5):
        breadth, top = int(width * rng.uniform(0.1, 0.2)), int(horizon * rng.uniform(0.3, 0.8))
        if rng.random() < 0.6:
            draw("rectangle", [left, top, left + breadth, horizon], "house", (170, 110, 80))
        else:
            draw("ellipse", [left, top, left + breadth, horizon + 4], "tree", (50, 120, 50))
    for _ in range(rng.integers(1, 3)):
        left, top = int(rng.uniform(0, 0.75) * width), int(rng.uniform(horizon, 0.85 * height))
        draw("rectangle", [left, top, left + width // 5, top + height // 9], "car", (190, 30, 45))
    noisy = np.asarray(photo, float) + rng.normal(0, 6, (height, width, 3))
    return PIL.Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)), labels
