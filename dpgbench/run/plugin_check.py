"""Checks of a plug-in that are slower than those of `contract`; `check plugin` and the tests run them on our plug-ins and on a user's.

A task: does the gradient of its signal agree with finite differences, is it the same number every time, does following it improve what
people read? A method: does it run, and is what it spends accounted for? Each check returns what it found in a few words, or raises Broken.
All at scale tiny, in seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpgbench import config
from dpgbench.api import Task
from dpgbench.core.cell import Cell, RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.paths import home
from dpgbench.core.seeds import torch_seeded
from dpgbench.metagrad.loss import loaded
from dpgbench.metagrad.optimizers import Params
from dpgbench.metagrad.training import AdamW, train
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.plugins.source import Kind, PluginFile
from dpgbench.run.cell import run_cell
from dpgbench.run.open_cell import open_world, prepared_task
from dpgbench.store.run_folder import RunFolder, last_line
from dpgbench.worlds.world import World

# Every part of a run, two policy updates. T=2 everywhere: a recipe's own T may be more than the texts here.
SMALL = ("steps=2", "completions=16", "group_size=4", "deployment_texts=16", "snapshots=2", "inner_steps=2", "deployment_steps=null")
FD_STEP, FD_TOLERANCE = 1e-5, 1e-4
STEPS, STEP = 10, 0.02  # along the normalised gradient; ours


class Broken(AssertionError):
    """A plug-in does not do what it must. The message says what came instead."""


@dataclass
class Prepared:
    """A task ready to be asked, and how to make another one like it."""

    registry: Registry
    file: PluginFile
    spec: RunSpec
    world: World
    task: Task

    @classmethod
    def of(cls, registry: Registry, spec: RunSpec, world: World) -> Prepared:
        """Raises UserError as `contract.called` does."""
        file, task = prepared_task(spec, registry, world)
        return cls(registry, file, spec, world, task)

    def phi(self, params: Params) -> float:
        with loaded(self.world.target, params), torch.no_grad():
            return float(contract.called(self.file.path, "signal", self.task.signal, self.world.target))

    def gradient(self, params: Params) -> Params:
        """Of the signal at `params`, parameter by parameter, zeros where it has no part."""
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        with loaded(self.world.target, leaves):
            value = contract.called(self.file.path, "signal", self.task.signal, self.world.target)
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, slopes, strict=True))

    def trained(self) -> Params:
        """A target a few steps away from phi_0."""
        batch = self.world.encode(self.world.held_out("en", "dev", 8))
        return train(self.world.target, [batch] * 2, AdamW(lr=1e-3, eps_root=1e-7))


# ---- a task


def keeps_its_contract(subject: Prepared) -> str:
    """What every cell asks before its method runs."""
    prompts = subject.world.held_out("en", "dev", contract.TEXTS)
    contract.check_task(subject.file, subject.task, subject.world.target, prompts)
    return "signal, measure and the other hooks return what they must"


def gradient_is_right(subject: Prepared) -> str:
    """Along a random direction of all parameters, the gradient agrees with a central finite difference in float64."""
    params = {name: value.double() for name, value in subject.trained().items()}
    noise = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(value.shape, generator=noise, dtype=torch.float64) for name, value in params.items()}

    def phi(step: float) -> float:
        return subject.phi({name: value + step * direction[name] for name, value in params.items()})

    h = FD_STEP
    numeric = (4 * (phi(h / 2) - phi(-h / 2)) / h - (phi(h) - phi(-h)) / (2 * h)) / 3
    exact = sum((slope * direction[name]).sum().item() for name, slope in subject.gradient(params).items())
    error = abs(exact - numeric) / max(abs(numeric), 1e-12)
    if not error <= FD_TOLERANCE:
        raise Broken(
            f"signal's gradient along a random direction is {exact:.6g} and a finite difference {numeric:.6g}; "
            "look for .detach(), .item(), rounding or a random draw in a part of it"
        )
    return f"the gradient agrees with a finite difference to {error:.0e}"


def same_every_time(subject: Prepared) -> str:
    """Two calls, and a task prepared anew under other random states, give the same number; the model stays as it is."""
    model = subject.world.target
    before = {name: value.clone() for name, value in model.state_dict().items()}
    params = {name: value.detach() for name, value in model.named_parameters()}
    first, second = subject.phi(params), subject.phi(params)
    if first != second:
        raise Broken(f"signal returned {first:.9g}, then {second:.9g} for the same model; it must give one number")
    with torch_seeded(12345):
        anew = Prepared.of(subject.registry, subject.spec, subject.world).phi(params)
    if anew != first:
        raise Broken(
            f"signal returned {first:.9g}, and {anew:.9g} of a task prepared anew; draw in prepare from torch.Generator().manual_seed(0)"
        )
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    if changed:
        raise Broken(f"prepare or signal wrote into the target: {changed[0]} changed; work on a copy of it")
    return "signal gives the same number every time and leaves the target alone"


def following_it_helps(subject: Prepared) -> str:
    """Steps along the gradient raise Phi, and the headline goes its own good way or, where it reads the texts alone, stays."""
    task, texts = subject.task, subject.world.held_out("en", "dev", contract.TEXTS)
    params = subject.trained()

    def read(params: Params) -> tuple[float, float]:
        phi = subject.phi(params)
        with loaded(subject.world.target, params), torch.no_grad():
            measures = contract.called(subject.file.path, "measure", task.measure, subject.world.target, texts)
        return phi, {"phi": phi, **contract.measures(subject.file.path, task, measures)}[task.headline]

    phi, headline = read(params)
    for _ in range(STEPS):
        slopes = subject.gradient(params)
        norm = sum(slope.square().sum() for slope in slopes.values()).sqrt()
        params = {name: value + STEP * slopes[name] / norm for name, value in params.items()}
    better_phi, better_headline = read(params)
    if not better_phi > phi:
        raise Broken(f"{STEPS} steps along the gradient took Phi from {phi:.6g} to {better_phi:.6g}; it must rise")
    wanted = "rise" if task.higher_is_better else "fall"
    if better_headline < headline if task.higher_is_better else better_headline > headline:
        raise Broken(
            f"steps along the gradient took Phi up and {task.headline} from {headline:.6g} to {better_headline:.6g}; with "
            f"higher_is_better = {task.higher_is_better} it must {wanted}, so turn the sign of one of the two"
        )
    return (
        f"following the gradient takes Phi from {phi:.4g} to {better_phi:.4g}, {task.headline} from {headline:.4g} to {better_headline:.4g}"
    )


def draws(subject: Prepared) -> str:
    """A task that draws leaves ink, whatever the texts, and drawing changes nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    task, model = subject.task, subject.world.target
    if type(task).draw is Task.draw:
        return "it does not draw"
    params = subject.trained()
    before = subject.phi(params)
    canvas = FigureCanvasAgg(Figure(figsize=(2.4, 2.4)))
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    with loaded(model, params):
        contract.called(subject.file.path, "draw", task.draw, model, ["", *subject.world.held_out("en", "dev", 3)], axes)
    canvas.draw()
    if subject.phi(params) != before:
        raise Broken("draw changed what signal returns; it must leave model and task as they are")
    if not bool((torch.frombuffer(canvas.buffer_rgba(), dtype=torch.uint8) != 255).any()):
        raise Broken("draw left an empty picture; draw into `axes`, or leave the hook out")
    return "it draws"


TASK_CHECKS: tuple[Callable[[Prepared], str], ...] = (
    keeps_its_contract, gradient_is_right, same_every_time, following_it_helps, draws,
)  # fmt: skip


# ---- a file, and the two kinds together


def says_what_it_is(file: PluginFile) -> str:
    """What `list` shows: the docstring's first line, a sentence."""
    if not file.summary.endswith("."):
        raise Broken(f"{file.path.name} has no docstring whose first line is a sentence with a period, for `list` to show")
    return file.summary


def runs(spec: RunSpec, plugins: Path | None) -> str:
    """The cell runs to its end, every FLOP it spent has a phase, and texts are kept."""
    with tempfile.TemporaryDirectory() as folder:
        cell = RunFolder.of(Path(folder), spec)
        ended = run_cell(spec, Path(folder), plugins)
        if ended != "done":  # interrupted or busy, there is no error.txt
            raise Broken(last_line(cell.path / "error.txt") or f"the cell did not end: {ended} ({cell.state()})")
        result = cell.result()
    paid = result["snapshots"][-1]
    if paid["flops"] != sum(paid["flops_by_phase"].values()):
        raise Broken(f"it spent {paid['flops']:.3g} FLOPs and its phases add up to {sum(paid['flops_by_phase'].values()):.3g}")
    if not result["texts"]:
        raise Broken("no deployment text was kept")
    return f"{len(result['snapshots'])} snapshots, {paid['flops']:.2g} FLOPs"


def partners(registry: Registry, kind: Kind, name: str) -> list[str]:
    """The usable plug-ins of the other kind that this one is run with: a user's all, and of ours, for a task, every method, for a method,
    our first task with a score and our first without, which is about all that a method knows of a task."""
    other: Kind = "method" if kind == "task" else "task"
    unusable = registry.unusable(other)
    files = [file for file in registry.files(other) if file.name not in unusable]
    if kind == "task":
        return [file.name for file in files]
    ours = {("score" in file.defines): file.name for file in reversed(files) if is_ours(file)}
    return [*ours.values(), *(file.name for file in files if not is_ours(file))]


def is_ours(file: PluginFile) -> bool:
    return file.path.parents[1] == home()


# ---- all of it


@dataclass
class Answer:
    """One check's outcome; `good` is None where there was nothing to check."""

    name: str
    check: str
    good: bool | None
    words: str


def answers(registry: Registry, kind: Kind, name: str, words: Sequence[str] = ()) -> Iterator[Answer]:
    """Every check of one plug-in, `words` over the settings of its small cells."""

    def asked(check: str, ask: Callable[[], str]) -> Answer:
        try:
            return Answer(name, check, True, ask())
        except (Broken, UserError) as error:
            return Answer(name, check, False, str(error))

    def spec_of(*chosen: str) -> Cell:
        given = {word.partition("=")[0]: word for word in (*SMALL, *words, *chosen)}
        return config.read(list(given.values()), sweep=False).cells[0]

    unusable = registry.unusable(kind).get(name)
    if unusable:
        yield Answer(name, "file", False, unusable)
        return
    yield asked("says what it is", lambda: says_what_it_is(registry.find(kind, name)))
    if kind == "task":
        try:
            cell = spec_of(f"task={name}")
            subject = Prepared.of(registry, cell.spec, open_world(cell.spec))
        except UserError as error:
            yield Answer(name, "prepare", False, str(error))
            return
        for check in TASK_CHECKS:
            answer = asked(check.__name__.replace("_", " "), lambda check=check: check(subject))
            yield answer
            if check is keeps_its_contract and not answer.good:
                return  # the others would say it again
    for partner in partners(registry, kind, name):
        pair = (f"task={name}", f"method={partner}") if kind == "task" else (f"task={partner}", f"method={name}")
        try:
            cell = spec_of(*pair)
        except UserError as error:
            yield Answer(name, f"runs with {partner}", False, str(error))
            continue
        if cell.skip:
            yield Answer(name, f"runs with {partner}", None, cell.skip)
        else:
            answer = asked(f"runs with {partner}", lambda cell=cell: runs(cell.spec, registry.plugins))
            other = registry.find("method", cell.spec.method.name) if kind == "task" else registry.find("task", cell.spec.task.name)
            if not answer.good and not is_ours(other) and other.path.name in answer.words:
                answer.good, answer.words = None, f"{other.path.name} is at fault: {answer.words}"
            yield answer
