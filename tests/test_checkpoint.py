"""Interrupted anywhere, a cell ends with the numbers of a run that never stopped, and a damaged checkpoint is never gone on from."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from conftest import SMALL, stop_at

from dpgbench import config
from dpgbench.run.cell import run_cell
from dpgbench.store import checkpoints
from dpgbench.store.run_folder import RunFolder

WORDS = [*SMALL[1:-1], "steps=4", "snapshots=3"]
METHODS = {
    "dpg": ["method=dpg", "averaging=0.9", "lr_schedule=cosine", "entropy_bonus=0.1", "entropy_bonus_final=0.0"],
    "mini-batches": ["method=dpg", "minibatch=8", "policy.micro_batch=4", "inner_steps=2"],
    "adapters": ["method=dpg", "averaging=0.9", "policy.lora.rank=4"],
    "token credit": ["method=dpg_token", "averaging=0.9"],
    "influence": ["method=influence", "estimator=adam"],
    "less": ["method=influence_less", "influence_texts=16"],
    "ekfac": ["method=influence_ekfac", "influence_texts=16"],
    "naive": ["method=naive"],
    "optimsyn": ["method=optimsyn", "texts=1"],
    "adapted rounds": ["method=active_inheritance_rounds", "n=2", "rounds=4", "round_prompts=16", "policy.lora.rank=4"],
    "rounds": ["method=active_inheritance_rounds", "n=2", "rounds=4", "round_prompts=16"],
    "few rounds": ["method=active_inheritance_rounds", "n=2", "rounds=6", "round_prompts=16", "scored=doublings"],
    "search": ["method=prompt_only", "search=5", "search_texts=8"],
}


def cell(*words: str):
    return config.read(["task=language", *WORDS, *words], sweep=False).cells[0].spec


def without_seconds(result: dict) -> dict:
    result = {key: value for key, value in result.items() if key != "seconds_total"}
    return {**result, "snapshots": [{key: value for key, value in line.items() if key != "seconds"} for line in result["snapshots"]]}


def assert_same(one: RunFolder, other: RunFolder) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "deployment.jsonl", "generator.safetensors"):
        if (one.path / name).exists() or (other.path / name).exists():
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes()
    assert without_seconds(one.result()) == without_seconds(other.result())


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Every method's cell, run without interruption."""
    results, made = tmp_path_factory.mktemp("quiet"), {}

    def of(name: str) -> RunFolder:
        if name not in made:
            spec = cell(*METHODS[name])
            assert run_cell(spec, results) == "done"
            made[name] = RunFolder.of(results, spec)
        return made[name]

    return of


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("dpg", 1), slow("dpg", 4), slow("mini-batches", 2), slow("adapters", 2), slow("token credit", 2), slow("influence", 3),
        slow("less", 2), slow("ekfac", 2),
        slow("naive", 2), slow("optimsyn", 2),
    ],
)  # fmt: skip
def test_a_cell_that_goes_on_ends_as_one_that_never_stopped(quiet, tmp_path, name, step):
    """Metrics, rollouts and result to the bit, stopped by a signal at the first step, in between, and after the last."""
    spec = cell(*METHODS[name])
    folder = RunFolder.of(tmp_path, spec)
    assert run_cell(spec, tmp_path, watch=stop_at(step)) == "interrupted"
    assert folder.state().detail == f"step {step}, goes on from step {step}"
    steps = []
    assert run_cell(spec, tmp_path, watch=lambda line: steps.append(line.get("step"))) == "done"
    assert [number for number in steps if number] == list(range(step + 1, 5))
    assert_same(folder, quiet(name))
    assert not checkpoints.steps_in(folder.path)


@pytest.mark.parametrize(
    ("name", "counter", "stop", "made_again"),
    [
        ("rounds", "round", 2, [3]),
        slow("adapted rounds", "round", 2, [3]),
        slow("search", "candidate", 3, [5]),
        slow("search", "candidate", 5, []),
    ],
)
def test_rounds_and_searches_go_on_too(quiet, tmp_path, name, counter, stop, made_again):
    """A search has checkpoints where it has snapshots, of 2, 4 and all candidates; a round has one each."""
    spec = cell(*METHODS[name])
    folder = RunFolder.of(tmp_path, spec)
    seen = []
    first = run_cell(spec, tmp_path, watch=stop_at(stop, counter), checkpoint_seconds=0)
    assert first == "interrupted" and checkpoints.steps_in(folder.path)
    assert run_cell(spec, tmp_path, watch=lambda line: seen.append(line.get(counter))) == "done"
    assert [number for number in seen if number] == made_again
    assert_same(folder, quiet(name))


@pytest.mark.slow
def test_a_kill_between_checkpoints_goes_back_to_the_last(quiet, tmp_path):
    """Killed at step 3 with checkpoints of 1 and 2: what came after step 2 is cut off and made again, and two are kept."""
    spec = cell(*METHODS["dpg"])
    folder = RunFolder.of(tmp_path, spec)
    pid = os.fork()
    if pid == 0:
        run_cell(spec, tmp_path, watch=lambda line: line.get("step") == 4 and os.kill(os.getpid(), signal.SIGKILL), checkpoint_seconds=0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert checkpoints.steps_in(folder.path) == [3, 2]
    assert folder.state().name == "stale" and f"pid {pid}" in folder.state().detail
    path = checkpoints.path_of(folder.path, 3)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        copy = tmp_path / f"copy{len(damage)}{damage[-1:].hex()}"
        shutil.copytree(tmp_path / "runs", copy / "runs")
        checkpoints.path_of(RunFolder.of(copy, spec).path, 3).write_bytes(damage)
        steps = []
        assert run_cell(spec, copy, watch=lambda line, steps=steps: steps.append(line.get("step"))) == "done"
        assert min(number for number in steps if number) == 3, "goes on from step 2"
        assert_same(RunFolder.of(copy, spec), quiet("dpg"))


@pytest.mark.parametrize("name", [slow("damaged"), slow("cut"), slow("other_code"), slow("gone")])
def test_what_no_checkpoint_fits_starts_again(quiet, tmp_path, name):
    """Metrics cut short, other code, checkpoints gone: named by status, and the cell ends with the same numbers from step 0."""
    spec = cell(*METHODS["dpg"])
    assert run_cell(spec, tmp_path, watch=stop_at(2)) == "interrupted"

    def cut(folder):
        (folder.path / "metrics.jsonl").write_text("")

    def other_code(folder):
        path = checkpoints.path_of(folder.path, 2)
        content = path.read_bytes()
        mark = content.index(b"code") + len(b'code\\": \\"')
        path.write_bytes(content[:mark] + b"000000000000" + content[mark + 12 :])

    def gone(folder):
        checkpoints.remove(folder.path)
        assert folder.state().detail == "step 2, no checkpoint, starts again"

    def damaged(folder):
        checkpoints.path_of(folder.path, 2).write_bytes(b"half")
        assert folder.state().detail == "step 2, its checkpoints are damaged, starts again"

    {"cut": cut, "other_code": other_code, "gone": gone, "damaged": damaged}[name](RunFolder.of(tmp_path, spec))
    steps = []
    assert run_cell(spec, tmp_path, watch=lambda line: steps.append(line.get("step"))) == "done"
    assert 1 in steps
    assert_same(RunFolder.of(tmp_path, spec), quiet("dpg"))


def test_a_method_without_a_state_of_its_own_starts_again(tmp_path):
    """Best of n is interrupted between snapshots and gives the same result the second time; its seconds are those of one run."""
    words = ["task=language", "method=active_inheritance", "n=2", "deployment_texts=8", "deployment_steps=null"]
    spec = config.read(words, sweep=False).cells[0].spec
    once = tmp_path / "once"
    assert run_cell(spec, once) == "done"

    def watch(line: dict) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    assert run_cell(spec, tmp_path / "twice", watch=watch) == "interrupted"
    assert run_cell(spec, tmp_path / "twice") == "done"
    assert_same(RunFolder.of(once, spec), RunFolder.of(tmp_path / "twice", spec))


@pytest.mark.slow
def test_lost_steps_are_not_counted(tmp_path):
    """The meter goes back with the checkpoint: a cell stopped three times has spent one run's FLOPs, and about one run's seconds."""
    spec = cell(*METHODS["dpg"])
    for step in (1, 2, 3):
        assert run_cell(spec, tmp_path, watch=stop_at(step)) == "interrupted"
    assert run_cell(spec, tmp_path) == "done"
    folder = RunFolder.of(tmp_path, spec)
    seconds = [json.loads(line)["seconds"] for line in (folder.path / "timings.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and len(seconds) == len((folder.path / "metrics.jsonl").read_text().splitlines())
    assert folder.result()["snapshots"][-1]["seconds"] <= folder.result()["seconds_total"]


@pytest.mark.slow
def test_a_budget_ends_a_run_that_goes_on_where_it_ends_any_other(tmp_path, monkeypatch):
    """Interrupted before the answer that is over the budget: the last one within it counts, and its picture is drawn again."""
    from dpgbench.bench import grpo
    from dpgbench.run import cell as runner

    for module in (runner, grpo):
        monkeypatch.setattr(module, "OVERRUN", -0.5)
    words = ["task=sixseven", "method=dpg", *SMALL[1:-1], "steps=20", "snapshots=8", "averaging=0.5", "budget.flops=6e9"]
    spec = config.read(words, sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path / "quiet") == "done"
    quiet = RunFolder.of(tmp_path / "quiet", spec)
    steps = [json.loads(line).get("step") for line in (quiet.path / "metrics.jsonl").read_text().splitlines()]
    last = max(step for step in steps if step)
    assert quiet.result()["snapshots"][-1]["snapshot"] < last < 20
    for step in (2, last):
        results = tmp_path / str(step)
        assert run_cell(spec, results, watch=stop_at(step)) == "interrupted"
        assert run_cell(spec, results) == "done"
        assert_same(RunFolder.of(results, spec), quiet)
        assert (RunFolder.of(results, spec).path / "picture.png").read_bytes() == (quiet.path / "picture.png").read_bytes()
