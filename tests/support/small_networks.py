"""Small networks with random weights, as files that say what they are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from generation.batch import Networks
from generation.checkpoints import load_network, save_network
from generation.networks.classifier import ClassifierSettings
from generation.networks.unet import UNetSettings
from generation.presets import Kind, ModelPreset

SIZE, CLASSES = 8, 10


def write(folder: Path, name: str, kind: Kind, *, seed: int = 0, **changes: object) -> Path:
    """A network of random weights, none of them zero, as ``folder/name.safetensors``."""
    fields = {
        "image_size": SIZE,
        "model_channels": 32,
        "out_channels": CLASSES if kind == "classifier" else 6,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 1),
        "num_head_channels": 16,
        "num_classes": None if kind == "classifier" else CLASSES,
    }
    preset_fields = {key: changes.pop(key) for key in ("noise_schedule", "low_res_size") if key in changes}
    settings = ClassifierSettings if kind == "classifier" else UNetSettings
    preset = ModelPreset(name=name, kind=kind, network=settings(**(fields | changes)), **preset_fields)
    torch.manual_seed(seed)
    network = preset.build("cpu")
    for parameter in network.parameters():
        if not parameter.any():  # as training would have moved them
            nn.init.normal_(parameter, std=0.05)
    path = folder / f"{name}.safetensors"
    save_network(network.state_dict(), preset, path)
    return path


def load(model: Path, classifier: Path | None = None) -> Networks:
    """Networks of these files on the CPU, in the reference precision."""
    return Networks.prepare(
        load_network(model),
        load_network(classifier) if classifier else None,
        precision="reference",
        device=torch.device("cpu"),
    )
