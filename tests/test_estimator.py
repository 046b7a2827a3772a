"""`check estimator`: exact effects by retraining, policy gradients by hand and by TRL, an enumeration that holds all of it."""

from __future__ import annotations

import importlib.util
import itertools
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_metagrad import held_out
from test_training import tiny_batch, tiny_gpt2
from torch import nn

from dpgbench import config
from dpgbench.bench import policy_gradient
from dpgbench.bench.fidelity import Worth, exact_effects
from dpgbench.bench.grpo import advantages, train_policy
from dpgbench.bench.policy_gradient import UNDIVIDED, Completions, draw_completions, policy_gradients, sketch
from dpgbench.bench.workbench import Workbench
from dpgbench.config.measured_together import usual_counts
from dpgbench.metagrad import metagradients
from dpgbench.metagrad.leave_one_out import LeaveOneOut
from dpgbench.metagrad.training import SGD, AdamW, loaded, train
from dpgbench.plugins.registry import Registry
from dpgbench.run.check_estimator import Findings, Measured, MethodFindings, _Bench, _Shared
from dpgbench.run.open_cell import open_cell
from dpgbench.stats.estimator import Estimate, Pairs, cosine, jackknife, relative_bias, signal_to_noise, squared_mean

# ---------------------------------------------------------------- exact effects


@pytest.mark.parametrize("optimizer", [SGD(0.3), AdamW(0.01, eps_root=1e-5)])
def test_an_effect_is_that_of_training_with_weight_0(optimizer):
    """Three steps, a text of each: the same as training from phi_0 with that weight 0 and the divisor kept."""
    model, batches = tiny_gpt2(), [tiny_batch(4, seed=step) for step in range(3)]

    def phi(weights):
        with torch.no_grad(), loaded(model, train(model, batches, optimizer, weights=weights)):
            return float(held_out(model))

    run, ones = LeaveOneOut(model, batches, held_out, optimizer), torch.ones(12, dtype=torch.float64)
    assert run.value == pytest.approx(phi(ones), rel=1e-12)
    for index in (1, 6, 11):
        weights = ones.clone()
        weights[index] = 0
        assert run.effect(index) == pytest.approx(phi(ones) - phi(weights), rel=1e-8)


def test_effects_are_in_the_texts_order_and_in_float64():
    """Dealt into two batches in another order, and from a float32 target."""
    model, batch, order = tiny_gpt2().float(), tiny_batch(6), torch.tensor([4, 1, 5, 0, 2, 3])
    batches = [{name: tensor[part] for name, tensor in batch.items()} for part in order.chunk(2)]
    found = exact_effects(model, batches, order, held_out, SGD(0.3), [5, 0])
    run = LeaveOneOut(tiny_gpt2().float().double(), batches, held_out, SGD(0.3))
    assert found == {5: pytest.approx(run.effect(2), rel=1e-12), 0: pytest.approx(run.effect(3), rel=1e-12)}


# ---------------------------------------------------------------- policy gradients


def by_hand(work, drawn, per_token, divisor):
    """Text after text, unpadded: sum_i sum_t A_it / divisor_i grad log pi(x_it)."""
    model = work.generator.model.eval()
    total = 0
    for prompt, ids, paid, over in zip(work.generator.token_ids(drawn.prompts), drawn.ids, per_token, divisor, strict=True):
        tokens = torch.tensor([[*prompt, *ids]])
        logps = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[-len(ids) :, 0]
        total = total + (logps * paid[: len(ids)]).sum() / over
    return torch.cat([part.flatten() for part in torch.autograd.grad(total, list(model.parameters()))]).double()


def test_policy_gradients_by_hand(bench):
    """Every loss type's divisor, one advantage a text and one a token; padding, passes and company change nothing."""
    work = bench("task=l2_norm", "completions=8", "group_size=4")
    drawn = draw_completions(work, 0)
    lengths = [len(ids) for ids in drawn.ids]
    assert len(set(lengths)) > 1, "texts of one length need no padding, and the test says nothing"
    one = torch.randn(8, generator=torch.Generator().manual_seed(0))
    each = torch.randn(8, max(lengths), generator=torch.Generator().manual_seed(1))
    wide = one[:, None].expand(8, max(lengths))
    divisors = {
        "dapo": [sum(lengths)] * 8, "bnpo": [sum(lengths)] * 8, "grpo": [8 * length for length in lengths],
        "dr_grpo": [8 * work.generator.max_completion_tokens] * 8, UNDIVIDED: [1] * 8,
    }  # fmt: skip
    found = policy_gradients(work.generator, drawn, [(one, name) for name in divisors] + [(each, "grpo"), (wide, "dapo")], at_once=3)
    for gradient, divisor in zip(found, divisors.values(), strict=False):
        assert torch.allclose(gradient, by_hand(work, drawn, wide, divisor), rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-9)
    assert torch.allclose(found[5], by_hand(work, drawn, each, divisors["grpo"]), rtol=1e-3, atol=1e-5 * float(found[5].abs().max()))
    assert torch.equal(found[6], found[0])
    (rows,) = policy_gradients(work.generator, drawn.only([1, 6]), [(one[[1, 6]], UNDIVIDED)])
    masked = torch.where(torch.arange(8) % 5 == 1, one, 0.0)
    assert torch.allclose(rows, policy_gradients(work.generator, drawn, [(masked, UNDIVIDED)])[0], atol=1e-5 * float(rows.abs().max()))
    again, twice = drawn.only([2, 5, 2, 2]), one[[2, 5, 0, 1]]  # a prompt's completion several times, each paid its own
    (summed,) = policy_gradients(work.generator, again, [(twice, "grpo")])
    expected = by_hand(work, again, twice[:, None].expand(4, max(lengths)), [4 * lengths[row] for row in (2, 5, 2, 2)])
    assert torch.allclose(summed, expected, rtol=1e-3, atol=1e-5 * float(summed.abs().max()))
    with pytest.raises(ValueError, match="loss_type='sapo': its gradient is not written down here; pass one of dapo,"):
        policy_gradients(work.generator, drawn, [(one, "sapo")])
    with pytest.raises(ValueError, match=r"shape \(7,\): it must be \(8,\)"):
        policy_gradients(work.generator, drawn, [(one[:7], "dapo")])


IN_PARTS = ("rollout_batch=8", "minibatch=8", "loss_type=grpo")


@pytest.mark.parametrize("words", [pytest.param((), id="whole"), pytest.param(IN_PARTS, id="in parts", marks=pytest.mark.slow)])
def test_it_is_the_gradient_that_trl_follows(bench, words):
    """The first step of a run: the same texts, and TRL's own norm of its gradient."""
    work, seen = bench("task=l2_norm", "steps=1", *words), []
    drawn = draw_completions(work, 0)
    rewards = [float(len(text)) for text in drawn.texts]
    paid = advantages(torch.tensor(rewards), 4, work.options.policy.scale_advantages)
    (gradient,) = policy_gradients(work.generator, drawn, [(paid, work.options.policy.loss_type)])

    def lengths(rollouts):
        seen.extend(rollouts.completions)
        return rewards

    for _ in train_policy(work, lengths):
        pass
    assert seen == drawn.texts and rewards != [rewards[0]] * 16
    if not words:  # mini-batches are parts of this gradient
        assert work.lines[-1]["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_sketched_products_are_right_on_average(monkeypatch):
    """1,000 entries in 64; a gradient that fits is left alone."""
    monkeypatch.setattr(policy_gradient, "SKETCH", 64)
    left, right = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = right + 0.2 * left
    products = torch.stack([sketch(left, seed) @ sketch(right, seed) for seed in range(600)])
    assert abs(float(products.mean() - left @ right)) < 4 * float(products.std()) / 600**0.5
    assert float(products.std()) < 2 * float(left.norm() * right.norm()) / 64**0.5
    assert torch.equal(sketch(left[:64], 3), left[:64])


# ---------------------------------------------------------------- what methods share


def test_methods_share_metagradients_and_a_repeated_text_is_judged_once(monkeypatch):
    """To rounding what a method's own bench says of the same texts, T=2: of texts and of tokens from one reverse pass, of other training
    from another; influences in the texts' order."""
    words = ["task=l2_norm", "method=dpg", "completions=8", "group_size=4", "inner_steps=2"]
    spec = config.read(words, sweep=False).cells[0].spec
    cell, shared, calls = open_cell(spec, Registry()), _Shared(), []
    one, other = _Bench(spec, cell, shared), _Bench(spec, cell, shared)
    texts = draw_completions(one, 0).texts
    texts[5] = texts[1]

    inner, asked = Workbench.metagradients, ({}, {"per_token": True}, {"lr": 0.1})
    expected = [inner(one, texts, 0, 0, **how).rewards for how in asked]
    monkeypatch.setattr(Workbench, "metagradients", lambda self, *args, **how: calls.append(how) or inner(self, *args, **how))
    found = [bench.metagradients(texts, 0, 0, **how).rewards for bench, how in zip((one, other, other), asked, strict=True)]
    assert len(calls) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    judged, judge = [], one._judged
    monkeypatch.setattr(one, "_judged", lambda of, **how: judged.append(of) or judge(of, **how))
    for how in ({}, {"optimizer_aware": True}, {"per_token": True}):
        theirs = judge(texts, **how)
        assert torch.allclose(one.influences(texts, **how), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert len(judged) == 3 and all(len(of) == len(set(texts)) < 8 for of in judged)


# ---------------------------------------------------------------- statistics with known answers


def test_products_of_different_batches_by_a_loop():
    gradients = np.random.default_rng(0).normal(size=(5, 7))
    loop = [gradients[i] @ gradients[j] for i in range(5) for j in range(5) if i != j]
    assert squared_mean(gradients @ gradients.T) == pytest.approx(np.mean(loop))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.array([1.0, 4.0, 2.0, 7.0])
    found = jackknife(lambda kept: float(values[kept].mean()), 4)
    assert (found.value, found.error) == (3.5, pytest.approx(values.std(ddof=1) / 2))
    with pytest.raises(ValueError, match="2 batches: an error bar needs 3 or more"):
        jackknife(lambda kept: 0.0, 2)


def test_ratios_of_gaussians_are_found_within_their_errors():
    """SNR = |m|^2 / (D s^2), the angle and the bias of means that are known: right on average, and their errors are the spread's."""
    draw, size, batches, repetitions = np.random.default_rng(1), 20, 16, 300
    mean, other = np.zeros(size), np.zeros(size)
    mean[:2], other[:2] = (3.0, 0.0), (3.0, 1.5)
    found = {"snr": [], "cosine": [], "bias": []}
    for _ in range(repetitions):
        noise = draw.normal(size=(batches, size))
        g, r = mean + noise, other + 0.5 * noise + 0.5 * draw.normal(size=(batches, size))
        found["snr"].append(signal_to_noise(g @ g.T))
        found["cosine"].append(cosine(g @ g.T, g @ r.T, r @ r.T))
        found["bias"].append(relative_bias((g - r) @ (g - r).T, r @ r.T))
    truth = {"snr": 9 / size, "cosine": 3 / 11.25**0.5, "bias": 1.5**2 / 11.25}
    for name, estimates in found.items():
        values, errors = (np.array([getattr(estimate, part) for estimate in estimates]) for part in ("value", "error"))
        assert values.mean() == pytest.approx(truth[name], abs=4 * values.std() / repetitions**0.5 + 0.02 * truth[name]), name
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.3), name
        assert np.mean(np.abs(values - truth[name]) < 2 * errors) > 0.85, name


def test_without_a_signal_there_is_no_angle():
    noise = np.random.default_rng(2).normal(size=(8, 50))
    products = noise @ noise.T
    assert not signal_to_noise(products).resolved and abs(signal_to_noise(products).value) < 0.1
    assert np.isnan(cosine(products, products, products).value) and np.isnan(relative_bias(products, products).value)


def test_pairs_by_hand():
    """effect = 1 + 2 reward on three batches; and errors of +1, +1, +1, -1: a quarter of E d^2 is common, less the mean's own variance."""
    reward, batch = np.array([0.0, 1.0, 2.0, 4.0, 5.0, 7.0]), np.array([0, 0, 1, 1, 2, 2])
    line = Pairs(reward, 1 + 2 * reward, batch)
    assert line.pearson().value == pytest.approx(1) and line.slope().value == pytest.approx(2) and line.slope().error < 1e-9
    error = np.array([1.0, 1.0, 1.0, -1.0])
    share = Pairs(reward[:4], reward[:4] - error, np.array([0, 1, 2, 3])).bias_share().value
    assert share == pytest.approx(0.25 - 1 / 4)  # the errors' sample variance is 1
    assert Pairs(reward, reward - 1, batch).bias_share().value == pytest.approx(1)


# ---------------------------------------------------------------- the whole measurement against an enumeration

TEXTS, SIZE = 4, 3  # texts to choose from, texts in a dataset: 64 datasets


class Table(nn.Module):
    """A policy that writes one of TEXTS one-token texts, whatever it is asked: pi = softmax of its parameters."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores, dtype=torch.float64))
        self.device = torch.device("cpu")

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, attention_mask, use_cache=False):
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, TEXTS))


@pytest.fixture(scope="module")
def enumerated():
    """Every dataset: its probability, its texts' metagradients and exact effects; grad E Phi; and a generator of the policy."""
    model, pool, optimizer = tiny_gpt2(), tiny_batch(TEXTS, seed=3, padded=False), AdamW(0.05, eps_root=1e-4)
    policy = Table([0.3, -0.2, 0.5, 0.0])
    log_pi, worths, objective = policy.scores.log_softmax(0), {}, 0.0
    for chosen in itertools.product(range(TEXTS), repeat=SIZE):
        batch = {name: tensor[list(chosen)] for name, tensor in pool.items()}
        run = LeaveOneOut(model, [batch], held_out, optimizer)
        tau = metagradients(model, [batch], held_out, optimizer).rewards
        worths[chosen] = Worth(tau, {index: run.effect(index) for index in range(SIZE)})
        objective = objective + log_pi[list(chosen)].sum().exp() * run.value
    (exact,) = torch.autograd.grad(objective, policy.scores)
    asked = {"input_ids": torch.zeros(SIZE, 1, dtype=torch.long), "attention_mask": torch.ones(SIZE, 1, dtype=torch.long)}
    generator = SimpleNamespace(
        model=policy, tokenizer=SimpleNamespace(pad_token_id=0), max_completion_tokens=1, products=nullcontext,
        tokenize=lambda prompts: {name: tensor[: len(prompts)] for name, tensor in asked.items()},
    )  # fmt: skip
    return worths, exact, generator


def gradient_of(generator, chosen, paid):
    written = Completions([""] * len(chosen), [[text] for text in chosen], [""] * len(chosen))
    return policy_gradients(generator, written, [(paid, UNDIVIDED)])[0]


def means(enumerated):
    """E g of what is paid in effects, in metagradients, and in metagradients that a single drawn text corrects."""
    worths, _, generator = enumerated
    pi = generator.model.scores.detach().softmax(0)
    by_effect = by_tau = corrected = 0.0
    for chosen, worth in worths.items():
        probability = float(pi[list(chosen)].prod())
        effects = torch.tensor([worth.effects[index] for index in range(SIZE)])
        by_effect = by_effect + probability * gradient_of(generator, chosen, effects)
        by_tau = by_tau + probability * gradient_of(generator, chosen, worth.metagradients)
        for index in range(SIZE):
            tau, error = Worth(worth.metagradients, {index: worth.effects[index]}).split_advantages(0.01)
            corrected = corrected + probability / SIZE * gradient_of(generator, chosen, tau - error)
    return by_effect, by_tau, corrected


@pytest.mark.slow
def test_leave_one_out_is_unbiased_and_so_is_the_correction_by_one_text(enumerated):
    """Both means are the derivative of E Phi, although metagradients alone are visibly not."""
    by_effect, by_tau, corrected = means(enumerated)
    exact = enumerated[1]
    assert torch.allclose(by_effect, exact, rtol=0, atol=1e-6 * float(exact.norm()))
    assert torch.allclose(corrected, exact, rtol=0, atol=1e-6 * float(exact.norm()))
    assert float((by_tau - exact).norm() / exact.norm()) > 0.05


@pytest.mark.slow
def test_the_measurement_finds_what_the_enumeration_says(enumerated):
    """Sampled batches through the functions that the check uses: signal to noise, cosine and bias within four standard errors."""
    worths, exact, generator = enumerated
    _, mean_by_tau, _ = means(enumerated)
    pi, draw = generator.model.scores.detach().softmax(0), torch.Generator().manual_seed(0)
    measured = Measured()
    for _ in range(300):
        chosen = tuple(torch.multinomial(pi, SIZE, replacement=True, generator=draw).tolist())
        worth, index = worths[chosen], int(torch.randint(SIZE, (1,), generator=draw))
        worth = Worth(worth.metagradients, {index: worth.effects[index]})
        by_tau, error = (gradient_of(generator, chosen, part) for part in worth.split_advantages(0.0))
        measured.add(worth, {"by tau": worth.metagradients}, by_tau, error, {"by tau": by_tau})
    found = measured.findings(SIZE, 1)
    (method,) = found.methods

    second = sum(
        float(pi[list(chosen)].prod()) * float(gradient_of(generator, chosen, worth.metagradients).square().sum())
        for chosen, worth in worths.items()
    )
    signal = float(mean_by_tau.square().sum())
    truth = {
        method.snr: signal / (second - signal),
        method.cosine: float(mean_by_tau @ exact / mean_by_tau.norm() / exact.norm()),
        found.gradient_bias: float((mean_by_tau - exact).square().sum() / exact.square().sum()),
    }
    for estimate, value in truth.items():
        assert abs(estimate.value - value) < 4 * estimate.error, (estimate, value)
        assert 0 < estimate.error < 0.5 * max(value, 0.5)


# ---------------------------------------------------------------- the verdict and the command

SURE = Estimate(0.99, 0.001)
GOOD = Findings(
    16, 1, 4, 8, SURE, Estimate(1.0, 0.01), SURE, SURE, (MethodFindings("dpg", SURE, Estimate(0.5, 0.1), SURE, 16),),
    Pairs(np.array([1.0]), np.array([1.0]), np.array([0])),
)  # fmt: skip


@pytest.mark.parametrize(
    "change, answer, words",
    [
        ({}, "trust", ""),
        ({"pearson": Estimate(0.9, 0.01)}, "with care", "only roughly (correlation 0.900, slope 1.00): lower training.lr"),
        ({"pearson": Estimate(0.96, 0.05)}, "with care", "known only to 0.10: measure more, texts=16"),
        ({"pearson": Estimate(0.6, 0.01)}, "no", "says little"),
        ({"pearson": Estimate(float("nan"), float("nan"))}, "no", "says little"),
        ({"slope": Estimate(0.4, 0.01)}, "no", "slope 0.40"), ({"slope": Estimate(2.5, 0.01)}, "no", "slope 2.50"),
    ],
)  # fmt: skip
def test_verdicts(change, answer, words):
    said, reasons = replace(GOOD, **change).verdict
    assert said == answer and words in "; ".join(reasons)


def test_texts_for_a_signal_as_large_as_the_noise():
    """32 texts at SNR 1/2 for batches of 16; nothing is said where no signal was resolved, but what it is at least."""
    (method,) = GOOD.methods
    assert method.texts_for_snr_1 == 32
    unresolved = replace(method, snr=Estimate(0.1, 0.1))
    assert np.isnan(unresolved.texts_for_snr_1) and unresolved.fewest_texts == pytest.approx(16 / 0.3)


CELL = "task=l2_norm completions=16 group_size=4 batches=3 texts=6"


OWN = '''\
"""Pays every text its length."""

from functools import partial

from dpgbench.api import Method


class Mine(Method):
    def run(self, bench):
        from dpgbench.bench.grpo import train_policy

        yield from train_policy(bench, partial(self.rewards, bench))

    def rewards(self, bench, rollouts):
        return [float(len(text)) for text in rollouts.completions{cut}]
'''


def own_method(folder, cut=""):
    for part in ("methods", "configs/method"):
        (folder / part).mkdir(parents=True)
    (folder / "methods" / "mine.py").write_text(OWN.format(cut=cut))
    (folder / "configs" / "method" / "mine.yaml").write_text("name: mine\npolicy: ${policy}\n")
    return f"plugins={folder}"


def test_the_command_measures_and_keeps_numbers_and_a_figure(dpgbench, tmp_path):
    """Two methods on a small cell: a table, a verdict, and beside each other the figure and the same numbers. In JSON, and next to a
    method of one's own, of which the harness says no word, each method's numbers are the same but for rounding."""
    done = dpgbench("check", "estimator", *CELL.split(), "method=dpg,dpg_token", f"results={tmp_path}")
    assert done.code in (0, 1), done.err
    assert "l2_norm, scale tiny, seed 0: 3 batches of 16 texts, T=1; 6 of them left out in turn" in done.out
    assert "Can a metagradient stand for a text's effect here? " in done.out
    (figure,) = (tmp_path / "checks").glob("estimator.l2_norm.s0.*.png")
    kept = json.loads(figure.with_suffix(".json").read_text())
    assert figure.read_bytes().startswith(b"\x89PNG") and f"figure: {figure}" in done.out
    assert [method["label"] for method in kept["methods"]] == ["dpg", "dpg_token"] and len(kept["pairs"]["leave_one_out"]) == 6
    dpg, by_token = kept["methods"]
    assert by_token["pearson"]["value"] == pytest.approx(dpg["pearson"]["value"], rel=1e-4), "tokens' credit sums to the text's"
    assert by_token["snr"]["value"] != pytest.approx(dpg["snr"]["value"], rel=1e-2), "and is paid to single tokens"
    assert dpg["pearson"]["value"] == pytest.approx(kept["pearson"]["value"], abs=1e-9), "the method trains on the metagradients"
    own = own_method(tmp_path / "own")
    other = dpgbench("check", "estimator", *CELL.split(), "method=mine,dpg", own, f"results={tmp_path}", "--format", "json")
    said = json.loads(other.out)
    assert [method["label"] for method in said["methods"]] == ["mine", "dpg"]
    assert said["pairs"]["leave_one_out"] == kept["pairs"]["leave_one_out"]
    for found in ("pearson", "snr"):  # to rounding: whichever method asks first has its metagradients counted, pads and all
        assert said["methods"][1][found]["value"] == pytest.approx(dpg[found]["value"], rel=1e-4)


@pytest.mark.slow
def test_an_exported_generator_is_measured(dpgbench, finished, tmp_path):
    """Another policy than the untrained one, so other completions and other numbers."""
    (cell,) = (finished / "runs").glob("l2_norm.dpg.s0.*")
    assert dpgbench("export", str(cell), f"to={tmp_path / 'mine'}").code == 0
    words = ("check", "estimator", *CELL.split(), "method=dpg", f"results={tmp_path}", "--format=json")
    before, after = dpgbench(*words), dpgbench(*words, f"scale.generator={tmp_path / 'mine' / 'generator'}")
    assert after.code in (0, 1), after.err
    assert json.loads(after.out)["pairs"] != json.loads(before.out)["pairs"]


def test_rewards_of_another_count_are_one_line(dpgbench, tmp_path):
    done = dpgbench("check", "estimator", *CELL.split(), "method=mine", own_method(tmp_path, "[1:]"), f"results={tmp_path}")
    assert done.code == 2 and "mine.py: rewards returned shape (15,) for 16 completions" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        ("batches=2", "batches=2: an error bar needs 3 or more; write batches=12"),
        ("texts=some", "texts=some: an error bar needs 3 or more"),
        ("batches=8 texts=4", "texts=4: from one text of each of the 8 batches to all 400; write texts=32"),
        ("method=base", "method=base: says no rewards that a policy is trained with"),
        ("method=dpg seed=0,1", "one task and one seed at a time"),
        ("method=dpg policy.lr=1e-3,2e-3", "method=dpg: named 2 times"),
        ("method=dpg,naive completions=16,32", "policy.completions=32: dpg has 16, and all are measured on the same texts"),
        ("method=dpg loss_type=sapo", "policy.loss_type=sapo: its gradient is not known here"),
        ("task=l2_norm method=langid", "l2_norm has no references"),
    ],
)
def test_bad_input_is_one_line(dpgbench, words, said):
    done = dpgbench("check", "estimator", *words.split())
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_many_methods_share_the_time(dpgbench, tmp_path):
    """Three methods have 8 batches where nothing is said, and are told so; the user's own counts stand without a word."""
    small, methods = ("task=l2_norm", "completions=8", "group_size=4", f"results={tmp_path}"), "method=dpg,dpg_nocross,influence"
    done = dpgbench("check", "estimator", *small, methods)
    assert "8 batches of 8 texts, T=1; 32 of them left out" in done.out
    assert "8 batches, because 3 methods share the time; batches=12 texts=48 measures as much as for one." in done.out
    assert "share the time" not in dpgbench("check", "estimator", *small, methods, "batches=3", "texts=3").out
    assert usual_counts(2) == {"batches": 12, "texts": 48}


def test_the_page_shows_the_kept_numbers():
    """docs/estimator.md has the tables that benchmarks/estimators.py makes of results/estimators, line for line; no task is left out."""
    where = importlib.util.spec_from_file_location("estimators", ROOT / "benchmarks" / "estimators.py")
    benchmark = importlib.util.module_from_spec(where)
    where.loader.exec_module(benchmark)
    lines = benchmark.table(ROOT / "results" / "estimators", list(benchmark.COUNTS))
    assert sum(line.startswith("| `") and "|  |" not in line for line in lines) == 4 * 8
    assert "\n".join(lines) in (ROOT / "docs" / "estimator.md").read_text(encoding="utf-8")


def test_bad_input_is_refused_without_torch(imports_of):
    assert "torch" not in imports_of("check", "estimator", "method=base")
