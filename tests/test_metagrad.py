"""Metagradients: against an unrolled oracle, against finite differences, and everything that must not change them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_training import HELD_OUT, VOCAB, assert_unchanged, relative_error, snapshot, tiny_batch, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpgbench.metagrad import differentiate, metagradients
from dpgbench.metagrad.differentiate import segment_length
from dpgbench.metagrad.training import SGD, AdamW, loaded, per_example_loss, train

# eps_root on the scale of the squared gradients (about 1e-2 squared here), as metasmoothness asks; otherwise Adam's step is a sign.
OPTIMIZERS = {"sgd": SGD(0.1, weight_decay=0.01), "adamw": AdamW(0.02, eps_root=1e-4, weight_decay=0.1)}
PATTERN = torch.where(torch.rand(6, 7, generator=torch.Generator().manual_seed(5)) > 0.5, 1.0, -1.0).double()


def head(model):
    return model.get_output_embeddings().weight


def norm(model):
    return -head(model).norm()


def held_out(model):
    log_probs = model(input_ids=HELD_OUT["input_ids"]).logits[:, :-1].log_softmax(-1)
    real = HELD_OUT["labels"][:, 1:] != -100
    return log_probs.gather(-1, HELD_OUT["labels"][:, 1:].clamp(min=0)[..., None])[..., 0][real].mean()


class Patch:
    """The sixseven signal in small: softplus of the signed change of a patch of the (hidden, vocabulary) head."""

    def __init__(self, model):
        self.start = head(model).detach().clone()

    def __call__(self, model):
        change = (head(model) - self.start).T[:6, :7]
        return -F.softplus(-20 * PATTERN.to(change) * change).mean()


METRICS = {"norm": lambda model: norm, "patch": Patch, "held-out loss": lambda model: held_out}


def make_case(steps, shape):
    """T batches of different sizes, and weights: ones, or spread over [0.3, 1.7] in the shape "weighted"."""
    batches = [tiny_batch(3 + step % 2, seed=step, padded=shape != "full") for step in range(steps)]
    count = sum(len(batch["labels"]) for batch in batches)
    weights = torch.linspace(0.3, 1.7, count, dtype=torch.float64) if shape == "weighted" else None
    return batches, weights


class Called(nn.Module):
    """A signal as a module, so that functional_call can substitute parameters: the oracle's own way, not `loaded`."""

    def __init__(self, model, signal):
        super().__init__()
        self.model, self.signal = model, signal

    def forward(self):
        return self.signal(self.model)


def oracle(model, batches, signal, optimizer, weights=None, length_reduction=True):
    """The whole run as one differentiable expression (create_graph), written without dpgbench.training."""
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    count = sum(len(batch["labels"]) for batch in batches)
    dtype = next(model.parameters()).dtype
    weights = (torch.ones(count) if weights is None else weights).to(dtype).clone().requires_grad_()
    start = 0
    for t, batch in enumerate(batches, 1):
        ids, targets = batch["input_ids"], batch["labels"][:, 1:]
        logits = torch.func.functional_call(model, params, (), {"input_ids": ids}).logits[:, :-1]
        nll = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
        losses = nll.sum(1) / (targets.shape[1] if length_reduction else (targets != -100).sum(1))
        loss = (weights[start : start + len(ids)] * losses).mean()
        start += len(ids)
        gradients = dict(zip(params, torch.autograd.grad(loss, params.values(), create_graph=True), strict=True))
        decayed = {name: p * (1 - optimizer.lr * optimizer.weight_decay) for name, p in params.items()}
        if isinstance(optimizer, SGD):
            params = {name: p - optimizer.lr * gradients[name] for name, p in decayed.items()}
            continue
        b1, b2 = optimizer.betas
        first = {name: b1 * first[name] + (1 - b1) * g for name, g in gradients.items()}
        second = {name: b2 * second[name] + (1 - b2) * g**2 for name, g in gradients.items()}
        for name, p in decayed.items():
            scale = torch.sqrt(second[name] / (1 - b2**t) + optimizer.eps_root) + optimizer.eps
            params[name] = p - optimizer.lr * (first[name] / (1 - b1**t)) / scale
    value = torch.func.functional_call(Called(model, signal), {f"model.{name}": p for name, p in params.items()}, ())
    return torch.autograd.grad(value, weights)[0], value.item()


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("shape", ["full", "padded", "weighted"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_unrolled_oracle(optimizer, metric, steps, shape):
    """rewards are autograd's derivative of the whole run (relative error <= 1e-8), value and params are those of train."""
    model, (batches, weights) = tiny_gpt2(), make_case(steps, shape)
    signal = METRICS[metric](model)
    before = snapshot(model)
    out = metagradients(model, batches, signal, optimizer=OPTIMIZERS[optimizer], weights=weights)
    assert_unchanged(model, before)
    rewards, value = oracle(model, batches, signal, OPTIMIZERS[optimizer], weights)
    assert relative_error(out.rewards, rewards) < 1e-8 and not out.rewards.requires_grad
    assert out.value == pytest.approx(value, rel=1e-12)
    trained = train(model, batches, OPTIMIZERS[optimizer], weights=weights)
    assert all(relative_error(out.params[name], trained[name]) < 1e-13 for name in trained) and len(trained) == len(out.params)


@pytest.mark.slow
@pytest.mark.parametrize("steps, options", [(1, {}), (1, {"micro_batch": 2}), (4, {}), (4, {"micro_batch": 2, "checkpoint": 3})])
@pytest.mark.parametrize("kind", ["gpt2 sdpa", "gpt2 tied", "gpt2 tied sdpa", "llama", "llama sdpa"])
def test_equals_the_oracle_on_other_models(kind, steps, options):
    """The same for SDPA attention, a tied head, and Llama with grouped-query attention (1e-6: its RMSNorm is fp32).

    Micro-batching at T=1 takes the forward-mode path, whole batches the tape."""
    name, tied, attention = kind.split()[0], "tied" in kind, "sdpa" if "sdpa" in kind else "eager"
    make = (lambda attention: tiny_gpt2(attention, tied=tied)) if name == "gpt2" else tiny_llama
    model, twin = make(attention), make(attention)
    batches, weights = make_case(steps, "weighted")
    for metric in METRICS.values():
        signal = metric(model)
        before = snapshot(model)
        out = metagradients(model, batches, signal, optimizer=OPTIMIZERS["adamw"], weights=weights, reduction="tokens", **options)
        assert_unchanged(model, before)
        with sdpa_kernel(SDPBackend.MATH):
            rewards, _ = oracle(twin, batches, signal, OPTIMIZERS["adamw"], weights, length_reduction=False)
        assert relative_error(out.rewards, rewards) < (1e-8 if name == "gpt2" else 1e-6)


@pytest.mark.parametrize("shape", ["weighted", "full"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_finite_differences(optimizer, metric, steps, shape):
    """rewards are central differences of Phi(train(w)), Richardson-extrapolated, at weights that are not all 1: < 1e-5."""
    model, (batches, weights) = tiny_gpt2(), make_case(steps, shape)
    count = sum(len(batch["labels"]) for batch in batches)
    weights = 1.3 * torch.ones(count, dtype=torch.float64) if weights is None else weights
    signal = METRICS[metric](model)
    out = metagradients(model, batches, signal, optimizer=OPTIMIZERS[optimizer], weights=weights)

    def phi(index, shift):
        moved = weights.clone()
        moved[index] += shift
        with torch.no_grad(), loaded(model, train(model, batches, OPTIMIZERS[optimizer], weights=moved)):
            return signal(model)

    def central(index, h):
        return (phi(index, h) - phi(index, -h)) / (2 * h)

    chosen = [0, count // 2, count - 1]
    expected = torch.stack([(4 * central(i, 1e-3) - central(i, 2e-3)) / 3 for i in chosen])
    error = float((out.rewards[chosen] - expected).abs().max() / out.rewards.abs().max())
    assert error < 1e-5


def test_the_curvature_term_matters(monkeypatch):
    """At T=4 dropping the Hessian-vector products moves the rewards by over 5%, so the tests above do see them; at T=1 nothing."""
    model, exact_pull = tiny_gpt2(), differentiate.Tape.pull
    runs = {steps: (make_case(steps, "padded")[0], OPTIMIZERS["sgd"]) for steps in (1, 4)}
    exact = {steps: metagradients(model, batches, held_out, optimizer=o).rewards for steps, (batches, o) in runs.items()}
    monkeypatch.setattr(differentiate.Tape, "pull", lambda self, to, second_order: (exact_pull(self, to, second_order)[0], {}))
    blind = {steps: metagradients(model, batches, held_out, optimizer=o).rewards for steps, (batches, o) in runs.items()}
    assert torch.equal(blind[1], exact[1])
    assert relative_error(blind[4], exact[4]) > 0.05


def test_float32_agrees_with_float64():
    """Single precision changes the rewards by less than 1e-3, for both optimizers and all metrics at T=4."""
    batches, _ = make_case(4, "padded")
    for optimizer in OPTIMIZERS.values():
        for metric in METRICS.values():
            single, double = tiny_gpt2().float(), tiny_gpt2()
            low, high = (metagradients(model, batches, metric(model), optimizer=optimizer).rewards for model in (single, double))
            assert low.dtype == torch.float32 and relative_error(low, high) < 1e-3


# ---------------------------------------------------------------- what must not change the result


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"micro_batch": 2}, {"micro_batch": 1}, {"checkpoint": "sqrt"}, {"checkpoint": 1}, {"checkpoint": 2},
                {"checkpoint": 9}, {"checkpoint": "sqrt", "micro_batch": 2}]
)  # fmt: skip
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_memory_options_change_nothing(optimizer, options):
    """micro_batch and checkpoint trade time for memory; rewards, value and params stay, up to rounding."""
    model, (batches, weights) = tiny_gpt2(), make_case(5, "weighted")
    plain, other = (metagradients(model, batches, held_out, OPTIMIZERS[optimizer], weights=weights, **o) for o in ({}, options))
    assert relative_error(other.rewards, plain.rewards) < 1e-11
    assert other.value == pytest.approx(plain.value, rel=1e-13)
    assert all(relative_error(other.params[n], plain.params[n]) < 1e-12 for n in plain.params)


def test_forward_mode_and_tape_agree_at_one_step():
    """T=1 through the tape, and through the forward-mode product that micro-batching takes, for a dense metric."""
    model, (batches, _) = tiny_gpt2(), make_case(1, "padded")
    tape, forward = (metagradients(model, batches, held_out, OPTIMIZERS["adamw"], micro_batch=size).rewards for size in (None, 2))
    assert relative_error(forward, tape) < 1e-12


def test_empty_text_earns_nothing():
    """A text without labels inside a batch has reward exactly 0; its neighbours keep theirs under both reductions."""
    model, (batches, _) = tiny_gpt2(), make_case(1, "padded")
    batches[0]["labels"][1] = -100
    for reduction in ("length", "tokens"):
        rewards = metagradients(model, batches, norm, OPTIMIZERS["sgd"], reduction=reduction).rewards
        assert rewards[1] == 0 and (rewards[[0, 2]] != 0).all()


def test_the_signal_may_read_what_the_loss_does_not_touch():
    """Position embeddings beyond L get no gradient from any text: the rewards are zeros, not an error."""
    model, (batches, _) = tiny_gpt2(), make_case(1, "full")
    unused = lambda m: m.transformer.wpe.weight[10:].sum()  # noqa: E731
    for size in (None, 2):
        assert not metagradients(model, batches, unused, OPTIMIZERS["adamw"], micro_batch=size).rewards.any()


def test_works_under_no_grad_and_with_frozen_parameters():
    """The caller's grad mode does not matter; frozen parameters are constants of the learning algorithm."""
    model, (batches, _) = tiny_gpt2(), make_case(3, "padded")
    expected = metagradients(model, batches, held_out, OPTIMIZERS["adamw"]).rewards
    with torch.no_grad():
        assert torch.equal(metagradients(model, batches, held_out, OPTIMIZERS["adamw"]).rewards, expected)
    model.transformer.requires_grad_(False)
    before = snapshot(model)
    out = metagradients(model, batches, held_out, OPTIMIZERS["adamw"])
    assert_unchanged(model, before)
    assert list(out.params) == ["lm_head.weight"] and relative_error(out.rewards, expected) > 1e-3


def test_the_model_survives_a_failing_signal():
    """An exception inside the signal leaves parameters, .grad and flags as they were."""
    model, (batches, _) = tiny_gpt2(), make_case(1, "full")
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        metagradients(model, batches, lambda m: 1 / 0, OPTIMIZERS["sgd"])
    assert_unchanged(model, before)


@pytest.mark.parametrize("steps, micro_batch, extra", [(1, None, 2), (1, 2, 3), (4, None, 6 + 9 + 9 + 3), (4, 2, 9 + 9 + 9 + 3)])
def test_cost_is_what_the_docstring_says(steps, micro_batch, extra):
    """Counted products beyond training's own, in forward passes, for a metric that reads every parameter; far less for the head alone."""
    model, batches = tiny_gpt2(), [tiny_batch(4)] * steps

    def products(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def dense(model):
        return -sum(p.norm() for p in model.parameters())

    forward = products(lambda: per_example_loss(model, {}, **batches[0]))
    training = products(lambda: train(model, batches, SGD(0.1)))
    assert training == 3 * steps * forward
    whole, head_only = (
        products(lambda s=signal: metagradients(model, batches, s, SGD(0.1), micro_batch=micro_batch)) for signal in (dense, norm)
    )
    assert (whole - training) / forward <= extra + 1e-9
    assert head_only < whole - forward


def test_segment_lengths():
    """sqrt rounds up, an integer is capped at T."""
    assert [segment_length("sqrt", steps) for steps in (1, 2, 4, 5, 9, 10)] == [1, 2, 2, 3, 3, 4]
    assert (segment_length("all", 7), segment_length(3, 7), segment_length(9, 7)) == (7, 3, 7)


# ---------------------------------------------------------------- refusals


def broken_batch(**changes):
    return [{**tiny_batch(), **changes}]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batches": []}, "batches is list of 0: it must be"),
        ({"batches": tiny_batch()}, "batches is dict of 2: it must be a list"),
        ({"batches": [{"input_ids": torch.ones(2, 3)}]}, r"batches\[0\] is \['input_ids'\]: it must be a dict with"),
        ({"batches": [tiny_batch(), tiny_batch(0)]}, r"batches\[1\] has shape \(0, 7\): it must be .* B >= 1"),
        ({"batches": [tiny_batch(), {n: x[:, :1] for n, x in tiny_batch().items()}]}, r"batches\[1\] has shape \(3, 1\): .* L >= 2"),
        ({"batches": broken_batch(labels=torch.zeros(3, 4).long())}, r"input_ids \(3, 7\) and labels \(3, 4\) must have one shape"),
        ({"batches": broken_batch(labels=torch.zeros(3, 7))}, r"torch.int64, torch.float32 must both be torch.int64"),
        ({"batches": broken_batch(labels=torch.full((3, 7), -100))}, r"all labels after the first are -100: one must be real"),
        ({"weights": torch.ones(4)}, r"weights has shape \(4,\): it must be \(3,\)"),
        ({"weights": torch.tensor([1.0, float("nan"), 1.0])}, "weights holds 1 non-finite values: all must be finite"),
        ({"micro_batch": 0}, "micro_batch=0: micro_batch must be an integer >= 1"),
        ({"checkpoint": "some"}, "checkpoint='some': it must be"),
        ({"checkpoint": 0}, "checkpoint=0: it must be"),
        ({"reduction": "mean"}, "reduction='mean': reduction must be one of length, tokens"),
        ({"signal": lambda m: m.lm_head.weight}, r"signal returned a \(23, 16\) torch.float64 tensor: it must be a 0-d"),
        ({"signal": lambda m: 1.0}, "signal returned float 1.0: it must be a 0-d"),
        ({"signal": lambda m: m.lm_head.weight.sum() / 0}, "signal returned .*inf: it must be finite"),
        ({"signal": lambda m: m.lm_head.weight.detach().sum()}, "does not depend on the trained parameters: it must"),
        ({"signal": lambda m: torch.ones((), requires_grad=True) * 2}, "returned 2, which does not depend on the trained parameters"),
    ],
)
def test_refusals(change, words):
    """Bad input is refused in one line naming the value, the rule and the fix, and the model stays as it was."""
    model = tiny_gpt2()
    before = snapshot(model)
    arguments = {"batches": [tiny_batch()], "signal": norm, "optimizer": SGD(0.1), **change}
    with pytest.raises(ValueError, match=words) as error:
        metagradients(model, **arguments)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    assert_unchanged(model, before)


def test_refuses_models_it_cannot_differentiate():
    """Active dropout, whole or config-only, quantised or wholly frozen models, and fused attention are refused by name."""
    batches = [tiny_batch()]
    with pytest.raises(ValueError, match=r"dropout 0.1 is active \(transformer.drop.p.*call model.eval\(\)"):
        metagradients(tiny_gpt2(dropout=0.1).train(), batches, norm, SGD(0.1))
    assert len(metagradients(tiny_gpt2(dropout=0.1), batches, norm, SGD(0.1)).rewards) == 3
    assert len(metagradients(tiny_gpt2().train(), batches, norm, SGD(0.1)).rewards) == 3
    with pytest.raises(ValueError, match=r"dropout 0.2 is active \(model.layers.0.self_attn.attention_dropout"):
        metagradients(tiny_llama(dropout=0.2).train(), batches, norm, SGD(0.1))
    model = tiny_gpt2()
    model.transformer.h[0].packed = nn.Parameter(torch.zeros(VOCAB, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"transformer.h.0.packed is torch.uint8: parameters must be floating"):
        metagradients(model, batches, norm, SGD(0.1))
    with pytest.raises(ValueError, match="0 trainable parameters"):
        metagradients(tiny_gpt2().requires_grad_(False), batches, norm, SGD(0.1))
    model = tiny_gpt2()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2': it must be"):
        metagradients(model, batches, norm, SGD(0.1))
