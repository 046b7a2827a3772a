"""Metagradients of single tokens: finite differences, sums that are the texts' own, and the credit that they are the first order of."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from test_data_parallel import fork
from test_metagrad import METRICS, OPTIMIZERS, held_out, make_case
from test_metagrad_modes import FORCED, tiny_family
from test_training import LENGTH, relative_error, tiny_batch, tiny_gpt2, tiny_llama

from dpgbench.bench.flops import counted_flops
from dpgbench.metagrad import metagradients
from dpgbench.metagrad.training import SGD, loaded, per_example_loss, per_token_loss, train


def token_weights(steps, shape="padded", seed=1):
    """Batches, and a weight in [0.5, 1.5] for every token of them."""
    batches, _ = make_case(steps, shape)
    count = sum(len(batch["labels"]) for batch in batches)
    return batches, 0.5 + torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(batches):
    return torch.cat([batch["labels"] for batch in batches])


# ---- the loss


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_the_loss_of_a_token_is_that_of_its_label(make):
    """Column t is -log p(label t | tokens before t) / (L - 1), computed from the prefix alone; column 0 and pads are zero."""
    model, batch = make(), tiny_batch(4)
    expected = torch.zeros(4, LENGTH, dtype=torch.float64)
    for row in range(4):
        for t in range(1, LENGTH):
            label = batch["labels"][row, t]
            if label != -100:
                logits = model(input_ids=batch["input_ids"][row : row + 1, :t]).logits[0, -1]
                expected[row, t] = -logits.log_softmax(-1)[label] / (LENGTH - 1)
    actual = per_token_loss(model, {}, **batch)
    assert relative_error(actual, expected) < (1e-12 if make is tiny_gpt2 else 1e-6)  # Llama's RMSNorm is fp32
    assert torch.allclose(actual.sum(1), per_example_loss(model, {}, **batch), rtol=1e-14, atol=0)


# ---- exactness


@pytest.mark.parametrize("mode", FORCED)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_finite_differences_in_single_tokens_weights(optimizer, steps, mode):
    """Central differences of Phi(train(w)) in one token's weight, Richardson-extrapolated, at weights that are not all 1: < 1e-5."""
    model, (batches, weights) = tiny_gpt2(), token_weights(steps)
    out = metagradients(model, batches, held_out, OPTIMIZERS[optimizer], weights=weights, mode=mode, per_token=True)
    assert out.rewards.shape == weights.shape and out.modes == (mode,) * steps

    def phi(place, shift):
        moved = weights.clone()
        moved[place] += shift
        with torch.no_grad(), loaded(model, train(model, batches, OPTIMIZERS[optimizer], weights=moved)):
            return held_out(model)

    def central(place, h):
        return (phi(place, h) - phi(place, -h)) / (2 * h)

    real = (labels_of(batches)[:, 1:] != -100).nonzero() + torch.tensor([0, 1])
    chosen = [tuple(place) for place in real[[0, len(real) // 2, -1]].tolist()]
    expected = torch.stack([(4 * central(place, 1e-3) - central(place, 2e-3)) / 3 for place in chosen])
    found = torch.stack([out.rewards[place] for place in chosen])
    assert float((found - expected).abs().max() / out.rewards.abs().max()) < 1e-5
    assert (out.rewards[:, 0] == 0).all() and (out.rewards[labels_of(batches) == -100] == 0).all()


OPTIONS = {
    "tape": {"mode": "tape"}, "reverse": {"mode": "reverse"}, "forward": {"mode": "forward"}, "micro-batches": {"micro_batch": 2},
    "lean": {"checkpoint": "sqrt", "memory_budget": 0, "micro_batch": 1, "offload": "disk"},
    "recomputed activations": {"activation_checkpointing": True, "checkpoint": 2},
}  # fmt: skip


@pytest.mark.parametrize(("steps", "optimizer", "metric"), [(1, "sgd", "norm"), (3, "adamw", "held-out loss")])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_texts_tokens_sum_to_the_texts_own(options, steps, optimizer, metric):
    """At weights of whole texts, rows sum to the text's metagradient; Phi, phi_T and the ways that steps were done are the same."""
    model, (batches, weights) = tiny_gpt2(), make_case(steps, "weighted")
    arguments = (model, batches, METRICS[metric](model), OPTIMIZERS[optimizer])
    text, token = (metagradients(*arguments, weights=weights, per_token=per_token, **OPTIONS[options]) for per_token in (False, True))
    assert relative_error(token.rewards.sum(1), text.rewards) < 1e-9
    assert token.value == pytest.approx(text.value, rel=1e-12) and token.modes == text.modes
    assert all(relative_error(token.params[name], theta) < 1e-12 for name, theta in text.params.items())


def test_a_texts_weight_is_the_weight_of_each_of_its_tokens():
    """(N,) weights are (N, L) weights with equal columns, to the last bit."""
    model, (batches, weights) = tiny_gpt2(), make_case(2, "weighted")
    one, other = (
        metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=given, per_token=True).rewards
        for given in (weights, weights[:, None].expand(-1, LENGTH))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen3", "Gemma2"))])
def test_other_architectures(family):
    """The same at T=2 for other families, in every mode (1e-6: they normalise in float32)."""
    model, (batches, _) = tiny_llama() if family == "Llama" else tiny_family(family), make_case(2, "padded")
    for mode in FORCED:
        text, token = (
            metagradients(model, batches, held_out, OPTIMIZERS["adamw"], mode=mode, per_token=per_token) for per_token in (False, True)
        )
        assert relative_error(token.rewards.sum(1), text.rewards) < 1e-6


def test_bf16_and_single_precision():
    """Sums hold to the precision of the arithmetic."""
    batches, _ = make_case(2, "padded")
    for precision, tolerance in (("full", 1e-4), ("bf16", 5e-2)):
        text, token = (
            metagradients(tiny_gpt2().float(), batches, held_out, OPTIMIZERS["adamw"], precision=precision, per_token=per_token)
            for per_token in (False, True)
        )
        assert token.rewards.dtype == torch.float32 and relative_error(token.rewards.sum(1), text.rewards) < tolerance


def test_batches_of_different_lengths_are_filled_up_with_zeros():
    """A batch two tokens shorter: its rewards are those of the same batch padded, but for the L - 1 that a text is divided by."""
    model, long = tiny_gpt2(), tiny_batch(3, seed=1, padded=False)
    short = {name: tensor[:, : LENGTH - 2] for name, tensor in tiny_batch(3, seed=2, padded=False).items()}
    out = metagradients(model, [long, short], held_out, SGD(0.1), per_token=True)
    assert out.rewards.shape == (6, LENGTH) and (out.rewards[3:, LENGTH - 2 :] == 0).all() and (out.rewards[3:, 1 : LENGTH - 2] != 0).all()
    padded = {
        "input_ids": torch.nn.functional.pad(short["input_ids"], (0, 2)),
        "labels": torch.nn.functional.pad(short["labels"], (0, 2), value=-100),
    }
    factor = torch.ones(6, dtype=torch.float64)
    factor[3:] = (LENGTH - 1) / (LENGTH - 3)
    same = metagradients(model, [long, padded], held_out, SGD(0.1), weights=factor, per_token=True)
    assert relative_error(out.rewards, same.rewards * factor[:, None]) < 1e-10


# ---- what it is the first order of


def test_the_credit_of_a_token_is_what_its_tail_adds():
    """Phi(w) - Phi(w with the tail of one text zero) is the weighted sum of the tail's metagradients: exactly where Phi(train(w)) is linear
    in w (one step of SGD, a metric linear in the parameters), and for any metric in the limit of a small step."""
    model, (batches, weights) = tiny_gpt2(), token_weights(1)
    torch.manual_seed(0)
    slopes = {name: torch.randn_like(theta) for name, theta in model.named_parameters()}

    def linear(module):
        return torch.stack([(theta * slopes[name]).sum() for name, theta in module.named_parameters() if name in slopes]).sum()

    def phi(weights, metric, optimizer):
        with torch.no_grad(), loaded(model, train(model, batches, optimizer, weights=weights)):
            return metric(model)

    for metric, optimizer, tolerance in ((linear, SGD(0.1), 1e-9), (held_out, SGD(1e-6), 1e-4)):
        out = metagradients(model, batches, metric, optimizer, weights=weights, per_token=True)
        first_order = (weights * out.rewards).flip(1).cumsum(1).flip(1)
        for row in range(2):
            for t in range(1, LENGTH):
                cut = weights.clone()
                cut[row, t:] = 0
                exact = phi(weights, metric, optimizer) - phi(cut, metric, optimizer)
                assert abs(float(exact - first_order[row, t])) < tolerance * float(first_order.abs().max())


def test_the_loss_of_a_token_does_not_hang_on_what_follows():
    """Which is what makes the tail's sum a credit: other tokens from position t on leave the losses before t as they are."""
    model, batch = tiny_gpt2(), tiny_batch(3, padded=False)
    before = per_token_loss(model, {}, **batch)
    for t in range(1, LENGTH):
        other = {name: torch.cat([ids[:, :t], (ids[:, t:] + 1) % 23], 1) for name, ids in batch.items()}
        assert torch.allclose(per_token_loss(model, {}, **other)[:, :t], before[:, :t], rtol=1e-12, atol=0)


# ---- cost, processes, refusals


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "reverse"}, {"mode": "forward"}])
def test_the_products_are_the_same(options):
    """To the last one: what a token's metagradient costs more is elementwise."""
    model, (batches, _) = tiny_gpt2(), make_case(2, "padded")
    counts = []
    for per_token in (False, True):
        arguments = (model, batches, held_out, OPTIMIZERS["adamw"])
        metagradients(*arguments, per_token=per_token, **options)  # one-time checks
        counts.append(
            counted_flops(lambda arguments=arguments, per_token=per_token: metagradients(*arguments, per_token=per_token, **options))[1]
        )
    assert counts[0] == counts[1] > 0


def test_two_processes_equal_one(tmp_path):
    """Shares of unequal size, and one process without any, at weights per token."""
    from test_data_parallel import BATCHES

    weights = 0.5 + torch.rand(10, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {"weights": weights, "mode": "reverse", "micro_batch": 1, "per_token": True}
    rewards = metagradients(tiny_gpt2(), BATCHES, held_out, OPTIMIZERS["adamw"], **options).rewards
    forks = [fork(rank, tmp_path, options) for rank in (0, 1)]
    assert [os.waitpid(pid, 0)[1] for pid in forks] == [0, 0]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors")["rewards"] for rank in (0, 1)]
    assert torch.equal(*ranks) and relative_error(ranks[0], rewards) < 1e-12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"reduction": "tokens"},
            r'reduction="tokens" with weights per token: it divides by the number of a text.s labels.*use reduction="length"',
        ),
        ({"weights": torch.ones(3, 4)}, r"weights has shape \(3, 4\): it must be \(3,\), one per example or \(3, 7\), one per token"),
        ({"weights": torch.full((3, 7), float("inf"))}, "weights holds 21 non-finite values"),
        ({"weights": torch.ones(3, 7), "per_token": False}, r"weights has shape \(3, 7\): it must be \(3,\), one per example;"),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ValueError, match=words):
        metagradients(tiny_gpt2(), [tiny_batch()], held_out, SGD(0.1), **{"per_token": True, **change})


def test_training_refuses_what_is_not_causal():
    with pytest.raises(ValueError, match=r'reduction="tokens" with weights per token'):
        train(tiny_gpt2(), [tiny_batch()], SGD(0.1), weights=torch.ones(3, 7), reduction="tokens")
