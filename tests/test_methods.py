"""What each method computes, against a value known some other way; that it runs on every task is test_tasks_and_methods."""

from __future__ import annotations

import pytest
import torch

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry


def linear(model):
    """A metric that is linear in all parameters, so that its gradient is the same wherever it is taken."""
    generator = torch.Generator().manual_seed(0)
    slopes = {name: torch.randn(p.shape, generator=generator).to(p) for name, p in model.named_parameters()}
    return lambda model: 1e-3 * sum((p * slopes[name]).sum() for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["method=influence", "estimator=dots"],
            "method.estimator=dots: no such estimator; did you mean 'dot'? choose from: adam, dot, ekfac, less",
        ),
        (["method=influence_ekfac", "damping=0"], "method.damping=0.0: without damping G has no inverse; write damping=0.1"),
        (
            ["method=influence_less", "warmup_steps=7"],
            "method.warmup_steps=7: 1 or more, and must divide influence_texts=512; write warmup_steps=1, say",
        ),
        (
            ["method=influence_ekfac", "influence_texts=0"],
            "method.influence_texts=0: less and ekfac learn from a text or more; write influence_texts=512",
        ),
        (
            ["method=naive", "target_lr=0"],
            "method.target_lr=0: a learning rate is positive; write method.target_lr=1e-3, or null for training.lr",
        ),
        (["method=prompt_only", "search=0"], "method.search=0: at least the hint is tried; write search=1 for it alone"),
        (["method=prompt_only", "search_texts=0"], "method.search_texts=0: a target needs a text or more; write search_texts=64"),
        (
            ["method=naive", "datasets=3", "group_size=4"],
            "method.datasets=3: 2 or more, and must divide policy.group_size=4; write datasets=null for 4, or raise group_size",
        ),
    ],
)
def test_bad_options_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        config.read(words, sweep=False)
    assert str(caught.value) == message


# ---- influence


def test_dot_is_the_metagradient_of_one_sgd_step(bench):
    """T=1, SGD, a linear metric: tau_i = (lr / N) <-grad l_i, grad Phi>, for the same texts."""
    work = bench("task=l2_norm", "optimizer=sgd", "training.lr=0.1", "inner_steps=1")
    work.task.signal = linear(work.world.target.double())
    texts = work.sample(work.prompts(12, "a test"), "a test")
    dots, exact = work.influences(texts), work.metagradients(texts).rewards
    assert dots.std() > 0 and torch.allclose(exact, dots * 0.1 / 12, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    aware = work.influences(texts, optimizer_aware=True)
    assert torch.allclose(aware, dots * 0.1, rtol=1e-6, atol=1e-6 * aware.abs().max().item())


def test_dot_without_forward_mode_is_the_same(bench, monkeypatch):
    """A model whose forward mode is found wanting gets the same numbers from each text's own gradient."""
    from dpgbench.metagrad import derivatives

    work = bench("task=language")
    texts = work.sample(work.prompts(6, "a test"), "a test")
    usual = work.influences(texts)
    monkeypatch.setattr(derivatives, "forward_mode_fault", lambda *arguments, **named: "no forward mode")
    monkeypatch.setattr(derivatives, "reverse_over_forward", None)
    assert torch.allclose(work.influences(texts), usual, rtol=1e-4, atol=1e-4 * usual.abs().max().item())


def test_adam_is_the_slope_of_the_one_step_utility(bench):
    """With a linear metric, Phi after AdamW's step on one text alone is Phi(phi_0) + adam, up to the decay that all texts share."""
    work = bench("task=l2_norm", "eps_root=1e-6", "weight_decay=1e-4")
    work.task.signal = linear(work.world.target.double())
    texts = work.sample(work.prompts(6, "a test"), "a test")
    gained = torch.tensor(work.one_step_utilities(texts), dtype=torch.float64)
    estimated = work.influences(texts, optimizer_aware=True)
    assert torch.allclose(gained - gained.mean(), estimated - estimated.mean(), rtol=1e-6, atol=1e-6 * estimated.std().item())


def test_influences_are_charged_three_forwards_and_the_gradient_of_phi_once(bench):
    from dpgbench.bench.flops import forward_flops

    work = bench("task=language")
    texts = work.sample(work.prompts(6, "a test"), "a test")
    spent = []
    for aware in (False, False, True):
        before = work.meter.flops["scoring"]
        work.influences(texts, optimizer_aware=aware)
        spent.append(work.meter.flops["scoring"] - before)
    forward = forward_flops(work.world.target, 6, work.spec.training.max_length)
    assert spent[1] == spent[2] == pytest.approx(3 * forward) and spent[0] > spent[1]


def rewarded(work, monkeypatch):
    """What the method hands to `influences` at its first step, without training anything."""
    from dpgbench.bench import grpo

    def first_reward(bench, reward, baseline):
        yield reward(grpo.Rollouts(0, [], ["a text."], [[1]]))

    monkeypatch.setattr(grpo, "train_policy", first_reward)
    seen = {}
    monkeypatch.setattr(work, "influences", lambda texts, **how: seen.update(how))
    list(Registry().load("method", "influence")(work.options).run(work))
    return seen


def test_less_is_a_loop(bench, monkeypatch):
    """Two steps of AdamW written out on the untouched generator's texts, then each text's next update there, against the
    gradient of a linear metric."""
    from dpgbench.metagrad.training import per_example_loss

    work = bench("task=language", "method=influence_less", "influence_texts=8", "warmup_steps=2", "eps_root=1e-6", "training.lr=1e-2")
    target, training = work.world.target.double(), work.spec.training
    (b1, b2), lr = training.betas, training.lr
    params = {name: p.detach().clone() for name, p in target.named_parameters()}
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))

    def gradient(encoded):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = per_example_loss(target, leaves, **encoded).mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def update(found, step):
        means = {name: b1 * first[name] + (1 - b1) * g for name, g in found.items()}
        squares = {name: b2 * second[name] + (1 - b2) * g**2 for name, g in found.items()}
        size = {name: (square / (1 - b2 ** (step + 1)) + training.eps_root).sqrt() + training.eps for name, square in squares.items()}
        return {name: -lr / (1 - b1 ** (step + 1)) * mean / size[name] for name, mean in means.items()}, means, squares

    drawn = work.sample(work.prompts(8, "influence"), "influence")
    batches, _ = work.batches(drawn, "warm-up", steps=2)
    for step, encoded in enumerate(batches):
        moved, first, second = update(gradient(encoded), step)
        params = {name: p * (1 - lr * training.weight_decay) + moved[name] for name, p in params.items()}
    work.task.signal = linear(target)
    texts = work.sample(work.prompts(5, "a test"), "a test")
    how = rewarded(work, monkeypatch)
    assert how.pop("optimizer_aware") and how["checkpoint"].step == 2
    monkeypatch.undo()
    found = work.influences(texts, optimizer_aware=True, **how)
    generator = torch.Generator().manual_seed(0)
    slopes = {name: 1e-3 * torch.randn(p.shape, generator=generator).to(p) for name, p in target.named_parameters()}
    for text, value in zip(texts, found.tolist(), strict=True):
        moved, *_ = update(gradient(work.world.encode([text])), 2)
        assert value == pytest.approx(sum(float((moved[name] * slopes[name]).sum()) for name in slopes), rel=1e-9)
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())


def test_ekfac_is_dot_along_the_inverse_curvature(bench, monkeypatch):
    """The method's direction is the product of `metagrad.curvature` with Phi's gradient, on the generator's texts and the cell's draws."""
    from dpgbench.core.seeds import derive
    from dpgbench.metagrad.curvature import inverse_curvature_product
    from dpgbench.metagrad.training import gradient_dots

    work = bench("task=sixseven", "method=influence_ekfac", "influence_texts=32", "damping=0.3")
    encoded = work.world.encode(work.sample(work.prompts(32, "influence"), "influence"))
    target = work.world.target
    slope = torch.autograd.grad(work.task.signal(target), [target.lm_head.weight])[0]
    draws = torch.Generator().manual_seed(derive(work.spec.seed, "curvature", "labels"))
    how = {"damping": 0.3, "reduction": work.spec.training.reduction}
    product, _ = inverse_curvature_product(target, **encoded, direction={"lm_head.weight": slope}, generator=draws, **how)
    texts = work.sample(work.prompts(6, "a test"), "a test")
    told = rewarded(work, monkeypatch)
    monkeypatch.undo()
    assert set(told["direction"]) == {"lm_head.weight"}
    expected = -gradient_dots(target, **work.world.encode(texts), direction=product, reduction=work.spec.training.reduction)
    assert torch.allclose(work.influences(texts, **told), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["influence_less", "influence_ekfac"])
def test_what_is_prepared_is_paid_once_and_the_same_in_a_run_that_goes_on(bench, monkeypatch, method):
    """A second bench that goes on from the first one's account prepares the same and is charged nothing more."""
    words = ["task=l2_norm", f"method={method}", "influence_texts=16", "warmup_steps=2"]
    work = bench(*words)
    told = rewarded(work, monkeypatch)
    spent, again = work.meter.total_flops, bench(*words)
    assert spent > 0
    again.account.restore(work.state())
    told_again = rewarded(again, monkeypatch)
    assert again.meter.total_flops == 0 and again.meter.tokens_generated == 0
    one, other = (how["direction"] if "direction" in how else how["checkpoint"].params for how in (told, told_again))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_the_curvature_is_charged_as_counted(bench):
    """For the head alone: the labels, two passes, the factors' products, and eigenvectors by their formula."""
    from dpgbench.bench.flops import counted_flops
    from dpgbench.metagrad.curvature import curvature

    work = bench("task=l2_norm")
    texts = work.sample(work.prompts(8, "a test"), "a test")
    work.influences(texts)  # Phi's gradient is paid
    before = work.meter.flops["scoring"]
    work.inverse_curvature_product(texts, damping=0.1)
    draws = torch.Generator().manual_seed(0)
    encoded = work.world.encode(texts)
    _, counted = counted_flops(lambda: curvature(work.world.target, **encoded, generator=draws, names=["lm_head.weight"]))
    vocabulary, width = work.world.target.lm_head.weight.shape
    turning = 4 * vocabulary * width * (vocabulary + width)  # the direction, there and back
    expected = counted + turning + 9 * (vocabulary**3 + width**3)
    assert work.meter.flops["scoring"] - before == pytest.approx(expected, rel=1e-9)


# ---- naive


@pytest.mark.parametrize(
    ("datasets", "values", "scaling"), [(4, [1.0, 2.0, 3.0, 6.0], "group"), (2, [1.0, 3.0], "batch"), (2, [1.0, 3.0], "none")]
)
def test_naive_compares_datasets(bench, advantages_used, datasets, values, scaling):
    """Two prompts, four completions each. The k-th of a prompt goes to dataset k mod D and is paid that dataset's Phi; what reaches the
    loss is (Phi_d - mean) / std over datasets, which TRL's subtraction of the group mean leaves alone.

    D=4, Phi = (1, 2, 3, 6): mean 3, deviations (-2, -1, 0, 3), squares 14, std over datasets sqrt(14 / 3).
    """
    work = bench("method=naive", f"datasets={datasets}", "completions=8", "group_size=4", f"scale_advantages={scaling}", "steps=1")
    seen = []
    work.dataset_value = lambda texts, *names, lr: seen.append(texts) or values[len(seen) - 1]
    list(Registry().load("method", "naive")(work.options).run(work))
    texts = work.lines[0]["rollouts"]["texts"]
    assert seen == [texts[first::datasets] for first in range(datasets)]
    assert work.lines[0]["rollouts"]["rewards"] == (values * 8)[:8] and work.lines[0]["phi"] == sum(values) / datasets
    phi = torch.tensor(values * (8 // datasets))
    by_hand = {4: [-2.0, -1.0, 0.0, 3.0], 2: [-1.0, 1.0]}[datasets] * (8 // datasets)
    deviation = {"group": phi[:4].std().item(), "batch": phi.std().item(), "none": 1.0}[scaling]
    if (datasets, scaling) == (4, "group"):
        assert deviation == pytest.approx((14 / 3) ** 0.5)
    assert advantages_used[0].tolist() == pytest.approx([value / deviation for value in by_hand], abs=1e-5)


def test_a_datasets_value_is_phi_of_a_target_trained_on_it(bench):
    """Against metagradients' own forward pass on the same texts, T=2, and charged 3F and one Phi."""
    from dpgbench.bench.flops import forward_flops

    work = bench("task=l2_norm", "inner_steps=2")
    texts = work.sample(work.prompts(8, "a test"), "a test")
    value = work.dataset_value(texts, "x")
    assert work.meter.flops["training"] == pytest.approx(3 * forward_flops(work.world.target, 8, work.spec.training.max_length))
    assert value == pytest.approx(work.metagradients(texts, "x").value, rel=1e-6)
    faster = bench("task=l2_norm", "inner_steps=2", "training.lr=0.01").dataset_value(texts, "x")
    assert work.dataset_value(texts, "x", lr=0.01) == faster != value
    with pytest.raises(UserError, match="inner_steps=2: a dataset of 7 texts must divide into as many batches; make it 6 texts"):
        work.dataset_value(texts[:7])


# ---- prompt_only


def prompt_only(work):
    """Its last snapshot."""
    return list(Registry().load("method", "prompt_only")(work.options).run(work))[-1]


def test_the_hint_follows_every_prompt_and_is_followed(bench):
    """The phrasebook's generator knows "Write in French.", and writes it; nothing is spent before the deployment dataset."""
    work = bench("task=language", "lang=fr", "method=prompt_only")
    snapshot = prompt_only(work)
    assert snapshot.step == 1 and work.meter.total_flops == 0 and work.lines == []
    prompts = work.prompts(32, "a test")
    texts = snapshot.sample(prompts)
    assert texts == work.sample([f"{prompt.removesuffix(' <sep>')} Write in French. <sep>" for prompt in prompts], "deployment")
    assert sum(work.task.score(texts)) > 16 > 2 * sum(work.task.score(work.sample(prompts, "deployment")))


def test_the_search_keeps_the_best_by_phi(bench, monkeypatch):
    """The hint and all nine goals of the phrasebook but the hint's own; the highest value wins, the first of equals, and all are paid."""
    work = bench("task=language", "lang=fr", "method=prompt_only", "search=9", "search_texts=4")
    said = []
    monkeypatch.setattr(work, "dataset_value", lambda texts, *names: said.append(texts) or float(len(said) in (3, 5)))
    snapshot = prompt_only(work)
    tried = [line["instruction"] for line in work.lines]
    assert tried[0] == "Write in French." and sorted(tried) == sorted(work.world.instructions()) and len(set(tried)) == 9
    assert snapshot.step == 9 and work.meter.flops["generate"] > 0
    prompts = work.prompts(4, "search")
    assert work.sample(work.world.instruct(prompts, tried[2]), "deployment") == snapshot.sample(prompts)
    assert said[2] == work.sample(work.world.instruct(prompts, tried[2]), "search"), "the same prompts and noise for every candidate"


def test_one_search_yields_the_curve_over_k(bench, monkeypatch):
    """The hint before anything is spent, then the best of the first 2, 4 and all 5."""
    work = bench("task=language", "lang=de", "method=prompt_only", "search=5", "search_texts=4")
    values = iter([1.0, 0.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(work, "dataset_value", lambda texts, *names: next(values))
    prompts, kept = work.prompts(4, "a test"), []
    for snapshot in Registry().load("method", "prompt_only")(work.options).run(work):
        kept.append((snapshot.step, len(work.lines), snapshot.sample(prompts)))
    assert [(step, lines) for step, lines, _ in kept] == [(1, 0), (2, 2), (4, 4), (5, 5)]
    said = [line["instruction"] for line in work.lines]
    best = [work.sample(work.world.instruct(prompts, said[place]), "deployment") for place in (0, 0, 2, 4)]
    assert [texts for _, _, texts in kept] == best


@pytest.mark.slow
def test_a_search_finds_the_language_that_phi_wants(bench):
    """Without the hint's help: Phi of targets trained on 64 texts each ranks French over what else the corpus can say."""
    work = bench("task=language", "lang=fr", "method=prompt_only", "search=9", "search_texts=64", "inner_steps=2", "training.lr=1e-3")
    prompt_only(work)
    values = {line["instruction"]: line["phi"] for line in work.lines}
    assert max(values, key=values.get) == "Write in French."
    assert work.meter.flops["training"] > 0 and work.meter.flops["scoring"] > 0


def test_a_search_beyond_what_there_is_is_refused(bench):
    work = bench("task=language", "lang=de", "method=prompt_only", "search=12")
    with pytest.raises(UserError, match=r"method\.search=12: the hint and 9 instructions of the corpus are all there is; write search=10"):
        prompt_only(work)


def test_a_task_without_a_hint_is_skipped():
    from dpgbench.api import Options, TaskInfo

    method = Registry().load("method", "prompt_only")(Options({"search": 1, "search_texts": 1}))
    assert method.supports(TaskInfo("opening", Options({}), frozenset({"signal"}))).startswith("opening has no hint")
