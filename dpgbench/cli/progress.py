"""What a person sees while cells run: bars on a terminal, elsewhere now and then a line per cell. Used by cli/ alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpgbench.core.cell import RunSpec
from dpgbench.core.text import visible

MARKS = {
    "done": "[green]done[/]  ", "busy": "[yellow]busy[/]  ", "interrupted": "[yellow]stopped[/]", "gone": "[red]gone[/]  ",
    "failed": "[red]failed[/]",
}  # fmt: skip
QUIET_SECONDS = 30.0  # between two lines of a cell


@dataclass
class _Running:
    """A cell that has started: what it last said, and when."""

    since: float
    bar: Any
    latest: dict[str, Any] = field(default_factory=dict)
    first: tuple[int, float] | None = None  # the first step seen, and when
    told: float | None = None


class Display:
    """Call it with every event of a launch, inside `with`.

    On a terminal it draws a bar per cell (step, Phi, tokens, time left) and one for the sweep; elsewhere, as in a job's log, it prints
    a line when a cell starts, at its first step, and then every QUIET_SECONDS at most. A finished cell is a line everywhere.
    """

    def __init__(self, console: Console, cells: int, clock: Callable[[], float] = time.monotonic):
        self.console, self._clock = console, clock
        self.failed: list[RunSpec] = []
        self.busy: list[RunSpec] = []
        self.gone: list[RunSpec] = []
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._sweep = self._progress.add_task("cells", total=cells, state="")
        self._running: dict[str, _Running] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, spec: RunSpec, event: dict[str, Any]) -> None:
        state = event.get("state")
        if state == "started":
            bar = self._progress.add_task(_name(spec), total=_steps(spec) or 1, state="loading")
            self._running[spec.folder] = _Running(self._clock(), bar)
            self._print(f"started {_name(spec)}")
        elif state is not None:
            self._finish(spec, state)
        elif spec.folder in self._running:
            running = self._running[spec.folder]
            running.latest.update(event)
            if running.first is None and "step" in event:
                running.first = event["step"], self._clock()
            self._progress.update(running.bar, completed=running.latest.get("step", 0), state=_reached(running.latest))
            self._tell(spec, running)

    def _tell(self, spec: RunSpec, running: _Running) -> None:
        """A line on how far a cell is, unless there was one just now. A policy's first is its first step, not the snapshot before."""
        now, steps = self._clock(), _steps(spec)
        if spec.method.get("policy") is not None and running.first is None:
            return
        if running.told is not None and now - running.told < QUIET_SECONDS:
            return
        running.told, latest = now, running.latest
        counter = next((name for name in ("step", "round", "candidate", "snapshot") if name in latest), "step")
        place = f"{counter} {latest.get(counter, 0)}" + (f"/{steps}" if steps and counter == "step" else "")
        line = f"running {_name(spec)}  {place}  {_reached(latest)}  {lasting(now - running.since)} so far"
        made = latest.get("step", 0) - running.first[0] if running.first else 0
        if steps and made:
            line += f", about {lasting((now - running.first[1]) / made * (steps - latest['step']))} left"
        self._print(line)

    def _print(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _finish(self, spec: RunSpec, state: str) -> None:
        running = self._running.pop(spec.folder, None)
        if running is not None:
            self._progress.remove_task(running.bar)
        self._progress.advance(self._sweep)
        measures = running.latest.get("measures", {}) if running else {}
        numbers = escape(visible("  ".join(f"{name} {value:.4g}" for name, value in measures.items())))
        mark = MARKS.get(state, MARKS["failed"])
        {"failed": self.failed, "busy": self.busy, "gone": self.gone}.get(state, []).append(spec)
        self.console.print(f"{mark} {_name(spec)}  {numbers}", highlight=False)


def lasting(seconds: float) -> str:
    """A time, roughly: "40 s", "12 min"."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _name(spec: RunSpec) -> str:
    return f"{spec.task.label} {spec.method.label} seed {spec.seed}"


def _steps(spec: RunSpec) -> int | None:
    """How many the method is to take, if it trains a policy and no budget says when to stop."""
    return (spec.method.get("policy") or {}).get("steps")


def _reached(latest: dict[str, Any]) -> str:
    phi, tokens = latest.get("phi"), latest.get("tokens_generated", 0)
    return (f"Phi {phi:.4g}  " if phi is not None else "") + f"{_short(tokens)} tokens"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
