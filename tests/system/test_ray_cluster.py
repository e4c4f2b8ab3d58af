"""Workers on the nodes of a cluster, all of them on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import optional
from ray_works import Order, Orders

from evalkit.system import ray_engine as engines
from evalkit.system.engine import WorkerState
from evalkit.system.ray_engine import ray_engine

SUPPORT = Path(__file__).parent.parent / "support"
ROOT = SUPPORT.parent.parent
LEAN = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """With a node that has no place for workers."""
    optional("ray", "cluster")
    utilities = optional("ray.cluster_utils", "cluster")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(SUPPORT)]))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", folder)
        found = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **LEAN})
        yield found
        found.shutdown()


def test_nodes_come_and_go(
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At first there is none for workers; a second joins; the first is lost."""
    flag = tmp_path / "flag"
    nodes: list[Any] = []
    lost: list[WorkerState] = []

    def add() -> None:
        nodes.append(cluster.add_node(num_cpus=torch.get_num_threads(), **LEAN))

    def watch(states: Sequence[WorkerState]) -> None:
        at_work = {state.pid for state in states if state.state == "working"}
        lost.extend(state for state in states if state.state == "lost")
        if not nodes:
            if caplog.messages:
                add()
        elif len(nodes) == 1 and at_work:
            add()
        elif len(nodes) == 2 and len(at_work) == 2:
            cluster.remove_node(nodes[0], allow_graceful=False)
            nodes.append(None)
        elif lost:
            flag.touch()

    monkeypatch.setattr(engines, "UNSTARTED_SECONDS", 0.0)
    orders = [Order("wait", 1, flag), Order("wait", 2, flag), Order("square", 3)]
    with caplog.at_level(logging.INFO, "evalkit"), ray_engine(cluster.address, watch=watch) as engine:
        found = list(engine.map(Orders(), orders))
    assert sorted(index for index, _ in found) == [0, 1, 2]
    assert len(lost) == 1
    assert caplog.messages[0].startswith("No worker could be started yet")
    cluster.remove_node(nodes[1])
    printed = capfd.readouterr()
    assert printed.out == ""
    # Where a test before it has run a command, messages are printed.
    assert set(printed.err.splitlines()) <= set(caplog.messages)


def test_each_gpu_has_a_worker(cluster: Any, tmp_path: Path) -> None:
    if torch.cuda.device_count() == 1:
        pytest.skip("pretends to have two GPUs")
    node = cluster.add_node(num_cpus=1, num_gpus=2, **LEAN)
    seen = set()

    def watch(states: Sequence[WorkerState]) -> None:
        seen.update(state.device for state in states if state.pid)

    with ray_engine(cluster.address, watch=watch) as engine:
        found = list(engine.map(Orders(device="cuda:0"), [Order("meet", 2, tmp_path)] * 2))
    assert sorted(there["gpu"] for _, there in found) == ["0", "1"]
    assert seen == {"cuda:0", "cuda:1"}
    cluster.remove_node(node)


def test_a_private_ray_joins_no_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with ray_engine() as engine:
        assert len(list(engine.map(Orders(), [Order("where")]))) == 1
        assert ray.get_runtime_context().gcs_address != cluster.address
    assert os.environ["RAY_ADDRESS"] == cluster.address
