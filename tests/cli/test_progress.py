"""How progress is shown: lines of JSON for scripts, bars and workers on a terminal."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest
from rich.console import Console

from evalkit.cli.bars import Bars
from evalkit.cli.messages import say, show_messages
from evalkit.cli.progress import Lines, Silence, Texts, progress_bars
from evalkit.system.engine import WorkerState
from evalkit.system.progress import Stage


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def worker(host: str = "node1", number: int = 0, state: str = "working", rate: float = 8.0) -> WorkerState:
    item = 3 * number if state == "working" else None
    return WorkerState(
        host=host, pid=4000 + number, device=f"cuda:{number}", state=state, item=item, done=3.0, rate=rate
    )


# Rates ------------------------------------------------------------------------------------------------


def after(steps: list[tuple[float, int]], first: int = 0, total: int = 1000) -> Stage:
    stage = Stage("features", first, total)
    for now, done in steps:
        stage.update(done, total, now)
    return stage


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    slow = [(float(second), second) for second in range(100)]
    fast = [(100.0 + second, 100 + 10 * second) for second in range(60)]
    stage = after(slow + fast)
    assert stage.per_second(159.0) == pytest.approx(10, rel=0.02)
    assert stage.seconds_left(159.0) == pytest.approx((1000 - 690) / 10, rel=0.02)


def test_no_rate_is_invented() -> None:
    """Neither of what an earlier run did, nor of the time in which networks are loaded."""
    assert after([], first=700).per_second(50.0) is None
    stage = after([(60.0, 716)], first=700)
    assert (stage.per_second(61.0), stage.seconds_left(61.0)) == (None, None)
    stage.update(732, 1000, 60.01)  # another worker, at almost the same time
    assert stage.per_second(60.02) is None
    stage.update(748, 1000, 63.01)
    assert stage.per_second(63.01) == pytest.approx(16 / 3)


def test_long_steps_have_a_rate() -> None:
    stage = after([(600.0 * step, step) for step in range(1, 11)])
    for waited in (0, 300, 599):
        assert stage.per_second(6000.0 + waited) == pytest.approx(1 / 600)


def test_the_rate_falls_while_nothing_is_done() -> None:
    stage = after([(float(second), 10 * second) for second in range(1, 61)])
    rates = [stage.per_second(60.0 + waited) or 0.0 for waited in (0, 2, 30, 300)]
    assert rates[0] == pytest.approx(10)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1, rel=0.1)


def test_lost_work_gives_no_negative_rate() -> None:
    stage = after([(1.0, 100), (10.0, 200), (11.0, 50)])
    assert (stage.per_second(11.0), stage.seconds_left(11.0)) == (None, None)
    stage.update(300, 1000, 20.0)
    assert stage.per_second(20.0) == pytest.approx(200 / 19)


# Lines of JSON ----------------------------------------------------------------------------------------


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[dict[str, Any]]]:
    """The lines printed since the last call."""

    def read() -> list[dict[str, Any]]:
        out, err = capsys.readouterr()
        assert out == ""
        return [json.loads(line) for line in err.splitlines()]

    return read


def test_fields(clock: Clock, lines: Callable[[], list[dict[str, Any]]]) -> None:
    view = Lines(clock=clock)
    view("features of samples.npz", 0, 1024)
    nothing_yet = {"images_per_second": None, "seconds_left": None, "workers": []}
    assert lines() == [{"stage": "features of samples.npz", "done": 0, "total": 1024, **nothing_yet}]
    for done in (256, 512):
        clock.now += 16
        view("features of samples.npz", done, 1024)
        lines()
    clock.now += 1
    view.watch([worker(rate=0.0), worker(number=1)])
    assert lines() == [
        {
            "stage": "features of samples.npz",
            "done": 512,
            "total": 1024,
            "images_per_second": 16.0,
            "seconds_left": 32.0,
            "workers": [
                {
                    "host": "node1",
                    "pid": 4000,
                    "device": "cuda:0",
                    "state": "working",
                    "item": 0,
                    "images_per_second": None,
                },
                {
                    "host": "node1",
                    "pid": 4001,
                    "device": "cuda:1",
                    "state": "working",
                    "item": 3,
                    "images_per_second": 8.0,
                },
            ],
        }
    ]


def test_a_line_a_second_and_at_the_ends_of_stages(
    clock: Clock, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    view = Lines(clock=clock)
    for done in range(0, 50):
        view("reading", done, 50)
        view.watch([worker()])
        clock.now += 0.1
    view("reading", 50, 50)
    view("all stored", 7, 7)
    view("distances", 0, 0)
    view("distances", 1, 0)
    printed = [(line["stage"], line["done"], line["total"]) for line in lines()]
    assert printed[0] == ("reading", 0, 50)
    assert printed[-3:] == [("reading", 50, 50), ("all stored", 7, 7), ("distances", 0, None)]
    assert len(printed) == 1 + 4 + 3


def test_nothing_is_printed_of_workers_between_stages(
    clock: Clock, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    view = Lines(clock=clock)
    view.watch([worker()])
    view("reading", 0, 5)
    view("reading", 5, 5)
    lines()
    clock.now += 10
    view.watch([worker()])
    assert lines() == []


def test_downloads_count_bytes(clock: Clock, lines: Callable[[], list[dict[str, Any]]]) -> None:
    view = Lines(in_bytes=True, clock=clock)
    for done in range(0, 50, 10):
        view("weights.npz", done * 1_000_000, 95_000_000)
        clock.now += 5
    last = lines()[-1]
    assert last["bytes_per_second"] == pytest.approx(2e6)
    assert "images_per_second" not in last


def test_where_json_is_asked_for_everything_is(lines: Callable[[], list[dict[str, Any]]]) -> None:
    show_messages(as_json=True)
    try:
        progress_bars()("reading", 0, 5)
        say("two\nlines of a message, and µ")
    finally:
        show_messages()
    assert [set(line) for line in lines()][1:] == [{"message"}]


# On a terminal ----------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(bars: Bars, width: int = 100) -> list[str]:
    """The lines that are on the screen."""
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(bars.render())
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


@pytest.fixture
def bars(clock: Clock) -> Any:
    bars = Bars(Console(file=Terminal(), width=100, height=30), clock=clock)
    yield bars
    bars.close()


def test_a_bar_with_rate_and_time_left(bars: Bars, clock: Clock) -> None:
    for done in range(1000, 1400, 100):
        bars("features of [a].npz", done, 5000)
        clock.now += 10
    clock.now -= 10
    (line,) = shown(bars)
    assert line.startswith("features of [a].npz ━")
    assert line.endswith("1,300/5,000 10.0/s 0:06:10 left")
    bars("features of [a].npz", 5000, 5000)
    assert shown(bars) == []


def test_a_stage_of_unknown_length(bars: Bars) -> None:
    bars("members", 5, 0)
    assert shown(bars)[0].endswith("5/?")


def test_a_line_for_each_worker(bars: Bars) -> None:
    bars("features", 0, 5000)
    bars.watch([worker(), worker("node2", 1, "loading", 0.0)])
    assert shown(bars)[1:] == ["node1 cuda:0 working item 0 8.0/s", "node2 cuda:1 loading"]


def test_a_narrow_terminal_shows_the_figures(bars: Bars) -> None:
    name = "inception and pixels features of samples_50000x256x256x3.npz"
    bars(name, 1234, 50000)
    bars.watch([worker()])
    first, second = shown(bars, 60)
    assert first.endswith("1,234/50,000")
    assert second.endswith("8.0/s")
    assert max(map(len, (first, second))) <= 60


def test_many_workers_are_summed_by_host(bars: Bars) -> None:
    bars("features", 0, 5000)
    hosts = [f"node{host}" for host in range(3)]
    bars.watch(
        [worker(host, number, "working" if number else "loading") for host in hosts for number in range(8)]
    )
    assert shown(bars)[1:] == [f"{host} 7 working, 1 loading 64.0/s" for host in hosts]
    bars.watch([worker(f"node{host}", number) for host in range(100) for number in range(8)])
    lines = shown(bars)[1:]
    assert len(lines) == 16
    assert lines[-1] == "85 more hosts 680 working 5,440.0/s"


def test_bytes_have_units(clock: Clock) -> None:
    bars = Bars(Console(file=Terminal(), width=100), in_bytes=True, clock=clock)
    for done in range(0, 50, 10):
        bars("weights", done * 1_000_000, 95_000_000)
        clock.now += 5
    clock.now -= 5
    assert shown(bars)[0].endswith("40.0 MB/95.0 MB 2.0 MB/s 0:00:28 left")
    bars.close()


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error from now on. Not a fixture: pytest puts its own in place when the test begins."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_messages_are_above_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    bars = progress_bars()
    bars("features", 1, 5)
    bars.watch([worker()])
    say("a message")
    bars.close()
    # On a line of its own, which is cleared before; and then the bar again.
    assert re.search(r"\x1b\[2Ka message\nfeatures ", terminal.getvalue())


def test_the_screen_is_left_as_it_was_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)

    @click.command()
    def failing() -> None:
        progress_bars()("reading", 1, 5)
        assert "\x1b[?25l" in terminal.getvalue()  # the cursor is hidden
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        failing.main([], standalone_mode=False)
    assert "\x1b[?25h" in terminal.getvalue()  # it is shown again
    assert sys.stderr is terminal


def test_a_short_stage_shows_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    view = progress_bars()
    assert isinstance(view, Texts)
    view("reading", 1, 5)
    view.watch([worker()])
    view.close()
    assert capsys.readouterr() == ("", "")


def test_a_long_stage_has_lines_of_text(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    view = Texts(clock=clock)
    began = clock.now
    for done in range(0, 4001, 10):  # a second for 10
        view("features", done, 4000)
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "features: 100/4,000, 10.0/s, 0:06:30 left"
    times = [int(re.search(r" ([\d,]+)/", line)[1].replace(",", "")) / 10 for line in lines]  # type: ignore[index]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] == 10
    assert all(max(10, earlier / 10) <= gap <= 41 for earlier, gap in zip(times, gaps, strict=False))
    assert clock.now - began == 401
    view("features", 0, 50)  # the next of that name begins anew
    assert capsys.readouterr().err == ""


def test_bytes_have_units_in_text(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    view = Texts(in_bytes=True, clock=clock)
    for done in range(0, 50, 10):
        view("weights", done * 1_000_000, 0)
        clock.now += 5
    assert capsys.readouterr().err.splitlines()[0] == "weights: 20.0 MB/?, 2.0 MB/s"


def test_other_ranks_of_training_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    assert isinstance(progress_bars(), Bars)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(progress_bars(), Silence)
