"""Shared pieces of the tests. Everything runs offline, on one thread, in seconds."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.register_assert_rewrite("faults")  # what fails in its checks is then shown with its values, as in a test file

# A cell small enough for tests: every part of a run, two policy updates.
SMALL = ["steps=2", "completions=16", "group_size=4", "deployment_texts=16", "deployment_steps=null", "snapshots=2"]


@dataclass
class Finished:
    code: int
    out: str
    err: str


LONGEST = (  # files whose tests take longest: they start first, and no process is left with one at the end
    "test_tasks_and_methods", "test_models", "test_checkpoint", "test_score_task", "test_launch", "test_process_group", "test_results",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture
def program():
    """The program in a process of its own, as a user starts it: seconds of imports, for what only a process shows."""

    def run(*words: str, timeout: float = 180) -> Finished:
        done = subprocess.run([sys.executable, "-m", "dpgbench", *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def dpgbench(capsys, monkeypatch):
    """The program in this process, with what it says and its exit code."""
    from dpgbench.cli import main

    monkeypatch.chdir(ROOT)

    def run(*words: str) -> Finished:
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        return Finished(code, said.out, said.err)

    return run


TINY = ["steps=1", "completions=8", "group_size=4", "deployment_texts=8", "deployment_steps=null", "snapshots=2"]
FINISHED = ["task=l2_norm,language", "method=base,dpg", "seed=0,1", *TINY]


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> Path:
    """The cells of FINISHED, run once."""
    from dpgbench import config
    from dpgbench.run.cell import run_cell

    results = tmp_path_factory.mktemp("finished")
    for cell in config.read(FINISHED, sweep=True).cells:
        assert run_cell(cell.spec, results) == "done"
    return results


@pytest.fixture
def finished(_finished, tmp_path) -> Path:
    """A results folder of one's own with the finished cells of FINISHED."""
    return Path(shutil.copytree(_finished, tmp_path / "finished"))


@pytest.fixture
def imports_of():
    """The names of all modules a command line loads, to hold quick commands to importing nothing heavy."""

    def run(*words: str) -> set[str]:
        code = "import sys; from dpgbench.cli import main; main(sys.argv[1:]); print('\\n'.join(sys.modules), file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        return set(done.stderr.split())

    return run


def stop_at(step: int, counter: str = "step"):
    """A watcher that sends SIGTERM once, when the line of `step` is recorded: the next checkpoint is the last thing that happens."""
    sent = []

    def watch(line: dict) -> None:
        if line.get(counter) == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.fixture
def bench(tmp_path):
    """A cell's workbench on the tiny scale, its lines collected in `bench.lines`."""

    from dpgbench import config
    from dpgbench.run.cell import RunContext, _Cell
    from dpgbench.store.run_folder import RunFolder

    def make(*words: str):
        said = {word.split("=")[0]: word for word in (*SMALL, *words)}
        spec = config.read(list(said.values()), sweep=False).cells[0].spec
        folder = RunFolder.of(tmp_path, spec)
        folder.path.mkdir(parents=True, exist_ok=True)
        cell = _Cell(spec, RunContext(folder))
        cell.bench.lines = []
        cell.bench._record = cell.bench.lines.append
        return cell.bench

    return make


@pytest.fixture(scope="session")
def worlds():
    """The tiny world with a cell's settings; the target is loaded once, for nobody writes it."""
    from dpgbench.worlds import models
    from dpgbench.worlds.world import World, corpus

    cache = []

    def make(spec):
        cache[:] = cache or models.load_target(spec.scale)
        return World(spec.scale, spec.training, corpus(spec.scale), *cache)

    return make


@pytest.fixture
def advantages_used(monkeypatch):
    """What enters TRL's loss: one tensor of advantages per step, collected while the test runs."""
    from trl import GRPOTrainer

    used, inner = [], GRPOTrainer._generate_and_score_completions

    def spy(self, inputs):
        output = inner(self, inputs)
        used.append(output["advantages"].clone())
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", spy)
    return used


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict:
    """All that a run of `faults.pretend` leaves when nothing disturbs it."""
    from faults import numbers, pretend

    return numbers(pretend(tmp_path_factory.mktemp("quiet")))


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Words for a real cell whose method takes four steps that cost nothing; `trouble(at=...)` says what happens at each of them."""
    from faults import WALK

    own = tmp_path / "own"
    (own / "methods").mkdir(parents=True)
    (own / "configs" / "method").mkdir(parents=True)
    (own / "methods" / "walk.py").write_text(WALK)
    (own / "configs" / "method" / "walk.yaml").write_text("name: walk\n")

    def trouble(at) -> list[str]:
        monkeypatch.setitem(sys.modules, "trouble_of_tests", SimpleNamespace(at=at))
        rest = ["deployment_texts=8", "deployment_steps=null", "launcher.checkpoint_seconds=0.0"]
        return ["sweep", "task=l2_norm", "method=walk", f"plugins={own}", *rest]

    return trouble


METHOD_FILE = '''\
"""Writes the same text for every prompt."""

from dpgbench.api import Method, Snapshot


class Parrot(Method):
    version = 3

    def run(self, bench):
        yield Snapshot(0, lambda prompts: ["the cat sleeps."] * len(prompts))
'''

README = (ROOT / "README.md").read_text()


def write_readme_files(folder: Path) -> Path:
    """The files the README shows ("# mine/..." is their first line), where a user would put them."""
    for name, text in re.findall(r"```(?:python|yaml)\n# mine/(\S+)\n(.*?)```", README, re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@functools.cache
def own_plugins() -> Path:
    """The folder of plug-ins that are held to the contracts beside the project's: DPGBENCH_PLUGINS, or the README's example."""
    given = os.environ.get("DPGBENCH_PLUGINS")
    if given:
        return Path(given).resolve()
    folder = tempfile.TemporaryDirectory(prefix="dpgbench-own-")
    atexit.register(folder.cleanup)
    return write_readme_files(Path(folder.name))


@pytest.fixture
def plugins(tmp_path):
    """A user's own folder with the README's task, a method and a method that does not parse."""
    write_readme_files(tmp_path)
    for kind, name, text in (("method", "parrot", METHOD_FILE), ("method", "broken", "class Broken(Method:\n")):
        (tmp_path / f"{kind}s").mkdir(exist_ok=True)
        (tmp_path / "configs" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{kind}s" / f"{name}.py").write_text(text)
        (tmp_path / "configs" / kind / f"{name}.yaml").write_text(f"name: {name}\n")
    return tmp_path
