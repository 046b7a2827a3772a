"""Contracts every plug-in keeps, the project's and a user's: found by the registry, so a new file is tested without a new test.

`DPGBENCH_PLUGINS=DIR pytest tests/test_tasks_and_methods.py` holds a folder of your own to them; else the README's example stands in.
"""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, own_plugins
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpgbench import config
from dpgbench.api import Options, Task, TaskInfo, TaskView
from dpgbench.errors import UserError
from dpgbench.registry import Registry, home
from dpgbench.training import AdamW, loaded, train

PLUGINS = f"plugins={own_plugins()}"
REGISTRY = Registry(own_plugins())
TASKS = [file.name for file in REGISTRY.files("task")]
METHODS = [file.name for file in REGISTRY.files("method")]
OURS = {file.path for kind in ("task", "method") for file in Registry().files(kind)}


@pytest.fixture(scope="module")
def worlds():
    """The tiny world with a cell's settings; the target is loaded once, for nobody writes it."""
    from dpgbench import data, models

    cache = []

    def make(spec):
        cache[:] = cache or models.load_target(spec.scale)
        return data.World(spec.scale, spec.training, data.corpus(spec.scale), *cache)

    return make


@pytest.fixture(params=TASKS)
def task(request, worlds):
    """A prepared task with its default options."""
    spec = config.read([f"task={request.param}", PLUGINS], sweep=False).cells[0].spec
    task = REGISTRY.load("task", request.param)(spec.task)
    task.prepare(worlds(spec))
    task.world = worlds(spec)  # a user's `prepare` need not keep it
    return task


def trained(world):
    """A target a few steps away from phi_0."""
    batch = world.encode(world.corpus.held_out("en", "dev", 8))
    return train(world.target, [batch] * 2, AdamW(lr=1e-3, eps_root=1e-7))


def gradient(task, params):
    """Of the signal at `params`, parameter by parameter, zeros where it has no part."""
    with loaded(task.world.target, {name: value.detach().requires_grad_() for name, value in params.items()}):
        value = task.signal(task.world.target)
        leaves = dict(task.world.target.named_parameters())
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert value.ndim == 0 and value.isfinite()
    return dict(zip(leaves, found, strict=True))


def test_signal_is_a_finite_scalar_with_the_right_gradient(task):
    """Along a random direction of all parameters, the gradient agrees with a central finite difference in float64."""
    params = {name: value.double() for name, value in trained(task.world).items()}
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in params.items()}

    def phi(step: float) -> float:
        with loaded(task.world.target, {name: value + step * direction[name] for name, value in params.items()}), torch.no_grad():
            return task.signal(task.world.target).item()

    h = 1e-5
    numeric = (4 * (phi(h / 2) - phi(-h / 2)) / h - (phi(h) - phi(-h)) / (2 * h)) / 3
    exact = sum((slope * direction[name]).sum().item() for name, slope in gradient(task, params).items())
    assert exact == pytest.approx(numeric, rel=1e-4)


def test_following_the_signal_improves_what_people_read(task):
    """Steps along the gradient raise Phi, and the headline goes its own good way or, where it reads the texts alone, stays."""
    texts = task.world.held_out("en", "dev", 4)
    params = trained(task.world)

    def read(params) -> tuple[float, float]:
        with loaded(task.world.target, params), torch.no_grad():
            phi = task.signal(task.world.target).item()
            return phi, {"phi": phi, **task.measure(task.world.target, texts)}[task.headline]

    phi, headline = read(params)
    for _ in range(10):
        slopes = gradient(task, params)
        norm = sum(slope.square().sum() for slope in slopes.values()).sqrt()
        params = {name: value + 0.02 * slopes[name] / norm for name, value in params.items()}
    better_phi, better_headline = read(params)
    assert better_phi > phi
    assert better_headline >= headline if task.higher_is_better else better_headline <= headline


def test_signal_is_deterministic_and_leaves_the_model_alone(task):
    model = task.world.target
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert task.signal(model).item() == task.signal(model).item()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_measures_are_numbers_and_hold_the_headline(task):
    texts = task.world.held_out("en", "dev", 4)
    with loaded(task.world.target, trained(task.world)), torch.no_grad():
        measures = task.measure(task.world.target, texts)
    assert all(isinstance(value, float) and value == value for value in measures.values())
    assert task.headline == "phi" or task.headline in measures


def test_a_method_sees_no_measure(task):
    """The view has the dev split's signal, the score and the hint, and nothing of the test split."""
    view = TaskView(task)
    assert not hasattr(view, "measure") and callable(view.signal)


def test_score_and_hint_keep_their_types(task):
    texts = task.world.held_out("en", "dev", 3)
    scores, hint = task.score(texts), task.hint()
    assert scores is None or (len(scores) == 3 and all(isinstance(score, float) for score in scores))
    assert hint is None or (isinstance(hint, str) and hint)


def test_pictures_are_drawn(task):
    """A task that draws leaves ink, whatever the texts; drawing changes nothing."""
    if type(task).draw is Task.draw:
        pytest.skip("this task does not draw")
    canvas = FigureCanvasAgg(Figure(figsize=(2.4, 2.4)))
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    with loaded(task.world.target, trained(task.world)):
        before = task.signal(task.world.target).item()
        task.draw(task.world.target, ["", *task.world.held_out("en", "dev", 3)], axes)
        assert task.signal(task.world.target).item() == before
    canvas.draw()
    assert (torch.frombuffer(canvas.buffer_rgba(), dtype=torch.uint8) != 255).any()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    """A first line that ends in a period, a version; ours also state the goal in words and quote where it comes from."""
    file = REGISTRY.find("task", name)
    assert file.summary.endswith(".") and isinstance(file.version, int) and file.version >= 1
    if file.path in OURS:
        assert {"version", "headline", "hint", "draw"} <= file.defines
        assert "arXiv" in sys.modules[REGISTRY.load("task", name).__module__].__doc__


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_and_judges_tasks(name):
    file = REGISTRY.find("method", name)
    assert file.summary and file.summary.endswith(".")
    spec = config.read([f"method={name}", PLUGINS], sweep=False).cells[0].spec
    reason = REGISTRY.load("method", name)(spec.method).supports(TaskInfo("none", Options({}), frozenset()))
    assert reason is None or isinstance(reason, str)


@pytest.mark.parametrize("kind", ["method", "task"])
def test_every_plugin_has_a_preset_and_the_other_way_round(kind):
    assert {file.name for file in REGISTRY.files(kind)} <= set(REGISTRY.presets(kind))
    assert (home() / f"{kind}s").is_dir()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_every_task(method, tmp_path):
    """Two steps each, in one process; a skipped pair says why. T=2 everywhere: a recipe's own T may be more than the texts here.

    A method knows of a task whether it has a score, and little else. So dpg, which differentiates all of a task, does every one; another
    method of ours does our first with a score, our first without, and a user's; a user's method does all.
    """
    from dpgbench.runner import run_cell
    from dpgbench.store import RunFolder, last_line

    tasks = TASKS
    if method != "dpg" and REGISTRY.find("method", method).path in OURS:
        files = REGISTRY.files("task")
        ours = {("score" in file.defines): file.name for file in reversed(files) if file.path in OURS}
        tasks = [*ours.values(), *(file.name for file in files if file.path not in OURS)]
    for cell in config.read(
        [f"task={','.join(tasks)}", f"method={method}", PLUGINS, *SMALL, "inner_steps=2", "deployment_steps=null"], sweep=True
    ).cells:
        if cell.skip:
            continue
        state = run_cell(cell.spec, tmp_path, own_plugins())
        folder = RunFolder.of(tmp_path, cell.spec)
        assert state == "done", last_line(folder.path / "error.txt")
        result = folder.result()
        assert result["snapshots"][-1]["flops"] > 0 and len(result["texts"]) == 12


def test_a_users_folder_is_held_to_the_contracts(tmp_path):
    """A signal that its gradient does not belong to, and a measure that falls as Phi rises, are found out in a folder of one's own."""
    for folder, suffix, text in (("tasks", "py", WRONG), ("configs/task", "yaml", "name: wrong")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"wrong.{suffix}").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "wrong and (signal or measures)", __file__],
        env={**os.environ, "DPGBENCH_PLUGINS": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "FAILED tests/test_tasks_and_methods.py::test_signal_is_a_finite_scalar_with_the_right_gradient[wrong]" in done.stdout
    assert "FAILED tests/test_tasks_and_methods.py::test_following_the_signal_improves_what_people_read[wrong]" in done.stdout
    assert "2 failed, 2 passed" in done.stdout


WRONG = '''
"""Wrong in two ways."""

from dpgbench.api import Task


class Wrong(Task):
    headline = "norm"

    def signal(self, model):
        weight = model.get_output_embeddings().weight
        return weight.detach().norm() * weight.norm()

    def measure(self, model, texts):
        return {"norm": -model.get_output_embeddings().weight.norm().item()}
'''


# ---- the tasks' own oracles


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
    """DESIGN section 2, S."""
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
        (["payload="], "task.payload='': "),
        (["payload='ÄÖ'"], "task.payload='ÄÖ': its code is not read back as written; use plain letters and digits"),
        (["level=h"], "task.level=h: no such level of error correction; choose from: H, L, M, Q"),
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
