"""Workers of a private Ray: results as of one process, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optional import optional
from patience import SECONDS, until
from ray_works import Order, Orders, Overlapping

from evalkit.errors import InputError, MissingDependencyError, WorkerError
from evalkit.system import ray_engine as engines
from evalkit.system import ray_worker
from evalkit.system.engine import Done, Inline, Pending, Pulse, WorkerState
from evalkit.system.ray_engine import ray_engine
from evalkit.system.ray_worker import Driver, Worker

HOST = socket.gethostname()
SUPPORT = Path(__file__).parent.parent / "support"
ROOT = SUPPORT.parent.parent


class Watched:
    """An engine, and a rule of a test that is called with each state of each of its workers."""

    def __init__(self) -> None:
        self.rule: Callable[[WorkerState], object] = lambda _: None
        self.engine: Any = None

    def see(self, states: Sequence[WorkerState]) -> None:
        for state in states:
            self.rule(state)

    def map(self, *arguments: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        return self.engine.map(*arguments, **options)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    optional("ray", "cluster")
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with ray_engine(watch=watched.see) as watched.engine:
            yield watched


@pytest.fixture
def engine(private: Watched) -> Iterator[Watched]:
    yield private
    private.rule = lambda _: None
    private.engine.stall = engines.STALL_SECONDS


# --------------------------------------------------------------------------------------------- as one process


def test_results_are_those_of_one_process(engine: Watched) -> None:
    orders = [Order("square", number) for number in range(20)]
    reports: list[float] = []
    expected = dict(Inline().map(Orders(), orders))
    found = list(engine.map(Orders(), orders, reports.append))
    assert sorted(index for index, _ in found) == list(range(20))
    for index, result in found:
        np.testing.assert_array_equal(result["square"], expected[index]["square"])
        assert result["square"].flags.writeable
        assert result["number"] == index
    assert reports[-1] == sum(range(20))


def test_workers_are_like_this_process(engine: Watched) -> None:
    [(_, there)] = engine.map(Orders(), [Order("where")])
    assert there["pid"] != os.getpid()
    assert there["threads"] == torch.get_num_threads()
    assert there["OMP_NUM_THREADS"] == str(torch.get_num_threads())
    assert there["niceness"] == os.nice(0)
    assert there["RAY_USAGE_STATS_ENABLED"] == "0"


def test_nothing_is_written_at_home(engine: Watched) -> None:
    """Such as a token, which every other Ray would then use."""
    assert list(engine.map(Orders(), [Order("square", 2)]))
    assert list(Path.home().iterdir()) == []


def test_workers_are_kept_for_the_next_work(engine: Watched) -> None:
    [(_, one)] = engine.map(Orders("one"), [Order("where")])
    known: set[int] = {one["pid"]}
    engine.rule = lambda state: known.add(state.pid)
    assert list(engine.map(Orders("one"), [])) == []
    [(_, other)] = engine.map(Orders("other"), [Order("where")])
    assert other["pid"] in known


def test_items_are_taken_when_someone_is_free(engine: Watched) -> None:
    workers = max(1, engines.cores() // torch.get_num_threads())
    taken = done = 0
    ahead = []

    def items() -> Iterator[Order]:
        nonlocal taken
        for number in range(30):
            taken += 1
            ahead.append(taken - done)
            yield Order("square", number)

    for _ in engine.map(Orders(), items()):
        done += 1
    assert (taken, done) == (30, 30)
    # Each has one in hand and one more, and one is being given out.
    assert max(ahead) <= 2 * workers + 1


def test_a_worker_begins_the_next_item_before_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # which a worker sets
    worker = Worker()
    assert worker.load(0, Driver.here("cpu"), pickle.dumps(Overlapping(tmp_path))).failure is None
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(worker.item, 1, 0, pickle.dumps(0))
        until((tmp_path / "begun 0").exists)
        second = pool.submit(worker.item, 2, 1, pickle.dumps(1))
        until(lambda: worker._tasks.qsize() == 1)
        (tmp_path / "both are given").touch()
        assert [pickle.loads(each.result().value) for each in (first, second)] == [0, 1]


def test_a_worker_keeps_to_the_order_of_calls() -> None:
    """Even if the thread of a later call runs first. Needs no Ray."""
    waiting, begun = threading.Event(), list[int]()

    class Turn(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    def begin(item: int, pulse: Pulse) -> Pending[int]:
        begun.append(item)
        return Done(item)

    worker = Worker()
    worker._begin, worker._turn = begin, Turn()
    with ThreadPoolExecutor(2) as pool:
        later = pool.submit(worker.item, 1, 7, pickle.dumps(7))
        until(waiting.is_set)
        earlier = pool.submit(worker.item, 0, 6, pickle.dumps(6))
        assert [pickle.loads(each.result().value) for each in (earlier, later)] == [6, 7]
    assert begun == [6, 7]


def test_one_map_at_a_time(engine: Watched) -> None:
    results = engine.map(Orders(), [Order("square", 1), Order("square", 2)])
    next(results)
    with pytest.raises(RuntimeError, match=r"one map at a time"):
        next(engine.map(Orders(), [Order("square")]))
    assert len(list(results)) == 1


def test_closing_abandons_what_runs(engine: Watched, tmp_path: Path) -> None:
    orders = [Order("square", 7), Order("wait", 1, tmp_path / "never")]
    results = engine.map(Orders(), orders)
    assert next(results)[0] == 0
    results.close()
    assert [(index, there["number"]) for index, there in engine.map(Orders(), [Order("square", 3)])] == [
        (0, 3)
    ]


# --------------------------------------------------------------------------------------------------- failures


def test_killed(engine: Watched, tmp_path: Path) -> None:
    flag, killed = tmp_path / "flag", set[int]()

    def kill(state: WorkerState) -> None:
        if state.state == "working" and state.item == 1 and not killed:
            killed.add(state.pid)
            os.kill(state.pid, signal.SIGKILL)
        elif state.state == "lost" and state.pid in killed:
            flag.touch()

    engine.rule = kill
    orders = [Order("square", 0), Order("wait", 5, flag), Order("square", 2)]
    found = list(engine.map(Orders(), orders))
    assert sorted(index for index, _ in found) == [0, 1, 2]
    assert dict(found)[1] == 5
    assert killed


@pytest.mark.parametrize("how", ["stop once", "hang once", "hold once"])
def test_standing_still(engine: Watched, tmp_path: Path, how: str) -> None:
    lost: list[WorkerState] = []
    reports: list[float] = []

    def rule(state: WorkerState) -> None:
        if state.state == "lost":
            lost.append(state)
            # The worker that takes its place may be slow.
            engine.engine.stall = engines.STALL_SECONDS
        elif state.done == 4 and not lost:
            (tmp_path / "seen").touch()
            engine.engine.stall = 1.0

    engine.rule = rule
    assert list(engine.map(Orders(), [Order(how, 8, tmp_path)], reports.append)) == [(0, 8)]
    [state] = lost
    assert (state.host, state.item, state.done) == (HOST, 0, 4)
    # What it had done is taken back.
    assert reports[:2] == [4, 0]
    assert reports[-1] == 8
    until(lambda: not Path(f"/proc/{state.pid}").exists())


def test_giving_up(engine: Watched, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError, match=r"^orders: item 1 was tried 4 times\.") as caught:
        list(engine.map(Orders(), [Order("square"), Order("die", 6)]))
    text = str(caught.value)
    assert re.search(rf"worker {HOST} \(pid \d+\) died, .* of it was done", text)
    assert text.endswith("run the same command again to resume.")
    assert capfd.readouterr() == ("", "")


def test_giving_up_to_load(engine: Watched, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=rf"dying: worker {HOST} \(pid \d+\) was lost while loading"):
        list(engine.map(Orders("dying", dies_if_there=tmp_path), [Order("square")]))


def test_errors_of_the_work(engine: Watched) -> None:
    with pytest.raises(InputError, match=f"^worker {HOST}: image 3 is bad$"):
        list(engine.map(Orders(), [Order("refuse", 3)]))
    with pytest.raises(InputError, match=f"^worker {HOST}: no such images$"):
        list(engine.map(Orders(refuses=True), [Order("square")]))
    with pytest.raises(ValueError, match=r"^number 4") as caught:
        list(engine.map(Orders(), [Order("break", 4)]))
    assert "in _break" in caught.value.__notes__[0]
    with pytest.raises(WorkerError, match=f"^worker {HOST}: ray_works.UnpicklableError: one and two"):
        list(engine.map(Orders(), [Order("break oddly")]))
    with pytest.raises(WorkerError, match=f"^worker {HOST}: SystemExit: 3"):
        list(engine.map(Orders(), [Order("exit", 3)]))


def test_errors_of_the_items(engine: Watched) -> None:
    def items() -> Iterator[Order]:
        yield Order("square", 1)
        raise InputError("no more")

    with pytest.raises(InputError, match=r"^no more$"):
        list(engine.map(Orders(), items()))


def test_different_versions(engine: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ray_worker.facts
    monkeypatch.setattr(ray_worker, "facts", lambda device: {**real(device), "torch": "1.2.3"})
    with pytest.raises(
        WorkerError, match=rf"^worker {HOST}: torch is {torch.__version__}, not 1.2.3 ".replace("+", r"\+")
    ):
        list(engine.map(Orders("differing"), [Order("square")]))


# ------------------------------------------------------------------------------------------ this process ends


def _processes() -> dict[int, tuple[str, int]]:
    """State and parent of each."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            found[int(stat.parent.name)] = state, int(parent)
    return found


def _descendants(pid: int) -> set[int]:
    processes, found = _processes(), {pid}
    while more := {each for each, (_, parent) in processes.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_stays(tmp_path: Path, how: signal.Signals) -> None:
    """Although one of the workers is stopped, which no word from Ray reaches."""
    optional("ray", "cluster")
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        environment = {
            **os.environ,
            "TMPDIR": folder,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
        }
        driver = subprocess.Popen(
            [sys.executable, str(SUPPORT / "ray_driver.py"), str(tmp_path)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        until((tmp_path / "tried").exists, driver)
        until((tmp_path / "worker").exists, driver)
        worker = int((tmp_path / "worker").read_text())
        until(lambda: _processes()[worker][0] == "T", driver)
        family = _descendants(driver.pid)
        assert worker in family
        driver.send_signal(how)
        driver.wait()
        until(lambda: not any(state != "Z" for pid, (state, _) in _processes().items() if pid in family))
        assert list(Path(folder).iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_what_this_process_has_forked_lives_on() -> None:
    """It holds what this process has open: a log of Ray, and the pipe on whose end the guard waits."""
    optional("ray", "cluster")
    code = (
        "import os, signal, sys\n"
        "from evalkit.system.ray_engine import ray_engine\n"
        "with ray_engine():\n"
        "    child = os.fork()\n"
        "    while not child: signal.pause()\n"
        "os.kill(child, signal.SIGTERM)\n"
        "sys.exit(os.WTERMSIG(os.waitpid(child, 0)[1]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=SECONDS
    )
    assert run.returncode == signal.SIGTERM


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("address", ["", "auto", "ray://host:1", "host", "host:port", ":6379"])
def test_no_address(address: str) -> None:
    optional("ray", "cluster")
    with (
        pytest.raises(InputError, match=f"No address of a Ray cluster: '{address}'. Give HOST:PORT"),
        ray_engine(address),
    ):
        pass


def test_nobody_at_the_address() -> None:
    optional("ray", "cluster")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(InputError, match=f"No Ray cluster at {address}: .*refused"), ray_engine(address):
        pass


def test_another_kind_of_server() -> None:
    """As at the port of Ray's dashboard, where Ray itself would wait for ever."""
    optional("ray", "cluster")
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        with (
            pytest.raises(InputError, match=f"No Ray cluster at {address}: another kind"),
            ray_engine(address),
        ):
            pass
        thread.join()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_bad_stall_seconds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    optional("ray", "cluster")
    monkeypatch.setenv("EVALKIT_STALL_SECONDS", value)
    with pytest.raises(InputError, match=f"EVALKIT_STALL_SECONDS='{value}'"), ray_engine():
        pass


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'evalkit\[cluster\]'"), ray_engine():
        pass


def test_ray_is_in_use(engine: Watched) -> None:
    with pytest.raises(InputError, match=r"already uses Ray"), ray_engine():
        pass


def test_nothing_loads_ray() -> None:
    code = """
import sys
import evalkit
from evalkit.cli.root import main
evalkit.compare
sys.argv = ["evalkit", "--help"]
try:
    main()
except SystemExit:
    print("ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
