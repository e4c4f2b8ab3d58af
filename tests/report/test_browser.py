"""Pages in a real browser, Chromium: no errors, pictures load, tables sort, a phone has room for all.

What a page cannot tell of itself is asked by a script in a copy of it, whose digest the copy's policy allows.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from optional import optional
from parsed import parsed
from PIL import Image
from shown import KINDS, hostile, one, several, sweep, with_classes, with_published
from stand_ins import InceptionPixels

from evalkit.report.html import write_page
from evalkit.report.pictures import read_picture
from generation.demo import SETTINGS, demo

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 240
DARK = "--blink-settings=preferredColorScheme=0"

# Reports on the page when all of it is there.
PROBE = """
addEventListener("load", () => {
  const report = {
    pictures: [...document.images].map((each) => each.complete && each.naturalWidth),
    width: [innerWidth, document.scrollingElement.scrollWidth],
    colours: [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color],
    drawings: [...document.querySelectorAll("svg[role=img]")].map((each) => {
      const box = each.getBoundingClientRect();
      const text = [...each.querySelectorAll("text")].map((each) => each.getBoundingClientRect());
      const inside = text.filter((at) => at.left > box.left - 2 && at.right < box.right + 2);
      return [each.ariaLabel, box.width, box.height, text.length - inside.length];
    }),
    faces: [...document.querySelectorAll(".bar")].every((each) => each.getBoundingClientRect().width > 20),
  };
  for (const each of document.querySelectorAll("details")) each.open = true;
  const tables = [...document.querySelectorAll("table.sortable")].filter((table) =>
    CAPTIONS.includes(table.caption.textContent));
  report.sorted = tables.map((table) => {
    const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].innerText.trim());
    return [...table.tHead.rows[0].cells].map((head, n) => {
      const button = head.querySelector("button");
      button.focus();
      const focused = document.activeElement === button;
      button.click();
      const up = [head.getAttribute("aria-sort"), column(n)];
      button.click();
      const down = [head.getAttribute("aria-sort"), column(n)];
      const others = table.querySelectorAll("[aria-sort]").length;
      return [button.textContent, focused, up, down, others];
    });
  });
  tell(JSON.stringify(report));
});
function tell(textContent) {
  if (parent !== window) parent.postMessage(textContent, "*");
  else document.body.append(Object.assign(document.createElement("pre"), { id: "report", textContent }));
}
"""
# A window cannot be as narrow as a phone, but a frame can.
FRAME = """<!DOCTYPE html>
<meta name="color-scheme" content="light dark">
<iframe src="PAGE" width="390" height="844" style="border:0"></iframe>
<script>
addEventListener("message", ({ data }) =>
  document.body.append(Object.assign(document.createElement("pre"), { id: "report", textContent: data })));
</script>
"""


class Seen(NamedTuple):
    dom: str
    console: list[str]

    @property
    def report(self) -> dict[str, Any]:
        found = re.search(r'<pre id="report">(.*?)</pre>', self.dom, re.S)
        assert found, f"the script did not come to its end: {self.console}"
        report: dict[str, Any] = json.loads(unescape(found[1]))
        return report


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return found


def browse(chromium: str, page: Path, *options: str) -> Seen:
    """Open a page; what became of it, and what the console says."""
    profile = page.with_suffix(".profile")
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",  # which root cannot have
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            "--window-size=1280,900",
            "--virtual-time-budget=20000",  # passes at once when there is nothing to do
            "--enable-logging=stderr",
            *options,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    log = done.stderr.decode(errors="replace").splitlines()
    return Seen(done.stdout.decode(), [line for line in log if "CONSOLE" in line])


def probed(page: Path, *captions: str) -> Path:
    """A copy with the script in it."""
    text = page.read_text("utf-8")
    script = PROBE.replace("CAPTIONS", json.dumps(captions))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert text.count("script-src ") == text.count("</body>") == 1
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    copy = page.with_stem(f"{page.stem}-probed")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    return copy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, chromium: str) -> Path:
    """Pages of everything, with a picture as it is and a shrunk one; of 1,000 classes; of several sets."""
    optional("jinja2", "report")
    optional("matplotlib", "report")
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for name, side in (("small", 64), ("large", 1200)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{name}.png")
    figures = [read_picture(folder / f"{name}.png") for name in ("small", "large")]
    records = [with_published(one()), KINDS["five"](), sweep(), hostile()[0]]
    assert write_page(folder / "full.html", records, figures) != []
    write_page(folder / "classes.html", [with_classes(with_published(one()), 1000)])
    write_page(folder / "several.html", [several()])
    return folder


def test_a_page_opens_without_a_word_in_the_console(chromium: str, made: Path) -> None:
    seen = browse(chromium, made / "full.html")
    assert seen.console == []
    # The browser understands the page as the tests of its text do, and has made buttons.
    texts = [
        table.one("caption").text for table in parsed((made / "full.html").read_text("utf-8")).all("table")
    ]
    assert seen.dom.count("<caption") == len(texts)
    assert "Sort by this column" in seen.dom
    assert seen.dom.count("<script") == 1
    assert seen.dom.count("<img") == 2


def test_a_script_from_a_name_would_not_run(chromium: str, made: Path) -> None:
    """And the console says so: the test above can fail."""
    page = made / "several-injected.html"
    text = (made / "several.html").read_text("utf-8")
    page.write_text(text.replace("</h1>", "<script>document.title = 'taken'</script></h1>"), "utf-8")
    seen = browse(chromium, page)
    assert "<title>taken" not in seen.dom
    assert any("Content Security Policy" in line for line in seen.console)


def test_on_a_phone_in_the_dark(chromium: str, made: Path) -> None:
    frame = made / "frame.html"
    frame.write_text(FRAME.replace("PAGE", probed(made / "full.html").name))
    seen = browse(chromium, frame, DARK)
    assert seen.console == []
    report = seen.report
    assert report["pictures"] == [64, 1200] or report["pictures"] == [64, 600], report["pictures"]
    assert report["width"] == [390, 390]  # tables scroll, the page does not
    back, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in report["colours"])
    assert back < 150
    assert text > 600
    assert len(report["drawings"]) == 4
    for label, width, height, outside in report["drawings"]:
        assert 250 < width <= 390
        assert height > 80
        assert outside == 0 or "script" in label, label  # a hostile title is longer than its axis


def test_the_page_of_the_demo(chromium: str, tmp_path: Path) -> None:
    """Real digits against real digits, a sweep with its curves, and a sheet of samples."""
    for package, extra in (("jinja2", "report"), ("matplotlib", "report"), ("sklearn", "demo")):
        optional(package, extra)
    settings = replace(SETTINGS, count=12, respacing="ddim2")
    demo(tmp_path / "demo", extractor=InceptionPixels(), settings=settings, scales=(0.0, 4.0))
    frame = tmp_path / "demo" / "frame.html"
    frame.write_text(FRAME.replace("PAGE", probed(frame.with_name("report.html")).name))
    seen = browse(chromium, frame)
    assert seen.console == []
    report = seen.report
    assert report["width"] == [390, 390]
    (width,) = report["pictures"]
    assert width > 500
    assert "FID against guidance scale, as curves" in [label for label, *_ in report["drawings"]]
    for label, width, height, outside in report["drawings"]:
        assert 250 < width <= 390, label
        assert height > 80, label
        assert outside == 0, label


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.split()[0].replace(",", "")) for cell in cells]


def test_tables_sort(chromium: str, made: Path) -> None:
    captions = ["Beside published scores", "FID by class: 1,000 classes, lower is better"]
    seen = browse(chromium, probed(made / "classes.html", *captions))
    assert seen.console == []
    report = seen.report
    back, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in report["colours"])
    assert back == 3 * 255
    assert text < 150
    classes, published = report["sorted"]
    assert [each[0] for each in classes] == ["class", "FID", "rank"]
    assert [each[0] for each in published] == ["model", "FID", "Inception Score", "source"]
    for _, focused, (up, _), (down, _), sorted_columns in (*classes, *published):
        assert (focused, up, down, sorted_columns) == (True, "ascending", "descending", 1)
    (_, _, (_, names), _, _), (_, _, (_, values), (_, reverse), _), _ = classes
    assert names == [f"class {i}" for i in range(1000)]  # 2 before 10
    assert numbers(values) == sorted(numbers(values)) == numbers(reverse)[::-1]
    # What is not known comes last, whichever way.
    _, _, (_, up), (_, down), _ = published[2]
    assert up == down == ["186.70", "–"]
