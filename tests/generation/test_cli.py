"""The command lines of sampling: what they make, and what they refuse in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sampling_runs import images_of, interrupting

from evalkit.system.engine import Inline

pytestmark = pytest.mark.usefixtures("one_thread")


def test_command_line(
    files: dict[str, Path], expected: Path, base: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    model = ("--model", files["unet"], "--classifier", files["classifier"], "--respacing", "4")
    grid = tmp_path / "grid.png"
    result = run(
        *("sample", *model, "-n", 7, "--scale", 30, "--shard-size", 3, "--out", tmp_path / "run"),
        *("--grid", grid),
    )
    assert result.code == 0
    with Image.open(grid) as picture:
        assert picture.mode == "RGB"
        description = f"The first 7 of the 7 samples in {expected.name}."
        assert picture.text == {"Title": f"Samples of {expected.name}", "Description": description}
    assert result.out == f"{tmp_path / 'run' / expected.name}: 7 samples\n"
    assert "7 samples of 8x8, 4 steps each" in result.err
    assert re.search(r"images/s on cpu: \d:\d\d:\d\d left", result.err)
    assert np.abs(images_of(tmp_path / "run" / expected.name) - images_of(expected)).max() <= 1

    result = run(
        "upsample", base, "--model", files["upsampler"], "--respacing", "ddim4", "--out", tmp_path / "up"
    )
    assert result.code == 0
    provenance = json.loads((tmp_path / "up" / "manifest.json").read_text())
    assert provenance["settings"]["sampler"] == {"name": "ddim", "eta": 0.0}

    result = run("precision-check", *model, "-n", 2, "--precision", "fast")
    assert result.code == 0
    assert "2 images: mean difference" in result.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "imagenet9"), "no sampling preset 'imagenet9'"),
        (("--preset", "imagenet64"), "evalkit checkpoint fetch 64x64_diffusion"),
        (("--preset", "upsample-64-256"), "use `evalkit upsample`"),
        ((), "Give --preset NAME or --model FILE"),
        (("--model", "UNET", "--scale", "1"), "needs a classifier"),
        (("--model", "UNET", "--guidance-steps", "5"), "'5' is not understood"),
        (("--model", "UNET", "--batch-size", "many"), "'many'"),
        (("--model", "UNET", "--respacing", "2000"), "asks for 2000 steps"),
        (("--model", "UNET", "--precision", "quick"), "'quick'"),
        (("--model", "UNET", "--preset", "imagenet64"), "unet"),
        (("--model", "UNET", "--grid", "no/grid.png"), "no folder"),
        (("--model", "UNET", "-n", "0"), "0 samples"),
        (("--model", "UNET", "--scale", "much"), "much"),
        (("--model", "UNET", "--sampler-option", "eta"), "expected NAME=VALUE"),
        (("--model", "UNET", "--sampler-option", "eta=0.5"), "eta is a parameter of ddim"),
        (("--model", "UNET", "--sampler", "ddim", "--sampler-option", "eta=x"), "eta is 'x'"),
        (("--model", "UNET", "--sampler", "ddim", "--sampler-option", f"eta={'9' * 5000}"), "eta is '9"),
        (("--model", "UNET", "--shard-size", "0"), "shard-size 0"),
        (("--model", "UNET", "--seed", "-1"), "seed -1"),
        (("--model", "UNET", "--classes", "9" * 22), "--classes"),
        (("--model", "UNET", "--batch-size", "9" * 5000), "--batch-size"),
        (("--model", "UNET", "--guidance-steps", f"0:{'9' * 5000}"), "--guidance-steps"),
        *(
            (("--model", "UNET", option, ""), option)
            for option in (
                *(
                    "--preset",
                    "--model",
                    "--classifier",
                    "--device",
                    "--sampler",
                    "--sampler-option",
                    "--seed",
                ),
                *("--scale", "--guidance-steps", "--classes", "--out", "--precision", "--grid"),
                *("--batch-size", "--shard-size"),
            )
        ),
    ],
)
def test_command_line_bad_input(
    options: tuple[str, ...], message: str, files: dict[str, Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    options = tuple(str(files["unet"]) if option == "UNET" else option for option in options)
    result = run("sample", "-n", 3, "--out", tmp_path / "run", *options)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 1000
    assert not (tmp_path / "run").exists()


def test_empty_respacing_is_all_steps(
    files: dict[str, Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--model", files["unet"], "-n", 1, "--respacing", "", "--out", tmp_path / "run")
    result = run("sample", *options)
    assert result.code == 0
    assert "1000 steps each" in result.err


def test_command_line_interrupted(
    files: dict[str, Path], run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "generation.cli.sample.open_engine", lambda *_: nullcontext((Inline(), interrupting(1, 0.1)))
    )
    options = ("--model", files["unet"], "--respacing", "4", "--shard-size", 2)
    result = run("sample", "-n", 5, "--out", tmp_path / "run", *options)
    assert result.code == 130
    assert "run the same command again" in result.err
