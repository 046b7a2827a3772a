"""Low-rank adapters: only they change, averages and files hold them alone, and what is exported has them merged."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpgbench import config
from dpgbench.api import Options
from dpgbench.bench.grpo import train_policy
from dpgbench.bench.weight_average import WeightAverage
from dpgbench.core.errors import UserError
from dpgbench.run.cell import run_cell
from dpgbench.run.export import WEIGHTS, export
from dpgbench.store.run_folder import RunFolder
from dpgbench.worlds import models
from dpgbench.worlds.adapters import adapt, trained

LORA = ["policy.lora.rank=4"]


def lora(*targets: str, rank: int = 4) -> Options:
    return Options({"rank": rank, "alpha": 16.0, "targets": list(targets) or ["all-linear"]})


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def lengths(rollouts) -> list[float]:
    return [float(len(text)) for text in rollouts.completions]


def test_what_an_adapter_computes():
    """y = x W + b + alpha / rank * (x A^T) B^T by hand, on GPT-2's first matrix; before training B is zero and no logit differs."""
    plain, ids = gpt2(), torch.arange(8)[None]
    with torch.no_grad():
        before = plain(ids).logits
        model = adapt(plain, lora(rank=3), seed=1)
        assert torch.equal(model(input_ids=ids).logits, before)
        weights = trained(model)
        assert len(weights) == 2 * 4 * 2 and all(".lora_" in name for name in weights)
        layer, x = plain.transformer.h[0].attn.c_attn, torch.randn(2, 16)
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        b.normal_()
        assert torch.allclose(layer(x), x @ layer.base_layer.weight + layer.base_layer.bias + 16 / 3 * (x @ a.T) @ b.T, atol=1e-5)
    again = trained(adapt(gpt2(), lora(rank=3), seed=1))
    other = trained(adapt(gpt2(), lora(rank=3), seed=2))
    name = next(iter(weights))
    assert torch.equal(weights[name], again[name]) and not torch.equal(weights[name], other[name])


def test_adapters_draw_from_no_stream_but_their_own():
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = gpt2()
    torch.manual_seed(5)
    adapt(model, lora(), seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_targets_that_cannot_be(tied):
    """Names the generator does not have, and the LM head, whose product TRL computes by itself: one line, and the names there are."""
    settings = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(UserError, match=r"policy.lora.targets=\['c_attn'\]: the generator has none of them; it has .*q_proj") as caught:
        adapt(LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=tied)), lora("c_attn"), seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the LM head takes no adapter"):
        adapt(LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=tied)), lora("q_proj", "lm_head"), seed=0)


def test_training_changes_adapters_and_not_a_bit_of_the_weights(bench):
    """Every frozen tensor is the same to the bit after three steps, and the optimizer never had it; every B has moved."""
    work = bench("steps=3", "averaging=0.5", *LORA)
    before = {name: weight.detach().clone() for name, weight in work.generator.model.named_parameters()}
    for snapshot in train_policy(work, lengths):
        last = snapshot
    weights = dict(work.generator.model.named_parameters())
    frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): weight for name, weight in frozen.items()}
    assert plain.keys() == before.keys() and all(torch.equal(plain[name], before[name]) for name in before)
    moved = [bool(weight.any()) for name, weight in trained(work.generator.model).items() if ".lora_B." in name]
    assert moved and all(moved)
    assert last.weights().keys() == trained(work.generator.model).keys()
    assert not torch.equal(*(next(weight for name, weight in of.items() if ".lora_B." in name) for of in (last.weights(), weights)))


def test_a_run_with_adapters_starts_as_one_without(bench):
    """The first rollouts and the first snapshot's texts are the same, for B is zero; the update is cheaper, sampling a little dearer."""
    lines, texts, spent = [], [], []
    for words in ((), LORA):
        work = bench("steps=1", *words)
        loop = train_policy(work, lengths)
        texts.append(next(loop).sample(work.prompts(8, "test")))
        next(loop)
        lines.append(work.lines[0]["rollouts"])
        spent.append(work.meter.flops)
        loop.close()
    assert lines[0] == lines[1] and texts[0] == texts[1]
    assert 0.6 < spent[1]["policy_update"] / spent[0]["policy_update"] < 0.85
    assert 1 < spent[1]["generate"] / spent[0]["generate"] < 1.15


@pytest.mark.slow
def test_the_policy_learns_what_is_rewarded_with_adapters(bench):
    """Thirty steps of paying for every "the" bring more of them, as with all weights (tests/test_grpo.py)."""
    work = bench("steps=30", "completions=32", "policy.lr=1e-2", *LORA)
    for _ in train_policy(work, lambda rollouts: [text.split().count("the") for text in rollouts.completions]):
        pass
    counts = [line["reward_mean"] for line in work.lines]
    assert sum(counts[-5:]) > 1.5 * sum(counts[:5])


@pytest.mark.slow
def test_checkpointed_activations_change_no_number_of_adapters(bench):
    """As without: the gradient reaches the first layer's adapters through inputs that need none."""
    norms = []
    for value in ("false", "true"):
        work = bench("seed=5", f"activation_checkpointing={value}", *LORA)
        list(train_policy(work, lengths))
        norms.append([line["gradient_norm"] for line in work.lines])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_averages_are_of_what_trains():
    model = adapt(gpt2(), lora(), seed=0)
    average = WeightAverage(model, 0.9)
    assert average.mean.keys() == trained(model).keys()
    with average.loaded():
        assert sum(weight.numel() for weight in average.mean.values()) < 0.5 * sum(weight.numel() for weight in model.parameters())


def test_a_policy_beside_the_generator_leaves_it_alone(bench):
    """A copy that trains adapters: the frozen generator has none, writes the same texts and is charged as before."""
    work = bench("steps=1", *LORA)
    prompts = work.prompts(4, "test")
    before, writer = work.sample(prompts, "a test"), work.generator.copy()
    list(train_policy(work, lengths, generator=writer, sample=lambda prompts: work.sample(prompts, "deployment")))
    assert len(trained(writer.model)) < len(trained(work.generator.model)) and work.sample(prompts, "a test") == before


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["method=dpg", "averaging=0.9"], marks=pytest.mark.slow),
        ["method=active_inheritance_rounds", "n=2", "rounds=2", "round_prompts=8"],
    ],
)
def test_the_export_is_merged_and_the_adapter_is_beside_it(words, tmp_path):
    """The run keeps A and B alone. transformers without peft loads the generator and gives the logits that the adapted one gives;
    peft gives them too, from the scale's generator and `adapter`. Fine-tuning by likelihood trains adapters as well."""
    from peft import PeftModel

    spec = config.read(["task=language", *SMALL, *words, *LORA, "policy.lr=1e-2"], sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "done"
    folder = RunFolder.of(tmp_path, spec)
    kept, exported = load_file(folder.path / WEIGHTS), export(folder.path)
    assert kept and all(".lora_" in name for name in kept)
    generator = models.load_generator(spec.scale)
    generator.adapt(spec.method.get("lora") or spec.method.policy.lora, seed=0)
    ids = torch.randint(3, 700, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        untrained = generator.model(input_ids=ids).logits
        for name, weight in trained(generator.model).items():
            weight.copy_(kept[name])
        wanted = generator.model(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(exported / "generator")
        assert type(merged) is GPT2LMHeadModel and not [name for name, _ in merged.named_parameters() if "lora" in name]
        assert torch.allclose(merged.eval()(ids).logits, wanted, atol=1e-4) and not torch.allclose(untrained, wanted, atol=1e-2)
        beside = PeftModel.from_pretrained(models.load_generator(spec.scale).model, str(exported / "adapter")).eval()
        assert torch.equal(beside(input_ids=ids).logits, wanted)
    said = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "phrasebook" and said["r"] == 4
    assert {path.name for path in (exported / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "low-rank adapters" in (exported / "README.md").read_text()
