"""The published ADM checkpoints, and the settings in which they were sampled.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233). Head count, order
of the attention's channels, noise schedule and the reading of the variance are not visible in a checkpoint's
keys: a network with other ones loads strictly and samples garbage. They are written down here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import torch

from evalkit.errors import InputError, did_you_mean
from evalkit.system.records import structure
from generation.denoisers import PredictionType
from generation.networks.classifier import Classifier, ClassifierSettings
from generation.networks.unet import Trunk, UNet, UNetSettings
from generation.networks.upsampler import Upsampler

__all__ = [
    "MODELS",
    "SAMPLING",
    "Kind",
    "ModelPreset",
    "SamplingPreset",
    "find_model",
    "find_sampling",
]

P = TypeVar("P")
Kind = Literal["diffusion", "classifier", "upsampler"]


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """One trained network: everything that its weights do not show.

    Attributes:
        name: Name of the published checkpoint without its ending, or any name for your own network.
        kind: What the network does.
        network: What determines it.
        noise_schedule: ``linear`` or ``cosine``, of its training.
        diffusion_steps: Timesteps of its training.
        low_res_size: Side of the small images that an upsampler reads, pixels; None for other kinds.
        layout_sha256: Digest of the lines ``<key> <shape as a Python tuple>`` of its state dict; empty for
            your own network.
        parameters: Number of its parameters; 0 for your own network.
        published_precision: Type in which the published commands compute the convolutions of a diffusion
            model or upsampler; those of all classifiers are float32.
        prediction: What a diffusion model or upsampler predicts, see :mod:`generation.denoisers`.
    """

    name: str
    kind: Kind
    network: UNetSettings
    noise_schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: int = 1000
    low_res_size: int | None = None
    layout_sha256: str = ""
    parameters: int = 0
    published_precision: Literal["float16", "float32"] = "float16"
    prediction: PredictionType = "eps"

    @property
    def file(self) -> str:
        """Name of the published file."""
        return f"{self.name}.pt"

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.network.image_size

    @property
    def num_classes(self) -> int | None:
        """Classes that a classifier tells apart, or that a diffusion model is conditioned on, if any."""
        return self.network.out_channels if self.kind == "classifier" else self.network.num_classes

    @property
    def learn_sigma(self) -> bool:
        """Whether the network predicts the variance as well."""
        return self.network.out_channels == 2 * self.network.in_channels

    def build(self, device: str | torch.device = "meta") -> Trunk:
        """The network, its parameters as they are before training; on ``meta`` without memory.

        Returns:
            A :class:`UNet`, :class:`Classifier` or :class:`Upsampler`, in train mode.
        """
        with torch.device(device):
            if isinstance(self.network, ClassifierSettings):
                return Classifier(self.network)
            return {"diffusion": UNet, "upsampler": Upsampler}[self.kind](self.network)

    def to_json(self) -> str:
        """All fields, as :meth:`from_json` reads them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelPreset:
        """The preset that :meth:`to_json` wrote.

        Raises:
            InputError: The text is not one.
        """
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"This is not the JSON of a model preset ({error}). `evalkit checkpoint convert` writes it."
            ) from error
        return cls.from_table(table, "The model preset")

    @classmethod
    def from_table(cls, table: Any, name: str) -> ModelPreset:
        """The preset with the fields of ``table``, those of ``network`` in a table of their own.

        Args:
            table: A table of JSON or TOML.
            name: What an error calls it.

        Raises:
            InputError: It is none, a field is missing or unknown, or a value is of another type.
        """
        if (
            isinstance(table, Mapping)
            and table.get("kind") in get_args(Kind)
            and isinstance(table.get("network"), Mapping)
        ):
            settings = ClassifierSettings if table.get("kind") == "classifier" else UNetSettings
            table = {**table, "network": structure(table["network"], settings, f"{name}.network")}
            published = MODELS.get(str(table.get("name")))
            if published and table.get("layout_sha256") == published.layout_sha256:
                # Files that were converted before there was this field do not have it.
                table = {"published_precision": published.published_precision, **table}
        return structure(table, cls, name)


@dataclass(frozen=True, kw_only=True)
class SamplingPreset:
    """One published way of sampling.

    Attributes:
        name: For the command line.
        diffusion: Name of the diffusion model or upsampler in ``MODELS``.
        classifier: Name of the classifier that guides it, or None.
        scale: Guidance scale; 0 without a classifier.
        respacing: Steps, as :mod:`generation.schedule` reads them.
        sampler: A row of :data:`generation.samplers.SAMPLERS`.
    """

    name: str
    diffusion: str
    classifier: str | None = None
    scale: float = 0.0
    respacing: str = "250"
    sampler: str = "ddpm"


IMAGENET_CLASSES = 1000
# Width of each level of a diffusion model or classifier, by the side of its images.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _at(size: int, *resolutions: int) -> tuple[int, ...]:
    """Resolutions that have attention, as the paper counts, to the factors of the settings."""
    return tuple(size // resolution for resolution in resolutions)


def _unet(size: int, **changes: Any) -> UNetSettings:
    """A published diffusion model, as far as most of them agree."""
    common: dict[str, Any] = {
        "model_channels": 256,
        "out_channels": 6,
        "num_res_blocks": 2,
        "attention_resolutions": _at(size, 32, 16, 8),
        "channel_mult": CHANNEL_MULT[size],
        "num_classes": IMAGENET_CLASSES,
        "num_head_channels": 64,
    }
    return UNetSettings(image_size=size, **(common | changes))


def _classifier(size: int, *, num_res_blocks: int = 2) -> ClassifierSettings:
    return ClassifierSettings(
        image_size=size,
        model_channels=128,
        out_channels=IMAGENET_CLASSES,
        num_res_blocks=num_res_blocks,
        attention_resolutions=_at(size, 32, 16, 8),
        channel_mult=CHANNEL_MULT[size],
        num_head_channels=64,
        pool="attention",
    )


def _unconditional_256(name: str, dropout: float) -> ModelPreset:
    """Five checkpoints that differ in their weights alone."""
    return ModelPreset(
        name=name,
        kind="diffusion",
        network=_unet(256, num_classes=None, dropout=dropout),
        layout_sha256="99b0f51e19c0f48559ffcaead639281ac95de54fa82e0bb6dc03a52a58962ac2",
        parameters=552_814_086,
    )


_MODELS = (
    ModelPreset(
        name="64x64_diffusion",
        kind="diffusion",
        network=_unet(64, model_channels=192, num_res_blocks=3, dropout=0.1, use_new_attention_order=True),
        noise_schedule="cosine",
        layout_sha256="b41189488aa25b2a801bcaef75f58ea06d9f31346cfc3e4193b71ce964198665",
        parameters=295_904_454,
    ),
    ModelPreset(
        name="128x128_diffusion",
        kind="diffusion",
        network=_unet(128, num_heads=4, num_head_channels=None),
        layout_sha256="3e304371ffe30dfe06e155e13231caed19f655fa28e8a6f126a537bf04d74f39",
        parameters=421_529_606,
    ),
    ModelPreset(
        name="256x256_diffusion",
        kind="diffusion",
        network=_unet(256),
        layout_sha256="34403438fb090630d98cee98c758c14bab774a01e00580cfc653a81e36d1684e",
        parameters=553_838_086,
    ),
    _unconditional_256("256x256_diffusion_uncond", dropout=0.0),
    ModelPreset(
        name="512x512_diffusion",
        kind="diffusion",
        network=_unet(512),
        layout_sha256="74099b42b3463e6292df54f446755a17af94b3cf277fb466119bcc7d892262dc",
        parameters=558_997_638,
        published_precision="float32",
    ),
    ModelPreset(
        name="64_256_upsampler",
        kind="upsampler",
        network=_unet(256, model_channels=192, num_heads=4, num_head_channels=None),
        low_res_size=64,
        layout_sha256="90fdb62b5beff70867829eb0afea1d6819558bfff7563116aa3cf6e903737ec3",
        parameters=311_795_910,
    ),
    ModelPreset(
        name="128_512_upsampler",
        kind="upsampler",
        network=_unet(
            512,
            model_channels=192,
            attention_resolutions=_at(512, 32, 16),
            channel_mult=CHANNEL_MULT[256],
        ),
        low_res_size=128,
        layout_sha256="0ed4a0d2d11c242fd48d30d5e984a320fbb77065a597a62bf742512be743d3dc",
        parameters=308_835_270,
    ),
    ModelPreset(
        name="64x64_classifier",
        kind="classifier",
        network=_classifier(64, num_res_blocks=4),
        noise_schedule="cosine",  # of the diffusion model that it was published to guide
        layout_sha256="49cfb6500cf5212d3aad9d5cdbe1de856c9fbd16caf1063fbeea75358ad6d984",
        parameters=65_438_568,
    ),
    ModelPreset(
        name="128x128_classifier",
        kind="classifier",
        network=_classifier(128),
        layout_sha256="638bfa0611e170590d451a5d842ae198f9be653bb30be62553a095c849c26bbf",
        parameters=42_568_040,
    ),
    ModelPreset(
        name="256x256_classifier",
        kind="classifier",
        network=_classifier(256),
        layout_sha256="95f525adc1de6c73a55c4884361c60fca867c1a134413f0b98b33e822655fd7c",
        parameters=54_096_360,
    ),
    ModelPreset(
        name="512x512_classifier",
        kind="classifier",
        network=_classifier(512),
        layout_sha256="62dc776094187f80b078e6697288f28537e3fff5ef81c8d5664bd51d1c8c1f4b",
        parameters=54_448_360,
    ),
    _unconditional_256("lsun_bedroom", dropout=0.1),
    _unconditional_256("lsun_cat", dropout=0.1),
    _unconditional_256("lsun_horse", dropout=0.1),
    _unconditional_256("lsun_horse_nodropout", dropout=0.0),
)

MODELS: Mapping[str, ModelPreset] = MappingProxyType({preset.name: preset for preset in _MODELS})
"""Every published checkpoint, by name."""


def _guided(
    name: str, size: int, scale: float, *, respacing: str = "250", uncond: bool = False
) -> SamplingPreset:
    return SamplingPreset(
        name=name,
        diffusion=f"{size}x{size}_diffusion{'_uncond' if uncond else ''}",
        classifier=f"{size}x{size}_classifier",
        scale=scale,
        respacing=respacing,
        sampler="ddim" if respacing.startswith("ddim") else "ddpm",
    )


_SAMPLING = (
    SamplingPreset(name="imagenet64", diffusion="64x64_diffusion"),
    _guided("imagenet64-guided", 64, 1.0),
    SamplingPreset(name="imagenet128", diffusion="128x128_diffusion"),
    _guided("imagenet128-guided", 128, 0.5),
    _guided("imagenet128-guided-ddim25", 128, 1.25, respacing="ddim25"),
    SamplingPreset(name="imagenet256", diffusion="256x256_diffusion"),
    _guided("imagenet256-guided", 256, 1.0),
    _guided("imagenet256-guided-ddim25", 256, 2.5, respacing="ddim25"),
    SamplingPreset(name="imagenet256-uncond", diffusion="256x256_diffusion_uncond"),
    _guided("imagenet256-uncond-guided", 256, 10.0, uncond=True),
    SamplingPreset(name="imagenet512", diffusion="512x512_diffusion"),
    _guided("imagenet512-guided", 512, 4.0),
    _guided("imagenet512-guided-ddim25", 512, 9.0, respacing="ddim25"),
    SamplingPreset(name="lsun-bedroom", diffusion="lsun_bedroom", respacing="1000"),
    SamplingPreset(name="lsun-cat", diffusion="lsun_cat", respacing="1000"),
    SamplingPreset(name="lsun-horse", diffusion="lsun_horse", respacing="1000"),
    SamplingPreset(name="lsun-horse-nodropout", diffusion="lsun_horse_nodropout", respacing="1000"),
    SamplingPreset(name="upsample-64-256", diffusion="64_256_upsampler"),
    SamplingPreset(name="upsample-128-512", diffusion="128_512_upsampler"),
)

SAMPLING: Mapping[str, SamplingPreset] = MappingProxyType({preset.name: preset for preset in _SAMPLING})
"""The published ways of sampling, by name. Any npz is the base of an upsampler, published ones being of
`imagenet64-guided` and `imagenet128-guided`."""


def find_model(name: str) -> ModelPreset:
    """The published checkpoint called ``name``, with or without ``.pt``.

    Raises:
        InputError: There is none.
    """
    return _find(name.removesuffix(".pt"), MODELS, "checkpoint")


def find_sampling(name: str) -> SamplingPreset:
    """The published way of sampling called ``name``.

    Raises:
        InputError: There is none.
    """
    return _find(name, SAMPLING, "sampling preset")


def _find(name: str, presets: Mapping[str, P], what: str) -> P:
    if name not in presets:
        raise InputError(
            f"There is no {what} {name!r}. Give one of {', '.join(presets)}.{did_you_mean(name, presets)}"
        )
    return presets[name]
