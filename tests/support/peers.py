"""What other tools gave for 300 test images of CIFAR-10 against 300 training images, or 40 against 40."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["OF_40_IMAGES", "PEERS"]

# torch-fidelity 0.4.0, pytorch-fid 0.3.0 and clean-fid 0.1.35, unmodified, with the genuine convolutions.
PEERS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "peers_cifar10.json").read_text())

OF_40_IMAGES = 5e-6
"""Relative tolerance of FID of 40 against 40 images.

Another scaling of pixels moves it by 2.2e-5; that of 300 images by 2.8e-4, where the tolerance is 1e-4.
"""
