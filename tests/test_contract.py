"""A plug-in that breaks its contract: one line with the file, the hook, what came and the fix, before a method spends anything."""

from __future__ import annotations

import random
import sys

import numpy
import pytest
import torch
from conftest import SMALL

from dpgbench import config
from dpgbench.cli import main
from dpgbench.core.errors import UserError
from dpgbench.plugins import contract, source
from dpgbench.plugins.registry import Registry
from dpgbench.run.cell import run_cell
from dpgbench.store.run_folder import RunFolder

TASK = '''"""Words."""

import random

import torch

from dpgbench.api import Task


class Words(Task):
    {attributes}

    def prepare(self, world):
        {prepare}

    def signal(self, model):
        weight = model.get_output_embeddings().weight
        {signal}

    {more}
'''
GOOD = {"attributes": "version = 1", "prepare": "super().prepare(world)", "signal": "return -weight.norm()", "more": ""}
METHOD = '''"""Parrot."""

from dpgbench.api import Method, Snapshot


class Parrot(Method):
    {init}

    def run(self, bench):
        {run}
'''


def written(folder, kind, name, text, yaml=None):
    for path, content in ((folder / f"{kind}s/{name}.py", text), (folder / f"configs/{kind}/{name}.yaml", yaml or f"name: {name}\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def task_file(**parts):
    return TASK.format(**{**GOOD, **parts})


def spec_of(folder, *words):
    return config.read([*words, f"plugins={folder}"], sweep=False).cells[0].spec


@pytest.fixture
def said(tmp_path, worlds):
    """What the harness says about a task before any method runs; None if it has no complaint."""

    def ask(text: str, yaml: str | None = None) -> str | None:
        sys.modules.pop("dpgbench_plugins.tasks.words", None)
        try:
            spec = spec_of(written(tmp_path, "task", "words", text, yaml), "task=words", "method=base")
            registry, world = Registry(tmp_path), worlds(spec)
            task = registry.make("task", "words", spec.task)
            contract.called(registry.find("task", "words").path, "prepare", task.prepare, world)
            contract.check_task(
                registry.find("task", "words"), task, world.target, ["one text.", [{"role": "user", "content": "another."}]]
            )
        except UserError as error:
            assert "\n" not in str(error)
            return str(error)
        return None

    return ask


# ---- what comes back


SIGNALS = {
    "return 3.5": "has no gradient; return the 0-d tensor itself",
    "return -weight.norm().item()": "line 18: `signal` returns -weight.norm().item(), which has no gradient; return the 0-d tensor",
    "return float(weight.norm())": "`signal` returns float(weight.norm()), which has no gradient",
    "return -weight.norm().detach()": "`signal` returns -weight.norm().detach(), which has no gradient",
    "value = weight.norm().item(); return value": "words.py: signal returned the float",
    "value = weight.detach().norm(); return value": "without a gradient; compute it from the weights or outputs of `model`",
    "value = None; return value": "words.py: signal returned nothing; it must be a 0-d floating-point tensor",
    "print": "`signal` returns nothing; it must return Tensor",
    "return weight.mean(0)": "of shape (64,) and type float32; it must be a 0-d floating-point tensor: reduce it with .mean() or .sum()",
    "return weight.norm().view(1)": "of shape (1,) and type float32; it must be a 0-d floating-point tensor: reduce it with .squeeze()",
    "return (weight > 0).sum()": "of shape () and type int64",
    "return weight.norm() * float('nan')": "signal is nan at the initial target, before any training; it must be",
    "return -(weight * 0).sum().log()": "signal is inf at the initial target",
    "return (weight * 0).sum().sqrt()": "the gradient of signal is not finite at the initial target, in lm_head.weight; look for a",
    "return weight.norm() / (1 // 0)": "words.py, line 18: signal raised ZeroDivisionError: ",
    "return weight.nrom()": "words.py, line 18: signal raised AttributeError: 'Tensor' object has no attribute 'nrom'",
    "return torch.ones((), requires_grad=True) * 1": "in which no parameter of `model` has a part",
    "return weight.norm() * torch.rand(())": "signal draws from torch's global generator and returned",
    "return weight.norm() * random.random()": "signal draws from Python's `random` and returned",
    "return {'phi': weight.norm()}": "signal returned the dict",
}  # fmt: skip


@pytest.mark.parametrize("body", SIGNALS)
def test_a_signal_is_a_finite_differentiable_scalar(said, body):
    found = said(task_file(signal=body))
    assert SIGNALS[body] in found and "words.py" in found


def test_a_device_that_is_full_is_no_breach(said):
    assert said(task_file(signal="raise torch.OutOfMemoryError('full')")) is None


def test_a_signal_of_what_prepare_kept_is_not_one_of_the_model(said):
    """It has a gradient, in a tensor that no training changes."""
    kept = "self.weight = world.target.get_output_embeddings().weight"
    found = said(task_file(prepare=kept, signal="return self.weight.norm()"))
    assert "in which no parameter of `model` has a part; compute it from the weights or outputs of `model`" in found


def test_a_good_task_is_let_through_and_no_random_state_moves(said):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    before = states()
    drawing = "def hint(self):\n        return f'Write {random.random()} {torch.rand(())}.'"
    assert said(task_file(more=drawing)) is None
    assert states() == before


MORE = {
    "def measure(self, model, texts):\n        return {'share': 'high'}": "measure gave share = 'high'; it must be a finite number",
    "def measure(self, model, texts):\n        return {'share': float('nan')}": "measure gave share = nan; it must be a finite number",
    "def measure(self, model, texts):\n        return {'share': torch.ones(3)}": "measure gave share = a tensor of shape (3,)",
    "def measure(self, model, texts):\n        return {'share': None}": "measure gave share = None",
    "def measure(self, model, texts):\n        return {1: 2.0}": "measure has the key the int 1; a measure's name is a string",
    "def measure(self, model, texts):\n        return [0.5]": "measure returned the list [0.5]; it must be a dict of numbers by name",
    "def measure(self, model, texts):\n        model": "`measure` returns nothing; it must return dict[str, float]",
    "def measure(self, model, texts):\n        return {'x': sum(map(len, texts)) / self.total}": "`measure` uses self.total, which prep",
    "def measure(self, model):\n        return {}": "`measure` is called as measure(self, model, texts)",
    "def score(self, texts):\n        return 1.0": "score returned the float 1.0 for 2 texts; it must be a list of one number each",
    "def score(self, texts):\n        return [1.0]": "score returned the list [1.0] for 2 texts",
    "def score(self, texts):\n        return ['a', 'b']": "score gave a text 'a'; it must be a finite number",
    "def score(self, texts):\n        return torch.ones(2)": "it must be a list of plain numbers, such as",
    "def hint(self):\n        return ['Write.']": "hint returned the list ['Write.']; it must be an instruction in words",
    "def references(self):\n        return 'one text'": "references returned the str 'one text'; it must be a list of texts",
    "def references(self):\n        raise OSError('no such\\nfile')": "line 21: references raised OSError: no such",
    "def draw(self, model, texts, axes):\n        axes.set_title('$')": None,
    "def draw(self, model, texts, axes):\n        axes.plt(1)": "draw raised AttributeError: 'Axes' object has no attribute 'plt'",
    "def draw(self, model, texts, axes):\n        axes.text(0, 0, r'$\\frac$')": "draw raised ValueError",
}  # fmt: skip


@pytest.mark.parametrize("more", MORE)
def test_the_other_hooks_keep_their_types(said, more):
    found = said(task_file(more=more))
    assert found is None if MORE[more] is None else MORE[more] in found


READ = "def measure(self, model, texts):\n        found = {'share': 0.5}\n        return found"


@pytest.mark.parametrize("read", [READ, READ.replace("found = {'share': 0.5}\n        return found", "return {'share': 0.5}")])
def test_a_headline_that_is_not_measured_is_told_of(said, read):
    found = said(task_file(attributes="headline = 'shares'", more=read))
    assert "headline = 'shares' is not among what" in found and "did you mean 'share'? choose from: phi, share" in found
    assert said(task_file(attributes="headline = 'share'", more=read)) is None


def test_what_prepare_did_not_set_is_named_with_the_hook(said):
    assert "line 18: `signal` uses self.start, which prepare never set; set self.start in prepare(self, world)" in said(
        task_file(signal="return weight[self.start].sum()")
    )
    sometimes = task_file(prepare="if world is None:\n            self.start = 0", signal="return weight[self.start].sum()")
    assert "words.py, line 19: signal uses self.start, which prepare never set; set self.start in prepare(self, world)" in said(sometimes)
    without_super = task_file(prepare="self.start = 0", signal="return weight[: len(self.world.held_out('en', 'dev', 2))].sum()")
    assert "`signal` uses self.world, which prepare never set; call super().prepare(world) in it" in said(without_super)
    assert said(task_file(prepare="setattr(self, 'start', 0)", signal="return weight[self.start].sum()")) is None


def test_an_option_that_is_not_there_is_named(said):
    found = said(task_file(signal="return weight.norm() * self.options.strenght"), "name: words\nstrength: 2.0\n")
    assert "signal reads the option 'strenght', which there is not; did you mean 'strength'? choose from:" in found


# ---- what can be read off the file


def test_attributes_are_of_their_kind(said):
    for attributes, says in {
        "version = '2'": "line 11: version = '2': must be a whole number from 1 up, such as version = 1",
        "version = 1.5": "version = 1.5: must be a whole number",
        "version = 0": "version = 0: must be a whole number from 1 up",
        "version = True": "version = True: must be a whole number",
        "version = len('ab')": "version = len('ab'): must be a whole number from 1 up, such as version = 1, written out",
        "higher_is_better = 1": "higher_is_better = 1: must be True or False",
        "headline = 3": "headline = 3: must be a name that `measure` returns",
        "headline = 'share'": "headline = 'share' is not among what there is, for it has no `measure`; choose from: phi",
        "defaults = ['a']": "defaults = ['a']: must be a dict of options",
        "higher_is_better = bool(2 - 2)": None,
    }.items():
        found = said(task_file(attributes=attributes))
        assert found is None if says is None else says in found


NAMES = {
    "mesure": "def measure(self, model, texts):\n        return {}",
    "hints": "def hint(self):\n        return 'Write.'",
    "drawn": "def draw(self, model, texts, axes):\n        pass",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_hook_is_told_of_and_a_helper_is_not(said, name):
    more = NAMES[name]
    hook = more.split("(")[0].removeprefix("def ")
    misspelt = more.replace(hook, name, 1)
    assert f"`{name}` is nothing that dpgbench looks for in a Task; did you mean `{hook}`?" in said(task_file(more=misspelt))
    assert said(task_file(more=f"{misspelt}\n\n    def {more.removeprefix('def ')}")) is None, "the hook is there as well"
    assert said(task_file(more=misspelt.replace(name, f"_{name}"))) is None


def test_a_missing_hook_is_told_of(said):
    assert "line 10: class Words has no `signal`, which every Task needs; is `signl` meant to be it?" in said(
        task_file().replace("def signal", "def signl")
    )
    read = "class Words(ScoreTask):\n    def read(self, texts):\n        return {'n': 1}\n"
    score = f"from dpgbench.score_task import ScoreTask\n\n\n{read}"
    assert "class Words has no `scores`, which every ScoreTask needs; write `def scores(self, texts)`" in said(score)


def test_an_undefined_name_is_told_of(said):
    """And no name is that something binds, in whatever scope."""
    assert "line 18: torhc is not defined; import it, or see how it is spelt" in said(task_file(signal="return torhc.ones(())"))
    more = "def hint(self, *words, **more):\n        return str([(lambda y: y + w)(x) for x in [1] if (w := x)]) + __name__ + str(words)"
    assert said(task_file(more=more)) is None


SCORED = '''"""Score."""
import torch

from dpgbench.score_task import ScoreTask


class Words(ScoreTask):
    headline = "words"

    def scores(self, texts):
        {scores}

    def read(self, texts):
        {read}
'''


@pytest.mark.parametrize(
    ("scores", "read", "says"),
    [
        ("return [len(text) for text in texts]", "return {'words': 1.0}", None),
        ("return torch.tensor([float(len(text)) for text in texts])", "return {'words': 1.0}", None),
        ("return len(texts)", "return {'words': 1.0}", "words.py: scores returned the int"),
        ("return [1.0]", "return {'words': 1.0}", "words.py: scores returned the list [1.0] for"),
        (
            "return [len(text) or None for text in ['', *texts[1:]]]",
            "return {'words': 1.0}",
            "scores gave a text None; it must be a finite",
        ),
        (
            "return [text.cout(',') for text in texts]",
            "return {'words': 1.0}",
            "words.py, line 11: scores raised Attr",
        ),
        ("return [1.0 for text in texts]", "return 1.0 + len(texts)", "read returned the float"),
        (
            "return [1.0 for text in texts]",
            "found = {'word': 1.0}; return found",
            "headline = 'words' is not among what measure returned; did",
        ),
        (
            "return [1.0 for text in texts]",
            "return {'word': 1.0}",
            "headline = 'words' is not among what `read` returns; did you mean 'word'?",
        ),
    ],
)
def test_what_a_score_task_brings_is_named_by_its_own_hooks(said, scores, read, says):
    found = said(SCORED.format(scores=scores, read=read), "name: words\nsamples: 8\nfresh: 8\nmax_tokens: 6\n")
    assert found is None if says is None else says in found


def test_what_does_not_compile_is_a_syntax_error(said):
    assert "words.py has a syntax error in line" in said(task_file(more="return 1"))
    assert "words.py has a syntax error in line" in said(task_file(signal="return (weight"))


def test_the_class_is_told_of_where_it_extends_the_wrong_one(said):
    assert "words.py defines 0 subclasses of dpgbench.api.Task; it must define one (class Words extends nothing)" in said(
        task_file().replace("class Words(Task)", "class Words")
    )
    assert "(class Words extends Method)" in said(task_file().replace("Task", "Method"))
    assert "line 10: Task is not defined; write `from dpgbench.api import Task`" in said(
        task_file().replace("from dpgbench.api import Task\n", "\n")
    )
    assert "words.py defines 0 subclasses of dpgbench.api.Task; it must define one: `from dpgbench.api import Task`" in said("x = 1\n")
    two = task_file() + "\n\nclass Other(Words):\n    version = 2\n"
    assert "words.py defines 2 subclasses of dpgbench.api.Task; it must define one (Words, Other)" in said(two)


def test_what_a_file_breaks_is_told_without_torch(tmp_path, imports_of, capsys):
    """Seconds matter to somebody who is writing a file: all of the above that can be read off it is."""
    written(tmp_path, "task", "words", task_file(more="def mesure(self, model, texts):\n        return {}"))
    words = ["run", "task=words", "method=base", f"plugins={tmp_path}"]
    assert not {"torch", "transformers", "trl"} & imports_of(*words)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("dpgbench: task=words: words.py, line 20: `mesure` is nothing") and err.count("\n") == 1


def test_nothing_in_ours_looks_like_a_slip():
    """In use they are not searched for any; here they are."""
    for kind in ("task", "method"):
        assert not Registry().unusable(kind)
        for file in Registry().files(kind):
            assert source.read(kind, file.path).error is None


# ---- YAML files


def test_a_file_without_a_yaml_says_what_to_write(tmp_path, capsys):
    written(tmp_path, "task", "words", task_file())
    (tmp_path / "configs/task/words.yaml").unlink()
    assert main(["run", "task=words", f"plugins={tmp_path}"]) == 2
    wanted = (
        f"{tmp_path / 'tasks/words.py'} is there, and no YAML to choose it by; write {tmp_path / 'configs/task/words.yaml'} with the line"
    )
    assert f"task=words: {wanted} `name: words`\n" in capsys.readouterr().err
    assert main(["list", f"plugins={tmp_path}"]) == 0
    assert "unusable: configs/task/words.yaml is not there; write it, with the line `name: words`" in capsys.readouterr().out
    (tmp_path / "configs/task/words_twice.yaml").write_text("name: words\n")
    assert main(["run", "task=words", f"plugins={tmp_path}"]) == 2
    assert "or choose task=words_twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("label: x\n", "configs/task/words.yaml does not say whose options these are; write `name: words` into it"),
        ("", "configs/task/words.yaml does not say whose options these are"),
        ("- name: words\n", "configs/task/words.yaml does not say whose options these are"),
        ("name:\n", "configs/task/words.yaml does not say whose options these are"),
        ("name: word\n", "configs/task/words.yaml has name: word, and there is no tasks/word.py; did you mean 'words'?"),
        ("name: 5\n", "configs/task/words.yaml does not say whose options these are"),
    ],
)
def test_a_yaml_that_names_no_plugin_says_so(tmp_path, capsys, yaml, says):
    written(tmp_path, "task", "words", task_file(), yaml or "\n")
    assert main(["run", "task=words", f"plugins={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert main(["list", f"plugins={tmp_path}"]) == 0
    assert "unusable: configs/task/words.yaml" in capsys.readouterr().out


def test_a_yaml_without_a_file_says_so(tmp_path, capsys):
    written(tmp_path, "task", "words", task_file())
    (tmp_path / "tasks/words.py").unlink()
    assert main(["run", "task=words", f"plugins={tmp_path}"]) == 2
    assert "configs/task/words.yaml has name: words, and there is no tasks/words.py; choose from:" in capsys.readouterr().err
    assert main(["list", f"plugins={tmp_path}"]) == 0
    assert "unusable: configs/task/words.yaml has name: words, and there is no tasks/words.py" in capsys.readouterr().out


def test_defaults_stand_where_the_yaml_says_nothing(tmp_path, capsys):
    """They are options as any other: settable, checked, part of the cell; and what the YAML gives counts."""
    written(
        tmp_path, "task", "words", task_file(attributes="defaults = {'strength': 2.0, 'word': 'tonight'}"), "name: words\nword: today\n"
    )
    spec = spec_of(tmp_path, "task=words", "method=base")
    assert (spec.task.strength, spec.task.word) == (2.0, "today")
    assert spec_of(tmp_path, "task=words", "method=base", "strength=3").task.strength == 3.0
    assert main(["run", "task=words", "strength=much", f"plugins={tmp_path}"]) == 2
    assert "strength=much: expected a number" in capsys.readouterr().err


# ---- methods


RUNS = {
    "return None": "`run` returns nothing; it must yield Snapshot(step, sample)",
    "return Snapshot(0, print)": "line 9: `run` returns a Snapshot; it must yield it",
    "x = [Snapshot(0, print)]; return x": "parrot.py: run returned the list",
    "yield 1 / 0": "parrot.py, line 10: run raised ZeroDivisionError: division by zero",
    "yield self.options.rounds": "run reads the option 'rounds', which there is not; choose from: label, name, version; a new one",
    "import random; yield random.random()": "run draws from Python's `random`; draw from random.Random(bench.seed('a name'))",
    "import torch; yield torch.rand(1)": "run draws from torch's global generator",
    "yield None": "parrot.py: run yielded None; it must yield Snapshot(step, sample), of dpgbench.api",
    "yield ['a text']": "parrot.py: run yielded the list ['a text']",
    "yield Snapshot('0', print)": "parrot.py: run yielded a Snapshot with step=the str '0'",
    "yield Snapshot(0, ['a text'])": "parrot.py: run yielded a Snapshot whose sample is the list ['a text']; it must be a function",
}  # fmt: skip


@pytest.mark.parametrize("body", RUNS)
def test_run_yields_snapshots(tmp_path, body):
    written(tmp_path, "method", "parrot", METHOD.format(init="version = 1", run=body))
    with pytest.raises(UserError) as refused:
        method = Registry(tmp_path).make("method", "parrot", spec_of(tmp_path, "method=parrot").method)
        list(contract.snapshots(tmp_path / "methods/parrot.py", method, None))
    assert RUNS[body] in str(refused.value)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "sample returned None for 2 prompts"),
        ("text", "sample returned the str 'text' for 2"),
        (["a"], "sample returned 1 texts for 2"),
        (["a", None], "sample returned None among the texts for 2 prompts; it must return one string each"),
    ],
)
def test_sample_returns_a_text_for_each_prompt(tmp_path, found, says):
    from dpgbench.api import Snapshot
    from dpgbench.core.errors import CellError

    with pytest.raises(CellError, match=f"parrot.py: snapshot 3: {says}"):
        contract.texts_of(tmp_path / "parrot.py", Snapshot(3, print), found, 2)


def test_a_faulty_task_is_not_held_against_a_method(tmp_path, monkeypatch):
    """But a fault of its own is, on that task as on ours."""
    from dpgbench.run import plugin_check

    written(tmp_path, "task", "words", task_file())
    written(tmp_path, "method", "parrot", METHOD.format(init="version = 1", run="yield Snapshot(0, print)"))
    found = {}
    for file in ("words.py", "parrot.py"):

        def breaks(spec, plugins, file=file):
            raise plugin_check.Broken(f"{file}: signal is nan")

        monkeypatch.setattr(plugin_check, "runs", breaks)
        answers = plugin_check.answers(Registry(tmp_path), "method", "parrot", [f"plugins={tmp_path}"])
        found[file] = {answer.check: (answer.good, answer.words) for answer in answers if answer.check.startswith("runs with")}
    assert found["words.py"]["runs with words"] == (None, "words.py is at fault: words.py: signal is nan")
    assert len(found["parrot.py"]) > 1 and {good for good, _ in found["parrot.py"].values()} == {False}


def test_sample_draws_by_name_and_says_where_it_fails(tmp_path):
    """But for a policy's method, whose trainer draws in its own way."""
    from dpgbench.api import Snapshot

    file = tmp_path / "methods" / "parrot.py"
    written(tmp_path, "method", "parrot", METHOD.format(init="version = 1", run="yield Snapshot(0, print)"))
    method = Registry(tmp_path).make("method", "parrot", spec_of(tmp_path, "method=parrot").method)
    with pytest.raises(UserError, match=r"parrot\.py: sample draws from numpy's global generator"):
        contract.sampled(file, method, Snapshot(0, lambda prompts: [str(numpy.random.rand()) for _ in prompts]), ["a"])
    with pytest.raises(UserError, match=r"parrot\.py: sample raised KeyError: 'b'"):
        contract.sampled(file, method, Snapshot(0, lambda prompts: {}["b"]), ["a"])
    trained = Registry().make("method", "dpg", spec_of(tmp_path, "method=dpg").method)
    assert contract.sampled(file, trained, Snapshot(0, lambda prompts: [numpy.random.rand()]), ["a"])


INITS = {
    "def __init__(self, options):\n        raise KeyError('n')": "method=parrot: parrot.py, line 8: __init__ raised KeyError: 'n'",
    "def __init__(self, options):\n        self.n = options.n": "__init__ reads the option 'n', which there is not",
    "def supports(self, task):\n        return False": "supports returned the bool False; it must be None, or the reason",
    "def supports(self, task):\n        return task.nme": "supports raised AttributeError: 'TaskInfo' object has no attribute 'nme'",
    "def target_passes(self):\n        return 0": "`target_passes` is called as target_passes(self, steps)",
    "def suports(self, task):\n        return None": "`suports` is nothing that dpgbench looks for in a Method; did you mean `supports`?",
    "def target_passes(self, steps):\n        return 'many'": "target_passes returned the str 'many'; it must be a number, or None",
}  # fmt: skip


@pytest.mark.parametrize("init", INITS)
def test_a_methods_other_hooks_keep_their_types(tmp_path, capsys, init):
    run = "yield Snapshot(0, lambda prompts: ['one.'] * len(prompts))"
    written(tmp_path, "method", "parrot", METHOD.format(init=init, run=run))
    assert main(["run", "method=parrot", f"plugins={tmp_path}", f"results={tmp_path}", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert INITS[init].removeprefix("method=parrot: ") in err and err.count("\n") == 1 and "parrot.py" in err


# ---- through the command line


@pytest.mark.parametrize("method", ["base", "dpg"])
def test_a_broken_contract_fails_the_cell_before_its_method_runs(tmp_path, capsys, method):
    """With any method alike, in one line and with nothing written but the reason."""
    written(tmp_path, "task", "words", task_file(signal="value = weight.detach().norm(); return value"))
    words = ["task=words", f"method={method}", *(SMALL if method == "dpg" else []), f"plugins={tmp_path}"]
    assert main(["run", *words, f"results={tmp_path}"]) == 1
    folder = RunFolder.of(tmp_path, config.read(words, sweep=False).cells[0].spec)
    assert "words.py: signal returned" in (folder.path / "error.txt").read_text()
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err and sum("words.py: signal returned" in line for line in out.out.splitlines()) == 1
    assert not (folder.path / "metrics.jsonl").exists()


def test_a_measure_that_stops_being_a_number_fails_the_cell(tmp_path):
    """Later than at the start too: nothing that is no number is stored."""
    more = "def measure(self, model, texts):\n        self.times += 1\n        return {'share': 1.0 if self.times < 2 else None}"
    written(tmp_path, "task", "words", task_file(prepare="self.times = 0", more=more))
    spec = spec_of(tmp_path, "task=words", "method=base", "deployment_texts=8")
    assert run_cell(spec, tmp_path, tmp_path) == "failed"
    assert "words.py: measure gave share = None; it must be" in (RunFolder.of(tmp_path, spec).path / "error.txt").read_text()


def test_check_metagrad_holds_the_task_to_its_contract_too(tmp_path, capsys):
    written(tmp_path, "task", "words", task_file(signal="return weight.mean(0)"))
    assert main(["check", "metagrad", "task=words", f"plugins={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "words.py: signal returned a tensor of shape (64,)" in err and err.count("\n") == 1
