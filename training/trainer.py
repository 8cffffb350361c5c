"""A thin `Trainer` for recipes: optimiser groups, schedule, frozen encoder, mIoU on full-resolution label maps."""

import math

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.trainer_utils import EvalLoopOutput

from depict_hf.windows import resize_bilinear

from .augmentation import IGNORE_INDEX
from .metrics import MeanIoU
from .recipe import Recipe

SCALE_PARAMETERS = ("mask_norm.", "step_size", "class_tokens")
TOKENS = ("token", "position_embeddings", "lambda")


class SegmentationTrainer(transformers.Trainer):
    """Trains a `DepictForSemanticSegmentation` by a recipe.

    Args:
        recipe: Decides optimiser, rates and schedule; the arguments of `Trainer` for those are not used.
        kwargs: As for `Trainer`. Training items have `pixel_values` and `labels` of one size; evaluation items may
            differ in size, and have labels of any resolution. Instead of `pixel_values` there may be `features` for a
            `training.features.DecoderOnFeatures`.
    """

    def __init__(self, recipe: Recipe, **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe

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
        return super().compute_loss(model, inputs, *args, **kwargs)

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


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Groups for the optimiser: every parameter that requires a gradient exactly once, by rate and weight decay.

    Norms, biases, tokens and step sizes have no weight decay. See `Recipe` for the rates.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if name.startswith("encoder."):
            factor = recipe.encoder_rate_factor
        elif any(part in name for part in SCALE_PARAMETERS):
            factor = recipe.scale_rate_factor
        decays = parameter.ndim > 1 and not any(part in name for part in TOKENS)
        key = (recipe.learning_rate * factor, recipe.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def create_optimizer(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the groups of `parameter_groups`."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, num_training_steps: int) -> LambdaLR:
    """Schedule stepped after every optimiser step; each group keeps its share of the rate throughout."""
    return LambdaLR(optimizer, lambda step: rate_factor(recipe, step, num_training_steps))


def rate_factor(recipe: Recipe, step: int, num_training_steps: int) -> float:
    """Share of the learning rate at an optimiser step, counted from 0.

    Source:
        `PolynomialLR`, segm/optim/scheduler.py in rstrudel/segmenter@20d1bfa, for "polynomial".
    """
    if step < recipe.warmup_steps:
        return (step + 1) / (recipe.warmup_steps + 1)
    progress = (step - recipe.warmup_steps) / max(1, num_training_steps - recipe.warmup_steps)
    progress = min(progress, 1.0)
    decay = (1 - progress) ** 0.9 if recipe.schedule == "polynomial" else 0.5 * (1 + math.cos(math.pi * progress))
    final = recipe.final_learning_rate / recipe.learning_rate
    return final + (1 - final) * decay
