"""Networks that turn images into features.

To add one: write a file here with a class that is an :class:`~evalkit.extractors.base.Extractor`, add its row
below, and a test. Every metric that works on rows or Gaussians can then be asked of it: ``fd@name``.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

from evalkit.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from evalkit.extractors.base import Extractor

__all__ = ["EXTRACTORS", "extractor_class", "make_extractor"]

# Network: "module:Class", loaded when it is first used.
EXTRACTORS: dict[str, str] = {
    "inception": "evalkit.extractors.inception:Inception",
    "inception_pytorch_fid": "evalkit.extractors.inception_resizes:PytorchFid",
    "inception_clean_fid": "evalkit.extractors.inception_resizes:CleanFid",
    "inception_clean_fid_legacy_pytorch": "evalkit.extractors.inception_resizes:CleanFidLegacyPytorch",
    "dinov2_vitb14": "evalkit.extractors.dinov2:DINOv2ViTB14",
    "dinov2_vitl14": "evalkit.extractors.dinov2:DINOv2ViTL14",
    "dinov2_vitl14_dgm_eval": "evalkit.extractors.dinov2:DINOv2ViTL14DgmEval",
    "clip_vitb32": "evalkit.extractors.clip:CLIPViTB32",
    "clip_vitl14": "evalkit.extractors.clip:CLIPViTL14",
    "clip_vitl14_336": "evalkit.extractors.clip:CLIPViTL14At336",
    "convnextv2_base": "evalkit.extractors.fdr6:ConvNeXtV2Base",
    "mae_vitl16": "evalkit.extractors.fdr6:MAEViTL16",
    "siglip2_so400m": "evalkit.extractors.fdr6:SigLIP2So400m",
    "dinov2_vitl14_fdr6": "evalkit.extractors.fdr6:DINOv2ViTL14FDr6",
    "clip_vitl14_fdr6": "evalkit.extractors.fdr6:CLIPViTL14FDr6",
    "efficientnet_lite0": "evalkit.extractors.efficientnet_lite0:EfficientNetLite0",
    "pixels": "evalkit.extractors.pixels:Pixels",
}


def extractor_class(network: str) -> Any:
    """The class of a network's row, which makes an extractor.

    Raises:
        InputError: There is no such row.
    """
    if network not in EXTRACTORS:
        raise InputError(
            f"Unknown network {network!r}. Give one of {', '.join(EXTRACTORS)}."
            f"{did_you_mean(network, EXTRACTORS)}"
        )
    return pkgutil.resolve_name(EXTRACTORS[network])


def make_extractor(network: str, **options: Any) -> Extractor:
    """The network with its defaults, its weights found where they usually are.

    Args:
        network: A row of :data:`EXTRACTORS`.
        **options: Arguments of its class.

    Raises:
        InputError: There is no such row.
        WeightsError: No weights were found.
    """
    made: Extractor = extractor_class(network)(**options)
    return made
