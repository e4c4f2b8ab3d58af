"""The protocols: which metrics, with which parameters, on which networks.

To add one: write a file here with a :class:`~evalkit.protocols.base.Protocol`, add its row below, and a test
against the tool whose numbers it gives.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from evalkit.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from evalkit.protocols.base import Protocol

__all__ = ["PROTOCOLS", "protocol_named"]

# Name: "module:Name", loaded when it is first used.
PROTOCOLS: dict[str, str] = {
    "adm": "evalkit.protocols.adm:ADM",
    "exact": "evalkit.protocols.exact:EXACT",
    "torch-fidelity": "evalkit.protocols.torch_fidelity:TORCH_FIDELITY",
    "pytorch-fid": "evalkit.protocols.pytorch_fid:PYTORCH_FID",
    "clean-fid": "evalkit.protocols.clean_fid:CLEAN_FID",
    "clean-fid-legacy-pytorch": "evalkit.protocols.clean_fid:LEGACY_PYTORCH",
    "edm2": "evalkit.protocols.edm2:EDM2",
    "dgm-eval": "evalkit.protocols.dgm_eval:DGM_EVAL",
    "cmmd": "evalkit.protocols.cmmd:CMMD",
    "fdr6": "evalkit.protocols.fdr6:FDR6",
}


def protocol_named(name: str) -> Protocol:
    """The protocol of a row, or several with commas between: :func:`evalkit.protocols.base.side_by_side`.

    Raises:
        InputError: There is no such row, or one is named twice.
    """
    names = [each.strip() for each in name.split(",")] if isinstance(name, str) else [name]
    for each in names:
        if not isinstance(each, str) or each not in PROTOCOLS:
            raise InputError(
                f"Unknown protocol {each!r}. Give one of {', '.join(PROTOCOLS)}, or several with commas "
                f"between.{did_you_mean(each, PROTOCOLS)}"
            )
        if names.count(each) > 1:
            raise InputError(f"The protocol {each} is named twice. Name each once.")
    found: list[Protocol] = [pkgutil.resolve_name(PROTOCOLS[each]) for each in names]
    if len(found) == 1:
        return found[0]
    from evalkit.protocols.base import side_by_side  # here, so that the names alone load no metric

    return side_by_side(found)
