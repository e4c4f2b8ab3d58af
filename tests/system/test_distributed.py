"""Processes that share one job: the same result as of one, and none waits for what will not come."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optional import optional
from patience import SECONDS, until
from shared_clock import SharedClock
from stand_ins import NO_STORE
from stand_ins import InceptionPixels as Pixels

from evalkit.comparison import Subset, compare, features_of
from evalkit.errors import InputError, OutputError, WorkerError
from evalkit.features import extraction
from evalkit.features import store as store_module
from evalkit.features.adm_npz import statistics_of
from evalkit.features.record import Features
from evalkit.features.store import StoredBatch
from evalkit.images import open_images
from evalkit.metrics.precision_recall import precision_recall
from evalkit.report.text import adm_lines
from evalkit.system.devices import resolve_device
from evalkit.system.distributed import Team, _candidates
from evalkit.system.processes import world_size
from evalkit.system.run import Run
from evalkit.system.team_engine import Inline

WORKER = Path(__file__).parents[1] / "support" / "comparing_worker.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
COMPARE = ("compare", "ref.npz", "samples.npz", "--json", "out.json", "--format", "adm")
IMAGES = 1000
"""Of each side: 16 shards of 64."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Counting(Pixels):
    """Counts the images it is given."""

    seen = 0

    def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        self.seen += len(images)
        return super().__call__(images)


class Job:
    """Starts processes of one job, which share a store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache = folder / "cache"
        self.log = folder / "log"
        self.files = folder / "ref.npz", folder / "samples.npz"
        generator = np.random.default_rng(0)
        for path in self.files:
            np.savez(path, arr_0=generator.integers(0, 256, (IMAGES, 12, 10, 3), dtype=np.uint8))
        self._torchruns: list[subprocess.Popen[str]] = []
        self._server = subprocess.Popen(
            [sys.executable, WORKER],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        for process in self._torchruns:
            if process.poll() is None:
                process.terminate()
                process.communicate()
        self._server.communicate()

    def ask(self, order: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{json.dumps(order)}\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def clear(self) -> None:
        for path in (self.log, self.cache):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()

    def environment(self, **variables: Any) -> dict[str, str]:
        ours = {"EVALKIT_CACHE": self.cache, "LOG": self.log, "OMP_NUM_THREADS": "1", **variables}
        return os.environ | {key: str(value) for key, value in ours.items()}

    def meet(self, *ranks: int) -> None:
        """A new clock, for these: they are about to be started."""
        SharedClock.create(self.log / "clock", ranks)

    def start(self, rank: int, size: int, *arguments: object, **variables: Any) -> int:
        """One process with torchrun's environment; but nothing ends it when another one fails."""
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "h", "MASTER_PORT": 1}
        order = {
            "arguments": [*map(str, arguments or COMPARE)],
            "environment": self.environment(**ranks, **variables),
            "folder": str(self.folder),
            "out": str(self.log / f"out-{rank}"),
            "err": str(self.log / f"err-{rank}"),
        }
        pid: int = self.ask(order)
        return pid

    def end(self, rank: int, pid: int) -> Result:
        try:
            until(lambda: self.ask(pid) is not None)
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
            raise
        code = self.ask(pid)
        out, err = ((self.log / f"{name}-{rank}").read_text() for name in ("out", "err"))
        # Warnings are about the images, not the job.
        lines = [line for line in err.splitlines(keepends=True) if not line.startswith("warning: ")]
        return Result(code, out, "".join(lines))

    def run(self, size: int, *arguments: object, **variables: Any) -> list[Result]:
        """All ranks of a job, with nobody to end one when another fails."""
        self.meet(*range(size))
        pids = [self.start(rank, size, *arguments, **variables) for rank in range(size)]
        return [self.end(rank, pid) for rank, pid in enumerate(pids)]

    def torchrun(self, *options: str, before: Sequence[str] = (), **variables: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, *TORCHRUN, *options, str(WORKER), *COMPARE],
            cwd=self.folder,
            env=self.environment(TOGETHER=1, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._torchruns.append(process)
        return process

    def extracted(self, rank: int) -> int:
        path = self.log / f"extracted-{rank}"
        return sum(map(int, path.read_text().split())) if path.exists() else 0

    def stored(self) -> dict[str, bytes]:
        """Every array in the store."""
        found = {}
        for path in self.cache.glob("features/*/*.h5"):
            with h5py.File(path) as file:
                for layer, dataset in file.items():
                    found[f"{path.relative_to(self.cache)} {layer}"] = dataset[()].tobytes()
        return found

    def scores(self) -> list[dict[str, Any]]:
        scores: list[dict[str, Any]] = json.loads((self.folder / "out.json").read_text())["scores"]
        return scores


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    job = Job(tmp_path_factory.mktemp("job"))
    yield job
    job.close()


@pytest.fixture
def job(server: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    server.clear()
    monkeypatch.setattr(store_module, "SHARD", 64)
    monkeypatch.setattr(extraction, "GROUP", 3)
    return server


class Alone(NamedTuple):
    out: str
    scores: list[dict[str, Any]]
    stored: dict[str, bytes]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun has it: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with optional("threadpoolctl", "demo").threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> Alone:
    """What this process alone makes of it."""
    comparison = compare(*job.files, extractor=Pixels(), run=Run(store=job.cache / "features"))
    stored = job.stored()
    job.clear()
    return Alone(f"{adm_lines(comparison)}\n", json.loads(comparison.to_json())["scores"], stored)


# The same result --------------------------------------------------------------------------------------


def test_torchrun_gives_what_one_process_gives(job: Job, alone: Alone) -> None:
    torchrun = job.torchrun("--standalone", "--nproc-per-node", "2")
    out, err = torchrun.communicate(timeout=SECONDS)
    assert torchrun.returncode == 0, err
    assert out == alone.out
    assert job.scores() == alone.scores
    assert job.stored() == alone.stored
    assert job.extracted(0) + job.extracted(1) == 2 * IMAGES
    assert min(job.extracted(0), job.extracted(1)) >= 64
    assert "Error" not in err
    assert [path.name for path in job.cache.glob("jobs/*/*")] == ["team"]


def test_three_processes_give_what_one_process_gives(job: Job, alone: Alone) -> None:
    zero, one, two = job.run(3, TOGETHER=1)
    assert zero == (0, alone.out, "")
    assert one == two == (0, "", "")
    assert job.scores() == alone.scores
    assert job.stored() == alone.stored
    assert sum(map(job.extracted, range(3))) == 2 * IMAGES


def test_statistics_of_two_are_the_bits_of_one(job: Job) -> None:
    summed = features_of(
        job.files[0], outputs=(), moments=("pool", "spatial"), extractor=Pixels(), run=NO_STORE
    )
    expected = statistics_of(summed)
    zero, one = job.run(2, "stats", "ref.npz", "-o", "stats.npz", TOGETHER=1)
    assert (zero.code, zero.err) == (0, "")
    assert one == (0, "", "")
    with np.load(job.folder / "stats.npz") as written:
        for key, array in expected.items():
            assert np.array_equal(written[key], array), key
    pool = Pixels()(np.load(job.files[0])["arr_0"])["pool"].astype(np.float64)
    np.testing.assert_allclose(expected["mu"], pool.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(expected["sigma"], np.cov(pool, rowvar=False), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (("--metrics", "fid,sfid"), {"metrics": ["fid", "sfid"]}),
        (("--subset", 300, "--seed", 7), {"subset": Subset(images=300, seed=7)}),
    ],
)
def test_streamed_scores_of_two_are_those_of_one(job: Job, options: Any, settings: Any) -> None:
    expected = compare(*job.files, extractor=Pixels(), run=NO_STORE, **settings)
    results = job.run(2, *COMPARE, *options, TOGETHER=1)
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    assert job.scores() == json.loads(expected.to_json())["scores"]


def test_a_features_file_of_two_is_that_of_one(job: Job) -> None:
    expected = features_of(job.files[1], extractor=Pixels(), run=NO_STORE)
    results = job.run(2, "features", "samples.npz", "-o", "f.h5", TOGETHER=1)
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    written = Features.load(job.folder / "f.h5")
    assert np.array_equal(written.arrays["pool"], expected.arrays["pool"])
    assert np.array_equal(written.arrays["spatial"], expected.arrays["spatial"])


@pytest.mark.parametrize("arithmetic", ["exact", "float16"])
def test_precision_and_recall_in_pieces(monkeypatch: pytest.MonkeyPatch, arithmetic: Any) -> None:
    """The pieces may be done in any order, and by processes that see other screens."""
    generator = np.random.default_rng(1)
    r, s = (generator.standard_normal((900, 24)).astype(np.float32) for _ in range(2))
    expected = precision_recall(r, s, arithmetic=arithmetic)
    monkeypatch.setattr("evalkit.metrics.screening.CPU_TILE", (160, 240))
    counts, calls = {}, []

    class Backwards(Inline):
        def map(self, name: str, count: int, work: Any) -> Any:
            counts[name] = count
            return [work(index) for index in range(count)[::-1]][::-1]

    report = lambda done, total: calls.append((done, total))  # noqa: E731
    assert precision_recall(r, s, arithmetic=arithmetic, progress=report, engine=Backwards()) == expected
    assert list(counts.values()) == [6, 6, 6]
    assert calls[-1] == (2700, 2700)
    calls.clear()
    kept = {}

    class Elsewhere(Inline):
        """Another process did every other piece."""

        def map(self, name: str, count: int, work: Any) -> Any:
            kept[name] = kept.get(name) or [work(index) for index in range(count)]
            return kept[name]

    precision_recall(r, s, arithmetic=arithmetic, engine=Elsewhere())
    assert precision_recall(r, s, arithmetic=arithmetic, progress=report, engine=Elsewhere()) == expected
    assert calls == [(900, 2700), (1800, 2700), (2700, 2700)]


# When one dies, fails or hangs ------------------------------------------------------------------------


def goes_on(job: Job, alone: Alone) -> None:
    """The next run takes what is stored, and gives the same."""
    sizes = [int(path.name[9:17]) - int(path.name[:8]) for path in job.cache.glob("features/*/*.h5")]
    extractor = Counting()
    comparison = compare(*job.files, extractor=extractor, run=Run(store=job.cache / "features"))
    assert 0 < extractor.seen == 2 * IMAGES - sum(sizes) < 2 * IMAGES
    assert json.loads(comparison.to_json())["scores"] == alone.scores


def test_a_killed_worker_ends_the_job_and_the_next_goes_on(job: Job, alone: Alone) -> None:
    torchrun = job.torchrun("--standalone", "--nproc-per-node", "2", TROUBLE="1 10 kill")
    out, err = torchrun.communicate(timeout=SECONDS)
    assert torchrun.returncode != 0
    assert out == ""
    pid = (job.log / "trouble").read_text()
    assert f"Error: Rank 1 (pid {pid} on {socket.gethostname()}) died without reporting an error" in err
    assert "run the same command again" in err
    goes_on(job, alone)


@pytest.mark.parametrize(("dead", "left"), [(1, 0), (0, 1)])
def test_a_death_is_noticed_without_torchrun(job: Job, alone: Alone, dead: int, left: int) -> None:
    """As when the two are on different hosts."""
    results = job.run(2, TROUBLE=f"{dead} 10 kill", TOGETHER=1)
    assert results[dead].code == -signal.SIGKILL
    assert results[left][:2] == (2, "")
    assert f"Rank {dead} (pid " in results[left].err
    assert "died without reporting an error" in results[left].err
    goes_on(job, alone)


def test_a_failure_is_told_to_the_others(job: Job) -> None:
    zero, one = job.run(2, TROUBLE="1 10 fail", TOGETHER=1)
    assert one == (2, "", "Error (rank 1): The moon is in the wrong place.\n")
    assert zero[:2] == (2, "")
    assert zero.err.startswith("Error: Rank 1 (pid ")
    assert "failed: The moon is in the wrong place." in zero.err
    assert zero.err.count("\n") == 1


@pytest.mark.parametrize(
    ("hangs", "how", "left"), [(1, "10 stop", 0), (0, "10 hang", 1), (1, "9 late", 0), (0, "9 late", 1)]
)
def test_a_hanging_worker_is_noticed(job: Job, alone: Alone, hangs: int, how: str, left: int) -> None:
    settings = {"TROUBLE": f"{hangs} {how}", "TOGETHER": 1, "EVALKIT_STALL_SECONDS": 1.5}
    job.meet(0, 1)
    pids = [job.start(rank, 2, **settings) for rank in range(2)]
    noticed = job.end(left, pids[left])
    assert job.ask(pids[hangs]) is None
    os.kill(pids[hangs], signal.SIGKILL)
    job.end(hangs, pids[hangs])
    assert noticed[:2] == (2, "")
    assert f"Rank {hangs} (pid {pids[hangs]} on {socket.gethostname()}) made no progress" in noticed.err
    assert "EVALKIT_STALL_SECONDS" in noticed.err
    goes_on(job, alone)


def test_a_worker_that_waits_for_a_slow_one_is_patient(job: Job, alone: Alone) -> None:
    """Rank 1 takes longer than a stalled process may, and makes progress all the time."""
    results = job.run(2, TROUBLE="1 10 slow", TOGETHER=1, EVALKIT_STALL_SECONDS=1.5)
    assert [result.code for result in results] == [0, 0], results
    assert job.scores() == alone.scores


def test_another_job_that_hangs_over_the_same_work(job: Job) -> None:
    folder = StoredBatch(job.cache / "features", open_images(job.files[1]), Pixels()).folder
    folder.mkdir(parents=True)
    with (folder / "claims.lock").open("ab") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, 5)
        zero, one = job.run(2, TOGETHER=1, EVALKIT_STALL_SECONDS=1.5)
    assert (zero.code, one.code) == (2, 2)
    assert "1 of its files" in zero.err + one.err
    assert "another job with the same work hangs" in zero.err + one.err
    (result, _) = job.run(2)
    assert (result.code, result.err) == (0, "")


def test_a_store_of_somebody_else(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "claims.lock").mkdir()  # it cannot be opened for writing, even by root
    with (
        pytest.raises(OutputError, match=r"Cannot write in .*EVALKIT_CACHE"),
        team(monkeypatch, tmp_path / "jobs") as joined,
    ):
        list(joined.claims(tmp_path / "claims.lock", lambda: [0]))


def test_a_rank_that_never_begins(job: Job, alone: Alone) -> None:
    job.meet(0)
    zero = job.end(0, job.start(0, 2, EVALKIT_STALL_SECONDS=1))
    assert zero[:2] == (2, alone.out)  # the work did not depend on it
    assert "Rank 1 has not begun within 1 s" in zero.err
    assert "EVALKIT_CACHE on one file system" in zero.err
    job.meet(1)
    one = job.end(1, job.start(1, 2, EVALKIT_STALL_SECONDS=1))
    assert one[:2] == (2, "")
    assert "Rank 0 has not begun within 1 s" in one.err


def test_bad_input_is_said_by_all_and_nobody_waits(job: Job) -> None:
    for code, out, err in job.run(2, "compare", "ref.npz", "absent.npz"):
        assert (code, out) == (2, "")
        assert "absent.npz" in err
        assert err.count("\n") == 1
    assert SharedClock(job.log / "clock", -1).monotonic() < 10


def test_the_store_cannot_be_left_out(job: Job) -> None:
    for code, out, err in job.run(2, *COMPARE, "--no-store"):
        assert (code, out) == (2, "")
        assert "--no-store" in err
        assert "EVALKIT_CACHE" in err


# Parts ------------------------------------------------------------------------------------------------


def test_stretches_are_taken_from_the_middle_of_the_longest() -> None:
    assert next(_candidates([3, 4, 5], 4)) == 4
    assert next(_candidates([0, 1, 5, 6, 7, 8, 9, 20], 2)) == 7
    assert list(_candidates([4], 0)) == [4, 4]


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0"), ("0", "")])
def test_a_bad_environment(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match="RANK="):
        world_size()


@contextmanager
def team(monkeypatch: pytest.MonkeyPatch, root: Path) -> Iterator[Team]:
    """This process as the only one of a team."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "2")):
        monkeypatch.setenv(name, value)
    with Team.join(root) as joined:
        yield joined


def test_results_come_in_order_and_leave_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with team(monkeypatch, tmp_path) as joined:
        results = joined.map("squares", 5, lambda index: {"square": np.array(index**2)})
        assert [int(result["square"]) for result in results] == [0, 1, 4, 9, 16]

        def never(index: int) -> Any:
            raise AssertionError("it is done")

        assert len(list(joined.map("squares", 5, never))) == 5
    assert [path.name for path in tmp_path.glob("*/*")] == ["team"]


def test_an_unusable_stall_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVALKIT_STALL_SECONDS", "soon")
    with pytest.raises(InputError, match="EVALKIT_STALL_SECONDS='soon'"), team(monkeypatch, tmp_path):
        pass


def test_a_rank_that_is_taken(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs with the same address at the same time."""
    job.meet(0, 1)
    settings = {"TROUBLE": "0 3 stop", "TOGETHER": 1, "EVALKIT_STALL_SECONDS": 1e9}
    pids = [job.start(rank, 2, **settings) for rank in range(2)]
    until((job.log / "trouble").exists)
    monkeypatch.setattr("evalkit.system.distributed.JOIN_SECONDS", 0.2)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    try:
        with (
            pytest.raises(WorkerError, match=rf"still running \(pid {pids[0]} on"),
            Team.join(job.cache / "jobs"),
        ):
            pass
    finally:
        os.kill(pids[0], signal.SIGKILL)
        job.end(0, pids[0])
        assert "died without reporting an error" in job.end(1, pids[1]).err


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert str(resolve_device("auto")) == "cuda"
    for local_rank, device in (("3", "cuda:3"), ("5", "cuda:1")):  # more processes than GPUs
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert str(resolve_device("auto")) == device
        assert str(resolve_device("cuda:2")) == "cuda:2"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert str(resolve_device("auto")) == "cpu"


def test_from_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: Job) -> None:
    paths = job.files
    store = tmp_path / "store"
    expected = compare(*paths, extractor=Pixels(), run=NO_STORE).scores
    with team(monkeypatch, tmp_path / "jobs") as joined:
        assert compare(*paths, extractor=Pixels(), run=Run(store=store, engine=joined)).scores == expected
    several = Inline()
    several.size = 2
    with pytest.raises(InputError, match="share features through the store"):
        compare(*paths, extractor=Pixels(), run=Run(store=None, engine=several))


# Two hosts --------------------------------------------------------------------------------------------

ADDRESSES = ("10.213.7.1", "10.213.7.2")


@contextmanager
def two_hosts() -> Iterator[list[list[str]]]:
    """Two network namespaces with a wire between them; for each, what to put before a command."""
    command = ["unshare", "--net", "--uts", "sh", "-c", "echo ready; exec sleep 600"]
    hosts: list[subprocess.Popen[str]] = []
    try:
        for _ in ADDRESSES:
            try:
                host = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                pytest.skip("needs unshare")
            hosts.append(host)
            assert host.stdout is not None
            if host.stdout.readline() != "ready\n":
                pytest.skip("needs the right to make network namespaces")
        inside = [["nsenter", "--target", str(host.pid), "--net", "--uts"] for host in hosts]
        ends = f"evalkit{os.getpid()}"[-12:]
        try:
            subprocess.run(
                ["ip", "link", "add", f"{ends}a", "type", "veth", "peer", "name", f"{ends}b"],
                check=True,
                capture_output=True,
            )
            for end, host, before, address in zip("ab", hosts, inside, ADDRESSES, strict=True):
                for line in (
                    ["ip", "link", "set", f"{ends}{end}", "netns", str(host.pid)],
                    [*before, "hostname", f"host-{end}"],
                    [*before, "ip", "address", "add", f"{address}/24", "dev", f"{ends}{end}"],
                    [*before, "ip", "link", "set", f"{ends}{end}", "up"],
                    [*before, "ip", "link", "set", "lo", "up"],
                ):
                    subprocess.run(line, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs network namespaces with a wire between them ({error})")
        yield inside
    finally:
        for host in hosts:
            host.kill()
            host.communicate()


@pytest.mark.parametrize("trouble", [None, "1 10 kill"])
def test_two_hosts(job: Job, alone: Alone, trouble: str | None) -> None:
    with two_hosts() as hosts:
        started = [
            job.torchrun(
                *("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"),
                *("--master-addr", ADDRESSES[0], "--master-port", "29517"),
                before=before,
                TROUBLE=trouble or "-1 0 none",
            )
            for number, before in enumerate(hosts)
        ]
        (out, err), other = (process.communicate(timeout=SECONDS) for process in started)
    if trouble is None:
        assert [process.returncode for process in started] == [0, 0], (err, other)
        assert (out, other[0]) == (alone.out, "")
        assert job.scores() == alone.scores
        assert min(job.extracted(0), job.extracted(1)) >= 64
    else:
        assert all(process.returncode for process in started)
        assert "Error: Rank 1 (pid " in err
        assert "on host-b) died without reporting an error" in err
        goes_on(job, alone)


# The real network -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("inception_weights")
def test_the_real_network(job: Job, tmp_path: Path) -> None:
    for path in job.files:
        with np.load(path) as arrays:
            np.savez(tmp_path / path.name, arr_0=arrays["arr_0"][:40])
    scores = []
    for before in ([sys.executable], [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]):
        job.clear()
        done = subprocess.run(
            [*before, "-m", "evalkit", "compare", "ref.npz", "samples.npz", "--json", "out.json"],
            cwd=tmp_path,
            env=job.environment(EVALKIT_OFFLINE=1),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((tmp_path / "out.json").read_text())["scores"])
    assert scores[0] == scores[1]
