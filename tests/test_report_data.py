"""Stored results for people: the tidy frame against the parquet, figures as objects, errors of one line, and the notebook in docs/."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from frames import row, small_frame
from matplotlib.figure import Figure
from notebook import NOTEBOOK, execute

import dpgbench
from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.store.parquet import frame_of, write_parquet


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    oracle = pd.DataFrame([row(method="oracle", seed=seed, value=1.2) for seed in range(3)])
    frame = pd.concat([small_frame(), oracle], ignore_index=True)
    write_parquet(frame, folder / "demo.parquet", suite="demo", title="", command="")
    return folder


def test_a_sweep_over_budgets_is_as_many_methods_and_a_matched_budget_is_none(tmp_path):
    """One seed with two budgets has two labels; budgets that differ from seed to seed have one."""
    words = ["task=l2_norm", "method=base", "deployment_texts=8"]

    def labels(*lines):
        cells = [cell for line in lines for cell in config.read([*words, *line.split()], sweep=True).cells]
        return sorted(set(frame_of(cells, tmp_path, {})["method_label"]))

    assert labels("seed=0,1 budget.flops=1e10,4e10") == ["base flops=1e+10", "base flops=4e+10"]
    assert labels("seed=0 budget.flops=1e10", "seed=1 budget.flops=4e10") == ["base"]
    assert labels("seed=0,1 budget.flops=1e10") == ["base"]


def test_a_row_per_finished_cell_and_the_normalised_score_by_hand(stored):
    """base has mean 0.2 and the oracle 1.2: dpg's 0.6, 0.8, 1.0 are 0.4, 0.6, 0.8 of the way."""
    finals = dpgbench.load("demo", results=stored)
    assert len(finals) == 15 and finals["final"].all() and not finals["cell"].duplicated().any()
    dpg = finals[finals["method"] == "dpg"]
    assert dpg["score"].tolist() == [0.6, 0.8, 1.0] and dpg["flops"].unique() == [1e10] and dpg["step"].unique() == [9]
    np.testing.assert_allclose(dpg["normalised"], [0.4, 0.6, 0.8])
    assert finals.groupby("role")["method"].unique().map(sorted).to_dict() == {
        "base": ["base"], "method": ["best_n4", "dpg", "late"], "oracle": ["oracle"]}  # fmt: skip
    np.testing.assert_array_equal(finals["metric:acc"], finals["score"])


def test_snapshots_are_all_of_them_and_the_last_is_marked(stored):
    every = dpgbench.load(stored / "demo.parquet", snapshots=True)
    assert len(every) == 18 and every["final"].sum() == 15
    curve = every[(every["method"] == "dpg") & (every["seed"] == 1)]
    assert curve[["step", "score", "final"]].values.tolist() == [[1, 0.2, False], [9, 0.8, True]]


def test_every_column_is_documented(stored):
    frame = dpgbench.load("demo", results=stored)
    named = [
        name.strip()
        for line in dpgbench.load.__doc__.splitlines()
        if line.strip().startswith("|")
        for name in line.split("|")[1].split(",")
    ]
    assert [name for name in frame.columns if not name.startswith("metric:")] == [
        name for name in named if name not in ("column", "---", "metric:NAME")]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda at: dpgbench.load("dmo", results=at), "did you mean 'demo'"),
        (lambda at: dpgbench.load(at / "no.parquet"), "there is no such file"),
        (lambda at: dpgbench.load(at / "other.parquet"), "schema"),
        (lambda at: dpgbench.load(at / "text.parquet"), "cannot be read as parquet"),
        (lambda at: dpgbench.figure("demo", "flop", task="toy", results=at), "did you mean 'flops'"),
        (lambda at: dpgbench.figure("demo", "flops", results=at), "add task="),
        (lambda at: dpgbench.figure("demo", "ranks", task="toy", results=at), "leave task out"),
        (lambda at: dpgbench.figure("demo", "final", task="tay", results=at), "did you mean 'toy'"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(stored, call, said):
    pd.DataFrame({"a": [1]}).to_parquet(stored / "other.parquet")
    (stored / "text.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=said) as caught:
        call(stored)
    assert "\n" not in str(caught.value)


def test_figures_are_matplotlibs_and_can_be_changed(stored, tmp_path):
    figure = dpgbench.figure("demo", "flops", task="toy", results=stored)
    assert isinstance(figure, Figure) and figure.axes[0].get_xscale() == "log"
    assert {"dpg", "base", "oracle"} <= {text.get_text().partition(" ")[0] for text in figure.axes[0].texts}
    figure.axes[0].set_title("mine")
    figure.savefig(tmp_path / "mine.png")
    assert isinstance(dpgbench.figure("demo", "final", task="toy", results=stored), Figure)
    for kind in ("budget", "ranks", "profile"):
        assert isinstance(dpgbench.figure("demo", kind, results=stored), Figure), kind


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, dpgbench; print([name for name in ('torch', 'pandas', 'numpy', 'matplotlib', 'scipy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_notebook_shows_what_its_cells_give():
    """Its pictures are looked at by people; all its words are compared."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 200_000 and notebook["nbformat"] == 4
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == [*range(1, len(codes) + 1)]

    def words(outputs):
        return [output.get("text") or output["data"]["text/plain"] for output in outputs]

    found = execute(notebook)
    assert [words(outputs) for outputs in found] == [words(cell["outputs"]) for cell in codes], "run tests/notebook.py"
    assert sum("image/png" in output.get("data", {}) for cell in codes for output in cell["outputs"]) == 1
