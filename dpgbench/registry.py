"""Plug-ins: one Python file in `methods/` or `tasks/` plus at least one YAML in `configs/` of the same kind.

Files are read with `ast` first, so that listing, version numbers and syntax errors cost milliseconds and import nothing. A module
is imported by path, under `dpgbench_plugins.<kind>s.<file>`, only when its class is needed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dpgbench.errors import UserError, did_you_mean

Kind = Literal["method", "task"]


def home() -> Path:
    """The folder that holds `methods/`, `tasks/` and `configs/`: the repository, or `dpgbench/bundled` in an installed wheel."""
    package = Path(__file__).resolve().parent
    bundled = package / "bundled"
    return bundled if bundled.is_dir() else package.parent


@dataclass(frozen=True)
class PluginFile:
    """What can be known of a plug-in without importing it."""

    kind: Kind
    name: str
    path: Path
    summary: str = ""
    version: int = 1
    defines: frozenset[str] = frozenset()
    """Names of the class body, and of dpgbench's own classes that it extends: methods it overrides, attributes it sets."""
    error: str | None = None
    """Why the file cannot be used, in one line."""


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
                    self._files[kind, path.stem] = _read(kind, path)

    @property
    def folders(self) -> list[Path]:
        return [home()] + ([self.plugins] if self.plugins else [])

    def files(self, kind: Kind) -> list[PluginFile]:
        """Every plug-in file of a kind, the broken ones too, by name."""
        return [file for (its_kind, _), file in sorted(self._files.items()) if its_kind == kind]

    def presets(self, kind: Kind) -> dict[str, Path]:
        """What can be chosen on the command line: the YAML files of `configs/<kind>/`, by name."""
        return {path.stem: path for folder in self.folders for path in sorted((folder / "configs" / kind).glob("*.yaml"))}

    def find(self, kind: Kind, name: str) -> PluginFile:
        """The plug-in file of that name. Raises UserError if there is none or it does not parse."""
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
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module_name and _is_plugin(value)
        )


def _is_plugin(value: type) -> bool:
    from dpgbench.api import Method, Task

    return issubclass(value, (Method, Task))


def _read(kind: Kind, path: Path) -> PluginFile:
    """Parse a plug-in file: docstring, version and what its class defines."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=path.name)
    except SyntaxError as error:
        return PluginFile(kind, path.stem, path, error=f"{path.name} has a syntax error in line {error.lineno}: {error.msg}")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        return PluginFile(kind, path.stem, path, error=f"{path.name} cannot be read: {error}")
    base = kind.capitalize()
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and _inherited(node, tree, base) is not None]
    if len(classes) != 1:
        return PluginFile(
            kind, path.stem, path, error=f"{path.name} defines {len(classes)} subclasses of dpgbench.api.{base}; it must define one"
        )
    summary = (ast.get_docstring(tree) or "").split("\n")[0]
    own = _class_body(classes[0])
    version = own.get("version")
    defines = frozenset(own) | _inherited(classes[0], tree, base)
    return PluginFile(kind, path.stem, path, summary, version.value if isinstance(version, ast.Constant) else 1, defines)


def _class_body(node: ast.ClassDef) -> dict[str, ast.expr | None]:
    """The names a class sets, with the expressions of its attributes."""
    names: dict[str, ast.expr | None] = {}
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            names[part.name] = None
        targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        names |= {target.id: part.value for target in targets if isinstance(target, ast.Name)}
    return names


def _inherited(node: ast.ClassDef, tree: ast.Module, base: str) -> frozenset[str] | None:
    """What a class has from dpgbench's classes between it and `base` (Task or Method); None if it is no subclass of that."""
    for parent in (ast.unparse(expression).split(".")[-1] for expression in node.bases):
        if parent == base:
            return frozenset()
        for imported in tree.body:
            if not (isinstance(imported, ast.ImportFrom) and (imported.module or "").startswith("dpgbench.")):
                continue
            if any((name.asname or name.name) == parent for name in imported.names):
                found = _of_ours(imported.module, parent, base)
                if found is not None:
                    return found
    return None


@functools.cache
def _of_ours(module: str, name: str, base: str) -> frozenset[str] | None:
    """What a class of one of dpgbench's own modules brings to its subclasses, abstract methods excepted."""
    path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    above = None if node is None else _inherited(node, tree, base)
    if above is None:
        return None
    abstract = {part.name for part in node.body if isinstance(part, ast.FunctionDef) and part.decorator_list}
    return above | (frozenset(_class_body(node)) - abstract)
