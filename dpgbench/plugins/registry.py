"""Plug-ins: one Python file in `methods/` or `tasks/` plus at least one YAML in `configs/` of the same kind.

Files are read as text first (`source`), so that listing, version numbers and most slips cost milliseconds and import nothing. A
module is imported by path, under `dpgbench_plugins.<kind>s.<file>`, only when its class is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpgbench.api import Method, Task
from dpgbench.core.documents import Unreadable, text_of, yaml_of
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.options import Options
from dpgbench.core.paths import home
from dpgbench.plugins import contract, source
from dpgbench.plugins.source import Kind, PluginFile


@dataclass
class Registry:
    """All plug-ins of the project and, with `plugins`, of a user's own folder with the same layout."""

    plugins: Path | None = None
    _files: dict[tuple[Kind, str], PluginFile] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.plugins is not None:
            self.plugins = Path(self.plugins).resolve()
            if not any((self.plugins / sub).is_dir() for sub in ("methods", "tasks", "configs")):
                raise UserError(f"plugins={self.plugins}: no methods/, tasks/ or configs/ folder there; give the folder that holds them")
        for folder in self.folders:
            for kind in ("method", "task"):
                for path in sorted((folder / f"{kind}s").glob("*.py")):
                    if path.stem.startswith("_"):
                        continue
                    if (kind, path.stem) in self._files:
                        raise UserError(f"plugins={self.plugins}: {kind} {path.stem!r} exists in dpgbench already; rename {path.name}")
                    self._files[kind, path.stem] = source.read(kind, path, trusted=folder != self.plugins)

    @property
    def folders(self) -> list[Path]:
        return [home()] + ([self.plugins] if self.plugins else [])

    def files(self, kind: Kind) -> list[PluginFile]:
        """Every plug-in file of a kind, the broken ones too, by name."""
        return [file for (its_kind, _), file in sorted(self._files.items()) if its_kind == kind]

    def presets(self, group: str) -> dict[str, Path]:
        """What can be chosen on the command line: the YAML files of `configs/<group>/` (task, scale, ...), the user's own too, by name."""
        there = (path for folder in self.folders for path in sorted((folder / "configs" / group).glob("*.yaml")))
        return {path.stem: path for path in there if path.is_file()}

    def find(self, kind: Kind, name: str) -> PluginFile:
        """The plug-in file of that name. Raises UserError if there is none or it cannot be used."""
        file = self._files.get((kind, name))
        if file is None:
            raise UserError(f"{kind}={name}: no such {kind}; {did_you_mean(name, (f.name for f in self.files(kind)))}")
        if file.error:
            raise UserError(f"{kind}={name}: {file.error}")
        return file

    def load(self, kind: Kind, name: str) -> type:
        """The plug-in's class, importing its module on first use. Raises UserError naming the file if the import fails."""
        file = self.find(kind, name)
        module_name = f"dpgbench_plugins.{kind}s.{name}"
        module = sys.modules.get(module_name)
        if module is None or Path(module.__file__) != file.path:
            location = importlib.util.spec_from_file_location(module_name, file.path)
            module = importlib.util.module_from_spec(location)
            sys.modules[module_name] = module
            try:
                location.loader.exec_module(module)
            except Exception as error:
                del sys.modules[module_name]
                raise UserError(f"{kind}={name}: importing {file.path.name} failed: {type(error).__name__}: {error}") from error
        return next(
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module_name and issubclass(value, (Method, Task))
        )

    def make(self, kind: Kind, name: str, options: Options) -> Any:
        """The plug-in with these options. Raises UserError for a bad option, or naming the file if `__init__` fails otherwise."""
        return contract.called(self.find(kind, name).path, "__init__", self.load(kind, name), options)

    def options(self, kind: Kind, preset: str, section: Any) -> dict[str, Any]:
        """The options that a preset's composed YAML gives, and the plug-in's `defaults` for those that it does not.

        Raises UserError where the YAML names no plug-in that there is."""
        said, known = f"{kind}={preset}: configs/{kind}/{preset}.yaml", {file.name for file in self.files(kind)}
        name = section.get("name") if isinstance(section, Mapping) else None
        if not isinstance(name, str):
            fix = preset if preset in known else f"NAME, the {kind} that is meant"
            raise UserError(f"{said} does not say whose options these are; write `name: {fix}` into it")
        if name not in known:
            raise UserError(f"{said} has name: {name}, and there is no {kind}s/{name}.py; {did_you_mean(name, known)}")
        defaults = self.find(kind, name).defaults
        return {**section, **{option: value for option, value in defaults.items() if option not in section}}

    def without_preset(self, kind: Kind, name: str) -> str | None:
        """What to do about a plug-in file that no YAML of its name lets one choose; None where there is no such file."""
        file = self._files.get((kind, name))
        if file is None or name in self.presets(kind):
            return None
        others = [preset for preset, its in self._names(kind).items() if its == name]
        path = file.path.parents[1] / "configs" / kind / f"{name}.yaml"
        or_else = f", or choose {' or '.join(f'{kind}={other}' for other in others)}" if others else ""
        return f"{file.path} is there, and no YAML to choose it by; write {path} with the line `name: {name}`{or_else}"

    def unusable(self, kind: Kind) -> dict[str, str]:
        """Why a plug-in file or a YAML cannot be chosen, by name."""
        found = {file.name: file.error for file in self.files(kind) if file.error}
        names, known = self._names(kind), {file.name for file in self.files(kind)}
        for name in sorted(known - set(names.values())):
            says = f"does not say `name: {name}`" if name in names else f"is not there; write it, with the line `name: {name}`"
            found.setdefault(name, f"configs/{kind}/{name}.yaml {says}")
        for preset, name in names.items():
            if name not in known:
                says = "has no `name:`" if name is None else f"has name: {name}, and there is no {kind}s/{name}.py"
                found.setdefault(preset, f"configs/{kind}/{preset}.yaml {says}")
        return found

    def _names(self, kind: Kind) -> dict[str, str | None]:
        """The plug-in that each YAML names, itself or through the one that it extends; None where it names none."""
        presets = self.presets(kind)

        def name_in(preset: str, seen: frozenset[str] = frozenset()) -> str | None:
            try:
                content = yaml_of(text_of(presets[preset]))
            except (KeyError, Unreadable):
                return None
            if not isinstance(content, dict):
                return None
            defaults, name = content.get("defaults"), content.get("name")
            above = defaults if isinstance(defaults, list) else []
            parents = [entry for entry in above if isinstance(entry, str) and entry not in seen | {"_self_"}]
            return name if isinstance(name, str) else next((name_in(parent, seen | {preset}) for parent in parents), None)

        return {preset: name_in(preset) for preset in presets}
