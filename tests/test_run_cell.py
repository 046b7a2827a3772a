"""A cell from start to finish: what is charged, what is scored, and what a method cannot do wrong unnoticed."""

from __future__ import annotations

import json

import pytest
from conftest import SMALL

from dpgbench import config
from dpgbench.run.cell import run_cell
from dpgbench.run.schedule import snapshot_steps
from dpgbench.store.run_folder import RunFolder, read_lines


@pytest.mark.parametrize(
    ("last", "count", "steps"),
    [(60, 8, {0, 1, 2, 4, 8, 15, 30, 60}), (2, 8, {0, 1, 2}), (1, 8, {0, 1}), (100, 1, {100}), (100, 2, {0, 100}), (100, 3, {0, 1, 100})],
)
def test_snapshots_are_log_spaced_from_the_first_to_the_last(last, count, steps):
    assert snapshot_steps(last, count) == steps


def run(tmp_path, *words: str) -> tuple[str, RunFolder]:
    plugins = next((tmp_path / "plugins" for word in words if word.startswith("plugins=")), None)
    (cell,) = config.read([*words], sweep=False).cells
    return run_cell(cell.spec, tmp_path, plugins), RunFolder.of(tmp_path, cell.spec)


def test_a_dpg_cell_leaves_everything(tmp_path):
    """Steps and snapshots in order, costs that only grow, rewards and advantages of every completion, a replayable spec."""
    state, folder = run(tmp_path, "task=language", "method=dpg", *SMALL)
    assert state == "done" and folder.state().name == "done"
    lines = read_lines(folder.path / "metrics.jsonl")
    assert [line.get("step", line.get("snapshot")) for line in lines] == [0, 1, 2, 2]
    steps = [line for line in lines if "step" in line]
    assert all({"phi", "entropy", "reward_mean", "texts", "flops"} <= set(line) for line in steps)
    assert steps[0]["flops"] < steps[1]["flops"]
    rollouts = read_lines(folder.path / "rollouts.jsonl")
    assert all(len(line[key]) == 16 for line in rollouts for key in ("texts", "rewards", "advantages"))
    assert "seconds" not in (folder.path / "metrics.jsonl").read_text()
    result = folder.result()
    assert result["headline"] == "test_loss" and result["snapshots"][-1]["seconds"] > 0
    phases = result["snapshots"][-1]["flops_by_phase"]
    assert all(phases[phase] > 0 for phase in ("generate", "training", "metagradient", "policy_update", "deployment"))
    assert sum(phases.values()) == result["snapshots"][-1]["flops"]
    assert json.loads((folder.path / "env.json").read_text())["packages"]["torch"]


def test_best_of_n_pays_n_times(tmp_path):
    """Four times the completions cost about four times the sampling, and all of it is deployment."""
    costs = {}
    for n in (1, 4):
        _, folder = run(tmp_path, "task=language", "method=active_inheritance", f"n={n}", "deployment_texts=64")
        costs[n] = folder.result()["snapshots"][-1]
    assert costs[4]["tokens_generated"] == pytest.approx(4 * costs[1]["tokens_generated"], rel=0.2)
    assert costs[4]["flops"] == costs[4]["flops_by_phase"]["deployment"] == pytest.approx(4 * costs[1]["flops"], rel=0.2)


def test_methods_share_seeds(tmp_path):
    """Best of one is the untouched generator: same prompts, same target; and dpg's step 0 is base to the bit."""
    _, base = run(tmp_path, "task=l2_norm", "method=base", "deployment_texts=16")
    _, dpg = run(tmp_path, "task=l2_norm", "method=dpg", *SMALL)
    assert base.result()["snapshots"][0]["phi"] == dpg.result()["snapshots"][0]["phi"]


BAD_METHODS = {
    "silent": ("        return iter(())", "yielded no snapshot"),
    "short": ("        yield Snapshot(0, lambda prompts: ['one'])", "sample returned 1 texts for 8 prompts"),
    "stranger": ("        bench.meter.charge('sleep', 1)\n        yield", "phase='sleep'"),
    "blind": ("        bench.task.measure(None, [])\n        yield", "has no attribute 'measure'"),
}


@pytest.mark.parametrize("name", BAD_METHODS)
def test_a_method_that_breaks_its_contract_fails_with_the_reason(tmp_path, name):
    body, says = BAD_METHODS[name]
    plugins = tmp_path / "plugins"
    (plugins / "methods").mkdir(parents=True)
    (plugins / "configs" / "method").mkdir(parents=True)
    head = f'"""Bad."""\nfrom dpgbench.api import Method, Snapshot\n\n\nclass {name.capitalize()}(Method):\n    def run(self, bench):\n'
    (plugins / "methods" / f"{name}.py").write_text(head + body + "\n")
    (plugins / "configs" / "method" / f"{name}.yaml").write_text(f"name: {name}\n")
    state, folder = run(tmp_path, "task=l2_norm", f"method={name}", "deployment_texts=8", f"plugins={plugins}")
    assert state == "failed" and says in (folder.path / "error.txt").read_text()
    assert folder.state().name == "failed"


def test_a_signal_that_is_not_finite_stops_the_cell(tmp_path):
    """A target that diverges is a failure with a reason and a way out, not a row of NaN."""
    state, folder = run(tmp_path, "task=language", "method=dpg", *SMALL, "training.optimizer=sgd", "training.lr=1e30")
    assert state == "failed"
    assert "phi is nan at step 0; lower training.lr" in (folder.path / "error.txt").read_text()


def test_tf32_is_said_to_torch_for_one_cell_and_not_for_the_next(tmp_path, monkeypatch):
    import torch

    said = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    small = ["task=l2_norm", "method=base", "deployment_texts=8"]
    for precision in ("tf32", "full"):
        state, _ = run(tmp_path, *small, f"training.precision={precision}")
        assert state == "done"
    assert said == ["high", "highest"]
