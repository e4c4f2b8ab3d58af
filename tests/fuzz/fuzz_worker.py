"""The process that runs the command line on damaged files: one for many inputs, with limited memory.

Run as a script. It reads a request a line, ``{"arguments": [...], "cache": ...}``, and answers with a line.
What commands and libraries print goes to the files that its arguments name.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

MEMORY = 4 * 2**30
FILES = 2 * 2**30
"""Largest file: a header that announces terabytes must not fill the disk of who runs the tests."""

# Modules that commands load when they need them. They are loaded before memory is limited and measured.
LOADED = (
    "evalkit.cli.root",
    "evalkit.comparison",
    "evalkit.report.plot",
    "evalkit.report.text",
    "generation.cli.checkpoint",
    "generation.cli.sample",
    "generation.cli.sweep",
    "generation.cli.train",
    "generation.sample",
    "generation.sweep",
    "generation.train",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pyarrow.parquet",
    "reference_batches.build",
    "reference_batches.cli",
    "reference_batches.convert",
    "reference_batches.show",
    "scipy.linalg",
    "scipy.sparse.linalg",
)


def stand_ins() -> None:
    """Pixels instead of Inception features, all of an 8x8 image; short grids; a small published network."""
    import torch
    from fuzz_inputs import TINY
    from stand_ins import InceptionPixels as Pixels

    from evalkit.cli.options import ExtractorSetup
    from generation import presets, train

    class AllPixels(Pixels):
        """No byte of a small image goes unseen."""

        network = "inception"
        outputs = {"pool": 192, "spatial": 12}  # noqa: RUF012 - as the class it stands for

        def __call__(self, images: Any) -> Any:
            return {"pool": self._grid(images, 8), "spatial": self._grid(images, 2)}

    extractor = AllPixels("all")
    ExtractorSetup.extractor = lambda self, network=None: extractor  # type: ignore[method-assign,assignment,return-value]
    train.GRID_STEPS = 2
    models = {"tiny": TINY, **presets.MODELS}
    for module in ("generation.presets", "generation.checkpoints"):
        importlib.import_module(module).MODELS = models
    torch.set_num_threads(1)


def status(key: str) -> int:
    """A size of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def run(arguments: list[str], cache: str) -> dict[str, Any]:
    """One command; its exit code, or the traceback of what escaped."""
    from evalkit.cli.root import main

    os.environ["EVALKIT_CACHE"] = cache
    sys.argv = ["evalkit", *arguments]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = status("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    code, escaped = None, None
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        escaped = traceback.format_exc()
    ended = resource.getrusage(resource.RUSAGE_SELF)
    sys.stdout.flush()
    sys.stderr.flush()
    return {
        "code": code,
        "traceback": escaped,
        "memory": max(0, status("VmHWM") - before),
        "seconds": ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime,
    }


def serve(out: str, err: str, stacks: str) -> None:
    """Answer requests until there are no more."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    stacks_file = Path(stacks).open("w")  # noqa: SIM115 - for as long as the process lives
    faulthandler.enable(stacks_file)
    faulthandler.register(signal.SIGUSR1, stacks_file)
    for module in LOADED:
        importlib.import_module(module)
    stand_ins()
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in requests:
        for descriptor in (1, 2):
            os.truncate(descriptor, 0)
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
