"""How long threads of PyTorch wait in a loop for each other before they sleep, where other programs want the processor.

GNU's OpenMP, which PyTorch's wheels for Linux compute with, lets a thread that is done spin for some 300,000 rounds
before it sleeps. On a processor that is not all ours it then spins in the place of the thread that it waits for. On two
cores beside one busy process, a forward pass of DINOv2-S took 2.6 to 2.9 s so, and 0.6 to 0.7 s with 2,000 rounds; on
the same cores alone, 0.28 to 0.31 s and 0.27 to 0.34 s.
"""

import os

SPINS = "2000"


def spin_briefly() -> None:
    """Have threads of this process, and of those that it starts, sleep soon; to be called before PyTorch is imported.

    What the environment says on it stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
