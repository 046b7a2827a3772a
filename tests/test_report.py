"""dpgbench.report: exact tables from hand-made frames, a page that shows everything it was given, and visible holes."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from dpgbench.report import build
from dpgbench.report.frame import read_frame
from dpgbench.report.writing import amount, decimals_for, duration, file_names, number, probability

pytestmark = pytest.mark.filterwarnings("error")
COMMAND = "python -m dpgbench report suite=demo"
ENV = json.dumps({"python": "3.11.2", "versions": {"torch": "2.13.0"}, "git_commit": "0123abc", "device": "cpu"})


def row(task="toy", method="base", label=None, seed=0, step=0, value=0.0, **more):
    """One row of a frame: a finished snapshot of a task led by `acc`, unless `more` says otherwise."""
    label = label or method
    return {
        "cell": f"{task}.{label}.s{seed}", "task": task, "task_label": task, "method": method, "method_label": label, "seed": seed,
        "status": "done", "reason": None, "step": step, "flops": 1e9, "flops_by_phase": json.dumps({"rollouts": 8e8, "deployment": 2e8}),
        "tokens_generated": 1500.0, "tokens_trained": 0.0, "seconds": 4.25, "phi": value - 1, "headline": "acc", "higher_is_better": True,
        "metric:acc": value, "texts": None, "picture": None, "spec": None, "env": None,
    } | more  # fmt: skip


def hole(status, reason, **more):
    """The row of a cell without a result."""
    nothing = {name: None for name in ("phi", "headline", "higher_is_better", "flops_by_phase")}
    numbers = {name: np.nan for name in ("step", "flops", "tokens_generated", "tokens_trained", "seconds", "metric:acc")}
    return row(**more) | nothing | numbers | {"status": status, "reason": reason}


def small_frame():
    rows = [row(seed=seed, value=value, flops=0.0) for seed, value in enumerate((0.1, 0.2, 0.3))]
    rows += [row(method="dpg", seed=seed, step=1, value=0.2, flops=1e8) for seed in range(3)]
    rows += [row(method="dpg", seed=seed, step=9, value=value, flops=(seed + 1) * 1e9, tokens_trained=2.5e6, seconds=1200)
             for seed, value in enumerate((0.5, 0.7, 0.9))]  # fmt: skip
    rows += [hole("failed", "out of memory | step <3>", method="naive", seed=0)]
    rows += [hole("missing", None, method="naive", seed=seed) for seed in (1, 2)]
    rows += [hole("skipped", "needs a text target", method="levenshtein", seed=seed) for seed in range(3)]
    return pd.DataFrame(rows)


# By hand. dpg, final snapshots (step 9) 0.5, 0.7, 0.9: mean 0.7, standard deviation 0.2, half-width 4.3027 * 0.2 / sqrt(3) = 0.4968.
# base 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, half-width 0.2484. Differences 0.4, 0.5, 0.6: mean 0.5, half-width 0.2484;
# all positive, so 2 of the 8 sign patterns are as extreme: p = 0.25, the least 3 pairs can reach. Median FLOPs of 1, 2, 3e9: 2e9.
TOY = """\
# toy

acc at the final snapshot, higher is better; n seeds, Student t intervals, differences paired by seed with a two-sided sign-flip p, \
medians of the compute.

| method | n | mean | 95% interval | difference to base | 95% interval of the difference | p | smallest possible p \
| FLOPs | tokens generated | tokens trained | time |
|-|
| dpg | 3 | 0.700 | [0.203, 1.197] | +0.500 | [+0.252, +0.748] | 0.25 | 0.25 | 2.00e+09 | 1.50k | 2.50M | 20 min |
| base (reference) | 3 | 0.200 | [-0.048, 0.448] | – | – | – | – | 0 | 1.50k | 0 | 4.2 s |
| naive | 0 of 3 | – | – | – | – | – | – | – | – | – | – |

> With 3 paired seeds the smallest p this test can reach is 0.25: fewer than 6 seeds cannot reach 0.05, whatever the data.

Without a result:

- levenshtein: 3 skipped (seeds 0, 1, 2): needs a text target
- naive: 1 failed (seed 0): out of memory \\| step &lt;3>
- naive: 2 missing (seeds 1, 2): no reason recorded
"""


def squeezed(text):
    """Table padding is for readers; its exact width is not what the test is about."""
    return re.sub(r"(?m)^\|[-:|]+\|$", "|-|", re.sub(r" +", " ", text))


def test_task_table_is_the_one_worked_out_by_hand(tmp_path):
    build(small_frame(), tmp_path, suite="demo", command=COMMAND)
    assert squeezed((tmp_path / "tables/toy.md").read_text(encoding="utf-8")) == TOY


def test_summary_leads_with_methods_by_tasks_and_contains_every_task_table(tmp_path):
    build(small_frame(), tmp_path, suite="demo", command=COMMAND)
    summary = squeezed((tmp_path / "tables/summary.md").read_text(encoding="utf-8"))
    assert "12 cells: 6 done, 1 failed, 2 missing, 3 skipped." in summary
    for line in ("| method | toy: acc ↑ |", "| dpg | **0.700 [0.203, 1.197]** |", "| base | 0.200 [-0.048, 0.448] |",
                 "| naive | failed, missing |", "| levenshtein | skipped |"):  # fmt: skip
        assert line in summary
    assert TOY.replace("# toy", "## toy") in summary


def test_lower_is_better_turns_the_order_and_the_oracle_does_not_compete(tmp_path):
    frame = small_frame().assign(higher_is_better=False)
    frame = pd.concat([frame, pd.DataFrame([row(method="oracle", seed=s, value=0.01, higher_is_better=False) for s in range(3)])])
    build(frame, tmp_path, suite="demo", command=COMMAND)
    table = (tmp_path / "tables/toy.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| ([a-z]+(?: \([a-z ]+\))?) ", table)[1:] == ["base (reference)", "dpg", "naive", "oracle (not a competitor)"]
    assert "lower is better" in table
    assert "**0.700" in (tmp_path / "tables/summary.md").read_text(encoding="utf-8")  # dpg is the best (and only) competitor


def everything_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def demo_picture(rng, accuracy):
    figure = Figure(figsize=(2.1, 1.8), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.where(rng.random((6, 7)) < accuracy, 1, -1), cmap="coolwarm", vmin=-1, vmax=1)
    axes.set_xticks([]), axes.set_yticks([])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def demo_frame(seeds=3):
    """Two tasks as a real suite would store them: curves that saturate, best-of-n as single points, one failed cell."""
    rng = np.random.default_rng(5)
    pictures = {level: demo_picture(rng, level) for level in (0.5, 0.75, 0.95)}
    rows = []
    for task, headline, start, end in (("sixseven", "pixel_accuracy", 0.41, 0.93), ("language_de", "share_in_language", 0.01, 0.97)):
        for seed in range(seeds):
            shift = rng.normal(0, 0.02)
            steps = (0, 5, 10, 20, 30, 40, 50, 60)
            plans = {
                "base": [(0, 0.0, start)],
                "active_inheritance_n4": [(1, 2.1e10, start + 0.10)],
                "active_inheritance_n16": [(1, 8.2e10, start + 0.17)],
                "dpg": [(s, 6e9 + 4.2e9 * s, start + (end - start) * (1 - np.exp(-s / 18))) for s in steps],
            }
            for label, points in plans.items():
                method = label.partition("_n")[0]
                if (task, label, seed) == ("language_de", "active_inheritance_n16", 1):
                    reason = 'Traceback (most recent call last):\n  File "runner.py", line 88\nRuntimeError: out of memory'
                    rows.append(hole("failed", reason, task=task, method=method, label=label, seed=seed))
                    continue
                for step, flops, level in points:
                    value = float(np.clip(level + shift + rng.normal(0, 0.015), 0, 1))
                    last = step == points[-1][0]
                    more = {"headline": headline, "metric:acc": np.nan, f"metric:{headline}": value, "flops": flops, "phi": value - 1.2}
                    more |= {"tokens_generated": 640.0 * max(step, 4), "tokens_trained": 640.0 * step, "seconds": 0.6 * step + 2}
                    if method == "dpg":
                        phases = {"rollouts": 0.3, "inner training": 0.25, "metagradients": 0.3, "policy": 0.1, "deployment": 0.05}
                        more |= {"flops_by_phase": json.dumps({name: share * flops for name, share in phases.items()})}
                    if last:
                        texts = [f"{label} s{seed}: der Hund sieht heute einen Baum im Park .", "die Katze malt ein Haus ."]
                        texts += ["the dog sees a tree <script>alert(1)</script>"]
                        spec = f"method: {method}\ntask: {task}\nscale: tiny\nseed: {seed}\noptions:\n  lr: 1.0e-3  # ours\n"
                        more |= {"texts": json.dumps(texts), "spec": spec, "env": ENV}
                    if last and task == "sixseven":
                        more |= {"picture": pictures[0.95 if method == "dpg" else 0.75 if "n16" in label else 0.5]}
                        more |= {"task_description": "The LM head's change spells 67 in a 6x7 patch."}
                    rows.append(row(task=task, method=method, label=label, seed=seed, step=step, **more))
    rows += [hole("skipped", "embedding rewards need a text target", task="sixseven", method="embedding", seed=s) for s in range(seeds)]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return build(demo_frame(), folder, suite="demo", command=COMMAND)


def test_the_same_frame_gives_the_same_bytes_in_any_row_order(demo, tmp_path):
    shuffled = demo_frame().sample(frac=1, random_state=3)
    build(shuffled, tmp_path, suite="demo", command=COMMAND)
    assert everything_in(tmp_path) == everything_in(demo.parent)


def test_files_written_are_exactly_these(demo):
    names = [f"{task}_{axis}.{kind}" for task in ("language_de", "sixseven") for axis in ("flops", "steps") for kind in ("png", "svg")]
    expected = ["index.html", "tables/language_de.md", "tables/sixseven.md", "tables/summary.md", *(f"figures/{name}" for name in names)]
    assert sorted(everything_in(demo.parent)) == sorted(expected)


def test_page_shows_every_method_picture_and_text_with_data_escaped(demo):
    page = demo.read_text(encoding="utf-8")
    for label in ("base", "dpg", "active_inheritance_n4", "active_inheritance_n16", "embedding"):
        assert f"</i>{label}</label>" in page and f'data-value="{label}"' in page
    assert page.count('src="data:image/png;base64,') == 4 * 3  # sixseven only: 4 methods x 3 seeds
    for seed in range(3):
        assert f"dpg s{seed}: der Hund" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>alert" not in page
    assert page.count('<svg class="plot"') == 4 and page.count('role="img"') == 4
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


def test_no_mean_is_drawn_over_a_hole():
    """Seed 1 has no value at step 2, so the mean and its band exist at step 1 only; the other seed's point stays visible behind."""
    from dpgbench.report.figures import _curves

    frame = pd.DataFrame([row(method="dpg", seed=s, step=t, value=0.1 * t + 0.01 * s) for s in (0, 1) for t in (1, 2)])
    frame.loc[3, "metric:acc"] = np.nan
    results = read_frame(frame, "demo")
    (curve,) = _curves(results.tasks[0], results.styles, "step")
    assert curve.mean["x"].tolist() == [1] and len(curve.by_seed[0]) == 2 and len(curve.by_seed[1]) == 1


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
    "half a surrogate pair": (small_frame().assign(texts='["half a pair: \\ud800"]'), "half a pair: ?"),
    "strange labels": (small_frame().assign(**STRANGE), "&lt;i&gt;"),
    "thirteen seeds": (pd.DataFrame(THIRTEEN), "20,000 drawn"),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_holes_are_shown_not_stumbled_over(name, tmp_path):
    frame, said = FRAMES[name]
    page = build(frame, tmp_path / "out", suite="demo", command=COMMAND)
    assert said in page.read_text(encoding="utf-8")
    assert (page.parent / "tables/summary.md").stat().st_size > 20
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is written outside the folder"
    assert not [path for path in tmp_path.rglob(".*")], "no temporary file is left"


def test_parquet_round_trip_changes_nothing(tmp_path):
    demo_frame().to_parquet(tmp_path / "demo.parquet")
    for name, frame in (("direct", demo_frame()), ("stored", pd.read_parquet(tmp_path / "demo.parquet"))):
        build(frame, tmp_path / name, suite="demo", command=COMMAND)
    assert everything_in(tmp_path / "direct") == everything_in(tmp_path / "stored")


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


def test_a_real_browser_runs_the_page_without_an_error(demo, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium executable; on Debian: apt-get install chromium")
    switches = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-sync disable-component-update"
    command = [chromium, *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={tmp_path}"]
    ran = subprocess.run([*command, "--enable-logging=stderr", "--dump-dom", demo.as_uri()], capture_output=True, text=True, timeout=50)
    assert ran.returncode == 0 and "CONSOLE" not in ran.stderr
    assert 'class="sort"' in ran.stdout and not re.search(r'class="seeds-switch"[^>]*hidden', ran.stdout), "the script ran"


def test_warnings_are_errors_here():
    """The marker at the top works, so `no warnings` is tested by every other test of this file."""
    with pytest.raises(UserWarning):
        warnings.warn("as an error", UserWarning, stacklevel=1)
