"""new and check plugin: start a task or a method of one's own, and hold it to what every one must do."""

from __future__ import annotations

import shlex
from pathlib import Path

from dpgbench import config
from dpgbench.cli.arguments import inert
from dpgbench.config.overrides import one
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.paths import home
from dpgbench.plugins import starters
from dpgbench.plugins.registry import Registry

KINDS = ("task", "method")
FOLDER = "mine"  # where `new` writes unless told otherwise


def new_plugin(words: list[str]) -> int:
    """Write the two files of a new plug-in and say what to do with them."""
    plain = [word for word in words if "=" not in word]
    given = config.parse(word for word in words if "=" in word)
    if not plain or plain[0] not in KINDS:
        raise UserError(f"new {plain[0] if plain else 'nothing'}: write `new task NAME` or `new method NAME`")
    if len(plain) != 2 or set(given) - {"plugins"}:
        odd = next(iter(sorted(set(given) - {"plugins"})), " ".join(plain[2:])) or "no name"
        raise UserError(f"new {plain[0]}: {odd} is not understood; write `new {plain[0]} NAME`, and plugins=DIR for another folder")
    (kind, name), folder = plain, one(given, "plugins", FOLDER)
    for path in starters.write(kind, name, Path(folder)):
        print(inert(f"wrote {path}"))
    same = f"{kind}={name} {shlex.quote(f'plugins={folder}')}"
    print(f"It runs as it is. Try:\n  python -m dpgbench check plugin {inert(same)}\n  python -m dpgbench run {inert(same)}")
    return 0


def check_plugins(words: list[str]) -> int:
    """Ask every question of `plugin_check`, a line each. Returns 1 if an answer is wrong."""
    given = config.parse(words)
    named = [(kind, str(name)) for kind in KINDS for name in given.get(kind, [])]
    if not named and "plugins" not in given:
        raise UserError("check plugin: nothing is named; write plugins=DIR for all of a folder of your own, task=NAME or method=NAME")
    registry = Registry(Path(one(given, "plugins")) if "plugins" in given else None)
    there = {kind: {file.name: file.path for file in registry.files(kind)} for kind in KINDS}
    for kind in KINDS:
        of_a_yaml = {name: path for name, path in registry.presets(kind).items() if name in registry.unusable(kind)}
        there[kind] = of_a_yaml | there[kind]
    for kind, name in named:
        if name not in there[kind]:
            raise UserError(f"check plugin {kind}={name}: no such file of a {kind}; {did_you_mean(name, there[kind])}")
    named = named or [(kind, name) for kind in KINDS for name, path in there[kind].items() if home() not in path.parents]
    if not named:
        raise UserError(f"check plugin plugins={given['plugins'][0]}: no task and no method there; `new task NAME` writes one")
    from transformers.utils import logging as transformers_logging

    from dpgbench.run import plugin_check

    transformers_logging.disable_progress_bar()
    others = [word for word in words if word.partition("=")[0] not in KINDS]
    wrong = 0
    for kind, name in named:
        for answer in plugin_check.answers(registry, kind, name, others):
            mark = {True: "ok", False: "WRONG", None: "skipped"}[answer.good]
            print(inert(f"{mark:8}{kind} {name}: {answer.check}: {answer.words}"), flush=True)
            wrong += answer.good is False
    print(f"{wrong or 'nothing'} wrong")
    return 1 if wrong else 0
