"""No work of an unfinished build is lost, and none that does not fit is taken up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from photographs import Wide
from stand_ins import InceptionPixels as Pixels

from evalkit.errors import ImageError, InputError, OutputError
from reference_batches.build import Settings, build


def test_skipping_goes_on_where_the_stop_was(with_bad: tuple[Path, list[int]], tmp_path: Path) -> None:
    out, settings = tmp_path / "ref.npz", Settings(size=16)
    with pytest.raises(ImageError):
        build(with_bad[0], out, settings, extractor=Wide())
    build(with_bad[0], out, settings, extractor=Wide(), skip_bad=True)
    build(with_bad[0], tmp_path / "once.npz", settings, extractor=Wide(), skip_bad=True)
    assert out.read_bytes() == (tmp_path / "once.npz").read_bytes()


def test_killed_again_and_again_gives_the_same_file(tree: Path, tmp_path: Path) -> None:
    code = f"""
import signal, sys
sys.path[:0] = [{str(Path(__file__).parents[1] / "support")!r}]
import torch
import deaths
import reference_batches.build as module
import reference_batches.journal
from pathlib import Path
from photographs import Wide
from reference_batches.build import Settings
torch.set_num_threads(1)  # a process with a pool of threads cannot be forked
reference_batches.journal.SAVE_SECONDS, Wide.batch_size = 0, 20
starts = []
def progress(stage, done, total):
    if not starts:
        starts.append(done)
        print(done, flush=True)
def build(out, **options):
    settings = Settings(size=16, images=50)
    return lambda: module.build({str(tree)!r}, Path(sys.argv[1]) / out, settings, extractor=Wide(), **options)
calls = deaths.calls_of(build("once.npz"))
killed = build("ref.npz", progress=progress)
for number in (1, 2, 5):  # the settings, and what is done
    for after in (False, True):
        dying = deaths.dying_at_rename(number, killed, after=after)
        assert deaths.wait(deaths.start(dying)) == -signal.SIGKILL
kills, code = deaths.again_and_again(killed, calls)
assert kills >= 3, kills
assert code == 0, code
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    starts = [int(line) for line in done.stdout.split()]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert len(set(starts)) >= 4  # it went on, again and again
    assert (tmp_path / "ref.npz").read_bytes() == (tmp_path / "once.npz").read_bytes()
    assert not (tmp_path / "ref.npz.building").exists()


def test_an_unfinished_build_of_another_kind_is_not_touched(tree: Path, tmp_path: Path) -> None:
    class Broken(Wide):
        def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            raise OSError("broken")

    out = tmp_path / "ref.npz"
    with pytest.raises(OSError, match="broken"):
        build(tree, out, Settings(size=16), extractor=Broken())
    message = r"holds an unfinished build with other settings: settings\.size was 16 and is now 24\. Delete"
    with pytest.raises(InputError, match=message):
        build(tree, out, Settings(size=24), extractor=Wide())
    build(tree, out, Settings(size=16), extractor=Wide())
    assert out.exists()


@pytest.fixture
def unfinished(with_bad: tuple[Path, list[int]], tmp_path: Path) -> Callable[[], Any]:
    """A build that stopped at a bad image, the first being good; returns what resumes it."""

    class OneByOne(Pixels):
        batch_size = 1

    out, settings = tmp_path / "ref.npz", Settings(size=16)
    shutil.copy(with_bad[0] / "001.jpg", with_bad[0] / "000.jpg")
    with pytest.raises(ImageError, match=r"007\.jpg"):
        build(with_bad[0], out, settings, extractor=OneByOne())
    return lambda: build(with_bad[0], out, settings, extractor=OneByOne(), skip_bad=True)


def rewritten(state: Path, **changes: Any) -> None:
    with np.load(state) as arrays:
        values: dict[str, Any] = dict(arrays)
    np.savez(state, **{**values, **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.write_bytes(state.read_bytes()[:-50]),
        lambda state: state.write_bytes(b"PK" + bytes(50)),
        lambda state: np.savez(state, position=np.array(3)),
        lambda state: rewritten(state, position=np.array("x")),
        lambda state: rewritten(state, position=np.array(10**6)),
        lambda state: rewritten(state, bad=np.array("[" * 100_000)),
        lambda state: rewritten(state, bad=np.array('[["a", 1]]')),
        lambda state: rewritten(state, digest=np.zeros(3, np.uint8)),
        lambda state: rewritten(state, checksums=np.zeros(3)),
        lambda state: rewritten(state, pool_scatter=np.zeros(3)),
        lambda state: rewritten(state, pool_mean=np.full(48, np.nan)),
        lambda state: rewritten(state, spatial_n=np.array(-4)),
    ],
)
def test_a_damaged_state_is_refused(
    damage: Callable[[Path], Any], unfinished: Callable[[], Any], tmp_path: Path
) -> None:
    damage(tmp_path / "ref.npz.building" / "state.npz")
    with pytest.raises(InputError, match=r"state\.npz is damaged .*Delete the folder .*ref\.npz\.building"):
        unfinished()


OTHER = r"ref\.npz\.building holds an unfinished build with other settings: extractor was null and is now "


DAMAGED = r"settings\.json is damaged .*Delete the folder .*ref\.npz\.building"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", DAMAGED),
        (b"[" * 100_000, DAMAGED),
        (b"null", DAMAGED),
        (b" ", DAMAGED),
        (b"{}", OTHER),
        (b'{"settings": 3}', OTHER),
    ],
)
def test_a_damaged_record_of_the_settings_is_refused(
    content: bytes, message: str, unfinished: Callable[[], Any], tmp_path: Path
) -> None:
    (tmp_path / "ref.npz.building" / "settings.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        unfinished()


def test_pixels_that_are_not_those_written_are_refused(unfinished: Callable[[], Any], tmp_path: Path) -> None:
    pixels = tmp_path / "ref.npz.building" / "pixels"
    whole = pixels.read_bytes()
    pixels.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(InputError, match=r"pixels is damaged \(they are not as they were written\)"):
        unfinished()
    assert not (tmp_path / "ref.npz").exists()
    pixels.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"pixels is damaged \(it has another size\)"):
        unfinished()
    pixels.write_bytes(whole)
    unfinished()


def test_two_builds_of_one_file_at_once(tree: Path, tmp_path: Path) -> None:
    class Rival(Wide):
        def __call__(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
            with pytest.raises(OutputError, match="Another process is building"):
                build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Wide())
            return super().__call__(images)

    build(tree, tmp_path / "ref.npz", Settings(size=16), extractor=Rival())


def test_no_space(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OutputError, match=r"Building .*ref\.npz needs 0\.\d+ GB, and .* has 0\.00 GB free\. Free some"
    ):
        build(tree, tmp_path / "ref.npz", Settings(size=16, statistics="none"))
    assert list(tmp_path.iterdir()) == []
