"""OptimSyn: what a rubric is paid, that the generator stays frozen, and that rubrics worth more are written more often."""

from __future__ import annotations

import pytest
import torch

from dpgbench import config
from dpgbench.bench.flops import forward_flops
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry

RUBRICS = ["Write in Spanish.", "Write in French.", "Say it briefly.", ""]


def method(work):
    return Registry().load("method", "optimsyn")(work.options)


def spying(monkeypatch, seen=None, told=None):
    """The loop's reward function, which notes the prompts in `seen`, or is told that the policy wrote the texts `told`."""
    from dpgbench.bench import grpo

    inner = grpo._Loop.advantages_of

    def advantages_of(self, prompts, completion_ids, **rest):
        if seen is not None:
            seen.append(list(prompts))
        with monkeypatch.context() as patch:
            if told is not None:
                patch.setattr(self.generator, "texts_of", lambda completion_ids: told)
            return inner(self, prompts, completion_ids, **rest)

    monkeypatch.setattr(grpo._Loop, "advantages_of", advantages_of)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["texts=0"], "method.texts=0: a rubric is judged by a text or more; write texts=1"),
        (["rubric_tokens=0"], "method.rubric_tokens=0: a rubric has a token or more; write rubric_tokens=24"),
    ],
)
def test_bad_options_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        config.read(["method=optimsyn", *words], sweep=False)
    assert str(caught.value) == message


def test_a_rubric_that_leaves_no_room_is_refused(bench):
    work = bench("method=optimsyn", "rubric_tokens=70")
    with pytest.raises(UserError, match=r"rubric_tokens=70: the generator reads 96 tokens, a document takes \d+ and a text scale\.max_com"):
        next(method(work).run(work))


def test_the_reward_is_the_mean_influence_of_the_rubrics_texts(bench, monkeypatch):
    """Four rubrics under two documents, three texts each: by hand, from the documents, the frozen generator's texts and `influences`."""
    work = bench("task=language", "lang=de", "method=optimsyn", "texts=3", "completions=8", "steps=2", "eps_root=1e-6")
    spying(monkeypatch, told=RUBRICS * 2)
    frozen = {name: value.clone() for name, value in work.generator.model.state_dict().items()}
    list(method(work).run(work))
    for step, line in enumerate(work.lines):
        documents = work.prompts(2, "policy", step)
        asked = [work.world.instruct([document], rubric)[0] if rubric else document for document in documents for rubric in RUBRICS]
        texts = work.sample([prompt for prompt in asked for _ in range(3)], "ruled", step)
        values = work.influences(texts, optimizer_aware=True).tolist()
        by_hand = [sum(values[3 * place : 3 * place + 3]) / 3 for place in range(8)]
        assert line["rollouts"]["rewards"] == pytest.approx(by_hand, rel=1e-6)
        assert len(set(by_hand)) == 8, "rubrics are told apart"
    for name, value in work.generator.model.state_dict().items():
        assert torch.equal(value, frozen[name]), "the generator stays as it is"


def test_the_policy_reads_the_documents_in_order(bench, monkeypatch):
    """What TRL hands the reward are the requests of this step's documents, each a group of times: rubric and document belong together."""
    work, seen = bench("method=optimsyn", "completions=16", "group_size=4", "minibatch=8", "steps=3"), []
    spying(monkeypatch, seen=seen)
    list(method(work).run(work))
    for step, read in enumerate(seen):
        asked = work.world.instruct(work.prompts(4, "policy", step), "Write an instruction.")
        assert read == [prompt for prompt in asked for _ in range(4)]
    assert len(seen) == 3


def test_rubrics_and_texts_are_both_charged(bench):
    """A snapshot samples twice; a step samples the rubrics and `texts` times as many texts, and scores those at 3F."""
    work = bench("task=language", "method=optimsyn", "texts=2", "steps=1", "completions=16")
    snapshots = method(work).run(work)
    with work.meter.deployment() as price:
        next(snapshots).sample(work.prompts(8, "a test"))
    with work.meter.deployment() as of_base:
        work.sample(work.prompts(8, "a test"), "deployment")
    assert price.tokens_generated > of_base.tokens_generated + 8 and price.total_flops > 1.3 * of_base.total_flops
    work.influences([""], optimizer_aware=True)  # grad Phi, taken once a cell, is out of the way
    before = work.meter.flops["scoring"], work.meter.tokens_generated
    next(snapshots)
    of_texts = 3 * forward_flops(work.world.target, 32, work.spec.training.max_length)
    assert work.meter.flops["scoring"] - before[0] == pytest.approx(of_texts)
    assert work.meter.tokens_generated - before[1] > 32 * 9, "32 texts of nine tokens or more, and 16 rubrics"
    assert work.meter.flops["policy_update"] > 0


@pytest.mark.slow
def test_rubrics_in_the_wanted_language_become_frequent(bench):
    """From one in nine: the influence of French texts makes "in French" the rubric, and the deployment texts French."""
    work = bench(
        "task=language", "lang=fr", "method=optimsyn", "steps=15", "completions=64", "group_size=8", "policy.lr=3e-3", "eps_root=1e-6",
        "scale_advantages=batch",
    )  # fmt: skip
    *_, last = method(work).run(work)
    shares = [sum("in French" in text for text in line["rollouts"]["texts"]) / 64 for line in work.lines]
    assert sum(shares[:2]) / 2 < 0.25 and sum(shares[-2:]) / 2 > 0.5
    assert sum(work.task.score(last.sample(work.prompts(32, "a test")))) > 16
