"""The paper's configuration: every constant against the table of the design page, transcribed here a second time, by hand."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from dpgbench import config

LLAMA, GPT2 = "meta-llama/Llama-3.2-1B-Instruct", "openai-community/gpt2"

# arXiv 2604.08423, as the design page quotes it: prompts per step -> steps.
SIZES = {
    "sixseven": {256: 3840, 2048: 480, 24576: 40},
    "l2_norm": {256: 960, 2048: 120, 24576: 10},
    "qr": {24576: 240},
    "language": {256: 120},
    "uuid": {256: 360},
}
SUITES = {"sixseven": "paper_sixseven", "l2_norm": "paper_l2", "qr": "paper_qr", "language": "paper_language", "uuid": "paper_uuid"}
ADAMW = {"sixseven": 5e-6, "l2_norm": 5e-6, "qr": 5e-6, "language": 1e-6, "uuid": 1e-6}
SGD = {"sixseven": 5.12e-4, "l2_norm": 1.28e-4, "language": 6.4e-5, "uuid": 6.4e-5}
NAIVE = {"sixseven": 2.56e-4, "l2_norm": 1e-6, "language": 6.4e-5, "uuid": 6.4e-5}
POLICY_LR = {"sixseven": 5e-6, "l2_norm": 5e-6, "qr": 5e-6, "language": 1e-6, "uuid": 1e-6}
LIKENESS = {"levenshtein", "embedding", "langid"}


@pytest.fixture(scope="module", params=SUITES)
def suite(request):
    """A task and the cells of its suite."""
    return request.param, [cell.spec for cell in config.read([f"suite={SUITES[request.param]}"], sweep=True).cells if not cell.skip]


def test_constants_that_all_runs_share(suite):
    task, specs = suite
    for spec in specs:
        scale, training = spec.scale, spec.training
        assert (scale.name, spec.task.name, scale.generator) == ("paper", task, LLAMA)
        assert scale.target == (LLAMA if task in ("language", "uuid") else GPT2)
        assert (scale.target_dtype, training.precision, scale.max_completion_tokens, training.max_length) == ("float32", "full", 128, 128)
        assert (training.betas, training.eps, training.eps_root, training.weight_decay) == ([0.9, 0.95], 1e-8, 1e-9, 1e-4)
        assert training.reduction == "length"
        if "policy" in spec.method:
            policy = spec.method.policy
            assert (policy.group_size, policy.minibatch, policy.lr) == (4, 32 * 4, POLICY_LR[task])
            assert (policy.scale_advantages, policy.entropy_bonus, policy.averaging) == ("group", 0.0, 0.0)
    strength = {spec.task.strength for spec in specs} if task in ("sixseven", "qr") else {20}
    assert strength == {20}


def test_prompts_per_step_and_steps(suite):
    """Both, and T from them: 1,024 examples an optimizer step, in rewards and in deployment."""
    task, specs = suite
    seen = {spec.method.policy.completions // 4: spec.method.policy.steps for spec in specs if "policy" in spec.method}
    assert seen == SIZES[task]
    for spec in specs:
        if "policy" not in spec.method:
            continue
        completions, steps = spec.method.policy.completions, spec.training.inner_steps
        datasets = 4 if spec.method.name == "naive" or spec.method.get("cross_group") is False else 1
        assert completions // datasets // steps == (256 if completions // datasets == 256 else 1024)
        assert spec.scale.deployment_texts // (spec.scale.deployment_steps or steps) == 1024
        assert spec.scale.deployment_texts == completions


def test_every_variant_is_there_with_its_learning_rate(suite):
    """AdamW, SGD, the naive reward, no cross-group batches; likeness where there are texts to be like; each compared with its own base."""
    task, specs = suite
    found: dict[str, set] = {}
    for spec in specs:
        if "policy" in spec.method:
            variant = "sgd" if spec.training.optimizer == "sgd" else spec.method.label
            found.setdefault(variant, set()).add(spec.training.lr)
            world = (spec.task.label, spec.scale.deployment_steps or spec.training.inner_steps, spec.training.lr, spec.training.optimizer)
            peers = {
                other.method.name
                for other in specs
                if (other.task.label, other.scale.deployment_steps or other.training.inner_steps, other.training.lr,
                    other.training.optimizer) == world
            }  # fmt: skip
            assert {"base", "oracle"} <= peers, spec.folder
    wanted = {"dpg": {ADAMW[task]}}
    if task != "qr":
        wanted |= {"dpg_nocross": {ADAMW[task]}, "sgd": {SGD[task]}, "naive": {NAIVE[task]}}
    if task in ("language", "uuid"):
        wanted |= {reward: {ADAMW[task]} for reward in LIKENESS - ({"langid"} if task == "uuid" else set())}
    assert found == wanted
    if task == "language":
        assert {spec.task.lang for spec in specs} == {"de", "es", "fr", "it"}


def test_labels_tell_different_targets_apart(suite):
    """A label stands for one learning algorithm at deployment: what the report puts on one plot can be compared."""
    _, specs = suite
    worlds: dict[str, set] = {}
    for spec in specs:
        deployment = (spec.scale.deployment_texts, spec.scale.deployment_steps or spec.training.inner_steps)
        worlds.setdefault(spec.task.label, set()).add((*deployment, spec.training.optimizer, spec.training.lr))
    assert all(len(found) == 1 for found in worlds.values())


FILES = [ROOT / "configs/scale/paper.yaml", *sorted((ROOT / "configs/recipe/paper").glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_says_where_it_is_from(path):
    for line in path.read_text().splitlines():
        if re.match(r"\s+(?!name|version)\w+: (?!null)\S", line):
            assert re.search(r"#.*\b(paper|ours)\b", line), line


def test_listing_the_papers_runs_loads_no_torch(imports_of):
    assert "dpgbench.cli" in (modules := imports_of("sweep", "suite=paper_sixseven", "--dry-run")) and not {"torch", "trl"} & modules
