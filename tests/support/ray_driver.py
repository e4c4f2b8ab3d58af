"""A process with a private Ray, one worker of which is stopped: run with a folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_works import Order, Orders

from evalkit.system.engine import WorkerState
from evalkit.system.ray_engine import ray_engine


def main(folder: Path) -> None:
    def watch(states: Sequence[WorkerState]) -> None:
        for state in states:
            if state.done == 4:
                (folder / "worker").write_text(str(state.pid))
                (folder / "seen").touch()

    with ray_engine(watch=watch) as engine:
        list(engine.map(Orders(), [Order("stop once", 8, folder)]))


if __name__ == "__main__":
    # Ignored where the tests run in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]))
