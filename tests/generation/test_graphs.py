"""CUDA graphs of network calls, with a recorder that computes on the CPU in the place of CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_runs import SETTINGS, images_of, load, sampled
from torch import Tensor

from generation.batch import Networks
from generation.guidance import ClassifierGuidance, classifier_gradient
from generation.networks.graphs import Graphs, Replay

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """Computes again from the recorded inputs, as a graph would.

    Attributes:
        largest: The largest batch that its memory takes.
        live: Recordings that were not released.
    """

    def __init__(self, largest: int = 1000):
        self.largest = largest
        self.live = self.recorded = self.replays = self.released = 0

    def record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        assert not torch.is_grad_enabled()
        output = run()
        if len(output) > self.largest:
            raise torch.OutOfMemoryError("no memory left")
        self.recorded += 1
        self.live += 1
        output.fill_(torch.nan)  # computed by the replay alone

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return replay, output

    def release(self) -> None:
        self.live = 0
        self.released += 1


def with_graphs(networks: Networks, recorder: Recorder) -> Networks:
    graphs = Graphs(recorder)
    for prepared in (networks.predict, networks.logits):
        assert prepared is not None
        prepared.graphs = graphs
    return replace(networks, graphs=graphs)


@pytest.fixture
def own(files: dict[str, Path]) -> Networks:
    """Networks that a test may change."""
    return load(files)


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x, torch.full((count,), 17 * seed), torch.arange(count) + seed


def test_calls_equal_those_without_graphs(own: Networks, files: dict[str, Path]) -> None:
    plain, recorder = load(files), Recorder()
    graphed = with_graphs(own, recorder)
    assert plain.logits is not None and graphed.logits is not None  # noqa: PT018
    kept = []
    with torch.no_grad():
        for seed in range(3):
            x, t, y = inputs(4, seed)
            found = graphed.predict(x, t, y)
            assert torch.equal(found, plain.predict(x, t, y))
            kept.append((found, found.clone()))
            for scale in (2.5, 0.1):
                expected = classifier_gradient(plain.logits, x, t, y, scale)
                assert torch.equal(graphed.logits.run(classifier_gradient, x, t, y, scale), expected)
                guide = ClassifierGuidance(classifier=graphed.logits, y=y, scale=scale)
                found_gradient = guide(x, 17 * seed)
                assert found_gradient is not None
                assert torch.equal(found_gradient, expected)
    assert (recorder.recorded, recorder.replays) == (2, 15)
    for found, copy in kept:  # no later call changes them
        assert torch.equal(found, copy)


def test_other_inputs_get_graphs_of_their_own(own: Networks) -> None:
    recorder = Recorder()
    logits = with_graphs(own, recorder).logits
    assert logits is not None
    x, t, _ = inputs(4)
    for changed in (t, t.float(), t):
        logits(x, changed)
    assert recorder.recorded == 2
    logits(x[:3], t[:3])
    assert recorder.recorded == 3


def test_a_gradient_through_a_call_takes_no_graph(own: Networks) -> None:
    recorder = Recorder()
    logits = with_graphs(own, recorder).logits
    assert logits is not None
    x, t, _ = inputs(2)
    logits(x.requires_grad_(), t).sum().backward()
    assert x.grad is not None
    assert recorder.recorded == 0


def test_small_images_are_inputs_too(files: dict[str, Path]) -> None:
    predict, recorder = load(files, "upsampler", None).predict, Recorder()
    graphs = Graphs(recorder)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 3]), torch.tensor([1, 2])
    with torch.no_grad():
        for low_res in torch.randn(3, 2, 3, 8, 8):
            predict.graphs = None
            expected = predict(x, t, y, low_res=low_res)
            predict.graphs = graphs
            assert torch.equal(predict(x, t, y, low_res=low_res), expected)
    assert recorder.recorded == 1


def test_a_smaller_batch_is_padded(own: Networks) -> None:
    recorder = Recorder()
    graphed = with_graphs(own, recorder)
    graphed.graphs.resize(4)
    x, t, y = inputs(4)
    with torch.no_grad():
        alone = graphed.predict(x[:1], t[:1], y[:1])
        whole = graphed.predict(x, t, y)
        again = graphed.predict(x[:3], t[:3], y[:3])
    assert recorder.recorded == 1
    assert torch.equal(again, whole[:3])
    assert torch.equal(alone, whole[:1])


def test_another_batch_size_frees_the_graphs(own: Networks) -> None:
    recorder = Recorder()
    graphed = with_graphs(own, recorder)
    graphed.graphs.resize(4)
    x, t, y = inputs(4)
    graphed.predict(x, t, y)
    graphed.graphs.resize(4)
    assert recorder.live == 1
    graphed.graphs.resize(2)
    assert recorder.live == 0
    graphed.predict(x[:2], t[:2], y[:2])
    assert (recorder.live, recorder.recorded) == (1, 2)


def test_runs_equal_those_without_graphs(own: Networks, expected: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    path = sampled(SETTINGS, with_graphs(own, recorder), tmp_path / "run", batch_size=2)
    assert abs(images_of(path) - images_of(expected)).max() <= 1  # batches of 1 were padded to 2
    assert (recorder.recorded, recorder.live) == (2, 0)


def test_a_run_out_of_memory_goes_on_in_smaller_batches(own: Networks, tmp_path: Path, messages: Any) -> None:
    recorder = Recorder(largest=2)
    settings = replace(SETTINGS, shard_size=4)
    path = sampled(settings, with_graphs(own, recorder), tmp_path / "run")
    assert any("continuing with 2 images" in message for message in messages())
    assert recorder.recorded == 2
    other = with_graphs(own, Recorder())
    assert (images_of(path) == images_of(sampled(settings, other, tmp_path / "two", batch_size=2))).all()
