"""Rollouts and trackers that need a package of their own: named in one line where it is missing, handed to TRL where it is there."""

from __future__ import annotations

import pytest
import torch

from dpgbench import config, extras, policy
from dpgbench.errors import UserError

VLLM = ["policy.rollout=vllm", "policy.vllm_memory=0.4"]


def spec_of(*words: str):
    return config.read([*words], sweep=False).cells[0].spec


# ---- vLLM


def test_vllm_that_is_not_installed_is_one_line_before_anything_is_loaded(dpgbench, imports_of, tmp_path, monkeypatch):
    words = ("run", "task=l2_norm", "method=dpg", "policy.rollout=vllm", f"results={tmp_path}")
    if extras.installed("vllm"):
        pytest.skip("vllm is installed here")
    done = dpgbench(*words)
    assert done.code == 2 and not done.out and not list(tmp_path.glob("runs/*"))
    wanted = "policy.rollout=vllm: vllm is not installed; `pip install 'trl[vllm]'`, or write policy.rollout=transformers"
    assert done.err == f"dpgbench: {wanted}\n"
    assert not {"torch", "trl", "transformers"} & imports_of(*words)
    assert dpgbench(*words, "--dry-run").code == 0, "what it would cost can be asked anywhere"
    monkeypatch.setattr(extras, "installed", lambda name: True)
    extras.check(spec_of("policy.rollout=vllm"))


def test_what_samples_is_part_of_the_cell_and_its_memory_is_not():
    plain, vllm, wider = (spec_of(*words) for words in ((), VLLM, ("policy.rollout=vllm",)))
    assert plain.hash != vllm.hash == wider.hash
    before = {name: value for name, value in plain.config["method"]["policy"].items() if name not in ("rollout", "vllm_memory")}
    stored = {**plain.config, "method": {**plain.config["method"], "policy": before}}
    assert config.RunSpec(stored).hash == plain.hash, "as stored before there was a choice"
    for word, says in (("rollout=vlm", "did you mean 'vllm'"), ("rollout=vllm vllm_memory=1.5", "vllm_memory=1.5: a share of the GPU's")):
        with pytest.raises(UserError, match=says):
            spec_of(*(f"policy.{part}" for part in word.split()))


def test_trl_is_told_to_sample_with_vllm(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "installed", lambda name: True)
    work = bench(*VLLM, "scale.max_prompt_tokens=30")
    settings = policy._trl_settings(work, work.options.policy, work.generator, str(tmp_path))
    assert (settings.use_vllm, settings.vllm_mode, settings.vllm_gpu_memory_utilization) == (True, "colocate", 0.4)
    assert settings.vllm_max_model_length == 30 + work.generator.max_completion_tokens
    plain = bench("seed=1")
    assert not policy._trl_settings(plain, plain.options.policy, plain.generator, str(tmp_path)).use_vllm


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

    monkeypatch.setattr(extras, "installed", lambda name: True)
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", StandIn)
    StandIn.made.clear()
    work, passes = bench(*VLLM, "policy.rollout_batch=8", *lora), []
    inner = grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies

    def counting(trainer, *arguments, **more):
        passes.append(torch.is_grad_enabled())
        return inner(trainer, *arguments, **more)

    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    steps = [snapshot.step for snapshot in policy.train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions])]
    (engine,) = StandIn.made
    assert steps == [0, 1, 2] and engine.synced == 2 and engine.calls == [16, 16]
    assert engine.settings["mode"] == "colocate" and engine.settings["gpu_memory_utilization"] == 0.4
    assert passes == [False, True] * 2
    assert all(line["gradient_norm"] > 0 for line in work.lines)
    plain = bench("seed=0", *lora)
    list(policy.train_policy(plain, lambda rollouts: [float(len(text)) for text in rollouts.completions]))
    ratio = work.meter.flops["policy_update"] / plain.meter.flops["policy_update"]
    assert ratio == pytest.approx(1.45 if lora else 4 / 3, rel=0.1)
