"""A random model of each architecture as generator and as target, through two steps of dpg: it runs."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import SMALL
from safetensors.torch import load_file
from test_models import save_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma3TextConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder, read_lines
from dpgbench.worlds import model_files
from dpgbench.worlds.models import load_target

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
ENDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
MORE = {
    "gemma2": Gemma2Config(**SIZES, **ENDS, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**SIZES, **ENDS, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "qwen2": Qwen2Config(**SIZES, **ENDS),
    "qwen3": Qwen3Config(**SIZES, **ENDS, head_dim=8),
    "smollm3": SmolLM3Config(**SIZES, **ENDS),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level one of 400 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_gpt2(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_two_steps_of_dpg(name, tokenizer, tmp_path):
    """Through two training steps of the target and two updates of the policy, with credit for tokens: rewards tell texts apart and the
    generator moves."""
    settings = copy.deepcopy((ARCHITECTURES | MORE)[name])
    settings.vocab_size, settings.eos_token_id, settings.bos_token_id, settings.pad_token_id = len(tokenizer), 0, None, 0
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models = [f"scale.generator={folder}", f"scale.target={folder}", "max_completion_tokens=12", "task.labels=all"]
    spec = config.read(["task=language", "method=dpg_token", *SMALL, *models], sweep=False).cells[0].spec
    model_files.check(spec.scale, spec.training)
    assert run_cell(spec, tmp_path, let_errors_out=True) == "done"
    written = RunFolder.of(tmp_path, spec).path
    first, second = read_lines(written / "rollouts.jsonl")
    assert all(len(set(step["rewards"])) > 4 for step in (first, second)) and first["texts"] != second["texts"]
    before, after = (load_file(path) for path in (folder / "model.safetensors", written / "generator.safetensors"))
    assert any(key in before and not torch.equal(before[key], after[key]) for key in after)


def test_tokens_that_the_model_does_not_know(tokenizer, tmp_path):
    """A pad token that was added to the tokenizer alone gives way to the end token; an end token like that is one line."""

    def loaded():
        return load_target(config.read(["task=l2_norm", "method=base", f"scale.target={tmp_path}"], sweep=False).cells[0].spec.scale)

    save_gpt2(tmp_path)
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"pad_token": "<|pad|>"})
    more.save_pretrained(tmp_path)
    assert more.pad_token_id == 400 and loaded()[1].pad_token_id == 0
    more.add_special_tokens({"eos_token": "<|over|>"})
    more.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"ends texts with token 401, and the model knows 400 tokens; resize its embeddings"):
        loaded()
