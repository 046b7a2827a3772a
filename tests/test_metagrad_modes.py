"""The three ways to differentiate a step: each exact on every architecture claimed, chosen as the budget says, refused when wrong."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_metagrad import METRICS, OPTIMIZERS, held_out, make_case, norm, oracle
from test_training import VOCAB, assert_unchanged, relative_error, snapshot, tiny_batch, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpgbench.metagrad import derivatives, metagradients
from dpgbench.worlds.models import untie_head

FORCED = ("tape", "reverse", "forward")


@pytest.mark.parametrize("mode", FORCED)
@pytest.mark.parametrize("shape", ["full", "padded", "weighted"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_mode_equals_the_unrolled_oracle(optimizer, steps, shape, mode):
    """Forced tape, reverse over reverse and reverse over forward: relative error <= 1e-8 in float64, for every metric."""
    model, (batches, weights) = tiny_gpt2(), make_case(steps, shape)
    for metric in METRICS.values():
        signal = metric(model)
        out = metagradients(model, batches, signal, OPTIMIZERS[optimizer], weights=weights, mode=mode)
        assert out.modes == (mode,) * steps
        assert relative_error(out.rewards, oracle(model, batches, signal, OPTIMIZERS[optimizer], weights)[0]) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("mode", FORCED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_mode_in_single_precision(optimizer, mode):
    """float32 stays within 1e-3 of the float64 oracle, in every mode at T=4."""
    batches, weights = make_case(4, "weighted")
    for metric in METRICS.values():
        expected, _ = oracle(tiny_gpt2(), batches, metric(tiny_gpt2()), OPTIMIZERS[optimizer], weights)
        single = tiny_gpt2().float()
        out = metagradients(single, batches, metric(single), OPTIMIZERS[optimizer], weights=weights, mode=mode)
        assert out.rewards.dtype == torch.float32 and relative_error(out.rewards, expected) < 1e-3


# ---------------------------------------------------------------- architectures

COMMON = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=None, initializer_range=0.2)  # fmt: skip
FAMILIES = {
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": False, "head_dim": 8},
    "Mistral": {"tie_word_embeddings": False, "sliding_window": 4},
    "Gemma": {"tie_word_embeddings": True, "head_dim": 8},
    "Gemma2": {"tie_word_embeddings": True, "head_dim": 8, "sliding_window": 4},
    "Gemma3": {"tie_word_embeddings": True, "head_dim": 8, "sliding_window": 4},
}


def tiny_family(name, attention="eager"):
    torch.manual_seed(0)
    config = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config)(**COMMON, **FAMILIES[name], attn_implementation=attention)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    untie_head(model)  # Gemma-style heads share the embeddings' weights: untied for the run
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, attention", [(f, a) for f in ("Llama", *FAMILIES) for a in ("eager", "sdpa") if (f, a) != ("Gemma2", "sdpa")]
)  # transformers has no Gemma2 with sdpa
def test_every_family_in_every_mode(family, attention):
    """T=3, padded and weighted, AdamW, held-out loss: the oracle's rewards to 3e-6 (these families normalise in float32)."""
    model = tiny_llama(attention) if family == "Llama" else tiny_family(family, attention)
    batches, weights = make_case(3, "weighted")
    before = snapshot(model)
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = oracle(model, batches, held_out, OPTIMIZERS["adamw"], weights)
    for mode in FORCED:
        out = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=weights, mode=mode)
        assert_unchanged(model, before)
        assert out.modes == (mode,) * 3 and relative_error(out.rewards, expected) < 3e-6, mode


@pytest.mark.parametrize("mode", FORCED)
def test_a_tied_head_stays_tied_if_the_user_wants_it(mode):
    """Without untying, one tensor moves embeddings and head together, and its rewards are the oracle's."""
    model, (batches, weights) = tiny_gpt2(tied=True), make_case(3, "padded")
    out = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=weights, mode=mode)
    assert relative_error(out.rewards, oracle(model, batches, held_out, OPTIMIZERS["adamw"], weights)[0]) < 1e-8


# ---------------------------------------------------------------- the trap, and how it is noticed


def test_layer_norm_must_be_composed(monkeypatch):
    """Reverse over forward through torch's own layer_norm is silently wrong from T=2 on; composed it is right. At T=1 both are."""
    model = tiny_gpt2()
    runs = {steps: make_case(steps, "padded")[0] for steps in (1, 4)}
    exact = {steps: oracle(model, batches, held_out, OPTIMIZERS["sgd"])[0] for steps, batches in runs.items()}
    monkeypatch.setattr(derivatives, "_layer_norm", F.layer_norm)
    monkeypatch.setattr(derivatives, "forward_mode_fault", lambda *_: None)  # which would refuse, see below
    wrong = {steps: metagradients(model, batches, held_out, OPTIMIZERS["sgd"], mode="forward").rewards for steps, batches in runs.items()}
    assert relative_error(wrong[1], exact[1]) < 1e-8
    assert relative_error(wrong[4], exact[4]) > 1e-3


def test_the_self_check_notices_a_wrong_rule(monkeypatch):
    """With torch's own layer_norm the self-check fails: auto falls back to reverse over reverse, loudly and exactly; forced is refused."""
    model, (batches, _) = tiny_gpt2(), make_case(3, "padded")
    monkeypatch.setattr(derivatives, "_layer_norm", F.layer_norm)
    with pytest.warns(UserWarning, match=r"reverse over reverse, exact but slower: its Hessian-vector product is .* off") as caught:
        out = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], memory_budget=0)
    assert sum("slower" in str(warning.message) for warning in caught) == 1 and out.modes == ("forward", "reverse", "reverse")
    assert relative_error(out.rewards, oracle(model, batches, held_out, OPTIMIZERS["adamw"])[0]) < 1e-8
    with pytest.raises(ValueError, match=r'mode="forward" on GPT2LMHeadModel: its Hessian-vector product is .* off; use mode="auto"'):
        metagradients(model, batches, held_out, OPTIMIZERS["adamw"], mode="forward")


class NoForwardMode(torch.autograd.Function):
    """Doubles; twice differentiable, but without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class OnlyOnce(NoForwardMode):
    """The same as a fused kernel would do it: no second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


def with_function(function):
    model = tiny_gpt2()
    model.transformer.ln_f = nn.Sequential(
        model.transformer.ln_f, type("Applied", (nn.Module,), {"forward": lambda _, x: function.apply(x)})()
    )
    return model


def test_an_operation_without_forward_mode_falls_back_loudly():
    """The model is then differentiated reverse over reverse in every recomputed step."""
    model, (batches, _) = with_function(NoForwardMode), make_case(2, "padded")
    with pytest.warns(UserWarning, match="exact but slower"):
        out = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], memory_budget=0)
    assert out.modes == ("reverse", "reverse")
    assert relative_error(out.rewards, oracle(model, batches, held_out, OPTIMIZERS["adamw"])[0]) < 1e-8


@pytest.mark.parametrize("budget", [None, 0])
def test_an_operation_without_a_second_derivative_is_refused(budget):
    """Naming the operation's own complaint and the way out."""
    with pytest.raises(ValueError, match=r"without a second derivative \(.*\): exact metagradients need one; load it with"):
        metagradients(with_function(OnlyOnce), make_case(2, "full")[0], held_out, OPTIMIZERS["sgd"], memory_budget=budget)


# ---------------------------------------------------------------- the budget


def test_the_newest_steps_keep_their_tapes_while_the_budget_lasts(caplog):
    """Budgets between nothing and everything: a growing suffix of steps is taped, bytes stay within, rewards stay the same."""
    model, batches = tiny_gpt2(), [tiny_batch(4, seed=step, padded=False) for step in range(5)]  # tapes of one size
    run = lambda **options: metagradients(model, batches, held_out, OPTIMIZERS["adamw"], **options)  # noqa: E731
    everything = run()
    assert everything.modes == ("tape",) * 5
    states = everything.held_bytes - 5 * everything.tape_bytes
    assert states == 5 * 4 * sum(p.nbytes for p in model.parameters())  # parameters, gradient and two moments
    for kept in range(6):
        with caplog.at_level(logging.INFO, logger="dpgbench.metagrad"):
            out = run(memory_budget=states + kept * everything.tape_bytes + everything.tape_bytes // 2)
        assert out.modes == ("forward",) * (5 - kept) + ("tape",) * kept
        assert out.held_bytes <= states + (kept + 0.5) * everything.tape_bytes
        assert relative_error(out.rewards, everything.rewards) < 1e-12
    assert "T=5: steps 0-4 tape" in caplog.text
    assert run(memory_budget=0).modes == ("forward",) * 5


def test_tapes_are_kept_inside_replayed_segments():
    """With checkpoints every step lies in some segment that is replayed just before it is reversed, so all can have tapes."""
    model, batches = tiny_gpt2(), [tiny_batch(4, seed=step, padded=False) for step in range(9)]
    run = lambda **options: metagradients(model, batches, held_out, OPTIMIZERS["adamw"], **options)  # noqa: E731
    everything, replayed = run(), run(checkpoint="sqrt")
    assert replayed.modes == ("tape",) * 9 and replayed.held_bytes < everything.held_bytes / 2
    budget = int(2.5 * 3 * sum(p.nbytes for p in model.parameters()) + replayed.held_bytes / 2)
    tight = run(checkpoint="sqrt", memory_budget=budget)
    for segment in (tight.modes[:3], tight.modes[3:6], tight.modes[6:]):
        assert segment[0] == "forward" and segment[2] == "tape"
    assert tight.held_bytes <= budget
    for out in (replayed, tight):
        assert relative_error(out.rewards, everything.rewards) < 1e-12


def test_batches_of_different_shapes_share_the_budget():
    """A tape's weight is known once one of its shape was recorded, and bounded from others before: never over the budget."""
    model = tiny_gpt2()
    batches = [tiny_batch(size, seed=size) for size in (2, 6, 3, 5, 4)]
    full = metagradients(model, batches, held_out, OPTIMIZERS["adamw"])
    states = 5 * 4 * sum(p.nbytes for p in model.parameters())
    for part in (0.1, 0.4, 0.7, 0.95):
        budget = int(states + part * (full.held_bytes - states))
        out = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], memory_budget=budget)
        assert out.held_bytes <= budget and "tape" in (*out.modes, *(["tape"] if part < 0.3 else []))
        assert relative_error(out.rewards, full.rewards) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"micro_batch": 2}, {"micro_batch": 1, "checkpoint": "sqrt"}, {"checkpoint": 2}, {"offload": "cpu"},
                                     {"offload": "disk"}, {"offload": "disk", "checkpoint": "sqrt"}])  # fmt: skip
@pytest.mark.parametrize("mode", FORCED)
def test_memory_options_change_nothing_in_any_mode(mode, options):
    """Relative 1e-12 in float64, against the plain run of the same mode."""
    model, (batches, weights) = tiny_gpt2(), make_case(5, "weighted")
    plain, other = (metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=weights, mode=mode, **o) for o in ({}, options))
    assert relative_error(other.rewards, plain.rewards) < 1e-12


def test_memory_options_in_single_precision():
    """2e-6 relative to the largest reward."""
    model, (batches, weights) = tiny_gpt2().float(), make_case(4, "weighted")
    plain = metagradients(model, batches, held_out, OPTIMIZERS["sgd"], weights=weights, mode="tape").rewards
    for options in ({"micro_batch": 2}, {"checkpoint": "sqrt"}, {"offload": "disk"}):
        assert relative_error(metagradients(model, batches, held_out, OPTIMIZERS["sgd"], weights=weights, **options).rewards, plain) < 2e-6


def test_offloading_to_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    """States lie in safetensors files while they wait, hold no device memory, and the folder goes, after an exception too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, (batches, _) = tiny_gpt2(), make_case(4, "padded")
    seen = []

    def look(m):
        seen.append(sorted(path.suffix for path in tmp_path.rglob("*.*") if path.is_file()))
        return held_out(m)

    out = metagradients(model, batches, look, OPTIMIZERS["adamw"], offload="disk", memory_budget=0)
    assert seen == [[".safetensors"] * 4] and out.held_bytes == 0 and not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        metagradients(model, batches, lambda m: 1 / 0, OPTIMIZERS["adamw"], offload="disk")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_activation_checkpointing_changes_nothing(make):
    """Layers that forget their activations give the same rewards, by tape or reverse over reverse, and a lighter training step."""
    model, (batches, weights) = make(), make_case(3, "weighted")
    before = snapshot(model)
    plain = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=weights)
    with pytest.warns(UserWarning, match="recomputed activations have no forward mode"):
        lean = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=weights, activation_checkpointing=True, memory_budget=0)
    assert_unchanged(model, before)
    assert lean.modes == ("reverse",) * 3 and relative_error(lean.rewards, plain.rewards) < (1e-12 if make is tiny_gpt2 else 1e-6)
    taped = metagradients(model, batches, held_out, OPTIMIZERS["adamw"], weights=weights, activation_checkpointing=True)
    assert taped.modes == ("tape",) * 3 and relative_error(taped.rewards, plain.rewards) < (1e-12 if make is tiny_gpt2 else 1e-6)


@pytest.mark.parametrize("mode", FORCED)
def test_bf16_keeps_the_ranking(mode):
    """bfloat16 products with float32 master weights: rewards correlate above 0.99 with float32's, parameters stay float32."""
    model, (batches, _) = tiny_gpt2().float(), make_case(4, "padded")
    full, half = (metagradients(model, batches, held_out, OPTIMIZERS["adamw"], mode=mode, precision=p) for p in ("full", "bf16"))
    assert half.rewards.dtype == torch.float32 and all(p.dtype == torch.float32 for p in half.params.values())
    assert torch.corrcoef(torch.stack([full.rewards, half.rewards]))[0, 1] > 0.99 and not torch.equal(full.rewards, half.rewards)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"memory_budget": -1}, "memory_budget=-1: it must be bytes"), ({"memory_budget": 1.5}, "memory_budget=1.5: it must be bytes"),
        ({"memory_budget": "big"}, "memory_budget='big': it must be bytes"), ({"memory_budget": True}, "memory_budget=True: it must"),
        ({"mode": "backward"}, "mode='backward': it must be one of auto, tape, reverse, forward"),
        ({"offload": "cloud"}, "offload='cloud': it must be None"), ({"precision": "fp8"}, "precision='fp8': precision must be one of"),
        ({"precision": "bf16"}, "with transformer.wte.weight in torch.float64: master weights must be float32; call model.float()"),
        ({"data_parallel": True}, "data_parallel=True without a process group: torch.distributed must be initialised; start with torchrun"),
    ],
)  # fmt: skip
def test_refusals_of_the_engines_settings(options, words):
    """One line with value, rule and fix, before anything is computed; the model stays as it was."""
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words) as error:
        metagradients(model, [tiny_batch()], norm, OPTIMIZERS["sgd"], **options)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    assert_unchanged(model, before)


def test_no_warning_in_an_ordinary_run():
    """Neither PyTorch nor the engine complains."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.func's own, on first use
        for mode in (*FORCED, "auto"):
            metagradients(tiny_llama("sdpa"), make_case(2, "padded")[0], held_out, OPTIMIZERS["adamw"], mode=mode)
