"""The named settings of `depict segment --quality`: how much time a photograph is worth."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quality:
    """How photographs are read where nothing else is said.

    Args:
        overlap: Whether windows overlap as the model's files say; otherwise they lie side by side.
        scales: Sizes relative to the model's own, whose scores are averaged.
        flip: Whether scores are averaged with those of mirror images.
    """

    overlap: bool = True
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def window_stride(self, window_size: int | Literal["none"] | None) -> int | None:
        """Return the pixels between windows of a side, which is None or "none" for whole images.

        Returns:
            None for those of the model's files.
        """
        return None if self.overlap or window_size in (None, "none") else int(window_size)


# `python -m training.tradeoff` measures what they cost and reach.
QUALITIES = {
    "fast": Quality(overlap=False),
    "balanced": Quality(),
    "best": Quality(scales=(0.75, 1.0, 1.25), flip=True),
}
