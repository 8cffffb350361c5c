"""Means of trained models: of all weights, or none at all."""

import pytest
import torch
from conftest import save_model
from safetensors.torch import load_file, save_file

from depict_hf.hub import save_half_precision
from depict_hf.loading import load_model
from training.average import average, main


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Three of one kind, whose weights are those of the first, doubled and negated."""
    folders = []
    for name, factor in (("first", 1), ("second", 2), ("third", -1)):
        # What is no part of the kind differs, too.
        free = {"window_size": 32} if factor == 1 else {"drop_path_rate": 0.1}
        folder = save_model(tmp_path / name, **free)
        weights = load_file(folder / "model.safetensors")
        save_file(
            {key: factor * value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        folders.append(str(folder))
    return folders


def test_every_weight_is_the_mean_and_the_rest_is_the_firsts(models, tmp_path, capsys):
    """Fails if a weight is left as it was, counted twice, or the last model's settings are kept."""
    assert main([str(tmp_path / "out"), *models]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the mean of 3 models\n"
    found, expected = (load_file(f"{each}/model.safetensors") for each in (tmp_path / "out", models[0]))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight * 2 / 3, msg=name)
    model, image_processor = load_model(tmp_path / "out")
    assert model.config.window_size == 32 and image_processor.size["shortest_edge"] == 32


def test_the_mean_of_equal_models_is_that_model(models, tmp_path):
    weights = average(tmp_path / "out", [models[0]] * 3).state_dict()
    assert all(torch.equal(weights[name], each) for name, each in load_model(models[0])[0].state_dict().items())


def test_a_model_may_be_stored_without_the_code_that_travels_along(models, tmp_path):
    """As the model shipped is; fails if it counts as one of another kind."""
    save_half_precision(models[1], tmp_path / "half")
    assert "auto_map" not in (tmp_path / "half" / "config.json").read_text()
    means = average(tmp_path / "out", [models[0], str(tmp_path / "half")]).state_dict()
    first, half = (load_model(each)[0].state_dict() for each in (models[0], tmp_path / "half"))
    for name, mean in means.items():
        torch.testing.assert_close(mean, (first[name] + half[name]) / 2, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_type": "ca"}, r"of another kind than .*first: .*decoder_type='ca', there 'sa'"),
        ({"id2label": {index: f"class {index}" for index in range(5)}}, r"id2label=.*class 0"),
        ({"hidden_act": "relu"}, "hidden_act='relu', there 'gelu'"),  # whose weights have the same shapes
    ],
)
def test_models_of_another_kind_are_refused(fields, message, models, tmp_path):
    """Classes in another order would be averaged in silence."""
    other = save_model(tmp_path / "other", **fields)
    with pytest.raises(ValueError, match=message):
        average(tmp_path / "out", [models[0], str(other)])
    assert not (tmp_path / "out").exists()


def test_one_model_and_folders_that_are_filled_are_refused(models, tmp_path, capsys):
    assert main([str(tmp_path / "out"), models[0]]) == 1
    assert capsys.readouterr().err == "error: Got 1 models, needed two or more to average.\n"
    assert main([models[1], *models]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(tmp_path / "out"), models[0], str(tmp_path / "nothing")]) == 1
    assert "cannot load the model" in capsys.readouterr().err and not (tmp_path / "out").exists()
