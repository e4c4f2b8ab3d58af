"""Messages of the packages on the command line: once each, in plain words, where click writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from evalkit.cli.messages import LOGGERS, say, show_messages


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Loggers as they were."""
    before = {
        name: (logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in LOGGERS
    }
    yield
    show_messages()  # as text
    for name, (level, handlers) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers[:] = handlers


@pytest.mark.parametrize("name", LOGGERS)
def test_a_message_is_shown_once_as_plain_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        show_messages()
    logging.getLogger(f"{name}.some.module").info("%d images at 50%% of the size", 7)
    logging.getLogger(f"{name}.some.module").debug("details")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "7 images at 50% of the size\n")


def test_other_packages_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages()
    logging.getLogger("another.package").info("not ours")
    assert capsys.readouterr().err == ""


def test_other_ranks_show_warnings_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    show_messages()
    logging.getLogger("generation.sample").info("as on every rank")
    logging.getLogger("generation.sample").warning("no locks")
    assert capsys.readouterr().err == "[rank 2 of 4] no locks\n"
    monkeypatch.setenv("RANK", "0")
    show_messages()
    logging.getLogger("generation.sample").info("hello")
    assert capsys.readouterr().err == "hello\n"


def test_messages_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages(as_json=True)
    logging.getLogger("generation.sample").info("%s of\n2 \u00b5", 1)
    say("no more", "error")
    show_messages()
    say("plain")
    first, second, third = capsys.readouterr().err.splitlines()
    assert json.loads(first) == {"message": "1 of\n2 µ"}
    assert json.loads(second) == {"error": "no more"}
    assert third == "plain"
