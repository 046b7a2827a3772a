"""The few types everybody speaks: what a task is, what a method is, and what passes between them and the harness.

Nothing here imports torch, so that `list`, `--dry-run` and rejected commands answer at once. A plug-in file may import torch at
its top unless its class defines `__init__` or `supports`: those two run before anything heavy is loaded, to reject bad options
and to explain skipped cells, and such a file imports torch inside the functions that need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.options import Options
from dpgbench.core.plugin_types import Prompt, Snapshot, TaskInfo, TaskView
from dpgbench.core.settings import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor, nn

    from dpgbench.bench.grpo import Rollouts
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench
    from dpgbench.worlds.world import World


__all__ = ["Method", "Options", "Prompt", "RunSpec", "Snapshot", "Task", "TaskInfo", "TaskView", "UserError", "did_you_mean"]


class Task(ABC):
    """A target: a differentiable metric of the trained target model, and what people read instead of that number.

    Only `signal` is required. `version` enters every cell's hash: raise it when the numbers change. `headline` names the entry of
    `measure` (or "phi") that tables and plots lead with. `defaults` are options that the YAML need not give. An option named `file` is a
    file of the user's: the harness adds the SHA-256 of its content as `file_sha256`, which enters the hash in its place.

    `version` and `defaults` are read without running the file, so they must be written out. Before a method spends anything the harness
    calls every hook at the initial target and says in one line what is wrong with what it returns (`dpgbench.plugins.contract`).
    """

    version: int = 1
    headline: str = "phi"
    higher_is_better: bool = True
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Options):
        """Override to reject bad options with a `UserError`; runs before torch is imported."""
        self.options = options

    def supports(self, scale: Scale) -> str | None:
        """None, or the one-line reason why this task cannot run at this scale (its cells are then skipped, not failed)."""

    def prepare(self, world: World) -> None:
        """Called once per cell before anything else; `world` gives the initial target, tokenizers and held-out texts."""
        self.world = world

    @abstractmethod
    def signal(self, model: nn.Module) -> Tensor:
        """Phi: a finite 0-d floating tensor, higher is better, differentiable in the parameters of `model`, the trained target.

        The same number every time; shape (1,) is not 0-d. Read `model`, not what `prepare` saw of it.
        """

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        """What people read: finite numbers about the trained target and the deployment texts it was trained on, the same names every time.

        Only the harness calls it: for each scored snapshot, and once before, at the initial target with a few prompts for texts.
        """
        return {}

    def rehearse(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        """In place of that first call, where `measure` or `draw` is dear: the same names and cheaper numbers, which are not kept."""
        return self.measure(model, texts)

    def score(self, texts: Sequence[str]) -> list[float] | None:
        """A black-box score of each text, higher is better, where a natural one exists. Define it only then."""

    def references(self) -> list[str] | None:
        """Texts that show what is wanted, in a fixed order, none of them held out from methods. Define it only where there are some."""

    def hint(self) -> str | None:
        """The instruction that states the goal in words, for methods that steer with a prompt."""

    def draw(self, model: nn.Module, texts: Sequence[str], axes: Axes) -> None:
        """A picture of the outcome for the report. Define it only if there is something to see."""


class Method(ABC):
    """A way of producing training text. `version` enters every cell's hash: raise it when the numbers change. `defaults` as in Task."""

    version: int = 1
    defaults: ClassVar[Mapping[str, Any]] = {}
    budget_options: ClassVar[tuple[str, ...]] = ()
    """Whole-number options that may also be the word `budget`: as much as the cell's budget pays for. Written out, as `defaults` are.

    The harness sees to it that there is a budget then; `Workbench.share_with` tells the method how far it reaches.
    """

    def __init__(self, options: Options):
        """Override to reject bad options with a `UserError`; runs before torch is imported."""
        self.options = options

    def supports(self, task: TaskInfo) -> str | None:
        """None, or the one-line reason why this method cannot do this task (the cell is then skipped, not failed)."""

    def target_passes(self, steps: int) -> float | None:
        """For `--dry-run`: forward passes of the target on all texts of a policy step, at T = `steps`, at most; None: cannot tell.

        A method without a policy whose cost is its deployment dataset says 0. Asked before torch is loaded.
        """

    def planned_flops(self, prices: Prices) -> float | None:
        """For `--dry-run`, where `target_passes` does not say it: FLOPs up to the last answer, its deployment dataset included, at most.

        `prices` (`Prices`) has what sampling, training and a policy cost in this cell. None: cannot tell. Asked without torch, too.
        """

    baseline: str = "group"
    """What credit for single tokens is compared with, one of `bench.credit.BASELINES`; for rewards of whole completions unused."""

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> Sequence[float] | Tensor:
        """For a method that trains the generator by GRPO: one reward per completion of `rollouts`, higher is better, in any unit.

        Or credit for each of its tokens, (N, W), W the tokens of the longest, zero beyond a completion's own.

        Define it and hand it to `train_policy` in `run`, as `partial(self.rewards, bench)`; then `check estimator` can measure the policy
        gradient that these rewards give. It must be a function of the rollouts alone, whatever the step.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no rewards")

    @abstractmethod
    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        """Work, yielding a snapshot whenever there is a new answer. The harness scores some of them and always the last."""
