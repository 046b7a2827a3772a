"""run, sweep and cancel: what is to be done, where, what it would cost, and what came of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dpgbench import config, extras, model_files, plan, process_group, store
from dpgbench.api import Options, RunSpec
from dpgbench.cli.status import described, watch_rows, with_states
from dpgbench.cli.words import full_words, place_of, selector, show_rows, terminal
from dpgbench.config import Request
from dpgbench.errors import UserError
from dpgbench.registry import Registry
from dpgbench.standing import jobs_of, standings


def run_cells(request: Request, save: bool) -> int:
    """Run or submit what is not done; tell what was skipped and what failed, and why."""
    from dpgbench import launch

    launch.check(request.launcher)
    store.check_writable(request.results)
    extras.check_cells(cell.spec for cell in request.cells if not cell.skip)
    model_files.check_cells(cell.spec for cell in request.cells if not cell.skip)
    if save:
        _save_words(request)
    console = terminal()
    todo, bad = _todo(request, console, sweep=save)
    if request.launcher.name == "slurm":
        return max(bad, _submit(request, todo, console))
    return max(bad, _run_here(request, todo, console, sweep=save))


def _todo(request: Request, console: Console, *, sweep: bool) -> tuple[list[RunSpec], int]:
    """The cells to run, and 1 if there are any that only `retry=` would run; all others are told of."""
    cells = []
    for cell in request.cells:
        if cell.skip:
            console.print(f"[yellow]skipped[/] {cell.spec.folder}: {cell.skip}", highlight=False, soft_wrap=True)
        else:
            cells.append(cell)
    folders = [store.RunFolder.of(request.results, cell.spec) for cell in cells]
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
            console.print(f"[red]{state.name}[/] {folder.path}: {escape(state.detail)}", highlight=False, soft_wrap=True)
            left[state.name] = left.get(state.name, 0) + 1
        else:
            todo.append(cell.spec)
    if counts["done"]:
        console.print(f"{counts['done']} of {len(request.cells)} cells are done already", highlight=False)
    if counts["queued"]:
        console.print(f"{counts['queued']} cells are in SLURM's queue already", highlight=False)
    for name, count in left.items():
        console.print(f"{count} {name} before and left alone; retry={name} runs {'it' if count == 1 else 'them'} again", highlight=False)
    if request.launcher.name == "slurm" and elsewhere:
        console.print(f"{len(elsewhere)} cells are running already", highlight=False)
        elsewhere = []
    return todo + elsewhere, int(bool(left))


def _run_here(request: Request, todo: list[RunSpec], console: Console, *, sweep: bool) -> int:
    """In this process and its workers."""
    from dpgbench.display import Display
    from dpgbench.launch import launch, processes

    plugins, group = request.registry.plugins, process_group.start()
    work = (todo[0].config, request.results, plugins, request.launcher.get("checkpoint_seconds", 60.0)) if todo else None
    if group.size > 1:
        group.broadcast(work)
    with processes.announced(request.results, request.suite), Display(console, len(todo)) as display:
        group.last_words = lambda: _tell_failure(request, todo[0], console)
        launch(todo, request.launcher, request.results, plugins, display, group)
    for spec in display.failed:
        _tell_failure(request, spec, console)
    if not display.failed and not display.busy:
        group.close()
    for spec in display.busy:
        console.print(f"[yellow]busy[/] {spec.folder}: another process works on this cell", highlight=False, soft_wrap=True)
    if not sweep and todo and not display.failed and not display.busy:
        console.print(f"results in {store.RunFolder.of(request.results, todo[0]).path}", highlight=False, soft_wrap=True)
    return 1 if display.failed or display.busy else 0


def _tell_failure(request: Request, spec: RunSpec, console: Console) -> None:
    folder = store.RunFolder.of(request.results, spec)
    said = store.last_line(folder.path / "error.txt")
    console.print(f"[red]failed[/] {folder.path}: {escape(said)}", highlight=False, soft_wrap=True)


def follow(words: list[str]) -> int:
    """What torchrun's other processes do while the first one does `run`: their share of the cell, in silence; the first tells it all."""
    if words[:1] != ["run"] or {"--dry-run", "-h", "--help"} & set(words):
        return 0
    from dpgbench.runner import run_cell

    group = process_group.start()
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
    from dpgbench.runner import commit

    plugins, sweep = request.registry.plugins, request.suite
    for array in slurm.submit(todo, request.launcher, request.results, plugins, sweep, commit()):
        jobs = f"{array.jobs} jobs" if array.jobs > 1 else "one job"
        console.print(f"submitted {array.cells} cells as {array.job} ({jobs}); logs: {array.log}", highlight=False, soft_wrap=True)
    if not request.launcher.wait and todo:
        same = f"{selector(sweep)}={sweep} results={request.results}"
        console.print(f"status {same} tells how it goes, cancel {same} stops it", highlight=False, soft_wrap=True)
    if not request.launcher.wait:
        return 0
    watch_rows(lambda: [(cell.spec.folder, described(cell, state)) for cell, state in with_states(request)], console)
    bad = [(cell, state) for cell, state in with_states(request) if not cell.skip and state.name != "done"]
    for cell, state in bad:
        path = store.RunFolder.of(request.results, cell.spec).path
        console.print(f"[red]{state.name}[/] {path}: {escape(state.detail)}", highlight=False, soft_wrap=True)
    return 1 if bad else 0


def cancel_sweep(words: list[str]) -> int:
    """Stop what a sweep started."""
    from dpgbench.launch import processes, slurm

    request = config.read(full_words(words), sweep=True)
    folders = [store.RunFolder.of(request.results, cell.spec) for cell in request.cells]
    asked, elsewhere = processes.stop(request.results, request.suite)
    jobs = jobs_of(folders, request.suite)
    slurm.cancel(jobs)
    for owner in elsewhere:
        print(f"pid {owner.pid} on {owner.host} runs cells of {request.suite}: stop it there")
    print(f"stopped {len(asked)} processes and {len(jobs)} jobs of {request.suite}")
    return 0


def show_plan(request: Request) -> int:
    """The grid, without importing torch."""
    console = terminal()
    states = [described(cell, state) for cell, state in with_states(request)]
    seconds = _measured_seconds(request, states)
    to_run, planned, rows = 0.0, [], []
    for cell, (name, detail) in zip(request.cells, states, strict=True):
        known = seconds.get((cell.spec.task.label, cell.spec.method.label))
        waiting = name not in ("done", "skipped")
        to_run += known or 0.0 if waiting else 0.0
        cost = "" if not waiting else f"about {known:.0f} s" if known else "not measured yet"
        if waiting and (found := plan.estimate(cell.spec, request.registry)):
            planned.append(found)
            cost += f", about {found.flops:.1e} FLOPs and {found.memory / 1e9:.2g} GB"
        rows.append((cell.spec.folder, f"{name}{': ' + detail if detail else ''}", cost))
    show_rows(console, ("cell", "state", "cost"), rows)
    counts = {name: sum(state == name for state, _ in states) for name in dict.fromkeys(state for state, _ in states)}
    console.print(f"{len(states)} cells: {', '.join(f'{count} {name}' for name, count in counts.items())}", highlight=False)
    if to_run:
        console.print(
            f"about {to_run:.0f} s of computing left, by the median of finished cells of the same task and method", highlight=False
        )
    if planned:
        flops, hours, memory = (sum(p.flops for p in planned), sum(p.gpu_hours for p in planned), max(p.memory for p in planned))
        console.print(
            f"about {flops:.2g} FLOPs in {len(planned)} cells, {hours:.2g} GPU-hours if a GPU sustains {plan.SUSTAINED:.0e} FLOPs a "
            f"second (not measured), {memory / 1e9:.3g} GB for the largest on one GPU",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _measured_seconds(request: Request, states: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Median seconds of the finished cells of each (task, method) of the grid."""
    measured: dict[tuple[str, str], list[float]] = {}
    for cell, (name, _) in zip(request.cells, states, strict=True):
        if name == "done":
            total = store.RunFolder.of(request.results, cell.spec).result()["seconds_total"]
            measured.setdefault((cell.spec.task.label, cell.spec.method.label), []).append(total)
    return {labels: statistics.median(values) for labels, values in measured.items()}


def replayed(words: list[str]) -> Request:
    given = config.parse(words)
    unknown = sorted(set(given) - {"spec", "results", "plugins"})
    if unknown:
        raise UserError(f"{unknown[0]}: a replay runs the stored settings; only results= and plugins= go with spec=")
    registry = Registry(Path(str(given["plugins"][0])) if "plugins" in given else None)
    cell = config.replay(Path(str(given["spec"][0])), registry)
    return Request([cell], "replay", "", place_of(words)[0], registry, Options({"name": "inline", "workers": 1}))


def _save_words(request: Request) -> None:
    """So that `report` knows the grid later, without being told again."""
    words = [word for word in request.arguments if not word.startswith(("results=", "retry="))]
    store.write_atomically(request.results / "runs" / f"{request.suite}.sweep.json", json.dumps(words))
