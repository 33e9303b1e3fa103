"""The page in a real browser: plots are there, the console is clean, nothing overflows, keys work."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", "--dump-dom",
)  # fmt: skip

# The page in frames of a desktop's and a phone's width (a window can't be made as narrow as a phone).
PROBE = """<!doctype html><body>
<iframe id="desktop" style="width:1280px;height:900px;border:0" srcdoc="{page}"></iframe>
<iframe id="phone" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const name of ["desktop", "phone"]) {{
    const frame = document.getElementById(name), page = frame.contentDocument, view = frame.contentWindow;
    const width = page.documentElement.clientWidth;
    const within = (element) => element.closest(".scroll, pre, svg");
    const out = found[name] = {{
      width,
      scroll: page.documentElement.scrollWidth,
      beyond: [...page.querySelectorAll("body *")]
        .filter((e) => !within(e) && e.getBoundingClientRect().right > width + 1)
        .map((e) => e.outerHTML.slice(0, 90)),
      plots: [...page.querySelectorAll("figure > svg")].map((e) => e.getBoundingClientRect().height),
      tables: page.querySelectorAll("table.results").length,
      titles: page.querySelectorAll(".point > title").length,
    }};
    const points = [...page.querySelectorAll(".plot > svg")][0].querySelectorAll('.point[tabindex="0"]');
    out.stops = points.length;
    points[0].focus();
    const tip = page.querySelector(".tip");
    out.first = [tip.hidden, tip.textContent];
    points[0].dispatchEvent(new view.KeyboardEvent("keydown", {{ key: "End", bubbles: true }}));
    out.last = [tip.hidden, tip.textContent];
    out.focused = page.activeElement.getAttribute("aria-label");
    page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", {{ key: "Escape", bubbles: true }}));
    out.closed = tip.hidden;
    const box = page.activeElement.querySelector("use").getBoundingClientRect();
    page.activeElement.closest("svg").dispatchEvent(new view.PointerEvent("pointermove", {{
      clientX: box.left + 3, clientY: box.top + 3, bubbles: true }}));
    out.hovered = [tip.hidden, tip.getBoundingClientRect().right <= width];
  }}
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


def chromium() -> str:
    """The browser, or a skip; where CI is set its absence is a failure."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    message = "Chromium is not installed: `apt-get install chromium` (Debian) or `brew install chromium`"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def dump(path: Path, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it wrote to the console."""
    command = [chromium(), *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def probed(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    (folder / "probe.html").write_text(PROBE.format(page=html.escape(page)), encoding="utf-8")
    dom, console = dump(folder / "probe.html", folder / "profile", "--window-size=1400,1200")
    assert console == []
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL).group(1)))


def test_opens_with_its_plots_and_a_clean_console(page_file, tmp_path):
    dom, console = dump(page_file, tmp_path / "profile", "--window-size=1280,1000")
    assert console == []
    assert len(re.findall(r"<figure[^>]*>.*?<svg", dom)) >= 2 * 5 + 7 + 4 + 1
    assert 'class="tip"' in dom  # the script ran


def test_the_console_check_can_fail(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("(() => {", "(() => { undefined_name();", 1), encoding="utf-8")
    _, console = dump(broken, tmp_path / "profile")
    assert any("undefined_name" in line for line in console)


@pytest.mark.parametrize(("name", "width"), [("desktop", 1280), ("phone", 390)])
def test_nothing_overflows_and_all_is_drawn(probed, name, width):
    found = probed[name]
    assert found["width"] == width
    assert found["scroll"] == width
    assert found["beyond"] == []
    assert len(found["plots"]) == 2 * 5 + 7 + 4 + 1
    assert min(found["plots"]) > 100
    assert found["tables"] == 2


@pytest.mark.parametrize("name", ["desktop", "phone"])
def test_points_answer_to_keys_and_pointer(probed, name):
    found = probed[name]
    assert found["stops"] == 1
    assert found["titles"] == 0  # replaced by the script's tooltips
    hidden, first = found["first"]
    assert not hidden
    assert "loss" in first
    hidden, last = found["last"]
    assert not hidden
    assert last != first
    assert found["focused"].replace("; ", "") == last
    assert found["closed"]
    assert found["hovered"] == [False, True]
