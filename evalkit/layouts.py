"""Files of mean and covariance: what each tool calls them, their types, and how that tool resizes images.

An npz row of :data:`LAYOUTS` is enough to read a tool's files and to write files that it reads; pickles have
their own reader, :mod:`evalkit.images.pkl`. Nothing heavy is imported here, because the command line offers
the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from evalkit.errors import InputError, did_you_mean

__all__ = ["LAYOUTS", "SHAPES", "Layout", "layout_named"]

SHAPES: Mapping[str, tuple[int, ...]] = {
    "mu": (2048,),
    "sigma": (2048, 2048),
    "mu_s": (2023,),
    "sigma_s": (2023, 2023),
    "mu_dinov2": (1024,),
    "sigma_dinov2": (1024, 1024),
}
"""Our names of mean and covariance, and their shapes: Inception's pool and spatial, DINOv2 ViT-L."""

_PAIR = {"mu": "mu", "sigma": "sigma"}
_TF1 = "TF1 bilinear"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one tool's files are laid out.

    Attributes:
        tools: Who reads such files.
        keys: Our name of an array (:data:`SHAPES`) and the file's; in a pickle with its group, ``"fid/mu"``.
        dtypes: Types of the arrays that are written, by our name; float64 where none is given.
        suffix: Of the file's name, which tells the tool what it is.
        resize: How the tool resizes the images that it compares, in words that
            :attr:`evalkit.extractors.base.Extractor.preprocess` has, too; None where that is not known.
        advice: What else to know before such a file is used; empty for nothing.
        own: Whether these are evalkit's own files: any name, the arrays as they are, one pair or both.
    """

    tools: str
    keys: Mapping[str, str]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ".npz"
    resize: str | None = _TF1
    advice: str = ""
    own: bool = False


LAYOUTS: Mapping[str, Layout] = {
    "adm": Layout(
        tools="ADM's evaluator and evalkit",
        keys={key: key for key in ("mu", "sigma", "mu_s", "sigma_s")},
        own=True,
    ),
    # Its own statistics have these types, and it asserts that others have the same.
    "jit": Layout(
        tools="JiT, MAR and fractal, with LTH14's fork of torch-fidelity",
        keys=_PAIR,
        dtypes={"mu": "float32"},
    ),
    "edm": Layout(tools="EDM", keys=_PAIR),
    "edm2": Layout(
        tools="EDM2",
        keys={
            "mu": "fid/mu",
            "sigma": "fid/sigma",
            "mu_dinov2": "fd_dinov2/mu",
            "sigma_dinov2": "fd_dinov2/sigma",
        },
        suffix=".pkl",
    ),
    "meanflow": Layout(tools="MeanFlow and iMF", keys={"mu": "ref_mu", "sigma": "ref_sigma"}, resize=None),
    "pytorch-fid": Layout(
        tools="pytorch-fid", keys=_PAIR, resize="half-pixel bilinear 299x299 without antialiasing"
    ),
    "clean-fid": Layout(
        tools="clean-fid",
        keys=_PAIR,
        resize="Pillow bicubic 299x299 on floats",
        advice="They are right for its mode legacy_tensorflow: put them into its folder stats/ as "
        "NAME_legacy_tensorflow_custom_na.npz.",
    ),
}
"""By name, which is that of a tool that reads it."""


def layout_named(name: str) -> Layout:
    """The row of a name.

    Raises:
        InputError: There is none.
    """
    if name not in LAYOUTS:
        raise InputError(
            f"Unknown layout {name!r} of statistics. Give one of {', '.join(LAYOUTS)}."
            f"{did_you_mean(name, LAYOUTS)}"
        )
    return LAYOUTS[name]
