"""One cell in two processes under torchrun (gloo, CPU): the numbers of one process, one owner of the folder, one fate."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file

from dpgbench import config, launch
from dpgbench.config import validate
from dpgbench.core.errors import UserError
from dpgbench.launch import local, slurm
from dpgbench.launch import together as sharing
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder, read_lines
from dpgbench.worlds.models import load_generator

# Two updates a step, of two forward passes each; the second half of each pass's work is the other process's.
DPG = ["task=language", "method=dpg", *SMALL[1:-1], "steps=3", "snapshots=3", "minibatch=8", "entropy_bonus=0.05", "averaging=0.5"]
PARTS = ["policy.rollout_batch=4", "policy.micro_batch=4"]
OPTIMSYN = ["task=language", "method=optimsyn", *SMALL[1:], "steps=1", "texts=1", *PARTS]
TOKEN = ["task=l2_norm", "method=dpg_token", *SMALL[1:], "steps=2", "minibatch=8", *PARTS]
LORA = ["task=language", "method=dpg", *SMALL[1:], "steps=2", "policy.lora.rank=4", *PARTS]


def cell(*words: str):
    return config.read(list(words), sweep=False).cells[0].spec


def torchrun(*words: object, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The cells in one process."""
    results, folders = tmp_path_factory.mktemp("alone"), {}
    for name, words in {"dpg": [*DPG, *PARTS], "optimsyn": OPTIMSYN, "lora": LORA, "token": TOKEN}.items():
        assert run_cell(cell(*words), results) == "done"
        folders[name] = RunFolder.of(results, cell(*words))
    return folders


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The DPG cell in two processes, by the command line that the guide shows."""
    results = tmp_path_factory.mktemp("together")
    done = torchrun("-m", "dpgbench", "run", *DPG, *PARTS, f"results={results}")
    assert done.returncode == 0, done.stderr[-3000:]
    return RunFolder.of(results, cell(*DPG, *PARTS)), done


def assert_equal_numbers(one: RunFolder, two: RunFolder) -> None:
    steps = [read_lines(folder.path / "rollouts.jsonl") for folder in (one, two)]
    assert len(steps[0]) == len(steps[1]) > 0
    for ours, theirs in zip(*steps, strict=True):
        assert ours["texts"] == theirs["texts"]
        rewards, other = (torch.tensor(line["rewards"], dtype=torch.float64) for line in (ours, theirs))
        assert (rewards - other).abs().max() <= 1e-5 * rewards.abs().max()
    for ours, theirs in zip(*(read_lines(folder.path / "metrics.jsonl") for folder in (one, two)), strict=True):
        for name in ("step", "snapshot", "flops", "flops_by_phase", "tokens_generated", "tokens_trained", "completion_tokens"):
            assert ours.get(name) == theirs.get(name), name
        for name in {"gradient_norm", "phi"} & set(ours):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    if (one.path / "generator.safetensors").exists():
        start = {name: weight.detach() for name, weight in load_generator(one.spec.scale).model.named_parameters()}
        ours, theirs = (load_file(folder.path / "generator.safetensors") for folder in (one, two))
        ours = {name: weight for name, weight in ours.items() if "lora_A" not in name}  # of an adapter, the factor that starts at zero
        moved, apart = (sum(float((ours[name] - others.get(name, 0)).square().sum()) for name in ours) ** 0.5 for others in (start, theirs))
        assert apart < 0.02 * moved  # Adam makes steps of rounding noise where a gradient is zero, as a key's bias has it


@pytest.mark.slow
def test_two_processes_do_what_one_does(alone, together):
    """Three steps of DPG: the same texts, rewards to 1e-5, the same account, weights and deployment texts; one folder, written once."""
    folder, done = together
    assert_equal_numbers(alone["dpg"], folder)
    assert folder.result()["texts"] == alone["dpg"].result()["texts"]
    assert {path.name for path in folder.path.iterdir()} == {path.name for path in alone["dpg"].path.iterdir()}
    assert done.stdout.count("done") == 1 and done.stdout.count("results in") == 1


STOP_AND_GO_ON = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_process_group import DPG, LORA, OPTIMSYN, PARTS, TOKEN, cell
from dpgbench.bench import distributed
from dpgbench.run.cell import run_cell

def stop(line):
    if line.get("step") == 2 and not line.get("resumed"):
        os.kill(os.getpid(), signal.SIGTERM)  # in the first process alone: the other one has to hear of it

group, results = distributed.start(), Path(sys.argv[1])
how = {"checkpoint_seconds": 1000, "group": group}
for words in (OPTIMSYN, LORA, TOKEN):
    assert run_cell(cell(*words), results, **how) == "done"
assert run_cell(cell(*DPG, *PARTS), results, watch=stop, **how) == "interrupted"
steps = []
state = run_cell(cell(*DPG, *PARTS), results, watch=lambda line: steps.append(line.get("step")), **how)
assert state == "done" and (not group.first or [step for step in steps if step] == [3]), (state, steps)
"""


@pytest.mark.slow
def test_two_processes_run_other_cells_and_go_on_from_checkpoints(alone, together, tmp_path):
    """OptimSyn, whose rewards sample and judge texts that every process computes for itself: charged once, equal numbers. The same with
    low-rank adapters, and with credit for single tokens. And DPG, stopped by a signal that one process got, resumed by both: to the bit as
    if it had never been stopped."""
    script, results = tmp_path / "script.py", tmp_path / "results"
    script.write_text(STOP_AND_GO_ON)
    done = torchrun(script, results, ROOT, ROOT / "tests")
    assert done.returncode == 0, done.stderr[-3000:]
    for name, words in {"optimsyn": OPTIMSYN, "lora": LORA, "token": TOKEN}.items():
        assert_equal_numbers(alone[name], RunFolder.of(results, cell(*words)))
    folder = RunFolder.of(results, together[0].spec)
    for name in ("rollouts.jsonl", "metrics.jsonl", "generator.safetensors"):
        assert (folder.path / name).read_bytes() == (together[0].path / name).read_bytes(), name


FAILS = '''\
"""Pays nothing, and its second process comes to an end in the second step."""

import os

from dpgbench.api import Method


class Fails(Method):
    version = 1

    def run(self, bench):
        from dpgbench.bench.grpo import train_policy

        def reward(rollouts):
            if rollouts.step == 1 and bench.group.rank == 1:
                if os.environ["HOW"] == "killed":
                    os._exit(9)
                raise RuntimeError("the second process is out of luck")
            return [0.0] * len(rollouts.completions)

        yield from train_policy(bench, reward)
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [("raises", "process 1 of 2: .*RuntimeError: the second process is out of luck"), ("killed", "processes died without a word")],
)
def test_a_process_that_fails_ends_both(tmp_path, how, said):
    """The first process waits in an exchange at that moment. Its folder has the reason, and the command ends with it, once, and with 1."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "methods" / "fails.py").write_text(FAILS)
    (tmp_path / "configs" / "method" / "fails.yaml").write_text("name: fails\nlabel: fails\npolicy: ${policy}\n")
    words = ["task=language", "method=fails", *SMALL, *PARTS, f"plugins={tmp_path}"]
    done = torchrun("-m", "dpgbench", "run", *words, f"results={tmp_path}", HOW=how)
    assert done.returncode == 1
    (folder,) = (tmp_path / "runs").glob("language*")
    state = RunFolder(folder).state()
    assert state.name == "failed"
    assert re.search(said, (folder / "error.txt").read_text(), re.DOTALL)
    assert done.stdout.count("failed") == 2 if how == "killed" else done.stdout.count(state.detail) == 1
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if "step" in line] == [1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method=base"], "method=base: trains no policy"),
        (DPG, "policy.rollout_batch=None: must cut completions, 16, .* write policy.rollout_batch=8"),
        ([*DPG, "policy.rollout_batch=8"], "policy.micro_batch=None: must cut an update's completions, 8, .* write policy.micro_batch=4"),
        ([*DPG, *PARTS, "policy.micro_batch=8"], "policy.micro_batch=8: must cut"),
        ([*DPG, *PARTS, "policy.rollout=vllm"], "policy.rollout=vllm: one process only"),
        ([*DPG, *PARTS, "policy.report_to=[tensorboard]"], "policy.report_to=.*: one process only"),
    ],
)
def test_what_cannot_be_shared_is_refused(monkeypatch, words, says):
    """One line with value, rule and fix, before anything is loaded."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    said = {word.split("=")[0]: word for word in words}
    with pytest.raises(UserError, match=says):
        validate.check_processes(cell(*said.values()), "inline")
    with pytest.raises(UserError, match="launcher=local"):
        validate.check_processes(cell(*DPG, *PARTS), "local")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP=true: every process holds the whole generator"):
        validate.check_processes(cell(*DPG, *PARTS), "inline")


@pytest.mark.slow
def test_sweeps_are_not_shared(dpgbench, monkeypatch):
    """One cell at a time."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    done = dpgbench("sweep", "suite=smoke")
    assert done.code == 2 and "torchrun's processes work on one cell together" in done.err


def test_a_slurm_job_shares_a_cell_among_its_gpus():
    """A process for each GPU, or as many as `launcher.processes` says; cells without a policy have one of each; what cannot be shared is
    one line before anything is submitted."""
    launcher = config.read(["suite=smoke", "launcher=slurm", "launcher.gpus=8"], sweep=True).launcher
    assert slurm._asked(launcher, cell(*DPG)) == ({"gpus": 8, "cpus": 1, "mem_gb": 4, "time_min": 120}, 8)
    asked, processes = slurm._asked(launcher, cell("task=l2_norm", "method=base"))
    assert asked["gpus"] == processes == 1
    with pytest.raises(UserError, match=r"policy.rollout_batch=None: must cut completions, 16, into parts that 8 processes can share"):
        slurm.check_cells([cell(*DPG)], launcher)
    on_cpus = config.read(["suite=smoke", "launcher=slurm", "launcher.processes=2"], sweep=True).launcher
    assert slurm._asked(on_cpus, cell(*DPG)) == ({"gpus": 0, "cpus": 1, "mem_gb": 4, "time_min": 120}, 2)
    slurm.check_cells([cell(*DPG, *PARTS)], on_cpus)
    wrong = config.read(["suite=smoke", "launcher=slurm", "launcher.processes=0"], sweep=True).launcher
    with pytest.raises(UserError, match=r"launcher\.processes=0: a whole number from 1 up"):
        launch.check(wrong)


@pytest.mark.slow
def test_a_worker_starts_torchrun(alone, tmp_path):
    """`launch.together`: the numbers of one process, the state that the first process had, and its output in the cell's folder."""
    spec = cell(*DPG, *PARTS)
    with local.workers(1, [spec]) as pool:
        done = pool.schedule(sharing.work, args=(spec, tmp_path, None, 60.0, 2, 30.0))
        assert done.result(timeout=240) == "done"
    assert_equal_numbers(alone["dpg"], RunFolder.of(tmp_path, spec))


@pytest.mark.slow
def test_a_worker_that_started_torchrun_is_asked_to_stop(alone, tmp_path):
    """SIGTERM reaches all processes: one checkpoint, the state is "interrupted", and the cell goes on to the numbers of a quiet run."""
    spec = cell(*DPG, *PARTS)
    with local.workers(1, [spec]) as pool:
        running = pool.schedule(sharing.work, args=(spec, tmp_path, None, 1000.0, 2, 30.0))
        metrics = RunFolder.of(tmp_path, spec).path / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
        assert running.result(timeout=120) in ("interrupted", "done")  # done, if the signal came in its last step
    assert run_cell(spec, tmp_path) == "done"
    assert_equal_numbers(alone["dpg"], RunFolder.of(tmp_path, spec))
