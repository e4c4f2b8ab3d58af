"""One holder at a time, even where each removes the lock file."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evalkit.errors import OutputError
from evalkit.system.locks import exclusive_lock


@pytest.mark.parametrize("remove", [False, True])
def test_one_at_a_time(tmp_path: Path, remove: bool) -> None:
    path = tmp_path / "lock"
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(10):
            with exclusive_lock(path, "testing", wait=True):
                inside.append(1)
                time.sleep(0.001)
                most.append(len(inside))
                inside.pop()
                if remove:
                    path.unlink()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40
    assert not (remove and path.exists())


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from evalkit.system.locks import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), 'testing'): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        refused = pytest.raises(OutputError, match=r"Another process is building x\.npz\. Wait for it")
        with refused, exclusive_lock(path, "building x.npz"):
            pass
        child.kill()
    with exclusive_lock(path, "building x.npz"):
        pass


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="Cannot write"),
        exclusive_lock(tmp_path / "file" / "lock", "testing"),
    ):
        pass
