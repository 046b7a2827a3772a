"""The types that methods and the harness pass to each other: Prompt, TaskView, TaskInfo and Snapshot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpgbench.core.options import Options

if TYPE_CHECKING:
    from torch import Tensor


Prompt = str | list[dict[str, str]]
"""What a generator is asked: rendered text, or chat messages for a model with a chat template."""


class TaskView:
    """What a method may see of a task: the signal on the dev split, and never `measure` nor the test split."""

    def __init__(self, task: Any):
        self.signal, self.score, self.hint, self.references = task.signal, task.score, task.hint, task.references
        self.options = task.options


@dataclass(frozen=True)
class TaskInfo:
    """What `Method.supports` may ask about a task, known without importing it."""

    name: str
    options: Options
    defines: frozenset[str]
    """The names the task's class body defines: "score" in task.defines tells whether it has a black-box score."""


@dataclass(frozen=True)
class Snapshot:
    """A method's answer so far: how it would write a deployment dataset now."""

    step: int
    """The method's own counter: policy updates, or the size of its search."""
    sample: Callable[[Sequence[Prompt]], list[str]]
    """One text per prompt. The harness calls it on held-out prompts, right away, and charges what it spends to the method."""
    params: dict[str, Tensor] | None = None
    """For anchors of the scale alone: parameters that the target reached without any text, measured in place of training on texts."""
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    """For methods that train the generator that writes the texts: its parameters as `sample` uses them, asked for right after it."""
