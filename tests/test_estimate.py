"""The estimate of a dry run: sizes against real models, FLOPs against what finished cells were charged."""

from __future__ import annotations

import re

import pytest
from conftest import SMALL
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dpgbench import config
from dpgbench.api import Options
from dpgbench.bench import flops as compute
from dpgbench.cli import main
from dpgbench.plugins.registry import Registry
from dpgbench.run import estimate
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder
from dpgbench.worlds import adapters, model_files

WIDE = dict(vocab_size=211, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=311, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "gpt2_inner": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=2, n_inner=100, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "mistral_wide_heads": lambda: MistralForCausalLM(MistralConfig(**WIDE, head_dim=16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_from_a_configuration_are_those_of_the_model(name):
    """The numbers that charges are computed from, and every parameter."""
    model = MODELS[name]()
    found, loaded = estimate.shape_of(model.config.to_dict()), compute.shape_of(model)
    assert (found.matmul_weights, found.attention_flops_per_pair, found.head) == (
        loaded.matmul_weights, loaded.attention_flops_per_pair, loaded.head,
    )  # fmt: skip
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.untied == found.parameters + (found.head if model.config.tie_word_embeddings else 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [["all-linear"], ["c_attn", "q_proj", "v_proj"], ["mlp.c_proj", "up_proj"]], ids=" ".join)
def test_sizes_of_adapters_are_those_of_the_model(name, targets):
    """All products, A and B, and what no gradient flows back through, as found by letting a token through."""
    lora = Options({"rank": 3, "alpha": 16.0, "targets": targets})
    model = MODELS[name]()
    found, loaded = estimate.shape_of(model.config.to_dict(), lora), compute.shape_of(adapters.adapt(model, lora, seed=0), trains=True)
    assert (found.matmul_weights, found.adapters, found.untouched) == (loaded.matmul_weights, loaded.adapters, loaded.untouched)
    assert found.adapters > 0 and found.untouched > 0
    assert estimate.shape_of(model.config.to_dict(), Options({"rank": 3, "alpha": 16.0, "targets": ["nowhere"]})) is None


def test_known_models_have_their_published_sizes():
    sizes = {name: estimate.shape_of(config).parameters for name, config in estimate.KNOWN.items()}
    assert sizes == {
        "openai-community/gpt2": 124_439_808, "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, model_files.SMOLLM2: 134_515_008,
    }  # fmt: skip
    assert estimate.shape_of({"model_type": "mamba"}) is None


@pytest.mark.parametrize(
    "words",
    [["method=dpg", "inner_steps=4"], ["method=base"], ["method=active_inheritance", "n=3"]]
    + [
        pytest.param(words, marks=pytest.mark.slow)
        for words in (
            ["method=dpg"], ["method=dpg", "rank=4"], ["method=dpg_token"], ["method=naive"], ["method=langid"], ["method=oracle"],
            ["method=optimsyn"], ["method=influence_less", "influence_texts=64"], ["method=influence_ekfac", "influence_texts=64"],
            ["method=active_inheritance_rounds", "n=2", "rounds=3", "round_prompts=32"], ["method=influence"],
            ["method=influence", "credit=token", "baseline=critic"], ["method=prompt_only", "search=3", "search_texts=16"],
        )
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_cell_costs_more_than_was_said_and_none_half_of_it(words, tmp_path):
    """Completions are shorter than they may be, a metagradient takes up to what is said of it, and this task's Phi next to nothing."""
    task = "language" if words[0] in ("method=langid", "method=influence_ekfac") else "l2_norm"
    spec = config.read([f"task={task}", *SMALL, *words], sweep=False).cells[0].spec
    assert run_cell(spec, tmp_path) == "done"
    spent = RunFolder.of(tmp_path, spec).result()["snapshots"][-1]["flops"]
    assert spent <= estimate.estimate(spec, Registry()).flops <= 2 * spent


def test_every_method_of_ours_has_an_estimate():
    cells = config.read(["task=language,length", "method=all"], sweep=True).cells
    assert all(estimate.estimate(cell.spec, Registry()) for cell in cells if not cell.skip)


def test_a_budget_is_what_a_cell_costs_at_most():
    """Without a number of steps it is the cost; with one, whichever is less. A model that is not here has no price."""

    def flops(*words: str) -> float | None:
        found = estimate.estimate(config.read(["task=l2_norm", *words], sweep=False).cells[0].spec, Registry())
        return found and found.flops

    assert flops("method=dpg", "steps=null", "budget.flops=1e12") == 1e12
    assert flops("method=dpg", "budget.flops=1e9") == 1e9 < flops("method=dpg", "steps=1")
    assert flops("method=dpg", "steps=null", "budget.tokens=1e5") < flops("method=dpg", "steps=null", "budget.tokens=2e5")
    assert flops("scale.target=some/model") is None


def test_this_machines_speed_is_measured():
    assert 1e8 < estimate.flops_a_second(64, 256) < 1e13


def test_memory_grows_with_what_must_fit():
    """More steps' states, more completions sampled at once, a larger model; fewer states kept take less."""

    def memory(*words: str) -> float:
        spec = config.read(["scale=paper", "task=l2_norm", *words], sweep=False).cells[0].spec
        return estimate.estimate(spec, Registry()).memory

    plain = memory("completions=128", "max_completion_tokens=16")
    assert plain > (16 * 1_235_814_400 + 4 * 163_037_184)  # weights, gradients and moments; the target with a head of its own
    many = ["inner_steps=32", "completions=128", "max_completion_tokens=16", "deployment_texts=1024"]
    assert plain < memory(*many) < memory(*many, "checkpoint=null")
    full, adapted = memory("completions=128", "max_completion_tokens=16"), memory("completions=128", "max_completion_tokens=16", "rank=8")
    assert full - 12 * 1_235_814_400 < adapted < full - 11.8 * 1_235_814_400  # no gradient and no moments of 1.2 billion weights
    assert memory("completions=4096", "rollout_batch=null") > memory("completions=2048", "rollout_batch=null") > memory("completions=2048")


def test_a_dry_run_says_what_the_papers_runs_cost(dpgbench, tmp_path, imports_of):
    done = dpgbench("sweep", "suite=paper_qr", "--dry-run", f"results={tmp_path}")
    assert done.code == 0 and re.search(r"qr.dpg.* about \d\.\de\+\d+ FLOPs and [\d.e+]+ GB", done.out)
    assert re.search(r"about .* FLOPs in 3 cells, .* GPU-hours if a GPU sustains 2e\+13 FLOPs a second \(not measured\)", done.out)
    assert not {"torch", "trl"} & imports_of("sweep", "suite=paper_qr", "--dry-run", f"results={tmp_path}")


def test_a_dry_run_says_how_long_where_to_and_what_its_seeds_can_show(capsys, tmp_path):
    def told(*words: str) -> str:
        assert main([*words, "--dry-run", f"results={tmp_path}"]) == 0
        return capsys.readouterr().out

    out = told("sweep", "method=dpg,base,optimsyn", "task=l2_norm", "name=mine")
    assert re.search(r"optimsyn.* about \d+ (s|min) here, about \d", out) and "no estimate" not in out
    assert re.search(r"of processor time here, if FLOPs take as long as in the matrix products just timed, [\d.e+]+ GFLOPs a second", out)
    assert "one seed allows no test" in out and f"{tmp_path}/mine/index.html" in out and "GPU" not in out
    assert "3 seeds cannot give a p below 0.25" in told("sweep", "method=dpg,base", "task=l2_norm", "seed=0,1,2")
    assert "seed" not in told("sweep", "method=dpg,base", "task=l2_norm", "seed=0,1,2,3,4,5").partition("cells: ")[2]
    out = told("run", "scale.target=some/model", "method=base")
    assert "no estimate" in out and "GFLOPs" not in out and f"run folder: {tmp_path}/runs/language_de.base.s0." in out
