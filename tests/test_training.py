"""The training step: loss, optimizers, train, loaded, one_step_values."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpgbench.bench.flops import counted_flops, forward_flops
from dpgbench.launch.local import ALLOCATOR
from dpgbench.metagrad import derivatives
from dpgbench.metagrad.training import SGD, AdamW, Moments, first_step_dots, gradient_dots, loaded, one_step_values, per_example_loss, train

VOCAB, LENGTH = 23, 7


def tiny_gpt2(attention="eager", tied=False, seed=0, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
        attn_implementation=attention, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype).eval()


def tiny_llama(attention="eager", seed=0, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, attn_implementation=attention, initializer_range=0.2,
        tie_word_embeddings=False, attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_batch(size=3, seed=0, padded=True):
    """Texts of several lengths, cut short with label -100 on the right; the pad token itself is an ordinary id."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (size, LENGTH), generator=generator)
    labels = ids.clone()
    if padded:
        for row, real in enumerate(torch.randint(2, LENGTH + 1, (size,), generator=generator).tolist()):
            ids[row, real:], labels[row, real:] = 0, -100
    return {"input_ids": ids, "labels": labels}


def relative_error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def snapshot(model):
    return [(name, id(p), p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters(remove_duplicate=False)] + [
        (name, module.training) for name, module in model.named_modules()
    ]


def assert_unchanged(model, before):
    after = snapshot(model)
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(old, new, strict=True)), old[0]


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("reduction", ["length", "tokens"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_loss_is_the_sum_over_real_tokens(make, reduction):
    """per_example_loss equals a loop over examples and positions, each text run alone without its padding."""
    model, batch = make(), tiny_batch(5)
    expected = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        real = int((labels != -100).sum())
        log_probs = model(input_ids=ids[None, :real]).logits[0].log_softmax(-1)
        total = -sum(log_probs[t, labels[t + 1]] for t in range(real - 1))
        expected.append(total / (LENGTH - 1 if reduction == "length" else real - 1))
    actual = per_example_loss(model, dict(model.named_parameters()), **batch, reduction=reduction)
    assert relative_error(actual, torch.stack(expected)) < (1e-12 if make is tiny_gpt2 else 1e-6)  # Llama's RMSNorm is fp32


def test_loss_equals_transformers_on_one_example():
    """With "tokens" and one example the loss is what model(labels=...) returns (computed there in float32)."""
    model, batch = tiny_gpt2(), tiny_batch(1, seed=3)
    ours = per_example_loss(model, {}, **batch, reduction="tokens")
    assert relative_error(ours[0], model(**batch).loss) < 1e-6


def test_text_without_labels_has_loss_zero():
    """An empty text costs nothing under both reductions: no 0 / 0."""
    batch = tiny_batch(2)
    batch["labels"][0] = -100
    for reduction in ("length", "tokens"):
        assert per_example_loss(tiny_gpt2(), {}, **batch, reduction=reduction)[0] == 0


# ---------------------------------------------------------------- optimizers


def random_tensors(seed, shapes=((3, 2), (4,))):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator, dtype=torch.float64) for i, shape in enumerate(shapes)}


def test_adamw_equals_torch_without_eps_root():
    """Five steps of AdamW(eps_root=0) are torch.optim.AdamW's, in float64."""
    params = random_tensors(0)
    theirs = [p.clone().requires_grad_() for p in params.values()]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    ours = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, eps_root=0.0, weight_decay=0.1)
    state = ours.init(params)
    for step in range(5):
        gradients = random_tensors(step + 1)
        for p, g in zip(theirs, gradients.values(), strict=True):
            p.grad = g.clone()
        reference.step()
        params, state = ours.update(params, gradients, state, step)
    for p, q in zip(params.values(), theirs, strict=True):
        assert relative_error(p, q.detach()) < 1e-13


def test_adamw_by_hand():
    """theta=1, g=0.3 then 0.1, betas (0.5, 0.75), eps_root 0.16, eps 0.5, lr 0.1, decay 0.2: every number worked out."""
    optimizer = AdamW(lr=0.1, betas=(0.5, 0.75), eps=0.5, eps_root=0.16, weight_decay=0.2)
    theta, g = {"w": torch.tensor(1.0, dtype=torch.float64)}, torch.tensor(0.3, dtype=torch.float64)
    one, state = optimizer.update(theta, {"w": g}, optimizer.init(theta), 0)
    # m = 0.15, v = 0.0225; m_hat = 0.3, v_hat = 0.09; sqrt(0.25) + 0.5 = 1; 1 - 0.02 - 0.1 * 0.3
    assert one["w"].item() == pytest.approx(0.95, rel=1e-14)
    two, state = optimizer.update(one, {"w": g / 3}, state, 1)
    # m = 0.125, v = 0.019375; m_hat = 1/6, v_hat = 0.019375 / 0.4375
    expected = 0.95 * 0.98 - 0.1 * (1 / 6) / (math.sqrt(0.019375 / 0.4375 + 0.16) + 0.5)
    assert two["w"].item() == pytest.approx(expected, rel=1e-14)
    assert (state.first["w"].item(), state.second["w"].item()) == pytest.approx((0.125, 0.019375), rel=1e-14)


def test_updates_are_pure():
    """update and vjp modify none of their arguments, so stored states stay what they were."""
    params, gradients = random_tensors(0), random_tensors(1)
    for optimizer in (SGD(0.1), AdamW(0.1)):
        state = optimizer.init(params)
        _, new_state = optimizer.update(params, gradients, state, 0)
        optimizer.vjp(gradients, new_state, 0, params, new_state)
        assert all(torch.equal(params[n], random_tensors(0)[n]) and torch.equal(gradients[n], random_tensors(1)[n]) for n in params)
        assert all(not p.any() for part in state for p in part.values())


@pytest.mark.parametrize("case", ["params only", "everything", "state only", "first moment only"])
@pytest.mark.parametrize("step", [0, 3])
def test_adamw_vjp_equals_autograd(step, case):
    """AdamW.vjp is autograd's VJP of update for dense and for structurally zero cotangents."""
    optimizer = AdamW(lr=0.3, betas=(0.7, 0.8), eps=1e-3, eps_root=0.1, weight_decay=0.2)
    sources = [random_tensors(seed) for seed in range(3)] + [{n: x.square() for n, x in random_tensors(3).items()}]
    params, gradients, first, second = ({n: x.requires_grad_() for n, x in source.items()} for source in sources)
    new_params, new_state = optimizer.update(params, gradients, Moments(first, second), step)
    seeds = [random_tensors(seed) for seed in (4, 5, 6)]
    used = {"params only": (1, 0, 0), "everything": (1, 1, 1), "state only": (0, 1, 1), "first moment only": (0, 1, 0)}[case]
    to_params, to_first, to_second = ({n: x if use else None for n, x in seed.items()} for seed, use in zip(seeds, used, strict=True))
    total = sum((out[n] * seed[n]).sum() for out, seed, use in zip((new_params, *new_state), seeds, used, strict=True) if use for n in out)
    inputs = [x for source in (gradients, params, first, second) for x in source.values()]
    expected = torch.autograd.grad(total, inputs, allow_unused=True)
    with torch.no_grad():
        to_gradients, to_old, to_state = optimizer.vjp(gradients, new_state, step, to_params, Moments(to_first, to_second))
    actual = [pulled.get(n) for pulled in (to_gradients, to_old, *to_state) for n in params]
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None) or not theirs.any()
        assert ours is None or relative_error(ours, theirs) < 1e-13


def test_sgd_vjp_equals_autograd():
    """SGD.vjp is autograd's, and a structural zero stays one."""
    optimizer, seed = SGD(0.3, weight_decay=0.1), random_tensors(2)
    params, gradients = ({n: x.requires_grad_() for n, x in random_tensors(s).items()} for s in (0, 1))
    new_params, _ = optimizer.update(params, gradients, (), 0)
    expected = torch.autograd.grad((new_params["p0"] * seed["p0"]).sum(), [gradients["p0"], params["p0"]])
    to_gradients, to_params, _ = optimizer.vjp(gradients, (), 0, {"p0": seed["p0"], "p1": None}, None)
    assert relative_error(to_gradients["p0"], expected[0]) < 1e-14 and relative_error(to_params["p0"], expected[1]) < 1e-14
    assert to_gradients.get("p1") is None and to_params.get("p1") is None


def test_adamw_vjp_at_zero_gradient_without_eps_root():
    """With eps_root=0 an unused token's row (g = m = v = 0) gets the derivative of g / (|g| + eps) at 0, not a nan."""
    optimizer, zero, one = AdamW(lr=0.1, eps=0.5, eps_root=0.0), {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    _, state = optimizer.update(one, zero, optimizer.init(one), 0)
    to_gradients, _, _ = optimizer.vjp(zero, state, 0, one, None)
    assert torch.allclose(to_gradients["w"], torch.full((2,), -0.1 / 0.5))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lr": 0}, "lr=0"), ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.inf}, "lr=inf"), ({"lr": math.nan}, "lr=nan"),
        ({"lr": 1, "betas": (0.9, 1.0)}, r"betas\[1\]=1.0"), ({"lr": 1, "betas": (-0.1, 0.9)}, r"betas\[0\]=-0.1"),
        ({"lr": 1, "betas": 0.9}, "betas=0.9"), ({"lr": 1, "eps": -1e-8}, "eps=-1e-08"), ({"lr": 1, "eps_root": -1.0}, "eps_root=-1.0"),
        ({"lr": 1, "weight_decay": -0.1}, "weight_decay=-0.1"), ({"lr": True}, "lr=True"),
    ],
)  # fmt: skip
def test_bad_optimizer_constants(options, words):
    """A bad constant fails when the optimizer is made, in one line with value, rule and fix."""
    with pytest.raises(ValueError, match=words + ".*must be.*; pass") as error:
        AdamW(**options)
    assert "\n" not in str(error.value)
    if set(options) == {"lr"}:
        with pytest.raises(ValueError, match=words):
            SGD(**options)


# ---------------------------------------------------------------- train


def test_train_equals_a_plain_loop_and_leaves_the_model():
    """train is what torch.optim does on a copy, for padded batches of different sizes and weights; the model is untouched."""
    batches, weights = [tiny_batch(3, 0), tiny_batch(5, 1)], torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    model, copy = tiny_gpt2(), tiny_gpt2()
    before = snapshot(model)
    params = train(model, batches, AdamW(0.01, eps_root=0.0, weight_decay=0.1), weights=weights)
    assert_unchanged(model, before)
    reference = torch.optim.AdamW(copy.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for batch, weights_B in zip(batches, weights.split([3, 5]), strict=True):
        logits = copy(input_ids=batch["input_ids"]).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none").view(-1, LENGTH - 1)
        reference.zero_grad()
        (weights_B * losses.mean(1)).mean().backward()
        reference.step()
    for name, p in copy.named_parameters():
        assert relative_error(params[name], p.detach()) < 1e-9, name


def test_train_micro_batches_and_frozen_parameters():
    """Micro-batching changes nothing beyond rounding; a frozen parameter stays in the model and out of the result."""
    model, batches = tiny_gpt2(), [tiny_batch(5, 0), tiny_batch(4, 1)]
    whole, parts = (train(model, batches, SGD(0.1), micro_batch=size) for size in (None, 2))
    assert all(relative_error(parts[n], whole[n]) < 1e-12 for n in whole)
    model.transformer.wte.weight.requires_grad_(False)
    assert set(whole) - set(train(model, batches, SGD(0.1))) == {"transformer.wte.weight"}


# ---------------------------------------------------------------- loaded


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_substitutes_and_restores(tied):
    """Inside, outputs and gradients are those of the given tensors, in every place a tied one is used; outside all is as before."""
    model, other, ids = tiny_gpt2(tied=tied), tiny_gpt2(tied=tied, seed=1), tiny_batch()["input_ids"]
    leaves = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    before = snapshot(model)
    with loaded(model, leaves) as same:
        assert same is model and (model.lm_head.weight is model.transformer.wte.weight) == tied
        value = model(input_ids=ids).logits.square().mean()
        model.train()
    assert_unchanged(model, before)
    expected = other(input_ids=ids).logits.square().mean()
    assert relative_error(value, expected) < 1e-14
    for ours, theirs in zip(torch.autograd.grad(value, leaves.values()), torch.autograd.grad(expected, other.parameters()), strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_loaded_restores_after_an_exception():
    """A signal that fails leaves the model as it was."""
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(KeyError), loaded(model, {n: p + 1 for n, p in model.named_parameters()}):
        raise KeyError
    assert_unchanged(model, before)


def test_loaded_refuses_strangers():
    """Names and shapes are checked before anything is put in."""
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="'nonsense' is not in the model"), loaded(model, {"nonsense": torch.ones(1)}):
        pass
    with pytest.raises(ValueError, match=r"shape \(1,\).*\(23, 16\)"), loaded(model, {"lm_head.weight": torch.ones(1)}):
        pass


# ---------------------------------------------------------------- one_step_values

HELD_OUT = tiny_batch(2, seed=9)
SIGNALS = {
    "head": lambda model: -model.lm_head.weight.norm(),
    "output embeddings": lambda model: model.get_output_embeddings().weight[:3, :4].tanh().mean(),
    "forward": lambda model: -per_example_loss(model, {}, **HELD_OUT).mean(),
    "model call": lambda model: model(input_ids=HELD_OUT["input_ids"]).logits.log_softmax(-1)[..., 3].mean(),
    "looks without a gradient": lambda model: model.lm_head.weight.norm() + model.get_input_embeddings().weight.detach().norm(),
}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("make, attention", [(tiny_gpt2, "eager"), (tiny_gpt2, "sdpa"), (tiny_llama, "eager"), (tiny_llama, "sdpa")])
def test_one_step_values_equal_the_loop(make, attention, name):
    """The vectorised values are those of train + signal text by text, without a warning, and the model is untouched."""
    model, texts, signal = make(attention), tiny_batch(5, seed=2), SIGNALS[name]
    optimizer, before = AdamW(0.05, eps_root=1e-3), snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = one_step_values(model, **texts, signal=signal, optimizer=optimizer, reduction="tokens", chunk=2)
    assert_unchanged(model, before)
    expected = []
    for ids, labels in zip(texts["input_ids"], texts["labels"], strict=True):
        params = train(model, [{"input_ids": ids[None], "labels": labels[None]}], optimizer, reduction="tokens")
        with loaded(model, params):
            expected.append(signal(model).detach())
    assert values.shape == (5,) and not values.requires_grad
    assert relative_error(values, torch.stack(expected)) < (1e-12 if make is tiny_gpt2 else 1e-6)


@pytest.mark.parametrize("name, stepped", [("head", 1), ("forward", None), ("looks without a gradient", None)])
def test_only_what_the_signal_looks_at_is_stepped(name, stepped):
    """The head alone, where Phi is of the head; every parameter where Phi may look at all."""

    class Watched(SGD):
        def update(self, params, gradients, state, step):
            assert set(params) == set(gradients)
            sizes.append(len(params))
            return super().update(params, gradients, state, step)

    sizes, model = [], tiny_gpt2()
    one_step_values(model, **tiny_batch(3), signal=SIGNALS[name], optimizer=Watched(0.1))
    assert set(sizes) == {stepped or len(list(model.parameters()))}
    direction = {"lm_head.weight": torch.ones_like(model.lm_head.weight)}
    sizes.clear()
    first_step_dots(model, **tiny_batch(3), direction=direction, optimizer=Watched(0.1))
    assert set(sizes) == {1}


def test_one_step_values_fall_back_loudly():
    """A signal vmap cannot trace gives one warning with the reason and the same numbers."""
    model, texts = tiny_gpt2(), tiny_batch(5)
    awkward = lambda m: m.lm_head.weight.norm() * (1 if m.lm_head.weight.sum().item() < 1e9 else 2)  # noqa: E731
    with pytest.warns(UserWarning, match="vmap failed.*item") as caught:
        values = one_step_values(model, **texts, signal=awkward, optimizer=SGD(0.1), chunk=2)
    assert len(caught) == 1
    assert relative_error(values, one_step_values(model, **texts, signal=lambda m: m.lm_head.weight.norm(), optimizer=SGD(0.1))) < 1e-13


def test_one_step_values_validate():
    """Bad input is refused in one line; a text without labels is allowed (the step is then pure decay)."""
    model, texts = tiny_gpt2(), tiny_batch(2)
    with pytest.raises(ValueError, match=r"signal returned a .* must be a 0-d"):
        one_step_values(model, **texts, signal=lambda m: m.lm_head.weight, optimizer=SGD(0.1))
    with pytest.raises(ValueError, match="chunk=0"):
        one_step_values(model, **texts, signal=SIGNALS["head"], optimizer=SGD(0.1), chunk=0)
    texts["labels"][:] = -100
    values = one_step_values(model, **texts, signal=SIGNALS["head"], optimizer=SGD(0.1))
    assert torch.equal(values, SIGNALS["head"](model).detach().expand(2))


# ---------------------------------------------------------------- first-order influence at phi_0


def random_direction(model, names=""):
    """A tensor for every parameter whose name contains `names`."""
    generator = torch.Generator().manual_seed(4)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters() if names in n}


@pytest.mark.parametrize("names", ["", "lm_head"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_gradient_dots_equal_gradients_text_by_text(make, names):
    """<grad l_i, direction> of the forward-mode product is what a backward pass per text gives; a text without labels gets zero."""
    model, texts = make(), tiny_batch(5, seed=2)
    texts["labels"][4] = -100
    direction, before = random_direction(model, names), snapshot(model)
    values = gradient_dots(model, **texts, direction=direction, micro_batch=2, reduction="tokens")
    assert_unchanged(model, before)
    parameters = dict(model.named_parameters())
    losses = per_example_loss(model, parameters, **texts, reduction="tokens")
    expected = [
        sum((g * direction[n]).sum() for n, g in zip(direction, torch.autograd.grad(
            loss, [parameters[n] for n in direction], retain_graph=True, materialize_grads=True), strict=True))
        for loss in losses
    ]  # fmt: skip
    assert values.shape == (5,) and not values.requires_grad and values[4] == 0
    assert relative_error(values, torch.stack(expected)) < (1e-12 if make is tiny_gpt2 else 1e-6)


@pytest.mark.parametrize("way", ["forward", "no forward mode"])
@pytest.mark.parametrize("reduction", ["length", "tokens"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_gradient_dots_of_single_labels_equal_their_own_gradients(make, reduction, way, monkeypatch):
    """Column t is <grad of label t's share of the loss, direction> by a backward pass for each label, from the tokens before it alone, in
    micro-batches and without a forward mode as well. Rows sum to the texts' own; pads and a text without labels get zero."""
    model, texts = make(), tiny_batch(4, seed=2)
    texts["labels"][3] = -100
    direction, parameters = random_direction(model), dict(model.named_parameters())
    expected = torch.zeros(4, LENGTH, dtype=torch.float64)
    for row, labels in enumerate(texts["labels"]):
        real = [t for t in range(1, LENGTH) if labels[t] != -100]
        for t in real:
            logits = model(input_ids=texts["input_ids"][row : row + 1, :t]).logits[0, -1]
            loss = -logits.log_softmax(-1)[labels[t]] / (LENGTH - 1 if reduction == "length" else len(real))
            slopes = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            expected[row, t] = sum((slope * direction[name]).sum() for name, slope in zip(parameters, slopes, strict=True))
    if way == "no forward mode":
        monkeypatch.setattr(derivatives, "forward_mode_fault", lambda *arguments, **named: way)
        monkeypatch.setattr(derivatives, "reverse_over_forward", None)
    tolerance = 1e-11 if make is tiny_gpt2 else 1e-5  # Llama's norms compute in float32
    for micro_batch in (None, 3):
        how = {"direction": direction, "micro_batch": micro_batch, "reduction": reduction}
        whole, single = gradient_dots(model, **texts, **how), gradient_dots(model, **texts, **how, per_token=True)
        assert not single.requires_grad and bool((single[texts["labels"] == -100] == 0).all()) and bool((single[:, 0] == 0).all())
        assert relative_error(single, expected) < tolerance
        assert relative_error(single.sum(1), whole) < tolerance


def test_gradient_dots_cost_three_forwards():
    """Along all parameters, within 5% of 3F: counted on PyTorch's own forward mode, for torch's counter does not see the products that ours
    accumulates in place; both are the same numbers."""
    config = GPT2Config(
        vocab_size=311, n_embd=32, n_layer=3, n_head=4, n_positions=64, tie_word_embeddings=False, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 311, (4, 24), generator=torch.Generator().manual_seed(0))
    params, direction = {name: p.detach() for name, p in model.named_parameters()}, random_direction(model)
    (_, dots), flops = counted_flops(lambda: torch.func.jvp(lambda p: per_example_loss(model, p, ids, ids), (params,), (direction,)))
    assert flops == pytest.approx(3 * forward_flops(model, 4, 24), rel=0.05)
    assert relative_error(gradient_dots(model, ids, ids, direction), dots) < 1e-4


@pytest.mark.parametrize("optimizer", [SGD(0.05, weight_decay=0.1), AdamW(0.05, eps_root=1e-3, weight_decay=0.1)])
def test_first_step_dots_equal_a_finite_difference(optimizer):
    """d/dh Phi(phi_0 + h u_i), u_i the step that `train` takes on text i alone without its weight decay, by a central difference."""
    model, texts, signal = tiny_gpt2(), tiny_batch(5, seed=2), SIGNALS["forward"]
    start = {name: p.detach() for name, p in model.named_parameters()}
    leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
    with loaded(model, leaves):
        direction = dict(zip(leaves, torch.autograd.grad(signal(model), list(leaves.values())), strict=True))
    values = first_step_dots(model, **texts, direction=direction, optimizer=optimizer, chunk=2)
    for row, value in enumerate(values.tolist()):
        stepped = train(model, [{name: tensor[row : row + 1] for name, tensor in texts.items()}], optimizer)
        update = {name: stepped[name] - p * (1 - optimizer.lr * optimizer.weight_decay) for name, p in start.items()}

        def phi(h, update=update):
            with loaded(model, {name: p + h * update[name] for name, p in start.items()}), torch.no_grad():
                return signal(model).item()

        h = 1e-4
        assert value == pytest.approx((phi(h) - phi(-h)) / (2 * h), rel=1e-5, abs=1e-9)
    if isinstance(optimizer, SGD):
        dots = gradient_dots(model, **texts, direction=direction)
        assert relative_error(values, -optimizer.lr * dots) < 1e-12


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_values_pin_no_memory():
    """Under workers' settings of malloc, of a model whose head weighs 17 MB: 40 texts take hardly more than 4. They took 400 MB more."""
    told = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from dpgbench.training import AdamW, one_step_values

sizes = {"vocab_size": 1 << 16, "n_positions": 16, "n_embd": 64, "n_layer": 1, "n_head": 1}
model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).eval()
signal = lambda module: -module.lm_head.weight.square().sum()
resident = lambda: int(open("/proc/self/statm", encoding="ascii").read().split()[1]) // 256
for count in (4, 40):
    before, texts = resident(), torch.arange(4).repeat(count, 1)
    one_step_values(model, texts, texts, signal, AdamW(lr=1e-3), chunk=1)
print(resident() - before)
"""
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", told], env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(said) < 200, "MB"
