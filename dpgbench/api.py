"""The few types everybody speaks: what a task is, what a method is, and what passes between them and the harness.

Nothing here imports torch, so that `list`, `--dry-run` and rejected commands answer at once. A plug-in file may import torch at
its top unless its class defines `__init__` or `supports`: those two run before anything heavy is loaded, to reject bad options
and to explain skipped cells, and such a file imports torch inside the functions that need it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor, nn

    from dpgbench.data import World
    from dpgbench.plan import Prices
    from dpgbench.workbench import Workbench

Prompt = str | list[dict[str, str]]
"""What a generator is asked: rendered text, or chat messages for a model with a chat template."""


# What a cell's hash leaves out. Settings that cost time and memory, or say who watches, change no number.
NOT_IN_NUMBERS = {
    "training": ("memory_budget", "checkpoint", "offload"),
    "scale": ("keep_generator",),
    "policy": ("activation_checkpointing", "vllm_memory", "report_to"),
}
# A setting that came after the first stored cells, at the value that stands for what those did: they keep their hash.
CAME_LATER = {
    "training": {"precision": "full"},
    "scale": dict.fromkeys(
        ("generator_revision", "target_revision", "max_prompt_tokens", "corpus_subset", "corpus_column", "corpus_revision")
    ),
    "method": {"lora": None},
    "policy": {"rollout": "transformers", "lora": None, "rollout_batch": None},
}
# How a generator's texts are drawn and updated: raised where that changed what stored cells had. 2: no dropout, every end token, the full
# distribution, prompts padded on the left, float32 weights in training. The embedded generator's texts were those all along.
SAMPLER = 2


class Options(Mapping):
    """A read-only view of one section of the configuration; `options.lr` and `options["lr"]` are the same."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"no option {key!r}; there are: {', '.join(self._values)}") from None

    def __getitem__(self, key: str) -> Any:
        value = self.__dict__["_values"][key]
        return Options(value) if isinstance(value, dict) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Options({self._values})"

    def plain(self) -> dict[str, Any]:
        """The same as nested plain dicts."""
        return json.loads(json.dumps(self._values))


def leaves_of(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key: {"policy": {"lr": 1e-3}} -> {"policy.lr": 1e-3}."""
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            leaves |= leaves_of(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


class Task(ABC):
    """A target: a differentiable metric of the trained target model, and what people read instead of that number.

    Only `signal` is required. `version` enters every cell's hash: raise it when the numbers change. `headline` names the entry of
    `measure` (or "phi") that tables and plots lead with. `defaults` are options that the YAML need not give. An option named `file` is a
    file of the user's: the harness adds the SHA-256 of its content as `file_sha256`, which enters the hash in its place.

    `version` and `defaults` are read without running the file, so they must be written out. Before a method spends anything the harness
    calls every hook at the initial target and says in one line what is wrong with what it returns (`dpgbench.contract`).
    """

    version: int = 1
    headline: str = "phi"
    higher_is_better: bool = True
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, options: Options):
        """Override to reject bad options with a `UserError`; runs before torch is imported."""
        self.options = options

    def supports(self, scale: Options) -> str | None:
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


class TaskView:
    """What a method may see of a task: the signal on the dev split, and never `measure` nor the test split."""

    def __init__(self, task: Task):
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


class Method(ABC):
    """A way of producing training text. `version` enters every cell's hash: raise it when the numbers change. `defaults` as in Task."""

    version: int = 1
    defaults: ClassVar[Mapping[str, Any]] = {}

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

        `prices` (`plan.Prices`) has what sampling, training and a policy cost in this cell. None: cannot tell. Asked without torch, too.
        """

    @abstractmethod
    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        """Work, yielding a snapshot whenever there is a new answer. The harness scores some of them and always the last."""


@dataclass(frozen=True)
class RunSpec:
    """One cell: a task, a method, a seed and every setting that changes its numbers, resolved."""

    config: Mapping[str, Any]
    """Sections `task`, `method`, `training`, `scale` (plain dicts with `name` and `version` in the first two), `seed`, and `budget` where
    there is one."""

    @property
    def task(self) -> Options:
        return Options(self.config["task"])

    @property
    def method(self) -> Options:
        return Options(self.config["method"])

    @property
    def training(self) -> Options:
        return Options(self.config["training"])

    @property
    def scale(self) -> Options:
        return Options(self.config["scale"])

    @property
    def budget(self) -> dict[str, float]:
        """The limits there are, by the names of `compute.Budget`."""
        return self.config.get("budget", {})

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def hash(self) -> str:
        """Ten hex digits over everything that changes the numbers, and over nothing else."""
        relevant = json.loads(json.dumps(self.config))
        for section in ("task", "method"):
            relevant[section].pop("label", None)
            relevant[section].pop("file", None)  # `file_sha256` stands for it
        for own in ("corpus", "generator", "target"):
            if f"{own}_sha256" in relevant["scale"]:  # which stands for the path of a file or a folder
                relevant["scale"].pop(own)
        if (self.config["scale"]["generator"], relevant["scale"]["generator_dtype"]) != ("phrasebook", "float32"):
            relevant["scale"]["sampler"] = SAMPLER
        sections = {**relevant, "policy": relevant["method"].get("policy") or {}}
        for section, settings in NOT_IN_NUMBERS.items():
            for setting in settings:
                sections[section].pop(setting, None)
        for section, settings in CAME_LATER.items():
            for setting, before in settings.items():
                if sections[section].get(setting) == before:
                    sections[section].pop(setting, None)
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """The cell's folder name under `results/runs/`."""
        return f"{self.task.label}.{self.method.label}.s{self.seed}.{self.hash}"
