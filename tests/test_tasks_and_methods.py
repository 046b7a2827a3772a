"""Contracts every plug-in keeps, the project's and a user's: found by the registry, so a new file is tested without a new test.

The README's example stands for a user's own; `check plugin plugins=DIR` puts the same questions (`dpgbench.run.plugin_check`) to others.
"""

from __future__ import annotations

import sys

import pytest
from conftest import own_plugins

from dpgbench import config
from dpgbench.api import Options, TaskInfo, TaskView
from dpgbench.cli import main
from dpgbench.core.paths import home
from dpgbench.plugins.registry import Registry
from dpgbench.run import plugin_check

PLUGINS = f"plugins={own_plugins()}"
REGISTRY = Registry(own_plugins())
TASKS = [file.name for file in REGISTRY.files("task")]
METHODS = [file.name for file in REGISTRY.files("method")]


@pytest.fixture(scope="module", params=TASKS)
def prepared(request, worlds):
    """A prepared task with its default options; a score's texts are fewer, which makes Phi no less a function to differentiate."""
    fewer = ["samples=128", "fresh=128"] * ("scores" in REGISTRY.find("task", request.param).defines)
    spec = config.read([f"task={request.param}", *fewer, PLUGINS], sweep=False).cells[0].spec
    return plugin_check.Prepared.of(REGISTRY, spec, worlds(spec))


@pytest.mark.parametrize("check", plugin_check.TASK_CHECKS, ids=lambda check: check.__name__)
def test_a_task_does_what_it_must(prepared, check):
    assert check(prepared)


def test_a_method_sees_no_measure(prepared):
    """The view has the dev split's signal, the score and the hint, and nothing of the test split."""
    view = TaskView(prepared.task)
    assert not hasattr(view, "measure") and callable(view.signal)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    """A first line that is a sentence; ours also state the goal in words and quote where it comes from."""
    file = REGISTRY.find("task", name)
    assert plugin_check.says_what_it_is(file)
    if plugin_check.is_ours(file):
        assert {"version", "headline", "hint", "draw"} <= file.defines
        assert "arXiv" in sys.modules[REGISTRY.load("task", name).__module__].__doc__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_and_judges_tasks(name):
    assert plugin_check.says_what_it_is(REGISTRY.find("method", name))
    spec = config.read([f"method={name}", PLUGINS], sweep=False).cells[0].spec
    reason = REGISTRY.make("method", name, spec.method).supports(TaskInfo("none", Options({}), frozenset()))
    assert reason is None or isinstance(reason, str)


@pytest.mark.parametrize("kind", ["method", "task"])
def test_every_plugin_has_a_preset_and_the_other_way_round(kind):
    assert {file.name for file in REGISTRY.files(kind)} <= set(REGISTRY.presets(kind))
    assert (home() / f"{kind}s").is_dir()


def run_small(method: str, tasks: list[str]) -> None:
    """Two steps each, in one process; a skipped pair says why."""
    fewer = ["n=2"] * (method == "active_inheritance")
    for cell in config.read([f"task={','.join(tasks)}", f"method={method}", *fewer, PLUGINS, *plugin_check.SMALL], sweep=True).cells:
        if not cell.skip:
            assert plugin_check.runs(cell.spec, own_plugins())


QUICK = {"dpg", "base", "oracle", "prompt_only", "active_inheritance"}  # one that trains a policy, and those that train none


@pytest.mark.parametrize("method", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in METHODS])
def test_every_method_runs(method):
    """On the tasks that `check plugin` gives it: a method knows of a task whether it has a score, and little else."""
    run_small(method, plugin_check.partners(REGISTRY, "method", method))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_dpg_runs_on_every_task(task):
    """It differentiates all of a task."""
    run_small("dpg", [task])


@pytest.mark.parametrize(("ended", "left", "said"), [("interrupted", "metrics.jsonl", "interrupted"), ("busy", None, "missing")])
def test_a_cell_that_did_not_end_is_named(monkeypatch, ended, left, said):
    """It has no error.txt, and how it ended is the answer."""

    def run_cell(spec, results, plugins):
        folder = plugin_check.RunFolder.of(results, spec).path
        folder.mkdir(parents=True)
        if left:
            (folder / left).touch()
        return ended

    monkeypatch.setattr(plugin_check, "run_cell", run_cell)
    spec = config.read(["task=language", "method=base"], sweep=False).cells[0].spec
    with pytest.raises(plugin_check.Broken, match=f"the cell did not end: {ended} .*{said}"):
        plugin_check.runs(spec, None)


# ---- the commands


def test_a_folder_of_ones_own_is_held_to_the_contracts(tmp_path, worlds):
    """A signal that its gradient does not belong to, a measure that falls as Phi rises, and a random draw in `prepare` are found out."""
    for folder, suffix, text in (("tasks", "py", WRONG), ("configs/task", "yaml", "name: wrong")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"wrong.{suffix}").write_text(text)
    spec = config.read(["task=wrong", f"plugins={tmp_path}"], sweep=False).cells[0].spec
    subject = plugin_check.Prepared.of(Registry(tmp_path), spec, worlds(spec))
    said = {}
    for check in plugin_check.TASK_CHECKS:
        try:
            check(subject)
        except plugin_check.Broken as broken:
            said[check] = str(broken)
    assert set(said) == {plugin_check.gradient_is_right, plugin_check.following_it_helps, plugin_check.same_every_time}
    assert "look for .detach()" in said[plugin_check.gradient_is_right]
    assert "draw in prepare from torch.Generator().manual_seed(0)" in said[plugin_check.same_every_time]
    assert "turn the sign of one of the two" in said[plugin_check.following_it_helps]


def test_what_new_writes_passes_its_checks(tmp_path, capsys, monkeypatch):
    """Both kinds, out of the box, in the folder that is named where none is."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "task", "greeting"]) == 0 and main(["new", "method", "longest"]) == 0
    told = capsys.readouterr().out
    assert "wrote mine/tasks/greeting.py" in told and "python -m dpgbench check plugin method=longest plugins=mine" in told
    monkeypatch.setattr(plugin_check, "partners", lambda registry, kind, name: ["base"] if kind == "task" else ["greeting"])
    assert main(["check", "plugin", "plugins=mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing wrong" and all(line.startswith("ok") for line in lines[:-1])
    assert any("method longest: runs with greeting" in line for line in lines)


def test_check_plugin_says_what_is_wrong(tmp_path, capsys):
    """A line for each question, and exit code 1; a file that cannot be used is a line as well."""
    assert main(["new", "method", "longest", f"plugins={tmp_path}"]) == 0
    file = tmp_path / "methods/longest.py"
    file.write_text(file.read_text().replace("yield Snapshot", "return Snapshot"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/lost.py").write_text("class Lost(Task): pass\n")
    capsys.readouterr()
    assert main(["check", "plugin", f"plugins={tmp_path}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("WRONG   task lost: file: lost.py, line 1: Task is not defined")
    assert lines[1].startswith("WRONG   method longest: file: longest.py, line 15: `run` returns a Snapshot; it must yield it")
    assert lines[2:] == ["2 wrong"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("new", "new nothing: write `new task NAME` or `new method NAME`"),
        ("new suite x", "new suite: write `new task NAME`"),
        ("new task", "new task: no name is not understood"),
        ("new task a b", "new task: b is not understood"),
        ("new task a seed=0", "new task: seed is not understood"),
        ("new task 2fast", "new task 2fast: a name is letters, digits and _, a letter first"),
        ("new task my-task", "try my_task"),
        ("new task größe", "a name is letters, digits and _"),
        ("new task all", "try my_task"),
        ("new task ../x", "try x"),
        ("new task language", "tasks/language.py is there already; choose another name, or edit that one"),
        ("new method dpg_sgd", "configs/method/dpg_sgd.yaml is there already"),
        ("check plugin", "check plugin: nothing is named; write plugins=DIR"),
        ("check plugin task=langage", "check plugin task=langage: no such file of a task; did you mean 'language'?"),
    ],
)
def test_bad_words_are_one_line(capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_new_never_overwrites(tmp_path, capsys):
    assert main(["new", "task", "greeting", f"plugins={tmp_path}"]) == 0
    (tmp_path / "tasks/greeting.py").write_text("mine")
    for kept in ("tasks/greeting.py", "configs/task/greeting.yaml"):
        before = (tmp_path / kept).read_text()
        assert main(["new", "task", "greeting", f"plugins={tmp_path}"]) == 2
        assert (tmp_path / kept).read_text() == before
        (tmp_path / kept).unlink()
    (tmp_path / "file").write_text("")
    assert main(["new", "task", "greeting", f"plugins={tmp_path / 'file'}"]) == 2
    assert "cannot write" in capsys.readouterr().err


WRONG = '''
"""Wrong in three ways."""

import torch

from dpgbench.api import Task


class Wrong(Task):
    headline = "norm"

    def prepare(self, world):
        self.scale = 1 + torch.rand(())

    def signal(self, model):
        weight = model.get_output_embeddings().weight
        return self.scale * weight.detach().norm() * weight.norm()

    def measure(self, model, texts):
        return {"norm": -model.get_output_embeddings().weight.norm().item()}
'''
