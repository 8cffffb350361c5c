"""What `SegmentationTrainer` hears of while it trains: new epochs, optimiser steps, standstill, and signals."""

from collections.abc import Callable

import torch
import transformers
from accelerate import Accelerator
from transformers import EarlyStoppingCallback

from ..data import EpochSampler, FeatureDataset, StreamingDataset, TrainingDataset
from ..stopping import received


class EpochSetter(transformers.TrainerCallback):
    """Tells data and sampler which epoch begins, also one that is entered in the middle.

    accelerate reaches them neither in all processes nor in all resumed epochs.
    """

    def __init__(self, dataset: FeatureDataset | StreamingDataset | TrainingDataset, sampler: EpochSampler):
        self.dataset = dataset
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        epoch = int(state.epoch + 1e-6)  # a sum of fractions
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch)


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` without its warning that the best model must be loaded; `finish` loads it."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        pass

    @staticmethod
    def evaluations_without_gain(state: transformers.TrainerState) -> int:
        """Return how many evaluations in a row had no gain when a checkpoint's state was written; 0 without this."""
        saved = state.stateful_callbacks.get(EarlyStopping.__name__)
        return saved["attributes"]["early_stopping_patience_counter"] if saved else 0


class FiniteLoss(transformers.TrainerCallback):
    """Has the loss looked at before the optimiser uses its gradients.

    Args:
        check: Raises where the loss of the step is not finite.
    """

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.check()


class StopAtStep(transformers.TrainerCallback):
    """Ends training after the optimiser step during which a signal came, with a checkpoint of it.

    Where that step is evaluated, too, this is done first, so that a run that goes on knows of it. Several processes
    agree on the step, whichever of them the signal came to: as they are about to make it, where they wait for each
    other's loss anyway.

    Attributes:
        number: Number of the signal that ended training; None as long as there is none.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number: int | None = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.accelerator.num_processes > 1:
            number = torch.tensor(received() or 0, device=self.accelerator.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number) or None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._look()
        if self.number is not None:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        # Not before: a checkpoint keeps what is asked for then, and a run that goes on would end at once.
        self._look()
        if self.number is not None:
            control.should_training_stop = True

    def _look(self) -> None:
        if self.accelerator.num_processes == 1:
            self.number = received()
