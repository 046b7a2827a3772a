"""The program as a user meets it: quick answers, exit codes, plug-ins, resuming, and nothing read as done that is not."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from conftest import FINISHED, METHOD_FILE, ROOT, SMALL, TINY

import dpgbench as dpgbench_package
from dpgbench import cli, config

HEAVY = {"torch", "transformers", "trl", "datasets", "pandas", "scipy", "matplotlib", "seaborn"}
QUICK = [
    ["list"],
    ["sweep", "task=all", "method=all", "--dry-run"],
    ["run", "task=lenguage"],
    ["run", "steps=0"],
    ["run", "lang=xx"],
    ["run", "method=active_inheritance", "n=0"],
    ["sweep", "task=sixseven", "method=active_inheritance", "criterion=score", "--dry-run"],
    ["status"],
]


def test_quick_commands_import_nothing_heavy():
    """A second is the difference between asking and waiting: torch alone takes two. The first command that does is named."""
    code = (
        "import sys; from dpgbench.cli import main\n"
        f"for words in {QUICK!r}:\n"
        "    main(words)\n"
        f"    assert not {HEAVY!r} & set(sys.modules), (words, {HEAVY!r} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [["run", "task=lenguage"], ["fly"], ["list", "task=x"], ["report", "suite=never"], ["run", "spec=none.yaml"]]
)
def test_bad_input_is_2_and_one_line(dpgbench, words):
    done = dpgbench(*words)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("dpgbench: ") and done.err.count("\n") == 1


def test_the_process_exits_with_the_code(program):
    assert program("fly").code == 2 and program("--version").code == 0


def test_every_command_is_there_when_it_is_asked_for():
    """They are named by module and function, and imported late."""
    named = re.findall(r'_late\("(\w+)", "(\w+)"\)', Path(cli.__file__).read_text(encoding="utf-8"))
    assert len(named) == len(cli.COMMANDS) + 1  # and what torchrun's other processes do
    assert all(callable(getattr(importlib.import_module(f"dpgbench.cli.{module}"), function)) for module, function in named)


def test_listing_imports_neither_hydra_nor_what_runs_cells(imports_of):
    loaded = imports_of("list")
    assert "dpgbench.cli.inspect" in loaded
    assert not loaded & {"hydra", "omegaconf", "numpy", "torch", "dpgbench.cli.sweep", "dpgbench.launch.slurm"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_of_its_own(capsys, name):
    """By either way of asking, without doing anything; its two examples are understood; what it does not know is named."""
    assert cli.main([*name.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert cli.main(["help", *name.split()]) == 0 and capsys.readouterr().out == told
    assert told.startswith(f"usage: python -m dpgbench {name} ") and "exit codes:" in told and "examples:" in told
    assert all(flag in told for flag in cli.COMMANDS[name].flags) and len(max(told.splitlines(), key=len)) <= 140
    assert cli.main([*name.split(), "--dryrun"]) == 2
    assert f"{name} --dryrun: no such option; " in capsys.readouterr().err
    assert cli.main(["--help"]) == 0 and f"  {name} " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "example"), [(name, line) for name, command in cli.COMMANDS.items() for line in command.examples])
def test_examples_of_the_help_are_understood(name, example):
    """To the last word, but nothing is run."""
    words = [word for word in example.split() if "=" in word and not word.startswith("to=") and name != "export"]
    if name in ("run", "sweep", "check metagrad"):
        config.read([word for word in words if not word.startswith(("directions=", "subsets="))], sweep=name == "sweep")
    config.parse(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["swep"], "did you mean 'sweep'?"),
        (["run", "--dryrun"], "run --dryrun: no such option; did you mean '--dry-run'?"),
        (["list", "--watch"], "list --watch: no such option"),
        (["check", "metgrad"], "did you mean 'metagrad'?"),
        (["help", "reprot"], "did you mean 'report'?"),
        (["run", "taks=language"], "did you mean task?"),
        (["status", "name=../../etc"], "names files and a folder"),
        (["report", "results=a,b"], "one value is wanted"),
        (["export", "nowhere", "to=a,b"], "one value is wanted"),
        (["run", "spec=a,b"], "one value is wanted"),
        (["run", "spec=README.md"], "spec=README.md: cannot be read"),
        (["run", "--dry-run=true"], "did you mean '--dry-run'?"),
        (["run", "task", "=", "l2_norm"], "'task' is not understood; arguments are key=value without spaces"),
        (["status", "results=" + "x" * 300], "File name too long"),
        (["check", "metagrad", "subsets=8,9"], "subsets=8,9: a correlation needs 3 or more"),
    ],
)
def test_what_is_misspelt_or_misplaced_is_named(capsys, words, says):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"dpgbench {dpgbench_package.__version__}\n"


@pytest.mark.parametrize("word", ["task=\x1b[2J\x07x", "task=[red]x", "task=a\nb", "name=\u202egpj", "seed=" + "9" * 5000, "x=[bold]"])
def test_what_was_typed_is_shown_and_not_acted_on(capsys, word):
    """No control characters, no markup, no line breaks, no pages of it."""
    assert cli.main(["run", word]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable() and len(said) < 1200
    assert "[red]" in said or "[red]" not in word


def test_folders_with_markup_in_their_names_are_shown_as_they_are(capsys, tmp_path):
    words = ["task=l2_norm", "method=similarity,base", f"results={tmp_path}/[red]x"]
    assert cli.main(["sweep", *words, "--dry-run"]) == 0 and f"{tmp_path}/[red]x/runs" in capsys.readouterr().out
    assert cli.main(["status", f"results={tmp_path}/[red]x"]) == 0 and f"no runs in {tmp_path}/[red]x/runs" in capsys.readouterr().out


def test_a_failure_that_says_rude_things_is_shown_inertly(capsys, tmp_path):
    """Of error.txt the last line, and where the rest is."""
    (cell,) = config.read(["task=l2_norm", "method=base"], sweep=True).cells
    folder = tmp_path / "runs" / cell.spec.folder
    folder.mkdir(parents=True)
    (folder / "error.txt").write_text("Traceback\nValueError: [red]\x1b[2J[/nothing]\n")
    assert cli.main(["sweep", "task=l2_norm", "method=base", f"results={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert "ValueError: [red]\\x1b[2J[/nothing]" in out and f"({folder}/error.txt has all of it)" in out and "\x1b" not in out
    assert cli.main(["status", f"results={tmp_path}"]) == 0 and "[red]\\x1b[2J[/nothing]" in capsys.readouterr().out


def test_the_same_bad_command_names_the_same_option():
    """The first one, whatever the order of sets is today."""
    code = "import sys; from dpgbench.cli import main; sys.exit(main(['run', 'zzz=1', 'yyy=2', 'xxx=3', 'www=4']))"
    for seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "zzz=1: no chosen task" in done.stderr


MUCH = "report suite=methods --format json"  # more than a pipe holds


@pytest.mark.parametrize("words", ["list", pytest.param(MUCH, marks=pytest.mark.slow), "run --help"])
def test_a_reader_that_leaves_hears_nothing_more(words):
    """`| head -1`: no traceback, no "Exception ignored", and the exit code of what SIGPIPE ends if anything was left to say."""
    command = f"{sys.executable} -m dpgbench {words} | head -c 10 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.returncode in (0, 141)


@pytest.mark.parametrize("words", ["list", "--help", pytest.param(MUCH, marks=pytest.mark.slow)])
def test_a_reader_that_left_before_anything_was_said(words):
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "dpgbench", *words.split()], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, timeout=60)
    os.close(writes)
    assert done.returncode == 141 and done.stderr == b""


def test_threads_of_the_environment_are_not_followed_and_that_is_said(capsys, monkeypatch, tmp_path):
    """Once, before cells run; nothing where it says the same."""
    words = ["sweep", "task=l2_norm", "method=base", "seed=0,1", "deployment_texts=8", f"results={tmp_path}"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert cli.main([*words, "--dry-run"]) == 0 and capsys.readouterr().err == ""
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "OMP_NUM_THREADS=4 is not followed" in said and "scale.threads=1" in said and said.count("\n") == 1
    assert cli.main(words) == 0 and capsys.readouterr().err == ""  # nothing is left to run
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main([*words[:3], "seed=2", *words[4:]]) == 0 and capsys.readouterr().err == ""


def test_list_names_every_plugin_and_the_broken_one(dpgbench, plugins):
    done = dpgbench("list", f"plugins={plugins}")
    for word in (
        "dpg",
        "active_inheritance",
        "base",
        "language",
        "sixseven",
        "l2_norm",
        "parrot",
        "opening",
        "scale=tiny",
        "suite=quickstart",
    ):
        assert re.search(rf"^{word}\s", done.out, re.MULTILINE), word
    assert "broken.py has a syntax error in line 1" in done.out


def test_a_users_plugins_are_swept_and_reported(dpgbench, plugins, tmp_path):
    """A new file and its YAML in a folder of the user's: found, run, reported; no file of dpgbench changes."""
    words = [
        "task=opening",
        "method=parrot,base",
        "seed=0,1",
        "deployment_texts=8",
        f"plugins={plugins}",
        f"results={tmp_path / 'r'}",
        "name=mine",
    ]
    done = dpgbench("sweep", *words)
    assert done.code == 0, done.err
    spec = next((tmp_path / "r" / "runs").glob("opening.parrot.s0.*")) / "spec.yaml"
    assert "version: 3" in spec.read_text()
    done = dpgbench("report", "name=mine", f"results={tmp_path / 'r'}")
    assert done.code == 0, done.err
    page = (tmp_path / "r" / "mine" / "index.html").read_text()
    assert "parrot" in page and "the cat sleeps." in page
    assert "broken" in dpgbench("run", "method=broken", f"plugins={plugins}").err


@pytest.mark.slow
def test_a_run_alone_equals_the_cell_in_a_sweep(dpgbench, finished, tmp_path):
    """Byte for byte, given as words or as its spec, whatever ran before it; and the second time there is nothing left to do."""
    (cell,) = (finished / "runs").glob("language_de.dpg.s1.*")
    metrics = (cell / "metrics.jsonl").read_bytes()
    for name, words in {"one": ["task=language", "method=dpg", "seed=1", *TINY], "replay": [f"spec={cell / 'spec.yaml'}"]}.items():
        done = dpgbench("run", *words, f"results={tmp_path / name}")
        assert done.code == 0, done.err
        assert (tmp_path / name / "runs" / cell.name / "metrics.jsonl").read_bytes() == metrics
    assert "8 of 8 cells are done already" in dpgbench("sweep", *FINISHED, f"results={finished}").out


@pytest.mark.slow
def test_a_run_alone_equals_the_cell_in_a_sweep_with_workers(program, tmp_path):
    """Byte for byte, whatever runs beside it; and the second time there is nothing left to do."""
    sweep = ["task=language,sixseven", "method=dpg,active_inheritance", "n=2", *SMALL]
    workers = ["launcher=local", "launcher.workers=2"]
    done = program("sweep", *sweep, *workers, f"results={tmp_path / 'many'}")
    assert done.code == 0, done.err + done.out
    alone = program("run", "task=sixseven", "method=dpg", *SMALL, f"results={tmp_path / 'one'}")
    assert alone.code == 0, alone.err
    (cell,) = (tmp_path / "one" / "runs").glob("sixseven.*")
    assert (cell / "metrics.jsonl").read_bytes() == (tmp_path / "many" / "runs" / cell.name / "metrics.jsonl").read_bytes()
    assert "4 of 4 cells are done already" in program("sweep", *sweep, *workers, f"results={tmp_path / 'many'}").out


@pytest.mark.slow
def test_collecting_anew_never_loses_a_finished_cell(dpgbench, finished):
    """After a sweep of other seeds, or with run folders gone, the parquet stays, it is said why, and its tables come out alike."""
    words = ["task=l2_norm", "method=base", "seed=0,1", *TINY, f"results={finished}"]
    assert dpgbench("report", *words).code == 0
    parquet, table = finished / "sweep.parquet", finished / "sweep" / "tables" / "l2_norm.md"
    before, told = parquet.read_bytes(), table.read_bytes()
    added = ["seed=2" if word == "seed=0,1" else word for word in words]
    assert dpgbench("sweep", *added).code == 0
    done = dpgbench("report", f"results={finished}", "name=sweep")
    assert (
        done.code == 0 and "has 2 finished cells that this line, or the last sweep, does not name" in done.out and "seed=0,1,2" in done.out
    )
    assert parquet.read_bytes() == before
    shutil.rmtree(next((finished / "runs").glob("l2_norm.base.s1.*")))
    assert dpgbench("report", *words).code == 0 and table.read_bytes() == told
    pandas.testing.assert_frame_equal(pandas.read_parquet(parquet), pandas.read_parquet(io.BytesIO(before)))
    three = ["seed=0,1,2" if word == "seed=0,1" else word for word in words]
    assert dpgbench("report", *three).code == 0
    frame = pandas.read_parquet(parquet)
    assert sorted(frame.seed[frame.status == "done"]) == [0, 1, 2]  # the second from the parquet before, the others from their folders
    shutil.rmtree(finished / "runs")
    told = table.read_bytes()
    assert dpgbench("report", *three).code == 0 and table.read_bytes() == told


@pytest.mark.slow
def test_a_damaged_parquet_is_kept_aside(dpgbench, finished):
    """It may have had cells that are nowhere else; what there are run folders of is collected anew."""
    words = ["task=l2_norm", "method=base", "seed=0,1", *TINY, f"results={finished}", "--format", "json"]
    assert dpgbench("report", *words).code == 0
    parquet = finished / "sweep.parquet"
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[: len(whole) // 2])
    done = dpgbench("report", *words)
    assert done.code == 0 and "sweep.parquet: cannot be read; kept as " in done.err and len(done.err.splitlines()) == 1
    assert parquet.with_name("sweep.parquet.damaged").read_bytes() == whole[: len(whole) // 2] and parquet.read_bytes() == whole


def test_a_failing_cell_does_not_stop_the_others(dpgbench, plugins, tmp_path):
    """Its reason is kept and shown; exit code 1."""
    (plugins / "methods" / "bad.py").write_text(
        '"""Raises."""\nfrom dpgbench.api import Method\n\n\nclass Bad(Method):\n    def run(self, bench):\n        yield 1 / 0\n'
    )
    (plugins / "configs" / "method" / "bad.yaml").write_text("name: bad\n")
    words = ["task=l2_norm", "method=bad,base", "deployment_texts=8", f"plugins={plugins}", f"results={tmp_path / 'r'}"]
    done = dpgbench("sweep", *words)
    assert done.code == 1
    why = r"UserError: bad.py, line 7: run raised ZeroDivisionError: division by zero"
    assert re.search(rf"failed \S+: {why} \(\S+/error.txt has all of it\)", done.out) and "done   l2_norm base" in done.out
    assert "started l2_norm base seed 0" in done.out and "running l2_norm base seed 0  snapshot 0" in done.out
    status = dpgbench("status", f"results={tmp_path / 'r'}").out
    assert re.search(r"l2_norm\.bad\.\S+\s+failed\s+UserError: bad.py", status)
    (error,) = (tmp_path / "r" / "runs").glob("l2_norm.bad.*/error.txt")
    assert error.read_text().startswith("Traceback") and "yield 1 / 0" in error.read_text() and re.search(rf"\n{why}\n$", error.read_text())


def test_a_sweep_is_known_by_its_name_with_plugins_beside_it_and_another_is_not(dpgbench, plugins, tmp_path):
    """`plugins=` says where they are, and nothing about which cells; a name that was never run is refused, with the nearest that was."""
    where = [f"plugins={plugins}", f"results={tmp_path / 'r'}"]
    assert dpgbench("sweep", "task=l2_norm", "method=base", "deployment_texts=8", "name=trial", *where).code == 0
    for command in ("status", "report"):
        told = dpgbench(command, "name=trial", *where)
        assert told.code == 0 and ("l2_norm.base" in told.out or "index.html" in told.out), told
    for command in ("status", "cancel"):
        told = dpgbench(command, "name=trail", *where)
        assert told.code == 2 and told.err.count("\n") == 1
        assert "name=trail: no sweep of this name was run with results=" in told.err and "did you mean 'trial'?" in told.err
    saved = tmp_path / "r" / "runs" / "trial.sweep.json"
    saved.write_text('["name=trial"]')  # as after a sweep of nothing but a name, whose words are then those of `status`
    assert dpgbench("status", "name=trial", where[1]).code == 0
    assert "name=trail: nothing to report" in dpgbench("report", "name=trail", *where).err
    spec = next((tmp_path / "r" / "runs").glob("l2_norm.*/spec.yaml"))
    spec.write_text(spec.read_text().replace("name: l2_norm", "name: mine"))
    assert "plug-in of your own, say where with plugins=DIR" in dpgbench("run", f"spec={spec}", where[1]).err


def test_an_interrupted_sweep_keeps_what_is_done(dpgbench, plugins, tmp_path):
    """As Ctrl-C in the middle of the second cell: 130, the first is done, the second interrupted."""
    text = METHOD_FILE.replace("Parrot", "Tired").replace("        yield", "        raise KeyboardInterrupt\n        yield")
    (plugins / "methods" / "tired.py").write_text(text)
    (plugins / "configs" / "method" / "tired.yaml").write_text("name: tired\n")
    words = ["task=l2_norm", "method=base,tired", "deployment_texts=8", f"plugins={plugins}", f"results={tmp_path / 'r'}"]
    done = dpgbench("sweep", *words)
    assert done.code == 130 and "interrupted; finished cells are kept" in done.err
    again = dpgbench("sweep", *words, "--dry-run").out
    assert re.search(r"l2_norm\.base\.\S+\s+done", again) and not re.search(r"l2_norm\.tired\.\S+\s+(done|failed)", again)


@pytest.mark.slow
def test_an_interrupt_keeps_finished_cells_and_the_rest_goes_on(dpgbench, tmp_path):
    """Ctrl-C, then the same command: the first cell is not run again."""
    words = ["task=l2_norm", "method=base,dpg", *SMALL[1:], "steps=500", f"results={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpgbench", "sweep", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 90
    while time.time() < deadline and not any('"step"' in path.read_text() for path in tmp_path.glob("runs/l2_norm.dpg*/metrics.jsonl")):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    status = dpgbench("status", f"results={tmp_path}").out
    assert re.search(r"l2_norm\.base\.\S+\s+done", status) and re.search(r"l2_norm\.dpg\.\S+\s+interrupted\s+step \d+", status)
    assert re.search(r"l2_norm\.base\.\S+\s+done", dpgbench("sweep", *words, "--dry-run").out)


def test_damage_is_named_and_never_read_as_done(dpgbench, finished):
    words = ["task=l2_norm", "method=base", *TINY, f"results={finished}"]
    (cell,) = (finished / "runs").glob("l2_norm.base.s0.*")
    result = cell / "result.json"
    whole = result.read_text()
    for content, says in (("", "not valid JSON"), (whole[: len(whole) // 2], "not valid JSON"), ("{}", "another version"),
                          (json.dumps({**json.loads(whole), "hash": "0" * 10}), "belongs to another cell")):  # fmt: skip
        result.write_text(content)
        for command in ("run", "report"):
            done = dpgbench(command, *words)
            assert done.code == 2 and says in done.err and "delete the folder" in done.err and "Traceback" not in done.err
    result.write_text(whole)
    (cell / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has 0 whole lines" in dpgbench("run", *words).err


def test_results_that_cannot_be_written_stop_before_computing(dpgbench, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "results", "/proc/nothing"):
        done = dpgbench("run", f"results={folder}")
        assert done.code == 2 and "cannot write there" in done.err and done.err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_clear_line(dpgbench, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system here")
    try:
        done = dpgbench("run", f"results={disk}")
        assert done.code == 2 and "No space left" in done.err and "free some space" in done.err
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_processes_do_not_share_a_cell(tmp_path):
    """The second owner is refused by name; the lock goes with its process."""
    from dpgbench.core.errors import UserError
    from dpgbench.store.run_folder import RunFolder

    folder = RunFolder(tmp_path / "task.method.s0.0123456789")
    with folder.owned(), pytest.raises(UserError, match="another process works on this cell"), RunFolder(folder.path).owned():
        pass
    with folder.owned():
        assert folder.state().name == "running"
    assert folder.state().name == "missing"
