"""What every task and method must keep to, asked before anything is spent: one line with the file, the hook, what came and the fix.

Once per cell, right after `Task.prepare` and for every method alike: Phi of the initial target and its gradient, and whatever other hooks
the task defines, on a few prompts in the place of texts. Nothing of it is charged, no random state is moved, no number of a cell changes.
Cost: one forward and backward pass of Phi, one `measure` and one picture. `plugin_check` has the slower questions.
"""

from __future__ import annotations

import io
import math
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgbench.api import Method, Task
from dpgbench.core.errors import CellError, Interrupted, Lost, UserError, did_you_mean, for_want_of_memory, for_want_of_storage
from dpgbench.core.options import Options
from dpgbench.core.plugin_types import Prompt, Snapshot, TaskInfo
from dpgbench.plugins.source import PluginFile, set_where

if TYPE_CHECKING:
    from torch import nn

    from dpgbench.bench.workbench import Workbench

TEXTS = 4  # that stand for deployment texts
END = object()  # in the place of a snapshot after the last one


# ---- what a hook raises


def called(file: Path, hook: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a hook returns. Raises UserError naming file, line and hook for anything that the plug-in did not mean to raise."""
    try:
        return function(*arguments)
    except (UserError, CellError, Interrupted, Lost):
        raise
    except Exception as error:
        if for_want_of_memory(error) or for_want_of_storage(error):
            raise
        raise UserError(_why(file, hook, error)) from error


def _why(file: Path, hook: str, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    where = f"{file.name}, line {lines[-1]}: " if lines else f"{file.name}: "
    if isinstance(error, AttributeError) and isinstance(error.obj, Options):
        there = did_you_mean(error.name, error.obj)
        return f"{where}{hook} reads the option {error.name!r}, which there is not; {there}; a new one belongs in its YAML in configs/"
    if isinstance(error, AttributeError) and isinstance(error.obj, Task | Method):
        base = "Task" if isinstance(error.obj, Task) else "Method"
        return f"{where}{hook} uses self.{error.name}, which {set_where(base, error.name)}"
    said = str(error).strip().splitlines()
    return f"{where}{hook} raised {type(error).__name__}{f': {said[0]}' if said else ''}"


def reason(file: Path, plugin: Task | Method, asked: Options | TaskInfo) -> str | None:
    """What `supports` says."""
    found = called(file, "supports", plugin.supports, asked)
    if found is not None and not (isinstance(found, str) and found):
        raise UserError(f"{file.name}: supports returned {shown(found)}; it must be None, or the reason why not as a string")
    return found


def passes(file: Path, method: Method, steps: int) -> float | None:
    """What `target_passes` says."""
    found = called(file, "target_passes", method.target_passes, steps)
    if found is not None and not (isinstance(found, Real) and math.isfinite(found)):
        raise UserError(f"{file.name}: target_passes returned {shown(found)}; it must be a number, or None")
    return found


# ---- a task


def check_task(file: PluginFile, task: Task, model: nn.Module, prompts: Sequence[Prompt]) -> None:
    """Hold a prepared task to its contract at the initial target. Raises UserError."""
    import torch

    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts[:TEXTS]]
    with _random_states_kept():
        _check_attributes(file.path, task)
        with suppress(torch.OutOfMemoryError):  # no breach; a method that needs no gradient of Phi may well run here
            _check_signal(file.path, task, model)
        _check_words(file.path, task, file.defines, texts)
        _check_measure(file.path, task, model, texts)


def _check_attributes(file: Path, task: Task) -> None:
    for name, kind, rule in (("headline", str, "the name of a measure"), ("higher_is_better", bool, "True or False")):
        value = getattr(task, name)
        if not isinstance(value, kind):
            raise UserError(f"{file.name}: {name} is {shown(value)}; it must be {rule}")


def _check_signal(file: Path, task: Task, model: nn.Module) -> None:
    """One forward and backward pass, as the metagradient engine makes them: with the parameters as leaves of the graph."""
    import torch

    from dpgbench.metagrad.loss import initial_parameters, loaded

    leaves = {name: parameter.requires_grad_() for name, parameter in initial_parameters(model).items()}
    with torch.enable_grad(), loaded(model, leaves):
        before = _random_states()
        value = called(file, "signal", task.signal, model)
        _check_scalar(file, value)
        drawn = [name for name, state in _random_states().items() if state != before[name]]
        if drawn and (again := task.signal(model).item()) != value.item():
            raise UserError(
                f"{file.name}: signal draws from {drawn[0]} and returned {value.item():.6g}, then {again:.6g}; it must give one number, "
                "so draw once, in prepare, from torch.Generator().manual_seed(0)"
            )
        fix = "compute it from the weights or outputs of `model`, without .item(), .detach(), torch.no_grad() or another tensor's data"
        if not value.requires_grad:
            raise UserError(f"{file.name}: signal returned {value.item():.6g} without a gradient; {fix}")
        try:
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(f"{file.name}: signal has no gradient: {str(error).splitlines()[0]}") from error
    if all(slope is None for slope in slopes):
        raise UserError(f"{file.name}: signal returned {value.item():.6g}, in which no parameter of `model` has a part; {fix}")
    for name, slope in zip(leaves, slopes, strict=True):
        if slope is not None and not bool(slope.isfinite().all()):
            raise UserError(
                f"{file.name}: the gradient of signal is not finite at the initial target, in {name}; look for a square root or a "
                "logarithm at 0, and add a small constant inside it"
            )


def _check_scalar(file: Path, value: Any) -> None:
    """A finite 0-d floating tensor. One of shape (1,) is refused too: the engine differentiates scalars, and .squeeze() makes it one."""
    from torch import Tensor

    rule = "it must be a 0-d floating-point tensor"
    if value is None:
        raise UserError(f"{file.name}: signal returned nothing; {rule}, so `return` it")
    if not isinstance(value, Tensor):
        fix = "leave out .item() or float(), which take its gradient away" if isinstance(value, Real) else "compute it with torch"
        raise UserError(f"{file.name}: signal returned {shown(value)}; {rule}: {fix}")
    if value.dim() != 0:
        fix = ".squeeze()" if value.numel() == 1 else ".mean() or .sum()"
        raise UserError(f"{file.name}: signal returned {shown(value)}; {rule}: reduce it with {fix}")
    if not value.is_floating_point():
        raise UserError(f"{file.name}: signal returned {shown(value)}; {rule}: counts and comparisons have no gradient")
    if not bool(value.isfinite()):
        raise UserError(
            f"{file.name}: signal is {value.item()} at the initial target, before any training; it must be finite: look for the logarithm "
            "of 0, a division by 0 or the mean of nothing"
        )


def _check_words(file: Path, task: Task, defines: frozenset[str], texts: Sequence[str]) -> None:
    """`score`, `hint` and `references`, where they are defined."""
    if "score" in defines:
        found = called(file, "score", task.score, texts)
        scores(file, "score", found, len(texts))
        if not isinstance(found, Sequence) or not all(isinstance(score, Real) for score in found):
            raise UserError(f"{file.name}: score returned {shown(found)}; it must be a list of plain numbers, such as .tolist() makes")
    hint = called(file, "hint", task.hint)
    if hint is not None and not (isinstance(hint, str) and hint.strip()):
        raise UserError(f"{file.name}: hint returned {shown(hint)}; it must be an instruction in words, or None where there is none")
    references = called(file, "references", task.references)
    if references is not None and not (isinstance(references, list) and references and all(isinstance(text, str) for text in references)):
        raise UserError(f"{file.name}: references returned {shown(references)}; it must be a list of texts, or None where there are none")


def _check_measure(file: Path, task: Task, model: nn.Module, texts: Sequence[str]) -> None:
    """`measure` and `draw` at the initial target, or what stands for them where the task says how (`Task.rehearse`)."""
    import torch

    hook = "rehearse" if "rehearse" in vars(type(task)) else "measure"
    with torch.no_grad():
        measures(file, task, called(file, hook, task.rehearse, model, texts), hook)
    if type(task).rehearse is Task.rehearse and type(task).draw is not Task.draw:
        picture(file, task, model, texts)


def measures(file: Path, task: Task, found: Any, hook: str = "measure") -> dict[str, float]:
    """What `measure` returned, as floats. Raises UserError unless it is finite numbers by name, the headline among them."""
    numbers = readings(file, hook, found)
    if task.headline != "phi" and task.headline not in numbers:
        choices = did_you_mean(task.headline, [*numbers, "phi"])
        raise UserError(f"{file.name}: headline = {task.headline!r} is not among what {hook} returned; {choices}")
    return numbers


def readings(file: Path, hook: str, found: Any) -> dict[str, float]:
    """Finite numbers by name, as floats. Raises UserError on anything else."""
    if not isinstance(found, Mapping):
        raise UserError(f"{file.name}: {hook} returned {shown(found)}; it must be a dict of numbers by name, such as {{'share': 0.5}}")
    numbers = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise UserError(f"{file.name}: {hook} has the key {shown(name)}; a measure's name is a string")
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise UserError(f"{file.name}: {hook} gave {name} = {_bare(value)}; it must be a finite number")
        numbers[name] = number
    return numbers


def scores(file: Path, hook: str, found: Any, count: int) -> list[float]:
    """A finite number for each of `count` texts, as floats; a list, an array or a tensor of them. Raises UserError on anything else."""
    try:
        values = [] if isinstance(found, str | Mapping) else list(found)
    except TypeError:
        values = []
    if len(values) != count:
        raise UserError(f"{file.name}: {hook} returned {shown(found)} for {count} texts; it must be a list of one number each")
    numbers = [_number(value) for value in values]
    for value, number in zip(values, numbers, strict=True):
        if number is None or not math.isfinite(number):
            raise UserError(f"{file.name}: {hook} gave a text {_bare(value)}; it must be a finite number")
    return numbers


def file_of(plugin: Task | Method) -> Path:
    """The file that a plug-in was loaded from."""
    return Path(sys.modules[type(plugin).__module__].__file__)


def picture(file: Path, task: Task, model: nn.Module, texts: Sequence[str]) -> bytes:
    """What the task draws of a target, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(2.4, 2.4), dpi=100), io.BytesIO()
    FigureCanvasAgg(figure)
    called(file, "draw", task.draw, model, texts, figure.add_axes((0.04, 0.04, 0.92, 0.92)))
    called(file, "draw", lambda: figure.savefig(buffer, format="png", metadata={"Software": None}))
    return buffer.getvalue()


# ---- a method


def snapshots(file: Path, method: Method, bench: Workbench) -> Iterator[Snapshot]:
    """What `run` yields, one by one."""
    found = called(file, "run", method.run, bench)
    if not isinstance(found, Iterator):
        raise UserError(f"{file.name}: run returned {shown(found)}; it must yield: write `yield Snapshot(step, sample)` in it")
    while (snapshot := _drawing_by_name(file, "run", method.options, next, found, END)) is not END:
        if not isinstance(snapshot, Snapshot):
            raise UserError(f"{file.name}: run yielded {shown(snapshot)}; it must yield Snapshot(step, sample), of dpgbench.api")
        if type(snapshot.step) is not int or snapshot.step < 0:
            raise UserError(f"{file.name}: run yielded a Snapshot with step={shown(snapshot.step)}; it must be a whole number from 0 up")
        if not callable(snapshot.sample):
            fix = "a function of prompts, such as `lambda prompts: bench.sample(prompts, 'deployment')`"
            raise UserError(f"{file.name}: run yielded a Snapshot whose sample is {shown(snapshot.sample)}; it must be {fix}")
        yield snapshot


def sampled(file: Path, method: Method, snapshot: Snapshot, prompts: Sequence[Prompt]) -> Any:
    """What a snapshot's `sample` returns for these prompts."""
    return _drawing_by_name(file, "sample", method.options, snapshot.sample, prompts)


def _drawing_by_name(file: Path, hook: str, options: Options, function: Callable[..., Any], *arguments: Any) -> Any:
    """`called`, and global random numbers are refused: a run that goes on, or is replayed, would draw others.

    A policy's trainer seeds and draws from them in its own way, so there nothing can be told.
    """
    before = _random_states() if options.get("policy") is None else {}
    value = called(file, hook, function, *arguments)
    after = _random_states() if before else {}
    drawn = [name for name, state in before.items() if state != after[name]]
    if drawn:
        fix = "draw from random.Random(bench.seed('a name')), which is the same in every run"
        raise UserError(f"{file.name}: {hook} draws from {drawn[0]}; {fix}")
    return value


def texts_of(file: Path, snapshot: Snapshot, found: Any, wanted: int) -> list[str]:
    """What a snapshot's `sample` returned. Raises CellError unless it is one text per prompt."""
    rule = f"{wanted} prompts; it must return one string each"
    if not isinstance(found, list | tuple):
        raise CellError(f"{file.name}: snapshot {snapshot.step}: sample returned {shown(found)} for {rule}, in a list")
    if len(found) != wanted:
        raise CellError(f"{file.name}: snapshot {snapshot.step}: sample returned {len(found)} texts for {rule}")
    for text in found:
        if not isinstance(text, str):
            raise CellError(f"{file.name}: snapshot {snapshot.step}: sample returned {shown(text)} among the texts for {rule}")
    return list(found)


# ---- words and states


def shown(value: Any) -> str:
    """A value as an error line names it: short, and with its shape if it has one."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = type(value).__name__.lower() if type(value).__module__ != "numpy" else "numpy array"
        inside = f" {value.item()!r}" if tuple(value.shape) == () else ""
        return f"a {kind} of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}{inside}"
    text = " ".join(repr(value).split())
    return f"the {type(value).__name__} {text if len(text) <= 60 else f'{text[:57]}...'}" if value is not None else "None"


def _bare(value: Any) -> str:
    """The same without its type."""
    return shown(value).removeprefix(f"the {type(value).__name__} ")


def _number(value: Any) -> float | None:
    """A number of Python, numpy or torch as a float; a string that holds one is none."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _random_states() -> dict[str, Any]:
    """The generators that belong to nobody, as far as this process has them."""
    import numpy
    import torch

    states = {"torch's global generator": torch.get_rng_state().numpy().tobytes(), "Python's `random`": random.getstate()}
    name, keys, *rest = numpy.random.get_state()
    states["numpy's global generator"] = (name, keys.tobytes(), *rest)
    if torch.cuda.is_available():
        states["torch's global generator on the GPU"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


@contextmanager
def _random_states_kept() -> Iterator[None]:
    import numpy
    import torch

    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)
