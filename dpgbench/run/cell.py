"""One cell from start to finish: build the bench, let the method work, score its snapshots on held-out data, leave a result."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpgbench.api import Task
from dpgbench.bench.distributed import SINGLE_PROCESS, SingleProcess
from dpgbench.bench.meter import Meter
from dpgbench.bench.spending import OVERRUN
from dpgbench.config import optional_packages
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import Busy, CellError, Gone, Interrupted, Lost, UserError, for_want_of_memory, for_want_of_storage
from dpgbench.core.interrupts import Stop, time_limit
from dpgbench.core.plugin_types import Prompt, Snapshot, TaskView
from dpgbench.core.seeds import stream
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.run.environment import environment
from dpgbench.run.export import keep
from dpgbench.run.open_cell import open_cell
from dpgbench.run.schedule import schedule_of
from dpgbench.store import code_snapshot
from dpgbench.store.checkpoints import Checkpoints
from dpgbench.store.run_folder import TRACKERS, RunFolder
from dpgbench.worlds import model_files

if TYPE_CHECKING:
    from torch import Tensor

Watch = Callable[[dict[str, Any]], None]
SAMPLE_TEXTS = 12  # deployment texts kept for the report
MORE_MEMORY = "give the process more, or lower scale.sampling_batch, policy.micro_batch, training.micro_batch or launcher.workers"


def run_cell(
    spec: RunSpec,
    results: Path,
    plugins: Path | None = None,
    watch: Watch = lambda event: None,
    *,
    checkpoint_seconds: float = 60.0,
    cell_seconds: float | None = None,
    let_errors_out: bool = False,
    group: SingleProcess = SINGLE_PROCESS,
) -> str:
    """Run a cell unless it is done, from its last checkpoint if it has one; in a `group` of several processes all call this.

    Returns "done", "failed" (its `error.txt` says why), "busy" (another process has it), "gone" (its folder was deleted or replaced
    meanwhile) or "interrupted" (asked to stop by SIGTERM or SIGUSR2). `watch` is told about every step, for a progress display. A cell that
    takes longer than `cell_seconds` fails (`interrupts.time_limit`). `let_errors_out` lets the exception of a failing cell through as well.
    An interrupt (Ctrl-C) and what is wrong with the file system (`for_want_of_storage`) pass through and leave the cell interrupted.
    """
    folder = RunFolder.of(results, spec)
    try:
        with Stop.on_signals() as stop, group.shared_fate(folder.fail_and_let_go), folder.owned() if group.first else nullcontext():
            context = RunContext(folder, plugins, watch, checkpoint_seconds, stop, group, cell_seconds)
            return _run_owned(spec, context, let_errors_out)
    except Gone:
        return "gone"
    except (Busy, Lost):
        return "busy"
    except Interrupted:
        return "interrupted"


@dataclass(frozen=True)
class RunContext:
    """What a run is given beside the cell's settings: where it writes, whose plug-ins it may use, who is told, and who else takes part."""

    folder: RunFolder
    plugins: Path | None = None
    watch: Watch = lambda event: None
    checkpoint_seconds: float = 60.0
    stop: Stop = field(default_factory=Stop)
    group: SingleProcess = SINGLE_PROCESS
    cell_seconds: float | None = None


def _run_owned(spec: RunSpec, context: RunContext, let_errors_out: bool) -> str:
    folder, group = context.folder, context.group
    if group.broadcast(folder.state().name if group.first else None) == "done":
        return "done"
    try:
        with time_limit(context.cell_seconds, lambda: CellError(folder.out_of_time(context.cell_seconds))):
            cell = _Cell(spec, context)
            cell.begin()
            cell.run()
    except (Interrupted, Lost):
        raise
    except Exception as error:
        if for_want_of_storage(error):
            raise
        reason = group.why(error) or _told(error)
        if for_want_of_memory(error):
            reason += f"\nout of memory ({str(error).splitlines()[0] if str(error) else 'MemoryError'}); {MORE_MEMORY}"
        if group.first:
            folder.fail(reason)
        group.fail(reason)
        if let_errors_out:
            raise (error.__cause__ or error) from None
        return "failed"
    return "done"


def _told(error: Exception) -> str:
    """What `error.txt` says; lists show the last line. Where a plug-in did not mean to raise, where that was."""
    if not isinstance(error, UserError | CellError):
        return traceback.format_exc()
    line = f"{type(error).__name__}: {error}"
    return line if error.__cause__ is None else "".join([*traceback.format_exception(error.__cause__), line])


class _Scored(NamedTuple):
    """A snapshot's line of metrics, its wall-clock price, its deployment texts and the target trained on them."""

    line: dict[str, Any]
    seconds: float
    texts: list[str]
    params: dict[str, Tensor]


class _Answer(NamedTuple):
    """A snapshot that counts, and what the method had spent by then, its deployment dataset aside."""

    snapshot: Snapshot
    spent: Meter


class _Cell:
    """The work of `run_cell`, with its parts at hand."""

    def __init__(self, spec: RunSpec, context: RunContext):
        optional_packages.check(spec)
        from dpgbench.bench.workbench import Workbench

        self.spec, self.folder, self.watch, self.group = spec, context.folder, context.watch, context.group
        identity = {"hash": self.folder.hash, "code": code_snapshot.digest(context.plugins)}
        self.checkpoints = Checkpoints(self.folder.path, identity, context.checkpoint_seconds, context.stop)
        self.started = self._clock = time.perf_counter()
        self.schedule = schedule_of(spec)
        self.lines: list[dict[str, Any]] = []  # of the scored snapshots
        self.texts: list[str] = []  # of the last of them, and the target trained on them
        self.params: dict[str, Tensor] | None = None
        self.answer: _Answer | None = None  # the last one, if this process has seen it
        registry = Registry(context.plugins)
        self.method = registry.make("method", spec.method.name, spec.method)
        opened = open_cell(spec, registry)
        self.task, self.world, self.prompts = opened.task, opened.world, opened.prompts
        self.files = {"task": opened.task_file.path, "method": registry.find("method", spec.method.name).path}
        self.meter = Meter()
        self.bench = Workbench(
            spec, TaskView(self.task), self.world, opened.generator, self.meter, self._record, self._checkpoint, self.group,
            self._share_with,
        )  # fmt: skip
        self.bench.tracking = self.folder.path / TRACKERS

    def begin(self) -> None:
        """Prepare the folder: afresh, or as it was at the newest checkpoint that is whole."""
        newest = self.checkpoints.newest(self.folder.begins_with) if self.group.first else None
        step = self.group.broadcast(newest and newest[0].step)
        if not self.group.first and step is not None:
            newest = self.checkpoints.of(step)
        if self.group.first:
            self.folder.begin(self.environment(), newest and newest[1]["growing"])
        self.group.broadcast("the folder is as it should be")
        if newest is None:
            return
        saved, content = newest
        self.started = self._clock - content["seconds"]
        self.lines, self.texts, self.schedule.passed = content["lines"], content["texts"], content["passed"]
        self.bench.restore(saved, content["bench"])
        self.meter.restore(content["meter"])

    def environment(self) -> dict[str, Any]:
        """What the numbers were made with, the models' revisions among it."""
        models = {role: model_files.find(self.spec.scale, role).about() for role in model_files.ROLES}
        return {**environment(), "models": models, "corpus_revision": getattr(self.world.corpus, "revision", None)}

    def _checkpoint(self, step: int, tensors: Callable[[], dict[str, Tensor]], numbers: Callable[[], dict[str, Any]]) -> None:
        """What `Workbench.checkpoint` does: save if it is time to, and stop here if asked to. The time is nobody's cost."""
        due, asked = self.group.broadcast((self.checkpoints.due(), self.checkpoints.stop.asked))
        if not due:
            return
        clock = time.perf_counter()
        self.meter.seconds += clock - self._clock  # the method's time since its last snapshot, up to here
        if self.group.first:
            self._save(step, tensors, numbers, clock)
        self._clock = time.perf_counter()
        self.started += self._clock - clock
        self._agree_on_the_account()
        if asked:
            raise Interrupted(f"{asked} at step {step}")

    def _save(self, step: int, tensors: Callable[[], dict[str, Tensor]], numbers: Callable[[], dict[str, Any]], clock: float) -> None:
        content = {
            "numbers": numbers(), "lines": self.lines, "growing": self.folder.growing(), "meter": self.meter.state(),
            "bench": self.bench.state(), "seconds": clock - self.started, "texts": self.texts, "passed": self.schedule.passed,
        }  # fmt: skip
        self.folder.check_owned()
        self.checkpoints.save(step, tensors(), content)

    def _share_with(self, snapshot: Snapshot) -> float:
        """What `Workbench.share_with` does. The time is nobody's cost."""
        clock = time.perf_counter()
        self.meter.seconds += clock - self._clock  # the method's time since its last snapshot, up to here
        price = self._priced(snapshot, self.prompts)[1] if self.group.first else None
        share = self.bench.account.budget.share(self.meter + price) if price is not None else None
        self._clock = time.perf_counter()
        return self.group.broadcast(share)

    def _priced(self, snapshot: Snapshot, prompts: list[Prompt]) -> tuple[Any, Meter]:
        """A deployment dataset, as the method gives it, and what it costs."""
        clock = time.perf_counter()
        with self.meter.deployment() as price:
            texts = contract.sampled(self.files["method"], self.method, snapshot, prompts)
            price.seconds += time.perf_counter() - clock
        return texts, price

    def _agree_on_the_account(self) -> None:
        """What was spent decides what comes next, so it is the first process's account, clock and all, that counts in every process."""
        meter, reserve = self.group.broadcast((self.meter.state(), self.bench.account.reserve.state()))
        if not self.group.first:
            self.meter.restore(meter)
            self.bench.account.reserve.restore(reserve)

    def run(self) -> None:
        """Let the method work, score the snapshots that are due, and mark the cell done.

        An answer over the budget is none: the method is stopped and the last one within it counts.
        """
        snapshot = waiting = scored = None  # waiting: the newest snapshot, if it was not due; scored: the step of the last answer
        for snapshot in self._timed(contract.snapshots(self.files["method"], self.method, self.bench)):
            if snapshot.step == scored and self.schedule.skips:  # a policy has gone back to it
                waiting = None
                continue
            waiting = snapshot
            if self.schedule.is_due(snapshot.step, self.bench.spent_share()):
                waiting = None
                accepted = self.group.broadcast(self._answer(snapshot) if self.group.first else None)
                self._agree_on_the_account()
                if not accepted:
                    break
                scored = snapshot.step
        self.group.broadcast("the method has come to its end in all processes")
        if self.group.first:
            self._finish(snapshot, waiting)

    def _finish(self, snapshot: Snapshot | None, waiting: Snapshot | None) -> None:
        if snapshot is None:
            raise CellError(f"method {self.spec.method.name} yielded no snapshot; `run` must yield at least one")
        if waiting is not None:  # it stopped before its schedule did
            self._answer(waiting)
        if not self.lines:
            limits = ", ".join(f"budget.{name}={limit:g}" for name, limit in self.spec.budget.items())
            whole, without = self.bench.spent_share(), self.bench.spent_share(answers=0)
            texts = f"lower scale.deployment_texts={self.spec.scale.deployment_texts}"
            fix = f"give more, or {texts if whole > 2 * without else 'let the method do less before it'}"
            raise CellError(
                f"{limits}: the first answer costs {whole:.3g} times that, its deployment dataset {whole - without:.3g} times; {fix}"
            )
        result = {
            "headline": self.task.headline,
            "higher_is_better": self.task.higher_is_better,
            "snapshots": self.lines,
            "texts": self.texts[:SAMPLE_TEXTS],
            **self._deployments(snapshot),
            "seconds_total": round(time.perf_counter() - self.started, 3),
        }
        self.folder.finish(result, self._picture())

    def _answer(self, snapshot: Snapshot) -> bool:
        """Score a snapshot and keep what it gave; False if it is over the budget."""
        scored = self._score(snapshot)
        if scored is None:
            return False
        keep(self.folder, snapshot, self.prompts, scored.texts)
        self.lines.append({**scored.line, "seconds": scored.seconds})
        self.texts, self.params = scored.texts, scored.params
        self.answer = _Answer(snapshot, Meter() + self.meter)
        return True

    def _deployments(self, newest: Snapshot) -> dict[str, Any]:
        """The last answer's own deployment dataset and those of `scale.more_deployments`, by size; nothing where none is asked for.

        Each is charged what the method had spent before its answer, once, and its own texts; it may cost more than the budget. Left out,
        with the reason, where the generator of that answer is gone.
        """
        scale = self.spec.scale
        if not scale.get("more_deployments"):
            return {}
        own = {"deployment_texts": scale.deployment_texts, **self.lines[-1]}
        answer = self.answer
        trains = answer is not None and (self.spec.method.get("policy") is not None or answer.snapshot.weights is not None)
        left_out = None
        if answer is None:
            left_out = "the last answer within the budget was given before an interruption"
        elif trains and answer.snapshot.step != newest.step:
            left_out = "the generator was trained beyond the last answer within the budget"
        if left_out:
            return {"deployments": [own], "deployments_left_out": left_out}
        found = [own]
        for count in scale.more_deployments:
            prompts = self.world.prompts("test", count, stream(self.spec.seed, "deployment prompts"))
            texts, price = self._priced(answer.snapshot, prompts)
            scored = self._measured(answer.snapshot, texts, count, answer.spent + price)
            self._check_finite(scored.line)
            found.append({"deployment_texts": count, **scored.line, "seconds": scored.seconds})
        return {"deployments": sorted(found, key=lambda line: line["deployment_texts"])}

    def _timed(self, snapshots: Iterator[Snapshot]) -> Iterator[Snapshot]:
        """The same snapshots; the time the method takes to come up with each is charged to it."""
        while True:
            asked = self.group.broadcast(self.checkpoints.stop.asked)
            if asked and not self.bench.makes_checkpoints:
                raise Interrupted(asked)
            self._clock = time.perf_counter()
            snapshot = next(snapshots, None)
            self.meter.seconds += time.perf_counter() - self._clock
            self._agree_on_the_account()
            if snapshot is None:
                return
            yield snapshot

    def _record(self, line: dict[str, Any]) -> None:
        """A step of the method: into the metrics file and to whoever watches."""
        if not self.group.first:
            return
        line = {
            **line,
            "flops": self.meter.total_flops,
            "tokens_generated": self.meter.tokens_generated,
            "tokens_trained": self.meter.tokens_trained,
        }
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._check_finite(line)
        self.folder.append(line, time.perf_counter() - self.started)
        self.watch({key: value for key, value in line.items() if key != "rollouts"})

    def _check_finite(self, line: dict[str, Any]) -> None:
        bad = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            where = line.get("step", line.get("snapshot"))
            raise CellError(f"{bad[0]} is {line[bad[0]]} at step {where}; lower training.lr={self.spec.training.lr}")

    def _score(self, snapshot: Snapshot) -> _Scored | None:
        """Draw the deployment dataset (charged), train a fresh target on it and measure that (not charged). None if it is over budget."""
        texts, self.bench.account.reserve = self._priced(snapshot, self.prompts)
        if self.bench.spent_share() > 1 + OVERRUN:
            return None
        scored = self._measured(snapshot, texts, len(self.prompts), self.meter + self.bench.account.reserve)
        self._append(scored.line)
        return scored

    def _measured(self, snapshot: Snapshot, texts: Any, count: int, total: Meter) -> _Scored:
        """What a fresh target trained on the deployment texts is like; `count` of them, if the method keeps its contract."""
        from dpgbench.metagrad.training import loaded

        texts = contract.texts_of(self.files["method"], snapshot, texts, count)
        target = self.world.target
        params = snapshot.params or self._trained(texts)
        with loaded(target, params):
            import torch

            with torch.no_grad():
                phi = float(self.task.signal(target))
                measures = self.task.measure(target, texts)
            if math.isfinite(phi):  # else the training is at fault, and `_check_finite` says so
                measures = contract.measures(self.files["task"], self.task, measures)
        line = {
            "snapshot": snapshot.step, "phi": phi, "measures": measures, "flops": total.total_flops, "flops_by_phase": total.flops,
            "tokens_generated": total.tokens_generated, "tokens_trained": total.tokens_trained,
        }  # fmt: skip
        return _Scored(line, round(total.seconds, 3), texts, params)

    def _trained(self, texts: list[str]) -> dict[str, Tensor]:
        """A fresh target trained on deployment texts."""
        from dpgbench.metagrad.training import train

        batches, _ = self.bench.batches(texts, "deployment", steps=self.spec.scale.deployment_steps)
        return train(self.world.target, batches, self.bench.optimizer, **self.bench.engine.for_training())

    def _picture(self) -> bytes | None:
        """What the task draws of the final target, as PNG; None for tasks that do not draw."""
        if type(self.task).draw is Task.draw:
            return None
        from dpgbench.metagrad.training import loaded

        params = self.params or self._trained(self.texts)  # none where the last answer was given before an interruption
        with loaded(self.world.target, params):
            return contract.picture(self.files["task"], self.task, self.world.target, self.texts)
