"""`check metagrad`: good settings get a yes, each fault gets its own words, and the command line is as strict as `run`'s."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats
from test_metagrad import held_out
from test_training import assert_unchanged, snapshot, tiny_batch, tiny_gpt2

from dpgbench.metagrad import diagnostics
from dpgbench.metagrad.settings import EngineSettings
from dpgbench.metagrad.training import SGD, AdamW, loaded, train

GOOD = diagnostics.Findings(32, 1, -3.0, 1.0, 1e-8, 1.0, 0.99, 1.0, 0.2, 1e-4, 1e-4, 1.5, ("tape",))


def batches(steps=1):
    return [tiny_batch(24, seed=step) for step in range(steps)]


@pytest.mark.parametrize("optimizer", [SGD(0.05), AdamW(1e-3, eps_root=1e-4)])
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_smooth_run_can_be_trusted(steps, optimizer):
    """Small steps in float32: derivatives agree with finite differences, rewards rank the outcomes, and the answer is yes."""
    model = tiny_gpt2().float()
    before = snapshot(model)
    found = diagnostics.measure(model, batches(steps), held_out, optimizer, directions=4, subsets=12)
    assert_unchanged(model, before)
    assert found.fd_correlation > 0.99999 and found.fd_error < 1e-4 and found.rounding > 0.999
    assert found.lds > 0.9 and found.metasmoothness > 0.8 and found.verdict == ("yes", [])
    assert (found.examples, found.steps, found.modes) == (24 * steps, steps, ("tape",) * steps)
    assert (found.saturation is None) == isinstance(optimizer, SGD)


def test_a_wrong_derivative_is_noticed():
    """A signal that hides part of itself from autograd disagrees with finite differences: no."""

    def half_hidden(model):
        return held_out(model).detach() - model.lm_head.weight.norm()

    found = diagnostics.measure(tiny_gpt2(), batches(), half_hidden, SGD(0.05), directions=4, subsets=3)
    assert found.fd_correlation < 0.999 and found.verdict[0] == "no" and "derivatives are not those" in found.verdict[1][0]


def test_saturation_is_the_share_of_sign():
    """From 1, far below the squared gradients, to 0; half at the suggested eps_root, to the nearest power of ten."""

    def at(eps_root):
        return diagnostics.measure(tiny_gpt2(), batches(), held_out, AdamW(1e-3, eps_root=eps_root), directions=3, subsets=3)

    low, high = at(1e-14), at(1e2)
    assert low.saturation > 0.99 and high.saturation < 0.01 and low.suggested_eps_root == high.suggested_eps_root
    assert 0.25 < at(low.suggested_eps_root).saturation < 0.75
    assert low.verdict[0] != "yes" and any("raise eps_root to about" in reason for reason in low.verdict[1])


def test_metasmoothness_of_a_rough_run_is_lower():
    """A huge learning rate throws the parameters about: the score falls, and stays within [-1, 1]."""
    smooth, rough = (diagnostics.metasmoothness(tiny_gpt2(), batches(4), SGD(lr), torch.Generator().manual_seed(0)) for lr in (0.01, 100.0))
    assert -1 <= rough < smooth - 0.2 and smooth > 0.95


def test_lds_by_hand():
    """The score is scipy's rank correlation over the same random halves, redone here."""
    model, optimizer = tiny_gpt2(), SGD(0.05)
    found = diagnostics.measure(model, batches(), held_out, optimizer, directions=3, subsets=6, seed=5)
    from dpgbench.metagrad import metagradients

    rewards = metagradients(model, batches(), held_out, optimizer).rewards
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, 24, generator=generator, dtype=torch.float64)  # the directions come first
    predicted, actual = [], []
    for _ in range(6):
        half = torch.zeros(24, dtype=torch.float64)
        half[torch.randperm(24, generator=generator)[:12]] = 2
        with torch.no_grad(), loaded(model, train(model, batches(), optimizer, weights=half)):
            actual.append(float(held_out(model)))
        predicted.append(float(rewards @ half))
    assert found.lds == pytest.approx(stats.spearmanr(predicted, actual).statistic)


def test_bf16_is_compared_with_full_precision():
    model, settings = tiny_gpt2().float(), EngineSettings(precision="bf16")
    found = diagnostics.measure(model, batches(), held_out, AdamW(1e-3, eps_root=1e-4), directions=3, subsets=3, settings=settings)
    assert 0.9 < found.bf16_correlation < 1


@pytest.mark.parametrize(
    "change, answer, words",
    [
        ({}, "yes", ""), ({"fd_correlation": 0.99}, "no", "wrong derivative"), ({"rounding": 0.9}, "no", "rounding drowns"),
        ({"lds": 0.3}, "no", "do not rank"), ({"lds": 0.8}, "with care", "only roughly"),
        ({"metasmoothness": 0.1}, "with care", "not metasmooth"),
        ({"saturation": 0.95}, "with care", "eps_root to about 1e-04"), ({"bf16_correlation": 0.9}, "with care", 'use precision="full"'),
        ({"lds": float("nan")}, "no", "do not rank"),
    ],
)  # fmt: skip
def test_verdicts(change, answer, words):
    """Every finding that is bad has a word to say."""
    said, reasons = replace(GOOD, **change).verdict
    assert said == answer and words in "; ".join(reasons)


def test_too_few_measurements_are_refused():
    with pytest.raises(ValueError, match="subsets=2: a correlation needs 3 or more; pass"):
        diagnostics.measure(tiny_gpt2(), batches(), held_out, SGD(0.1), subsets=2)


# ---------------------------------------------------------------- the command


def test_the_command_answers_in_words(dpgbench):
    """A small cell of the tiny scale, with Hydra overrides."""
    words = (
        "check metagrad scale=tiny task=language lang=de completions=32 group_size=8 inner_steps=2 checkpoint=sqrt directions=3 subsets=3"
    )
    done = dpgbench(*words.split())
    assert done.code in (0, 1), done.err
    assert "language_de, scale tiny, seed 0: 32 texts, T=2" in done.out and "Can these rewards be trusted here?" in done.out
    correlation = next(line.split()[2] for line in done.out.splitlines() if line.startswith("finite differences"))
    assert float(correlation) >= 0.999


@pytest.mark.slow
def test_the_tiny_scale_can_be_trusted(program):
    """What the issue asks of `language`: LDS >= 0.95 and a finite-difference correlation >= 0.999, on the scale's own settings."""
    done = program("check", "metagrad", "scale=tiny", "task=language", timeout=600)
    figures = {line[:26].strip(): float(line[26:].split()[0]) for line in done.out.splitlines() if line[28:30] in ("0.", "1.")}
    assert figures["finite differences"] >= 0.999 and figures["linear datamodelling score"] >= 0.95
    assert done.code == 0 and "trusted here? Yes." in done.out


@pytest.mark.parametrize(
    "words, said",
    [
        ("check", "check nothing: not a command; write `check metagrad`"),
        ("check metgrad", "check metgrad: not a command; write `check metagrad`; did you mean 'metagrad'?"),
        ("check metagrad subsets=1", "subsets=1: a correlation needs 3 or more; write subsets=8"),
        ("check metagrad task=nonsense", "task=nonsense: no such task"),
        ("check metagrad training.memory_budget=1.5", "training.memory_budget=1.5: a share of the device's memory up to 1, or bytes"),
        ("check metagrad checkpoint=0", "training.checkpoint=0: null, all, sqrt or a number of steps"),
        ("check metagrad precision=fp8", "training.precision=fp8: "),
        ("check metagrad offload=cloud", "training.offload=cloud: null, cpu or disk"),
        ("check metagrad seed=0,1", "one cell"),
    ],
)
def test_bad_input_is_one_line(capsys, words, said):
    from dpgbench.cli import main

    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_engine_settings_do_not_rename_cells():
    """What changes time and memory only is not part of a cell's name; bfloat16 is."""
    from dpgbench.config.request import read

    def folder(*words):
        return read(["task=language", *words], sweep=False).cells[0].spec.folder

    assert folder() == folder("checkpoint=sqrt", "memory_budget=1e9", "offload=disk", "precision=full") != folder("precision=bf16")
