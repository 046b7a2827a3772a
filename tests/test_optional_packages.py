"""Rollouts and trackers that need a package of their own: named in one line where it is missing, handed to TRL where it is there."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch
from conftest import SMALL

from dpgbench import config
from dpgbench.bench import grpo, tracking
from dpgbench.config import optional_packages
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import TRACKERS, RunFolder

VLLM = ["policy.rollout=vllm", "policy.vllm_memory=0.4"]


def spec_of(*words: str):
    return config.read([*words], sweep=False).cells[0].spec


# ---- vLLM


def test_vllm_that_is_not_installed_is_one_line_before_anything_is_loaded(dpgbench, imports_of, tmp_path, monkeypatch):
    words = ("run", "task=l2_norm", "method=dpg", "policy.rollout=vllm", f"results={tmp_path}")
    if optional_packages.installed("vllm"):
        pytest.skip("vllm is installed here")
    done = dpgbench(*words)
    assert done.code == 2 and not done.out and not list(tmp_path.glob("runs/*"))
    wanted = "policy.rollout=vllm: vllm is not installed; `pip install 'trl[vllm]'`, or write policy.rollout=transformers"
    assert done.err == f"dpgbench: {wanted}\n"
    assert not {"torch", "trl", "transformers"} & imports_of(*words)
    assert dpgbench(*words, "--dry-run").code == 0, "what it would cost can be asked anywhere"
    monkeypatch.setattr(optional_packages, "installed", lambda name: True)
    optional_packages.check(spec_of("policy.rollout=vllm"))


def test_what_samples_is_part_of_the_cell_and_its_memory_is_not():
    plain, vllm, wider = (spec_of(*words) for words in ((), VLLM, ("policy.rollout=vllm",)))
    assert plain.hash != vllm.hash == wider.hash
    before = {name: value for name, value in plain.config["method"]["policy"].items() if name not in ("rollout", "vllm_memory")}
    stored = {**plain.config, "method": {**plain.config["method"], "policy": before}}
    assert RunSpec(stored).hash == plain.hash, "as stored before there was a choice"
    for word, says in (("rollout=vlm", "did you mean 'vllm'"), ("rollout=vllm vllm_memory=1.5", "vllm_memory=1.5: a share of the GPU's")):
        with pytest.raises(UserError, match=says):
            spec_of(*(f"policy.{part}" for part in word.split()))


def test_trl_is_told_to_sample_with_vllm(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(optional_packages, "installed", lambda name: True)
    work = bench(*VLLM, "scale.max_prompt_tokens=30")
    settings = grpo._trl_settings(work, work.options.policy, work.generator, str(tmp_path))
    assert (settings.use_vllm, settings.vllm_mode, settings.vllm_gpu_memory_utilization) == (True, "colocate", 0.4)
    assert settings.vllm_max_model_length == 30 + work.generator.max_completion_tokens
    plain = bench("seed=1")
    assert not grpo._trl_settings(plain, plain.options.policy, plain.generator, str(tmp_path)).use_vllm


class StandIn:
    """In place of TRL's VLLMGeneration: the policy's own sampling, and no probabilities (NaN), with which TRL corrects nothing."""

    made: list = []  # noqa: RUF012

    def __init__(self, model, processing_class, max_completion_length, **settings):
        self.model, self.tokenizer, self.room, self.settings, self.synced, self.calls = (
            model,
            processing_class,
            max_completion_length,
            settings,
            0,
            [],
        )
        self.made.append(self)

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        self.calls.append(len(prompts))
        inputs = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
        ends = dict(pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id)
        ids = self.model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=self.room, **ends)[:, inputs["input_ids"].shape[1] :]
        cut = [row[: row.index(ends["eos_token_id"]) + 1] if ends["eos_token_id"] in row else row for row in ids.tolist()]
        return prompts, cut, [[[float("nan")] for _ in row] for row in cut], None


@pytest.mark.parametrize("lora", [[], ["policy.lora.rank=4"]], ids=["weights", "adapters"])
def test_the_loop_runs_on_rollouts_of_other_hands(bench, monkeypatch, lora):
    """With a stand-in for vLLM: weights reach it before each step, a step is one call whatever rollout_batch says, and another forward
    pass is charged, because TRL computes the policy's own probabilities of what somebody else sampled."""
    from trl.trainer import grpo_trainer

    monkeypatch.setattr(optional_packages, "installed", lambda name: True)
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", StandIn)
    StandIn.made.clear()
    work, passes = bench(*VLLM, "policy.rollout_batch=8", *lora), []
    inner = grpo._Trainer._get_per_token_logps_and_entropies

    def counting(trainer, *arguments, **more):
        passes.append(torch.is_grad_enabled())
        return inner(trainer, *arguments, **more)

    monkeypatch.setattr(grpo._Trainer, "_get_per_token_logps_and_entropies", counting)
    steps = [snapshot.step for snapshot in grpo.train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions])]
    (engine,) = StandIn.made
    assert steps == [0, 1, 2] and engine.synced == 2 and engine.calls == [16, 16]
    assert engine.settings["mode"] == "colocate" and engine.settings["gpu_memory_utilization"] == 0.4
    assert passes == [False, True] * 2
    assert all(line["gradient_norm"] > 0 for line in work.lines)
    plain = bench("seed=0", *lora)
    list(grpo.train_policy(plain, lambda rollouts: [float(len(text)) for text in rollouts.completions]))
    ratio = work.meter.flops["policy_update"] / plain.meter.flops["policy_update"]
    assert ratio == pytest.approx(1.45 if lora else 4 / 3, rel=0.1)


# ---- trackers


def test_every_tracker_here_is_one_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(tracking.PACKAGES) <= set(INTEGRATION_TO_CALLBACK)


@pytest.mark.slow
def test_tensorboard_gets_every_step_and_changes_no_number(tmp_path):
    """Events in the run folder's `tracking`: our reward, Phi and FLOPs beside TRL's own numbers, step by step as in metrics.jsonl, which is
    the same to the byte as without; so is the cell."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    words = ["task=l2_norm", "method=dpg", *SMALL]
    plain, told = (spec_of(*words, *more) for more in ([], ["policy.report_to=[tensorboard]"]))
    assert plain.hash == told.hash
    assert run_cell(plain, tmp_path / "plain") == run_cell(told, tmp_path / "told") == "done"
    quiet, folder = RunFolder.of(tmp_path / "plain", plain), RunFolder.of(tmp_path / "told", told)
    assert (quiet.path / "metrics.jsonl").read_bytes() == (folder.path / "metrics.jsonl").read_bytes()
    assert not (quiet.path / TRACKERS).exists() and "TENSORBOARD_LOGGING_DIR" not in os.environ
    events = event_accumulator.EventAccumulator(str(folder.path / TRACKERS))
    events.Reload()
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert [line["step"] for line in steps] == [1, 2]
    pairs = {
        "dpgbench/reward_mean": "reward_mean",
        "dpgbench/phi": "phi",
        "dpgbench/flops": "flops",
        "entropy": "entropy",
        "grad_norm": "gradient_norm",
    }
    for tag, name in pairs.items():
        seen = events.Scalars(f"train/{tag}")
        assert [event.step for event in seen] == [1, 2]
        assert [event.value for event in seen] == pytest.approx([line[name] for line in steps], rel=1e-6)
    folder.begin({})
    assert not (folder.path / TRACKERS).exists(), "a cell that starts again starts its curves again"


def test_other_trackers_find_the_folder_and_end_with_the_cell(monkeypatch, tmp_path):
    """wandb writes where it is told by environment, which is as it was afterwards; its run ends, so that the next cell begins another."""
    finished = []
    stand_in = types.SimpleNamespace(finish=lambda: finished.append(os.environ["WANDB_DIR"]), teardown=lambda: finished.append("reset"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    with tracking.into(tmp_path / "tracking", ["wandb"]):
        assert os.environ["WANDB_DIR"] == str(tmp_path / "tracking") and (tmp_path / "tracking").is_dir() and not finished
        assert os.environ["WANDB_PROJECT"] == "mine"
    assert finished == [str(tmp_path / "tracking"), "reset"] and "WANDB_DIR" not in os.environ and os.environ["WANDB_PROJECT"] == "mine"
    with tracking.into(tmp_path / "nothing", []):
        assert not (tmp_path / "nothing").exists()


def test_a_tracker_that_is_unknown_or_missing_is_one_line(monkeypatch):
    for words, says in (
        ("tensorboard", r"report_to=tensorboard: expected a list, such as policy.report_to=\[tensorboard\]"),
        ("[tensorbord]", "tensorbord is no tracker known here; did you mean 'tensorboard'"),
    ):
        with pytest.raises(UserError, match=says):
            spec_of(f"policy.report_to={words}")
    spec = spec_of("policy.report_to=[wandb]")
    monkeypatch.setattr(optional_packages, "installed", lambda name: name != "wandb")
    with pytest.raises(UserError, match=r"policy.report_to=\[wandb\]: wandb is not installed; `pip install wandb`, or leave it out"):
        optional_packages.check(spec)
