"""Budgets are spent: `n=budget`, `rounds=budget` and `search=budget` are the largest that fits, found by loops that try every size."""

from __future__ import annotations

import itertools
import random
import sys

import pytest
import torch
from conftest import SMALL, stop_at

from dpgbench import config
from dpgbench.bench.best_of import Candidates
from dpgbench.bench.meter import Budget
from dpgbench.bench.spending import largest_within
from dpgbench.core.errors import UserError
from dpgbench.core.plugin_types import Snapshot
from dpgbench.core.seeds import stream
from dpgbench.plugins.registry import Registry
from dpgbench.run import estimate
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder

ROUNDS = ["method=active_inheritance_rounds", "n=2", "round_prompts=16"]


def spec_of(*words: str):
    said = {word.split("=")[0]: word for word in (*SMALL, *words)}
    return config.read(list(said.values()), sweep=False).cells[0].spec


def snapshots(tmp_path, *words: str) -> list[dict]:
    """Those of a cell that was run, without their seconds."""
    spec = spec_of(*words)
    assert run_cell(spec, tmp_path) == "done"
    return [{key: value for key, value in line.items() if key != "seconds"} for line in RunFolder.of(tmp_path, spec).result()["snapshots"]]


def answers(work):
    """(step, texts) of each snapshot of the bench's method, as the harness takes them."""
    prompts = deployment_prompts(work)
    for snapshot in Registry().load("method", work.spec.method.name)(work.options).run(work):
        with work.meter.deployment() as work.account.reserve:
            texts = snapshot.sample(prompts)
        yield snapshot.step, texts


def deployment_prompts(work):
    return work.world.prompts("test", work.spec.scale.deployment_texts, stream(work.spec.seed, "deployment prompts"))


# ---- how far a budget reaches


def test_the_largest_count_against_trying_every_one():
    """Prices that vary by a half about their mean, budgets from too little to hundreds; hardly anything is asked for in vain."""
    draws = random.Random(0)
    for budget in [0.5, 1.0, 1.9, 3.0, 7.7, 40.0, 333.0] * 5:
        prices, asked = [draws.uniform(0.75, 1.25) for _ in range(1000)], []

        def share(count, prices=prices, asked=asked, budget=budget) -> float:
            asked.append(count)
            return sum(prices[:count]) / budget

        fitting = [count for count in range(1, 1000) if share(count) <= 1]
        asked.clear()
        assert largest_within(share) == max(fitting, default=1)
        assert max(asked) <= 1.1 * max(fitting, default=1) + 1, "at most a tenth more, and one"


# ---- best of n


@pytest.mark.parametrize("task", ["language", pytest.param("l2_norm", marks=pytest.mark.slow)])
def test_n_is_the_largest_of_a_loop_over_n(bench, task):
    """Budgets just below, at and between the prices of n, in FLOPs and in tokens; prices from draws that share nothing with the method."""
    words = (f"task={task}", "method=active_inheritance")
    work = bench(*words, "n=1")
    prompts, flops, tokens, drawn = deployment_prompts(work), [], [], []
    for n in range(1, 8):
        drawn.append(work.sample(prompts, "deployment", *([n - 1] if n > 1 else [])))
        with work.meter.deployment() as price:
            for earlier in range(n):
                work.sample(prompts, "deployment", *([earlier] if earlier else []))
            if task == "l2_norm":
                work.one_step_utilities([text for draw in drawn for text in draw])
        flops.append(price.total_flops)
        tokens.append(price.tokens_generated)
    spending = bench(*words, "n=budget", "budget.flops=1e12")
    limits = [Budget(flops=flops[3]), Budget(flops=flops[3] * (1 - 1e-9)), Budget(flops=(flops[4] + flops[5]) / 2)]
    for limit, most in zip([*limits, Budget(tokens=tokens[2]), Budget(tokens=tokens[6] - 1)], [4, 3, 5, 3, 6], strict=True):
        spending.account.budget = limit
        found = list(answers(spending))
        assert [step for step, _ in found] == [size for size in (1, 2, 4) if size < most] + [most], limit
        best = Candidates(work, "auto", "deployment").best(prompts, most)[0]
        assert found[-1][1] == best and spending.meter.total_flops == 0, "asking for a price charges nothing"
        assert spending.account.reserve.total_flops == pytest.approx(flops[most - 1], rel=1e-12)
        assert spending.spent_share() <= 1


def test_a_cell_with_n_from_the_budget_is_the_cell_with_that_n(tmp_path):
    """Row by row; its label, its estimate and its hash are its own."""
    words = ("task=language", "method=active_inheritance", "budget.flops=1.1e9")
    found = snapshots(tmp_path, *words, "n=budget")
    most = found[-1]["snapshot"]
    assert most > 2 and found[-1]["flops"] <= 1.1e9
    assert found == snapshots(tmp_path, *words, f"n={most}")
    assert snapshots(tmp_path, "task=language", "method=active_inheritance", f"n={most + 1}")[-1]["flops"] > 1.1e9
    spec = spec_of(*words, "n=budget")
    assert spec.method.label == "active_inheritance_nbudget" and spec.hash != spec_of(*words, f"n={most}").hash
    assert estimate.estimate(spec, Registry()).flops == 1.1e9


def test_seconds_of_asking_are_nobodys(bench, monkeypatch):
    """By a clock of the test's: the method's own 100 seconds are its, and in the share; the 1000 of asking are in the share alone."""
    work, now = bench("task=language", "method=base", "budget.seconds=2000"), [0.0]
    cell = work._share_with.__self__
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def write(prompts):
        now[0] += 1000
        return []

    cell._clock, now[0] = 0.0, 100.0
    assert work.share_with(Snapshot(0, write)) == 1100 / 2000
    assert work.meter.seconds == 100 and cell._clock == now[0]
    now[0] += 7
    assert work.share_with(Snapshot(0, write)) == 1107 / 2000 and work.meter.seconds == 107


# ---- rounds


def test_rounds_go_on_until_the_next_would_not_fit(tmp_path):
    """The rows are the first ones of a cell with many rounds; what is left is less than the dearest round."""
    whole = snapshots(tmp_path, "task=language", *ROUNDS, "rounds=5")
    flops = [line["flops"] for line in whole]
    rounds = flops[1:]  # those of n = 2; the one before is of n = 1
    dearest = max(later - earlier for earlier, later in itertools.pairwise(rounds))
    for budget in (rounds[3], (rounds[1] + rounds[2]) / 2):
        found = snapshots(tmp_path, "task=language", *ROUNDS, "rounds=budget", f"budget.flops={budget!r}")
        assert found == whole[: len(found)]
        assert budget - dearest < found[-1]["flops"] <= budget


def test_of_many_rounds_those_are_answers_where_the_spending_has_doubled(tmp_path):
    """Against the rule by hand over a cell that scores every round: the same rows, the last one among them, with a count and a budget."""
    whole = snapshots(tmp_path, "task=language", *ROUNDS, "rounds=7")
    wanted, seen = whole[:2], 0.0  # best of 1 and of 2, before the first round
    for line in whole[2:]:
        spent = line["flops"] - line["flops_by_phase"]["deployment"]
        if spent >= 2 * seen:
            wanted, seen = [*wanted, line], spent
    assert wanted[-1] != whole[-1] and len(wanted) <= 5
    assert snapshots(tmp_path, "task=language", *ROUNDS, "rounds=7", "scored=doublings") == [*wanted, whole[-1]]
    budget = whole[5]["flops"]
    few = snapshots(tmp_path, "task=language", *ROUNDS, "rounds=budget", f"budget.flops={budget!r}", "scored=doublings")
    assert few[:-1] == wanted[: len(few) - 1] and few[-1] in whole
    dearest = max(later["flops"] - earlier["flops"] for earlier, later in itertools.pairwise(whole[1:]))
    assert budget - 2 * dearest < few[-1]["flops"] <= budget, "the last dataset's price stands for the next one's"


def test_a_round_that_does_not_fit_leaves_the_generator_as_it_was(bench):
    """What the first round costs is known when it is done: it is undone then, and the texts are those of before."""
    work = bench("task=language", *ROUNDS, "rounds=budget", "budget.flops=1e12")
    untouched = {name: weight.clone() for name, weight in work.generator.model.state_dict().items()}
    steps = answers(work)
    before = [next(steps), next(steps)]
    work.account.budget = Budget(flops=1.01 * work.account.reserve.total_flops)
    assert list(steps) == [] and [step for step, _ in before] == [1, 2]
    assert len(work.lines) == 1, "a round was made, in vain"
    assert work.meter.flops["policy_update"] == 0, "and nobody pays for it"
    for name, weight in work.generator.model.state_dict().items():
        assert torch.equal(weight, untouched[name]), name


# ---- policy steps


def test_a_step_that_is_dearer_than_any_before_is_undone(bench, monkeypatch, tmp_path):
    """The third step costs a third of the budget more: the answer is that of a cell of two steps, its price and texts too."""
    import dpgbench.bench.workbench as workbench

    words = ["task=l2_norm", "method=dpg", "averaging=0.5", "more_deployments=[8]"]
    judged, real = [], workbench.Workbench.metagradients

    def dear(work, *args, **kwargs):
        judged.append(work.meter.total_flops)
        if len(judged) == 3 and work.spec.budget:
            work.meter.charge("scoring", work.spec.budget["flops"] / 3)
        return real(work, *args, **kwargs)

    monkeypatch.setattr(workbench.Workbench, "metagradients", dear)
    two = snapshots(tmp_path, *words, "steps=2", "policy.lr_schedule=constant", "snapshots=3")
    assert [line["snapshot"] for line in two] == [0, 1, 2]
    for count, scored in (("snapshots=2", [0, 2]), ("snapshots=12", [0, 1, 2])):
        judged.clear()
        budget = 1.3 * two[-1]["flops"] + (two[-1]["flops"] - two[-2]["flops"])
        more = [*words, "steps=null", "policy.lr_schedule=constant", count, f"budget.flops={budget!r}"]
        found = snapshots(tmp_path, *more)
        assert len(judged) == 3 and [line["snapshot"] for line in found] == scored
        assert found[-1] == two[-1]
        result = RunFolder.of(tmp_path, spec_of(*more)).result()
        assert [line["deployment_texts"] for line in result["deployments"]] == [8, 16]
    judged.clear()
    stopped = spec_of(*more)
    assert run_cell(stopped, tmp_path / "again", watch=stop_at(2)) == "interrupted" and len(judged) == 2
    assert run_cell(stopped, tmp_path / "again") == "done" and len(judged) == 3
    lines = RunFolder.of(tmp_path / "again", stopped).result()["snapshots"]
    assert [{key: value for key, value in line.items() if key != "seconds"} for line in lines] == found


# ---- search


PHI = 5e8  # what a dataset's training and Phi cost in these tests, whose values are made up


def searched(work, monkeypatch, worth: dict[str, float]):
    """The snapshots' steps and texts, and what was judged, where Phi under an instruction is what `worth` says."""
    said, inner = [], work.world.instruct
    monkeypatch.setattr(work.world, "instruct", lambda prompts, words: said.append(words) or inner(prompts, words))
    monkeypatch.setattr(work, "dataset_value", lambda texts, *names: work.meter.charge("scoring", PHI) or worth.get(said[-1], 0.0))
    return list(answers(work)), [line["instruction"] for line in work.lines]


def test_the_search_halves_its_field_and_spends_the_budget(bench, monkeypatch):
    """All nine once or more, five of them, three, two: each round's survivors are the best means so far; all but a sweep is spent."""
    work = bench("task=language", "lang=fr", "method=prompt_only", "search=budget", "search_texts=8", "budget.flops=2.4e10")
    worth = {name: float(place) for place, name in enumerate(sorted(work.world.instructions()))}
    found, judged = searched(work, monkeypatch, worth)
    ranked = sorted(worth, key=worth.get, reverse=True)
    counts = [judged.count(name) for name in ranked]
    assert len(counts) == 9 and counts == sorted(counts, reverse=True), "a better one is judged at least as often"
    levels = sorted(set(counts))
    assert levels[0] >= 1 and [sum(count > level for count in counts) for level in levels[:-1]] == [5, 3, 2]
    steps = [step for step, _ in found]
    assert steps[0] == 1 and steps[-1] == len(judged) == len(work.lines) and len(steps) == 5
    sweep, room = 2.5 * work.meter.total_flops / len(judged), 0.3 * work.account.reserve.total_flops
    assert 1 - (sweep + room) / 2.4e10 < work.spent_share() <= 1
    prompts = deployment_prompts(work)
    assert found[-1][1] == work.sample(work.world.instruct(prompts, ranked[0]), "deployment")


def test_halving_keeps_the_better_half_and_the_first_of_equals():
    """Against ranking by hand: means, not sums, and an odd one out stays."""
    module = Registry().load("method", "prompt_only").__module__
    search = sys.modules[module]._Search([[1.0, 3.0], [2.0], [5.0], [2.0], [0.0]], [0, 1, 2, 3, 4])
    assert search.judged == 6 and search.behind == [1, 2, 3, 4]
    search.halve()
    assert search.field == [2, 0, 1] and search.behind == [2, 1]
    search.halve()
    assert search.field == [2, 0]
    search.halve()
    assert search.field == [2]


def test_every_dataset_of_a_search_is_a_fresh_one_and_the_first_that_of_a_plain_search(bench):
    """Four candidates, with real values."""
    words = ("task=language", "lang=de", "method=prompt_only", "search_texts=8")
    plain, spending = bench(*words, "search=4"), bench(*words, "search=budget", "budget.flops=6e9")
    list(answers(plain))
    tried = {line["instruction"]: line["phi"] for line in plain.lines}
    spending.world.instructions = lambda: list(tried)
    list(answers(spending))
    assert {line["instruction"]: line["phi"] for line in reversed(spending.lines)} == tried
    of_one = [line["phi"] for line in spending.lines if line["instruction"] == spending.lines[-1]["instruction"]]
    assert len(of_one) >= 3 and len(set(of_one)) == len(of_one)


@pytest.mark.parametrize(("budget", "candidates"), [(1e9, 1), (2.8e9, 2), (6.3e9, 5)])
def test_a_small_budget_judges_fewer_candidates(bench, monkeypatch, budget, candidates):
    """As many as it can judge twice over, and never above the budget."""
    work = bench("task=language", "lang=de", "method=prompt_only", "search=budget", "search_texts=8", f"budget.flops={budget!r}")
    found, judged = searched(work, monkeypatch, {})
    assert len(set(judged)) == candidates and (len(found) > 1) == (candidates > 1) and work.spent_share() <= 1


# ---- words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["method=active_inheritance", "n=budget"],
            "method.n=budget: as many as the budget pays for, and there is no budget; write budget.flops=1e12, or n=8",
        ),
        (
            ["method=prompt_only", "search=budget", "budget.seconds=9"],
            "method.search=budget: as many as the budget pays for, and seconds alone do not say how many; "
            "write budget.flops=1e12, or search=8",
        ),
        (
            ["method=active_inheritance", "n=budget", "rounds=2", "budget.flops=1e12"],
            "method.rounds=2: with n=budget the first round spends everything; write rounds=1, or n=4",
        ),
        (["method=active_inheritance", "batch=budget"], "batch=budget: expected a whole number, such as method.batch=32"),
        (["method=active_inheritance", "n=0"], "method.n=0: best of n needs at least one completion per prompt; write n=4"),
    ],
)
def test_bad_words_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        config.read(words, sweep=False)
    assert str(caught.value) == message


def test_a_users_method_may_spend_budgets_too(tmp_path):
    """`budget_options` are read from the file; a preset may say `budget`, and a number on the command line stands over it."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "mine.yaml").write_text("name: mine\nsize: budget\n")
    body = "from dpgbench.api import Method\n\n\nclass Mine(Method):\n    {}\n\n    def run(self, bench):\n        yield\n"
    (tmp_path / "methods" / "mine.py").write_text(body.format('budget_options = ("size",)'))
    words = ["method=mine", f"plugins={tmp_path}", "budget.tokens=100"]
    assert config.read(words, sweep=False).cells[0].spec.method.size == "budget"
    assert config.read([*words, "size=3"], sweep=False).cells[0].spec.method.size == 3
    (tmp_path / "methods" / "mine.py").write_text(body.format('budget_options = tuple("size")'))
    with pytest.raises(UserError, match=r"budget_options = tuple\('size'\): must be a tuple of options' names"):
        config.read(words, sweep=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "counter", "stop"),
    [
        ([*ROUNDS, "rounds=budget", "budget.flops=3e9"], "round", 2),
        (["method=prompt_only", "search=budget", "search_texts=8", "budget.flops=1.2e10"], "candidate", 7),
    ],
)
def test_what_a_budget_ends_goes_on_after_an_interruption(tmp_path, words, counter, stop):
    """The same rows as a cell that never stopped, though the interruption came amid the spending."""
    from test_checkpoint import assert_same, stop_at

    spec = spec_of("task=language", *words)
    assert run_cell(spec, tmp_path / "quiet") == "done"
    assert run_cell(spec, tmp_path / "stopped", watch=stop_at(stop, counter), checkpoint_seconds=0) == "interrupted"
    assert run_cell(spec, tmp_path / "stopped") == "done"
    assert_same(RunFolder.of(tmp_path / "stopped", spec), RunFolder.of(tmp_path / "quiet", spec))
