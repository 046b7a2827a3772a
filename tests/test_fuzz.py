"""Whatever is typed or stored: an exit code of ours, at most one line of error, no traceback, nothing written but under the results.

`DPGBENCH_FUZZ=5000` asks for so many examples of each kind, drawn anew; by default they are few and always the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored import WORDS, write_cell

from dpgbench.cli import COMMANDS, main

EXAMPLES = int(os.environ.get("DPGBENCH_FUZZ", "0"))


def few(count: int):
    return settings(
        max_examples=EXAMPLES or count, deadline=None, derandomize=not EXAMPLES, database=None, suppress_health_check=list(HealthCheck)
    )


KEYS = (
    "task",
    "method",
    "scale",
    "launcher",
    "suite",
    "seed",
    "steps",
    "n",
    "lang",
    "policy.lr",
    "training.betas",
    "budget.flops",
    "budget",
    "retry",
    "scale.instruction",
    "task.label",
    "name",
    "spec",
    "zzz",
    "launcher.sbatch.x",
    "",
    "a.b.c",
    "task.file",
)
PIECES = st.one_of(
    st.sampled_from(
        [
            "a",
            "0",
            "-1",
            "1e400",
            "nan",
            "inf",
            "null",
            "true",
            "all",
            "base",
            "dpg",
            "l2_norm",
            "tiny",
            "core",
            "''",
            '"',
            "'",
            "[",
            "]",
            "{",
            "}",
            "(",
            ")",
            ",",
            ", ",
            ":",
            "=",
            "\\",
            "${",
            "${oc.env:HOME}",
            "}",
            "range(1,5)",
            "glob(*)",
            "choice(a,b)",
            "~",
            "+",
            "@",
            "../x",
            "/etc/x",
            "\x1b[2J",
            "\n",
            "\u202e",
            "\ud800",
            "\0",
            "9" * 400,
            "x" * 300,
            "{a:1}",
            "[1,2]",
            "???",
            "match:dpg",
            "--",
            "%s",
        ]
    ),
    st.text(max_size=4),
)
VALUES = st.lists(PIECES, max_size=4).map("".join)
ARGUMENTS = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), VALUES),
    VALUES,
    st.sampled_from(["--dry-run", "--help", "--format", "json", "--compare", "-x"]),
)
# Those that end in an instant, whatever is asked of them; computing is left out by --dry-run.
STARTS = st.sampled_from(
    [
        ["run", "--dry-run"],
        ["sweep", "--dry-run"],
        ["status"],
        ["list"],
        ["help"],
        ["report"],
        ["export"],
        ["new"],
        [],
        *([*name.split(), "--help"] for name in COMMANDS),
    ]
)


def answered(words: list[str]) -> None:
    """Holds the program to what it promises of any line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code in (0, 1, 2, 130), (words, code)
    if code == 2:
        assert err.getvalue().count("\n") == 1 and err.getvalue().startswith("dpgbench: "), (words, err.getvalue())


@pytest.fixture(scope="module")
def stored():
    with tempfile.TemporaryDirectory() as folder:
        yield write_cell(Path(folder) / "stored")


@few(60)
@given(start=STARTS, words=st.lists(ARGUMENTS, max_size=4))
def test_any_line(start, words):
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            place = [] if start in (["list"], ["export"], ["new"], []) or start[:1] == ["help"] else [f"results={folder}/r"]
            answered([*start, *words, *place])
            written = {path.name for path in Path(folder).iterdir()}
        finally:
            os.chdir(here)
    assert written <= {"r", "mine"}, (start, words, written)


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "delete"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, mutations) -> bytes:
    for kind, where, piece in mutations:
        at = int(where * len(content))
        if kind == "set":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        else:
            content = content[:at] + content[at + len(piece) :]
    return content


@few(40)
@given(name=st.sampled_from(["base.yaml", "active_inheritance.yaml", "influence_less.yaml"]), mutations=MUTATIONS)
def test_any_yaml_of_a_plugin(name, mutations):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own" / "configs" / "method" / "evil.yaml"
        path.parent.mkdir(parents=True)
        path.write_bytes(mutated((ROOT / "configs" / "method" / name).read_bytes(), mutations))
        answered(["list", f"plugins={folder}/own"])
        answered(["run", "task=l2_norm", "method=evil", "--dry-run", f"plugins={folder}/own", f"results={folder}/r"])
        assert [path.name for path in Path(folder).iterdir()] == ["own"]


@few(40)
@given(name=st.sampled_from(["spec.yaml", "result.json", "metrics.jsonl", "env.json", "deployment.jsonl"]), mutations=MUTATIONS)
def test_any_stored_file(stored, name, mutations):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(stored.parents[1], Path(folder) / "r")) / "runs" / stored.name
        (run / name).write_bytes(mutated((run / name).read_bytes(), mutations))
        place = f"results={folder}/r"
        answered(["status", place])
        answered(["export", str(run)])
        answered(["run", f"spec={run}/spec.yaml", "--dry-run", place])
        answered(["sweep", *WORDS, "--dry-run", place])
        assert [path.name for path in Path(folder).iterdir()] == ["r"]


@few(25)
@given(mutations=MUTATIONS)
def test_any_parquet(whole_parquet, mutations):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo.parquet").write_bytes(mutated(whole_parquet, mutations))
        answered(["report", "name=demo", "--format", "json", f"results={folder}"])
        answered(["report", "--compare", "demo", "demo", f"results={folder}"])


@pytest.fixture(scope="module")
def whole_parquet(tmp_path_factory) -> bytes:
    from frames import small_frame

    from dpgbench.store.parquet import write_parquet

    path = tmp_path_factory.mktemp("whole") / "demo.parquet"
    write_parquet(small_frame(), path, suite="demo", title="", command="")
    return path.read_bytes()
