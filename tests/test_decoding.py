"""The sampling loop: the draws of transformers' `generate` on every architecture it takes, and the distribution it draws from."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)  # fmt: skip

from dpgbench.core.options import Options
from dpgbench.core.seeds import torch_seeded
from dpgbench.worlds import adapters, decoding
from dpgbench.worlds.models import without_noise

PAD, END, OTHER_END = 0, 2, 7
PROMPTS = [[5, 9, 4], [5, 9, 4], [8], [3, 3, 6, 1, 9], [8], [5, 9, 4], [11, 30, 12, 13]] * 5


def small(settings, seed: int = 0):
    """A model of this configuration whose distributions are far from flat, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(without_noise(copy.deepcopy(settings)), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def generated(model, prompts, most: int, seed: int):
    """What `generate` writes, and torch's generator after it."""
    ids, mask = decoding.padded(prompts, PAD)
    full = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=most, pad_token_id=PAD, eos_token_id=[END, OTHER_END]
    )
    with torch_seeded(seed):
        rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=full)[:, ids.shape[1] :].tolist()
        return decoding.cut(rows, {END, OTHER_END}), torch.random.get_rng_state()


def written(model, prompts, most: int, seed: int):
    with torch_seeded(seed):
        return decoding.write(model, prompts, [END, OTHER_END], PAD, most), torch.random.get_rng_state()


@pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_seed_draws_what_generate_draws(settings):
    """Token for token, prompts of several lengths and twice over, and torch's generator is left where `generate` leaves it."""
    model = small(settings)
    assert decoding.keeps_plain_cache(model)
    for seed in range(3):
        (ours, after), (theirs, wanted) = written(model, PROMPTS, 12, seed), generated(model, PROMPTS, 12, seed)
        assert ours == theirs and torch.equal(after, wanted)
        assert len({len(row) for row in ours}) > 3, "rows that all end together never leave"


def test_one_token_and_one_row():
    model = small(ARCHITECTURES["gpt2"])
    for prompts, most in (([[4]], 1), ([[4]], 9), (PROMPTS, 1)):
        assert written(model, prompts, most, 5)[0] == generated(model, prompts, most, 5)[0]


def test_adapters_draw_as_their_model_does():
    """Adapters that do something, in a wrapper that prepares inputs in its own way."""
    model = adapters.adapt(small(ARCHITECTURES["llama"]), Options({"rank": 2, "alpha": 32.0, "targets": ["all-linear"]}), 0).eval()
    plain = written(model, PROMPTS, 8, 1)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 if "lora_B" in name else 0.0)
    assert decoding.keeps_plain_cache(model)
    assert plain != written(model, PROMPTS, 8, 1)[0] == generated(model, PROMPTS, 8, 1)[0]


def test_other_architectures_go_through_generate():
    """A state space, a window over the tokens, an encoder-decoder, and a model that prepares its inputs in its own way."""
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1)
    window = MistralConfig(**sizes, intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, sliding_window=4)
    for model in (
        AutoModelForCausalLM.from_config(MambaConfig(**sizes, state_size=4)),
        AutoModelForCausalLM.from_config(window),
        T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        type("Own", (GPT2LMHeadModel,), {"prepare_inputs_for_generation": lambda self, *_, **more: more})(
            GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
        ),
        torch.nn.Linear(2, 2),
    ):
        assert not decoding.keeps_plain_cache(model), type(model).__name__


def test_texts_have_the_models_distribution():
    """20,000 texts of at most two tokens from five words against the probabilities of all of them: chi-squared within its 99.9% bound."""
    model = small(GPT2Config(vocab_size=5, n_embd=16, n_layer=1, n_head=2))
    prompt, count = [3, 1], 20_000
    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).tolist()
        second = [model(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1].double().softmax(-1).tolist() for token in range(5)]
    chances = {(END,): first[END]}
    chances |= {(a, b): first[a] * second[a][b] for a, b in itertools.product(range(5), repeat=2) if a != END}
    with torch_seeded(0):
        texts = decoding.write(model, [prompt] * count, [END], PAD, 2)
    found = {text: 0 for text in chances}
    for text in texts:
        found[tuple(text)] += 1
    assert sum(chances.values()) == pytest.approx(1) and max(chances.values()) > 3 * min(chances.values())
    statistic = sum((found[text] - count * chance) ** 2 / (count * chance) for text, chance in chances.items())
    assert statistic < 45.3  # of chi-squared with 20 degrees of freedom


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_the_race_is_torchs_multinomial_to_the_bit(scale):
    """For all rows, and for some of them what all would have got; and torch's generator goes on from the same place."""
    noise = torch.Generator().manual_seed(0)
    for seed in range(10):
        p = (torch.randn(64, 97, generator=noise) * scale).softmax(-1)
        here = torch.arange(64)[torch.rand(64, generator=noise) < (1.0 if seed < 2 else 0.4)]
        with torch_seeded(seed):
            wanted, after = torch.multinomial(p, 1)[:, 0], torch.random.get_rng_state()
        with torch_seeded(seed):
            assert torch.equal(decoding.race(p[here], here, 64), wanted[here])
            assert torch.equal(torch.random.get_rng_state(), after)


def test_a_bfloat16_product_draws_as_generate_does():
    model = small(ARCHITECTURES["gpt2"])
    for mixed in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with mixed:
            assert written(model, PROMPTS, 6, 3)[0] == generated(model, PROMPTS, 6, 3)[0]
