"""Any two causal models, of different architectures and with different tokenizers; and what is said of one that will not do."""

from __future__ import annotations

import json
import random
import string
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from huggingface_hub import errors
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    RwkvConfig,
    T5Config,
)

from dpgbench import config
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder, last_line
from dpgbench.worlds import model_files, models
from dpgbench.worlds.phrasebook import Phrasebook


def save_gpt2(folder, **special: str):
    """A random GPT-2 with a byte-level BPE tokenizer of 400 tokens."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    english = Phrasebook().prompts("train", 200, random.Random(0))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(english, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} | special)).save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=128, n_embd=32, n_layer=1, n_head=2, **ends)).save_pretrained(folder)


def save_llama(folder):
    """A random Llama with tied head and grouped keys that reads characters."""
    characters = ["<unk>", "[", "]", *sorted(set(string.printable) | set("äöüßéèàñíóúáêçìòùôî"))]
    vocabulary = {character: index for index, character in enumerate(dict.fromkeys(characters))}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r".|\s"), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="]", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(1)
    settings = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=vocabulary["]"],
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The words that choose the two, saved as a user would have them."""
    folder = tmp_path_factory.mktemp("models")
    save_gpt2(folder / "gpt2")
    save_llama(folder / "llama")
    return [f"scale.generator={folder / 'gpt2'}", f"scale.target={folder / 'llama'}"]


TASKS = [file.name for file in Registry().files("task")]


@pytest.mark.parametrize("task", [pytest.param(name, marks=[pytest.mark.slow] * (name != "language")) for name in TASKS])
def test_another_pair_runs_every_task(task, pair, tmp_path):
    """Two steps of dpg: GPT-2 writes, Llama is trained on it, text passes between their tokenizers. The result names both."""
    fewer = ["samples=64", "fresh=64"] * ("scores" in Registry().find("task", task).defines)
    words = [f"task={task}", *fewer, "method=dpg", *SMALL, "inner_steps=2", *pair]
    spec = config.read(words, sweep=False).cells[0].spec
    folder = RunFolder.of(tmp_path, spec)
    assert run_cell(spec, tmp_path) == "done", last_line(folder.path / "error.txt")
    result = folder.result()
    assert result["snapshots"][-1]["snapshot"] == 2 and len(result["texts"]) == 12
    said = json.loads((folder.path / "env.json").read_text())["models"]
    assert [said[role]["name"] for role in ("generator", "target")] == [spec.scale.generator, spec.scale.target]
    assert said["generator"]["sha256"] != said["target"]["sha256"]


def test_revisions_are_part_of_a_cell_and_none_is_what_cells_had_before(pair):
    plain, same, other = (
        config.read([f"scale.target_revision={revision}", *pair[:1]], sweep=False).cells[0].spec for revision in ("null", "null", "v2")
    )
    assert plain.hash == same.hash != other.hash
    before = {**plain.config, "scale": {key: value for key, value in plain.config["scale"].items() if not key.endswith("_revision")}}
    assert RunSpec(before).hash == plain.hash


def message(*words: str) -> str:
    spec = config.read(list(words), sweep=False).cells[0].spec
    with pytest.raises(UserError) as caught:
        model_files.check(spec.scale, spec.training)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_local_models_that_will_not_do(pair, tmp_path):
    """Each is one line, before torch is loaded: missing, empty, not causal, without an end, too short, a revision of a folder."""
    (tmp_path / "empty").mkdir()
    BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    ).save_pretrained(tmp_path / "bert")
    save_gpt2(tmp_path / "endless", eos_token=None)
    assert "no such folder" in message(f"scale.target={tmp_path}/nothing")
    assert "no config.json there" in message(f"scale.target={tmp_path}/empty")
    assert "BertForMaskedLM is not a causal language model" in message(f"scale.target={tmp_path}/bert")
    assert "has no end-of-sequence token" in message(f"scale.generator={tmp_path}/endless")
    assert "reads 64 tokens and an example has training.max_length=65; write training.max_length=64" in message(*pair, "max_length=65")
    assert "reads 128 tokens and a completion has 129" in message(*pair, "max_completion_tokens=129")
    assert "a folder, which has no revisions" in message(*pair, "scale.target_revision=main")
    spec = config.read([f"scale.generator={tmp_path}/endless"], sweep=False).cells[0].spec
    with pytest.raises(UserError, match="no end-of-sequence token"):
        models.load_generator(spec.scale)


def test_models_whose_flops_are_not_attentions_are_told_at_once(tmp_path):
    """State spaces, recurrences, mixtures, an encoder with a decoder: one line from config.json alone, and again by what is loaded."""
    sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2)
    mixed = LlamaConfig(**sizes, intermediate_size=8, num_attention_heads=1, layer_types=["full_attention", "linear_attention"])
    for name, settings, says in (
        ("mamba", MambaConfig(**sizes, state_size=4), "mamba keeps a state from token to token"),
        ("rwkv", RwkvConfig(**sizes), "rwkv keeps a state from token to token"),
        ("mixed", mixed, "llama has layers of another kind (linear_attention)"),
        ("t5", T5Config(vocab_size=9, d_model=8), "an encoder and a decoder"),
    ):
        settings.save_pretrained(tmp_path / name)
        assert says in message(f"scale.generator={tmp_path / name}")
    loaded = (MambaConfig(**sizes), "mamba has layers of another kind"), (mixed, "linear_attention"), (RwkvConfig(), "rwkv keeps")
    for settings, says in loaded:
        with pytest.raises(UserError, match=says):
            models._check_attention("scale.target=x", settings)


RESPONSE = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (errors.GatedRepoError("403", response=RESPONSE), "some/model: gated; accept its terms"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "the model hub has no such model; check the name"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "it has no revision v9"),
        (errors.RemoteEntryNotFoundError("404", response=RESPONSE), "no config.json there"),
        (errors.LocalEntryNotFoundError("Offline. Check your connection"), r"cannot be loaded (Offline); go online once"),
        (errors.OfflineModeIsEnabled("offline mode"), "cannot be loaded (offline mode); go online once"),
    ],
)
def test_hub_models_that_cannot_be_had(raised, says, monkeypatch):
    """What the hub may answer, each in one line; the cache is asked first."""
    asked = []

    def download(**where):
        asked.append(where.get("local_files_only", False))
        raise errors.LocalEntryNotFoundError("not cached") if asked[-1] else raised

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert says in message("scale.target=some/model", "scale.target_revision=v9")
    assert asked == [True, False]


def test_the_command_line_says_it_before_torch_is_loaded(imports_of, dpgbench, tmp_path):
    done = dpgbench("run", f"scale.generator={tmp_path}/nothing", f"results={tmp_path}")
    assert done.code == 2 and done.err.count("\n") == 1 and "no such folder" in done.err
    modules = imports_of("run", f"scale.generator={tmp_path}/nothing", f"results={tmp_path}")
    assert "dpgbench.worlds.model_files" in modules and "torch" not in modules
