"""A thin `Trainer` for recipes: their optimiser and loss, frozen layers, mIoU on full-resolution label maps."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from depict_hf.windows import resize_bilinear

from .augmentation import IGNORE_INDEX
from .checkpoints import mark_complete
from .data import EpochSampler
from .losses import RecipeLoss
from .metrics import MeanIoU
from .optimization import create_optimizer, create_scheduler, parameter_groups
from .recipe import Recipe
from .streaming import StreamingDataset


class EpochSetter(transformers.TrainerCallback):
    """Tells data and sampler which epoch begins, also one that is entered in the middle.

    accelerate reaches them neither in all processes nor in all resumed epochs.
    """

    def __init__(self, dataset: Dataset, sampler: EpochSampler):
        self.dataset = dataset
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        epoch = int(state.epoch + 1e-6)  # a sum of fractions
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch)


class SegmentationTrainer(transformers.Trainer):
    """Trains a `DepictForSemanticSegmentation` by a recipe.

    Args:
        recipe: Decides optimiser, rates and schedule; the arguments of `Trainer` for those are not used.
        loss: Of logits and labels, in training; the model's own cross-entropy if None.
        kwargs: As for `Trainer`. Training items have `pixel_values` and `labels` of one size; evaluation items may
            differ in size, and have labels of any resolution. Instead of `pixel_values` there may be `features` for a
            `training.features.DecoderOnFeatures`.
    """

    def __init__(self, recipe: Recipe, loss: RecipeLoss | None = None, **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.loss = loss
        self.train_sampler = EpochSampler(len(self.train_dataset), recipe.seed)
        self.add_callback(EpochSetter(self.train_dataset, self.train_sampler))

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
        """The batches of one optimiser step in this process, and the weight of all labels of the step, in all."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        weight = sum((self._label_weight(batch["labels"]) for batch in batches), torch.zeros(()))
        return batches, self.accelerator.reduce(weight.to(device))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """The loss of one forward pass; in training, its part of the mean over all labelled pixels of the step.

        Args:
            num_items_in_batch: Weight of the labels of the whole step; of this pass alone if None.
        """
        # `Trainer` has just put the whole model in training mode; frozen features must not be random.
        for module in self.accelerator.unwrap_model(model).children():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
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

    def _label_weight(self, labels: Tensor) -> Tensor:
        return (labels != IGNORE_INDEX).sum().float() if self.loss is None else self.loss.label_weight(labels)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load every weight of the checkpoint.

        `Trainer` passes over weights whose names in the file are not the module's: those that `save_pretrained` gives
        their historical names, such as DINOv2's queries, keys and values.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel):
            weights = type(model).from_pretrained(resume_from_checkpoint, dtype=torch.float32).state_dict()
        else:
            weights = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        model.load_state_dict(weights)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamingDataset):
            return self.train_dataset.loader(self.args.dataloader_num_workers, self.args.dataloader_pin_memory)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """One image at a time; every process reads its own share, none twice."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        share = Subset(dataset, range(self.args.process_index, len(dataset), self.args.world_size))
        return DataLoader(share, batch_size=1, num_workers=self.args.dataloader_num_workers)

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

        Returns:
            Metrics `{prefix}_mean_iou`, `{prefix}_mean_accuracy`, `{prefix}_overall_accuracy`, and
            `{prefix}_iou_{class name}` for classes that occur; all fractions.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        metric = MeanIoU(model.config.num_labels, ignore_index=IGNORE_INDEX)
        num_images = torch.zeros((), dtype=torch.long, device=self.args.device)
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels")
            with self.compute_loss_context_manager():
                logits = model(**batch).logits.float()
            if "pixel_values" in batch:
                # By way of the input's size, as in `depict_hf.inference.segment`.
                logits = resize_bilinear(logits, batch["pixel_values"].shape[-2:])
            logits = resize_bilinear(logits, labels.shape[-2:])
            metric.add_batch(predictions=logits.argmax(dim=1), references=labels)
            num_images += len(logits)
        metric.confusion = self.accelerator.reduce(metric.confusion.to(self.args.device))
        num_images = int(self.accelerator.reduce(num_images))
        results = metric.compute()
        metrics = {
            f"{metric_key_prefix}_{name}": results[name] for name in ("mean_iou", "mean_accuracy", "overall_accuracy")
        }
        for index, iou in enumerate(results["per_category_iou"].tolist()):
            if not math.isnan(iou):
                metrics[f"{metric_key_prefix}_iou_{model.config.id2label[index]}"] = iou
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_images)
