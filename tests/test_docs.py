"""What the README says is what the program does, and the wheel carries what the clone has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile

import pytest
from conftest import README, ROOT

GUIDES = "".join((ROOT / "docs" / name).read_text() for name in ("cluster.md", "models.md"))
COMMANDS = [line.split("#")[0].strip() for line in (README + GUIDES).splitlines() if line.startswith("python -m dpgbench")]


MINUTES = ("check plugin", "check metagrad", "check estimator")  # they compute before they answer


@pytest.mark.parametrize(
    "command", [pytest.param(line, marks=[pytest.mark.slow] * any(f"dpgbench {name} " in line for name in MINUTES)) for line in COMMANDS]
)
def test_every_command_in_the_readme_is_understood(dpgbench, command, plugins, tmp_path):
    """Cells are not run here, but every word is read: sweeps and runs with --dry-run, the rest as they are."""
    words = command.split()[3:]
    words = [word.replace("plugins=mine", f"plugins={plugins}") for word in words]
    words += [] if words[0] in ("list", "new", "export") else [f"results={tmp_path}"]
    if words[0] in ("run", "sweep") and "--dry-run" not in words:
        words.append("--dry-run")
    done = dpgbench(*words)
    if words[0] == "report":
        assert done.code == 2 and re.search("nothing to report|--compare .*: git has no", done.err)
    elif words[0] in ("status", "cancel") and any(word.startswith("name=") for word in words):
        assert done.code == 2 and "no sweep of this name was run" in done.err
    elif words[0] == "export":
        assert done.code == 2 and "not a run folder" in done.err
    else:
        assert done.code == 0, done.err


TORCHRUN = re.findall(r"torchrun --standalone --nproc-per-node=(\d+) -m (dpgbench run [^'\n]+)", README + GUIDES)


@pytest.mark.parametrize(("processes", "command"), sorted(set(TORCHRUN)))
def test_every_torchrun_line_can_be_shared(processes, command, tmp_path):
    """As the first of that many processes sees it, with --dry-run; two of them run for real in test_process_group.py."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
    words = [*command.split()[1:], f"results={tmp_path}", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "dpgbench", *words], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_plugin():
    from dpgbench.plugins.registry import Registry

    for kind in ("method", "task"):
        for file in Registry().files(kind):
            assert re.search(rf"^\| `{file.name}`", README, re.MULTILINE), f"{kind} {file.name} is not in the README's table"


OWN_METHOD = (ROOT / "docs" / "your_method.md").read_text()


def test_the_method_in_the_docs_runs(dpgbench, tmp_path):
    """Its two files as they stand there, and the command below them."""
    for path, text in re.findall(r"```\w+\n# mine/(\S+)\n(.*?)```", OWN_METHOD, re.DOTALL):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (command,) = [line for line in OWN_METHOD.splitlines() if line.startswith("python -m dpgbench run")]
    words = [word.replace("plugins=mine", f"plugins={tmp_path}") for word in command.split()[3:]]
    done = dpgbench(*words, "deployment_texts=64", f"results={tmp_path / 'results'}")
    assert done.code == 0 and "done   language_de brief" in done.out, done


def test_the_table_of_the_bench_has_all_of_it(bench):
    """And nothing that is not there."""
    work = bench("task=l2_norm", "method=base")
    named = set(re.findall(r"`bench\.(\w+)", OWN_METHOD))
    there = {name for name in dir(work) if not name.startswith("_")} - {"lines"}
    assert named == there


def test_make_targets_are_the_readmes_commands():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test", "test-slow", "test-slurm", "smollm2"):
        assert f"make {target}" in README and re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert set(re.findall(r"^make (\S+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)) == {"lint", "test", "test-slow", "test-slurm"}


@pytest.mark.slow
def test_a_wheel_works_outside_the_clone(tmp_path):
    """Plug-ins, configs, page template, weights and the checks of plug-ins travel in it; all work from the wheel alone, and give a cell the
    bytes that the clone gives it."""
    pytest.importorskip("hatchling", reason="building a wheel needs hatchling (in requirements.lock)")
    pytest.importorskip("build", reason="building a wheel needs build (in requirements.lock)")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.split("/")[0] in ("methods", "tasks", "configs", "tests")]
        archive.extractall(site)
    words = ["run", "task=l2_norm", "method=active_inheritance", "n=2", "deployment_texts=8", f"results={tmp_path / 'r'}"]
    code = "import sys, dpgbench; assert sys.argv[1] in dpgbench.__file__; from dpgbench.cli import main; sys.exit(main(sys.argv[2:]))"
    own = f"plugins={tmp_path / 'own'}"
    checked = (["new", "method", "longest", own], ["check", "plugin", "method=longest", own])
    for line in (["list"], words, ["report", *words[1:]], *checked):
        done = subprocess.run(
            [sys.executable, "-c", code, str(site), *line], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "sweep" / "index.html").exists()
    here = [*words[:-1], f"results={tmp_path / 'clone'}"]
    subprocess.run([sys.executable, "-m", "dpgbench", *here], cwd=ROOT, check=True, capture_output=True, timeout=120)
    names = ("metrics.jsonl", "deployment.jsonl", "spec.yaml")
    (installed,), (cloned,) = ([path.parent for path in (tmp_path / place).glob("runs/*/result.json")] for place in ("r", "clone"))
    assert installed.name == cloned.name
    assert all((installed / name).read_bytes() == (cloned / name).read_bytes() for name in names)
