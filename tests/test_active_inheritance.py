"""Active inheritance: best of n against brute force, the curve over n from one run, and rounds that move the generator."""

from __future__ import annotations

import json

import pytest
import torch

from dpgbench import config
from dpgbench.bench.flops import forward_flops
from dpgbench.bench.sft import finetune, pairs
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import CellError, UserError
from dpgbench.plugins.registry import Registry


def method(work):
    return Registry().load("method", "active_inheritance")(work.options)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rounds=0", "method.rounds=0: must be 1 or more; write rounds=1, and rounds=1 for no fine-tuning"),
        ("epochs=0", "method.epochs=0: must be 1 or more; write epochs=1, and rounds=1 for no fine-tuning"),
        ("scored=doubling", "method.scored=doubling: no such choice of rounds; did you mean 'doublings'? choose from: doublings, every"),
        ("method.lr=0", "method.lr=0.0: a learning rate is positive; write method.lr=1e-3"),
    ],
)
def test_bad_options_are_one_line(word, message):
    with pytest.raises(UserError) as caught:
        config.read(["method=active_inheritance", word], sweep=False)
    assert str(caught.value) == message


@pytest.mark.parametrize("n", [1, 3, 4])
def test_best_of_n_against_brute_force(bench, n):
    """The kept completion has the highest score of its own prompt's n draws, the first of equals; powers of two are on the way,
    with the first of the same draws."""
    work = bench("task=language", "method=active_inheritance", f"n={n}")
    work.task.score = lambda texts: [float(len(text.split())) for text in texts]  # with ties
    prompts = work.prompts(12, "a test")
    draws = [work.sample(prompts, "deployment")] + [work.sample(prompts, "deployment", draw) for draw in range(1, n)]
    snapshots = list(method(work).run(work))
    assert [snapshot.step for snapshot in snapshots] == {1: [1], 3: [1, 2, 3], 4: [1, 2, 4]}[n]
    for snapshot in snapshots:
        wanted = []
        for place in range(12):
            texts = [draw[place] for draw in draws[: snapshot.step]]
            wanted.append(next(text for text in texts if all(len(text.split()) >= len(other.split()) for other in texts)))
        with work.meter.deployment() as price:
            assert snapshot.sample(prompts) == wanted
        assert price.tokens_generated >= snapshot.step * 12 * 5


def test_without_a_score_the_utility_decides(bench):
    """The kept completion is the one after which, alone, the target's Phi is highest."""
    work = bench("task=l2_norm", "method=active_inheritance", "n=3", "training.lr=1e-3")
    *_, best = method(work).run(work)
    prompts = work.prompts(5, "a test")
    draws = [work.sample(prompts, "deployment", *([draw] if draw else [])) for draw in range(3)]
    kept = best.sample(prompts)
    for place, text in enumerate(kept):
        texts = [draw[place] for draw in draws]
        values = [work.dataset_value([candidate]) for candidate in texts]
        assert values[texts.index(text)] == pytest.approx(max(values), abs=1e-5)


# ---- rounds


def test_scoring_every_round_is_the_cell_that_there_was():
    """Stored cells were made before there was a choice, and keep their names."""
    words = ["task=language", "method=active_inheritance_rounds", "rounds=3"]
    spec, few = (config.read([*words, *more], sweep=False).cells[0].spec for more in ([], ["scored=doublings"]))
    before = json.loads(json.dumps(spec.config))
    assert before["method"].pop("scored") == "every"
    assert RunSpec(before).hash == spec.hash != few.hash


@pytest.mark.slow
def test_a_round_moves_the_generator_towards_its_best_texts(bench):
    """The language of the best becomes the generator's: the loss on the kept texts falls from round to round, their score rises."""
    words = ["task=language", "lang=de", "method=active_inheritance", "n=4", "rounds=5", "round_prompts=128", "method.lr=3e-3"]
    work = bench(*words)
    prompts = work.prompts(64, "a test")
    shares = [sum(work.task.score(snapshot.sample(prompts))) / 64 for snapshot in method(work).run(work) if snapshot.step % 4 == 0]
    assert len(shares) == 5 and shares[0] < 0.25 < 0.6 < shares[-1]
    assert [line["round"] for line in work.lines] == [1, 2, 3, 4]
    assert work.lines[0]["value"] < work.lines[1]["value"] < work.lines[2]["value"]
    again = bench(*words, "rounds=2", "seed=0")
    list(method(again).run(again))
    assert again.lines[0]["loss"] == work.lines[0]["loss"], "the same numbers, however many rounds follow"


def test_fine_tuning_lowers_the_loss_and_is_charged(bench):
    """Against the loss by hand before and after; 3F of the generator for every batch, and nothing else."""
    work = bench("task=language")
    prompts = work.prompts(10, "a test")
    texts = work.world.held_out("de", "dev", 10)

    def loss() -> float:
        inputs, labels = pairs(work.generator, prompts, texts)
        with torch.no_grad():
            logits = work.generator.model(**inputs).logits[:, :-1].log_softmax(-1)
        kept = labels[:, 1:] != -100
        return -logits.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0][kept].mean().item()

    before, spent = loss(), work.meter.total_flops
    found = work.finetune(prompts, texts, "a test", lr=1e-3, epochs=3, batch=4)
    assert loss() < found < before
    lengths = [pairs(work.generator, prompts, texts)[1].shape[1]]
    most = 3 * 3 * forward_flops(work.generator.model, 10, lengths[0])
    assert 0.8 * most < work.meter.flops["policy_update"] <= most * (1 + 1e-12) and work.meter.total_flops - spent <= most
    assert work.meter.tokens_trained == 3 * sum(len(text.replace(".", " .").split()) + 1 for text in texts)


def test_fine_tuning_is_one_adamw_step_on_the_mean_token_loss(bench):
    """One batch, one epoch: by hand, pair by pair, without padding."""
    work = bench("task=language")
    prompts, texts = work.prompts(3, "a test"), ["der Bauer findet den roten Apfel.", "", "a " * 30]
    work.generator.model.double()  # AdamW's first step is a sign: where a gradient is zero, rounding decides
    reference = work.generator.copy()
    (first,), _ = finetune(work.generator, prompts, texts, lr=1e-3, epochs=1, batch=3, seed=0)
    total, count = 0.0, 0
    tokenizer, room = reference.tokenizer, reference.max_completion_tokens
    for prompt, text in zip(prompts, texts, strict=True):
        asked, written = tokenizer(prompt)["input_ids"], [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        written = written[:room]
        logits = reference.model(torch.tensor([asked + written])).logits[0, len(asked) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(written), reduction="sum")
        count += len(written)
    assert count == 8 + 1 + 20 and first == pytest.approx((total / count).item(), rel=1e-5)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
    torch.optim.AdamW(reference.model.parameters(), lr=1e-3, weight_decay=0.0).step()
    moved = dict(work.generator.model.named_parameters())
    for name, weight in reference.model.named_parameters():
        assert torch.allclose(weight, moved[name], atol=1e-7), name


def test_fine_tuning_that_diverges_stops_the_cell(bench):
    work = bench("task=language")
    work.generator.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CellError, match=r"finetune: the generator's loss is nan; lower lr=0\.001"):
        work.finetune(work.prompts(2, "a test"), ["a.", "b."], lr=1e-3, epochs=1, batch=2)
