"""The command line: run, sweep, status, cancel, report, export, list, new, check. Only this room prints, and only it ends the process."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

try:
    from dpgbench import config, process_group
    from dpgbench.cli import listing, plugins, report, status, sweep
except ModuleNotFoundError as missing:  # a node whose environment was never installed, or not activated
    print(
        f"dpgbench: {missing.name} is not installed here; activate the environment or `pip install -r requirements.lock`", file=sys.stderr
    )
    sys.exit(2)
from dpgbench.errors import UserError, did_you_mean

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
  new task NAME [plugins=mine]                 the two files of a task of your own, or with `new method NAME` of a method, to change
  check plugin plugins=mine [task=NAME]        does it keep its contract? gradient, determinism, two steps of every method; at scale tiny
  check metagrad task=language seed=0          can this cell's rewards be trusted? directions=8 subsets=32 say how much to measure

  --dry-run      with run and sweep: print the grid, what is done, what is skipped and why, what it would cost
  results=DIR    where results go (default: results)        plugins=DIR    your own methods/, tasks/ and configs/
  launcher=local launcher.workers=2    worker processes     launcher=slurm     job arrays of a cluster; the sweep can be left
  name=NAME      what to call a sweep without a suite       retry=failed       run cells again that failed (or retry=damaged)

A bare key such as steps=2 or lang=es sets the one option of that name; task=all and method=all mean every one there is.
"""

COMMANDS = ("run", "sweep", "status", "cancel", "report", "export", "list", "new", "check")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if a cell failed, 2 on bad input (one line on standard error), 130 on an interrupt."""
    if arguments is None:
        _insist_on_utf8()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _command(words) if process_group.rank() == 0 else sweep.follow(words)
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


def _insist_on_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale says otherwise: names of files and what libraries read and print, all of it."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, words = words[0], words[1:]
    if command == "sweep" and process_group.size() > 1:
        raise UserError("sweep: torchrun's processes work on one cell together; write run, or sweep without torchrun")
    if command not in COMMANDS:
        raise UserError(f"{command!r} is not a command; {did_you_mean(command, COMMANDS)}")
    if "-h" in words or "--help" in words:
        print(USAGE, end="")
        return 0
    dry_run = "--dry-run" in words
    watch = "--watch" in words
    words = [word for word in words if word not in ("--dry-run", "--watch")]
    if command == "list":
        return listing.list_plugins(words)
    if command == "status":
        return status.show_status(words, watch)
    if command == "cancel":
        return sweep.cancel_sweep(words)
    if command == "report":
        return report.write_report(words)
    if command == "new":
        return plugins.new_plugin(words)
    if command == "check" and words[:1] == ["plugin"]:
        return plugins.check_plugins(words[1:])
    if command == "check":
        return listing.check_metagradients(words)
    if command == "export":
        return report.export_cell(words)
    if command == "run" and any(word.startswith("spec=") for word in words):
        request = sweep.replayed(words)
    else:
        request = config.read(words, sweep=command == "sweep")
    for cell in request.cells:
        process_group.check(cell.spec, request.launcher.name)
    return sweep.show_plan(request) if dry_run else sweep.run_cells(request, save=command == "sweep")
