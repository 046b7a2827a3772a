"""What strangers wrote: their YAML and stored files are data or refused in one line, their texts are shown and never act."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from conftest import ROOT, TINY
from frames import COMMAND, small_frame
from stored import WORDS, write_cell

from dpgbench.core.text import json_text
from dpgbench.report.table import FIT, Cell, Column, Row, Table, escape, latex, tex, text_cell
from dpgbench.store.lock import Owner

SECRET = "hostile-secret-value"

# ---- a stranger's YAML

YAMLS = {
    "tag": "x: !!python/object/apply:os.system ['touch {there}/acted']",
    "tag of a name": "x: !!python/name:os.system ''",
    "environment": "x: ${oc.env:DPGBENCH_SECRET}",
    "environment in an escape": 'x: "\\x24{oc.env:DPGBENCH_SECRET}"',
    "environment in a label": "label: a_${oc.env:DPGBENCH_SECRET}",
    "environment, decoded": "x: ${oc.decode:${oc.env:DPGBENCH_SECRET}}",
    "a target": "x: {_target_: os.system, command: 'touch {there}/acted'}",
    "hydra's callbacks": "# @package _global_\nmethod: {name: base}\nhydra: {callbacks: {x: {command: y}}}",
    "a launcher's commands": "# @package _global_\nmethod: {name: base}\nlauncher: {setup: [touch acted]}",
    "a file above": "defaults: [../../../outside, _self_]",
    "a file of the root": "defaults: [/etc/outside, _self_]",
    "a folder of another": "defaults: [{/task: language}, _self_]",
    "defaults that are none": "defaults: 3",
    "a label above": "label: ../../x",
    "a label of the root": "label: /etc/x",
    "a label that is a list": "label: [a]",
    "a file that is a number": "file: 3",
    "a file that is a folder": "file: /etc",
    "a policy that is a word": "policy: hello",
    "of itself": "x: &a [*a]",
    "nine times nine times": "a: &a ["
    + "x," * 9
    + "]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
    "deep": "x: " + "[" * 3000 + "]" * 3000,
    "a number without end": "x: " + "9" * 5000,
    "no number": "x: !!int abc",
    "no date": "x: 2020-13-45",
    "no set": "x: !!set [a]",
    "control characters": "x: \x1b[2J",
    "a tab": "\tx: 1",
    "two": "---\nname: dpg",
    "twice": "x: 1\nx: 2",
}


def plugin_folder(there: Path, kind: str, text: str | bytes) -> Path:
    folder = there / "own" / "configs" / kind
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return there / "own"


@pytest.mark.parametrize("case", YAMLS)
def test_a_plugins_yaml_is_data_or_refused(dpgbench, tmp_path, monkeypatch, case):
    monkeypatch.setenv("DPGBENCH_SECRET", SECRET)
    (tmp_path / "outside.yaml").write_text("outside: yes\n")
    own = plugin_folder(
        tmp_path, "method", ("" if "@package" in YAMLS[case] else "name: base\n") + YAMLS[case].replace("{there}", str(tmp_path)) + "\n"
    )
    done = dpgbench("run", "task=l2_norm", "method=evil", "--dry-run", f"plugins={own}", f"results={tmp_path / 'r'}")
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("dpgbench: "), done
    assert done.err[:-1].isprintable() and SECRET not in done.err + done.out
    assert dpgbench("list", f"plugins={own}").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.yaml", "own"]


BROKEN = {
    "empty": b"",
    "list": b"- a\n",
    "scalar": b"hi\n",
    "tag": b"a: !!python/name:os.system ''\n",
    "latin": b"a: \xe4\n",
    "no lines": b"grid: 3\n",
    "odd quotes": b'grid: ["task=\'a"]\n',
    "words": b"grid: [task]\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_suite_that_is_none_is_one_line_and_does_not_stop_a_list(dpgbench, tmp_path, case):
    own = plugin_folder(tmp_path, "suite", BROKEN[case])
    done = dpgbench("sweep", "suite=evil", "--dry-run", f"plugins={own}", f"results={tmp_path / 'r'}")
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "r").exists()
    assert dpgbench("list", f"plugins={own}").code == 0


@pytest.mark.parametrize(
    "word",
    [
        "name=../../x",
        "name=/x",
        "suite=../x",
        "task=../../x",
        "method=/etc/x",
        "scale=../x",
        "launcher=../x",
        "task.label=../../x",
        "method.label=/x",
        "name=..",
        "name=a\\b",
        "name=runs",
    ],
)
@pytest.mark.parametrize("command", ["sweep", "status", "report"])
def test_no_name_leads_out_of_the_results(dpgbench, tmp_path, command, word):
    words = [*(other for other in WORDS if other.partition("=")[0] != word.partition("=")[0]), word]
    done = dpgbench(command, *words, f"results={tmp_path / 'r' / 'r'}", *["--dry-run"] * (command == "sweep"))
    assert done.code == 2 and done.err.count("\n") == 1 and not list(tmp_path.rglob("*x*"))


# ---- stored files

SPECS = {
    "not there": None,
    "empty": b"",
    "tag": b"task: !!python/object/apply:os.system [ls]\n",
    "latin": b"\xe4",
    "a list": b"[1]",
    "task is a word": {"task": "x"},
    "no training": {"training": None},
    "no name": {"method": {}},
    "seed is a word": {"seed": "x"},
    "a label above": {"task": {"label": "../../x"}},
    "a file without its digest": {"task": {"file": "/etc/passwd"}},
    "a corpus without its digest": {"scale": {"corpus": "/etc/passwd.txt"}},
    "a folder without its digest": {"scale": {"target": "/etc"}},
    "the environment": {"task": {"x": "${oc.env:HOME}"}},
    "a launcher": {"launcher": {"setup": ["ls"]}},
    "budget is a list": {"budget": [1]},
    "betas is a word": {"training": {"betas": "x"}},
    "corpus is null": {"scale": {"corpus": None}},
}


@pytest.mark.parametrize("case", SPECS)
def test_a_strangers_spec_is_refused_in_one_line(dpgbench, tmp_path, case):
    import yaml

    path, content = tmp_path / "spec.yaml", SPECS[case]
    if isinstance(content, dict):
        stored = yaml.safe_load((write_cell(tmp_path / "r") / "spec.yaml").read_text())
        for key, value in content.items():
            merge = isinstance(value, dict) and value and isinstance(stored.get(key), dict)
            stored[key] = stored[key] | value if merge else value
        content = yaml.safe_dump(stored).encode()
    if content is not None:
        path.write_bytes(content)
    done = dpgbench("run", f"spec={path}", "--dry-run", f"results={tmp_path / 'new'}")
    assert done.code == 2 and done.err.count("\n") == 1 and not (tmp_path / "new").exists()


CONTENTS = {
    "empty": b"",
    "bytes": b"\xe4\xff\0",
    "number": b"3",
    "deep": b"[" * 100_000,
    "huge": b'{"a":' + b"9" * 5000 + b"}",
    "object": b"{}",
    "lines": b'3\n"step"\n{"step": []}\n',
    "a folder": None,
}
FILES = ("result.json", "spec.yaml", "env.json", "metrics.jsonl", "job.json", "lock.1", "mine.sweep.json", "mine.ab.running.json")


@pytest.mark.parametrize("name", FILES)
def test_stored_files_that_are_none_are_named(dpgbench, tmp_path, name):
    """Whatever is in them, status, export, report and cancel end with a code of theirs and at most one line of error."""
    for case, content in CONTENTS.items():
        results = tmp_path / case
        folder = write_cell(results)
        path = (folder.parent if name.startswith("mine") else folder) / name
        if name in ("job.json", "lock.1"):
            (folder / "result.json").unlink()
        path.unlink(missing_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)
        place = f"results={results}"
        for command in (["status", place], ["status", "name=mine", place], ["export", str(folder)], ["cancel", *WORDS, "name=mine", place]):
            done = dpgbench(*command)
            assert done.code in (0, 2) and done.err.count("\n") <= 1, (case, command, done)


@pytest.mark.parametrize(
    "change", [{"snapshots": [{}]}, {"snapshots": 3}, {"headline": []}, {"texts": [1]}, {"higher_is_better": "x"}, {"snapshots": []}]
)
def test_a_result_of_another_shape_is_damaged(dpgbench, tmp_path, change):
    folder = write_cell(tmp_path)
    stored = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(stored | change))
    for command in (["export", str(folder)], ["report", *WORDS, f"results={tmp_path}"]):
        done = dpgbench(*command)
        assert done.code == 2 and done.err.count("\n") == 1 and "result.json has" in done.err


def test_what_is_whole_is_taken(dpgbench, tmp_path):
    """The cell of these tests is one; otherwise they would show nothing."""
    folder = write_cell(tmp_path)
    assert dpgbench("run", f"spec={folder / 'spec.yaml'}", "--dry-run", f"results={tmp_path / 'new'}").code == 0
    assert dpgbench("export", str(folder)).code == 0
    assert dpgbench("report", *WORDS, f"results={tmp_path}", "--format", "json").code == 0


def test_plugins_that_came_with_results_do_not_run_because_a_sweep_is_named(dpgbench, tmp_path):
    own = plugin_folder(tmp_path / "r", "method", "name: evil\n")
    (own / "methods").mkdir()
    (own / "methods" / "evil.py").write_text(f"open({str(tmp_path / 'acted')!r}, 'w')\n")
    (tmp_path / "r" / "runs").mkdir()
    (tmp_path / "r" / "runs" / "mine.sweep.json").write_text(json.dumps(["method=evil", f"plugins={own}"]))
    for command in ("status", "report", "cancel"):
        done = dpgbench(command, "name=mine", f"results={tmp_path / 'r'}")
        assert done.code == 2 and "came with the results" in done.err and not (tmp_path / "acted").exists()


@pytest.mark.parametrize(
    "change", [{"pid": -1, "started": None}, {"pid": 0}, {"pid": "1"}, {"pid": True}, {"started": ""}, {"host": 3}, {"x": 1}]
)
def test_a_signal_goes_to_a_process_and_to_no_group(tmp_path, change):
    """kill(-1) is everybody: a file of another's may not say so."""
    from dataclasses import asdict

    (tmp_path / "owner").write_text(json.dumps(asdict(Owner.me()) | change))
    with pytest.raises(ValueError):
        Owner.read(tmp_path / "owner")


@pytest.mark.parametrize(
    "record", [{"job": "--help"}, {"job": "1;ls"}, {"job": 7}, {"log": "/etc/passwd"}, {"log": "../../../etc/passwd"}, {"sweep": []}]
)
def test_a_jobs_record_names_a_job_and_a_log_of_these_results(tmp_path, record):
    from dpgbench.launch import slurm

    folder = write_cell(tmp_path)
    (folder / "job.json").write_text(json.dumps({"job": "12_3", "sweep": "mine", "log": "/elsewhere/jobs/12_3_log.out"} | record))
    found = slurm.record_of(folder)
    assert found is None if "log" not in record else found["log"] == str(tmp_path / "jobs" / "passwd")


def test_what_jobs_run_is_the_owners_alone(tmp_path, monkeypatch):
    """The pickles that submitit writes and a job loads, with an sbatch that only says it took the job."""
    from dpgbench import config
    from dpgbench.launch import slurm

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 12\n")
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    jobs = tmp_path / "r" / "jobs"
    jobs.mkdir(parents=True)
    jobs.chmod(0o777)
    request = config.read([*WORDS, "launcher=slurm"], sweep=True)
    slurm.submit([request.cells[0].spec], request.launcher, tmp_path / "r", None, "mine", "")
    pickles = list(jobs.glob("*.pkl"))
    assert jobs.stat().st_mode & 0o777 == 0o700 and pickles and all(path.stat().st_mode & 0o777 == 0o600 for path in pickles)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="another user's"):
        slurm.submit([request.cells[0].spec], request.launcher, tmp_path / "r", None, "mine", "")


# ---- texts

TEXTS = {
    "script": "<script>alert(1)</script>",
    "end": "</script></style></title>",
    "attribute": '" onload="alert(1)',
    "quote": "' onclick='a()",
    "link": "[a](javascript:alert(1))",
    "reference": "[a][b] [b]: javascript:x",
    "image": "![a](http://b/c.png)",
    "bars": r"a | b \| c \\| d",
    "bidi": "\u202egnp.exe\u2066",
    "ansi": "\x1b[2J\x9b31m\x07",
    "latex": r"\input{/etc/passwd}\write18{ls}",
    "math": "$x^2$ %comment ~ # &",
    "bracket": "[1cm",
    "star": "*",
    "fence": "```",
    "heading": "# big",
    "template": "{{ 7 * 7 }}{% raw %}",
    "entity": "&lt;b&gt;",
    "comment": "<!-- a",
    "lines": "a\nb\u2028c\rd",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from dpgbench.report import build

    text = " ".join(TEXTS.values())
    frame = small_frame()
    frame["method_label"] = frame["method_label"].replace("dpg", text)
    frame["task_label"], frame["task_description"], frame["texts"] = text, text, json.dumps(list(TEXTS.values()))
    frame["spec"], frame["env"] = f"label: {json.dumps(text)}\n", json.dumps({"device": text})
    frame.loc[frame["status"] != "done", "reason"] = text
    return build(frame, tmp_path_factory.mktemp("page"), suite=text, command=COMMAND, title=text)


def test_nothing_on_the_page_acts(page):
    """Read as a browser does: one script, the page's own, no handler, no address but the page's, and a policy before all that."""
    from html.parser import HTMLParser

    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Reader().feed(page.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in seen]
    assert tags.count("script") == 1 and not {"iframe", "object", "embed", "form", "base", "b-", "img-"} & set(tags)
    policies = [at for at, (tag, given) in enumerate(seen) if given.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0] < tags.index("style") < tags.index("script")
    assert "script-src 'sha256-" in seen[policies[0]][1]["content"] and "default-src 'none'" in seen[policies[0]][1]["content"]
    for tag, given in seen:
        assert not any(name.startswith("on") for name in given), (tag, given)
        for name in ("href", "src"):
            assert name not in given or given[name].startswith(("#", "data:", "tables/")), (tag, given)


@pytest.mark.parametrize("case", TEXTS)
def test_a_table_shows_a_text_as_it_is(case):
    """Markdown: one cell and no markup of its own. LaTeX: no command but those that print a character. JSON: the same text."""
    text = TEXTS[case]
    shown = escape(text)
    assert "<" not in shown and not re.search(r"\][(\[:]", shown) and not re.match(r"(#{1,6}|[-+*])(\s|$)|```", shown)
    assert not re.search(r"(?<!\\)(\\\\)*\|", shown) and (shown.isprintable() or case == "lines")
    written = latex(Table("t", text, text, (Column("a"), Column(text)), (Row((text_cell(text), Cell(text, bold=True))),))).replace(FIT, "")
    commands = {
        "textbackslash",
        "textasciitilde",
        "textasciicircum",
        "textless",
        "textgreater",
        "textbar",
        "begin",
        "end",
        "centering",
        "small",
        "toprule",
        "midrule",
        "bottomrule",
        "textbf",
        "caption",
        "label",
        *("parbox", "raggedright"),
    }
    assert set(re.findall(r"\\([A-Za-z]+)", written)) <= commands
    plain = re.sub(r"\\.|\{[\[\]*]?\}", "", tex(text))
    assert not re.search(r"[$%#&_^~\[\]*\\]", plain) and plain.count("{") == plain.count("}")
    said = json_text({text: [text]})
    assert json.loads(said) == {text: [text]} and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]", said)


def test_half_a_surrogate_pair_is_printed_as_json():
    assert json.loads(json_text("\ud800")) == "\ud800" and json_text("\ud800").isascii()


@pytest.mark.slow
def test_a_cells_files_have_no_token(dpgbench, tmp_path, monkeypatch):
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    assert dpgbench("sweep", *WORDS, f"results={tmp_path}").code == 0 and dpgbench("report", *WORDS, f"results={tmp_path}").code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    parquet = pandas.read_parquet(tmp_path / "sweep.parquet").to_csv()
    assert SECRET not in parquet and os.environ["HF_TOKEN"].startswith(SECRET)


def family(pid: int) -> list[int]:
    """A process and all that it started, as far as they still run."""
    children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return [pid, *(other for child in children for other in family(child))]


def listening(pid: int) -> set[str]:
    """The addresses at which a process waits for connections over a network."""
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(path))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {words[1] for words in lines if words[3] == "0A" and f"socket:[{words[9]}]" in sockets}  # 0A: listening


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc/net/tcp")
def test_a_sweep_opens_no_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)):
        assert listening(os.getpid())  # this is how one would look
    words = ["sweep", "task=l2_norm", "method=dpg", *TINY, "seed=0,1", "launcher=local", "launcher.workers=2", f"results={tmp_path}"]
    command = [sys.executable, "-m", "dpgbench", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    looks, most, seen = 0, 0, set()
    while process.poll() is None:
        with contextlib.suppress(OSError):  # of a process that ends meanwhile
            all_of_it = family(process.pid)
            most, looks = max(most, len(all_of_it)), looks + 1
            seen |= set().union(*map(listening, all_of_it))
        time.sleep(0.2)
    assert process.returncode == 0 and most >= 4 and looks > 5 and not seen
