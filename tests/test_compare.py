"""`report --compare` and `--format json`: what changed between two stored results, and whether it is within noise."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from frames import row

from dpgbench.cli import main
from dpgbench.report.compare import compare
from dpgbench.report.results import read_frame
from dpgbench.store.parquet import write_parquet


def side(name, values, seeds=None, **more):
    """One method on one task, a value per seed."""
    rows = [row(method="dpg", seed=seed, value=value, **more) for seed, value in zip(seeds or range(99), values, strict=False)]
    return read_frame(pd.DataFrame(rows), name)


def only_row(table):
    (found,) = table.rows
    return dict(zip([column.plain for column in table.columns], found.cells, strict=True))


def test_paired_change_by_hand():
    """Changes 0.1, 0.2, 0.3: mean 0.2, sd 0.1, half-width 4.3027 x 0.1 / sqrt(3) = 0.248: includes 0. p = 2/8."""
    got = only_row(compare(side("old", [1, 2, 3]), side("new", [1.1, 2.2, 3.3])))
    assert got["change"].numbers == pytest.approx({"mean": 0.2, "low": 0.2 - 0.2484, "high": 0.2 + 0.2484}, abs=1e-4)
    assert (got["p"].value, got["n"].text, got["verdict"].text) == (0.25, "3", "within noise")


def test_beyond_noise_says_whether_it_is_better():
    old, new = [1, 2, 3, 4], [2.0, 3.01, 4.02, 5.0]
    assert only_row(compare(side("a", old), side("b", new)))["verdict"].text == "beyond noise, better"
    assert (
        only_row(compare(side("a", old, higher_is_better=False), side("b", new, higher_is_better=False)))["verdict"].text
        == "beyond noise, worse"
    )


def test_the_level_holds_for_the_whole_table():
    """Changes 0.1, 0.2, 0.3 and a hair more on each: at 95% the interval of one comparison excludes 0; among ten it does not."""
    rows = [row(task=f"t{t}", method="dpg", seed=s, value=0.0) for t in range(10) for s in range(3)]
    old = pd.DataFrame(rows)
    new = old.assign(**{"metric:acc": 0.1 + 0.1 * old["seed"] + 0.06})
    one = compare(read_frame(old[old.task == "t0"], "a"), read_frame(new[new.task == "t0"], "b"))
    assert only_row(one)["verdict"].text == "beyond noise, better"
    ten = compare(read_frame(old, "a"), read_frame(new, "b"))
    assert {found.cells[-1].text for found in ten.rows} == {"within noise"}


def test_other_seeds_are_compared_unpaired_by_hand():
    """Welch: 1, 2, 3 and 11, 12, 16: means 2 and 13, variances 1 and 7, error sqrt(1/3 + 7/3) = 1.633, degrees (8/3)^2 / ((1/3)^2 / 2 +
    (7/3)^2 / 2) = 2.56."""
    got = only_row(compare(side("a", [1, 2, 3], [0, 1, 2]), side("b", [11, 12, 16], [3, 4, 5])))
    assert got["n"].text == "3 and 3, unpaired" and np.isnan(got["p"].value) and got["verdict"].text == "beyond noise, better"
    from scipy import stats

    half = stats.t.ppf(0.975, 2.56) * 1.63299
    assert got["change"].numbers["low"] == pytest.approx(11 - half, abs=1e-3)


@pytest.mark.slow
def test_size_of_the_verdict_under_the_null():
    """150 times three seeds on a side without a true change: beyond noise 5% of the time."""
    rng = np.random.default_rng(4)
    said = [only_row(compare(side("a", rng.normal(size=3)), side("b", rng.normal(size=3))))["verdict"].text for _ in range(150)]
    assert np.mean([text != "within noise" for text in said]) == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / 150))


def test_what_cannot_be_compared_is_said():
    same = compare(side("a", [1, 2]), side("b", [1, 2]))
    assert only_row(same)["verdict"].text == "same numbers" and "1 same numbers" in same.findings[0]
    assert only_row(compare(side("a", [1]), side("b", [2])))["verdict"].text == "cannot tell: needs two seeds a side"
    turned = compare(side("a", [1, 2]), side("b", [1, 2], headline="phi"))
    assert not turned.rows and "toy: the headline was acc and is phi; not compared." in turned.notes
    other = compare(side("a", [1, 2]), side("b", [1, 2], task="other"))
    assert "Only in a: dpg on toy." in other.notes and "Only in b: dpg on other." in other.notes
    assert other.findings == ("Nothing to compare: no task and method in both.",)
    changed = compare(side("a", [1, 2], spec="lr: 1\nn:\n  k: 2\n"), side("b", [1, 2], spec="lr: 1\nn:\n  k: 3\nnew: x\n"))
    assert "toy, dpg: n.k: 2 → 3, new: absent → x." in changed.notes and only_row(changed)["settings"].text == "2 differ"


def test_machines_whose_bits_differ_are_named():
    """Another torch, vector width or card is a note; the same one, whatever else the environments say, is none."""

    def env(torch="2.13", vectors="AVX2", device="cpu", **more):
        return json.dumps({"packages": {"torch": torch}, "device": device, "processor": {"model": "X", "vectors": vectors}, **more})

    def notes(*envs):
        return [
            note for note in compare(*(side(name, [1, 2], env=text) for name, text in zip("ab", envs, strict=True))).notes if "bits" in note
        ]

    assert notes(env(), env(commit="other")) == [] == notes(env(device="H100"), env(device="H100", vectors="AVX512"))
    (said,) = notes(env(), env(vectors="AVX512"))
    assert "a: torch 2.13 on X AVX2; b: torch 2.13 on X AVX512" in said
    assert "torch 2.6 on X AVX2" in notes(env(), env(torch="2.6"))[0] and "on H100" in notes(env(), env(device="H100"))[0]
    assert notes(env(), None) and notes(env(), "no JSON") and notes(env(), json.dumps({"packages": None, "device": "cpu"}))


@pytest.fixture
def stored(tmp_path):
    """A repository whose results/demo.parquet changed between two commits."""
    results = tmp_path / "results"
    results.mkdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    for shift in (0.0, 0.5):
        frame = pd.DataFrame([row(method=m, seed=s, value=0.1 * s + shift * (m == "dpg")) for m in ("base", "dpg") for s in range(3)])
        write_parquet(frame, results / "demo.parquet", suite="demo", title="Demo", command="python -m dpgbench sweep name=demo")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "results"], check=True)
    return results


def test_a_suite_and_a_commit_of_it(stored, capsys):
    assert main(["report", "--compare", "demo@HEAD~1", "demo", f"results={stored}"]) == 0
    said = capsys.readouterr().out
    assert "2 comparisons: 1 beyond noise, better, 1 same numbers." in said and "# demo@HEAD~1 and demo" in said
    assert main(["report", "--compare", "demo@HEAD", str(stored / "demo.parquet"), f"results={stored}", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == ["2 comparisons: 2 same numbers."]
    assert not (stored / "runs").exists(), "comparing writes nothing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "demp", "demo"], "did you mean 'demo'?"),
        (["--compare", "demo@nowhere", "demo"], "git has no demo.parquet at nowhere"),
        (["--compare", "demo"], "needs two sides"),
        (["--compare", "demo", "demo", "seed=1"], "seed=1: --compare takes two sides"),
        (["--compare", "demo", "none.parquet"], "there is no such file"),
        (["--format", "yaml", "name=demo"], "choose from: html, json"),
        (["name=other"], "nothing to report"),
    ],
)
def test_bad_words_are_one_line(stored, capsys, words, said):
    assert main(["report", *words, f"results={stored}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_json_on_standard_output_and_an_older_schema_refused(stored, capsys):
    import pyarrow.parquet

    assert main(["report", "name=demo", f"results={stored}", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["suite"] == "demo" and found["tasks"]["toy"]["tables"]["results"]["rows"][0]["method"]["text"] == "dpg"
    assert not (stored / "demo").exists(), "no page is written"
    path = stored / "demo.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"dpgbench": b'{"schema": "0"}'}), path)
    assert main(["report", "name=demo", f"results={stored}"]) == 2
    assert "written with schema 0, this dpgbench reads 1" in capsys.readouterr().err
