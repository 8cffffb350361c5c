"""`training.train` with FSDP on CPUs, where accelerate by itself does not use it.

Its state is told that this is FSDP, and gathered tensors are waited for, which copying them from a GPU would do.
"""

import sys

import torch
from accelerate import Accelerator, state
from accelerate.utils import DistributedType

from training import train

initialize = state.AcceleratorState.__init__
get_state_dict = Accelerator.get_state_dict


def initialize_with_fsdp(self, *args, **kwargs) -> None:
    initialize(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin") or getattr(self, "fsdp_plugin", None)
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


def get_whole_state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(each).copy_(each) for name, each in get_state_dict(self, *args, **kwargs).items()}


if __name__ == "__main__":
    state.AcceleratorState.__init__ = initialize_with_fsdp
    Accelerator.get_state_dict = get_whole_state_dict
    sys.exit(train.main())
