"""Options that several verbs share, and the settings and networks that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from evalkit.cli.completion import one_of
from evalkit.cli.messages import say
from evalkit.cli.parameters import file, output, text
from evalkit.errors import InputError, brief
from generation.samplers import SAMPLERS

if TYPE_CHECKING:
    from generation.batch import Networks
    from generation.settings import Settings

__all__ = [
    "PRECISION_CHOICES",
    "device_option",
    "grid_option",
    "guidance_options",
    "network_options",
    "options",
    "parse_batch_size",
    "precision_option",
    "run_options",
    "sampler_options",
    "scale_option",
    "set_up",
]

F = TypeVar("F", bound=Callable[..., Any])

PRECISION_CHOICES = "reference|published|fast"


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; `--help` lists them in this order."""

    def decorate(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


device_option = click.option(
    "--device", type=text, default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
network_options = options(
    click.option(
        "--preset", type=text, metavar="NAME", help="A published way of sampling: networks, steps, scale."
    ),
    click.option("--model", type=file, metavar="FILE", help="Its weights, if they are not in the cache."),
    device_option,
)
sampler_options = options(
    click.option(
        "--sampler",
        type=text,
        metavar="|".join(SAMPLERS),
        shell_complete=one_of(SAMPLERS),
        help="By default the preset's, ddim for a ddim respacing, or ddpm.",
    ),
    click.option(
        "--sampler-option",
        "parameters",
        type=text,
        multiple=True,
        metavar="NAME=VALUE",
        help="A parameter of the sampler, such as eta=0.5 for ddim; may be repeated.",
    ),
    click.option(
        "--respacing",
        metavar="STEPS",
        help='250, ddim25 or 90,60,60,20,20, or "" for all; by default the preset\'s, or 250.',
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Random seed of noise and classes."),
)
scale_option = click.option(
    "--scale",
    type=float,
    help="Guidance scale; by default the preset's, or 1 with a classifier. 0: no guidance.",
)
guidance_options = options(
    click.option(
        "--classifier", type=file, metavar="FILE", help="The classifier's weights, if not in the cache."
    ),
    click.option(
        "--guidance-steps", type=text, metavar="A:B", help="Guide only at timesteps A <= t < B (of 0 to 999)."
    ),
    click.option(
        "--classes",
        type=text,
        metavar="CLASSES",
        help="random (the default), balanced, one class, or a file (npy, or text, one a line).",
    ),
)
precision_option = click.option(
    "--precision",
    type=text,
    metavar=PRECISION_CHOICES,
    help="Arithmetic of the networks; by default published on CUDA, and reference elsewhere.",
)
run_options = options(
    click.option("--out", type=file, required=True, metavar="FOLDER", help="The run's folder."),
    precision_option,
    click.option(
        "--batch-size",
        type=text,
        metavar="N|auto",
        default="auto",
        show_default=True,
        help="Samples at a time.",
    ),
    click.option(
        "--shard-size",
        type=int,
        default=64,
        show_default=True,
        help="Samples per shard, and so the largest batch. Complete batches survive an interruption.",
    ),
)
grid_option = click.option(
    "--grid", type=output, metavar="FILE", help="Also write the first 64 samples as an image grid, a PNG."
)


def set_up(
    count: int, given: dict[str, Any], *, upsampler: bool = False
) -> tuple[Settings, Callable[[str | None], Networks]]:
    """The settings that options and preset ask for, and a function that loads the networks in a precision.

    None is the precision that is the device's default.

    Args:
        count: Samples in all.
        given: The options of the command by their names.
        upsampler: Whether the command makes large images from small ones.

    Raises:
        InputError: An option is wrong, or the preset is for another command.
    """
    from generation.presets import find_model, find_sampling
    from generation.samplers import make_sampler
    from generation.settings import Settings

    preset = find_sampling(given["preset"]) if given["preset"] else None
    # Before its checkpoint is loaded.
    if preset and (find_model(preset.diffusion).kind == "upsampler") != upsampler:
        raise InputError(
            f"{preset.name} makes images from noise: use `evalkit sample`."
            if upsampler
            else f"{preset.name} makes large images from small ones: use `evalkit upsample`."
        )
    respacing = given["respacing"]
    if respacing is None:  # "" is a value
        respacing = preset.respacing if preset else "250"
    scale = given.get("scale")
    if scale is None:
        scale = preset.scale if preset else float(given.get("classifier") is not None)
    by_default = "ddim" if respacing.startswith("ddim") else preset.sampler if preset else "ddpm"
    settings = Settings(
        count=count,
        seed=given["seed"],
        classes=given.get("classes"),
        scale=scale,
        guidance_timesteps=_parse_interval(given.get("guidance_steps")),
        sampler=make_sampler(given["sampler"] or by_default, _parse_parameters(given["parameters"])),
        respacing=respacing,
        shard_size=given.get("shard_size", 64),
    )

    def load(precision: str | None) -> Networks:
        from evalkit.system.devices import resolve_device
        from generation.batch import load_networks
        from generation.networks.precision import default_precision

        device = resolve_device(given["device"])
        networks = load_networks(
            preset,
            model=given["model"],
            classifier=given.get("classifier"),
            guided=settings.scale != 0,
            precision=default_precision(device) if precision is None else precision,
            device=device,
        )
        for loaded in (networks.diffusion, networks.classifier):
            if loaded and loaded.prefix:
                say(f"{loaded.path}: the prefix {brief(loaded.prefix)} before every name was left out.")
        return networks

    return settings, load


def parse_batch_size(value: str) -> int | None:
    """The number that ``--batch-size`` gives; None for auto."""
    if value == "auto":
        return None
    if not _is_number(value):
        raise InputError(f"--batch-size {value[:80]!r} is neither a number from 1 nor auto.")
    return int(value)


def _parse_parameters(given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` each: the value as JSON reads it, or else a string."""
    import json

    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals) or name in found:
            raise InputError(f"--sampler-option {each[:80]!r}: expected NAME=VALUE, each name once.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _parse_interval(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    first, colon, end = value.partition(":")
    if not (colon and _is_number(first) and _is_number(end)):
        raise InputError(
            f"--guidance-steps {value[:80]!r} is not understood. Give two timesteps, such as 200:800."
        )
    return int(first), int(end)


def _is_number(value: str) -> bool:
    """Whether it is a whole number from 0, of up to 9 digits: Python refuses to read thousands of them."""
    return value.isdecimal() and len(value) < 10
