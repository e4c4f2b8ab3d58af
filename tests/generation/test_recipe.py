"""Recipes: files that say what is trained and how."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import RECIPE, recipe

from evalkit.errors import InputError
from generation.checkpoints import load_network
from generation.presets import MODELS
from generation.recipe import SHIPPED, load_recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_shipped_weights_are_of_their_recipes(name: str) -> None:
    loaded = load_network(SHIPPED / f"{name}.safetensors")
    assert loaded.preset == load_recipe(name).model
    assert loaded.preset.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("image_size = 8", "image_size = 9"), "cannot be halved 1 times"),
        (("model_channels = 32", "model_channels = 48"), "48 channels; group norm takes multiples of 32"),
        (('kind = "diffusion"', 'kind = "upsampler"'), "an upsampler; expected"),
        (("image_size = 8", "image_size = 8\nin_channels = 1"), "in_channels 1"),
        (('kind = "diffusion"', 'kind = "diffusion"\nprediction = "v"'), "prediction v; training is of eps"),
        (("out_channels = 6", "out_channels = 5"), "out_channels 5"),
        (('kind = "diffusion"', 'kind = "diffusion"\ndiffusion_steps = 1'), "1 timesteps"),
        (("steps = 4", "steps = 0"), "0 steps"),
        (("learning_rate = 1e-3", "learning_rate = -1.0"), "learning_rate -1"),
        (("ema = 0.9", "ema = 1.0"), "ema 1"),
        (("ema = 0.9", 'timesteps = "often"'), "uniform or loss-second-moment"),
        (("ema = 0.9", 'precision = "float16"'), "float32 or bfloat16"),
        (("ema = 0.9", "emma = 0.9"), "training.emma is unknown; expected some of steps"),
        (('name = "small"', 'name = "a/b"'), "Cannot train a/b with that name"),
        (('name = "small"', f'name = "{"a" * 101}"'), r"Cannot train a+\.\.\. with that name"),
        (('name = "small"', 'name = ""'), "Cannot train a model without a name with that name"),
        (("num_classes = 3", "num_classes = 0"), "num_classes is 0, expected at least 1"),
        (("num_res_blocks = 1", "num_res_blocks = -1"), "num_res_blocks is -1"),
        (("image_size = 8", "image_size = 0"), "image_size is 0"),
        (("num_classes = 3", "dropout = 2.0"), "dropout is 2.0"),
        (("attention_resolutions = [2]", "attention_resolutions = [3]"), r"but the levels are at \[1, 2\]"),
        (("ema = 0.9", "ema = true"), "training.ema is True; expected a finite number"),
        (("ema = 0.9", "flip = 1"), "training.flip is 1; expected true or false"),
        (("steps = 4", 'steps = "4"'), "training.steps is '4'; expected a whole number"),
        (("[training]", "[trainings]"), "training is None; expected a table"),
        (("steps = 4", "steps ="), "not TOML"),
        (("model_channels = 32\n", ""), "model.network.model_channels is missing; expected a whole number"),
        (("num_classes = 3", 'num_classes = "3"'), "num_classes is '3'; expected a whole number or null"),
        (('kind = "diffusion"', 'kind = "detector"'), "model.kind is 'detector'; expected diffusion or"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert change[0] in RECIPE
    with pytest.raises(InputError, match=message):
        recipe(tmp_path, RECIPE.replace(*change))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_recipes_of_any_editor(tmp_path: Path, encoding: str) -> None:
    expected = recipe(tmp_path)
    (tmp_path / "recipe.toml").write_bytes(RECIPE.replace("\n", "\r\n").encode(encoding))
    assert load_recipe(tmp_path / "recipe.toml") == expected


@pytest.mark.parametrize("content", [bytes(range(256)), "steps = 3".encode("utf-16-le"), b"\xff\xfe\0"])
def test_recipes_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(InputError, match=r"recipe\.toml is not TOML: it .* not text"):
        load_recipe(tmp_path / "recipe.toml")


def test_recipes_name_published_networks_or_are_not_there(tmp_path: Path) -> None:
    text = 'model = "64x64_diffusion"\n[training]\nsteps = 10\n'
    assert recipe(tmp_path, text, seed=2).model == MODELS["64x64_diffusion"]
    assert recipe(tmp_path, text, seed=2).settings.seed == 2
    with pytest.raises(InputError, match=r"no recipe 'nonsense'.*one of"):
        load_recipe("nonsense")
