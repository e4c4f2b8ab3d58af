"""Networks and arrays that the original library made, as recorded in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from generation.networks.unet import UNetSettings

GOLDEN = Path(__file__).parents[1] / "golden" / "generation"


def load(network: type[nn.Module], settings: type[UNetSettings], name: str) -> nn.Module:
    with np.load(GOLDEN / f"{name}.npz") as file:
        module = network(settings(**json.loads(str(file["config_json"]))))
        module.load_state_dict(
            {
                key.removeprefix("param/"): torch.from_numpy(file[key])
                for key in file.files
                if key.startswith("param/")
            }
        )
    return module.eval().requires_grad_(False)
