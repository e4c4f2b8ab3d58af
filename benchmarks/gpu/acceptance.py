r"""Acceptance tests and benchmarks that need a GPU, in one run: correctness and speed.

    python benchmarks/gpu/acceptance.py --out results.json
    python benchmarks/gpu/acceptance.py --stage machine --stage extraction

It runs from a checkout without installation, and needs only evalkit's own dependencies. Each stage is a
separate process with a time limit, so that a stage that fails or hangs does not affect the others. Every
result is a line of JSON, printed as soon as it is known; a table of all results comes last. Stages that were
never measured run first. With EVALKIT_TEST_DATA, golden values of CIFAR-10 are checked, too.

Without a GPU, stages run on the CPU to test their own checks. With fewer images, they also run on a simulated
GPU, except where CUDA graphs are needed:

    export EVALKIT_ACCEPTANCE_DEVICE=cpu EVALKIT_ACCEPTANCE_DIVISOR=100
    python benchmarks/gpu/acceptance.py --stage bars

A borrowed GPU
--------------

The machine may be available only for minutes, have no network, and accept and return only small files. Bring
missing packages in a folder. EVALKIT_WEIGHTS names the Inception weights; split them into pieces FILE.00,
FILE.01 and so on, which this script joins:

    pip install --target packages --no-deps cattrs          # here
    split -b 29M -d default_1.pt weights.pt.                # here
    export PYTHONPATH=packages EVALKIT_WEIGHTS=weights.pt   # there
    python benchmarks/gpu/acceptance.py --out results.json  # there

In a second run, name the stages that were not reached. Use the remaining time to train on CIFAR-10, over
several sessions. train.parquet has the JPEG files of the training images in a column ``image`` and their
classes in a column ``label``, 46 MB. Resume with the same number of steps, because the learning rate falls to
zero at the last one. An interrupt finishes the current step and saves:

    split -b 29M -d train.parquet train.parquet.            # here
    cat train.parquet.?? > train.parquet                    # there
    mkdir diffusion; cat checkpoint.pt.?? > diffusion/checkpoint.pt  # there, from the second time on
    timeout -s INT 400 python -m evalkit train diffusion train.parquet --recipe cifar10_diffusion \
        --batch-size 512 --steps 15000 --save-every 500 --out diffusion
    split -n 4 -d diffusion/checkpoint.pt checkpoint.pt.    # there: four pieces of 16 MB, to bring back

15,000 steps are 154 epochs, some 16 minutes at the speed in docs/performance.md. At the end,
diffusion/cifar10_diffusion.safetensors has the averaged weights, 16 MB. Train the classifier in the same way,
in another folder: ``train classifier``, ``--recipe cifar10_classifier --batch-size 512 --steps 6000``. Then
run the sweep in a separate session. It can also be resumed; samples take 15 MB per scale:

    timeout -s INT 500 python -m evalkit sweep --model diffusion/cifar10_diffusion.safetensors \
        --classifier classifier/cifar10_classifier.safetensors --classes balanced --sampler ddpm \
        --scales 0,0.5,1,2,4,8,16 -n 5000 --precision fast --batch-size 500 --shard-size 500 \
        --reference train.parquet --extractor-precision bfloat16 --out sweep
    tar -c sweep | split -b 15M -d - sweep.tar.             # there, to bring back
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[2]

LIMITS = {
    "machine": 40,
    "verify": 45,
    "convolutions": 60,
    "bars": 90,
    "evaluator": 75,
    "networks": 75,
    "compare": 170,
    "kernels": 75,
    "sampling512": 75,
    "convolutions-tuned": 45,
    "workers": 60,
    "sampling": 120,
    "extraction": 90,
    "values": 60,
    "neighbours": 30,
    "rates-tuned": 30,
    "rates": 40,
    "sizes": 100,
    "training": 60,
}
"""Time limit of each stage in seconds, in the order in which they run: stages never measured come first."""


def joined(weights: str, folder: Path) -> str:
    """The path of the weights, joined from pieces where there are any."""
    pieces = sorted(Path(weights).parent.glob(Path(weights).name + ".[0-9][0-9]"))
    if not pieces:
        return weights
    whole = folder / "weights.pt"
    with whole.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    return str(whole)


def run_stage(name: str, seconds: float, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run a stage, print its lines as they come, and return its results."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "stages.py"), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    results, other = [], []
    assert process.stdout is not None
    for line in process.stdout:
        try:
            results.append({"stage": name} | json.loads(line))
            print(json.dumps(results[-1]), flush=True)
        except (json.JSONDecodeError, TypeError):
            other.append(line)
    code = process.wait()
    timer.cancel()
    took = time.monotonic() - begin
    if code:
        ended = f"stopped after {seconds:.0f} s" if took >= seconds else f"ended with {code}"
        results.append({"stage": name, "what": ended, "error": "".join(other[-25:])[-3000:]})
        print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"stage": name, "what": "stage", "seconds": round(took, 1)}), flush=True)
    return results


@click.command()
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(LIMITS)), help="By default all.")
@click.option("--seconds", default=480.0, show_default=True, help="Start no stage after so many seconds.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the results here as well, as JSON.")
def main(stages: tuple[str, ...], seconds: float, out: Path | None) -> None:
    """Run the stages, and print every result as JSON and then all of them as a table."""
    begin = time.monotonic()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "EVALKIT_CACHE": str(Path(folder) / "cache"),
        }
        if weights := os.environ.get("EVALKIT_WEIGHTS"):
            environment["EVALKIT_WEIGHTS"] = joined(weights, Path(folder))
        for name in stages or LIMITS:
            left = seconds - (time.monotonic() - begin)
            if left < 10:
                print(json.dumps({"stage": name, "what": "no time left"}), flush=True)
                continue
            results += run_stage(name, min(LIMITS[name], left), environment)
            if out is not None:
                out.write_text(json.dumps(results, indent=1))
    print("\n| stage | what | value | |\n|---|---|---|---|")
    for result in results:
        names = ("stage", "what", "kernel", "value", "error")
        words = ", ".join(f"{key} {value}" for key, value in result.items() if key not in names)
        what = result.get("what", result.get("kernel"))
        print(f"| {result['stage']} | {what} | {result.get('value', '')} | {words} |")


if __name__ == "__main__":
    main()
