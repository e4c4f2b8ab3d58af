"""Samplers: algorithms that turn noise into images, one file each. Their parameters are their own."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from evalkit.errors import InputError, brief, did_you_mean

if TYPE_CHECKING:
    from generation.samplers.base import Sampler

__all__ = ["SAMPLERS", "make_sampler", "sampler_class", "sampler_record"]

# To add a sampler, write it as generation/samplers/YOURS.py (see base.py for what it is called with),
# add its row here, and test in tests/generation/test_samplers.py what is special about it.
# The command line, the records of runs and tests/generation/test_sampler_contract.py read this table.
SAMPLERS: dict[str, str] = {
    "ddpm": "generation.samplers.ddpm:DDPM",
    "ddim": "generation.samplers.ddim:DDIM",
    "dpm-solver++": "generation.samplers.dpm_solver_pp_2m:DPMSolverPP2M",
}


def sampler_class(name: str) -> type[Sampler]:
    """The class of a row, loaded now.

    Raises:
        InputError: There is no such sampler.
    """
    if name not in SAMPLERS:
        raise InputError(
            f"Unknown sampler {brief(name)!r}; expected {', '.join(SAMPLERS)}.{did_you_mean(name, SAMPLERS)}"
        )
    loaded: type[Sampler] = pkgutil.resolve_name(SAMPLERS[name])
    return loaded


def make_sampler(name: str, parameters: Mapping[str, Any] | None = None) -> Sampler:
    """A sampler of the table.

    Args:
        name: A key of ``SAMPLERS``.
        parameters: Values of its parameters, as JSON holds them; the others have their defaults.

    Raises:
        InputError: There is no such sampler or parameter, or a value has another type or is out of range.
    """
    from evalkit.system.records import structure

    cls, parameters = sampler_class(name), dict(parameters or {})
    own = _parameters(cls)
    for key in parameters:
        if key not in own:
            has = f"the parameters {', '.join(own)}" if own else "no parameters"
            others = [other for other in SAMPLERS if key in _parameters(sampler_class(other))]
            hint = f" {key} is a parameter of {' and '.join(others)}." if others else ""
            raise InputError(
                f"The sampler {name} has {has}; {brief(key)!r} was given.{hint or did_you_mean(key, own)}"
            )
    return structure(parameters, cls, f"The sampler {name}")


def sampler_record(sampler: Sampler) -> dict[str, Any]:
    """The sampler's name and parameters, as JSON holds them: ``{"name": "ddim", "eta": 0.0}``."""
    return {"name": sampler.name, **asdict(sampler)}  # type: ignore[call-overload]


def _parameters(cls: type[Sampler]) -> list[str]:
    return [field.name for field in fields(cls)]  # type: ignore[arg-type]
