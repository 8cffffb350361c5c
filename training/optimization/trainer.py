"""A thin `Trainer` for recipes: their optimiser and loss, frozen layers, mIoU on full-resolution label maps."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from transformers import PreTrainedModel, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.windows import CoarseScores, label_map

from ..data import (
    Collate,
    EpochSampler,
    Normalization,
    Reported,
    StreamingDataset,
    check_batch,
)
from ..evaluation import MeanIoU, sample_picture, spread, write_picture
from ..recipe import Recipe
from ..stopping import Stopped, deferred, received, survive
from .adapters import has_adapters, merge_adapters
from .averaging import WeightAverage
from .callbacks import EarlyStopping, EpochSetter, FiniteLoss, StopAtStep
from .checkpoints import REMEDY, CheckpointKeeper, changed_file, discard_unfinished, last_good
from .groups import create_optimizer, create_scheduler, parameter_groups
from .losses import RecipeLoss
from .sharding import check_sharding
from .stochastic_depth import draw, share_stochastic_depth

__all__ = ["SegmentationTrainer", "check_sharding"]
_NAMED_IMAGES = 20


class SegmentationTrainer(transformers.Trainer):
    """Trains a `DepictForSemanticSegmentation` by a recipe.

    `Trainer`'s public methods are overridden; beside the others it is said why none of those would do.

    Args:
        recipe: Decides optimiser, rates, schedule, average and pictures; the arguments of `Trainer` for those, and its
            rotation of checkpoints, are not used.
        loss: Loss of logits and labels, in training; the model's own cross-entropy if None.
        kwargs: As for `Trainer`. Training items are those of `TrainingDataset`, bytes that are normalised on the
            device; evaluation items may differ in size, and have labels of any resolution. Instead of `pixel_values`
            there may be `features` for a `training.data.DecoderOnFeatures`.

    Raises:
        ValueError: If the recipe asks for what cannot be done with FSDP.
    """

    # Attributes of `Trainer`, which the checker does not see.
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, recipe: Recipe, loss: RecipeLoss | None = None, **kwargs):
        super().__init__(**kwargs)
        if self.is_fsdp_enabled:
            check_sharding(recipe, self.accelerator.state.fsdp_plugin.fsdp_version)
        self.recipe = recipe
        self.loss = loss
        self.normalize = Normalization(recipe.data.image_mean, recipe.data.image_std)
        self.output = Path(self.args.output_dir)
        self.train_sampler = EpochSampler(
            len(self.train_dataset), recipe.optimization.seed, recipe.optimization.batch_size
        )
        self.add_callback(EpochSetter(self.train_dataset, self.train_sampler))
        self.stochastic_depth = share_stochastic_depth(self.model)
        self.passes = 0
        self.step_loss: Tensor | float = 0.0
        self.step_names: list[str] = []
        self.add_callback(FiniteLoss(self.check_loss))
        self.average = (
            WeightAverage(self.model, recipe.optimization.average_decay) if recipe.optimization.average_decay else None
        )
        if self.average:
            self.add_callback(self.average)
        if recipe.evaluation.early_stopping:
            self.add_callback(EarlyStopping(recipe.evaluation.early_stopping))
        self.add_callback(
            CheckpointKeeper(self.output, self.accelerator, self.average, recipe.hardware.save_every_steps)
        )
        self.stop = StopAtStep(self.accelerator)
        self.add_callback(self.stop)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput | None:
        """Train as `Trainer.train` does; a run that had ended by itself before its last epoch is not trained further.

        Returns:
            None where nothing was trained.

        Raises:
            FloatingPointError: If the loss, or the weights of a checkpoint, are not finite.
            OSError: If a checkpoint cannot be written.
            Stopped: If a signal came; the step in which it did is saved.
            ValueError: If an image cannot be read.
        """
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if self.has_ended(state):
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return None
        with deferred():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        number = self.stop.number or received()
        if number is not None:
            raise Stopped(number, last_good(self.output))
        return output

    def has_ended(self, state: TrainerState) -> bool:
        """Whether the run that a checkpoint's state belongs to had ended by itself there."""
        return 0 < self.recipe.evaluation.early_stopping <= EarlyStopping.evaluations_without_gain(state)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.recipe)
            self.optimizer = create_optimizer(groups, self.recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            self.lr_scheduler = create_scheduler(optimizer or self.optimizer, self.recipe, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the batches of one step in this process, and the weight of all labels of the step, in all of them."""
        batches, _ = super().get_batch_samples(map(check_batch, epoch_iterator), num_batches, device)
        self.passes = 0
        self.step_loss = 0.0
        self.step_names = [name for batch in batches for name in batch.pop("name", ())]
        weight = sum((self._label_weight(batch["labels"]) for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(weight.to(device))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Do as `Trainer.training_step` does; the loss returned is the mean over the processes, for all the same."""
        loss = self.accelerator.reduce(super().training_step(model, inputs, num_items_in_batch), reduction="mean")
        self.step_loss = self.step_loss + loss
        return loss

    def check_loss(self) -> None:
        """Look at the loss of the optimiser step that is about to be made.

        Raises:
            FloatingPointError: If it is not finite; the weights are those before the step.
        """
        loss = float(self.step_loss)
        if math.isfinite(loss):
            return
        names = self.step_names
        if not names:  # of no stream
            samples = cast(Any, self.train_dataset).samples
            names = [samples.name(index) for index in self.train_sampler.of_step(self.state.global_step)]
        more = f" and {len(names) - _NAMED_IMAGES} more" if len(names) > _NAMED_IMAGES else ""
        raise FloatingPointError(
            f"The loss of optimiser step {self.state.global_step + 1} is {loss}, needed a finite number; the step was "
            f"not made, and {last_good(self.output)}. Its images are {', '.join(names[:_NAMED_IMAGES])}{more}. {REMEDY}"
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Return the loss of one forward pass; in training, its part of the mean over all labelled pixels of the step.

        Args:
            num_items_in_batch: Weight of the labels of the whole step; of this pass alone if None.
        """
        inputs = self._as_model_inputs(inputs)
        # `Trainer` has just put the whole model in training mode; frozen features must not be random.
        for module in self.accelerator.unwrap_model(model, keep_torch_compile=False).children():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        self._draw_stochastic_depth(len(inputs["labels"]))
        label_weight = None
        if num_items_in_batch is not None:
            # `Trainer` divides what is returned by the passes of a step, and averages gradients over the processes.
            label_weight = num_items_in_batch / (self.args.world_size * self.current_gradient_accumulation_steps)
        if self.loss is None:
            outputs = model(**inputs)
            loss = outputs.loss
            if label_weight is not None:
                loss = loss * self._label_weight(inputs["labels"]) / label_weight.clamp(min=1e-6)
        else:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = self.loss(outputs.logits, inputs["labels"], label_weight)
        return (loss, outputs) if return_outputs else loss

    def _as_model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn squares of bytes into normalised images; other inputs are the model's already."""
        if "pixel_values" not in inputs or inputs["pixel_values"].dtype != torch.uint8:
            return inputs
        inputs = dict(inputs)
        inputs["pixel_values"] = self.normalize(inputs["pixel_values"], inputs.pop("input_size"))
        return inputs

    def _draw_stochastic_depth(self, num_images: int) -> None:
        """Decide which branches the next pass drops, by the place that its images have in the whole step."""
        first = (self.passes * self.args.world_size + self.args.process_index) * num_images
        positions = range(first, first + num_images)
        draw(self.stochastic_depth, self.recipe.optimization.seed, self.state.global_step, positions, self.args.device)
        self.passes += 1

    def _label_weight(self, labels: Tensor) -> Tensor:
        return (labels != IGNORE_LABEL).sum().float() if self.loss is None else self.loss.label_weight(labels)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a model folder; with adapters, which no model folder has, their and all other weights as they are."""
        if not has_adapters(self.model):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            weights = {name: weight.contiguous() for name, weight in self.model.state_dict().items()}
            save_file(weights, folder / SAFE_WEIGHTS_NAME)

    # Not public, but nothing else is around all that a checkpoint consists of.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, or leave no part of it.

        Raises:
            OSError: If it cannot be written, as the disk is full; the message names the last whole one.
        """
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # of which safetensors and torch make others
            if self.is_world_process_zero():
                discard_unfinished(self.output)
            reason = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
            raise OSError(
                f"The checkpoint of optimiser step {self.state.global_step} cannot be written to {self.output} "
                f"({reason}); {last_good(self.output)}. Make room there, and go on with --resume."
            ) from error

    # Not public, but `Trainer.train` calls nothing else to load a checkpoint, before it prepares the model.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load every weight of the checkpoint, and their average if the recipe has one.

        `Trainer` passes over weights whose names in the file are not the module's: those that `save_pretrained` gives
        their historical names, such as DINOv2's queries, keys and values.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not has_adapters(model):
            weights = type(model).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict()
        else:
            weights = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        model.load_state_dict(weights)
        if self.average:
            self.average.load(Path(resume_from_checkpoint))

    def finish(self) -> dict[str, Tensor] | None:
        """Give the model the weights to be used: best or last, averaged, adapters merged into the layers they adapt.

        Returns:
            All weights, in whole shapes, of a model that the processes share (FSDP), in the main process; else None.

        Raises:
            ValueError: If the checkpoint with the best weights was damaged.
        """
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        if self.recipe.evaluation.keep_best and self.state.best_global_step:
            # By the number of the step: the folder of a run may have been moved since. `load_best_model_at_end` would
            # pass over weights as `_load_from_checkpoint` says, and over the average.
            best = self.output / f"checkpoint-{self.state.best_global_step}"
            if (changed := changed_file(best)) is not None:
                raise ValueError(
                    f"{best}, which holds the best weights, is damaged ({changed} is not what was written); put it "
                    "back from a copy, or pass keep_best=false in a new run."
                )
            self._load_from_checkpoint(str(best))
        if self.average:
            self.average.copy_to_model()
        if has_adapters(self.model):
            merge_adapters(self.model)
        return None

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamingDataset):
            return self.train_dataset.loader(self.args.dataloader_num_workers, self.args.dataloader_pin_memory)
        loader = DataLoader(
            Reported(self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            sampler=self.train_sampler,
            drop_last=True,
            collate_fn=Collate(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_num_workers > 0,
            worker_init_fn=survive,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Load one image at a time; every process reads its own share, none twice.

        Processes that shard a model (FSDP) must make the same passes, so that each of them reads all images.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, num_processes = (0, 1) if self.is_fsdp_enabled else (self.args.process_index, self.args.world_size)
        share = Subset(Reported(dataset), range(rank, len(dataset), num_processes))
        return DataLoader(
            share,
            batch_size=1,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            collate_fn=Collate(default_collate),
            worker_init_fn=survive,
        )

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Count the confusion of every image at the resolution of its label map; no logits are kept.

        Of a few images, evenly spaced, a picture is written.

        Returns:
            Metrics `{prefix}_mean_iou`, `{prefix}_mean_accuracy`, `{prefix}_overall_accuracy`, and
            `{prefix}_iou_{class name}` for classes that occur; all fractions.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        metric = MeanIoU(model.config.num_labels, ignore_index=IGNORE_LABEL)
        num_images = torch.zeros((), dtype=torch.long, device=self.args.device)
        share = cast(Subset, dataloader.dataset)
        shown = []
        if self.is_world_process_zero() and self.recipe.evaluation.sample_pictures:
            shown = spread(len(share), self.recipe.evaluation.sample_pictures)
        with self.average.applied() if self.average else nullcontext():
            for position, batch in enumerate(map(check_batch, dataloader)):
                input_size = {"input_size": batch.pop("input_size")} if "input_size" in batch else {}
                batch = self._prepare_inputs(batch) | input_size  # which the host needs
                labels = batch.pop("labels")
                prediction = self._predict(model, batch, labels.shape[-2:])
                metric.add_batch(predictions=prediction, references=labels)
                num_images += len(labels)
                if position in shown:
                    self._show(share, position, labels[0], prediction[0])
        metric.confusion = metric.confusion.to(self.args.device)
        if not self.is_fsdp_enabled:
            metric.confusion, num_images = (self.accelerator.reduce(each) for each in (metric.confusion, num_images))
        results = metric.compute()
        metrics = {
            f"{metric_key_prefix}_{name}": results[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")
        }
        for index, iou in enumerate(results["per_category_iou"].tolist()):
            if not math.isnan(iou):
                metrics[f"{metric_key_prefix}_iou_{model.config.id2label[index]}"] = iou
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(num_images))

    def _predict(self, model: nn.Module, inputs: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Label maps of one batch at `size`, `(batch, height, width)`."""
        with self.compute_loss_context_manager():
            logits = model(**inputs).logits
        # By way of the input's size, as in `depict_hf.inference.segment`.
        covered = tuple(inputs.get("pixel_values", logits).shape[-2:])
        views = [CoarseScores.from_windows([each], [(0, 0)], covered, covered, size) for each in logits]
        return torch.stack([label_map([view]) for view in views]).long()

    def _show(self, share: Subset, position: int, labels: Tensor, prediction: Tensor) -> None:
        """Write the picture of one image of this process's share, also to TensorBoard where that is reported to."""
        index = share.indices[position]
        samples = cast(Any, share.dataset).dataset.samples
        title = f"{Path(samples.name(index)).name} ({index}), step {self.state.global_step}"
        image = samples.read_or_blank(index)["image"]
        picture = sample_picture(image, labels, prediction, title, self.model.config.id2label)
        boards = [each for each in self.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
        writers = [each.tb_writer for each in boards if each.tb_writer is not None]
        write_picture(picture, self.output, self.state.global_step, index, writers)
