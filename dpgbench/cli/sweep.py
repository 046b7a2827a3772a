"""run, sweep and cancel: what is to be done, where, what it would cost, and what came of it."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

from rich.console import Console

from dpgbench import config
from dpgbench.bench import distributed
from dpgbench.cli.arguments import inert, known_words, place_of, say, selector, show_rows, terminal, warn_of_threads, without
from dpgbench.cli.status import described, patiently, watch_rows, with_states
from dpgbench.config import optional_packages, validate
from dpgbench.config.overrides import for_shell, one
from dpgbench.config.request import Request
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.files import write_atomically
from dpgbench.core.options import Options
from dpgbench.launch.cell_states import jobs_of, standings
from dpgbench.plugins.registry import Registry
from dpgbench.run import estimate
from dpgbench.store import run_folder
from dpgbench.store.run_folder import RunFolder
from dpgbench.worlds import model_files

ENOUGH_SEEDS = 6  # 2^(1-6) = 0.03


def run(words: list[str]) -> int:
    """One cell, or with --dry-run what it would be."""
    words, dry_run = without("--dry-run", words)
    replay = any(word.startswith("spec=") for word in words)
    request = replayed(words) if replay else config.read(words, sweep=False)
    for cell in request.cells:
        validate.check_processes(cell.spec, request.launcher.name)
    return show_plan(request) if dry_run else run_cells(request, save=False)


def sweep(words: list[str]) -> int:
    """A grid, or with --dry-run what it would be."""
    if distributed.size() > 1:
        raise UserError("sweep: torchrun's processes work on one cell together; write run, or sweep without torchrun")
    words, dry_run = without("--dry-run", words)
    request = config.read(words, sweep=True)
    return show_plan(request, sweep=True) if dry_run else run_cells(request, save=True)


def run_cells(request: Request, save: bool) -> int:
    """Run or submit what is not done; tell what was skipped and what failed, and why."""
    from dpgbench import launch

    launch.check(request.launcher)
    run_folder.check_writable(request.results)
    optional_packages.check_cells(cell.spec for cell in request.cells if not cell.skip)
    model_files.check_cells(cell.spec for cell in request.cells if not cell.skip)
    if request.launcher.name == "slurm":
        from dpgbench.launch import slurm

        slurm.check_cells((cell.spec for cell in request.cells if not cell.skip), request.launcher)
    if save:
        _save_words(request)
    console = terminal()
    todo, bad = _todo(request, console, sweep=save)
    if request.launcher.name != "slurm":
        warn_of_threads(todo)
    if request.launcher.name == "slurm":
        return max(bad, _submit(request, todo, console))
    return max(bad, _run_here(request, todo, console, sweep=save))


def _todo(request: Request, console: Console, *, sweep: bool) -> tuple[list[RunSpec], int]:
    """The cells to run, and 1 if there are any that only `retry=` would run; all others are told of."""
    cells = []
    for cell in request.cells:
        if cell.skip:
            say(console, f"{cell.spec.folder}: {cell.skip}", "skipped", "yellow")
        else:
            cells.append(cell)
    folders = [RunFolder.of(request.results, cell.spec) for cell in cells]
    todo, elsewhere, left = [], [], {}
    counts = {"done": 0, "queued": 0}
    for cell, folder, state in zip(cells, folders, standings(folders, settle=True), strict=True):
        retried = state.name in request.retry or (state.name == "failed" and not sweep)
        if state.name in counts:
            counts[state.name] += 1
        elif state.name == "running":
            elsewhere.append(cell.spec)
        elif state.name in ("failed", "damaged") and not retried:
            if not sweep:
                raise UserError(f"{folder.path}: {state.detail}; delete the folder to run the cell again")
            say(console, _with_file(f"{folder.path}: {state.detail}", folder), state.name, "red")
            left[state.name] = left.get(state.name, 0) + 1
        else:
            todo.append(cell.spec)
    if counts["done"]:
        say(console, f"{counts['done']} of {len(request.cells)} cells are done already")
    if counts["queued"]:
        say(console, f"{counts['queued']} cells are in SLURM's queue already")
    for name, count in left.items():
        say(console, f"{count} {name} before and left alone; retry={name} runs {'it' if count == 1 else 'them'} again")
    if request.launcher.name == "slurm" and elsewhere:
        say(console, f"{len(elsewhere)} cells are running already")
        elsewhere = []
    return todo + elsewhere, int(bool(left))


def _run_here(request: Request, todo: list[RunSpec], console: Console, *, sweep: bool) -> int:
    """In this process and its workers."""
    from dpgbench.cli.progress import Display
    from dpgbench.launch import launch, local_sweeps

    plugins, group = request.registry.plugins, distributed.start()
    work = (todo[0].config, request.results, plugins, request.launcher.get("checkpoint_seconds", 60.0)) if todo else None
    if group.size > 1:
        group.broadcast(work)
    with local_sweeps.announced(request.results, request.suite), Display(console, len(todo)) as display:
        group.last_words = lambda: _tell_failure(request, todo[0], console)
        launch(todo, request.launcher, request.results, plugins, display, group)
    for spec in display.failed:
        _tell_failure(request, spec, console)
    left = [*display.failed, *display.busy, *display.gone]
    if not left:
        group.close()
    for spec in display.busy:
        say(console, f"{spec.folder}: {RunFolder.of(request.results, spec).occupied()}", "busy", "yellow")
    for spec in display.gone:
        why = "deleted or replaced while the cell ran; leave it alone, and the same command runs the cell again"
        say(console, f"{RunFolder.of(request.results, spec).path}: {why}", "gone", "red")
    if not sweep and todo and not left:
        say(console, f"results in {RunFolder.of(request.results, todo[0]).path}")
    return 1 if left else 0


def _tell_failure(request: Request, spec: RunSpec, console: Console) -> None:
    folder = RunFolder.of(request.results, spec)
    said = run_folder.last_line(folder.path / "error.txt")
    say(console, _with_file(f"{folder.path}: {said}", folder), "failed", "red")


def _with_file(line: str, folder: RunFolder) -> str:
    """Where the whole of a failure's reason is."""
    error = folder.path / "error.txt"
    return f"{line} ({error} has all of it)" if error.exists() else line


def follow(words: list[str]) -> int:
    """What torchrun's other processes do while the first one does `run`: their share of the cell, in silence; the first tells it all."""
    if words[:1] != ["run"] or {"--dry-run", "-h", "--help"} & set(words):
        return 0
    from dpgbench.run.cell import run_cell

    group = distributed.start()
    work = group.broadcast(None)
    if work is not None:
        config, results, plugins, seconds = work
        state = run_cell(RunSpec(config), results, plugins, checkpoint_seconds=seconds, group=group)
    if work is None or state == "done":
        group.close()
    return 0


def _submit(request: Request, todo: list[RunSpec], console: Console) -> int:
    """To SLURM; returns at once unless `launcher.wait=true`."""
    from dpgbench.launch import slurm
    from dpgbench.run.environment import commit

    plugins, sweep = request.registry.plugins, request.suite
    for array in slurm.submit(todo, request.launcher, request.results, plugins, sweep, commit()):
        jobs = f"{array.jobs} jobs" if array.jobs > 1 else "one job"
        say(console, f"submitted {array.cells} cells as {array.job} ({jobs}); logs: {array.log}")
    if not request.launcher.wait and todo:
        same = f"{for_shell(selector(sweep), sweep)} {for_shell('results', str(request.results))}"
        say(console, f"status {same} tells how it goes, cancel {same} stops it")
    if not request.launcher.wait:
        return 0
    watch_rows(lambda: [(cell.spec.folder, described(cell, state)) for cell, state in with_states(request)], console)
    bad = [(cell, state) for cell, state in patiently(lambda: with_states(request), console) if not cell.skip and state.name != "done"]
    for cell, state in bad:
        folder = RunFolder.of(request.results, cell.spec)
        say(console, _with_file(f"{folder.path}: {state.detail}", folder), state.name, "red")
    return 1 if bad else 0


def cancel_sweep(words: list[str]) -> int:
    """Stop what a sweep started."""
    from dpgbench.launch import local_sweeps, slurm

    request = config.read(known_words(words), sweep=True)
    folders = [RunFolder.of(request.results, cell.spec) for cell in request.cells]
    asked, elsewhere = local_sweeps.stop(request.results, request.suite)
    jobs = jobs_of(folders, request.suite)
    slurm.cancel(jobs)
    for owner in elsewhere:
        print(inert(f"pid {owner.pid} on {owner.host} runs cells of {request.suite}: stop it there"))
    print(inert(f"stopped {len(asked)} processes and {len(jobs)} jobs of {request.suite}"))
    return 0


def show_plan(request: Request, *, sweep: bool = False) -> int:
    """The grid, where its results would go and what it would cost, without importing torch."""
    from dpgbench.cli.progress import lasting

    console = terminal()
    folders = [RunFolder.of(request.results, cell.spec) for cell in request.cells]
    states = [described(cell, state) for cell, state in zip(request.cells, standings(folders), strict=True)]
    measured, estimates = _measured_seconds(request, folders, states), _Estimates(request.registry)
    rows, planned, to_run, here = [], [], 0.0, 0.0
    unknown: Counter[str] = Counter()  # by the reason
    for cell, folder, (name, detail) in zip(request.cells, folders, states, strict=True):
        costs = []
        if name not in ("done", "skipped"):
            known, found = measured.get((cell.spec.task.label, cell.spec.method.label)), estimates.of(cell.spec)
            to_run += known or 0.0
            if known:
                costs.append(f"about {lasting(known)}")
            elif found:
                here += (seconds := estimates.seconds(cell.spec, found))
                costs.append(f"about {lasting(seconds)} here")
            if found:
                planned.append(found)
                costs.append(f"about {found.flops:.1e} FLOPs and {found.memory / 1e9:.2g} GB")
            if not costs:
                unknown[estimate.why_none(cell.spec)] += 1
        waiting = name not in ("done", "skipped")
        rows.append((folder.path.name, f"{name}{': ' + detail if detail else ''}", ", ".join(costs) or "no estimate" * waiting))
    show_rows(console, ("cell", "state", "cost"), rows)
    counts = {name: sum(state == name for state, _ in states) for name in dict.fromkeys(state for state, _ in states)}
    say(console, f"{len(states)} cells: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    if to_run:
        say(console, f"about {lasting(to_run)} of computing left, by the median of finished cells of the same task and method")
    if here:
        rates = " and ".join(f"{rate / 1e9:.2g}" for rate in estimates.rates.values())
        say(
            console,
            f"about {lasting(here)} of processor time here, if FLOPs take as long as in the matrix products just timed, {rates} GFLOPs a "
            "second; starting up and Phi come on top, and may be most of a short cell",
        )
    for reason, count in unknown.items():
        say(console, f"no estimate for {count} cells: {reason}")
    if planned:
        flops, hours, memory = (sum(p.flops for p in planned), sum(p.gpu_hours for p in planned), max(p.memory for p in planned))
        gpu = f"{hours:.2g} GPU-hours if a GPU sustains {estimate.SUSTAINED:.0e} FLOPs a second (not measured), "
        say(
            console,
            f"about {flops:.2g} FLOPs in {len(planned)} cells, {gpu if hours > 0.01 else ''}{memory / 1e9:.3g} GB for the largest"
            + (" on one GPU" if hours > 0.01 else ""),
        )
    if sweep:
        _say_what_seeds_can_show(request, console)
        page = request.results / request.suite / "index.html"
        say(console, f"run folders in {request.results / 'runs'}; `report` makes {page} of them")
    else:
        say(console, f"run folder: {folders[0].path}")
    return 0


class _Estimates:
    """Estimates, made once for all seeds of a setting, and the rates at which this machine multiplies, timed when first asked for."""

    def __init__(self, registry: Registry):
        self.registry = registry
        self.rates: dict[int, float] = {}  # FLOPs a second by width
        self._known: dict[str, estimate.Estimate | None] = {}

    def of(self, spec: RunSpec) -> estimate.Estimate | None:
        setting = repr({key: value for key, value in spec.config.items() if key != "seed"})
        if setting not in self._known:
            self._known[setting] = estimate.estimate(spec, self.registry)
        return self._known[setting]

    def seconds(self, spec: RunSpec, found: estimate.Estimate) -> float:
        if found.width not in self.rates:
            self.rates[found.width] = estimate.flops_a_second(found.width, spec.scale.sampling_batch)
        return min((found.flops + found.evaluation) / self.rates[found.width], spec.budget.get("seconds", float("inf")))


def _say_what_seeds_can_show(request: Request, console: Console) -> None:
    """Methods are compared seed by seed: with n seeds no two-sided sign-flip test has a p below 2^(1-n)."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for cell in request.cells:
        seeds.setdefault((cell.spec.task.label, cell.spec.method.label), set()).add(cell.spec.seed)
    fewest, methods = min(map(len, seeds.values())), {label for _, label in seeds}
    if len(methods) > 1 and fewest < ENOUGH_SEEDS:
        can = "allows no test" if fewest == 1 else f"cannot give a p below {2.0 ** (1 - fewest):.3g}"
        count = "one seed" if fewest == 1 else f"{fewest} seeds"
        say(console, f"{count} {can}: telling two methods apart at p < 0.05 takes {ENOUGH_SEEDS}, seed=0,1,2,3,4,5", "note", "yellow")


def _measured_seconds(request: Request, folders: list[RunFolder], states: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Median seconds of the finished cells of each (task, method) of the grid."""
    measured: dict[tuple[str, str], list[float]] = {}
    for cell, folder, (name, _) in zip(request.cells, folders, states, strict=True):
        if name == "done":
            total = folder.result().get("seconds_total")
            if type(total) in (int, float):
                measured.setdefault((cell.spec.task.label, cell.spec.method.label), []).append(total)
    return {labels: statistics.median(values) for labels, values in measured.items()}


def replayed(words: list[str]) -> Request:
    given = config.parse(words)
    unknown = sorted(set(given) - {"spec", "results", "plugins"})
    if unknown:
        raise UserError(f"{unknown[0]}: a replay runs the stored settings; only results= and plugins= go with spec=")
    plugins = one(given, "plugins")
    registry = Registry(None if plugins is None else Path(plugins))
    try:
        cell = config.replay(Path(one(given, "spec")), registry)
    except UserError as error:
        own = "; where it is a plug-in of your own, say where with plugins=DIR" if plugins is None and ": no such" in str(error) else ""
        raise UserError(f"{error}{own}") from None
    return Request([cell], "replay", "", place_of(words)[0], registry, Options({"name": "inline", "workers": 1}))


def _save_words(request: Request) -> None:
    """So that `report` knows the grid later, without being told again."""
    words = [word for word in request.arguments if not word.startswith(("results=", "retry="))]
    write_atomically(request.results / "runs" / f"{request.suite}.sweep.json", json.dumps(words))
