"""Settings that no file could hold, or that are of another kind than they must be: one line each, before anything is loaded."""

from __future__ import annotations

import pytest

from dpgbench.cli import main


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed=99999999999999999999", "seed=99999999999999999999: a whole number has 64 bits"),
        (f"seed={'9' * 5000}", "expected a whole number"),
        ("budget.flops=1e400", "budget.flops=1e400: a setting must be finite"),
        ("budget.tokens=1e400", "budget.tokens=1e400: a setting must be finite"),
        ("deployment_texts=99999999999999999999", "deployment_texts=99999999999999999999: a whole number has 64 bits"),
        ("training.betas=[nan,0.9]", "training.betas=[nan,0.9]: a setting must be finite"),
        ("training.betas=[0.9]", "training.betas=[0.9]: two decay rates"),
        ("training.betas=null", "training.betas=null: expected a list"),
        ("policy.entropy_bonus=-0.0", "policy.entropy_bonus=-0.0: the same as 0.0, and would be another cell"),
        ("text='a\udcff'", "text='a\\udcff': these bytes are not UTF-8 text"),
        ("text='a\x00'", "task.text='a\\x00': a NUL character cannot be stored"),
        ("max_prompt_tokens=1e3", "max_prompt_tokens=1000.0: must be a whole number or null; write scale.max_prompt_tokens=1000"),
        ("max_prompt_tokens=0", "scale.max_prompt_tokens=0: a prompt has a token or more"),
        ("rollout_batch=abc", "policy.rollout_batch=abc: must be a whole number or null"),
        ("policy.micro_batch=abc", "policy.micro_batch=abc: must be a whole number or null"),
        ("languages=3", "languages=3: expected a list"),
        ("threads=null", "threads=null: expected a whole number"),
        ("training.lr=null", "training.lr=null: expected a number"),
        ("generator=''", "scale.generator=: must be a word"),
        ("max_completion_tokens=0", "scale.max_completion_tokens=0: a text has a token or more"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(word, says, capsys):
    assert main(["run", "task=uuid", "method=dpg", word, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("weight: .inf", "task.weight=inf: a setting must be finite"),
        ("weight: -0.0", "task.weight=-0.0: the same as 0.0"),
        ("weights: [1.0, .nan]", "task.weights[1]=nan: a setting must be finite"),
        ("count: 18446744073709551616", "task.count=18446744073709551616: a whole number has 64 bits"),
        ('note: "half \\ud83d"', "opening.yaml cannot be used: not YAML: while parsing a quoted scalar"),
        ("blob: !!binary aGVsbG8=", "task.blob=b'hello': a bytes cannot be stored"),
        ("table: {1: a}", "task.table: the key 1 is not a word; quote it in the YAML"),
    ],
)
def test_a_plugins_yaml_is_held_to_it_too(line, says, plugins, capsys):
    with open(plugins / "configs" / "task" / "opening.yaml", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    assert main(["run", "task=opening", "method=parrot", f"plugins={plugins}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
