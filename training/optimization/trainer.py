"""A thin `Trainer` for recipes: their optimiser and loss, frozen layers, mIoU on full-resolution label maps."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from depict_hf.configuration_depict import IGNORE_LABEL
from depict_hf.windows import resize_bilinear

from ..data import EpochSampler, StreamingDataset
from ..evaluation import MeanIoU, sample_picture, spread, write_picture
from ..recipe import Recipe
from .adapters import has_adapters, merge_adapters
from .averaging import WeightAverage
from .checkpoints import UNFINISHED, publish
from .groups import create_optimizer, create_scheduler, parameter_groups
from .losses import RecipeLoss
from .stochastic_depth import draw, share_stochastic_depth

KEPT_CHECKPOINTS = 2


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
        recipe: Decides optimiser, rates, schedule, average and pictures; the arguments of `Trainer` for those, and its
            rotation of checkpoints, are not used.
        loss: Of logits and labels, in training; the model's own cross-entropy if None.
        kwargs: As for `Trainer`. Training items have `pixel_values` and `labels` of one size; evaluation items may
            differ in size, and have labels of any resolution. Instead of `pixel_values` there may be `features` for a
            `training.features.DecoderOnFeatures`.

    Raises:
        ValueError: If the recipe asks for what cannot be done with FSDP.
    """

    def __init__(self, recipe: Recipe, loss: RecipeLoss | None = None, **kwargs):
        super().__init__(**kwargs)
        if self.is_fsdp_enabled and (
            recipe.optimization.average_decay or recipe.model.lora_rank or recipe.data.cache_features
        ):
            raise ValueError(
                "Got average_decay, lora_rank or cache_features for a model that the processes share (FSDP); leave "
                "them out, or launch without FSDP, so that every process holds the model."
            )
        self.recipe = recipe
        self.loss = loss
        self.train_sampler = EpochSampler(len(self.train_dataset), recipe.optimization.seed)
        self.add_callback(EpochSetter(self.train_dataset, self.train_sampler))
        self.stochastic_depth = share_stochastic_depth(self.model)
        self.passes = 0
        self.average = (
            WeightAverage(self.model, recipe.optimization.average_decay) if recipe.optimization.average_decay else None
        )
        if self.average:
            self.add_callback(self.average)

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
        self.passes = 0
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

    def _draw_stochastic_depth(self, num_images: int) -> None:
        """Decide which branches the next pass drops, by the place that its images have in the whole step."""
        first = (self.passes * self.args.world_size + self.args.process_index) * num_images
        positions = range(first, first + num_images)
        draw(self.stochastic_depth, self.recipe.optimization.seed, self.state.global_step, positions, self.args.device)
        self.passes += 1

    def _label_weight(self, labels: Tensor) -> Tensor:
        return (labels != IGNORE_LABEL).sum().float() if self.loss is None else self.loss.label_weight(labels)

    def _get_output_dir(self, trial) -> str:
        """Where `Trainer` writes a checkpoint, to be published when it is whole."""
        return str(Path(self.args.output_dir) / UNFINISHED)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
            if self.average:
                self.average.save(folder)
            publish(folder, Path(self.args.output_dir), KEPT_CHECKPOINTS)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A model folder; with adapters, which no model folder has, their and all other weights as they are."""
        if not has_adapters(self.model):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.model.state_dict() if state_dict is None else state_dict
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / SAFE_WEIGHTS_NAME)

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

    def _finalize_training(self, *args, **kwargs):
        # `Trainer` would add only this process's losses since the last log.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, reduction="mean")
        return super()._finalize_training(*args, **kwargs)

    def finish(self) -> dict[str, Tensor] | None:
        """Give the model the weights to be used: the averaged ones, adapters merged into the layers they adapt.

        Returns:
            Of a model that the processes share (FSDP), all weights, in the main process; None otherwise.
        """
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        if self.average:
            self.average.copy_to_model()
        if has_adapters(self.model):
            merge_adapters(self.model)
        return None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, StreamingDataset):
            return self.train_dataset.loader(self.args.dataloader_num_workers, self.args.dataloader_pin_memory)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """One image at a time; every process reads its own share, none twice.

        Processes that shard a model (FSDP) must make the same passes, so that each of them reads all images.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, num_processes = (0, 1) if self.is_fsdp_enabled else (self.args.process_index, self.args.world_size)
        share = Subset(dataset, range(rank, len(dataset), num_processes))
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

        Of a few images, evenly spaced, a picture is written.

        Returns:
            Metrics `{prefix}_mean_iou`, `{prefix}_mean_accuracy`, `{prefix}_overall_accuracy`, and
            `{prefix}_iou_{class name}` for classes that occur; all fractions.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        metric = MeanIoU(model.config.num_labels, ignore_index=IGNORE_LABEL)
        num_images = torch.zeros((), dtype=torch.long, device=self.args.device)
        shown = []
        if self.is_world_process_zero() and self.recipe.evaluation.sample_pictures:
            shown = spread(len(dataloader.dataset), self.recipe.evaluation.sample_pictures)
        with self.average.applied() if self.average else nullcontext():
            for position, batch in enumerate(dataloader):
                batch = self._prepare_inputs(batch)
                labels = batch.pop("labels")
                prediction = self._predict(model, batch, labels.shape[-2:])
                metric.add_batch(predictions=prediction, references=labels)
                num_images += len(labels)
                if position in shown:
                    self._show(dataloader.dataset, position, labels[0], prediction[0])
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
            logits = model(**inputs).logits.float()
        if "pixel_values" in inputs:
            # By way of the input's size, as in `depict_hf.inference.segment`.
            logits = resize_bilinear(logits, inputs["pixel_values"].shape[-2:])
        return resize_bilinear(logits, size).argmax(dim=1)

    def _show(self, share: Subset, position: int, labels: Tensor, prediction: Tensor) -> None:
        """Write the picture of one image of this process's share, also to TensorBoard where that is reported to."""
        index = share.indices[position]
        samples = share.dataset.samples
        title = f"{Path(samples.name(index)).name} ({index}), step {self.state.global_step}"
        picture = sample_picture(samples[index]["image"], labels, prediction, title, self.model.config.id2label)
        boards = [each for each in self.callback_handler.callbacks if isinstance(each, TensorBoardCallback)]
        writers = [each.tb_writer for each in boards if each.tb_writer is not None]
        write_picture(picture, Path(self.args.output_dir), self.state.global_step, index, writers)
