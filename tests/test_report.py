"""dpgbench.report: a page that shows everything it was given, visible holes, the same bytes from the same frame."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from frames import COMMAND, demo_frame, everything_in, row, small_frame

from dpgbench.report import build
from dpgbench.report.format import amount, decimals_for, duration, file_names, number, probability
from dpgbench.report.results import DARK, PALETTE, darker, read_frame

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return build(demo_frame(), folder, suite="demo", command=COMMAND)


@pytest.mark.slow
def test_the_same_frame_gives_the_same_bytes_in_any_row_order_and_from_parquet(demo, tmp_path):
    demo_frame().sample(frac=1, random_state=3).to_parquet(tmp_path / "demo.parquet")
    build(pd.read_parquet(tmp_path / "demo.parquet"), tmp_path / "stored", suite="demo", command=COMMAND)
    assert everything_in(tmp_path / "stored") == everything_in(demo.parent)


def test_files_written_are_exactly_these(demo):
    stems = [f"{task}_{what}" for task in ("language_de", "sixseven") for what in ("flops", "final")]
    stems += ["summary_budget", "summary_profile", "summary_ranks"]
    versus = [f"versus_{method}" for method in ("active_inheritance_n4", "active_inheritance_n16", "dpg", "embedding")]
    expected = ["index.html", *(f"figures/{stem}.{kind}" for stem in stems for kind in ("png", "svg"))]
    expected += [f"tables/{stem}.{kind}" for stem in ("language_de", "sixseven", "summary", *versus) for kind in ("md", "tex")]
    assert sorted(everything_in(demo.parent)) == sorted(expected)


def test_page_shows_every_method_picture_and_text_with_data_escaped(demo):
    page = demo.read_text(encoding="utf-8")
    for label in ("base", "dpg", "active_inheritance_n4", "active_inheritance_n16", "embedding"):
        assert f"</i>{label}</label>" in page and re.search(rf'<th scope="row"><i[^>]*></i>{label}\b', page)
    assert page.count('src="data:image/png;base64,') == 4  # sixseven only: 4 methods, the first seed
    assert [f"dpg s{seed}: der Hund" in page for seed in range(3)] == [True, True, False], "texts of the first two seeds"
    assert "the first 2 of 3 seeds; the parquet has all" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>alert" not in page
    assert page.count('<svg class="plot"') == 7 and page.count('role="img"') == 7
    assert not re.search(r"<img(?![^>]* alt=\"[^\"]+\")", page), "every picture has an alternative text"
    for text in (COMMAND, "2.13.0", "0123abc", "embedding rewards need a text target", "RuntimeError: out of memory", "scale: tiny"):
        assert html.escape(text) in page


def test_page_loads_nothing_and_its_ids_are_unique(demo):
    page = demo.read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert all(target.startswith(("data:", "#", "tables/")) for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_filter_reaches_tables_figures_pictures_and_texts(demo):
    page = demo.read_text(encoding="utf-8")
    dpg = read_frame(demo_frame(), "demo").styles["dpg"].index
    for tag in ("tr", "g", "figure", "article"):
        assert re.search(rf'<{tag}\b[^>]*data-method="{dpg}"', page), tag


def test_one_look_per_method_in_the_whole_suite():
    styles = read_frame(demo_frame(), "demo").styles
    assert list(styles) == ["active_inheritance_n4", "active_inheritance_n16", "dpg", "embedding", "base"]
    assert len({(style.color, style.marker) for style in styles.values()}) == 5
    many = pd.DataFrame([row(method="x", label=f"x_n{n}") for n in range(40)])
    assert len({(style.color, style.marker) for style in read_frame(many, "many").styles.values()}) == 40


def test_colours_are_seaborns():
    import seaborn
    from matplotlib.colors import to_hex

    colorblind = seaborn.color_palette("colorblind").as_hex()
    assert tuple(colorblind[position] for position in (0, 1, 2, 3, 4, 9, 5, 6, 8)) == PALETTE
    assert [darker(color) for color in PALETTE] == [to_hex(seaborn.set_hls_values(color, l=DARK)) for color in PALETTE]


def test_tables_need_no_figures_library_and_not_all_of_scipy():
    code = (
        "import sys; from dpgbench.report import machine_readable; from frames import small_frame;"
        "assert machine_readable(small_frame(), suite='demo', command='')['versus'];"
        "print(*sorted({'seaborn', 'matplotlib.pyplot', 'scipy.stats', 'torch'} & set(sys.modules)))"
    )
    given = {"cwd": ROOT / "tests", "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    asked = subprocess.run([sys.executable, "-c", code], **given, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == []


def test_no_mean_is_drawn_over_a_hole():
    """Seed 1 has no value at step 2, so the mean and its band exist at step 1 only; the other seed's point stays visible behind."""
    from dpgbench.report.task_figures import method_curves

    frame = pd.DataFrame([row(method="dpg", seed=s, step=t, flops=t * 1e9, value=0.1 * t + 0.01 * s) for s in (0, 1) for t in (1, 2)])
    frame.loc[3, "metric:acc"] = np.nan
    results = read_frame(frame, "demo")
    (curve,) = method_curves(results.tasks[0], results.styles)
    assert curve.mean["x"].tolist() == [1e9] and len(curve.by_seed[0]) == 2 and len(curve.by_seed[1]) == 1


STRANGE = {"task_label": '../a b/"<ü>$x_1$', "method_label": lambda frame: frame["method"] + " $\\alpha$ | <i>\n"}
THIRTEEN = [row(method=method, seed=seed, value=seed * k) for method, k in (("base", 1), ("dpg", 2)) for seed in range(13)]


def first_value(value):
    """The small frame with another value for the first seed of base."""
    frame = small_frame()
    frame.loc[0, "metric:acc"] = value
    return frame


FRAMES = {
    "no column and no row": (pd.DataFrame(), "The frame is empty"),
    "columns and no row": (small_frame().iloc[:0], "The frame is empty"),
    "one seed": (small_frame().query("seed == 0"), "One seed has no interval"),
    "all cells failed": (small_frame().query("status != 'done'"), "No finished cell on this task"),
    "no base": (small_frame().query("method != 'base'"), "No finished cell of base"),
    "only base, no FLOPs": (small_frame().query("method == 'base'"), "0 ways of producing"),
    "all values equal": (small_frame().assign(**{"metric:acc": 0.5}), "All values are equal"),
    "all values zero": (small_frame().assign(**{"metric:acc": 0.0}), "All values are equal"),
    "all values NaN": (small_frame().assign(**{"metric:acc": np.nan}), "no finished cell of this task has a finite score"),
    "zero FLOPs": (small_frame().assign(flops=0.0), "without positive FLOPs"),
    "no FLOPs at all": (small_frame().assign(flops=np.nan), "without positive FLOPs"),
    "headline without a column": (small_frame().assign(headline="nowhere"), "metric:nowhere"),
    "headline phi": (small_frame().assign(headline="phi"), "phi"),
    "no headline": (small_frame().assign(headline=None), "No cell names a headline"),
    "headlines disagree": (small_frame().assign(headline=["acc"] * 4 + ["phi"] * (len(small_frame()) - 4)), "disagree on the headline"),
    "one NaN": (first_value(np.nan), "counted as missing, not averaged"),
    "an infinite value": (first_value(np.inf), "inf"),
    "a cell twice": (pd.concat([small_frame(), small_frame().assign(cell=lambda f: f["cell"] + ".older")]), "More than one cell"),
    "ragged tasks": (pd.concat([small_frame(), pd.DataFrame([row(task="other", seed=s) for s in (0, 1)])]), "not planned"),
    "broken extras": (small_frame().assign(picture=b"GIF89a", texts="{not json", env="[", spec="a: <b>", flops_by_phase="?"), "{not json"),
    "half a surrogate pair": (small_frame().assign(texts='["half a pair: \\ud800"]'), "half a pair: \\ud800"),
    "strange labels": (small_frame().assign(**STRANGE), "&lt;i&gt;"),
    "thirteen seeds": (pd.DataFrame(THIRTEEN), "20,000 drawn"),
}  # fmt: skip


QUICK = {"no column and no row", "all values NaN", "ragged tasks"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FRAMES])
def test_holes_are_shown_not_stumbled_over(name, tmp_path):
    frame, said = FRAMES[name]
    page = build(frame, tmp_path / "out", suite="demo", command=COMMAND)
    assert said in page.read_text(encoding="utf-8")
    assert (page.parent / "tables/summary.md").stat().st_size > 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is written outside the folder"
    assert not [path for path in tmp_path.rglob(".*")], "no temporary file is left"


def test_a_frame_without_needed_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks the column.*method_label"):
        build(small_frame().drop(columns="method_label"), tmp_path, suite="demo", command=COMMAND)
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed_and_the_callers_frame_is_untouched(tmp_path, capsys):
    frame = small_frame()
    before = frame.copy(deep=True)
    build(frame, tmp_path, suite="demo", command=COMMAND, title="A <b>title</b>")
    assert capsys.readouterr() == ("", "")
    pd.testing.assert_frame_equal(frame, before)
    assert "<h1>A &lt;b&gt;title&lt;/b&gt;</h1>" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_file_names_are_portable_and_distinct():
    names = file_names(["a/b", "a b", "A_B", "../..", "", "summary", "qr", "x" * 300])
    assert list(names.values()) == ["a_b", "a_b-2", "A_B-3", "task", "task-2", "summary-2", "qr", "x" * 80]


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (number(0.12345, 3), "0.123"), (number(-0.0001, 3), "0.000"), (number(0.5, 2, sign=True), "+0.50"), (number(float("nan"), 2), "–"),
        (number(12345678.9, None), "1.235e+07"),
        (amount(0), "0"), (amount(999), "999"), (amount(1000), "1.00k"), (amount(12_345), "12.3k"), (amount(999_600), "1.00M"),
        (amount(4.2e12), "4.20e+12"), (duration(4.25), "4.2 s"), (duration(73), "73 s"), (duration(8000), "2.2 h"),
        (probability(0.03125), "0.031"), (probability(0.00002), "2.0e-05"),
        (decimals_for([0.2, 0.7]), 3), (decimals_for([100.0, 300.0]), 0), (decimals_for([5e8]), None), (decimals_for([]), 2),
        (decimals_for([0.5, 0.5]), 3),
    ],
)  # fmt: skip
def test_numbers_in_words(got, expected):
    assert got == expected


def test_warnings_are_errors_here():
    """The marker at the top works, so `no warnings` is tested by every other test of this file."""
    with pytest.raises(UserWarning):
        warnings.warn("as an error", UserWarning, stacklevel=1)
