"""What the page promises: an answer first, worked out by hand; nothing acts but its own script; labels stand apart; a small file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from itertools import pairwise, product
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from frames import COMMAND, row, small_frame
from matplotlib.figure import Figure

from dpgbench.core.protocol import Protocol
from dpgbench.report import build
from dpgbench.report.at_budgets import answers_at, budget_of, budgets_table
from dpgbench.report.inline_svg import StyleSheet, corners_of, inline_svg, moved, steps
from dpgbench.report.plot_style import flops_scale, spread
from dpgbench.report.results import read_frame
from dpgbench.report.table import escape, tex
from dpgbench.report.task_figures import method_curves
from dpgbench.report.task_tables import method_rows
from dpgbench.stats.curves import CurveTable

pytestmark = pytest.mark.filterwarnings("error")
TURNED = "\u202egnp.exe\u2066"
HOSTILE = f"<script>alert(1)</script> [go](javascript:alert(2)) {TURNED} | \u2028 \x1b[2J"


def budgets_of(frame):
    results = read_frame(frame, "demo")
    return budgets_table(results, {task.label: method_rows(task) for task in results.tasks})


def test_the_answer_at_three_budgets_by_hand():
    """No budget is declared, so it is the most that was spent: late's 1e12. dpg ends at 1e10 and keeps its answer; late has none before
    1e12. dpg minus best_n4, the next: 0.3, 0.4, 0.8, mean 0.5, half-width 2.4842 x 0.2646 = 0.657; all three positive: p = 2/8."""
    table = budgets_of(small_frame())
    (toy,) = table.rows
    assert [column.plain for column in table.columns[1:]] == [
        "a tenth of the budget: 1.00e+11 FLOPs", "a third of the budget: 3.33e+11 FLOPs", "all of the budget: 1.00e+12 FLOPs"]  # fmt: skip
    for cell in toy.cells[1:]:
        assert cell.plain == "dpg +0.500 [-0.157, +1.157] over best_n4; not shown, p 0.25" and not cell.bold
    assert table.findings[0] == "With a tenth of the budget, no lead is shown; leading: dpg on 1 of 1 task."
    assert "below 0.05 needs 6 seeds" in table.notes[0]


def test_a_declared_budget_is_the_budget_and_what_is_not_paid_for_is_no_answer():
    """At 1e9 dpg has its first snapshot only, 0.2 on every seed; best_n4's 0.3 leads. At 1e8, a tenth, best_n4 has none: no lead by dpg."""
    frame = small_frame().assign(spec="seed: 0\nbudget:\n  tokens: null\n  flops: 1000000000.0\n")
    task = read_frame(frame, "demo").tasks[0]
    assert budget_of(task) == 1e9
    cells = budgets_of(frame).rows[0].cells
    assert cells[3].text == "best_n4" and cells[1].numbers["next"] in ("base", "dpg") and cells[1].numbers["flops"] == 1e8
    mixed = frame.copy()
    mixed.loc[mixed["method"] == "dpg", "spec"] = "budget:\n  flops: 2e9\n"
    assert budget_of(read_frame(mixed, "demo").tasks[0]) == 1e12


def test_enough_seeds_are_shown_in_words():
    """Eight seeds, always ahead: p = 2/256."""
    values = {"base": 0.1, "dpg": 0.8, "naive": 0.4}
    frame = pd.DataFrame([row(method=name, seed=seed, value=value + 0.01 * seed) for name, value in values.items() for seed in range(8)])
    frame.loc[frame["method"] == "dpg", "metric:acc"] += np.tile([0.0, 0.05], 4)
    table = budgets_of(frame)
    assert table.rows[0].cells[3].small.endswith("over naive; shown, p 0.0078") and table.rows[0].cells[3].bold
    assert table.findings == ("With all of the budget, shown best: dpg on toy.",), "at a third nothing is paid for"


def test_an_answer_is_the_last_snapshot_that_is_paid_for_by_a_loop():
    rng = np.random.default_rng(3)
    for _ in range(200):
        runs = {seed: (np.sort(rng.uniform(1, 10, 4)), rng.normal(size=4)) for seed in range(3)}
        snapshots = pd.concat(pd.DataFrame({"seed": seed, "flops": paid, "value": values}) for seed, (paid, values) in runs.items())
        flops = rng.uniform(1, 11)
        expected = {}
        for seed, (paid, values) in runs.items():
            for cost, value in zip(paid, values, strict=True):
                if cost <= 1.01 * flops:
                    expected[seed] = value
        found = answers_at(CurveTable.of(snapshots), flops)
        assert (found is None) == (len(expected) < 3)
        assert found is None or found.to_dict() == expected


def test_a_curve_ends_with_the_mean_of_all_seeds_also_where_they_ended_at_different_steps():
    """Seed 0 ends at step 2, seed 1 at step 3: step 1 is common, and the end is the mean of 0.4 and 0.8 at the mean of 2e9 and 4e9."""
    rows = [row(method="dpg", seed=0, step=step, flops=flops, value=value) for step, flops, value in ((1, 1e9, 0.1), (2, 2e9, 0.4))]
    rows += [
        row(method="dpg", seed=1, step=step, flops=flops, value=value)
        for step, flops, value in ((1, 1e9, 0.3), (2, 3e9, 0.5), (3, 4e9, 0.8))
    ]
    results = read_frame(pd.DataFrame(rows), "demo")
    (curve,) = method_curves(results.tasks[0], results.styles)
    np.testing.assert_allclose(curve.mean[["x", "value"]], [[1e9, 0.2], [3e9, 0.6]])


def test_labels_are_moved_as_little_as_their_distance_allows():
    """Against every placement on a fine grid."""
    wanted, gap = np.array([0.5, 0.52, 0.1]), 0.1
    found = spread(wanted, gap)
    grid = np.linspace(0, 1, 31)
    allowed = [places for places in product(grid, repeat=3) if all(b - a >= gap - 1e-9 for a, b in pairwise(sorted(places)))]
    best = min(sum((np.array(places) - wanted) ** 2) for places in allowed)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(sorted(found))) and list(np.argsort(found)) == [2, 0, 1]
    assert sum((found - wanted) ** 2) <= best + 1e-12 and sum((found - wanted) ** 2) > best - 0.01
    crowded = spread(np.full(30, 0.99), 0.1)
    assert crowded.min() == 0 and crowded.max() == pytest.approx(1) and np.allclose(np.diff(np.sort(crowded)), 1 / 29)


def test_ticks_stand_at_one_two_and_five():
    def shown(low, high):
        axes = Figure().add_subplot()
        flops_scale(axes, low, high)
        axes.figure.draw_without_rendering()
        left, right = axes.get_xlim()
        ticks = [*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks()]
        return {tick.get_loc(): tick.label1.get_text() for tick in ticks if left <= tick.get_loc() <= right}

    assert set(shown(1.2e10, 3e11).values()) >= {"2×10¹⁰", "5×10¹⁰", "10¹¹", "2×10¹¹"}
    assert {"10¹⁰", "10¹¹", "2", "5"} <= set(shown(2e9, 3e11).values())
    assert {text for text in shown(1e6, 1e12).values() if text} == {f"10{power}" for power in ("⁶", "⁷", "⁸", "⁹", "¹⁰", "¹¹", "¹²")}


def test_relative_lines_end_where_absolute_ones_did():
    rng = np.random.default_rng(0)
    points = rng.uniform(-500, 500, (40, 2))
    written = steps("M " + " \nL ".join(f"{x:.2f} {y:.2f}" for x, y in points) + " z")
    start, _, rest = written.removesuffix("z").partition("l")
    numbers = [float(number) for number in re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+)", rest)]
    at = np.array([float(number) for number in re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+)", start)])
    walked = [at] + [at := at + step for step in np.array(numbers).reshape(-1, 2)]
    np.testing.assert_allclose(walked, points, atol=0.056)
    assert steps("M 0 3.5 L 0 -3.50 M 1 1 C 0 0 1 1 2 2 ") == "M0 3.5l0-7M1 1C0 0 1 1 2 2"


def test_lines_in_one_direction_are_one_and_a_way_back_is_not():
    assert steps("M 0 0 L 1 0 L 3 0 L 3 2 L 3 5 L 4 6 L 6 8") == "M0 0l3 0 0 5 3 3"
    assert steps("M 0 0 L 5 0 L 2 0 L 2 0") == "M0 0l5 0-3 0 0 0"


def test_a_path_is_moved_by_its_start_and_its_corners_are_those_of_its_points():
    rng = np.random.default_rng(1)
    points = rng.uniform(-50, 50, (12, 2)).round(1)
    path = steps("M " + " L ".join(f"{x:.1f} {y:.1f}" for x, y in points) + " z")
    np.testing.assert_allclose(corners_of(path), [*points.min(0), *points.max(0)], atol=0.02)
    points += [3.2, -70]
    np.testing.assert_allclose(corners_of(moved(path, 3.2, -70.0)), [*points.min(0), *points.max(0)], atol=0.02)
    assert moved("M0 0l-3.5 0", 0.1, 1.0) == "M.1 1l-3.5 0" and corners_of("M1 2") == (1, 2, 1, 2)
    assert moved("M1 1C0 0 1 1 2 2", 1, 1) is None and corners_of("M1 1l1 1M5 5l1 1") is None


def test_only_what_leaves_the_axes_is_clipped():
    svg = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 99 99">
      <defs><clipPath id="axes"><rect x="10" y="10" width="50" height="50"/></clipPath></defs>
      <path d="M 10 20 L 60 20" clip-path="url(#axes)"/><path d="M 10 20 L 61 20" clip-path="url(#axes)"/>
      <g clip-path="url(#axes)"><path d="M 20 20 L 30 30"/></g><g clip-path="url(#axes)"><path d="M 0 0 C 1 1 2 2 3 3"/></g></svg>"""
    paths = list(ElementTree.fromstring(inline_svg(svg, "a-", "lines", StyleSheet())).iter("path"))
    assert [path.get("clip-path") for path in paths] == [None, "url(#a-0)", None, "url(#a-0)"]


def test_a_plot_says_a_style_once_and_draws_in_place_what_is_used_once():
    svg = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9">
      <defs><path id="once" d="M 1 1 L 2 2" style="stroke: #111111"/><path id="tick" d="M 0 0 L 0 3" style="stroke: #222222"/></defs>
      <g style="fill: #333333"><use xlink:href="#once" x="0" y="4"/></g>
      <use xlink:href="#tick" x="1" y="1" style="fill: #333333"/><use xlink:href="#tick" x="2" y="1" style="fill: #333333"/></svg>"""
    sheet = StyleSheet()
    root = ElementTree.fromstring(inline_svg(svg, "a-", "two ticks", sheet))
    defs, shape, ticks = root.find("defs"), root.find("path"), root.findall("use")
    assert shape.attrib == {"d": "M1 5l1 1", "class": "p0"} and [tick.get("class") for tick in ticks] == ["p1", "p1"]
    assert [path.get("style") for path in defs] == ["stroke:#222222"]  # rules that look for `.plot` do not reach a copy
    assert sheet.css().splitlines() == [".plot .p0 {fill:#333333;stroke:#111111}", ".plot .p1 {fill:#333333}"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    frame = small_frame()
    frame["method_label"] = frame["method_label"].replace("dpg", HOSTILE)
    frame["task_label"], frame["texts"], frame["spec"] = HOSTILE, json.dumps([HOSTILE]), HOSTILE
    frame.loc[frame["status"] != "done", ["texts", "spec"]] = None
    return build(frame, tmp_path_factory.mktemp("hostile"), suite="demo", command=COMMAND, title=HOSTILE)


def test_labels_and_texts_cannot_act(hostile):
    page = hostile.read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "&lt;script&gt;alert(1)" in page
    assert not re.search(r'(?:href|src|action)="\s*javascript:', page) and not re.search(r"<[^>]*\son\w+=", page)
    shown = [*hostile.parent.glob("tables/*"), *hostile.parent.glob("figures/*.svg"), hostile]
    assert len(shown) > 8
    for path in shown:
        text = path.read_text(encoding="utf-8")
        assert not set(text) & set("\u202e\u2066\u2028\x1b"), path.name
    assert r"\u202egnp.exe\u2066" in page and r"\x1b[2J" in page
    summary = (hostile.parent / "tables/summary.md").read_text(encoding="utf-8")
    assert "<script" not in summary and "](javascript" not in summary
    borders = [len(re.findall(r"(?<!\\)\|", line)) for line in summary.splitlines() if line.startswith("|")]
    rules = [index for index, line in enumerate(line for line in summary.splitlines() if line.startswith("|")) if line.startswith("|-")]
    assert len(rules) == 5
    for start, end in pairwise([*(index - 1 for index in rules), len(borders)]):
        assert len(set(borders[start:end])) == 1, "a label's own bar is no border of a cell"


def test_escaped_by_hand():
    assert escape("a|b <i> [x](javascript:y) \u202e") == r"a\|b &lt;i> [x]\(javascript:y) \u202e"
    assert tex("\u202e") == r"\textbackslash{}u202e"


def test_the_policy_lets_the_pages_own_script_run_and_no_other(hostile):
    page = hostile.read_text(encoding="utf-8")
    (content,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    rules = dict(rule.strip().partition(" ")[::2] for rule in html.unescape(content).split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    told = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:", "script-src": f"'sha256-{told}'",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script>")


def test_the_answer_stands_before_all_else_and_tasks_are_folded(hostile):
    page = hostile.read_text(encoding="utf-8")
    assert page.index('id="answer"') < page.index('class="controls"') < page.index('id="summary"') < page.index('id="task-0"')
    assert re.search(r'<section class="task"><details>\s*<summary id="task-0">', page)


def test_what_the_primary_tests_show_is_the_first_answer(tmp_path):
    """Eight seeds, always ahead of base (p 2/256) and never of naive, which is not said there."""
    rows = [row(method=name, seed=seed, value=value + 0.01 * seed) for name, value in (("base", 0.1), ("dpg", 0.8)) for seed in range(8)]
    rows += [row(method="naive", seed=seed, value=0.8 + 0.01 * seed + 0.1 * (-1) ** seed) for seed in range(8)]
    page = build(pd.DataFrame(rows), tmp_path, suite="demo", command=COMMAND, protocol=Protocol(("dpg",))).read_text(encoding="utf-8")
    answer = page[page.index('id="answer"') : page.index('class="controls"')]
    assert "Over all tasks dpg is shown to be better than base.</p>" in answer and "not shown to differ from naive" not in answer
    assert answer.index("is shown to be better") < answer.index("of the budget")


@pytest.mark.parametrize("suite", ["methods"])
def test_the_committed_page_is_under_a_megabyte(suite):
    assert (ROOT / "results" / suite / "index.html").stat().st_size < 1_000_000
