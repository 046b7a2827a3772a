"""The profile of a step: its parts lie inside one another, and nothing else changes."""

from __future__ import annotations

import importlib.util
import re

import pytest
from conftest import ROOT, SMALL

from dpgbench import config
from dpgbench.bench.grpo import _Trainer

COMMANDS = re.findall(r"^python benchmarks/step_profile.py (.+)$", (ROOT / "docs" / "performance.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def step_profile():
    found = importlib.util.spec_from_file_location("step_profile", ROOT / "benchmarks" / "step_profile.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_parts_of_a_step_fit_into_it(step_profile, capsys):
    before = _Trainer.training_step
    step_profile.main(["task=language", *SMALL[1:], "steps=3"])
    shown = capsys.readouterr().out
    rows = {
        name.strip(): list(map(float, numbers)) for name, *numbers in re.findall(r"^ *(\S.*?) {2,}([\d.]+) +([\d.]+)", shown, re.MULTILINE)
    }
    median = {name: values[1] for name, values in rows.items()}
    assert median["sampling"] > 0 and median["of which metagradients"] > 0 and median["update: forward and backward"] > 0
    assert median["of which metagradients"] <= median["rewards"] + 0.002
    assert median["sampling"] + median["rewards"] + median["update: forward and backward"] <= median["step"] + 0.004
    assert rows["scoring, a snapshot"][0] > 0
    assert _Trainer.training_step is before


def test_the_guides_commands_are_understood():
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        assert config.read(command.split(), sweep=False).cells[0].spec.method.name == "dpg"
