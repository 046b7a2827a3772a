"""From YAML files and words to resolved configurations: Hydra composes each file once, a grid is merged from them."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgbench.bench.spending import BUDGET
from dpgbench.config.overrides import Word, as_texts
from dpgbench.config.validate import check_sections
from dpgbench.config.values import FREE, GROUPS, TEXTS, checked_text, checked_value, closest, default_of, resolved_key
from dpgbench.core.documents import Unreadable, check_settings, settings_of, text_of, yaml_of
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.options import leaves_of
from dpgbench.core.paths import home
from dpgbench.core.protocol import Protocol, read_protocol
from dpgbench.plugins.registry import Registry

if TYPE_CHECKING:
    from omegaconf import DictConfig

SECTIONS = ("task", "method", "training", "scale")  # what a cell is made of; the root `policy` enters through `method.policy`


def presets(registry: Registry, kind: str) -> dict[str, Path]:
    """The YAML files of a plug-in under another name: the same file with other options. By that name."""
    plain = {file.name for file in registry.files(kind)}
    return {name: path for name, path in registry.presets(kind).items() if name not in plain}


def suites(registry: Registry) -> dict[str, str]:
    """Every stored suite's title, by name; of one that cannot be read, why."""
    titles = {}
    for name, path in registry.presets("suite").items():
        try:
            titles[name] = str(read_suite(name, path).get("title", ""))
        except UserError as error:
            titles[name] = f"unusable: {error}"
    return titles


def read_suite(name: str, path: Path) -> dict[str, Any]:
    """A stored grid as it is written: a mapping with a `grid` of lines. Raises UserError for what is none."""
    try:
        stored = yaml_of(text_of(path))
    except Unreadable as reason:
        raise UserError(f"suite={name}: {path.name} cannot be read ({reason}); mend it, or choose another suite") from None
    grid, common = (stored.get("grid"), stored.get("common", "")) if isinstance(stored, dict) else (None, "")
    if not isinstance(grid, list) or not all(isinstance(line, str) for line in (*grid, common)):
        raise UserError(f"suite={name}: {path.name} has no grid, a list of lines such as `- task=language method=dpg seed=0`")
    return stored


def protocol_of(registry: Registry, suite: str) -> Protocol:
    """What a stored suite fixed beforehand; an empty one for a suite that is not stored or fixed nothing. UserError for a bad one."""
    path = registry.presets("suite").get(suite)
    stored = None if path is None else read_suite(suite, path).get("protocol")
    return read_protocol(stored, str(path))


class Composer:
    """Hydra once per file, a merge per choice of files, and values set on plain copies: thousands of cells in a second.

    Hydra's own composition of a whole choice takes 40 ms, and choices multiply; files do not.
    """

    def __init__(self, registry: Registry):
        from omegaconf import OmegaConf

        self.registry = registry
        self._parts: dict[tuple[str, str], DictConfig] = {}
        self._plain_parts: dict[str, dict[str, Any]] = {}
        self._root = OmegaConf.load(home() / "configs" / "config.yaml")
        self._order = OmegaConf.to_container(self._root.pop("defaults"), resolve=False)
        self.unused: list[set[str]] = []  # of each line
        self.known: set[str] = set()

    def grid(self, words: Mapping[str, list[Word]]) -> list[dict[str, Any]]:
        """All resolved configurations of one line of words."""
        from omegaconf import OmegaConf

        chosen = [self._choices(group, words.get(group)) for group in GROUPS]
        settings = {key: values for key, values in words.items() if key not in GROUPS}
        unused, configs = dict.fromkeys(settings), []
        known: set[str] = set()
        for names in itertools.product(*chosen):
            base = self._compose(names)
            plain = OmegaConf.to_container(base, resolve=False)
            leaves = leaves_of(plain)
            known |= set(leaves)
            applied = {key: full for key in settings if (full := resolved_key(key, leaves))}
            defaults = {full: default_of(base, full, leaves.get(full, {} if f"{full}." in FREE else None)) for full in applied.values()}
            countable = {f"method.{option}" for option in self.registry.find("method", plain["method"]["name"]).budget_options}
            checked = [self._values(key, full, settings[key], defaults[full], full in countable) for key, full in applied.items()]
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
                raise UserError(f"{key}={words[key][0]}: no chosen task, method or scale has this option; {closest(key, self.known)}")

    def _values(self, key: str, full: str, words: Sequence[Word], default: Any, countable: bool) -> list[Any]:
        """A key's values as they will be set, insisting that they are of the default's kind, or `budget` where that is a count too."""
        checked = checked_value
        if countable:
            default = 1 if default == BUDGET else default
            return [BUDGET if word == BUDGET else checked(key, full, word, default) for word in words]
        if isinstance(default, str) or full in TEXTS:
            words, checked = as_texts(words), checked_text
        return [None if word.value is None and self._may_be_null(full, default) else checked(key, full, word, default) for word in words]

    def _may_be_null(self, full: str, default: Any) -> bool:
        """Whether null is a value of an option: some file says so, or it is a policy's steps, which a budget may end instead."""
        return default is None or full.startswith("budget.") or full.rpartition(".")[2] in self._null_somewhere | {"steps"}

    @functools.cached_property
    def _null_somewhere(self) -> set[str]:
        paths = [path for folder in self.registry.folders for path in (folder / "configs").rglob("*.yaml")]
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())
        return {name for text in texts for name in re.findall(r"^\s*(\w+): null\b", text, re.MULTILINE)}

    def _choices(self, group: str, values: list[Word] | None) -> list[str]:
        default = {"task": "language", "method": "dpg", "scale": "tiny", "launcher": "inline"}
        there = self.registry.presets(group)
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
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

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
        whole["launcher"] = self._launcher(chosen["launcher"], whole.get("launcher"))
        try:
            return OmegaConf.create(whole)  # OmegaConf.merge takes twice as long, for the same
        except OmegaConfBaseException as error:
            words = " ".join(f"{group}={name}" for group, name in chosen.items() if group != "launcher")
            raise UserError(f"{words}: the configuration does not compose: {str(error).splitlines()[0]}") from None

    def _launcher(self, chosen: str, given: Any) -> dict[str, Any]:
        """A launcher's options; a user's own file need not have all that ours of its `name` has."""
        ours = {path.stem for path in (home() / "configs" / "launcher").glob("*.yaml")}
        kind = given.get("name") if isinstance(given, dict) else None
        if kind not in ours:
            raise UserError(f"launcher={chosen}: configs/launcher/{chosen}.yaml has name: {kind}; {did_you_mean(str(kind), ours)}")
        if chosen == kind:
            return given
        return _overlaid(self._plain_of(f"launcher/{kind}", self._part("launcher", kind, False))["launcher"], given)

    def _plain_of(self, name: str, part: DictConfig) -> dict[str, Any]:
        from omegaconf import OmegaConf

        if name not in self._plain_parts:
            self._plain_parts[name] = OmegaConf.to_container(part, resolve=False)
        return self._plain_parts[name]

    def _part(self, group: str, name: str, optional: bool) -> DictConfig | None:
        """One file as Hydra composes it: under its group's name or its `@package`, with whatever its own defaults list brings."""
        if (group, name) in self._parts:
            return self._parts[group, name]
        from omegaconf import OmegaConf

        folders = [folder / "configs" for folder in self.registry.folders]
        there = [folder for folder in folders if (folder / group / f"{name}.yaml").is_file()]
        if not there and optional:
            return None
        path = (there or folders)[0] / group / f"{name}.yaml"
        whole, extends = self._checked(group, name, path)
        if not extends:  # nothing for Hydra to do, which takes 30 ms over it
            self._parts[group, name] = OmegaConf.create(whole)
            return self._parts[group, name]
        from hydra import compose, initialize_config_dir

        logging.getLogger("hydra").setLevel(logging.ERROR)  # Hydra sets up logging of its own otherwise
        others = [f"file://{folder}" for folder in folders if folder != there[0] and folder.is_dir()]
        try:
            with initialize_config_dir(str(there[0]), version_base="1.3"):
                part = compose(f"{group}/{name}", [f"hydra.searchpath=[{','.join(others)}]"])
            check_settings(OmegaConf.to_container(part, resolve=False))
        except Exception as error:  # Hydra's, OmegaConf's, and for odd lists of defaults whatever comes
            raise UserError(f"{group}={name}: the configuration does not compose: {str(error).splitlines()[0]}") from None
        OmegaConf.set_struct(part, False)
        self._parts[group, name] = part
        return part

    def _checked(self, group: str, name: str, path: Path, seen: frozenset[Path] = frozenset()) -> tuple[dict[str, Any], bool]:
        """What a file sets, by section, and whether it extends others.

        Those are read and checked too, before Hydra looks for them: they are files of the same group, and no file is anywhere else.
        """
        said = f"{group}={name}: {path.name}"
        try:
            text = text_of(path)
            content = settings_of(text)
        except Unreadable as reason:
            raise UserError(f"{said} cannot be used: {reason}") from None
        content = {} if content is None else content
        extended = content.get("defaults", []) if isinstance(content, dict) else []
        if not isinstance(extended, list) or not all(isinstance(entry, str) and re.fullmatch(r"\w[\w.+=-]*", entry) for entry in extended):
            raise UserError(f"{said} has defaults: {extended}; write a list of other files of configs/{group}, and _self_")
        header = re.match(r"(?:#.*\n)*?# *@package +(\S+)", text)
        package = header[1] if header else group
        whole = content if package == "_global_" else {package: content}
        foreign = {"hydra", "launcher"} - {group}  # what composes, and what starts programs
        if not isinstance(whole, dict) or foreign & {str(key).partition(".")[0] for key in whole}:
            raise UserError(f"{said} must be a mapping of settings of a cell; leave out what is Hydra's or a launcher's")
        there = self.registry.presets(group)
        for entry in extended:
            if entry != "_self_" and entry in there and there[entry] not in seen:
                self._checked(group, entry, there[entry], seen | {path})
        return whole, bool(extended)


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested settings merged, the upper one's values where both have one."""
    both = {key for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **{key: _overlaid(below[key], above[key]) for key in both}}


def _plain(config: DictConfig) -> dict[str, Any]:
    """Resolve interpolations and keep what a cell is made of."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from None
    check_sections(resolved, (*SECTIONS, "launcher"))
    kept = {key: resolved[key] for key in (*SECTIONS, "seed", "launcher")}
    for section in (kept["method"], kept["method"].get("policy") or {}):
        if isinstance(section.get("lora"), dict) and section["lora"].get("rank") is None:
            section["lora"] = None  # no adapters, so what they would have been is no part of the cell
    limits = {name: limit for name, limit in resolved["budget"].items() if limit is not None}
    return {**kept, "budget": limits} if limits else kept
