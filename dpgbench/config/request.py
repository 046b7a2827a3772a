"""From the words on the command line to cells: Hydra composes one configuration, this file owns the grid and the rules.

A command line is `key=value[,value...]` in Hydra's grammar (arguments.py). Four kinds of keys:
- `task`, `method`, `scale`, `launcher` choose YAML files (`task=all`, `method=all`: every one there is), `suite` a stored grid;
- `seed` and dotted keys (`policy.lr`, `method.n`, `task.lang`) set values, several values make a sweep;
- a bare key (`steps=2`, `n=4,16`, `lang=es`) is short for the only dotted key that ends in it;
- `model.generator` and `model.target`, and what begins with them, are the scale's.
In a sweep a key that a method or task does not have leaves its cells alone; a key that no cell has is an error.
An option whose default is a word takes what was typed, whatever it looks like; any other, what the grammar reads, of its default's kind.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpgbench.config import match_budget, validate
from dpgbench.config.overrides import Word, as_texts, for_shell, one, parse
from dpgbench.core.cell import Cell, RunSpec
from dpgbench.core.errors import UserError, did_you_mean, nearest
from dpgbench.core.exchange import TaskInfo
from dpgbench.core.options import Options, leaves_of
from dpgbench.core.paths import home
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.worlds import model_files, text_files

GROUPS = ("task", "method", "scale", "launcher")
FREE = ("launcher.resources.", "launcher.sbatch.")  # any method, scale or option of sbatch may be named there
SECTIONS = ("task", "method", "training", "scale")  # what a cell is made of; the root `policy` enters through `method.policy`
PLACES = ("suite", "name", "results", "plugins", "retry")  # words that set no option
TEXTS = frozenset(  # options that are words although their default is null
    ["task.file", *(f"scale.{option}" for option in ("corpus_subset", "corpus_column", "corpus_revision", "instruction",
     "generator_revision", "target_revision")), *(f"launcher.{option}" for option in ("partition", "account", "qos", "constraint"))]
)  # fmt: skip


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
    composer = _Composer(registry)
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
            raise UserError(f"{error}{_one_text(words, str(error))}") from None
        if match and not cell.skip:
            config["budget"]["flops"] = match_budget.flops_of(match, cell.spec, Path(results))
        cells.setdefault(cell.spec.folder, cell)
    if not sweep and len(cells) > 1:
        raise UserError(f"run takes one cell and this line names {len(cells)}; use `sweep` for a grid{_one_value(words)}")
    return Request(list(cells.values()), name, title, Path(results), registry, Options(launcher), list(arguments), retry)


def checked_name(name: str) -> str:
    """A sweep's name, which files and a folder have too. Raises UserError for one that they cannot have."""
    if not name.strip(". ") or name == "runs" or "/" in name or "\\" in name or not name.isprintable() or len(name.encode()) > 100:
        raise UserError(f"name={name}: names files and a folder; up to 100 letters, digits, spaces and - _ . and not runs; write name=mine")
    return name


def replay(path: Path, registry: Registry) -> Cell:
    """The cell stored in a `spec.yaml`, checked like any other."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
        missing = [section for section in (*SECTIONS, "seed") if section not in config]
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise UserError(
            f"spec={path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); give a run folder's spec.yaml"
        ) from None
    if missing:
        raise UserError(f"spec={path}: section {missing[0]!r} is missing; give a spec.yaml as written into a run folder")
    return _cell(config, registry)


def presets(registry: Registry, kind: str) -> dict[str, Path]:
    """The YAML files of a plug-in under another name: the same file with other options. By that name."""
    plain = {file.name for file in registry.files(kind)}
    return {name: path for name, path in files(registry, kind).items() if name not in plain}


def suites(registry: Registry) -> dict[str, str]:
    """Every stored suite's title, by name."""
    return {name: str(OmegaConf.load(path).get("title", "")) for name, path in files(registry, "suite").items()}


def files(registry: Registry, group: str) -> dict[str, Path]:
    """The YAML files of one group (scale, suite, ...), the user's own among them, by name."""
    return {path.stem: path for folder in registry.folders for path in sorted((folder / "configs" / group).glob("*.yaml"))}


def _suite(name: str, registry: Registry, words: Mapping[str, list[Word]]) -> tuple[str, list[dict[str, list[Word]]]]:
    """A stored grid: its title and its lines, each with the suite's `common` words under it and the command line's over it."""
    stored_suites = files(registry, "suite")
    if name not in stored_suites:
        raise UserError(f"suite={name}: no such suite; {did_you_mean(name, stored_suites)}")
    stored = OmegaConf.load(stored_suites[name])
    common = parse(shlex.split(stored.get("common", "")))
    return str(stored.get("title", "")), [{**common, **parse(shlex.split(line)), **words} for line in stored.grid]


class _Composer:
    """Hydra once per file, a merge per choice of files, and values set on plain copies: thousands of cells in a second.

    Hydra's own composition of a whole choice takes 40 ms, and choices multiply; files do not.
    """

    def __init__(self, registry: Registry):
        self.registry = registry
        self._parts: dict[tuple[str, str], DictConfig] = {}
        self._plain_parts: dict[str, dict[str, Any]] = {}
        self._root = OmegaConf.load(home() / "configs" / "config.yaml")
        self._order = OmegaConf.to_container(self._root.pop("defaults"), resolve=False)
        self.unused: list[set[str]] = []  # of each line
        self.known: set[str] = set()

    def grid(self, words: Mapping[str, list[Word]]) -> list[dict[str, Any]]:
        """All resolved configurations of one line of words."""
        chosen = [self._choices(group, words.get(group)) for group in GROUPS]
        settings = {key: values for key, values in words.items() if key not in GROUPS}
        unused, configs = dict.fromkeys(settings), []
        known: set[str] = set()
        for names in itertools.product(*chosen):
            base = self._compose(names)
            plain = OmegaConf.to_container(base, resolve=False)
            leaves = leaves_of(plain)
            known |= set(leaves)
            applied = {key: full for key in settings if (full := _resolve(key, leaves))}
            defaults = {full: _default(base, full, leaves.get(full, {} if f"{full}." in FREE else None)) for full in applied.values()}
            checked = [self._values(key, full, settings[key], defaults[full]) for key, full in applied.items()]
            for key in applied:
                unused.pop(key, None)
            # Nothing is computed from the seed, so all seeds of a setting share its resolved configuration.
            alone = not any(isinstance(leaf, str) and "seed" in leaf for leaf in leaves.values())
            resolved: dict[str, dict[str, Any]] = {}
            for values in itertools.product(*checked):
                setting = {full: value for full, value in zip(applied.values(), values, strict=True) if not (alone and full == "seed")}
                if repr(setting) not in resolved:
                    for full, value in setting.items():
                        # Every time the same keys, so nothing of the values before is left.
                        OmegaConf.update(base, full, value, force_add=True)
                    resolved[repr(setting)] = _plain(base)
                seed = values[list(applied).index("seed")] if alone and "seed" in applied else resolved[repr(setting)]["seed"]
                configs.append({**resolved[repr(setting)], "seed": seed})
        self.unused.append(set(unused))
        self.known |= known
        return configs

    def check_used(self, words: Mapping[str, list[Word]]) -> None:
        """Raises UserError for the first word of the command line that no cell of any line had a use for."""
        for key in words:
            if all(key in unused for unused in self.unused):
                raise UserError(f"{key}={words[key][0]}: no chosen task, method or scale has this option; {_closest(key, self.known)}")

    def _values(self, key: str, full: str, words: Sequence[Word], default: Any) -> list[Any]:
        """A key's values as they will be set, insisting that they are of the default's kind."""
        checked = _checked
        if isinstance(default, str) or full in TEXTS:
            words, checked = as_texts(words), _checked_text
        return [None if word.value is None and self._may_be_null(full, default) else checked(key, full, word, default) for word in words]

    def _may_be_null(self, full: str, default: Any) -> bool:
        """Whether null is a value of an option: some file says so, or it is a policy's steps, which a budget may end instead."""
        return default is None or full.startswith("budget.") or full.rpartition(".")[2] in self._null_somewhere | {"steps"}

    @functools.cached_property
    def _null_somewhere(self) -> set[str]:
        paths = [path for folder in self.registry.folders for path in (folder / "configs").rglob("*.yaml")]
        return {name for path in paths for name in re.findall(r"^\s*(\w+): null\b", path.read_text(encoding="utf-8"), re.MULTILINE)}

    def _choices(self, group: str, values: list[Word] | None) -> list[str]:
        default = {"task": "language", "method": "dpg", "scale": "tiny", "launcher": "inline"}
        there = files(self.registry, group)
        names = [str(value) for value in values] if values else [default[group]]
        if names == ["all"] and group in ("task", "method"):
            return list(there)
        for name in names:
            if name not in there:
                found = self.registry.without_preset(group, name)
                raise UserError(f"{group}={name}: {found or f'no such {group}; {did_you_mean(name, there)}'}")
        return names

    def _compose(self, names: tuple[str, ...]) -> DictConfig:
        """The files chosen, merged in the order of the defaults list of configs/config.yaml."""
        chosen = dict(zip(GROUPS, names, strict=True))
        parts = []
        for entry in OmegaConf.to_container(OmegaConf.create({**chosen, "order": self._order}), resolve=True)["order"]:
            if entry == "_self_":
                parts.append(self._plain_of("", self._root))
                continue
            ((group, name),) = entry.items()
            optional, group = group.startswith("optional "), group.removeprefix("optional ")
            part = self._part(group, chosen.get(group, name), optional)
            if part is not None:
                parts.append(self._plain_of(f"{group}/{chosen.get(group, name)}", part))
        whole = functools.reduce(_overlaid, parts)
        for kind in ("task", "method"):
            whole[kind] = self.registry.options(kind, chosen[kind], whole.get(kind))
        try:
            return OmegaConf.create(whole)  # OmegaConf.merge takes twice as long, for the same
        except OmegaConfBaseException as error:
            words = " ".join(f"{group}={name}" for group, name in chosen.items() if group != "launcher")
            raise UserError(f"{words}: the configuration does not compose: {str(error).splitlines()[0]}") from None

    def _plain_of(self, name: str, part: DictConfig) -> dict[str, Any]:
        if name not in self._plain_parts:
            self._plain_parts[name] = OmegaConf.to_container(part, resolve=False)
        return self._plain_parts[name]

    def _part(self, group: str, name: str, optional: bool) -> DictConfig | None:
        """One file as Hydra composes it: under its group's name or its `@package`, with whatever its own defaults list brings."""
        if (group, name) in self._parts:
            return self._parts[group, name]
        folders = [folder / "configs" for folder in self.registry.folders]
        there = [folder for folder in folders if (folder / group / f"{name}.yaml").exists()]
        if not there and optional:
            return None
        path = (there or folders)[0] / group / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        if not re.search(r"^(defaults|hydra):", text, re.MULTILINE):  # nothing for Hydra to do, which takes 30 ms over it
            try:
                part = OmegaConf.load(io.StringIO(text))
            except (YAMLError, OmegaConfBaseException) as error:
                raise UserError(f"{group}={name}: {path.name} is not YAML: {str(error).splitlines()[0]}") from None
            package = header[1] if (header := re.match(r"(?:#.*\n)*?# *@package +(\S+)", text)) else group
            self._parts[group, name] = part if package == "_global_" else OmegaConf.create({package: part})
            return self._parts[group, name]
        logging.getLogger("hydra").setLevel(logging.ERROR)  # Hydra sets up logging of its own otherwise
        others = [f"file://{folder}" for folder in folders if folder != there[0] and folder.is_dir()]
        try:
            with initialize_config_dir(str(there[0]), version_base="1.3"):
                part = compose(f"{group}/{name}", [f"hydra.searchpath=[{','.join(others)}]"])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{group}={name}: the configuration does not compose: {str(error).splitlines()[0]}") from None
        OmegaConf.set_struct(part, False)
        self._parts[group, name] = part
        return part


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested settings merged, the upper one's values where both have one."""
    both = {key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: _overlaid(below[key], above[key]) for key in both}}


def _resolve(key: str, leaves: Mapping[str, Any]) -> str | None:
    """The dotted key that a possibly bare key stands for, None if this configuration has none."""
    if key in leaves or f"{key}.".startswith(FREE):
        return key
    matches = [full for full in leaves if full.endswith(f".{key}")]
    if "." in key or not matches:
        return None
    if len(matches) > 1:
        raise UserError(f"{key}: could mean {' or '.join(matches)}; write the one you mean in full")
    return matches[0]


def _closest(key: str, leaves: Iterable[str]) -> str:
    """The keys that come close to `key`, or where to find them all: whole ones, or the last names of dotted ones."""
    whole, last = [*GROUPS, *PLACES, *sorted(leaves)], key.rpartition(".")[2]
    lasts = {name: name.rpartition(".")[2] for name in whole}
    same = [name for name in whole if lasts[name] == last]
    close = (
        nearest(key, same, cutoff=0.0)
        or nearest(key, whole)
        or [name for name in whole if lasts[name] in nearest(last, set(lasts.values()))]
    )
    return f"did you mean {' or '.join(close[:3])}?" if close else "configs/ has them all, with a comment each"


def _one_value(words: Mapping[str, Sequence[Word]]) -> str:
    """How to write a sentence with commas, where that is what several values may have been meant to be."""
    key = next((key for key, values in words.items() if any(" " in word for word in values) and len(values) > 1), None)
    return f", or {for_shell(key, ','.join(words[key]))} for one value with a comma" if key else ""


def _one_text(words: Mapping[str, Sequence[Word]], error: str) -> str:
    """How to separate values, where an error is about what was read as a sentence with a comma."""
    key = next(
        (key for key, values in words.items() if any(word.gap for word in values) and "".join(w + w.gap for w in values) in error), None
    )
    return f"; a comma and a space are part of a text: separate values as in {key}={','.join(words[key])}" if key else ""


def _default(config: DictConfig, full: str, written: Any) -> Any:
    """What a setting is if nobody says otherwise: as written, or what the interpolation that is written comes to."""
    return OmegaConf.select(config, full) if isinstance(written, str) and "${" in written else written


def _checked(key: str, full: str, word: Word, default: Any) -> Any:
    """A value of an option that is no text, of the default's kind."""
    value = word.value
    if isinstance(default, float) and type(value) is int:
        value = float(str(value))
    if type(default) is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e3 is a whole number too
    if full.startswith("launcher.sbatch.") and type(value) in (int, float):
        return str(word)  # as sbatch is to get it
    if OmegaConf.is_config(default):
        raise UserError(f"{key}={word}: a whole section; set its options one by one, such as {key}.{next(iter(default), 'option')}=...")
    if isinstance(default, list) and isinstance(value, list):
        return _checked_list(key, full, word, default)
    if default is not None and type(value) is not type(default):
        example = [str(word)] if default == [] else default
        raise UserError(f"{key}={word}: expected {_kind(default)}, such as {full}={_shown(example)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={word}: a setting must be finite, such as {full}={_shown(default)}")
    if type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{key}={word}: a whole number has 64 bits at most, such as {full}={_shown(default)}")
    return value


def _checked_list(key: str, full: str, word: Word, default: list[Any]) -> list[Any]:
    """A list whose parts are of the kinds of the default's, where that has any."""
    kinds = set(map(type, default))
    for part in word.value:
        if kinds and type(part) not in kinds | ({int} if float in kinds else set()):
            raise UserError(f"{key}={word}: {_shown(part)} is of another kind than what is in {full}={_shown(default)}")
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"{key}={word}: a setting must be finite, such as {full}={_shown(default)}")
    return word.value


def _checked_text(key: str, full: str, word: Word, default: str | None) -> str:
    if word == "???":
        raise UserError(f"{key}=???: to OmegaConf that is a value still missing; write another text, such as {full}={_shown(default)}")
    return str(word)


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return {True: "true", False: "false", None: "null"}.get(value) if value is None or isinstance(value, bool) else str(value)


def _plain(config: DictConfig) -> dict[str, Any]:
    """Resolve interpolations and keep what a cell is made of."""
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from None
    kept = {key: resolved[key] for key in (*SECTIONS, "seed", "launcher")}
    for section in (kept["method"], kept["method"].get("policy") or {}):
        if isinstance(section.get("lora"), dict) and section["lora"].get("rank") is None:
            section["lora"] = None  # no adapters, so what they would have been is no part of the cell
    limits = {name: limit for name, limit in resolved["budget"].items() if limit is not None}
    return {**kept, "budget": limits} if limits else kept


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
