"""A local model folder: its content is part of the cell and its path is not; a cell is never run on another content."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import SMALL

from dpgbench import config
from dpgbench.cli import main
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder
from dpgbench.worlds import model_files, phrasebook, text_files


@pytest.fixture
def folder(tmp_path):
    """A user's checkpoint."""
    return shutil.copytree(phrasebook.WEIGHTS / "generator", tmp_path / "models" / "mine")


def spec(*words):
    return config.read(["task=l2_norm", "method=base", *SMALL[3:-1], *words], sweep=False).cells[0].spec


def change(folder, file: str = "model.safetensors") -> None:
    """As a training run that saves under the same name would: other bytes, as many."""
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    (folder / file).write_bytes(content)


@pytest.mark.parametrize("role", model_files.ROLES)
def test_the_content_is_in_the_hash_and_the_path_is_not(role, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    before = spec(f"scale.{role}={folder}").hash
    assert before == spec(f"scale.{role}=models/mine").hash == spec(f"scale.{role}=copy").hash
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copytree(folder, tmp_path / file)
        change(tmp_path / file, file)
        assert spec(f"scale.{role}={tmp_path / file}").hash != before, file
    for file in ("README.md", "optimizer.pt", "trainer_state.json", "training_args.bin"):
        (folder / file).write_text("as a trainer leaves it", encoding="utf-8")
    assert spec(f"scale.{role}={folder}").hash == before
    change(folder)
    assert spec(f"scale.{role}={folder}").hash != before


def test_what_has_a_name_of_its_own_is_what_it_was():
    """Embedded models and the hub's: no digest, and the hash that this cell has had since scale tiny version 3."""
    plain, hub = spec(), spec("scale.generator=some/model", "scale.target=HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not [key for cell in (plain, hub) for key in cell.scale if key.endswith("_sha256")]
    assert config.read(["task=length"], sweep=False).cells[0].spec.hash == "efb39270a3"


def test_a_retrained_folder_is_run_again_and_its_old_cell_is_not_replayed(folder, tmp_path, capsys):
    words = ["run", "task=l2_norm", "method=base", "deployment_texts=8", f"scale.generator={folder}", f"results={tmp_path / 'r'}"]
    assert main(words) == 0
    (stored,) = (tmp_path / "r" / "runs").glob("*/spec.yaml")
    assert config.replay(stored, Registry()).spec.folder == stored.parent.name
    env = json.loads((stored.parent / "env.json").read_text(encoding="utf-8"))
    assert env["models"]["generator"]["sha256"] == spec(f"scale.generator={folder}").scale.generator_sha256
    change(folder)
    assert main(["run", f"spec={stored}", f"results={tmp_path / 'new'}"]) == 2
    said = capsys.readouterr().err
    assert "models/mine: its content has SHA-256" in said and "bring the old folder back, or start a new cell" in said
    assert said.count("\n") == 1
    assert main([*words, "--dry-run"]) == 0 and "1 cells: 1 missing" in capsys.readouterr().out


def test_a_folder_that_is_gone_is_not_asked_for_on_the_hub(folder, tmp_path, monkeypatch):
    """`models/mine` could be a stranger's repository; a cell in a job, whose folder is another, is told so."""
    monkeypatch.chdir(tmp_path)
    cell = spec("scale.generator=models/mine")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **_: pytest.fail("the hub was asked"))
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match=r"scale.generator=models/mine: no such folder here, and this cell was made with one"):
        model_files.find(cell.scale, "generator")
    assert run_cell(cell, tmp_path) == "failed"
    assert "no such folder here" in (RunFolder.of(tmp_path, cell).path / "error.txt").read_text(encoding="utf-8")


def test_a_folder_is_read_once_for_thousands_of_cells(folder, monkeypatch):
    """And again when it was written to; torch is not asked."""
    read, inner = [], text_files.digest
    monkeypatch.setattr(text_files, "digest", lambda path: read.append(path) or inner(path))
    words = ["task=l2_norm", "method=base", f"scale.generator={folder}", f"seed={','.join(map(str, range(1000)))}"]
    assert len(config.read(words, sweep=True).cells) == 1000
    assert len(read) == 5
    change(folder)
    config.read(words, sweep=True)
    assert len(read) == 10


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, '{"n_positions": ' + "9" * 5000 + "}", "{", "\ufeff{}"])
def test_a_config_that_is_none_is_one_line(content, folder):
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"its config.json cannot be read \(\w+\); get the model anew"):
        model_files.find(spec(f"scale.generator={folder}").scale, "generator")


def test_settings_of_another_kind_in_a_models_files_are_passed_over(folder):
    """What the check before the run cannot read is the loader's to judge."""
    config_json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    strange = {"architectures": "GPT2LMHeadModel", "n_positions": "96", "max_position_embeddings": None, "n_ctx": -1}
    (folder / "config.json").write_text(json.dumps({**config_json, **strange}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    assert model_files.find(spec(f"scale.generator={folder}").scale, "generator").context is None
