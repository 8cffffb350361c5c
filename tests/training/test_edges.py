"""Where training ends, stops, is divided, continues or is refused in unusual ways."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import make_trainer, needs_fake_cuda, tiny_config, training_arguments
from PIL import Image
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from depict_hf import DepictForSemanticSegmentation
from depict_hf.hub import UploadError, prepared
from depict_hf.hub import folder as hub_folder
from training import train
from training.data import digest
from training.optimization import RecipeLoss, SegmentationTrainer
from training.optimization.stochastic_depth import share_stochastic_depth
from training.recipe import resolve_precision
from training.recipes import camvid_dinov2_small


def run(dataset, backbone, output, *fields, resume=False):
    arguments = training_arguments(dataset, backbone, output, "report_to=none", "sample_pictures=0", *fields)
    return train.main([*arguments, *(["--resume"] if resume else [])])


@pytest.fixture
def validation_of_each_step(monkeypatch):
    """Has evaluation report a given mIoU at each optimiser step."""

    def set_values(values: dict[int, float]) -> None:
        evaluation_loop = SegmentationTrainer.evaluation_loop

        def report(self, *args, **kwargs):
            output = evaluation_loop(self, *args, **kwargs)
            output.metrics["eval_mean_iou"] = values[self.state.global_step]
            return output

        monkeypatch.setattr(SegmentationTrainer, "evaluation_loop", report)

    return set_values


def test_steps_and_their_images_do_not_depend_on_the_passes(dataset_folder, backbone_folder, tmp_path):
    """Five images in steps of four: the fifth makes no step of its own, however many passes a step has."""
    steps = []
    for passes in (1, 2, 4):
        fields = ["batch_size=4", f"accumulation_steps={passes}", "epochs=3"]
        trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, *fields)
        loader = trainer.get_train_dataloader()
        counts = trainer.set_initial_training_values(trainer.args, loader)
        assert (counts[1], counts[-1]) == (1, 3)
        steps.append(torch.cat([batch["labels"] for batch in loader]))
    assert len(steps[0]) == 4
    assert all(torch.equal(each, steps[0]) for each in steps)


def test_a_compiled_model_keeps_its_frozen_encoder_in_evaluation_mode(dataset_folder, backbone_folder, tmp_path):
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, "freeze_encoder=true")
    compiled = torch.compile(trainer.model, backend="eager")
    batch = next(iter(trainer.get_train_dataloader()))
    compiled.train()
    trainer.compute_loss(compiled, batch)
    assert not any(module.training for module in trainer.model.encoder.modules())
    assert all(module.training for module in trainer.model.decoder.modules())


@needs_fake_cuda
@pytest.mark.parametrize(
    "loss", [None, RecipeLoss(torch.rand(5), focal_gamma=1.0, dice_weight=0.5)], ids=["own", "all"]
)
@pytest.mark.parametrize("decoder_type", ["sa", "ca", "cbsa", "mask_transformer", "linear"])
def test_a_training_step_stays_on_the_accelerator(decoder_type, loss, training, monkeypatch):
    """From bytes to the loss, which computes its gradient, too.

    Fake CUDA tensors raise where devices mix and where a value is read back to the host.
    """
    trainer = training
    trainer.loss = copy.deepcopy(loss)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    trainer.current_gradient_accumulation_steps = 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Drawing from a truncated normal distribution ends when values that are read say so.
        with torch.device("cuda"), no_init_weights():
            model = DepictForSemanticSegmentation(tiny_config(decoder_type, drop_path_rate=0.5)).train()
        trainer.stochastic_depth = share_stochastic_depth(model)
        batch = {
            "pixel_values": torch.zeros(2, 3, 32, 48, dtype=torch.uint8, device="cuda"),
            "labels": torch.zeros(2, 32, 48, dtype=torch.uint8, device="cuda"),
            "input_size": torch.full((2, 2), 32, device="cuda"),
        }
        batches, weight = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        value = trainer.compute_loss(model, batches[0], num_items_in_batch=weight)
    assert value.device.type == weight.device.type == "cuda"
    assert value.requires_grad


@pytest.fixture
def training(dataset_folder, backbone_folder, tmp_path):
    """A trainer on the CPU, of a run that has not begun."""
    return make_trainer(dataset_folder, backbone_folder, tmp_path)


def test_workers_change_nothing(dataset_folder, backbone_folder, tmp_path):
    """They stay from epoch to epoch."""
    weights = []
    for workers in ("0", "1"):
        fields = ["epochs=3", "evaluate_every_epochs=3", f"num_workers={workers}"]
        trainer = make_trainer(dataset_folder, backbone_folder, tmp_path / workers, *fields)
        trainer.train()
        weights.append({name: each.clone() for name, each in trainer.model.state_dict().items()})
    assert trainer.callback_handler.train_dataloader.persistent_workers
    assert all(torch.equal(weights[1][name], each) for name, each in weights[0].items())


def test_only_public_methods_of_trainer_are_overridden():
    own = {name for name in vars(SegmentationTrainer) if hasattr(transformers.Trainer, name)}
    private = {name for name in own if name.startswith("_") and not name.startswith("__")}
    assert private == {"_load_from_checkpoint", "_save_checkpoint"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["cache_features=true", "gradient_checkpointing=true"], "gradient_checkpointing with cache_features"),
        ([f"class_names={','.join(map(str, range(256)))}"], "256 class_names, needed at most 255"),
        (["batch_size=3", "accumulation_steps=2"], "batch_size=3 for 1 processes with accumulation_steps=2"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_anything_is_read(fields, message, tmp_path, capsys):
    assert train.main(["camvid_dinov2_small_sa", "no data", str(tmp_path), *fields]) == 1
    assert message in capsys.readouterr().err


def test_launches_that_cannot_work_are_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    arguments = ["camvid_dinov2_small_sa", "no data", str(tmp_path), "cache_features=false"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(arguments) == 1
    assert "batch_size=8 for 3 processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train.main(arguments) == 1
    assert "accelerate launch --use_fsdp --fsdp_version 2 ..." in capsys.readouterr().err
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert train.main([*arguments, "keep_best=true", "average_decay=0.9"]) == 1
    assert "average_decay and keep_best for a model that the processes share" in capsys.readouterr().err
    assert train.main(arguments) == 1
    assert "no data" in capsys.readouterr().err  # which is read only now


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_training_before_its_step(
    value,
    dataset_folder,
    backbone_folder,
    tmp_path,
    monkeypatch,
    capsys,
):
    compute_loss = SegmentationTrainer.compute_loss

    def spoil(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * value if self.state.global_step == 3 else loss

    monkeypatch.setattr(SegmentationTrainer, "compute_loss", spoil)
    assert run(dataset_folder, backbone_folder, tmp_path, "save_every_steps=1", "epochs=3") == 1
    message = capsys.readouterr().err
    assert f"loss of optimiser step 4 is {value}" in message
    assert f"the weights of step 3 are in {tmp_path}/checkpoint-3" in message
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.isfinite(each).all() for each in weights.values())
    assert not (tmp_path / "checkpoint-4").exists()


def test_the_best_model_is_kept(dataset_folder, backbone_folder, tmp_path, validation_of_each_step):
    """Also its average, after four later checkpoints, and where the run was resumed and its folder moved."""
    validation_of_each_step({2: 0.3, 4: 0.6, 6: 0.5, 8: 0.2, 10: 0.6})
    fields = ["epochs=5", "keep_best=true", "average_decay=0.5"]
    assert run(dataset_folder, backbone_folder, tmp_path / "whole", *fields) == 0
    expected = load_file(tmp_path / "whole" / "checkpoint-4" / "average.safetensors")
    assert not torch.equal(
        expected["decoder.mask_norm.weight"],
        load_file(tmp_path / "whole" / "checkpoint-10" / "average.safetensors")["decoder.mask_norm.weight"],
    )
    trained = DepictForSemanticSegmentation.from_pretrained(tmp_path / "whole").state_dict()
    for name, weight in expected.items():
        assert torch.equal(trained[name], weight), name

    # As if it had been killed after its third evaluation and moved.
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "whole", moved)
    shutil.rmtree(moved / "checkpoint-10")
    (moved / "model.safetensors").unlink()
    assert run(dataset_folder, backbone_folder, moved, *fields, resume=True) == 0
    again = DepictForSemanticSegmentation.from_pretrained(moved).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in trained.items())


def test_training_ends_early_and_stays_ended(dataset_folder, backbone_folder, tmp_path, validation_of_each_step):
    """Two evaluations in a row without a gain; a run resumed before or after that ends at the same step."""
    validation_of_each_step({2: 0.3, 4: 0.6, 6: 0.6, 8: 0.5, 10: 0.7, 12: 0.8})
    fields = ["epochs=6", "early_stopping=2"]
    assert run(dataset_folder, backbone_folder, tmp_path, *fields) == 0
    trained = load_file(tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]
    for _ in range(2):  # after its end, then from the checkpoint before
        (tmp_path / "model.safetensors").unlink()
        assert run(dataset_folder, backbone_folder, tmp_path, *fields, resume=True) == 0
        assert not (tmp_path / "checkpoint-10").exists()
        weights = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(weights[name], each) for name, each in trained.items())
        shutil.rmtree(tmp_path / "checkpoint-8")


@pytest.mark.parametrize(("native", "resolved"), [(torch.bfloat16, "bf16"), (torch.float32, "float32")])
def test_precision_by_what_the_processor_has(native, resolved, monkeypatch):
    monkeypatch.setattr("training.recipe.native_dtype", lambda device: native)
    recipe = camvid_dinov2_small("sa").replace(precision="auto")
    assert resolve_precision(recipe).hardware.precision == resolved
    assert resolve_precision(recipe.replace(precision="float32")).hardware.precision == "float32"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is refused on CPUs only")
def test_fp16_is_refused_on_a_cpu(tmp_path, capsys):
    assert train.main(["camvid_dinov2_small_sa", "no data", str(tmp_path), "precision=fp16"]) == 1
    assert "precision=fp16 on a CPU" in capsys.readouterr().err


def test_fp16_scales_gradients_on_accelerators(monkeypatch, tmp_path):
    """By what `TrainingArguments` makes of it; that steps are right, only a GPU can show (tests/gpu)."""
    arguments = []
    monkeypatch.setattr(
        train, "TrainingArguments", lambda **fields: arguments.append(fields) or SimpleNamespace(n_gpu=1, world_size=1)
    )
    for precision in ("float32", "bf16", "fp16"):
        train.training_arguments(camvid_dinov2_small("sa").replace(precision=precision), tmp_path, 367)
    assert [(each["bf16"], each["fp16"]) for each in arguments] == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(("tf32", "precision"), [(False, "highest"), (True, "high")])
def test_tf32_is_used_where_it_was_asked_for_only(tf32, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    before = torch.get_float32_matmul_precision()
    try:
        train.set_exactness(tf32)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_other_data_do_not_continue_a_run(dataset_folder, backbone_folder, tmp_path, capsys):
    """The same data elsewhere do."""
    assert run(dataset_folder, backbone_folder, tmp_path / "output", "epochs=1") == 0
    shutil.copytree(dataset_folder, tmp_path / "copy")
    assert run(str(tmp_path / "copy"), backbone_folder, tmp_path / "output", "epochs=1", resume=True) == 0
    data = tmp_path / "copy" / "data"
    shutil.copy(data / "validation-00000-of-00001.parquet", data / "train-00000-of-00001.parquet")
    capsys.readouterr()
    assert run(str(tmp_path / "copy"), backbone_folder, tmp_path / "output", "epochs=1", resume=True) == 1
    message = capsys.readouterr().err
    assert "data={'train': {'images': 3" in message and "there {'train': {'images': 5" in message
    record = json.loads((tmp_path / "output" / "recipe.json").read_text())
    assert record["processes"] == 1


def test_a_digest_is_of_contents_and_their_order(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "here" / name)
        shutil.copy(tmp_path / "here" / name, tmp_path / "there")
        rows.append({"image": {"path": str(tmp_path / "here" / name), "bytes": None}, "label": None})
    moved = [{"image": {"path": each["image"]["path"].replace("here", "there"), "bytes": None}} for each in rows]
    stored = [
        {"image": {"path": path, "bytes": (tmp_path / "here" / path).read_bytes()}} for path in ("a.png", "b.png")
    ]
    without_labels = [{"image": each["image"]} for each in rows]
    assert digest(moved) == digest(stored) == digest(without_labels) != digest(rows)
    assert digest(reversed(moved)) != digest(moved)
    changed = bytearray(stored[0]["image"]["bytes"])
    changed[60] ^= 1
    assert digest([{"image": {"path": "a.png", "bytes": bytes(changed)}}, stored[1]]) != digest(stored)


@pytest.mark.parametrize("own_card", [None, "my own card"])
def test_the_trained_model_is_uploaded_with_a_card_that_its_records_back(
    dataset_folder, backbone_folder, tmp_path, monkeypatch, own_card
):
    calls = []
    monkeypatch.setattr(train, "claim", lambda name: calls.append(("claim", name)))

    def push(folder, repository):
        with prepared(folder) as ready:
            calls.append(("push", repository, set(ready.files), ready.card))
        return "https://huggingface.co/me/model/commit/1"

    monkeypatch.setattr(train, "push", push)
    if own_card:
        monkeypatch.setattr(hub_folder, "_check_loading", lambda *given: None)  # which the other case does
        (tmp_path / "README.md").write_text(own_card)
    assert run(dataset_folder, backbone_folder, tmp_path, "epochs=1", "push_to_hub=me/model") == 0
    assert calls[0] == ("claim", "me/model")
    kind, name, files, card = calls[1]
    assert (kind, name, len(calls)) == ("push", "me/model", 2)
    needed = {"model.safetensors", "config.json", "preprocessor_config.json", "recipe.json", "evaluation.json"}
    assert needed | {"README.md", "modeling_depict.py"} <= files
    assert not [each for each in files if each.startswith(("checkpoint", "features", "samples", "deleted"))]
    assert card == (tmp_path / "README.md").read_text()
    assert card == own_card if own_card else "model-index:" in card


def test_a_hub_that_refuses_ends_the_run_before_anything_is_read(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise UploadError("me/model was not uploaded: log in")

    monkeypatch.setattr(train, "claim", refuse)
    assert train.main(["camvid_dinov2_small_sa", "no data", str(tmp_path), "push_to_hub=me/model"]) == 1
    assert capsys.readouterr().err == "error: me/model was not uploaded: log in\n"
