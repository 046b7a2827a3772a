"""Tasks whose Phi is a score of what the target writes: the three scores by hand, and one of a user's own."""

from __future__ import annotations

import itertools
import random
import sys

import pytest
import torch

from dpgbench import config
from dpgbench.core.errors import UserError
from dpgbench.metagrad.training import loaded
from dpgbench.plugins.registry import Registry
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder
from dpgbench.worlds import models
from dpgbench.worlds.world import World, corpus


@pytest.fixture(scope="module")
def tasks():
    """A task by name and options, in the tiny world."""
    target = []

    def make(name, *words, texts=64):
        spec = config.read([f"task={name}", f"samples={texts}", f"fresh={texts}", *words], sweep=False).cells[0].spec
        target[:] = target or models.load_target(spec.scale)
        task = Registry().load("task", name)(spec.task)
        task.prepare(World(spec.scale, spec.training, corpus(spec.scale), *target))
        return task

    return make


SENTENCE = "the baker hides the golden key under the bridge today."


def mtld_by_definition(words: list[str]) -> float:
    """McCarthy & Jarvis 2010, forward and backward, written down again from the paper's words."""

    def one_way(words):
        factors, read = 0.0, []
        for word in words:
            read.append(word)
            if len(set(read)) / len(read) <= 0.72:
                factors, read = factors + 1, []
        if read:
            factors += (1 - len(set(read)) / len(read)) / (1 - 0.72)
        return len(words) / factors if factors else float(len(words))

    return (one_way(words) + one_way(words[::-1])) / 2


def test_mtld_by_hand(tasks):
    """A sentence counted on paper, and any list of words against the definition."""
    mtld = sys.modules[type(tasks("lexical_diversity")).__module__].mtld
    # the baker hides the golden key under the bridge today: 8 different words of 10, so TTR 0.8 at the end and never 0.72 or below
    # on the way: forward 1, 1, 1, .75, .8, .83, .86, .75, .78, .8; backward 1, 1, 1, 1, 1, 1, .86, .875, .89, .8. One part of a
    # factor each way, (1 - 0.8) / 0.28, and so 10 / (0.2 / 0.28) = 14.
    assert mtld([SENTENCE]) == [pytest.approx(14)]
    # a a b b a a b b: forward a a is TTR 0.5, a factor of two; four factors both ways, MTLD 2.
    assert mtld(["a a b b a a b b."]) == [pytest.approx(2)]
    assert mtld(["", "...", "3 4 5"]) == [0.0, 0.0, 3.0]
    rng = random.Random(0)
    for length, vocabulary in itertools.product((1, 2, 7, 40, 300), (1, 3, 20, 1000)):
        words = [f"w{rng.randrange(vocabulary)}" for _ in range(length)]
        assert mtld([" ".join(words)])[0] == pytest.approx(mtld_by_definition(words), rel=1e-9)


def test_lexical_diversity_of_a_single_text(tasks):
    """More different words are better, saying it twice is not, and length without repetition is."""
    task = tasks("lexical_diversity")
    ten = "one two three four five six seven eight nine ten."
    plain, twice, salad, short = task.score([SENTENCE, f"{SENTENCE} {SENTENCE}", ten, "one."])
    assert salad > plain > short and twice == pytest.approx(plain, rel=0.2)
    assert tasks("lexical_diversity", "goal=down").score([SENTENCE]) == [-plain]


def test_length_counts_words(tasks):
    assert tasks("length").score([SENTENCE, "", "3 f - a"]) == [10.0, 0.0, 4.0]
    assert tasks("length", "goal=down").score([SENTENCE]) == [-10.0]


def test_toxicity_is_a_probability_and_lower_is_better(tasks):
    task = tasks("toxicity")
    polite, rude = task.score([SENTENCE, SENTENCE.replace("the baker", "the stupid baker")])
    assert -1 <= rude < polite <= 0
    assert not task.higher_is_better and tasks("toxicity", "goal=up").higher_is_better


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        pytest.param("toxicity", "up", marks=pytest.mark.slow),
        pytest.param("length", "down", marks=pytest.mark.slow),
        pytest.param("lexical_diversity", "down", marks=pytest.mark.slow),
    ],
)
def test_the_other_goal_moves_the_other_way(tasks, name, goal):
    """A few gradient steps straight up Phi towards the unusual goal move fresh texts, which Phi has never seen, that way."""
    task = tasks(name, f"goal={goal}", texts=512)
    model = task.world.target
    assert task.measure(model, [])[f"{task.headline}_change"] == 0  # phi_0 against itself, on the same noise
    params = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(5):
        leaves = {key: value.requires_grad_() for key, value in params.items()}
        with loaded(model, leaves):
            slopes = torch.autograd.grad(task.signal(model), list(leaves.values()), materialize_grads=True)
        norm = torch.stack([slope.norm() for slope in slopes]).norm()
        params = {key: (value + 0.1 * slope / norm).detach() for (key, value), slope in zip(leaves.items(), slopes, strict=True)}
    with loaded(model, params):
        change = task.measure(model, [])[f"{task.headline}_change"]
    assert change > 0 if goal == "up" else change < 0


def test_what_was_measured_is_drawn_without_being_written_again(tasks, monkeypatch):
    """Once for the same tensors; again for others of the same values, and for the same ones after they were written to."""
    from matplotlib.figure import Figure

    task, written = tasks("length"), []
    model, write = task.world.target, task.surrogate._sample
    monkeypatch.setattr(task.surrogate, "_sample", lambda *given: written.append(given[1]) or write(*given))
    params = {key: value.detach().clone() for key, value in model.named_parameters()}
    with loaded(model, params):
        before = task.measure(model, [])
        task.draw(model, [], Figure().add_axes((0, 0, 1, 1)))
    assert written == ["test"]
    with loaded(model, {key: value.clone() for key, value in params.items()}):
        assert task.measure(model, []) == before
    assert written == ["test"] * 2
    with loaded(model, params):
        task.measure(model, [])
        params["lm_head.weight"].mul_(-1)
        assert task.measure(model, []) != before
    assert written == ["test"] * 4


def test_more_tokens_than_positions_are_refused(tasks):
    with pytest.raises(UserError, match=r"task.max_tokens=96: the target has 96 positions, one of them for the start token; write .*=95"):
        tasks("length", "max_tokens=96")


OWN = '''"""Make the target ask questions."""
from dpgbench.score_task import ScoreTask


class Questions(ScoreTask):
    headline = "questions"

    def scores(self, texts):
        return [text.count("?") for text in texts]

    def read(self, texts):
        return {"questions": sum(self.scores(texts)) / len(texts)}

    def hint(self):
        return "Ask questions."
'''


def test_a_score_of_ones_own_is_a_task(tmp_path):
    """What the base class brings counts as the plug-in's own: that is how methods know that there is a score."""
    own = tmp_path / "own"
    (own / "tasks").mkdir(parents=True)
    (own / "configs/task").mkdir(parents=True)
    (own / "tasks/questions.py").write_text(OWN)
    (own / "configs/task/questions.yaml").write_text("name: questions\n")
    file = Registry(own).find("task", "questions")
    assert {"__init__", "prepare", "signal", "measure", "score", "draw", "scores", "read", "hint", "headline"} <= file.defines
    plain = config.read(["task=questions", f"plugins={own}"], sweep=False).cells[0].spec.task
    assert [plain[name] for name in ("goal", "form", "samples", "fresh", "max_tokens")] == ["up", "ratio", 512, 1024, 24]
    words = ["task=questions", "method=active_inheritance", "n=2", "deployment_texts=8", "samples=16", "fresh=16", f"plugins={own}"]
    spec = config.read(words, sweep=False).cells[0].spec
    assert spec.task.samples == 16
    assert run_cell(spec, tmp_path, own) == "done"
    assert RunFolder.of(tmp_path, spec).result()["headline"] == "questions"
    (own / "tasks/questions.py").write_text(OWN.replace("dpgbench.score_task", "dpgbench.task_support.score_function"))
    with pytest.raises(UserError, match=r"questions.py defines 0 subclasses of dpgbench.api.Task; it must define one"):
        Registry(own).find("task", "questions")
