"""Budgets: a cell ends at its limit, its schedule ends with it, and `budget=match:` finds what another method spent."""

from __future__ import annotations

import pytest
from conftest import SMALL

from dpgbench import config
from dpgbench.bench.grpo import train_policy
from dpgbench.bench.meter import Budget, Meter
from dpgbench.core.errors import UserError
from dpgbench.run.cell import run_cell
from dpgbench.run.schedule import _Schedule
from dpgbench.store.run_folder import RunFolder


def run(tmp_path, *words: str):
    """The state and the snapshots of one small cell."""
    said = {word.split("=")[0]: word for word in (*SMALL, *words)}
    (cell,) = config.read([*said.values(), f"results={tmp_path}"], sweep=False).cells
    state, folder = run_cell(cell.spec, tmp_path), RunFolder.of(tmp_path, cell.spec)
    return state, folder.result()["snapshots"] if state == "done" else (folder.path / "error.txt").read_text()


def test_the_largest_share_counts():
    spent = Meter(tokens_generated=30, seconds=2.0)
    spent.charge("generate", 5e9)
    assert Budget().share(spent) == 0 and not Budget()
    assert Budget(flops=1e10).share(spent) == 0.5 and Budget(tokens=40).share(spent) == 0.75 and Budget(seconds=1.0).share(spent) == 2
    assert Budget(flops=1e10, tokens=40, seconds=20.0).share(spent) == 0.75


@pytest.mark.parametrize("limit", ["budget.flops=2e10", pytest.param("budget.tokens=3600", marks=pytest.mark.slow)])
def test_a_policy_fills_its_budget_and_stays_within_it(tmp_path, limit):
    """The last answer's price, deployment included, is the budget but for less than the price of a step."""
    state, snapshots = run(tmp_path, "task=language", "method=dpg", "steps=null", "snapshots=4", limit)
    assert state == "done"
    key, total = {"budget.flops": ("flops", 2e10), "budget.tokens": ("tokens_generated", 3600)}[limit.split("=")[0]]
    prices, steps = [line[key] for line in snapshots], [line["snapshot"] for line in snapshots]
    step = (prices[-1] - prices[0]) / steps[-1]
    assert total - 1.5 * step < prices[-1] <= 1.01 * total
    assert steps[0] == 0 and len(steps) == 4, "step 0, a quarter, a half, the whole"
    for price, share in zip(prices[1:3], (0.25, 0.5), strict=True):
        assert share * total <= price < share * total + 1.5 * step


def test_best_of_n_that_costs_too_much_is_no_answer(tmp_path):
    state, said = run(tmp_path, "task=language", "method=active_inheritance", "n=16", "budget.tokens=100")
    assert state == "failed" and "the first answer costs" in said and "budget.tokens=100" in said


def test_the_schedule_follows_whichever_end_is_nearer(bench):
    """Half of the tokens, half of the learning rate; and with steps alone, a share of those."""

    def rates(work):
        import dpgbench.bench.grpo as policy

        seen, original = [], policy._Loop.on_step_begin

        def spy(self, *arguments, **named):
            original(self, *arguments, **named)
            seen.append((self.bench.spent_share(), self.trainer.optimizer.param_groups[0]["lr"]))

        policy._Loop.on_step_begin = spy
        try:
            list(train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]))
        finally:
            policy._Loop.on_step_begin = original
        return seen

    by_steps = rates(bench("steps=4", "policy.lr=1e-3", "lr_schedule=linear"))
    assert [rate for _, rate in by_steps] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    by_budget = rates(bench("steps=null", "policy.lr=1e-3", "lr_schedule=linear", "budget.tokens=1500", "seed=1"))
    assert len(by_budget) >= 3
    assert [rate for _, rate in by_budget] == pytest.approx([1e-3 * (1 - share) for share, _ in by_budget])


def test_a_step_has_the_same_prompts_however_many_there_are(bench):
    """So that a budget, a step count and a resumed run see the same data."""
    seen = []
    for steps in (2, 3):
        work = bench(f"steps={steps}", "lr_schedule=constant")
        prompts = []
        list(train_policy(work, lambda rollouts, prompts=prompts: prompts.append(rollouts.prompts) or [0.0] * 16))
        seen.append(prompts)
    assert seen[0] == seen[1][:2] and seen[0][0] != seen[0][1]


def test_thresholds_are_passed_once():
    def due(*thresholds: float) -> list[bool]:
        schedule = _Schedule(shares=thresholds)
        return [schedule.is_due(step, share) for step, share in enumerate((0.1, 0.2, 0.3, 0.4, 0.7, 0.9))]

    assert due(0.25, 0.5) == [True, False, True, False, True, False]
    assert due() == [True, False, False, False, False, False]


def test_match_takes_what_the_other_method_spent(tmp_path):
    words = [
        "task=language",
        "budget=match:dpg",
        "steps=null",
        *(word for word in SMALL if not word.startswith("steps")),
        f"results={tmp_path}",
    ]
    with pytest.raises(
        UserError, match="budget=match:dpg: dpg has no finished cell of language_de, scale tiny, seed 0 with these settings"
    ):
        config.read([*words, "method=influence"], sweep=False)
    state, snapshots = run(tmp_path, "task=language", "method=dpg")
    assert state == "done"
    (cell,) = config.read([*words, "method=influence"], sweep=False).cells
    assert cell.spec.budget == {"flops": snapshots[-1]["flops"]}
    # Another training of the target is another comparison.
    with pytest.raises(UserError, match="no finished cell"):
        config.read([*words, "method=influence", "training.lr=2e-3"], sweep=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget=5e9"], "budget=5e9: not understood; write budget=match:dpg for what dpg spent, or budget.flops=1e12"),
        (["budget.flops=-1"], "budget.flops=-1: a limit is a positive number, or null for none; write budget.flops=1e12"),
        (["budget.flops=many"], "budget.flops=many: a limit is a positive number, or null for none; write budget.flops=1e12"),
        (["steps=null"], "policy.steps=None: without a limit the budget must be one; write budget.flops=1e12, or steps=60"),
        (["lr_schedule=liner"], "policy.lr_schedule=liner: did you mean 'linear'? choose from: constant, cosine, linear"),
    ],
)
def test_bad_budgets_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        config.read(["method=dpg", *words], sweep=False)
    assert str(caught.value) == message


def test_no_budget_leaves_the_hash_alone():
    (plain,), (limited,) = (config.read(["method=dpg", *words], sweep=False).cells for words in ([], ["budget.flops=1e12"]))
    assert "budget" not in plain.spec.config and plain.spec.hash != limited.spec.hash
