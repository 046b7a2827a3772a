"""Contracts every plug-in keeps, the project's and a user's: found by the registry, so a new file is tested without a new test.

`DPGBENCH_PLUGINS=DIR pytest tests/test_tasks_and_methods.py` holds a folder of your own to them; else the README's example stands in.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, own_plugins
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpgbench import config
from dpgbench.api import Options, Task, TaskInfo, TaskView
from dpgbench.registry import Registry, home
from dpgbench.training import AdamW, loaded, train

PLUGINS = f"plugins={own_plugins()}"
REGISTRY = Registry(own_plugins())
TASKS = [file.name for file in REGISTRY.files("task")]
METHODS = [file.name for file in REGISTRY.files("method")]
OURS = {file.path for kind in ("task", "method") for file in Registry().files(kind)}


@pytest.fixture(params=TASKS)
def task(request, worlds):
    """A prepared task with its default options."""
    spec = config.read([f"task={request.param}", PLUGINS], sweep=False).cells[0].spec
    task = REGISTRY.load("task", request.param)(spec.task)
    task.prepare(worlds(spec))
    task.world = worlds(spec)  # a user's `prepare` need not keep it
    return task


def trained(world):
    """A target a few steps away from phi_0."""
    batch = world.encode(world.corpus.held_out("en", "dev", 8))
    return train(world.target, [batch] * 2, AdamW(lr=1e-3, eps_root=1e-7))


def gradient(task, params):
    """Of the signal at `params`, parameter by parameter, zeros where it has no part."""
    with loaded(task.world.target, {name: value.detach().requires_grad_() for name, value in params.items()}):
        value = task.signal(task.world.target)
        leaves = dict(task.world.target.named_parameters())
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert value.ndim == 0 and value.isfinite()
    return dict(zip(leaves, found, strict=True))


def test_signal_is_a_finite_scalar_with_the_right_gradient(task):
    """Along a random direction of all parameters, the gradient agrees with a central finite difference in float64."""
    params = {name: value.double() for name, value in trained(task.world).items()}
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in params.items()}

    def phi(step: float) -> float:
        with loaded(task.world.target, {name: value + step * direction[name] for name, value in params.items()}), torch.no_grad():
            return task.signal(task.world.target).item()

    h = 1e-5
    numeric = (4 * (phi(h / 2) - phi(-h / 2)) / h - (phi(h) - phi(-h)) / (2 * h)) / 3
    exact = sum((slope * direction[name]).sum().item() for name, slope in gradient(task, params).items())
    assert exact == pytest.approx(numeric, rel=1e-4)


def test_following_the_signal_improves_what_people_read(task):
    """Steps along the gradient raise Phi, and the headline goes its own good way or, where it reads the texts alone, stays."""
    texts = task.world.held_out("en", "dev", 4)
    params = trained(task.world)

    def read(params) -> tuple[float, float]:
        with loaded(task.world.target, params), torch.no_grad():
            phi = task.signal(task.world.target).item()
            return phi, {"phi": phi, **task.measure(task.world.target, texts)}[task.headline]

    phi, headline = read(params)
    for _ in range(10):
        slopes = gradient(task, params)
        norm = sum(slope.square().sum() for slope in slopes.values()).sqrt()
        params = {name: value + 0.02 * slopes[name] / norm for name, value in params.items()}
    better_phi, better_headline = read(params)
    assert better_phi > phi
    assert better_headline >= headline if task.higher_is_better else better_headline <= headline


def test_signal_is_deterministic_and_leaves_the_model_alone(task):
    model = task.world.target
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert task.signal(model).item() == task.signal(model).item()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_measures_are_numbers_and_hold_the_headline(task):
    texts = task.world.held_out("en", "dev", 4)
    with loaded(task.world.target, trained(task.world)), torch.no_grad():
        measures = task.measure(task.world.target, texts)
    assert all(isinstance(value, float) and value == value for value in measures.values())
    assert task.headline == "phi" or task.headline in measures


def test_a_method_sees_no_measure(task):
    """The view has the dev split's signal, the score and the hint, and nothing of the test split."""
    view = TaskView(task)
    assert not hasattr(view, "measure") and callable(view.signal)


def test_score_and_hint_keep_their_types(task):
    texts = task.world.held_out("en", "dev", 3)
    scores, hint = task.score(texts), task.hint()
    assert scores is None or (len(scores) == 3 and all(isinstance(score, float) for score in scores))
    assert hint is None or (isinstance(hint, str) and hint)


def test_pictures_are_drawn(task):
    """A task that draws leaves ink, whatever the texts; drawing changes nothing."""
    if type(task).draw is Task.draw:
        pytest.skip("this task does not draw")
    canvas = FigureCanvasAgg(Figure(figsize=(2.4, 2.4)))
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    with loaded(task.world.target, trained(task.world)):
        before = task.signal(task.world.target).item()
        task.draw(task.world.target, ["", *task.world.held_out("en", "dev", 3)], axes)
        assert task.signal(task.world.target).item() == before
    canvas.draw()
    assert (torch.frombuffer(canvas.buffer_rgba(), dtype=torch.uint8) != 255).any()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    """A first line that ends in a period, a version; ours also state the goal in words and quote where it comes from."""
    file = REGISTRY.find("task", name)
    assert file.summary.endswith(".") and isinstance(file.version, int) and file.version >= 1
    if file.path in OURS:
        assert {"version", "headline", "hint", "draw"} <= file.defines
        assert "arXiv" in sys.modules[REGISTRY.load("task", name).__module__].__doc__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_and_judges_tasks(name):
    file = REGISTRY.find("method", name)
    assert file.summary and file.summary.endswith(".")
    spec = config.read([f"method={name}", PLUGINS], sweep=False).cells[0].spec
    reason = REGISTRY.load("method", name)(spec.method).supports(TaskInfo("none", Options({}), frozenset()))
    assert reason is None or isinstance(reason, str)


@pytest.mark.parametrize("kind", ["method", "task"])
def test_every_plugin_has_a_preset_and_the_other_way_round(kind):
    assert {file.name for file in REGISTRY.files(kind)} <= set(REGISTRY.presets(kind))
    assert (home() / f"{kind}s").is_dir()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_every_task(method, tmp_path):
    """Two steps each, in one process; a skipped pair says why. T=2 everywhere: a recipe's own T may be more than the texts here.

    A method knows of a task whether it has a score, and little else. So dpg, which differentiates all of a task, does every one; another
    method of ours does our first with a score, our first without, and a user's; a user's method does all.
    """
    from dpgbench.runner import run_cell
    from dpgbench.store import RunFolder, last_line

    tasks = TASKS
    if method != "dpg" and REGISTRY.find("method", method).path in OURS:
        files = REGISTRY.files("task")
        ours = {("score" in file.defines): file.name for file in reversed(files) if file.path in OURS}
        tasks = [*ours.values(), *(file.name for file in files if file.path not in OURS)]
    for cell in config.read(
        [f"task={','.join(tasks)}", f"method={method}", PLUGINS, *SMALL, "inner_steps=2", "deployment_steps=null"], sweep=True
    ).cells:
        if cell.skip:
            continue
        state = run_cell(cell.spec, tmp_path, own_plugins())
        folder = RunFolder.of(tmp_path, cell.spec)
        assert state == "done", last_line(folder.path / "error.txt")
        result = folder.result()
        paid = result["snapshots"][-1]
        assert paid["flops"] == sum(paid["flops_by_phase"].values()) and len(result["texts"]) == 12


def test_a_users_folder_is_held_to_the_contracts(tmp_path):
    """A signal that its gradient does not belong to, and a measure that falls as Phi rises, are found out in a folder of one's own."""
    for folder, suffix, text in (("tasks", "py", WRONG), ("configs/task", "yaml", "name: wrong")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"wrong.{suffix}").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "wrong and (signal or measures)", __file__],
        env={**os.environ, "DPGBENCH_PLUGINS": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "FAILED tests/test_tasks_and_methods.py::test_signal_is_a_finite_scalar_with_the_right_gradient[wrong]" in done.stdout
    assert "FAILED tests/test_tasks_and_methods.py::test_following_the_signal_improves_what_people_read[wrong]" in done.stdout
    assert "2 failed, 2 passed" in done.stdout


WRONG = '''
"""Wrong in two ways."""

from dpgbench.api import Task


class Wrong(Task):
    headline = "norm"

    def signal(self, model):
        weight = model.get_output_embeddings().weight
        return weight.detach().norm() * weight.norm()

    def measure(self, model, texts):
        return {"norm": -model.get_output_embeddings().weight.norm().item()}
'''
