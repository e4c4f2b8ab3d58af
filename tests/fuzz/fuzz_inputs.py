"""Sound files of every kind that evalkit reads, what reads them, and what a damaged one may be taken for.

Which images and numbers are right, of a file that was damaged and is read all the same:

- npz, tar.gz, PNG and features in HDF5 have checksums: those of the undamaged file. Where pieces of another
  sound file were put in, they may be that one's.
- zip: its members have checksums, its list of names has none. What is read are undamaged images; fewer than
  there were only where the report says that some are left out.
- npy, HDF5, parquet, tar, and folders of BMP, JPEG, TIFF, WebP and PPM have none, and neither has anything
  whose checksums were made right after the damage: those that an independent reader (NumPy, h5py, pyarrow,
  tarfile, Pillow) finds in the damaged file. What that one cannot read, evalkit may not read either.

Statistics, records, recipes and weights give no such number; for them the rules of ``fuzz_harness`` count.
What an interrupted run left behind has to lead to the bytes of the undamaged run, where it leads to any.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from fuzz_mutations import (
    Mutation,
    json_value,
    npy_header,
    png_repaired,
    safetensors_header,
    toml_value,
    zip_repaired,
)
from numpy.typing import NDArray
from PIL import Image

from evalkit.verify import pictures
from generation.networks.unet import UNetSettings
from generation.presets import ModelPreset

Pixels = NDArray[Any]
Files = dict[str, bytes]

COUNT, SIZE, CLASSES = 24, 8, 3
TINY = ModelPreset(
    name="tiny",
    kind="diffusion",
    network=UNetSettings(
        image_size=SIZE,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 1),
        num_head_channels=16,
        num_classes=CLASSES,
    ),
    noise_schedule="cosine",
)
RECIPE = """\
[model]
name = "small"
kind = "diffusion"
noise_schedule = "cosine"
diffusion_steps = 1000

[model.network]
image_size = 8
in_channels = 3
model_channels = 32
out_channels = 6
num_res_blocks = 1
attention_resolutions = [2]
channel_mult = [1, 1]
num_classes = 3
num_head_channels = 16
use_scale_shift_norm = true
dropout = 0.1

[training]
steps = 4
batch_size = 4
learning_rate = 1e-3
anneal = false
weight_decay = 0.01
ema = 0.9
timesteps = "uniform"
flip = true
crop = false
precision = "float32"
seed = 0
"""


def pixels_of(variant: int) -> Pixels:
    """(24, 8, 8, 3): 0 is what is damaged, 1 the other file, 2 the reference."""
    shown = np.concatenate([np.roll(pictures(SIZE, SIZE, 6), shift, axis=2) for shift in range(4)])
    noise = np.random.RandomState(variant).randint(0, 64, shown.shape)
    return np.where(shown < 128, shown + noise, shown - noise).astype(np.uint8)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: Writes a sound one, given a folder and a variant; returns what commands are given, and what is
            damaged.
        always: Commands that every damaged file is given to; ``{in}``, ``{out}`` and so on are filled in.
        sometimes: One of these as well.
        special: Mutations that know this kind.
        read: An independent reader of its pixels; None where there are none.
        checked: Its pixels have checksums.
        names: What messages may call it, beside the names of the two paths.
    """

    name: str
    make: Callable[[Path, int], tuple[Path, Path]]
    always: tuple[str, ...]
    sometimes: tuple[str, ...] = ()
    special: tuple[Mutation, ...] = ()
    read: Callable[[Path], Pixels] | None = None
    checked: bool = False
    names: tuple[str, ...] = field(default=())


# ------------------------------------------------------------------------------------------ containers


def encoded(pixels: Pixels, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def image_files(variant: int, suffix: str, **options: Any) -> Files:
    format = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    return {
        f"c{index % 2}/{index:02d}.{suffix}": encoded(x, format, **options)
        for index, x in enumerate(pixels_of(variant))
    }


def labels(variant: int) -> NDArray[np.int64]:
    return (np.arange(COUNT) + variant) % CLASSES


def one(path: Path) -> tuple[Path, Path]:
    return path, path


def npz(folder: Path, variant: int, *, save: Any = np.savez, **arrays: Any) -> tuple[Path, Path]:
    path = folder / "damaged.npz"
    save(path, arr_0=pixels_of(variant), arr_1=labels(variant), **arrays)
    return one(path)


def npy(folder: Path, variant: int) -> tuple[Path, Path]:
    np.save(folder / "damaged.npy", pixels_of(variant))
    return one(folder / "damaged.npy")


def archive(
    folder: Path, variant: int, suffix: str, *, compression: int = zipfile.ZIP_STORED, **options: Any
) -> tuple[Path, Path]:
    path = folder / "damaged.zip"
    files = image_files(variant, suffix, **options)
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, data in files.items():
            out.writestr(zipfile.ZipInfo(name), data, compression)
        record = {"labels": [list(pair) for pair in zip(files, labels(variant).tolist(), strict=True)]}
        out.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(record))
    return one(path)


def tar(folder: Path, variant: int, suffix: str, *, mode: Any = "w") -> tuple[Path, Path]:
    path = folder / ("damaged.tar.gz" if mode == "w:gz" else "damaged.tar")
    with tarfile.open(path, mode) as out:
        for name, data in sorted(image_files(variant, suffix).items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return one(path)


def image_folder(folder: Path, variant: int, suffix: str, **options: Any) -> tuple[Path, Path]:
    root = folder / "pictures"
    for name, data in image_files(variant, suffix, **options).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root, root / f"c0/04.{suffix}"


def hdf5(folder: Path, variant: int, **options: Any) -> tuple[Path, Path]:
    path = folder / "damaged.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=pixels_of(variant), **options)
        file.create_dataset("labels", data=labels(variant))
    return one(path)


def parquet(folder: Path, variant: int, suffix: str = "png") -> tuple[Path, Path]:
    path = folder / "damaged.parquet"
    rows = [{"bytes": data, "path": name} for name, data in sorted(image_files(variant, suffix).items())]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": rows, "label": labels(variant)}), path, row_group_size=10
    )
    return one(path)


def features(folder: Path, variant: int) -> tuple[Path, Path]:
    flat = (pixels_of(variant).reshape(COUNT, -1) / 255).astype(np.float32)
    return one(write_features(folder / "damaged.h5", flat))


def write_features(path: Path, pool: NDArray[Any]) -> Path:
    from evalkit.extractors.pixels import Pixels as Extractor
    from evalkit.features.record import Features

    Features(
        name="x",
        digest="0" * 64,
        network="inception",
        extractor="pixels",
        fingerprint=Extractor("all").fingerprint,
        image_shape=(SIZE, SIZE, 3),
        arrays={"pool": pool, "spatial": pool[:, :12].copy()},
        labels=np.asarray(labels(0)),
    ).save(path)
    return path


def statistics(folder: Path, variant: int) -> tuple[Path, Path]:
    path = folder / "damaged.npz"
    arrays: dict[str, Any] = {}
    for suffix, d in (("", 2048), ("_s", 2023)):
        arrays |= {
            f"mu{suffix}": np.full(d, variant, np.float32),
            f"sigma{suffix}": np.eye(d, dtype=np.float16),
        }
    np.savez_compressed(path, **arrays, provenance=np.array(json.dumps({"statistics": {"images": 50_000}})))
    return one(path)


def statistics_of_edm2(folder: Path, variant: int) -> tuple[Path, Path]:
    path = folder / "damaged.pkl"
    fid = {"mu": np.full(2048, variant, np.float32), "sigma": np.eye(2048, dtype=np.float16)}
    path.write_bytes(pickle.dumps({"num_images": 50_000, "fid": fid}, protocol=2 + 2 * variant))
    return one(path)


def features_of_clean_fid(folder: Path, variant: int) -> tuple[Path, Path]:
    path = folder / "damaged.npz"
    rows = np.random.default_rng(variant).random((COUNT, 2048)).astype(np.float32)
    np.savez_compressed(path, feats=rows)
    return one(path)


# ----------------------------------------------------------------------------------- independent readers


def decoded(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))[..., :3]


def read_npz(path: Path) -> Pixels:
    # Of its bytes, because NumPy leaves a damaged file open.
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return np.asarray(arrays["arr_0"])


def read_npy(path: Path) -> Pixels:
    return np.asarray(np.load(io.BytesIO(path.read_bytes()), allow_pickle=False))


def read_folder(path: Path) -> Pixels:
    return np.stack([decoded(file.read_bytes()) for file in sorted(path.glob("*/*.*"))])


def read_zip(path: Path) -> Pixels:
    suffixes = (".png", ".bmp", ".jpg", ".tif", ".webp", ".ppm", ".jpeg", ".tiff")
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:
        return np.stack(
            [decoded(file.read(name)) for name in sorted(file.namelist()) if name.lower().endswith(suffixes)]
        )


def read_tar(path: Path) -> Pixels:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as file:
        members = sorted((info for info in file if info.isreg()), key=lambda info: info.name)
        contents = []
        for info in members:
            member = file.extractfile(info)
            assert member is not None
            contents.append(decoded(member.read()))
        return np.stack(contents)


def read_hdf5(path: Path) -> Pixels:
    with h5py.File(path) as file:
        names = [name for name in file if getattr(file[name], "ndim", 0) == 4]
        return np.asarray(file["images" if "images" in file else names[0]][()])


def read_parquet(path: Path) -> Pixels:
    rows = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes())).column(0).to_pylist()
    return np.stack([decoded(row["bytes"]) for row in rows])


def read_features(path: Path) -> Pixels:
    """(n, 192) features in the place of pixels."""
    with h5py.File(path) as file:
        return np.asarray(file["arrays/pool"][()])


# ------------------------------------------------------------------------------- records, weights, recipes


def results(folder: Path, variant: int) -> tuple[Path, Path]:
    from evalkit.results import Point, Sweep

    (folder / "sweep").mkdir()
    path = folder / "sweep/results.json"
    scales = (0.0, 1.0, 4.0)
    points = tuple(Point(scale=scale, comparison=_comparison(variant + scale)) for scale in scales)
    path.write_text(Sweep(name="m", points=points, settings={"count": 2}).to_json())
    return path.parent, path


def _comparison(value: float) -> Any:
    from evalkit.batches import Batch
    from evalkit.results import Comparison, PublishedRow, Score, ScoreSpec

    side = Batch(
        name="a.npz",
        images=24,
        image_shape=(8, 8, 3),
        digest="0" * 64,
        statistics="images",
        features="extracted",
    )
    names = ("inception_score", "fid", "sfid", "precision", "recall")
    return Comparison(
        specs=tuple(ScoreSpec(name=name, title=name, higher_is_better=False) for name in names),
        scores=tuple(
            Score(name=name, value=value + index, std=0.1, parameters={"k": 3})
            for index, name in enumerate(names)
        ),
        missing={},
        protocol="adm",
        reference=side,
        samples=side,
        extractors={"inception": {"name": "pixels", "fingerprint": "0" * 64}},
        warnings=("few images",),
        published=(
            PublishedRow(dataset="d", model="m", scores={"fid": 2.0}, images=50_000, paper="p", table=1),
        ),
    )


def network() -> Any:
    torch.manual_seed(0)
    built = TINY.build("cpu")
    for parameter in built.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return built


def checkpoint(folder: Path, variant: int, **options: Any) -> tuple[Path, Path]:
    path = folder / "damaged.pt"
    state = {name: tensor + variant for name, tensor in network().state_dict().items()}
    torch.save(state, path, **options)
    return one(path)


def safetensors(folder: Path, variant: int) -> tuple[Path, Path]:
    from generation.checkpoints import save_network

    path = folder / "damaged.safetensors"
    save_network({name: tensor + variant for name, tensor in network().state_dict().items()}, TINY, path)
    return one(path)


def recipe(folder: Path, variant: int) -> tuple[Path, Path]:
    path = folder / "damaged.toml"
    path.write_text(RECIPE.replace("seed = 0", f"seed = {variant}"))
    return one(path)


def class_text(folder: Path, variant: int) -> tuple[Path, Path]:
    path = folder / "classes.txt"
    path.write_text("".join(f"{(index + variant) % CLASSES}\n" for index in range(2)))
    return one(path)


def class_npy(folder: Path, variant: int) -> tuple[Path, Path]:
    np.save(folder / "classes.npy", labels(variant)[:2])
    return one(folder / "classes.npy")


# Files that a run leaves and reads again. They are made by that run; see Setup in test_fuzz_files.


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def malicious_files(folder: Path, marker: Path) -> dict[str, Path]:
    """The same attack in every container that could hold a pickle."""
    attack = Malicious(marker)
    pickled = pickle.dumps(attack)
    found = {
        "plain.pt": pickled,
        "old-protocol.pt": b"\x80\x02" + pickle.dumps(attack, 0),
        "state.pt": pickle.dumps({"a": attack}),
    }
    files = {}
    for name, data in found.items():
        files[name] = folder / name
        files[name].write_bytes(data)
    files["zip.pt"] = folder / "zip.pt"
    torch.save({"a": torch.zeros(2)}, files["zip.pt"])
    with zipfile.ZipFile(files["zip.pt"]) as sound:
        members = {name: sound.read(name) for name in sound.namelist()}
    with zipfile.ZipFile(files["zip.pt"], "w") as out:
        for name, data in members.items():
            out.writestr(name, pickled if name.endswith("data.pkl") else data)
    files["legacy.pt"] = folder / "legacy.pt"
    torch.save({"a": torch.zeros(2)}, files["legacy.pt"], _use_new_zipfile_serialization=False)
    sound_legacy = files["legacy.pt"].read_bytes()
    files["legacy.pt"].write_bytes(sound_legacy[: sound_legacy.rindex(b"\x80\x02}")] + pickled)
    objects = np.array([attack, attack], object)
    files["objects.npz"], files["objects.npy"] = folder / "objects.npz", folder / "objects.npy"
    np.savez(files["objects.npz"], arr_0=objects)
    np.save(files["objects.npy"], objects)
    files["labels.npz"] = folder / "labels.npz"
    np.savez(files["labels.npz"], arr_0=pixels_of(0), arr_1=objects, provenance=objects, mu=objects)
    files["lying.npz"] = folder / "lying.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (2,)})
    with zipfile.ZipFile(files["lying.npz"], "w") as out:
        out.writestr("arr_0.npy", header.getvalue() + pickled)
    files["pickle.toml"] = folder / "pickle.toml"
    files["pickle.toml"].write_bytes(pickled)
    files["pickle.safetensors"] = folder / "pickle.safetensors"
    files["pickle.safetensors"].write_bytes(struct.pack("<Q", len(pickled)) + b"{" + pickled)
    return files


# -------------------------------------------------------------------------------------------------- kinds

READ_IMAGES = (
    "compare {ref} {in} --metrics fid --format json",
    "reference convert {in} {out}/x.npz",
)
ALSO_READ_IMAGES = (
    "features {in} -o {out}/x.h5",
    "stats {in} -o {out}/x.npz",
    "reference show {in} --check",
    "reference show {in} --check --grid {out}/x.png",
    "reference build {in} -o {out}/x.npz --size 8 --statistics none",
    "reference build {in} -o {out}/x.npz --size 8 --statistics none --skip-bad",
    "reference build {in} -o {out}/x.npz --size 8 --statistics kept --images 5 --skip-bad",
    "reference convert {in} {out}/x.zip",
    "reference convert {in} {out}/x",
    "compare {in} {ref}",
    "compare {in} {ref} --format markdown --subset 9",
    "train diffusion {in} --recipe {recipe} --steps 1 --out {run}",
)
SAMPLE = "sample --model {weights} --respacing 2 -n 2 --device cpu --out {run}"
TRAIN = "train diffusion {ref} --recipe {in} --steps 1 --device cpu --out {run}"
INSPECT = ("checkpoint inspect {in}",)
CONVERT = (
    "checkpoint convert {in} {out}/x.safetensors --preset tiny",
    "checkpoint convert {in} {out}/x.safetensors --preset tiny --half",
    "checkpoint convert {in} {out}/x.safetensors",
    "sample --model {in} --respacing 2 -n 2 --device cpu --out {run}",
)


def _images(
    name: str, make: Any, read: Any, *, checked: bool = False, special: tuple[Mutation, ...] = ()
) -> Kind:
    return Kind(name, make, READ_IMAGES, ALSO_READ_IMAGES, special, read, checked)


def _folder_of(
    suffix: str, special: tuple[Mutation, ...] = (), *, checked: bool = False, **options: Any
) -> Kind:
    def make(folder: Path, variant: int) -> tuple[Path, Path]:
        return image_folder(folder, variant, suffix, **options)

    return _images(
        f"folder of {suffix}{' ' if options else ''}{' '.join(map(str, options.values()))}",
        make,
        read_folder,
        checked=checked,
        special=special,
    )


KINDS = (
    _images("npz", npz, read_npz, checked=True, special=(zip_repaired, npy_header)),
    _images(
        "npz deflated",
        lambda folder, variant: npz(folder, variant, save=np.savez_compressed),
        read_npz,
        checked=True,
        special=(zip_repaired,),
    ),
    _images("npy", npy, read_npy, special=(npy_header,)),
    _images("zip of png", lambda f, v: archive(f, v, "png"), read_zip, checked=True, special=(zip_repaired,)),
    _images(
        "zip of bmp, deflated",
        lambda f, v: archive(f, v, "bmp", compression=zipfile.ZIP_DEFLATED),
        read_zip,
        checked=True,
        special=(zip_repaired,),
    ),
    _images("tar of png", lambda f, v: tar(f, v, "png"), read_tar),
    _images("tar of bmp", lambda f, v: tar(f, v, "bmp"), read_tar),
    _images("tar.gz of bmp", lambda f, v: tar(f, v, "bmp", mode="w:gz"), read_tar, checked=True),
    _folder_of("png", (png_repaired,), checked=True),
    _folder_of("jpg", quality=95),
    _folder_of("webp", lossless=True),
    _folder_of("tif"),
    _folder_of("tif", compression="tiff_lzw"),
    _folder_of("bmp"),
    _folder_of("ppm"),
    _images("hdf5", hdf5, read_hdf5),
    _images("hdf5 in chunks", lambda f, v: hdf5(f, v, chunks=(5, 8, 8, 3), compression="gzip"), read_hdf5),
    _images("parquet", parquet, read_parquet),
    Kind(
        "features",
        features,
        ("compare {ref} {in} --metrics fid --format json",),
        (
            "compare {in} {ref}",
            "stats {in} -o {out}/x.npz",
            "features {in} -o {out}/x.h5",
            "compare {ref} {in} --format markdown --subset 9",
        ),
        read=read_features,
        checked=True,
    ),
    Kind(
        "statistics",
        statistics,
        ("reference show {in} --check",),
        ("features {in} -o {out}/x.h5", "stats {in} -o {out}/x.npz", "reference convert {in} {out}/x.npz"),
        (zip_repaired,),
    ),
    Kind(
        "statistics of EDM2",
        statistics_of_edm2,
        ("reference show {in} --check",),
        ("stats {in} -o {out}/x.npz --as jit", "reference convert {in} {out}/x.npz --as jit"),
    ),
    Kind(
        "features of clean-fid",
        features_of_clean_fid,
        ("stats {in} -o {out}/x.npz --as clean-fid",),
        ("features {in} -o {out}/x.h5", "reference show {in} --check"),
        (zip_repaired,),
    ),
    Kind("results.json", results, ("curves {in} -o {out}/x.svg",), (), (json_value,)),
    Kind("checkpoint", checkpoint, INSPECT, CONVERT, (zip_repaired,)),
    Kind(
        "checkpoint, legacy",
        lambda f, v: checkpoint(f, v, _use_new_zipfile_serialization=False),
        INSPECT,
        CONVERT,
    ),
    Kind("safetensors", safetensors, INSPECT, CONVERT, (safetensors_header,)),
    Kind("recipe", recipe, (TRAIN,), (), (toml_value, toml_value)),
    Kind("classes as text", class_text, (f"{SAMPLE} --classes {{in}}",)),
    Kind("classes as npy", class_npy, (f"{SAMPLE} --classes {{in}}",), (), (npy_header,)),
)


# Files that a command leaves and reads again: the command makes them, and then resumes.


@dataclass(frozen=True)
class Left:
    """A file that a run leaves for its continuation.

    Attributes:
        name: Of the kind.
        begin: The command that leaves it.
        go_on: The command that reads it.
        file: Where it is, in the output's folder.
        remove: What is deleted before, so that there is something to resume.
        result: What the command makes in the end: the same bytes as undamaged. None: not looked at.
        special: Mutations that know this kind.
    """

    name: str
    begin: str
    go_on: str
    file: str
    remove: tuple[str, ...] = ()
    result: str | None = None
    special: tuple[Mutation, ...] = ()


BUILD = "reference build {bad} -o {out}/x.npz --size 8 --statistics all --workers 1"
SWEEP = (
    "sweep --model {weights} --scales 0 --respacing 2 -n 2 --device cpu --reference {ref} --out {run} "
    "--protocol exact"
)
LEFT = (
    Left(
        "build: settings.json",
        BUILD,
        f"{BUILD} --skip-bad",
        "x.npz.building/settings.json",
        (),
        "x.npz",
        (json_value,),
    ),
    Left(
        "build: state.npz",
        BUILD,
        f"{BUILD} --skip-bad",
        "x.npz.building/state.npz",
        (),
        "x.npz",
        (zip_repaired,),
    ),
    Left("build: pixels", BUILD, f"{BUILD} --skip-bad", "x.npz.building/pixels"),
    Left(
        "sample: manifest.json",
        SAMPLE,
        SAMPLE,
        "run/manifest.json",
        ("run/samples_2x8x8x3.npz",),
        "run/samples_2x8x8x3.npz",
        (json_value,),
    ),
    Left("sweep: results.json", SWEEP, SWEEP, "run/results.json", (), None, (json_value,)),
    Left("sweep: comparison.json", SWEEP, SWEEP, "run/scale-0.0/comparison.json", (), None, (json_value,)),
    Left("sweep: samples", SWEEP, SWEEP, "run/scale-0.0/samples_2x8x8x3.npz", (), None, (zip_repaired,)),
    Left(
        "train: checkpoint.pt",
        "train diffusion {ref} --recipe {recipe} --steps 1 --device cpu --out {run}",
        "train diffusion {ref} --recipe {recipe} --steps 2 --device cpu --out {run}",
        "run/checkpoint.pt",
        (),
        None,
        (zip_repaired,),
    ),
)
