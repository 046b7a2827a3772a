"""The command line: run | sweep | status | cancel | report | export | list | check. Only this file prints, and only it ends the process."""

from __future__ import annotations

import errno
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dpgbench import config, model_files, plan, store
except ModuleNotFoundError as missing:  # a node whose environment was never installed, or not activated
    print(
        f"dpgbench: {missing.name} is not installed here; activate the environment or `pip install -r requirements.lock`", file=sys.stderr
    )
    sys.exit(2)
from dpgbench.api import Options, RunSpec
from dpgbench.config import Cell, Request
from dpgbench.errors import UserError, did_you_mean
from dpgbench.registry import Registry
from dpgbench.standing import OPEN, jobs_of, standings
from dpgbench.store import State

if TYPE_CHECKING:
    from dpgbench.check import Findings

USAGE = """\
usage: python -m dpgbench COMMAND [key=value ...]

  run     task=sixseven method=dpg seed=0      one cell; `run spec=RUN/spec.yaml` replays a stored one
  sweep   method=dpg,base task=all seed=0,1    a grid of cells, or a stored one with suite=NAME; runs what is not done
  status  [the same words] [--watch]           where each cell stands; without words, every run folder
  cancel  [the same words]                     stop what that sweep started, here or on SLURM, and nothing else
  report  suite=NAME                           tables, figures and page of a sweep, from its run folders or its parquet
          --format json                        the same numbers for machines, on standard output, instead of the page
          --compare core@HEAD~1 core           what changed between two suites or commits, and whether it is within noise
  export RUN [to=DIR]                          a run folder's trained generator, for transformers, and its deployment dataset
  list                                         every method, task, scale and suite
  check metagrad task=language seed=0          can this cell's rewards be trusted? directions=8 subsets=32 say how much to measure

  --dry-run      with run and sweep: print the grid, what is done, what is skipped and why, what it would cost
  results=DIR    where results go (default: results)        plugins=DIR    your own methods/, tasks/ and configs/
  launcher=local launcher.workers=2    worker processes     launcher=slurm     job arrays of a cluster; the sweep can be left
  name=NAME      what to call a sweep without a suite       retry=failed       run cells again that failed (or retry=damaged)

A bare key such as steps=2 or lang=es sets the one option of that name; task=all and method=all mean every one there is.
"""

COMMANDS = ("run", "sweep", "status", "cancel", "report", "export", "list", "check")
WATCH_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if a cell failed, 2 on bad input (one line on standard error), 130 on an interrupt."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _command(words)
    except UserError as error:
        print(f"dpgbench: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(
            f"dpgbench: {error.filename or 'results'}: {error.strerror}; free some space or give another folder with results=DIR",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print("dpgbench: interrupted; finished cells are kept, the same command goes on with the rest", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return 2


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, words = words[0], words[1:]
    if command not in COMMANDS:
        raise UserError(f"{command!r} is not a command; {did_you_mean(command, COMMANDS)}")
    if "-h" in words or "--help" in words:
        print(USAGE, end="")
        return 0
    dry_run = "--dry-run" in words
    watch = "--watch" in words
    words = [word for word in words if word not in ("--dry-run", "--watch")]
    if command == "list":
        return _list(words)
    if command == "status":
        return _status(words, watch)
    if command == "cancel":
        return _cancel(words)
    if command == "report":
        return _report(words)
    if command == "check":
        return _check(words)
    if command == "export":
        return _export(words)
    if command == "run" and any(word.startswith("spec=") for word in words):
        request = _replay(words)
    else:
        request = config.read(words, sweep=command == "sweep")
    return _dry_run(request) if dry_run else _launch(request, save=command == "sweep")


def _launch(request: Request, save: bool) -> int:
    """Run or submit what is not done; tell what was skipped and what failed, and why."""
    from dpgbench import launch

    launch.check(request.launcher)
    store.check_writable(request.results)
    model_files.check_cells(cell.spec for cell in request.cells if not cell.skip)
    if save:
        _save_words(request)
    console = _console()
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

    with processes.announced(request.results, request.suite), Display(console, len(todo)) as display:
        launch(todo, request.launcher, request.results, request.registry.plugins, display)
    for spec in display.failed:
        folder = store.RunFolder.of(request.results, spec)
        said = store.last_line(folder.path / "error.txt")
        console.print(f"[red]failed[/] {folder.path}: {escape(said)}", highlight=False, soft_wrap=True)
    for spec in display.busy:
        console.print(f"[yellow]busy[/] {spec.folder}: another process works on this cell", highlight=False, soft_wrap=True)
    if not sweep and todo and not display.failed and not display.busy:
        console.print(f"results in {store.RunFolder.of(request.results, todo[0]).path}", highlight=False, soft_wrap=True)
    return 1 if display.failed or display.busy else 0


def _submit(request: Request, todo: list[RunSpec], console: Console) -> int:
    """To SLURM; returns at once unless `launcher.wait=true`."""
    from dpgbench.launch import slurm
    from dpgbench.runner import commit

    plugins, sweep = request.registry.plugins, request.suite
    for array in slurm.submit(todo, request.launcher, request.results, plugins, sweep, commit()):
        jobs = f"{array.jobs} jobs" if array.jobs > 1 else "one job"
        console.print(f"submitted {array.cells} cells as {array.job} ({jobs}); logs: {array.log}", highlight=False, soft_wrap=True)
    if not request.launcher.wait and todo:
        same = f"{_selector(sweep)}={sweep} results={request.results}"
        console.print(f"status {same} tells how it goes, cancel {same} stops it", highlight=False, soft_wrap=True)
    if not request.launcher.wait:
        return 0
    _watch(lambda: [(cell.spec.folder, _state(cell, state)) for cell, state in _with_states(request)], console)
    bad = [(cell, state) for cell, state in _with_states(request) if not cell.skip and state.name != "done"]
    for cell, state in bad:
        path = store.RunFolder.of(request.results, cell.spec).path
        console.print(f"[red]{state.name}[/] {path}: {escape(state.detail)}", highlight=False, soft_wrap=True)
    return 1 if bad else 0


def _cancel(words: list[str]) -> int:
    """Stop what a sweep started."""
    from dpgbench.launch import processes, slurm

    request = config.read(_full_words(words), sweep=True)
    folders = [store.RunFolder.of(request.results, cell.spec) for cell in request.cells]
    asked, elsewhere = processes.stop(request.results, request.suite)
    jobs = jobs_of(folders, request.suite)
    slurm.cancel(jobs)
    for owner in elsewhere:
        print(f"pid {owner.pid} on {owner.host} runs cells of {request.suite}: stop it there")
    print(f"stopped {len(asked)} processes and {len(jobs)} jobs of {request.suite}")
    return 0


def _dry_run(request: Request) -> int:
    """The grid, without importing torch."""
    console = _console()
    table = Table("cell", "state", "cost", box=None, pad_edge=False)
    states = [_state(cell, state) for cell, state in _with_states(request)]
    seconds = _measured_seconds(request, states)
    to_run, planned = 0.0, []
    for cell, (name, detail) in zip(request.cells, states, strict=True):
        known = seconds.get((cell.spec.task.label, cell.spec.method.label))
        waiting = name not in ("done", "skipped")
        to_run += known or 0.0 if waiting else 0.0
        cost = "" if not waiting else f"about {known:.0f} s" if known else "not measured yet"
        if waiting and (found := plan.estimate(cell.spec, request.registry)):
            planned.append(found)
            cost += f", about {found.flops:.1e} FLOPs and {found.memory / 1e9:.2g} GB"
        table.add_row(cell.spec.folder, f"{name}{': ' + detail if detail else ''}", cost)
    console.print(table)
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


def _status(words: list[str], watch: bool) -> int:
    """Where every cell stands, from files and, where cells were given to SLURM, its queue."""
    results, _, nothing_else = _where(words)
    if nothing_else and not any(word.startswith(("suite=", "name=")) for word in words):

        def rows() -> list[tuple[str, tuple[str, str]]]:
            folders = [store.RunFolder(path) for path in sorted((results / "runs").glob("*")) if path.is_dir()]
            return [(f.path.name, (s.name, s.detail)) for f, s in zip(folders, standings(folders), strict=True)]
    else:
        request = config.read(_full_words(words), sweep=True)

        def rows() -> list[tuple[str, tuple[str, str]]]:
            return [(cell.spec.folder, _state(cell, state)) for cell, state in _with_states(request)]

    console = _console()
    if watch:
        _watch(rows, console)
    found = rows()
    console.print(_state_table(found) if found else f"no runs in {results / 'runs'}")
    return 0


def _state_table(rows: list[tuple[str, tuple[str, str]]]) -> Table:
    table = Table("cell", "state", "", box=None, pad_edge=False)
    for name, (state, detail) in rows:
        table.add_row(name, state, escape(detail))
    return table


def _watch(rows: Callable[[], list[tuple[str, tuple[str, str]]]], console: Console) -> None:
    """Show how it goes until no cell is queued or running; on a terminal all open cells, elsewhere a line whenever a count changes."""
    from rich.live import Live

    told = ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            found = rows()
            names = [state for _, (state, _) in found]
            counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
            if console.is_terminal:
                table = _state_table([row for row in found if row[1][0] in OPEN][: max(5, console.height - 5)])
                table.caption = counts
                live.update(table, refresh=True)
            elif counts != told:
                print(counts, flush=True)
            told = counts
            if not set(names) & set(OPEN):
                return
            time.sleep(WATCH_SECONDS)


def _where(words: list[str]) -> tuple[Path, str, bool]:
    """The results folder, the sweep's name, and whether the words say nothing but these two."""
    given = config.parse(words)
    results, name = (
        str(given.get(key, [default])[0]) for key, default in (("results", "results"), ("suite", given.get("name", ["sweep"])[0]))
    )
    return Path(results), name, set(given) <= {"results", "suite", "name"}


def _full_words(words: list[str]) -> list[str]:
    """The words of the sweep that is meant: its name alone stands for what was said when it ran."""
    results, name, nothing_else = _where(words)
    saved = results / "runs" / f"{name}.sweep.json"
    return [*json.loads(saved.read_text()), f"results={results}"] if nothing_else and saved.exists() else words


def _with_states(request: Request) -> list[tuple[Cell, State]]:
    folders = [store.RunFolder.of(request.results, cell.spec) for cell in request.cells]
    return list(zip(request.cells, standings(folders), strict=True))


def _state(cell: Cell, state: State) -> tuple[str, str]:
    return ("skipped", cell.skip) if cell.skip else (state.name, state.detail)


def _report(words: list[str]) -> int:
    """Collect a sweep into its parquet (where there are run folders) and build the page from that, or say it in JSON."""
    words, as_json = _take_format(words)
    if "--compare" in words:
        return _compare(words, as_json)
    results, name, _ = _where(words)
    parquet = results / f"{name}.parquet"
    full = _full_words(words)
    known = full != words or name in config.suites(Registry()) or not _where(words)[2]
    request = config.read(full, sweep=True) if known else None
    has_runs = request is not None and any((results / "runs" / cell.spec.folder).exists() for cell in request.cells)
    if not has_runs and not parquet.exists():
        raise UserError(
            f"suite={name}: nothing to report: no run folders of it under {results / 'runs'} and no {parquet}; run `sweep` first"
        )
    from dpgbench import collect
    from dpgbench.report import build, machine_readable

    store.check_writable(results)
    if has_runs:
        said = shlex.join(
            word for word in request.arguments if not word.startswith(("results=", "launcher", "workers=", "plugins=", "retry="))
        )
        descriptions = {file.name: file.summary for file in request.registry.files("task")}
        frame = collect.frame_of(request.cells, results, descriptions)
        lost = collect.finished_in(parquet) - set(frame.cell[frame.status == "done"])
        if lost:
            left = f"{len(lost)} finished cells are in {parquet} but have no run folder"
            print(f"{left}: reporting from it; delete it to leave them out", file=sys.stderr if as_json else sys.stdout)
        else:
            collect.write_parquet(frame, parquet, suite=name, title=request.title, command=f"python -m dpgbench sweep {said}")
    frame, about = collect.read_parquet(parquet)
    command = f"{about['command']}\npython -m dpgbench report {_selector(name)}={name}"
    what = {"suite": about["suite"], "command": command, "title": about["title"] or None}
    if as_json:
        print(json.dumps(machine_readable(frame, **what), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(f"report: {build(frame, results / name, **what)}")
    return 0


def _export(words: list[str]) -> int:
    """Generator and dataset of a finished cell, in a folder of their own."""
    runs = [word for word in words if not word.startswith("to=")]
    if len(runs) != 1 or len(words) > 2:
        raise UserError(f"export {' '.join(words)}: takes one run folder, and to=DIR if you like; write export results/runs/CELL to=mine")
    from dpgbench.export import export

    given = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    print(f"exported to {export(Path(runs[0]), Path(given[0]) if given else None)}")
    return 0


def _take_format(words: list[str]) -> tuple[list[str], bool]:
    """The other words, and whether `--format json` was among them."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--format=") else [word])]
    if "--format" not in words:
        return words, False
    at = words.index("--format")
    given = words[at + 1] if at + 1 < len(words) else "nothing"
    if given not in ("json", "html"):
        raise UserError(f"--format {given}: {did_you_mean(given, ['html', 'json'])}")
    return words[:at] + words[at + 2 :], given == "json"


def _compare(words: list[str], as_json: bool) -> int:
    """Two stored suites, or two commits of one, on standard output."""
    at = words.index("--compare")
    sides, rest = words[at + 1 : at + 3], words[:at] + words[at + 3 :]
    if len(sides) < 2 or any("=" in side for side in sides):
        raise UserError("--compare: needs two sides, each a suite, suite@revision or a parquet file; write --compare core@HEAD~1 core")
    unknown = [word for word in rest if not word.startswith("results=")]
    if unknown:
        raise UserError(f"{unknown[0]}: --compare takes two sides and nothing else but results=DIR and --format json")
    results = _where(rest)[0]
    if not results.is_dir():
        raise UserError(f"results={results}: there is no such folder; give the one that holds the parquet files")
    from dpgbench.report import compare

    table = compare.compare(*(compare.read_side(side, results) for side in sides))
    print(compare.as_json(table) if as_json else compare.as_markdown(table), end="\n" if as_json else "")
    return 0


def _list(words: list[str]) -> int:
    """Every plug-in, the broken ones named, and every scale and suite."""
    given = config.parse(words)
    unknown = sorted(set(given) - {"plugins"})
    if unknown:
        raise UserError(f"{unknown[0]}: list takes no argument but plugins=DIR")
    registry = Registry(Path(str(given["plugins"][0])) if "plugins" in given else None)
    console = _console()
    for kind in ("method", "task"):
        table = Table(f"{kind}s", "", box=None, pad_edge=False, title_justify="left")
        rows = {
            file.name: f"[red]unusable: {escape(file.error)}[/]" if file.error else escape(file.summary) for file in registry.files(kind)
        }
        rows |= {name: escape(_first_comment(path)) for name, path in config.presets(registry, kind).items()}
        for name in sorted(rows):
            table.add_row(name, rows[name])
        console.print(table, highlight=False)
        console.print()
    table = Table("scales and suites", "", box=None, pad_edge=False)
    for path in sorted(config.files(registry, "scale").values()):
        table.add_row(f"scale={path.stem}", _first_comment(path))
    for name, title in config.suites(registry).items():
        table.add_row(f"suite={name}", title)
    console.print(table, highlight=False)
    return 0


def _check(words: list[str]) -> int:
    """Measure how far a cell's metagradients can be trusted. Returns 0 for yes and with care, 1 for no."""
    if not words or words[0] != "metagrad":
        given = words[0] if words else "nothing"
        raise UserError(f"check {given}: there is one thing to check; write `check metagrad`, then task=, scale=, seed= as with run")
    own = ("directions=", "subsets=")
    counts = {key: values[0] for key, values in config.parse(word for word in words[1:] if word.startswith(own)).items()}
    for key, count in counts.items():
        if type(count) is not int or count < 3:
            raise UserError(f"{key}={count}: a correlation needs 3 or more; write {key}=8")
    (cell,) = config.read([word for word in words[1:] if not word.startswith(own)], sweep=False).cells
    if cell.skip:
        raise UserError(cell.skip)
    plugins = config.parse(words[1:]).get("plugins", [None])[0]
    from dpgbench.check import measure_cell

    found = measure_cell(cell.spec, Path(plugins) if plugins else None, **counts)
    console = _console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in _check_rows(found):
        table.add_row(*row)
    console.print(f"{cell.spec.task.label}, scale {cell.spec.scale.name}, seed {cell.spec.seed}: {found.examples} texts, T={found.steps}")
    console.print(table, highlight=False)
    answer, reasons = found.verdict
    console.print(
        f"Can these rewards be trusted here? {answer.capitalize()}{': ' + '; '.join(reasons) if reasons else ''}.",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if answer == "no" else 0


def _check_rows(found: Findings) -> list[tuple[str, str, str]]:
    """What was measured, its value, what it means."""
    rows = [
        ("finite differences", f"{found.fd_correlation:.6f}", f"correlation with the exact derivative; largest error {found.fd_error:.1e}"),
        ("rounding", f"{found.rounding:.6f}", "correlation of the rewards with float64 ones"),
        ("linear datamodelling score", f"{found.lds:.3f}", "rank correlation of predicted and actual Phi, half of the texts left out"),
        ("metasmoothness", f"{found.metasmoothness:.3f}", "1: parameters move in proportion to the weights' change; 0: at random"),
    ]
    if found.saturation is not None:
        said = f"of AdamW's first step is a sign, at eps_root={found.eps_root:.0e}; suggested {found.suggested_eps_root:.0e} or more"
        rows.append(("saturation", f"{found.saturation:.3f}", said))
    if found.bf16_correlation is not None:
        rows.append(("bfloat16", f"{found.bf16_correlation:.4f}", "correlation of the rewards with float32 ones"))
    rows.append(("cost", f"{found.cost:.2f}", f"times training alone; steps by {', '.join(dict.fromkeys(found.modes))}"))
    return rows


def _console() -> Console:
    """Colours and the terminal's width on a terminal; plain unwrapped lines into a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=240)


def _first_comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0] if lines else ""


def _replay(words: list[str]) -> Request:
    given = config.parse(words)
    unknown = sorted(set(given) - {"spec", "results", "plugins"})
    if unknown:
        raise UserError(f"{unknown[0]}: a replay runs the stored settings; only results= and plugins= go with spec=")
    registry = Registry(Path(str(given["plugins"][0])) if "plugins" in given else None)
    cell = config.replay(Path(str(given["spec"][0])), registry)
    return Request([cell], "replay", "", _where(words)[0], registry, Options({"name": "inline", "workers": 1}))


def _selector(name: str) -> str:
    return "suite" if name in config.suites(Registry()) else "name"


def _save_words(request: Request) -> None:
    """So that `report` knows the grid later, without being told again."""
    words = [word for word in request.arguments if not word.startswith(("results=", "retry="))]
    store.write_atomically(request.results / "runs" / f"{request.suite}.sweep.json", json.dumps(words))
