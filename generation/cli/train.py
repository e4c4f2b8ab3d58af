"""`evalkit train diffusion` and `evalkit train classifier`."""

from __future__ import annotations

from typing import Any

import click

from evalkit.cli.options import echo_notes, value_range_option
from evalkit.cli.parameters import file, text
from evalkit.cli.progress import progress_bars
from evalkit.errors import InputError
from evalkit.system.processes import is_main_process
from generation.cli.options import device_option, options

__all__ = ["train"]

CHANGES = ("steps", "batch_size", "learning_rate", "precision", "seed")
"""Options that replace settings of the recipe."""


@click.group(short_help="Train diffusion models and their classifiers.")
def train() -> None:
    """Train diffusion models and the classifiers that guide them."""


training_options = options(
    click.option(
        "--recipe",
        type=text,
        required=True,
        help="Network and settings: a TOML file, or the name of a recipe that comes with evalkit.",
    ),
    click.option("--out", type=file, required=True, metavar="FOLDER", help="The run's folder."),
    value_range_option,
    click.option("--steps", type=int, help="Updates, instead of the recipe's."),
    click.option(
        "--batch-size",
        type=int,
        help="Images per update, of all processes together; overrides the recipe.",
    ),
    click.option("--learning-rate", type=float, help="Learning rate, instead of the recipe's."),
    click.option(
        "--precision", type=text, metavar="float32|bfloat16", help="Arithmetic, instead of the recipe's."
    ),
    click.option("--seed", type=int, help="Random seed, instead of the recipe's."),
    click.option("--microbatch", type=int, help="Images at a time on each device, if not its whole share."),
    click.option(
        "--save-every", type=int, default=1000, show_default=True, help="Steps between checkpoints."
    ),
    click.option("--tensorboard", is_flag=True, help="Log for TensorBoard too, beside log.jsonl."),
    device_option,
)


@train.command("diffusion", short_help="Train a diffusion model.")
@click.argument("images", type=text)
@training_options
def train_diffusion(images: str, **options: Any) -> None:
    """Train a diffusion model on IMAGES: an npz, folder, zip, tar, HDF5 or parquet file.

    Repeat the command to resume an interrupted run. The folder holds checkpoint.pt, the averaged weights
    as `evalkit sample --model` takes them, log.jsonl and image grids of samples.

    \b
    Example:
      evalkit train diffusion digits.npz --recipe digits_diffusion --out runs/digits
      torchrun --nproc-per-node 4 --no-python evalkit train diffusion cats.npz --recipe cats.toml --out cats
    """
    _train("diffusion", images, None, options)


@train.command("classifier", short_help="Train a classifier on noisy images.")
@click.argument("images", type=text)
@training_options
@click.option("--validation", type=text, metavar="IMAGES", help="Labelled images to measure the accuracy on.")
def train_classifier(images: str, validation: str | None, **options: Any) -> None:
    """Train a classifier of noisy images on IMAGES, and show its accuracy at each level of noise.

    \b
    Example:
      evalkit train classifier digits.npz --recipe digits_classifier --out runs/digits-classifier
    """
    _train("classifier", images, validation, options)


def _train(kind: str, images: str, validation: str | None, options: dict[str, Any]) -> None:
    from evalkit.images import check_range_used, open_images
    from evalkit.system.devices import resolve_device
    from generation.recipe import load_recipe
    from generation.train import Options, train

    recipe = load_recipe(options["recipe"], **{name: options[name] for name in CHANGES})
    if recipe.model.kind != kind:
        raise InputError(
            f"The recipe is for a {recipe.model.kind} model: use `evalkit train {recipe.model.kind}`."
        )
    opened = [
        open_images(path, value_range=options["value_range"])
        for path in (images, *([validation] if validation else []))
    ]
    check_range_used(opened, options["value_range"])
    for source in opened:
        echo_notes(source)
    path = train(
        recipe,
        opened[0],
        options["out"],
        Options(
            device=resolve_device(options["device"]),
            microbatch=options["microbatch"],
            save_every=options["save_every"],
            validation=opened[1] if validation else None,
            tensorboard=options["tensorboard"],
        ),
        progress=progress_bars(),
    )
    if is_main_process():
        click.echo(f"{path}: averaged weights after {recipe.settings.steps:,} steps")
