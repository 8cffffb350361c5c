"""A thin `Trainer` for recipes: their optimiser and loss, frozen layers, mIoU on full-resolution label maps."""

import math

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.trainer_utils import EvalLoopOutput

from depict_hf.windows import resize_bilinear

from .augmentation import IGNORE_INDEX
from .losses import RecipeLoss
from .metrics import MeanIoU
from .optimization import create_optimizer, create_scheduler, parameter_groups
from .recipe import Recipe
from .streaming import StreamingDataset


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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args, **kwargs):
        # `Trainer` has just put the whole model in training mode; frozen features must not be random.
        for module in self.accelerator.unwrap_model(model).children():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        if self.loss is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        return self.loss(model(**inputs).logits, labels)

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
