"""What `export` writes needs nothing of dpgbench: transformers reloads the generator and writes the same texts, trl trains on them."""

from __future__ import annotations

import json

import pytest
from conftest import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.core.seeds import derive
from dpgbench.plugins.registry import Registry
from dpgbench.run.cell import run_cell
from dpgbench.run.export import DATASET, WEIGHTS, export
from dpgbench.store.run_folder import RunFolder, read_lines
from dpgbench.worlds.models import Generator


def finished(results, *words: str) -> RunFolder:
    spec = config.read(["task=language", *SMALL, *words], sweep=False).cells[0].spec
    assert run_cell(spec, results) == "done"
    return RunFolder.of(results, spec)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dpg cell with averaged weights, so that what is written and what is trained differ; and its export."""
    folder = finished(tmp_path_factory.mktemp("trained"), "method=dpg", "averaging=0.9", "policy.lr=1e-2")
    return folder, export(folder.path)


def test_transformers_alone_writes_the_same_texts(trained):
    """Reloaded weights, tokenizer and the cell's seed give the deployment dataset back, text by text; the initial weights do not."""
    folder, exported = trained
    kept = read_lines(folder.path / DATASET)
    prompts, texts = [line["prompt"] for line in kept], [line["text"] for line in kept]
    spec = config.replay(exported / "spec.yaml", Registry()).spec

    def written(model, tokenizer) -> list[str]:
        return Generator(model, tokenizer, spec.scale.max_completion_tokens, spec.scale.sampling_batch).sample(prompts, seed)[0]

    seed = derive(spec.seed, "sample", "deployment")
    reloaded = AutoModelForCausalLM.from_pretrained(exported / "generator")
    tokenizer = AutoTokenizer.from_pretrained(exported / "generator")
    assert written(reloaded, tokenizer) == texts
    from dpgbench.worlds import models

    assert written(models.load_generator(spec.scale).model, tokenizer) != texts


def test_trl_trains_on_the_dataset(trained, tmp_path):
    """Loaded by datasets as the card says and by the folder's name; one step of SFT on it."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    folder, exported = trained
    texts = [line["text"] for line in read_lines(folder.path / DATASET)]
    dataset = load_dataset("json", data_files=str(exported / "dataset" / "train.jsonl"), split="train", cache_dir=str(tmp_path))
    assert dataset["text"] == texts and dataset.column_names == ["text"]
    assert load_dataset(str(exported), split="train", cache_dir=str(tmp_path))["text"] == texts
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
        per_device_train_batch_size=4, max_length=24,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(exported / "generator")
    model = AutoModelForCausalLM.from_pretrained(exported / "generator")
    trainer = SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    assert trainer.train().training_loss > 0


def test_the_card_has_the_curve_and_the_settings(trained):
    folder, exported = trained
    card, last = (exported / "README.md").read_text(), folder.result()["snapshots"][-1]
    assert f"| {last['snapshot']} | {last['measures']['test_loss']:.6g} | {last['phi']:.6g} |" in card
    assert "averaging: 0.9" in card and "AutoModelForCausalLM" in card
    assert config.replay(exported / "spec.yaml", Registry()).spec.folder == folder.path.name


def test_a_method_that_trains_no_generator_exports_its_dataset(tmp_path):
    """Best of n: no weights, and the card says whose texts they are. With rounds the generator is trained, and there are."""
    folder = finished(tmp_path, "method=active_inheritance", "n=2")
    exported = export(folder.path, tmp_path / "mine")
    assert not (exported / "generator").exists() and "leaves the generator as it was" in (exported / "README.md").read_text()
    assert len(read_lines(exported / "dataset" / "train.jsonl")) == 16
    folder = finished(tmp_path, "method=active_inheritance_rounds", "n=2", "rounds=2", "round_prompts=8")
    assert (export(folder.path) / "generator" / "model.safetensors").exists()


def test_weights_are_kept_outside_the_hash_or_not_at_all(tmp_path):
    """keep_generator=false changes no number, so it is the same cell; its export says that there are no weights."""
    kept, not_kept = (config.read([*SMALL, f"keep_generator={value}"], sweep=False).cells[0].spec for value in ("true", "false"))
    assert kept.hash == not_kept.hash
    folder = finished(tmp_path, "method=dpg", "keep_generator=false")
    assert not (folder.path / WEIGHTS).exists()
    assert "were not kept" in (export(folder.path) / "README.md").read_text()


def test_a_run_folder_that_cannot_be_exported_is_one_line(trained, tmp_path, dpgbench):
    folder, _ = trained
    with pytest.raises(UserError, match="there is something already"):
        export(folder.path)
    (tmp_path / "spec.yaml").write_text("")
    with pytest.raises(UserError, match="the cell is missing, and only a finished one"):
        export(tmp_path)
    for words, says in ((["/nowhere"], "not a run folder"), ([], "takes one run folder"), (["a", "b"], "takes one run folder")):
        done = dpgbench("export", *words)
        assert done.code == 2 and says in done.err and done.err.count("\n") == 1
    done = dpgbench("export", str(folder.path), f"to={tmp_path / 'x'}")
    assert (
        done.code == 0 and not done.err and json.loads((tmp_path / "x" / "generator" / "config.json").read_text())["model_type"] == "gpt2"
    )
