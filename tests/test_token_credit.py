"""Credit for single tokens: returns-to-go, baselines by a loop, the critic, and TRL handed exactly that."""

from __future__ import annotations

import re

import pytest
import torch
from test_credit_alignment import WORDS, generator_of
from test_dpg import rewards_of_a_step

from dpgbench import config
from dpgbench.bench import grpo
from dpgbench.bench.flops import counted_flops, critic_features, critic_flops
from dpgbench.bench.grpo import train_policy
from dpgbench.bench.token_credit import Baseline, alive, discounted, returns_to_go, token_advantages
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry

# ---- baselines and advantages

LENGTHS = [3, 5, 1, 4, 2, 2, 5, 1, 1, 4, 4, 3]  # three groups of four


def some_returns(seed=0, scale=1.0):
    credit = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    ids = [list(range(1, length + 1)) for length in LENGTHS]
    return returns_to_go(credit * alive(ids, 5)), ids


def test_returns_to_go_by_hand():
    assert returns_to_go(torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])).tolist() == [[7.0, 6.0, 4.0], [3.0, 0.0, 0.0]]


def loop_baseline(returns, kind, row, t):
    """The mean over other completions with a token at t, of the prompt's or of all."""
    group = [other for other in range(12) if other // 4 == row // 4 and other != row and LENGTHS[other] > t]
    everybody = [other for other in range(12) if other != row and LENGTHS[other] > t]
    chosen = group if kind == "group" and group else everybody
    return sum(float(returns[other, t]) for other in chosen) / len(chosen) if chosen else 0.0


@pytest.mark.parametrize("kind", ["group", "position"])
def test_baselines_are_means_over_the_others(kind):
    returns, ids = some_returns()
    baseline = Baseline(kind, generator_of(WORDS), 4)(returns, ids)
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            assert float(baseline[row, t]) == pytest.approx(loop_baseline(returns, kind, row, t), rel=1e-12)
    alone = Baseline(kind, generator_of(WORDS), 1)(returns[:1], ids[:1])
    assert not alone.any(), "nobody to compare with"


@pytest.mark.parametrize("scaling", ["none", "batch", "group"])
def test_advantages_by_a_loop(scaling):
    returns, ids = some_returns()
    there, baseline = alive(ids, 5), Baseline("position", generator_of(WORDS), 4)(returns, ids)
    found = token_advantages(returns, baseline, there, 4, scaling)
    for row, length in enumerate(LENGTHS):
        rows = {"none": [], "batch": range(12), "group": range(row // 4 * 4, row // 4 * 4 + 4)}[scaling]
        values = [float(returns[r, t] - baseline[r, t]) for r in rows for t in range(LENGTHS[r])]
        mean = sum(values) / max(1, len(values))
        deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if values else 1.0
        for t in range(5):
            expected = float(returns[row, t] - baseline[row, t]) / deviation if t < length else 0.0
            assert float(found[row, t]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scaling", ["batch", "group"])
def test_rounding_is_no_signal(scaling):
    """Returns that are all one number up to the last bits have advantages of zero, not of one."""
    returns = torch.full((4, 2), 1e-6, dtype=torch.float64) * (1 + 1e-16 * torch.arange(8).view(4, 2))
    there = torch.ones(4, 2, dtype=torch.bool)
    assert not token_advantages(returns, returns.mean().expand(4, 2), there, 2, scaling).any()


@pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
def test_discounted_returns_by_a_double_loop(discount):
    credit = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = returns_to_go(discounted(credit, discount))
    for row in range(3):
        for t in range(5):
            wanted = sum(discount**k * float(credit[row, t + k]) for k in range(5 - t))  # Python has 0.0**0 = 1
            assert float(found[row, t]) == pytest.approx(wanted, abs=1e-14)
    if discount == 1:
        assert torch.equal(discounted(credit, 1.0), credit), "nothing is left out"


@pytest.mark.parametrize("method", ["dpg", "influence"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("credit=token discount=1.5", "method.discount=1.5: a share of what comes later, 0 to 1"),
        ("discount=0.5", "method.discount=0.5: what single tokens earn later; write method.credit=token with it"),
    ],
)
def test_a_discount_is_a_share_of_single_tokens_credit(method, options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        config.read([f"method={method}", *options.split()], sweep=False)


# ---- the critic


def features_by_hand(critic, ids, row, t, fares):
    codes, tokens = critic._codes, ids[row]
    zero = torch.zeros(codes.shape[1], dtype=torch.float64)
    mean = sum((codes[token] for token in tokens[:t]), zero) / max(1, t)
    place = torch.zeros(critic._places, dtype=torch.float64)
    place[t] = 1
    return torch.cat([place, codes[tokens[t - 1]] if t else zero, codes[tokens[t - 2]] if t > 1 else zero, mean, fares[row : row + 1]])


def mean_at(returns, t, rows):
    """Of the completions `rows` that are so long, 0 for none."""
    there = [float(returns[row, t]) for row in rows if LENGTHS[row] > t]
    return sum(there) / len(there) if there else 0.0


def test_the_critic_is_position_and_a_ridge_regression_on_the_other_half():
    """Two steps, fitted by a loop over tokens: what position leaves of half the prompts, by what the other half and faded earlier steps
    show."""
    critic = Baseline("critic", generator_of(WORDS, places=6), 4)
    size = critic_features(6, 5)
    past = [torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)]
    for step in range(2):
        returns, ids = some_returns(step, scale=1e-6)
        found = critic(returns, ids)
        totals = returns[:, 0]
        scale = float(((totals - totals.mean()) ** 2).mean() ** 0.5)
        others = [sum(float(totals[o]) for o in range(12) if o // 4 == row // 4 and o != row) / 3 for row in range(12)]
        fares = (torch.tensor(others, dtype=torch.float64) - totals.mean()) / scale
        x = {(row, t): features_by_hand(critic, ids, row, t, fares) for row in range(12) for t in range(LENGTHS[row])}
        new = [part.clone() for part in past]
        halves = [[row for row in range(12) if (row // 4) % 2 == half] for half in (0, 1)]
        left = {(row, t): float(returns[row, t]) - mean_at(returns, t, set(halves[(row // 4) % 2]) - {row}) for row, t in x}
        for half in (0, 1):
            products, targets = past[0].clone(), past[1].clone()
            for (row, t), features in x.items():
                if (row // 4) % 2 != half:
                    products += torch.outer(features, features)
                    targets += features * left[row, t] / scale
            fitted = torch.linalg.solve(
                products + (0.03 * products.diagonal().mean() + 1e-6) * torch.eye(size, dtype=torch.float64), targets
            )
            for (row, t), features in x.items():
                if (row // 4) % 2 == half:
                    position = mean_at(returns, t, set(range(12)) - {row})
                    assert float(found[row, t]) == pytest.approx(position + float(features @ fitted) * scale, rel=1e-7, abs=1e-12 * scale)
        for (row, t), features in x.items():
            new[0] += torch.outer(features, features)
            new[1] += features * left[row, t] / scale
        past = [0.7 * part for part in new]
        assert all(torch.allclose(mine, theirs) for mine, theirs in zip(past, critic.tensors().values(), strict=True))


def test_the_critic_does_not_see_what_it_judges():
    """Neither a completion's own returns, nor its token at t or a later one, move its baseline at t; those of the other half do move."""
    returns, ids = some_returns()
    before = Baseline("critic", generator_of(WORDS), 4)(returns, ids)
    for row, t, half in ((1, 2, [0, 2]), (6, 0, [1]), (11, 1, [0, 2])):
        changed, others = returns.clone(), [list(tokens) for tokens in ids]
        # the completion's own total is what its group's others are told of, and all are scaled by: kept
        changed[row, 1 : LENGTHS[row]] += 3.0
        others[row][t:] = [token + 7 for token in others[row][t:]]
        after = Baseline("critic", generator_of(WORDS), 4)(changed, others)
        assert torch.allclose(after[row, : t + 1], before[row, : t + 1], rtol=1e-10)
        moved = [group for group in range(3) if not torch.allclose(after[4 * group : 4 * group + 4], before[4 * group : 4 * group + 4])]
        assert set(moved) >= {0, 1, 2} - set(half), "what the others are judged by"


def test_the_critic_learns_what_a_token_promises():
    """Returns that hang on the token before: after one step of other prompts most of their variance is gone."""
    generator = generator_of(WORDS, places=6, width=24)
    critic, draw = Baseline("critic", generator, 4), torch.Generator().manual_seed(1)
    worth = torch.randn(len(WORDS), generator=draw, dtype=torch.float64)
    for _ in range(2):
        ids = torch.randint(1, 20, (256, 5), generator=draw)
        returns = torch.zeros(256, 5, dtype=torch.float64)
        returns[:, 1:] = worth[ids[:, :-1]]
        baseline = critic(returns, ids.tolist())
    assert float((returns - baseline)[:, 1:].var()) < 0.1 * float(returns[:, 1:].var())


def test_wide_embeddings_are_projected_by_a_named_seed():
    one, same, other = (Baseline("critic", generator_of(WORDS, width=80), 4, seed)._codes for seed in (0, 0, 1))
    assert one.shape == (len(WORDS), 64) and torch.equal(one, same) and not torch.equal(one, other)


def test_what_a_critic_costs():
    """Products as torch counts them, and beside them targets, predictions and two solves."""
    returns, ids = some_returns()
    critic = Baseline("critic", generator_of(WORDS, places=6), 4)
    _, counted = counted_flops(lambda: critic(returns, ids))
    tokens, size = sum(LENGTHS), critic_features(6, 5)
    assert counted == 2 * tokens * size**2, "the products; products with one vector it does not count"
    assert critic.flops == critic_flops(tokens, size) == 2 * tokens * size**2 + 4 * tokens * size + 4 / 3 * size**3


# ---- in a cell


@pytest.fixture
def tokens_used(monkeypatch):
    """What enters TRL's loss."""
    used, inner = [], grpo._Trainer._generate_and_score_completions

    def spy(self, inputs):
        output = inner(self, inputs)
        used.append((output["advantages"].clone(), output["completion_mask"].clone()))
        return output

    monkeypatch.setattr(grpo._Trainer, "_generate_and_score_completions", spy)
    return used


@pytest.mark.parametrize(("baseline", "scaling", "steps"), [("group", "none", 1), ("position", "batch", 1), ("critic", "group", 2)])
def test_trl_multiplies_each_token_by_its_own(bench, tokens_used, baseline, scaling, steps):
    """What TRL's loss is handed is `token_advantages` of the reward's credit, and a line tells sums and means per text."""
    work, seen = bench(f"scale_advantages={scaling}", f"steps={steps}"), []

    def credit(rollouts):
        generator = torch.Generator().manual_seed(rollouts.step)
        width = max(map(len, rollouts.completion_ids))
        values = torch.randn(16, width, generator=generator, dtype=torch.float64) * alive(rollouts.completion_ids, width)
        seen.append((values, rollouts.completion_ids))
        return values

    oracle = Baseline(baseline, work.generator, 4, work.seed("baseline"))
    for _ in train_policy(work, credit, baseline=baseline):
        pass
    for (values, ids), (used, mask), line in zip(seen, tokens_used, work.lines, strict=True):
        there, returns = alive(ids, values.shape[1]), returns_to_go(values)
        expected = token_advantages(returns, oracle(returns, ids), there, 4, scaling)
        assert torch.allclose(used, expected, rtol=1e-6, atol=0) and torch.equal(mask.bool(), there) and not used[~there].any()
        assert line["rollouts"]["rewards"] == pytest.approx(values.sum(1).tolist())
        means = [float(row[: len(tokens)].mean()) for row, tokens in zip(expected, ids, strict=True)]
        assert line["rollouts"]["advantages"] == pytest.approx(means, rel=1e-4, abs=1e-6)
        assert line["groups_without_signal"] == 0 and line["unexplained"] > 0
    tokens = [sum(map(len, ids)) for _, ids in seen]
    size = critic_features(20, 64)
    expected = {"critic": pytest.approx(sum(critic_flops(count, size) for count in tokens))} if baseline == "critic" else {}
    assert {phase: spent for phase, spent in work.meter.flops.items() if phase == "critic"} == expected


def test_a_policy_learns_from_credit_for_single_tokens(bench):
    """Paid for each "e" in the token that has it: there are more of them after a few steps."""
    work = bench("steps=4", "policy.lr=2e-2", "completions=32", "scale_advantages=batch", "seed=3")
    found = []

    def credit(rollouts):
        spelled = [[work.generator.tokenizer.decode([token]).count("e") for token in ids] for ids in rollouts.completion_ids]
        found.append(sum(map(sum, spelled)) / sum(map(len, spelled)))
        width = max(map(len, spelled))
        return torch.tensor([row + [0] * (width - len(row)) for row in spelled], dtype=torch.float64)

    for _ in train_policy(work, credit, baseline="position"):
        pass
    assert found[-1] > 1.3 * found[0]


@pytest.mark.parametrize("words", [["cross_group=false"], ["inner_optimizer=sgd", "inner_lr=0.1", "inner_steps=2"]])
def test_dpg_pays_the_credit_of_its_own_training(bench, words):
    """Under the ablations too: the texts' sums in the record are the metagradients of whole texts that credit=text pays."""
    work = bench("task=l2_norm", "method=dpg_token", *words)
    texts, sums = rewards_of_a_step(work)
    if work.options.cross_group:
        whole = work.metagradients(texts, 0, 0, optimizer="sgd", lr=0.1).rewards
    else:
        whole = torch.stack([work.metagradients(texts[k::4], 0, k).rewards for k in range(4)], dim=1).flatten()
    assert float((sums - whole.double()).abs().max() / whole.abs().max()) < 1e-4  # float32


@pytest.mark.parametrize("words", [["baseline=position"], ["estimator=ekfac", "influence_texts=16", "baseline=critic"]])
def test_influence_pays_each_token_what_it_and_later_ones_do_along_the_direction(bench, words):
    """The sums are what credit=text pays. Exact: the return-to-go of a token is the text's influence less that of the text whose labels
    from that token on are taken away, by a backward pass for each."""
    work = bench("task=l2_norm", "method=influence", "credit=token", *words)
    work.world.target.double()
    method = Registry().load("method", "influence")(work.options)
    torch.manual_seed(0)
    ids = work.generator.write(work.generator.token_ids(work.prompts(6, "a test")))
    texts = work.generator.texts_of(ids)
    paid = method.rewards(work, grpo.Rollouts(0, [], texts, ids))
    judging = method._prepared(work)
    assert torch.allclose(paid.sum(1), work.influences(texts, **judging), rtol=1e-9, atol=0)
    target, encoded = work.world.target, work.world.encode(texts)
    weight = target.lm_head.weight
    (along,) = judging.get("direction", {"": torch.autograd.grad(work.task.signal(target), weight)[0]}).values()

    def influence(row, labels):
        loss = loss_by_hand(target, encoded["input_ids"][row], labels)
        return -float((torch.autograd.grad(loss, weight)[0] * along).sum())

    returns = returns_to_go(paid)
    for row in (0, 3):
        labels = encoded["labels"][row]
        for t in range(len(ids[row])):
            tail = torch.arange(len(labels)) > t  # the target adds <s> in front: token t is label t + 1
            expected = influence(row, labels) - (influence(row, labels.masked_fill(tail, -100)) if t else 0.0)
            assert float(returns[row, t]) == pytest.approx(expected, rel=1e-8, abs=1e-10 * float(paid.abs().max()))


def loss_by_hand(target, ids_L, labels_L):
    """Cross-entropies over L - 1, from plain logits."""
    logps = target(input_ids=ids_L[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    real = labels_L[1:] != -100
    return -logps[real].gather(1, labels_L[1:][real][:, None]).sum() / (len(labels_L) - 1)


# ---- options


def spec_of(*words):
    return config.read(["task=l2_norm", *words], sweep=False).cells[0].spec


def test_a_cell_of_before_keeps_its_hash():
    """credit=text is what there was: the hash of a stored cell without the option. The preset is the option and its best baseline."""
    plain = spec_of("method=dpg")
    method = {name: value for name, value in plain.config["method"].items() if name not in ("credit", "baseline")}
    assert RunSpec({**plain.config, "method": method}).hash == plain.hash == spec_of("method=dpg", "credit=text").hash
    influence = spec_of("method=influence_ekfac")
    method = {name: value for name, value in influence.config["method"].items() if name not in ("credit", "baseline")}
    assert RunSpec({**influence.config, "method": method}).hash == influence.hash != spec_of("method=influence_ekfac", "credit=token").hash
    hashes = {spec_of("method=dpg", "credit=token", f"baseline={baseline}").hash for baseline in ("group", "position", "critic")}
    assert len(hashes | {plain.hash}) == 4 and spec_of("method=dpg_token").hash in hashes


@pytest.mark.parametrize("method", ["dpg", "influence"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["credit=tokens"], "method.credit=tokens: no such credit; did you mean 'token'? choose from: text, token"),
        (
            ["credit=token", "baseline=critics"],
            "method.baseline=critics: no such baseline; did you mean 'critic'? choose from: critic, group, position",
        ),
        (["baseline=critic"], "method.baseline=critic: a baseline of single tokens; write method.credit=token with it"),
    ],
)
def test_bad_options_are_one_line(method, words, message):
    with pytest.raises(UserError) as caught:
        spec_of(f"method={method}", *words)
    assert str(caught.value) == message


@pytest.mark.parametrize("estimator", ["adam", "less"])
def test_an_influence_that_is_no_sum_over_tokens_is_refused(estimator):
    with pytest.raises(UserError) as caught:
        spec_of(f"method=influence_{estimator}", "credit=token")
    why = "it divides by moments that later tokens change, so no token's credit is its own"
    assert str(caught.value) == f"method.credit=token with estimator={estimator}: {why}; write estimator=dot or ekfac with it"


@pytest.mark.parametrize("method", ["dpg", "influence"])
def test_a_loss_that_is_not_causal_is_refused(bench, method):
    work = bench("task=l2_norm", f"method={method}", "credit=token", "reduction=tokens")
    with pytest.raises(UserError, match=r"method.credit=token with training.reduction=tokens: .*; write training.reduction=length"):
        next(Registry().load("method", method)(work.options).run(work))
    assert not work.meter.total_flops
