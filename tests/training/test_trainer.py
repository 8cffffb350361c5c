"""Optimiser groups, schedule, frozen encoder, and the whole run from the command line on a tiny backbone."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from conftest import CLASSES, FIELDS, make_trainer, tiny_model, training_arguments
from safetensors.torch import load_file, save_file

from depict_hf import DepictConfig, DepictForSemanticSegmentation, DepictImageProcessor
from depict_hf.conversion import convert_checkpoint, published_normalization
from depict_hf.inference import segment
from training import evaluate, train
from training.evaluation.metrics import MeanIoU
from training.evaluation.records import render_table
from training.optimization.checkpoints import mark_complete
from training.optimization.groups import create_optimizer, create_scheduler, parameter_groups, rate_factor
from training.recipes import camvid_dinov2_small, get_recipe

RECIPE = camvid_dinov2_small("sa").replace(
    learning_rate=0.01, scale_rate_factor=5.0, encoder_rate_factor=0.1, weight_decay=0.3
)


def test_every_trainable_parameter_is_in_one_group(decoder_type):
    model = tiny_model(decoder_type)
    groups = parameter_groups(model, RECIPE)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_rates_and_weight_decay_by_the_kind_of_parameter():
    model = tiny_model("sa")
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, RECIPE)
        for parameter in group["params"]
    }
    expected = {
        "decoder.layers.0.projection": (0.01, 0.3),
        "decoder.layers.0.norm.weight": (0.01, 0.0),
        "decoder.norm.bias": (0.01, 0.0),
        "decoder.layers.1.step_size": (0.05, 0.0),
        "decoder.class_tokens": (0.05, 0.0),
        "decoder.mask_norm.weight": (0.05, 0.0),
        "encoder.layers.0.mlp.fc1.weight": (0.001, 0.3),
        "encoder.layers.0.mlp.fc1.bias": (0.001, 0.0),
        "encoder.embeddings.cls_token": (0.001, 0.0),
        "encoder.embeddings.position_embeddings": (0.001, 0.0),
    }
    parameters = dict(model.named_parameters())
    for name, (rate, decay) in expected.items():
        assert settings[id(parameters[name])] == (pytest.approx(rate), decay), name


def test_frozen_parameters_are_in_no_group():
    model = tiny_model("sa")
    model.encoder.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model, RECIPE) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.decoder.parameters()}


def test_polynomial_schedule_is_the_published_one():
    """lr = (base - min) (1 - step / total)^0.9 + min, from the first step on."""
    recipe = RECIPE.replace(
        optimizer="sgd", schedule="polynomial", final_learning_rate=1e-5, warmup_steps=0, scale_rate_factor=1.0
    )
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = create_optimizer([{"params": [parameter]}], recipe)
    scheduler = create_scheduler(optimizer, recipe, num_training_steps=12)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [(0.01 - 1e-5) * (1 - step / 12) ** 0.9 + 1e-5 for step in range(13)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert {key: optimizer.defaults[key] for key in ("momentum", "nesterov", "weight_decay", "dampening")} == {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0,
        "dampening": 0,
    }


@pytest.mark.parametrize("name", ["sa_deit_distilled", "ca_vit", "segmenter_linear"])
def test_sgd_steps_are_those_of_the_published_code(name):
    """Ten steps of the published optimiser and scheduler on one batch: rate before each step, and loss."""
    folder = Path(__file__).parents[1] / "data" / "published" / name
    expected = load_file(folder / "expected.safetensors")
    recipe = RECIPE.replace(
        optimizer="sgd",
        schedule="polynomial",
        final_learning_rate=1e-5,
        warmup_steps=0,
        weight_decay=0.0,
        scale_rate_factor=1.0,
        encoder_rate_factor=1.0,
    )
    model = convert_checkpoint(folder)[0].train()
    optimizer = create_optimizer(parameter_groups(model, recipe), recipe)
    scheduler = create_scheduler(optimizer, recipe, num_training_steps=12)
    trace = []
    for _ in range(10):
        loss = model(expected["train.pixel_values"], labels=expected["train.labels"]).loss
        trace.append([optimizer.param_groups[0]["lr"], loss.item()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(torch.tensor(trace).double(), expected["train.trace_lr_loss"], atol=1e-4, rtol=0)


def test_cosine_schedule_after_warm_up():
    recipe = RECIPE.replace(schedule="cosine", final_learning_rate=0.001, warmup_steps=4)
    factors = [rate_factor(recipe, step, 24) for step in range(26)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[24:] == pytest.approx([0.1, 0.1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset_folder, backbone_folder):
    output = tmp_path_factory.mktemp("run") / "output"
    arguments = training_arguments(dataset_folder, backbone_folder, output)
    assert train.main(arguments) == 0
    return output


def test_run_writes_model_and_records(trained, dataset_folder, backbone_folder):
    recipe = json.loads((trained / "recipe.json").read_text())
    assert recipe["recipe"]["data"]["class_names"] == list(CLASSES)
    assert recipe["recipe"]["model"]["backbone"] == backbone_folder
    assert recipe["recipe"]["optimization"]["seed"] == 0
    [session] = recipe["sessions"]
    assert (session["resumed_from"], session["environment"]["torch"]) == (None, torch.__version__)
    record = json.loads((trained / "evaluation.json").read_text())
    assert record["num_images"] == 2
    assert record["protocol"]["size"] == {"shortest_edge": 28}
    assert list(record["per_class_iou"]) == list(CLASSES)
    present = [value for value in record["per_class_iou"].values() if value is not None]
    assert record["mean_iou"] == pytest.approx(sum(present) / len(present))
    assert render_table(record) in (trained / "README.md").read_text()


def test_frozen_encoder_keeps_its_weights_and_the_decoder_learns(trained, backbone_folder):
    model = DepictForSemanticSegmentation.from_pretrained(trained)
    backbone = transformers.Dinov2Backbone.from_pretrained(backbone_folder)
    trained_weights = model.encoder.backbone.state_dict()
    for name, weight in backbone.state_dict().items():
        assert torch.equal(trained_weights[name], weight), name
    assert (model.config.window_size, model.config.window_stride) == (28, 14)
    assert model.config.id2label == dict(enumerate(CLASSES))
    # The rates are zero neither in the warm-up's first step nor later, so every decoder parameter has moved.
    assert not torch.equal(model.decoder.mask_norm.weight, torch.ones(5))


def test_processor_prepares_as_in_training(trained):
    processor = DepictImageProcessor.from_pretrained(trained)
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert processor.image_std == pytest.approx([0.229, 0.224, 0.225])
    assert dict(processor.size)["shortest_edge"] == 28


def test_evaluate_command_repeats_the_record(trained, dataset_folder, tmp_path, capsys):
    assert evaluate.main([str(trained), dataset_folder, "--output", str(tmp_path / "new" / "record.json")]) == 0
    record = json.loads((tmp_path / "new" / "record.json").read_text())
    expected = json.loads((trained / "evaluation.json").read_text())
    for name in ("mean_iou", "per_class_iou", "overall_accuracy", "protocol", "num_images"):
        assert record[name] == expected[name]
    table = capsys.readouterr().out
    assert f"mean              {100 * record['mean_iou']:6.2f}" in table
    assert evaluate.main([str(trained), dataset_folder, "--split", "trian"]) == 1
    assert "split 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("windows", [[], ["window_size=none", "window_stride=none"]], ids=["windows", "whole"])
def test_evaluation_equals_segment_and_metric(dataset_folder, backbone_folder, tmp_path, windows):
    """Inputs of 84 x 126 pixels, a grid of 6 x 9 patches, labels of 32 x 48."""
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, "size=84", *windows)
    results = trainer.evaluate()
    metric = MeanIoU(5)
    model = trainer.model.eval()
    for sample in trainer.eval_dataset.samples:
        photo = sample["image"].permute(1, 2, 0).numpy()
        metric.add_batch(predictions=segment(model, trainer.processing_class, [photo]), references=[sample["labels"]])
    expected = metric.compute()
    assert results["eval_mean_iou"] == pytest.approx(expected["mean_iou"])
    assert results["eval_overall_accuracy"] == pytest.approx(expected["overall_accuracy"])
    assert results["eval_iou_car"] == pytest.approx(expected["per_category_iou"][3])


def test_validation_on_cached_features_is_that_of_the_whole_model(dataset_folder, backbone_folder, tmp_path):
    """Inputs of 90 x 135 pixels, whose grid of 7 x 10 patches also covers padding."""
    fields = ["size=90", "window_size=none", "window_stride=none"]
    whole = make_trainer(dataset_folder, backbone_folder, tmp_path / "whole", *fields)
    cached = make_trainer(dataset_folder, backbone_folder, tmp_path / "cached", *fields, "cache_features=true")
    expected = whole.evaluate()
    assert cached.evaluate()["eval_overall_accuracy"] == pytest.approx(expected["eval_overall_accuracy"], abs=1e-2)
    features = cached.eval_dataset[0]
    logits = cached.model(features["features"][None], input_size=features["input_size"][None]).logits
    torch.testing.assert_close(
        logits, whole.model.eval()(whole.eval_dataset[0]["pixel_values"][None]).logits, atol=2e-2, rtol=0
    )


def test_a_run_on_cached_features_saves_the_whole_model(dataset_folder, backbone_folder, tmp_path):
    fields = ["window_size=none", "window_stride=none", "cache_features=true"]
    assert train.main(training_arguments(dataset_folder, backbone_folder, tmp_path, *fields)) == 0
    model = DepictForSemanticSegmentation.from_pretrained(tmp_path)
    backbone = transformers.Dinov2Backbone.from_pretrained(backbone_folder)
    for name, weight in backbone.state_dict().items():
        assert torch.equal(model.encoder.backbone.state_dict()[name], weight), name
    checkpoint = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(checkpoint) == {name for name in model.state_dict() if name.startswith("decoder.")}
    for name, weight in checkpoint.items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert not torch.equal(model.decoder.mask_norm.weight, torch.ones(5))


def test_a_row_of_the_paper_trains_from_timm_weights(dataset_folder, tmp_path):
    """ViT-Ti/16 on squares of 32 pixels: the encoder starts from the file, and learns; the stride is the final one."""
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_384", pretrained=False).state_dict()
    save_file(source, tmp_path / "timm.safetensors")
    fields = [each for each in FIELDS if not each.startswith(("window_stride", "cache_features", "warmup"))]
    fields = [each.replace("28", "32") for each in fields]
    fields += ["reduce_labels=false", "window_stride=32", "final_window_stride=16", "final_size=36"]
    recipe = get_recipe("ade20k_vit_tiny_sa").override([*fields, f"backbone={tmp_path / 'timm.safetensors'}"])
    model = train.build_model(recipe)
    assert torch.equal(model.encoder.layers[11].mlp.fc2.weight, source["blocks.11.mlp.fc2.weight"])
    assert model.encoder.layers[11].drop_path.p == pytest.approx(0.1)

    output = tmp_path / "output"
    arguments = ["ade20k_vit_tiny_sa", dataset_folder, str(output), "--backbone", str(tmp_path / "timm.safetensors")]
    assert train.main([*arguments, *fields]) == 0
    trained = DepictForSemanticSegmentation.from_pretrained(output)
    assert not torch.equal(trained.encoder.layers[11].mlp.fc2.weight, source["blocks.11.mlp.fc2.weight"])
    assert (trained.config.window_size, trained.config.window_stride) == (32, 16)
    # The longer side is bounded as in the paper, at 4 times the shorter one.
    assert dict(DepictImageProcessor.from_pretrained(output).size) == {"shortest_edge": 36, "longest_edge": 144}


@pytest.mark.parametrize(
    ("row", "window_size", "window_stride", "size"),
    [
        *[(f"ade20k_vit_{size}", 512, 480, (512, 2048)) for size in ("tiny", "small", "base")],
        ("ade20k_vit_large_640", 640, 608, (512, 2048)),  # trained on 640, read at 512
        ("pascal_context_vit_large", 480, 448, (520, 4160)),
        ("cityscapes_vit_large", 768, 736, (1024, 2048)),
    ],
)
@pytest.mark.parametrize("decoder_type", ["sa", "ca", "mask_transformer"])
def test_trained_rows_of_the_paper_carry_its_protocol(tmp_path, row, window_size, window_stride, size, decoder_type):
    """segm/eval/miou.py, segm/config.yml and segm/data/config/*.py in rstrudel/segmenter@20d1bfa."""
    recipe = get_recipe(f"{row}_{decoder_type}")
    model = tiny_model(window_size=recipe.evaluation.window_size, window_stride=recipe.evaluation.window_stride)
    trainer = SimpleNamespace(
        finish=lambda: None, is_world_process_zero=lambda: True, processing_class=train.build_image_processor(recipe)
    )
    train.save_trained(recipe, trainer, model, tmp_path)
    config = DepictConfig.from_pretrained(tmp_path)
    image_processor = DepictImageProcessor.from_pretrained(tmp_path)
    assert (config.window_size, config.window_stride) == (window_size, window_stride)
    assert dict(image_processor.size) == dict(zip(("shortest_edge", "longest_edge"), size, strict=True))
    assert list(image_processor.image_mean) == list(image_processor.image_std) == published_normalization("vit")[0]


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_encoder_runs_in_evaluation_mode(dataset_folder, backbone_folder, tmp_path, frozen):
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, f"freeze_encoder={frozen}")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer.current_gradient_accumulation_steps = 1
    losses = set()
    for trainer.state.global_step in range(4):
        losses.add(float(trainer.training_step(trainer.model, batch)))
    assert (len(losses) == 1) == frozen  # drop path makes every step differ
    assert trainer.model.decoder.training
    assert all(
        (parameter.grad is None) == frozen for parameter in trainer.model.encoder.backbone.layernorm.parameters()
    )


def test_a_finished_run_is_replaced_only_if_that_is_asked_for(
    trained, dataset_folder, backbone_folder, tmp_path, capsys
):
    """Also where its checkpoints are gone. Fails if another run's checkpoint stays, from which --resume would go on."""
    output = tmp_path / "output"
    shutil.copytree(trained, output, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    arguments = training_arguments(dataset_folder, backbone_folder, output)
    assert train.main(arguments) == 1
    assert "holds a trained model; pass --resume to continue its run, --overwrite to replace" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / "checkpoint-99").mkdir()
    mark_complete(output / "checkpoint-99")
    assert train.main([*arguments, "epochs=1", "--overwrite"]) == 0
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (output / "model.safetensors").stat().st_mtime_ns > before["model.safetensors"]
    with pytest.raises(SystemExit):
        train.main([*arguments, "--overwrite", "--resume"])


def test_resume_ends_with_the_same_weights(trained, dataset_folder, backbone_folder, tmp_path, capsys):
    """A run stopped after its first epoch and resumed equals one that was not stopped."""

    class StopAfterFirstEpoch(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    output = tmp_path / "output"
    trainer = make_trainer(dataset_folder, backbone_folder, output)
    trainer.add_callback(StopAfterFirstEpoch)
    trainer.train()
    arguments = training_arguments(dataset_folder, backbone_folder, output)
    assert train.main(arguments) == 1
    assert "pass --resume" in capsys.readouterr().err
    written = (output / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    assert train.main([*arguments, "--resume"]) == 0
    assert (output / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == written  # not trained from scratch
    weights, expected = (
        DepictForSemanticSegmentation.from_pretrained(folder).state_dict() for folder in (output, trained)
    )
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: "camvid"}, "Unknown recipe 'camvid'; did you mean 'camvid_dinov2_small_sa'"),
        ({2: "epoch=3"}, "Unknown recipe field 'epoch'"),
        ({1: "no/such/folder"}, "no/such/folder"),
        ({2: "validation_split=val"}, "split 'val', needed one of those in the dataset: train, validation, test"),
        ({2: "batch_size=6"}, "5 training images, needed at least one batch of 6"),
    ],
)
def test_command_line_refuses(changed, message, dataset_folder, backbone_folder, tmp_path, capsys):
    recipe, dataset, field = (
        changed.get(position, default)
        for position, default in enumerate(("camvid_dinov2_small_sa", dataset_folder, "epochs=1"))
    )
    arguments = [recipe, dataset, str(tmp_path / "output"), "--backbone", backbone_folder, *FIELDS, field]
    assert train.main(arguments) == 1
    assert message in capsys.readouterr().err
