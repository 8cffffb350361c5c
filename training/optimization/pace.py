"""Training that ends at a moment instead of after a number of steps, or after the steps that it was given.

The rate of a step follows from how much of the stage is over by then, so that it has come down to its end whatever else
the machine had to do.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import transformers
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data import DecoderOnFeatures
from ..recipe import Recipe
from .groups import rate_factor
from .trainer import SegmentationTrainer

EVALUATIONS = 8
# Optimiser steps before the first evaluation and between two of them, at least.
LEAST_STEPS_BETWEEN = 10
# At most so long between two events; a run that is killed and goes on does not know better when it was killed.
LOG_SECONDS = 5.0


@dataclass
class Budget:
    """Seconds that a run may take, over all its sessions.

    Args:
        seconds: Seconds in all; infinite where the run is bounded by steps.
        spent_before: Seconds of earlier sessions.
        clock: Clock of this session, in seconds.
        started: When this session began, by the clock.
    """

    seconds: float = math.inf
    spent_before: float = 0.0
    clock: Callable[[], float] = time.monotonic
    started: float | None = None

    def __post_init__(self) -> None:
        self._started = self.clock() if self.started is None else self.started

    def spent(self) -> float:
        """Return the seconds that have gone, those of earlier sessions included."""
        return self.spent_before + self.clock() - self._started

    def left(self) -> float:
        """Return the seconds that are left; below zero where it took longer."""
        return self.seconds - self.spent()


@dataclass
class Pace:
    """How much of a stage is over.

    Args:
        budget: Budget of the whole run.
        starts_at, ends_at: Beginning and end of the stage, in spent seconds of the budget.
        steps: Optimiser steps of the stage, where those bound it.
        afterwards_seconds: Set apart after `ends_at` for another evaluation. Once evaluations in the stage show how
            long that will take, the stage ends the sooner or the later.
        afterwards_images: Images that the other evaluation should look at.
        afterwards_at_most: Seconds of the other evaluation; beyond, it looks at fewer images.
    """

    budget: Budget
    starts_at: float = 0.0
    ends_at: float = math.inf
    steps: int | None = None
    afterwards_seconds: float = 0.0
    afterwards_images: int = 0
    afterwards_at_most: float = math.inf
    step_seconds: float = field(default=0.0, init=False)
    evaluation_seconds: float = field(default=0.0, init=False)
    image_seconds: float | None = field(default=None, init=False)

    def end(self) -> float:
        """Return when the stage ends, in spent seconds of the budget."""
        if self.image_seconds is None or not self.afterwards_images:
            return self.ends_at
        needed = self.afterwards_images * self.image_seconds
        return self.ends_at + self.afterwards_seconds - min(needed, self.afterwards_at_most)

    def over(self, step: int) -> float:
        """Return how much is over after `step` steps, from 0 to 1; no step begins that would not end in time."""
        by_steps = step / self.steps if self.steps else 0.0
        length = self.end() - self.evaluation_seconds - self.step_seconds - self.starts_at
        by_time = 0.0 if math.isinf(length) else (self.budget.spent() - self.starts_at) / max(length, 1e-9)
        return min(max(by_steps, by_time, 0.0), 1.0)

    def seconds_left(self, step: int) -> float:
        """Return the seconds left of the stage, with evaluations; as the steps so far say where no time bounds it."""
        if not math.isinf(self.ends_at):
            return max(self.end() - self.budget.spent(), 0.0)
        over = self.over(step)
        return (self.budget.spent() - self.starts_at) * (1 - over) / over if over else math.nan


def rate_when(recipe: Recipe, step: int, over: float) -> float:
    """Return the share of the learning rate at a step, counted from 0, when a fraction of the stage is over."""
    warmup, length = recipe.optimization.warmup_steps, 10**6
    # A warm-up must not take most of a stage that has few steps.
    if step < warmup and over < 0.2:
        return rate_factor(recipe, step, warmup + length)
    return rate_factor(recipe, warmup + over * length, warmup + length)


class PacedTrainer(SegmentationTrainer):
    """Trains until its stage is over, evaluates and saves `EVALUATIONS` times meanwhile, and reports in single lines.

    Args:
        pace: Pace of the stage.
        report: Called with every event: `step`, `seconds` spent of the budget, and `loss`, or `mean_iou` with
            `image_seconds`, those of an image where whole images went through the whole model.
        kwargs: As for `SegmentationTrainer`.
    """

    def __init__(self, pace: Pace, report: Callable[[dict], None], **kwargs):
        super().__init__(**kwargs)
        self.pace = pace
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Pacer(pace, report))

    def has_ended(self, state: transformers.TrainerState) -> bool:
        """Say whether the run is over: as for other runs, or because its time is."""
        return super().has_ended(state) or self.pace.over(state.global_step) >= 1

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        if self.lr_scheduler is None:
            factor = lambda step: rate_when(self.recipe, step, self.pace.over(step))  # noqa: E731
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        begin = self.pace.budget.spent()
        metrics = super().evaluate(*args, **kwargs)
        self.pace.evaluation_seconds = self.pace.budget.spent() - begin
        if not isinstance(self.model, DecoderOnFeatures):
            self.pace.image_seconds = self.pace.evaluation_seconds / len(self.eval_dataset)
        return metrics


class _Pacer(transformers.TrainerCallback):
    """Asks for evaluations, checkpoints and the end, and hands events on."""

    def __init__(self, pace: Pace, report: Callable[[dict], None]):
        self.pace = pace
        self.report = report
        self.evaluated_at = (0.0, 0)
        self.step_began = self.logged_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        step, over = state.global_step, self.pace.over(state.global_step)
        if self.pace.steps and math.isinf(self.pace.ends_at):
            # A run that goes on is evaluated at the steps at which it would have been if it had not been stopped.
            step = max((event["step"] for event in state.log_history if "eval_mean_iou" in event), default=0)
            over = self.pace.over(step)
        self.evaluated_at = (over, step)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.step_began = self.pace.budget.spent()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        took = self.pace.budget.spent() - self.step_began
        # The longest of late, so that the last step is not begun too late.
        self.pace.step_seconds = max(took, 0.9 * self.pace.step_seconds)
        over, (before, step) = self.pace.over(state.global_step), self.evaluated_at
        due = over - before >= 1 / EVALUATIONS and state.global_step - step >= LEAST_STEPS_BETWEEN
        if self.pace.budget.spent() - self.logged_at >= LOG_SECONDS:
            control.should_log = True
        if over >= 1:
            control.should_training_stop = True
        if due or over >= 1:
            control.should_evaluate = control.should_save = True
            self.evaluated_at = (over, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logged_at = self.pace.budget.spent()
        event = {"step": state.global_step, "seconds": self.logged_at}
        if "loss" in (logs or {}):
            self.report(event | {"loss": logs["loss"]})
        elif "eval_mean_iou" in (logs or {}):
            # The log is written while the evaluation still goes on, so that the speed is that of the one before.
            self.report(event | {"mean_iou": logs["eval_mean_iou"], "image_seconds": self.pace.image_seconds})


class ProgressLine:
    """One line on how a run goes: rewritten on a terminal, elsewhere printed at evaluations and every half minute.

    Args:
        budget: Budget of the run.
        every_seconds: Between lines that no evaluation asks for, where there is no terminal.
    """

    def __init__(self, budget: Budget, every_seconds: float = 30.0):
        self.budget = budget
        self.every_seconds = every_seconds
        self.printed = -math.inf
        self.loss: float | None = None
        self.mean_iou: float | None = None
        self.best = 0.0

    def show(self, stage: str, event: dict, seconds_left: float) -> None:
        """Take notice of an event of `PacedTrainer`."""
        self.loss = event.get("loss", self.loss)
        if "mean_iou" in event:
            self.mean_iou = event["mean_iou"]
            self.best = max(self.best, event["mean_iou"])
        terminal, now = sys.stdout.isatty(), self.budget.spent()
        if not terminal and "mean_iou" not in event and now - self.printed < self.every_seconds:
            return
        self.printed = now
        line = self.text(stage, event["step"], seconds_left)
        print(f"\r{line:100}" if terminal else line, end="" if terminal else "\n", flush=True)

    def end(self) -> None:
        """Leave a line that was rewritten as it is."""
        if sys.stdout.isatty():
            print()

    def text(self, stage: str, step: int, seconds_left: float) -> str:
        """Return the line: stage, step, time left, the last loss, and the last and best validation mIoU in percent."""
        parts = [f"{stage}, step {step}", f"{clock_time(seconds_left)} left"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.mean_iou is not None:
            parts.append(f"validation mIoU {100 * self.mean_iou:.2f} (best {100 * self.best:.2f})")
        return ", ".join(parts)


def clock_time(seconds: float) -> str:
    """Write minutes and seconds, "?" for what is not known."""
    if math.isnan(seconds) or math.isinf(seconds):
        return "?"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
