"""Options of a recipe on whole runs: average, adapters, pictures, checkpointing, compilation, where training starts."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import CLASSES, make_trainer, training_arguments
from PIL import Image
from safetensors.torch import load_file, save_file

from depict_hf import DepictForSemanticSegmentation
from depict_hf.inference import segment
from training import train
from training.evaluation.pictures import sample_picture


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def run(dataset, backbone, output, *fields, recipe="camvid_dinov2_small_sa"):
    return train.main(training_arguments(dataset, backbone, output, "report_to=none", *fields, recipe=recipe))


class Recorder(transformers.TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(weights_of(model))


def test_the_average_is_evaluated_and_becomes_the_model(dataset_folder, backbone_folder, tmp_path):
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, "average_decay=0.75", "learning_rate=0.05")
    expected = weights_of(trainer.model)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    own = weights_of(trainer.model)
    for step, weights in enumerate(recorder.weights, start=1):
        decay = (1 + step) / (10 + step)  # of the warm-up, at most 5/14
        expected = {name: decay * average + (1 - decay) * weights[name] for name, average in expected.items()}
    logged = [entry["eval_overall_accuracy"] for entry in trainer.state.log_history if "eval_mean_iou" in entry][-1]
    assert torch.equal(own["decoder.mask_norm.weight"], recorder.weights[-1]["decoder.mask_norm.weight"])
    trainer.finish()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    trainer.average = None
    assert trainer.evaluate()["eval_overall_accuracy"] == pytest.approx(logged)


def test_adapters_train_and_the_saved_model_has_none(dataset_folder, backbone_folder, tmp_path):
    assert run(dataset_folder, backbone_folder, tmp_path, "freeze_encoder=false", "lora_rank=2", "lora_alpha=4") == 0
    checkpoint = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    prefix = "encoder.backbone.encoder.layer.1.mlp.fc2"
    [prefix] = {name.partition(".lora_A")[0] for name in checkpoint if name.endswith("1.mlp.fc2.lora_A.default.weight")}
    base = checkpoint[f"{prefix}.base_layer.weight"]
    product = checkpoint[f"{prefix}.lora_B.default.weight"] @ checkpoint[f"{prefix}.lora_A.default.weight"]
    model, loading = DepictForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert product.abs().max() > 0
    torch.testing.assert_close(model.state_dict()[f"{prefix}.weight"], base + 2 * product)
    source = transformers.Dinov2Backbone.from_pretrained(backbone_folder).state_dict()
    torch.testing.assert_close(base, source[f"{prefix}.weight".removeprefix("encoder.backbone.")])


def test_pictures_of_an_evaluation(dataset_folder, backbone_folder, tmp_path):
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, "sample_pictures=2")
    trainer.state.global_step = 30
    trainer.evaluate()
    written = {path.name: path for path in (tmp_path / "samples" / "step-30").iterdir()}
    assert sorted(written) == ["0.png", "1.png"]  # of three images
    sample = trainer.eval_dataset.samples[1]
    photo = sample["image"].permute(1, 2, 0).numpy()
    [prediction] = segment(trainer.model.eval(), trainer.processing_class, [photo])
    title = f"{trainer.eval_dataset.samples.name(1)} (1), step 30"
    names = dict(enumerate(CLASSES))
    expected = sample_picture(sample["image"], sample["labels"], prediction, title, names)
    assert np.array_equal(np.asarray(Image.open(written["1.png"])), np.asarray(expected))


def test_no_pictures_where_none_are_wanted(dataset_folder, backbone_folder, tmp_path):
    make_trainer(dataset_folder, backbone_folder, tmp_path, "sample_pictures=0").evaluate()
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("decoder_type", ["sa", "ca", "mask_transformer"])
def test_checkpointing_changes_no_weight(dataset_folder, backbone_folder, tmp_path, decoder_type):
    fields = ["freeze_encoder=false", f"decoder_type={decoder_type}", "epochs=1"]
    weights = []
    for flag in ("false", "true"):
        trainer = make_trainer(
            dataset_folder, backbone_folder, tmp_path / flag, *fields, f"gradient_checkpointing={flag}"
        )
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow  # a minute of compilation
def test_compilation_changes_no_weight(dataset_folder, backbone_folder, tmp_path):
    weights = []
    for flag in ("false", "true"):
        fields = ["freeze_encoder=false", "batch_size=4", f"compile={flag}"]
        trainer = make_trainer(dataset_folder, backbone_folder, tmp_path / flag, *fields)
        trainer.train()
        weights.append(weights_of(trainer.model))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_training_goes_on_from_a_model(dataset_folder, backbone_folder, tmp_path):
    assert run(dataset_folder, backbone_folder, tmp_path / "start", "epochs=1") == 0
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, f"start_from={tmp_path / 'start'}")
    saved = DepictForSemanticSegmentation.from_pretrained(tmp_path / "start").state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, saved[name]), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("class_names=road,sky", "with decoder 'sa' and 5 classes, needed 'sa' and 2 classes"),
        ("decoder_type=linear", "with decoder 'sa' and 5 classes, needed 'linear' and 5 classes"),
        ("epochs=1", r"is no whole model: weights \['decoder.mask_norm.weight'\] are missing"),
    ],
    ids=["classes", "decoder", "weights"],
)
def test_a_model_that_does_not_fit_is_refused(fields, message, dataset_folder, backbone_folder, tmp_path):
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path)
    trainer.model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder.mask_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        train.build_model(trainer.recipe.override([f"start_from={tmp_path}", fields]))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("average_decay=1", "average_decay=1.0, needed less than 1"),
        ("lora_rank=4", "lora_rank=4 with freeze_encoder=True; pass freeze_encoder=false"),
        ("sample_pictures=-1", "sample_pictures=-1, needed at least 0"),
    ],
)
def test_options_out_of_range_are_refused(field, message, tmp_path, capsys):
    assert train.main(["camvid_dinov2_small_sa", "no data", str(tmp_path), field]) == 1
    assert message in capsys.readouterr().err


def test_the_logged_loss_is_that_of_all_steps(dataset_folder, backbone_folder, tmp_path):
    trainer = make_trainer(dataset_folder, backbone_folder, tmp_path, "epochs=3")
    losses = []
    compute_loss = trainer.compute_loss

    def record(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = record
    trained = trainer.train()
    assert trained.training_loss == pytest.approx(sum(losses) / len(losses))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == len(losses) == 6
