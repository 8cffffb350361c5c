"""What `SegmentationTrainer` hears of while it trains: new epochs, optimiser steps, and standstill."""

from collections.abc import Callable

import transformers
from transformers import EarlyStoppingCallback

from ..data import EpochSampler, FeatureDataset, StreamingDataset, TrainingDataset


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
