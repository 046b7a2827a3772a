"""The policy-gradient loop: advantages by hand, TRL handed exactly those, and a bad reward that stops the cell."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from dpgbench.bench.flops import shape_of
from dpgbench.bench.grpo import _Trainer, advantages, train_policy
from dpgbench.bench.weight_average import WeightAverage
from dpgbench.core.errors import CellError
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.models import positions_from_the_mask


def test_advantages_by_hand():
    """Two groups of two. Group: (1, 3) has mean 2, std sqrt(2); (0, 0) has no signal. Batch: std of (1, 3, 0, 0) is sqrt(2), squares
    (0, 4, 1, 1) around the mean 1 over ddof 3."""
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0]) * 1e-9  # metagradients are small, and the scale must not matter
    assert advantages(rewards, 2, "group").tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0])
    assert advantages(rewards, 2, "batch").tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0])
    assert advantages(rewards, 2, "none").tolist() == pytest.approx([-1e-9, 1e-9, 0, 0])
    uneven = torch.tensor([0.0, 2.0, 0.0, 4.0])
    # batch: mean 1.5, squares 2.25 + .25 + 2.25 + 6.25 = 11, std = sqrt(11 / 3); the groups' own means are 1 and 2.
    assert advantages(uneven, 2, "batch").tolist() == pytest.approx([x / (11 / 3) ** 0.5 for x in (-1, 1, -2, 2)])
    assert advantages(uneven, 2, "group").tolist() == pytest.approx([x * 0.5**0.5 for x in (-1, 1, -1, 1)])


def test_rounding_noise_is_not_a_signal():
    """Rewards equal but for their last bits get zeros, not advantages of order one."""
    assert advantages(torch.tensor([0.1, 0.1 + 1e-17, 0.1, 0.1], dtype=torch.float64), 4, "group").abs().max() == 0


def test_the_loop_hands_trl_these_advantages_and_steps_one_by_one(bench, advantages_used):
    """What enters TRL's loss is `advantages(rewards)`; the consumer sees step 0, 1, 2 and can stop in between."""
    work = bench("scale_advantages=group")
    rewards = []

    def lengths(rollouts):
        assert len(rollouts.completions) == 16 and rollouts.step == len(rewards)
        assert all(rollouts.prompts[i] == rollouts.prompts[i - i % 4] for i in range(16)), "a group shares its prompt"
        rewards.append([1e-7 * len(text) for text in rollouts.completions])
        return rewards[-1]

    assert [snapshot.step for snapshot in train_policy(work, lengths)] == [0, 1, 2]
    for given, used in zip(rewards, advantages_used, strict=True):
        assert torch.allclose(used, advantages(torch.tensor(given), 4, "group"), atol=1e-5)
    assert [line["step"] for line in work.lines] == [1, 2]
    assert work.lines[0]["entropy"] > 0 and len(work.lines[0]["rollouts"]["rewards"]) == 16
    assert work.meter.flops["generate"] > 0 and work.meter.flops["policy_update"] > 0


@pytest.mark.slow
def test_the_policy_learns_what_is_rewarded(bench):
    """Thirty steps of paying for every "the" bring more of them."""
    work = bench("steps=30", "completions=32", "policy.lr=3e-3")
    for _ in train_policy(work, lambda rollouts: [text.split().count("the") for text in rollouts.completions]):
        pass
    counts = [line["reward_mean"] for line in work.lines]
    assert sum(counts[-5:]) > 1.5 * sum(counts[:5])


def test_minibatches_make_several_updates_a_step(bench):
    """16 completions in mini-batches of 8: one reward call and two updates per step."""
    work, calls = bench("minibatch=8"), []
    steps = [snapshot.step for snapshot in train_policy(work, lambda rollouts: calls.append(1) or [0.0] * 16)]
    assert steps == [0, 1, 2] and len(calls) == 2


@pytest.mark.parametrize("words", [(), ("policy.lora.rank=2",)], ids=["all weights", "adapters"])
def test_an_update_sees_the_probabilities_that_were_sampled_from(bench, monkeypatch, words):
    """GPT-2 has learned positions, and TRL gives it none: a text's probability in the update is that of `Generator.sample`'s model on the
    unpadded text, however far its prompt is padded."""
    work, pairs, widths = bench("steps=1", *words), [], set()
    score = _Trainer._get_per_token_logps_and_entropies

    def watched(trainer, model, ids, mask, logits_to_keep, *args, **kwargs):
        result = score(trainer, model, ids, mask, logits_to_keep, *args, **kwargs)
        for row, kept, logps in zip(ids, mask.bool(), result[0], strict=True):
            tokens = row[kept]
            with torch.no_grad():
                alone = work.generator.model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            in_update = logps[kept[-logits_to_keep:]].detach()
            pairs.append((alone[-len(in_update) :], in_update))
        return result

    def reward(rollouts):
        widths.update(work.generator.tokenize(rollouts.prompts)["attention_mask"].sum(1).tolist())
        return [float(len(text)) for text in rollouts.completions]

    monkeypatch.setattr(_Trainer, "_get_per_token_logps_and_entropies", watched)
    for _ in train_policy(work, reward):
        pass
    assert len(widths) > 1, "prompts of one length need no padding, and the test says nothing"
    assert len(pairs) == 16 and all(torch.allclose(alone, in_update, atol=1e-4) for alone, in_update in pairs)


def test_a_model_that_takes_no_positions_is_given_none():
    """BLOOM has distances instead, and refuses what it does not know."""
    model = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2)).eval()
    ids, mask = torch.tensor([[3, 1, 2]]), torch.tensor([[0, 1, 1]])
    plain = model(input_ids=ids, attention_mask=mask).logits
    with positions_from_the_mask(model):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, plain)


@pytest.mark.parametrize(("minibatch", "scored"), [("null", 0), ("8", 16)])
def test_what_trl_scores_beside_an_update_is_charged(bench, monkeypatch, minibatch, scored):
    """With mini-batches TRL scores all 16 completions before the first of them moves the model: a forward pass more, and so charged."""
    work, without_gradient, lengths, prompt_lengths = bench("steps=1", f"minibatch={minibatch}"), [], [], []
    score = _Trainer._get_per_token_logps_and_entropies

    def watched(trainer, model, ids, *args, **kwargs):
        if not torch.is_grad_enabled():
            without_gradient.append(len(ids))
        lengths.append(ids.shape[1])
        return score(trainer, model, ids, *args, **kwargs)

    monkeypatch.setattr(_Trainer, "_get_per_token_logps_and_entropies", watched)

    def reward(rollouts):
        prompt_lengths.append(work.generator.tokenize(rollouts.prompts)["input_ids"].shape[1])
        return [float(len(text)) for text in rollouts.completions]

    for _ in train_policy(work, reward):
        pass
    assert sum(without_gradient) == scored
    (prompt_length,), longest = prompt_lengths, max(lengths)
    shape = shape_of(work.generator.model)
    expected = shape.update_flops(16, prompt_length, longest - prompt_length)
    expected += shape.scoring_flops(16, prompt_length, longest - prompt_length) if scored else 0
    assert work.meter.flops["policy_update"] == pytest.approx(expected)


def test_micro_batches_change_nothing_but_rounding(bench):
    """The update of 16 completions at once and 4 at a time moves the generator alike."""
    moved = []
    for words in ((), ("policy.micro_batch=4",)):
        work = bench("steps=1", *words)
        before = work.generator.model.lm_head.weight.detach().clone()
        for _ in train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]):
            pass
        moved.append(work.generator.model.lm_head.weight.detach() - before)
    # Adam's first step is a sign: compare where the gradient is not near zero.
    sure = moved[0].abs() > 0.9 * moved[0].abs().max()
    assert sure.any() and torch.allclose(moved[0][sure], moved[1][sure], rtol=0.05)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (lambda rollouts: [float("nan")] * 16, "16 of 16 rewards are not finite"),
        (lambda rollouts: [0.0] * 15, r"shape \(15,\) for 16 completions"),
    ],
)
def test_a_bad_reward_stops_the_cell(bench, reward, says):
    """Never a batch of zeros."""
    with pytest.raises(CellError, match=says):
        list(train_policy(bench(), reward))


def test_a_reward_that_raises_stops_the_cell_and_the_consumer_may_stop_early(bench):
    def fails(rollouts):
        raise RuntimeError("the reward model is gone")

    with pytest.raises(RuntimeError, match="the reward model is gone"):
        list(train_policy(bench(), fails))
    loop = train_policy(bench("seed=1"), lambda rollouts: [0.0] * 16)
    next(loop), next(loop)
    loop.close()


def test_entropy_bonus_is_annealed(bench):
    """The coefficient TRL uses goes linearly from the first value towards the last, which it has at the end of the third step."""
    work, used = bench("steps=3", "entropy_bonus=0.4", "entropy_bonus_final=0.0"), []
    import dpgbench.bench.grpo as policy

    original = policy._Loop.on_step_begin

    def spy(self, *arguments, **named):
        original(self, *arguments, **named)
        used.append(self.trainer.entropy_coef)

    policy._Loop.on_step_begin = spy
    try:
        list(train_policy(work, lambda rollouts: [0.0] * 16))
    finally:
        policy._Loop.on_step_begin = original
    assert used == pytest.approx([0.4, 0.4 * 2 / 3, 0.4 / 3])


def test_weight_average_by_hand():
    """decay 0.5: weights 1, 2, 4 after a start at 8 average to 0.1 * 8 + 0.9 * 1 = 1.7, then (d = 2/11), then (d = 1/4)."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 8.0)
    average = WeightAverage(model, 0.5)
    expected = 8.0
    for step, (weight, keep) in enumerate([(1.0, 0.1), (2.0, 2 / 11), (4.0, 3 / 12)], start=1):
        torch.nn.init.constant_(model.weight, weight)
        average.update(step)
        expected = keep * expected + (1 - keep) * weight
    with average.loaded():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0


def test_averaged_weights_write_the_deployment_texts_and_not_the_rollouts(bench):
    """With averaging the steps are the same to the last bit, and the texts at the end are others."""
    lines, texts = [], []
    for words in (("averaging=0.0",), ("averaging=0.9",)):
        work = bench("steps=3", "policy.lr=1e-2", *words)
        for snapshot in train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]):
            last = snapshot.sample(work.prompts(8, "test"))
        lines.append([line["rollouts"] for line in work.lines])
        texts.append(last)
    assert lines[0] == lines[1] and texts[0] != texts[1]


def test_lines_are_json(bench):
    """What is recorded can be written as it is, and a line holds no clock."""
    work = bench("steps=1")
    list(train_policy(work, lambda rollouts: [0.0] * 16))
    assert "seconds" not in json.dumps(work.lines)


def test_rollouts_are_sampled_in_calls_that_fit(bench, monkeypatch):
    """rollout_batch=8: two calls for sixteen completions, all of them rewarded in the order of their prompts, each call charged its own."""
    work, calls = bench("rollout_batch=8"), []
    write, charge = Generator.write, work.charge_generation

    def counting(generator, prompt_ids):
        calls.append(len(prompt_ids))
        return write(generator, prompt_ids)

    charged = []
    monkeypatch.setattr(Generator, "write", counting)
    monkeypatch.setattr(work, "charge_generation", lambda *shape, **more: (charged.append(shape), charge(*shape, **more)))
    seen = []

    def reward(rollouts):
        assert all(rollouts.prompts[i] == rollouts.prompts[i - i % 4] for i in range(16))
        seen.append(rollouts)
        return [float(len(text)) for text in rollouts.completions]

    assert [snapshot.step for snapshot in train_policy(work, reward)] == [0, 1, 2]
    assert calls == [8] * 4 and [shape[0] for shape in charged] == [8] * 4
    assert len({*seen[0].completions}) > 8  # the calls draw different texts


def test_checkpointed_activations_change_no_number(bench):
    """The same rollouts, entropies and gradient norms, and the same charge: what memory costs in time is nobody's FLOPs. The same cell."""
    plain, less = (bench("seed=5", f"activation_checkpointing={value}", "policy.micro_batch=8") for value in ("false", "true"))
    assert plain.spec.hash == less.spec.hash
    for work in (plain, less):
        for _ in train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions]):
            pass
    assert [line["rollouts"]["texts"] for line in plain.lines] == [line["rollouts"]["texts"] for line in less.lines]
    for name in ("entropy", "gradient_norm"):
        assert [line[name] for line in plain.lines] == pytest.approx([line[name] for line in less.lines], rel=1e-4)
    assert plain.meter.flops == less.meter.flops
