"""The page in a real browser, from disk: nothing is requested, every image loads, sorting and filtering do what they say.

The browser is driven by a script of the test's own at the end of a copy of the page: it clicks, and writes what it then sees into the
document, which `--dump-dom` prints. Needs a `chromium` (or google-chrome) executable; on Debian: apt-get install chromium.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from frames import COMMAND, demo_frame

from dpgbench.report import build
from dpgbench.report.html import policy
from dpgbench.report.results import read_frame

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium executable; on Debian: apt-get install chromium")

# A block, so that its names are not the page's. Visible means laid out: neither hidden nor display:none, in itself or in what holds it.
DRIVER = """{
const seen = {};
const visible = (e) => e.getClientRects().length > 0;
const all = (s, root = document) => [...root.querySelectorAll(s)];
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const text = (cell) => [...cell.childNodes].filter((n) => n.nodeType === Node.TEXT_NODE).map((n) => n.data).join("").trim();
const column = (table, i) => all("tbody tr", table).map((r) => r.cells[i].dataset.value ?? text(r.cells[i]));
const means = document.querySelector("table.matrix");
const head = means.querySelectorAll("thead th");
head[1].click(); seen.firstClick = column(means, 1); seen.sortedBy = head[1].getAttribute("aria-sort");
head[1].click(); seen.secondClick = column(means, 1);
head[0].click(); seen.byName = column(means, 0);
all(".sort")[0].focus(); seen.sortIsAButton = document.activeElement.tagName;
const METHOD = "__METHOD__";
const of = (s) => all(s).filter((e) => e.dataset.method.split(" ").includes(METHOD));
const box = document.querySelector(`[data-toggle-method="${METHOD}"]`);
const kinds = ["tr", "td", "g", "figure", "article"];
const shown = () => Object.fromEntries(kinds.map((t) => [t, of(t + "[data-method]").filter(visible).length]));
seen.before = shown();
box.click(); seen.filtered = shown(); seen.othersStay = all("tr[data-method]").filter(visible).length;
box.click(); seen.back = shown();
document.querySelector("[data-none]").click(); seen.none = all("main [data-method]").filter(visible).length;
document.querySelector("[data-all]").click(); seen.all = shown();
const samples = document.querySelector("[data-samples]");
const seeds = () => [...new Set(all("article", samples).filter(visible).map((e) => e.dataset.seed))];
seen.seedBefore = seeds(); all("[data-show-seed]", samples)[1].click(); seen.seedAfter = seeds();
const search = samples.querySelector("[data-search]");
search.value = "KATZE"; search.dispatchEvent(new Event("input"));
seen.found = [...new Set(all(".card li", samples).filter(visible).map((e) => e.textContent))];
all("img").forEach((i) => { i.loading = "eager"; });
const requests = () => performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
const loaded = (image) => image.decode().catch(() => { image.dataset.broken = "yes"; });
const report = () => {
  const out = document.createElement("pre");
  out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
};
Promise.all(all("img").map(loaded)).then(() => {
  seen.images = all("img").length; seen.broken = all("img").filter((i) => i.dataset.broken || !i.naturalWidth).length;
  seen.requests = requests();
  // A request and a script that the page does not have itself: its policy refuses both, and says so.
  const refused = new Promise((done) => {
    seen.refused = [];
    document.addEventListener("securitypolicyviolation", (e) => {
      seen.refused.push(e.effectiveDirective);
      if (seen.refused.length > 1) done();
    });
  });
  const foreign = document.createElement("script"); foreign.textContent = "document.title = 'taken over';"; document.body.append(foreign);
  const control = new Image(); control.src = "http://127.0.0.1:9/control.png";
  return refused;
}).then(() => { seen.title = document.title; report(); });
}"""


# What a page of 390 or 1,400 pixels' width says of itself, in a frame of that width: a window cannot be as narrow everywhere.
MEASURE = """
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const right = (element) => element.getBoundingClientRect().right;
const heads = [...document.querySelectorAll("th")].filter((h) => h.firstChild && ["p", "Holm p"].includes(h.firstChild.data));
const outside = heads.filter((h) => right(h) > right(h.closest(".scroll")) + 1).map((h) => h.closest("table").caption?.textContent);
const page = document.documentElement;
parent.postMessage({ width: page.clientWidth, needed: page.scrollWidth, columns: heads.length, outside }, "*");
"""
FRAME = """<iframe src="measured.html" style="width: {width}px; height: 900px; border: 0"></iframe><script>
addEventListener("message", (event) => {{
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(event.data); document.body.append(out);
}});</script>"""


def allowing(page: str, driver: str) -> str:
    """The page with a script at its end that its policy knows as well."""
    (own,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    escaped = html.escape(policy(own)).replace("&#x27;", "&#39;")
    assert page.count(escaped) == 1
    return page.replace(escaped, html.escape(policy(own, driver))).replace("</body>", f"<script>{driver}</script></body>")


def browse(page):
    """(what a script wrote into the element `seen`, the browser's log)."""
    switches = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-sync disable-component-update"
    command = [CHROMIUM, *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--window-size=1500,1000", "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = re.search(r'<pre id="seen">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, "the driver did not come to its end: " + "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(found.group(1))), ran.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(demo_frame(), tmp_path_factory.mktemp("browsed"), suite="demo", command=COMMAND)


@pytest.fixture(scope="module")
def browsed(built):
    """(what the driver saw, the browser's log) of the demo page."""
    method = str(read_frame(demo_frame(), "demo").styles["dpg"].index)
    driven = built.with_name("driven.html")
    driven.write_text(allowing(built.read_text(encoding="utf-8"), DRIVER.replace("__METHOD__", method)), encoding="utf-8")
    return browse(driven)


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_a_telephone_and_p_is_in_view_on_a_desk(built, width):
    measured = built.with_name("measured.html")
    measured.write_text(allowing(built.read_text(encoding="utf-8"), MEASURE), encoding="utf-8")
    frame = built.with_name("frame.html")
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    seen, _ = browse(frame)
    assert seen["needed"] <= seen["width"] <= width, "the page itself does not scroll sideways"
    assert seen["columns"] > 2 and (width < 1400 or seen["outside"] == [])


def test_no_console_message_no_request_and_every_image_loads(browsed):
    """The policy's own two refusals, which the driver asked for, are all that the console says."""
    seen, log = browsed
    said = [line for line in log.splitlines() if "CONSOLE" in line]
    assert all("Content Security Policy" in line for line in said), said
    assert seen["requests"] == [] and len(seen["refused"]) == 2 and seen["title"] != "taken over"
    assert seen["images"] == 4 and seen["broken"] == 0


def test_a_click_on_a_heading_sorts_with_the_best_on_top_and_holes_last(browsed):
    seen = browsed[0]
    numbers = [float(value) for value in seen["firstClick"] if value]
    assert len(numbers) == 4 and numbers == sorted(numbers, reverse=True) and seen["sortedBy"] == "descending"
    assert seen["firstClick"][-1] == seen["secondClick"][-1] == "", "a method without a score is last in either order"
    assert [float(value) for value in seen["secondClick"] if value] == sorted(numbers)
    assert seen["byName"] == ["active_inheritance_n4", "active_inheritance_n16", "base", "dpg", "embedding"]
    assert seen["sortIsAButton"] == "BUTTON"


def test_the_filter_hides_a_method_everywhere_and_brings_it_back(browsed):
    seen = browsed[0]
    assert all(count > 0 for count in seen["before"].values())
    assert set(seen["filtered"].values()) == {0} and seen["othersStay"] > 0
    assert seen["back"] == seen["before"] == seen["all"] and seen["none"] == 0


def test_seeds_switch_and_texts_are_searched(browsed):
    seen = browsed[0]
    assert seen["seedBefore"] == ["0"] and seen["seedAfter"] == ["1"]
    assert seen["found"] == ["die Katze malt ein Haus ."]
