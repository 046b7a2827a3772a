"""The command line: one table of commands. Only this room prints, and only it ends the process."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from dpgbench import __version__
from dpgbench.bench import distributed
from dpgbench.core.errors import UserError, did_you_mean

INTERRUPTED = 130
ELSEWHERE = "or give another folder with results=DIR"
FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space {ELSEWHERE}"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), f"make it writable {ELSEWHERE}"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN), f"see whether its disk is well {ELSEWHERE}"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EISDIR), f"move away what is in a folder's place {ELSEWHERE}"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files, as with `ulimit -n 1024`"),
    errno.ENAMETOOLONG: "give a shorter name, or a shorter path with results=DIR",
    errno.ENOMEM: "free some memory, or lower launcher.workers",
}
"""What to do about an error of the system's; any other is a mistake in the program and keeps its traceback."""


def _not_installed(name: str) -> str:
    """For a node whose environment was never installed, or not activated."""
    return f"dpgbench: {name} is not installed here; activate the environment or `pip install --no-deps -r requirements.lock`"


try:
    from dpgbench.cli.arguments import Command, inert, reader_gone
except ModuleNotFoundError as missing:
    print(_not_installed(missing.name or "a package"), file=sys.stderr)
    sys.exit(2)


def _late(module: str, function: str) -> Callable[[list[str]], int]:
    """A command that is imported when it is asked for: what the others need takes longer than a short one does."""

    def run(words: list[str]) -> int:
        return getattr(import_module(f"dpgbench.cli.{module}"), function)(words)

    return run


CELLS = """\
  key=value[,value...]   task=, method=, scale=, launcher= choose files (all: every task, every method); any other key sets an option:
                         in full (policy.lr=2e-3), or a bare name that one option has (steps=2, lang=es)
  suite=NAME             a stored grid; whatever else is said is put over it
  results=DIR            where results go (default: results)
  plugins=DIR            your own methods/, tasks/ and configs/
  launcher=local         worker processes, launcher.workers=2 of them; launcher=slurm: job arrays of a cluster"""
TEXT = """\
  A text is taken as it was typed: name=1.10, scale.instruction="Écris en français, s'il te plaît." A comma separates values, one with a
  space after it belongs to the text; quotes of the grammar keep any: "scale.instruction='a,b'"."""
SWEEP = """\
  name=NAME, suite=NAME  which sweep; that it was, in full, is remembered where it ran
  key=value[,value...]   or the same words as for sweep
  results=DIR            where its results are (default: results)"""

COMMANDS = {
    "run": Command(
        _late("sweep", "run"), "[key=value ...] [--dry-run]", "one cell: a method on a task with a seed",
        f"""{CELLS}
  spec=RUN/spec.yaml     instead of all others: replay a stored cell
  --dry-run              print what would run, where its results would go and what it would cost, and do nothing
{TEXT}""",
        ("task=sixseven method=dpg seed=0", "scale=small task=language lang=es method=dpg steps=2 --dry-run"),
        "the cell failed, or another process works on it", ("--dry-run",),
    ),
    "sweep": Command(
        _late("sweep", "sweep"), "[key=value,value ...] [--dry-run]", "a grid of cells; runs what is not done",
        f"""{CELLS}
  name=NAME              what to call a sweep without a suite (default: sweep)
  retry=failed           run cells again that failed, or with retry=damaged that were damaged; otherwise they are left alone
  --dry-run              print the grid, what is done, what is skipped and why, what it would cost, and do nothing
{TEXT}""",
        ("method=dpg,base task=all seed=0,1,2 launcher=local launcher.workers=2 name=mine", "suite=methods --dry-run"),
        "a cell failed, or another process works on it", ("--dry-run",),
    ),
    "status": Command(
        _late("status", "show_status"), "[name=NAME | suite=NAME | key=value ...] [--watch]", "where every cell stands",
        f"""{SWEEP}
                         without any of them: every run folder
  --watch                stay until no cell is queued or running""",
        ("name=mine", "suite=methods --watch"), "", ("--watch",),
    ),
    "cancel": Command(
        _late("sweep", "cancel_sweep"), "[name=NAME | suite=NAME | key=value ...]",
        "stop what that sweep started, here or on SLURM, and nothing else", SWEEP, ("name=mine", "suite=methods results=elsewhere"),
    ),
    "report": Command(
        _late("report", "write_report"), "[name=NAME | suite=NAME] [--format json]", "tables, figures and page of a sweep",
        f"""{SWEEP}
  --format json          the same numbers for machines, unrounded, on standard output, instead of the page
  --compare SIDE SIDE    what changed between two suites, commits (methods@HEAD~1) or parquet files, and whether it is within noise""",
        ("name=mine", "--compare methods@HEAD~1 methods"), "", ("--format", "--compare"),
    ),
    "export": Command(
        _late("report", "export_cell"), "RUN [to=DIR]", "a run folder's trained generator, for transformers, and its deployment dataset",
        """\
  RUN                    a folder under results/runs/
  to=DIR                 where to (default: export/ in it)""",
        ("results/runs/language_de.dpg.s0.0123456789", "results/runs/language_de.dpg.s0.0123456789 to=mine"),
    ),
    "list": Command(
        _late("inspect", "list_plugins"), "[plugins=DIR]", "every method, task, scale and suite",
        "  plugins=DIR            with those in a folder of yours", ("", "plugins=mine"),
    ),
    "new": Command(
        _late("plugins", "new_plugin"), "task|method NAME [plugins=DIR]", "the two files of a task or a method of your own, to change",
        """\
  task NAME              a task in DIR/tasks/NAME.py and DIR/configs/task/NAME.yaml; nothing is overwritten
  method NAME            a method, likewise
  plugins=DIR            the folder of your own plug-ins (default: mine)""",
        ("task opening", "method parrot plugins=elsewhere"),
    ),
    "check metagrad": Command(
        _late("inspect", "check_metagradients"), "[key=value ...]", "can a cell's rewards be trusted? Measured, in words",
        f"""{CELLS}
  directions=8           for finite differences: how many
  subsets=32             for the linear datamodelling score: how many halves of the texts
{TEXT}""",
        ("task=language lang=de", "scale=small task=l2_norm directions=4 subsets=8"), "they cannot be trusted",
    ),
    "check estimator": Command(
        _late("inspect", "check_estimators"), "[key=value ...] [--format json]",
        "is a text's reward what leaving it out would do, and how much of a policy gradient is signal?",
        f"""{CELLS}
  batches=12             independent batches of the cell's own size, each a policy gradient of every method; 8 for three methods or more
  texts=48               how many texts the target is trained without, one at a time; 32 for three methods or more
  --format json          the same numbers for machines; they are kept beside the figure in either case
{TEXT}""",
        ("task=l2_norm method=dpg,naive,influence", "task=language scale.generator=mine/generator batches=6 texts=24"),
        "a reward says little about what leaving a text out would do", ("--format",),
    ),
    "check plugin": Command(
        _late("plugins", "check_plugins"), "plugins=DIR [task=NAME] [method=NAME]",
        "does a plug-in keep its contract? A line for each question",
        """\
  plugins=DIR            the folder of your own plug-ins; all of them, unless some are named
  task=NAME              a task: its gradient, determinism, measures, two steps of every method
  method=NAME            a method: two steps of it on every task""",
        ("plugins=mine", "plugins=mine task=opening"), "an answer is wrong",
    ),
}  # fmt: skip
"""A command is an entry: its name, of one word or two, and what runs and describes it."""

USAGE = f"""\
usage: python -m dpgbench COMMAND [argument ...]

{{commands}}

`COMMAND --help` has its arguments, with examples; `--version` says which dpgbench this is. What most commands take:
{CELLS}
{TEXT}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if a cell failed, 2 on bad input (one line on standard error), 130 on an interrupt.

    141, as of what SIGPIPE ends, if whoever read standard output is gone.
    """
    if arguments is None:
        _insist_on_utf8()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _answer(words)
        if code == INTERRUPTED and arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C would only break off how Python ends
        sys.stdout.flush()  # a reader that has gone is heard of here, and not while the interpreter ends
        return code
    except BrokenPipeError:
        return reader_gone()


def _answer(words: list[str]) -> int:
    try:
        return _command(words) if distributed.rank() == 0 else _late("sweep", "follow")(words)
    except UserError as error:
        said = str(error)
    except ModuleNotFoundError as missing:
        if (missing.name or "dpgbench").startswith("dpgbench"):
            raise
        print(_not_installed(missing.name), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FIXES:
            raise
        said = f"{error.filename or 'results'}: {error.strerror}; {FIXES[error.errno]}"
    except KeyboardInterrupt:
        print("dpgbench: interrupted; finished cells are kept, the same command goes on with the rest", file=sys.stderr)
        return INTERRUPTED
    print(f"dpgbench: {inert(said)}", file=sys.stderr)
    return 2


def _insist_on_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale says otherwise: names of files and what libraries read and print, all of it."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def _command(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*" ".join(words[1:]).split(), "--help"]  # a command of two words may come in quotes
    if words[:1] in ([], ["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {command.says}" for name, command in COMMANDS.items())), end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"dpgbench {__version__}")
        return 0
    name, words = _named(words)
    command = COMMANDS[name]
    if {"-h", "--help"} & set(words):
        print(command.help(name))
        return 0
    for word in words:
        if word.startswith("-") and ("--format" if word.startswith("--format=") else word) not in command.flags:
            raise UserError(f"{name} {word}: no such option; {did_you_mean(word, [*command.flags, '--help'])}")
    return command.run(words)


def _named(words: list[str]) -> tuple[str, list[str]]:
    """The command that the first words name, and the words after it. Raises UserError if they name none."""
    for name in COMMANDS:
        if words[: len(name.split())] == name.split():
            return name, words[len(name.split()) :]
    kinds = [name.split()[1] for name in COMMANDS if name.split()[0] == words[0] and " " in name]
    if not kinds:
        raise UserError(f"{words[0]!r} is not a command; {did_you_mean(words[0], {name.split()[0] for name in COMMANDS})}")
    given = words[1] if len(words) > 1 else "nothing"
    if given in ("-h", "--help"):
        return f"{words[0]} {kinds[0]}", words[1:]
    raise UserError(f"{words[0]} {given}: not a command; write `{words[0]} {kinds[0]}`; {did_you_mean(given, kinds)}")
