"""From the words on the command line to cells: compose.py builds the configuration, this file the grid; validate.py has the rules.

A command line is `key=value[,value...]` in Hydra's grammar (overrides.py). Four kinds of keys:
- `task`, `method`, `scale`, `launcher` choose YAML files (`task=all`, `method=all`: every one there is), `suite` a stored grid;
- `seed` and dotted keys (`policy.lr`, `method.n`, `task.lang`) set values, several values make a sweep;
- a bare key (`steps=2`, `n=4,16`, `lang=es`) is short for the only dotted key that ends in it;
- `model.generator` and `model.target`, and what begins with them, are the scale's.
In a sweep a key that a method or task does not have leaves its cells alone; a key that no cell has is an error.
If the default of an option is text, the value is taken exactly as typed. Otherwise the value is what Hydra's grammar reads, and it must
have the type of the default (values.py).
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpgbench.config import match_budget, validate
from dpgbench.config.compose import SECTIONS, Composer, read_suite
from dpgbench.config.overrides import Word, one, parse
from dpgbench.config.values import PLACES, one_value_form, several_values_form
from dpgbench.core.cell import Cell, RunSpec
from dpgbench.core.documents import Unreadable, settings_of, text_of
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.options import Options
from dpgbench.core.plugin_types import TaskInfo
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.worlds import model_files, text_files


@dataclass
class Request:
    """A parsed command line: the cells it asks for and where and how to run them."""

    cells: list[Cell]
    suite: str
    title: str
    results: Path
    registry: Registry
    launcher: Options
    arguments: list[str] = field(default_factory=list)
    retry: frozenset[str] = frozenset()
    """States whose cells are run again because it was asked for: "failed", "damaged"."""


def read(arguments: Sequence[str], *, sweep: bool) -> Request:
    """Parse, compose and check a command line. Raises UserError on the first thing that is wrong; imports no torch."""
    words = parse(arguments)
    plugins, results, suite, name = (
        one(words, key, default) for key, default in (("plugins", None), ("results", "results"), ("suite", None), ("name", "sweep"))
    )
    registry = Registry(Path(plugins) if plugins is not None else None)
    retry = frozenset(map(str, words.get("retry", [])))
    if retry - {"failed", "damaged"}:
        raise UserError(
            f"retry={min(retry - {'failed', 'damaged'})}: only failed and damaged cells wait to be asked for; write retry=failed"
        )
    match = match_budget.label_in(words.pop("budget", None))
    words, name = {key: values for key, values in words.items() if key not in PLACES}, checked_name(suite or name)
    title, lines = _suite(suite, registry, words) if suite is not None else ("", [words])
    composer = Composer(registry)
    cells: dict[str, Cell] = {}
    launcher: dict[str, Any] = {}
    configs = [config for line in lines for config in composer.grid(line)]
    composer.check_used(words)
    reasons: dict[str, str | None] = {}
    for config in configs:
        launcher = config.pop("launcher")
        if match:
            config["budget"] = {**config.get("budget", {}), "flops": math.inf}  # until the cell is known to run
        try:
            cell = _cell(config, registry, reasons)
        except UserError as error:
            raise UserError(f"{error}{several_values_form(words, str(error))}") from None
        if match and not cell.skip:
            config["budget"]["flops"] = match_budget.flops_of(match, cell.spec, Path(results))
        cells.setdefault(cell.spec.folder, cell)
    if not sweep and len(cells) > 1:
        raise UserError(f"run takes one cell and this line names {len(cells)}; use `sweep` for a grid{one_value_form(words)}")
    return Request(list(cells.values()), name, title, Path(results), registry, Options(launcher), list(arguments), retry)


def checked_name(name: str) -> str:
    """A sweep's name, which files and a folder have too. Raises UserError for one that they cannot have."""
    if not name.strip(". ") or name == "runs" or "/" in name or "\\" in name or not name.isprintable() or len(name.encode()) > 100:
        raise UserError(f"name={name}: names files and a folder; up to 100 letters, digits, spaces and - _ . and not runs; write name=mine")
    return name


def replay(path: Path, registry: Registry) -> Cell:
    """The cell stored in a `spec.yaml`, checked like any other."""
    try:
        config = settings_of(text_of(path))
    except Unreadable as reason:
        raise UserError(f"spec={path}: cannot be read ({reason}); give a run folder's spec.yaml") from None
    whose = f"spec={path}: not the settings of a cell"
    fix = "give a spec.yaml as written into a run folder"
    missing = [section for section in (*SECTIONS, "seed") if not isinstance(config, dict) or section not in config]
    if missing:
        raise UserError(f"spec={path}: section {missing[0]!r} is missing; {fix}")
    unknown = sorted(str(key) for key in set(config) - {*SECTIONS, "seed", "budget"})
    if unknown:
        raise UserError(f"{whose} ({unknown[0]} is none of its sections); {fix}")
    validate.check_sections(config, SECTIONS)
    unsealed = _unsealed(config)
    if unsealed:
        raise UserError(f"{whose} ({unsealed} names a file, and what was in it is not said); {fix}")
    try:
        return _cell(config, registry)
    except (KeyError, TypeError, AttributeError) as error:  # of a setting that is not there, or of another kind, where a rule looked for it
        raise UserError(f"{whose} ({type(error).__name__}: {' '.join(str(error).split())}); {fix}") from None


def _unsealed(config: Mapping[str, Any]) -> str | None:
    """The first setting of a stored cell that names a file or folder of somebody's without the digest that a cell has of it, or None.

    With a digest, a `spec.yaml` from elsewhere reads nothing here but what whoever wrote it had as well.
    """
    scale = config["scale"]
    named = [(f"{kind}.file", config[kind].get("file"), config[kind].get("file_sha256")) for kind in ("task", "method")]
    named += [("scale.corpus", scale.get("corpus"), scale.get("corpus_sha256"))] if text_files.is_passages(str(scale.get("corpus"))) else []
    for role in model_files.ROLES:
        model = str(scale.get(role))
        if model_files.is_folder(model):
            named.append((f"scale.{role}", model, scale.get(f"{role}_sha256")))
    return next((f"{key}={value}" for key, value, digest in named if value is not None and not isinstance(digest, str)), None)


def _suite(name: str, registry: Registry, words: Mapping[str, list[Word]]) -> tuple[str, list[dict[str, list[Word]]]]:
    """A stored grid: its title and its lines, each with the suite's `common` words under it and the command line's over it."""
    stored_suites = registry.presets("suite")
    if name not in stored_suites:
        raise UserError(f"suite={name}: no such suite; {did_you_mean(name, stored_suites)}")
    stored = read_suite(name, stored_suites[name])
    try:
        common, *lines = (parse(shlex.split(line)) for line in (stored.get("common", ""), *stored["grid"]))
    except ValueError as error:  # of a quotation mark without its other one; UserError, of a word, is one too
        raise UserError(f"suite={name}: {stored_suites[name].name} has a line that cannot be read: {error}") from None
    return str(stored.get("title", "")), [{**common, **line, **words} for line in lines]


def _cell(config: dict[str, Any], registry: Registry, reasons: dict[str, str | None] | None = None) -> Cell:
    """Attach versions, apply every rule, and ask the plug-ins whether the combination makes sense.

    `reasons` remembers what they said, because their answer does not depend on the seed.
    """
    for kind in ("task", "method"):
        file = registry.find(kind, config[kind]["name"])
        config[kind] = {**config[kind], "version": file.version, "label": str(config[kind].get("label") or config[kind]["name"])}
        if config[kind].get("file") is not None and "file_sha256" not in config[kind]:  # a replay has it, and must find the same content
            config[kind]["file_sha256"] = text_files.digest(config[kind]["file"])
            config[kind]["label"] += "_" + re.sub(r"[^\w+=-]+", "-", Path(config[kind]["file"]).stem)
        if not re.fullmatch(r"[\w+=-]+", config[kind]["label"]):
            raise UserError(f"{kind}.label={config[kind]['label']}: a label names folders; use letters, digits, _ + = -")
    found = model_files.digests(config["scale"])
    if text_files.is_passages(str(config["scale"]["corpus"])):
        found["corpus_sha256"] = text_files.digest(config["scale"]["corpus"])
    config["scale"] = {**found, **config["scale"]}  # a replay has them, and must find the same content
    validate.check_seed(config["seed"])
    spec = RunSpec(config)
    reasons = {} if reasons is None else reasons
    asked = repr({**config, "seed": None})
    if asked not in reasons:
        validate.check(config)
        validate.check_spent(config, registry.find("method", spec.method.name).budget_options)
        reasons[asked] = _skip_reason(spec, registry)
    return Cell(spec, reasons[asked])


def _skip_reason(spec: RunSpec, registry: Registry) -> str | None:
    """Options are checked and the combination judged by the plug-ins' own words; modules are imported only if they have any."""
    task_file, method_file = registry.find("task", spec.task.name), registry.find("method", spec.method.name)
    reason = None
    if task_file.defines & {"__init__", "supports"}:
        reason = contract.reason(task_file.path, registry.make("task", task_file.name, spec.task), spec.scale)
    if method_file.defines & {"__init__", "supports"}:
        method = registry.make("method", method_file.name, spec.method)
        reason = reason or contract.reason(method_file.path, method, TaskInfo(task_file.name, spec.task, task_file.defines))
    return reason
