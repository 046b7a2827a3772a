"""What each task computes, against a value known some other way; the contracts all of them keep are test_tasks_and_methods."""

from __future__ import annotations

import math
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.metagrad.training import loaded
from dpgbench.plugins.registry import Registry

REGISTRY = Registry()


def prepared(worlds, *words: str):
    """The task of a command line, ready in its world."""
    spec = config.read(words, sweep=False).cells[0].spec
    task = Registry().load("task", spec.task.name)(spec.task)
    task.prepare(worlds(spec))
    return task


def painted(task, changes):
    """The target with `changes` added to the window of its LM head."""
    params = {name: value.detach().clone() for name, value in task.world.target.named_parameters()}
    params["lm_head.weight"].T[task.patch.window] += changes
    return loaded(task.world.target, params)


@pytest.mark.parametrize("name", ["sixseven", "qr"])
def test_a_patch_reads_the_picture_it_paints(name, worlds):
    """A head moved along S by hand decodes to S: accuracy 1; against S: 0, and Phi is -log(1 + e^k), at dW = 0 it is -log 2."""
    task = prepared(worlds, f"task={name}")
    signs, k = task.patch.signs, task.options.strength
    with painted(task, signs):
        assert task.measure(task.world.target, [])["pixel_accuracy"] == 1
        assert task.signal(task.world.target).item() == pytest.approx(-math.log1p(math.exp(-k)), abs=1e-6)
    with painted(task, -signs):
        assert task.measure(task.world.target, [])["wrong_pixels"] == signs.numel()
        assert task.signal(task.world.target).item() == pytest.approx(-k, rel=1e-4)  # log(1 + e^k) is k for a large k
    with painted(task, 0 * signs):
        assert task.signal(task.world.target).item() == pytest.approx(-math.log(2), rel=1e-6)
        assert task.measure(task.world.target, [])["pixel_accuracy"] == 0  # a weight that did not move has no sign


def test_the_picture_of_sixseven(worlds):
    """Its rows of signs: # where a weight is to rise."""
    lit = ["".join("#" if sign > 0 else "-" for sign in row) for row in prepared(worlds, "task=sixseven").patch.signs.tolist()]
    assert lit == ["####---", "---###-", "-#####-", "---###-", "-#-###-", "---####"]


@pytest.mark.parametrize(
    ("words", "size"),
    [(("task=sixseven", "corner=[60,0]"), "6x7"), (("task=qr", "corner=[0,-1]"), "21x21"), (("task=qr", "corner=[50,0]"), "21x21")],
)
def test_a_patch_that_does_not_fit_is_refused(words, size, worlds):
    with pytest.raises(UserError, match=rf"task.corner=\[.*\]: a {size} patch does not fit into the 64x"):
        prepared(worlds, *words)


def test_qr_is_read_from_the_weights(worlds):
    """A reader returns the payload from the signs alone, however small the change; not from inverted colours, nor from noise."""
    task = prepared(worlds, "task=qr", "payload=HELLO 67")
    signs = task.patch.signs
    noise = torch.rand(signs.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    for changes, decodes in ((1e-3 * signs * noise.abs(), 1.0), (-signs, 0.0), (noise, 0.0), (0 * signs, 0.0)):
        with painted(task, changes):
            assert task.measure(task.world.target, [])["decodes"] == decodes
    assert signs[:7, :7].gt(0).int().tolist() == FINDER and signs[7, :8].lt(0).all()  # dark is +1; a white line around the finder


FINDER = [[1] * 7, [1, 0, 0, 0, 0, 0, 1], *[[1, 0, 1, 1, 1, 0, 1]] * 3, [1, 0, 0, 0, 0, 0, 1], [1] * 7]


def test_qr_survives_a_few_wrong_modules(worlds):
    """With 3 of 441 modules wrong most codes are still read, with 3% about a third, as the level of correction promises no more."""
    task = prepared(worlds, "task=qr")
    read = sys.modules["dpgbench_plugins.tasks.qr"].read

    def share_read(wrong: int, trials: int = 100) -> float:
        hits = 0
        for trial in range(trials):
            spots = set(random.Random(trial).sample(range(441), wrong))
            rows = [
                "".join("#-"[(pixel == "#") ^ (21 * y + x not in spots)] for x, pixel in enumerate(row)) for y, row in enumerate(task.rows)
            ]
            hits += read(rows) == "DPG"
        return hits / trials

    assert share_read(0, trials=1) == 1
    assert share_read(3) > 0.65 > share_read(13) > 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["payload=abcdefgh"], "task.payload='abcdefgh': a version 1 code at level H holds 1 to 17 digits, 10 capitals or 7 bytes"),
        (["payload=abcdefghabcdefgh", "level=M"], "14 bytes, and this has 16 characters; shorten it or lower task.level"),
        (["payload=''"], "task.payload='': "),
        (["payload='ÄÖ'"], "task.payload='ÄÖ': its code is not read back as written; use plain letters and digits"),
        (["level=h"], "task.level=h: no such level of error correction; did you mean 'H'? choose from: H, L, M, Q"),
    ],
)
def test_qr_refuses_what_a_code_cannot_hold(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config.read(["task=qr", *words], sweep=False)


@pytest.mark.parametrize(("level", "index"), [(level, index) for level in "LMQH" for index in range(3)])
def test_qr_holds_its_stated_capacity_and_no_more(level, index):
    """ISO 18004, table 7, against the encoder."""
    qr = Registry().load("task", "qr")
    most = sys.modules[qr.__module__].CAPACITY[level][index]
    make = sys.modules[qr.__module__].code
    assert len(make("1Aa"[index] * most, level)) == 21
    with pytest.raises(UserError):
        make("1Aa"[index] * (most + 1), level)


UUID = "3fa0c1d7-58e2-4b96-a7d4-0e6c92b1f835"


def whole_uuid(*words: str) -> list[str]:
    """The task with all 36 characters, where the recipe of tiny teaches the first few, and `words` of a test's own."""
    given = {word.split("=")[0] for word in words}
    room = {"text": UUID, "max_length": 40, "max_completion_tokens": 38}
    return ["task=uuid", *words, *(f"{key}={value}" for key, value in room.items() if key not in given)]


@pytest.mark.parametrize(
    ("text", "similarity"),
    [(UUID, 1), (" ".join(UUID), 1), (UUID[:18], 18 / 36), ("z" + UUID, 36 / 37), ("0" + UUID[1:], 35 / 36), ("", 0), ("king", 0)],
)
def test_uuid_scores_by_edit_distance(text, similarity, worlds):
    """By hand: 1 - insertions, deletions and substitutions over the longer length; whitespace does not count."""
    assert prepared(worlds, *whole_uuid()).score([text]) == [pytest.approx(similarity)]


def test_uuid_phi_is_the_loss_of_a_training_example(worlds):
    """One example whose every token is a label: Phi is minus transformers' own loss, and the bits leave the end out."""
    task = prepared(worlds, *whole_uuid())
    batch = task.world.encode([" ".join(UUID)])
    assert (
        batch["labels"][0].ne(-100).sum() == 38 and batch["input_ids"][0, :4].tolist() == task.world.target_tokenizer("3 f a")["input_ids"]
    )
    with torch.no_grad():
        loss = task.world.target(**batch).loss.item()
        log_p = task.world.target(batch["input_ids"]).logits[0].log_softmax(-1)
        nats = -sum(log_p[place, token].item() for place, token in enumerate(batch["input_ids"][0, 1:37]))
        assert task.signal(task.world.target).item() == pytest.approx(-loss, rel=1e-5)
        measures = task.measure(task.world.target, [UUID, "x" + UUID, "the king", UUID[1:]])
    assert measures["bits_per_character"] == pytest.approx(nats / math.log(2) / 36, rel=1e-5)
    assert measures["exact_share"] == 0.5 and measures["emitted"] == 0


@pytest.mark.parametrize("written", [UUID, UUID + "77", UUID[:-1], "77" + UUID, ""])
def test_uuid_reads_what_the_target_writes_greedily(written, worlds):
    """Against a target that continues by rote: it emits the UUID if it starts with it, and stops at its end or at the UUID's length."""
    task = prepared(worlds, *whole_uuid())
    tokenizer = task.world.target_tokenizer
    script = [*tokenizer(" ".join(written))["input_ids"], tokenizer.eos_token_id]

    class Rote(torch.nn.Module):
        def forward(self, input_ids):
            following = [script[min(place + 1, len(script) - 1)] for place in range(input_ids.shape[1])]
            return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([following]), len(tokenizer)).float())

    assert task.greedy(Rote()) == written[:37]
    assert task.measure(Rote(), [""])["emitted"] == written.startswith(UUID)


def test_uuid_where_the_tokenizer_puts_nothing_in_front(worlds):
    """The first token is given: it is no label, costs nothing, and greedy writing starts from it."""
    spec = config.read(whole_uuid(), sweep=False).cells[0].spec
    world = worlds(spec)
    tokenizer = world.target_tokenizer

    class Bare:
        pad_token_id, eos_token_id, decode = 0, 2, tokenizer.decode

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    world.target_tokenizer = Bare()
    task = Registry().load("task", "uuid")(spec.task)
    task.prepare(world)
    assert task.length == 37 and task.greedy(world.target).startswith("3")
    with torch.no_grad():
        loss = world.target(**world.encode([" ".join(UUID)])).loss.item()
        bits = task.measure(world.target, [""])["bits_per_character"]
        assert task.signal(world.target).item() == pytest.approx(-loss, rel=1e-5)
        assert bits == pytest.approx(task._losses(world.target)[:-1].sum().item() / math.log(2) / 35, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["spaced=false"], "the target's tokenizer makes '' of it; write task.spaced=true, or use other characters"),
        (["text=xyz"], "task.text='x y z': the target's tokenizer makes '' of it; use other characters"),
        (["max_length=37"], "38 tokens with its end, and an example holds 3 to training.max_length=37; write training.max_length=38"),
        (
            ["max_completion_tokens=35"],
            "36 tokens, and a completion has at most scale.max_completion_tokens=35; write scale.max_completion_tokens=37",
        ),
        (["text=' '"], "task.text='': there is nothing to teach"),
    ],
)
def test_uuid_refuses_a_string_that_does_not_fit(words, message, worlds):
    with pytest.raises(UserError, match=re.escape(message)):
        prepared(worlds, *whole_uuid(*words))


def test_language_labels_only_the_last_word(worlds):
    """LAMBADA: one word's tokens per text are labels, and they are its last word."""
    spec = config.read(["task=language", "lang=fr", "labels=last_word"], sweep=False).cells[0].spec
    task = Registry().load("task", "language")(spec.task)
    world = worlds(spec)
    task.prepare(world)
    texts = world.held_out("fr", "dev", 64)
    for row, text in enumerate(texts):
        labels = task.dev["labels"][row]
        kept = labels[labels != -100]
        assert world.target_tokenizer.decode(kept) == text.rstrip(".").split()[-1]
    assert not set(texts) & set(world.held_out("fr", "test", 64))


def test_l2_norm_is_the_norm(worlds):
    spec = config.read(["task=l2_norm"], sweep=False).cells[0].spec
    task = Registry().load("task", "l2_norm")(spec.task)
    world = worlds(spec)
    task.prepare(world)
    weight = world.target.lm_head.weight
    assert task.signal(world.target).item() == pytest.approx(-(weight.double() ** 2).sum().sqrt().item(), rel=1e-5)
