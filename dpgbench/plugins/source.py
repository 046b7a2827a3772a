"""What the text of a plug-in file tells: its summary, version and hooks, and the slips that can be seen without running it.

Read with `ast`: milliseconds, and nothing is imported. Only what is certainly wrong is called so; a class that is built in unusual ways
(bases from elsewhere, decorators, `setattr`) is left to `contract`, which looks at what its hooks return.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpgbench.core.errors import did_you_mean
from dpgbench.core.paths import PACKAGE

Kind = Literal["method", "task"]
UNTRACKED = re.compile(r"\b(setattr|getattr|hasattr|vars|__dict__|__getattr__|__slots__)\b")
"""Ways to have an attribute that assignments do not show."""
GRADIENT_LOST = ("item", "tolist", "detach", "numpy")


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
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options that its YAML need not give."""
    budget_options: tuple[str, ...] = ()
    """A method's options that may also be the word `budget`."""
    error: str | None = None
    """Why the file cannot be used, in one line."""


def read(kind: Kind, path: Path, *, trusted: bool = False) -> PluginFile:
    """Parse a plug-in file; one that is `trusted` (ours, which tests hold to it) is not searched for slips, which takes 10 ms."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=path.name)
        if not trusted:
            compile(tree, path.name, "exec", dont_inherit=True)  # which finds what parsing does not, such as a `return` outside
    except SyntaxError as error:
        return PluginFile(kind, path.stem, path, error=f"{path.name} has a syntax error in line {error.lineno}: {error.msg}")
    except (OSError, ValueError, RecursionError, MemoryError) as error:  # the last two: the parser's, of too many brackets
        return PluginFile(kind, path.stem, path, error=f"{path.name} cannot be read: {' '.join(str(error).split()) or 'nested too deeply'}")
    base = kind.capitalize()
    found = {node: _ancestors(node, tree, base) for node in tree.body if isinstance(node, ast.ClassDef)}
    classes = [node for node, above in found.items() if above is not None]
    if len(classes) != 1:
        says = f"{path.name} defines {len(classes)} subclasses of dpgbench.api.{base}; it must define one"
        return PluginFile(kind, path.stem, path, error=f"{says}{_instead(kind, tree, classes)}")
    source = _Source(classes[0], found[classes[0]], tree, text)
    fault = None if trusted else next(source.faults(), None)
    error = None if fault is None else f"{path.name}, line {fault[0].lineno}: {fault[1]}"
    version = source.literal("version", 1)
    summary = (ast.get_docstring(tree) or "").split("\n")[0]
    defaults, budget_options = source.literal("defaults", {}), source.literal("budget_options", ())
    if error:
        version, defaults, budget_options = 1, {}, ()  # whatever they are, the file cannot be used
    elif type(version) is not int:
        return PluginFile(kind, path.stem, path, summary, error=f"{path.name}: version = {version!r}; it must be a whole number")
    elif not isinstance(defaults, dict) or not all(isinstance(option, str) for option in defaults):
        return PluginFile(kind, path.stem, path, summary, error=f"{path.name}: defaults = {defaults!r}; it must be a dict by option")
    elif not isinstance(budget_options, tuple | list) or not all(isinstance(option, str) for option in budget_options):
        said = f"{path.name}: budget_options = {budget_options!r}; it must be a tuple of names of options"
        return PluginFile(kind, path.stem, path, summary, error=said)
    return PluginFile(kind, path.stem, path, summary, version, source.defines, defaults, budget_options, error)


def _instead(kind: Kind, tree: ast.Module, classes: list[ast.ClassDef]) -> str:
    """What a file without exactly one plug-in has in its place."""
    if classes:
        return f" ({', '.join(node.name for node in classes)})"
    others = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    if not others:
        return f": `from dpgbench.api import {kind.capitalize()}`, then `class Name({kind.capitalize()}):`"
    bases = ", ".join(map(ast.unparse, others[-1].bases)) or "nothing"
    return f" (class {others[-1].name} extends {bases})"


class _Source:
    """The class of a plug-in, dpgbench's own classes that it extends (nearest first, Task or Method last), and the file around it."""

    def __init__(self, node: ast.ClassDef, above: list[ast.ClassDef], tree: ast.Module, text: str):
        self.node, self.above, self.tree, self.text = node, above, tree, text
        self.own, self.functions = _body(node), _functions(node)
        self.inherited: dict[str, ast.FunctionDef] = {}
        for parent in reversed(above):
            self.inherited |= _functions(parent)
        self.abstract = {name for name, function in self.inherited.items() if _is_abstract(function)}
        self.known = {name for parent in above for name in _body(parent)}

    @property
    def defines(self) -> frozenset[str]:
        return frozenset(self.own) | frozenset(
            name for parent in self.above[:-1] for name in _body(parent) if name not in self.abstract or name in self.own
        )

    def literal(self, name: str, otherwise: Any) -> Any:
        """A class attribute that is written out, the class's own or the nearest inherited."""
        for names in (self.own, *map(_body, self.above)):
            if names.get(name) is not None:
                try:
                    return ast.literal_eval(names[name])
                except ValueError:
                    return otherwise
        return otherwise

    def faults(self) -> Iterator[tuple[ast.AST, str]]:
        """Where and what, the likeliest cause first."""
        yield from self._undefined()
        yield from self._attributes()
        yield from self._missing_hooks()
        yield from self._misspelt_hooks()
        yield from self._arguments()
        yield from self._returns()
        yield from self._headline()
        yield from self._never_set()

    def _undefined(self) -> Iterator[tuple[ast.AST, str]]:
        """Names that nothing in the file binds, in whatever scope: a missing import, a slip of the pen."""
        bound, loaded, parts = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}, [], [self.tree]
        while parts:
            part = parts.pop()
            if isinstance(part, ast.Name):
                if isinstance(part.ctx, ast.Load):
                    loaded.append(part)
                else:
                    bound.add(part.id)
            bound |= {getattr(part, name) for name in ("name", "rest", "arg") if isinstance(getattr(part, name, None), str)}
            if isinstance(part, ast.Import | ast.ImportFrom):
                bound |= {(alias.asname or alias.name).split(".")[0] for alias in part.names}
            for name, value in ast.iter_fields(part):
                if name not in ("annotation", "returns"):  # which nobody need evaluate
                    parts += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, ast.AST)]
        if "*" in bound or "globals" in self.text:
            return
        for node in sorted((node for node in loaded if node.id not in bound), key=lambda node: node.lineno):
            fix = (
                f"write `from dpgbench.api import {node.id}`" if _class_of("dpgbench.api", node.id) else "import it, or see how it is spelt"
            )
            yield node, f"{node.id} is not defined; {fix}"

    def _attributes(self) -> Iterator[tuple[ast.AST, str]]:
        kinds = {"version": (int, "a whole number from 1 up, such as version = 1"), "headline": (str, "a name that `measure` returns")}
        kinds |= {"higher_is_better": (bool, "True or False"), "defaults": (dict, "a dict of options")}
        kinds |= {"budget_options": (tuple, "a tuple of options' names, such as ('n',)")}
        for name, (kind, rule) in kinds.items():
            expression = self.own.get(name)
            if expression is None or name not in self.known:
                continue
            try:
                value = ast.literal_eval(expression)
            except ValueError:  # computed, which only these may not be: they are read from here
                if name in ("version", "defaults", "budget_options"):
                    yield expression, f"{name} = {ast.unparse(expression)}: must be {rule}, written out"
                continue
            if type(value) is not kind or (name == "version" and value < 1):
                yield expression, f"{name} = {ast.unparse(expression)}: must be {rule}"

    def _missing_hooks(self) -> Iterator[tuple[ast.AST, str]]:
        for name in sorted(self.abstract - set(self.own)):
            parent = next(parent.name for parent in self.above if name in _body(parent))
            close = difflib.get_close_matches(name, [other for other in self.functions if other not in self.known], n=1)
            hint = f"; is `{close[0]}` meant to be it?" if close else f"; write `def {_signature(self.inherited[name])}`"
            yield self.node, f"class {self.node.name} has no `{name}`, which every {parent} needs{hint}"

    def _misspelt_hooks(self) -> Iterator[tuple[ast.AST, str]]:
        """A public name that nothing in the file uses, close to that of a hook which the class does not have."""
        used = {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        for name, expression in self.own.items():
            if name.startswith("_") or name in self.known or name in used:
                continue
            close = difflib.get_close_matches(name, self.known - set(self.own), n=1, cutoff=0.8)
            if close:
                base, where = self.above[-1].name, self.functions.get(name) or expression or self.node
                yield where, f"`{name}` is nothing that dpgbench looks for in a {base}; did you mean `{close[0]}`? (or begin it with _)"

    def _arguments(self) -> Iterator[tuple[ast.AST, str]]:
        for name, function in self.functions.items():
            if name not in self.inherited or name == "__init__" or function.decorator_list:
                continue
            given = len(self.inherited[name].args.args)
            taken = function.args.posonlyargs + function.args.args
            most = given if function.args.vararg else len(taken)
            needed = [keyword for keyword, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if not default]
            if not len(taken) - len(function.args.defaults) <= given <= most or needed:
                yield function, f"`{name}` is called as {_signature(self.inherited[name])}; write `def {_signature(self.inherited[name])}`"

    def _returns(self) -> Iterator[tuple[ast.AST, str]]:
        for name in ("signal", "measure", "run", *sorted(self.abstract)):
            function = self.functions.get(name)
            if function is None or name not in self.inherited:
                continue
            values = _returned(function)
            yields = any(isinstance(part, ast.Yield) for part in ast.walk(function))
            if not values and not yields and not isinstance(function.body[-1], ast.Raise):
                fix = "yield Snapshot(step, sample)" if name == "run" else f"return {ast.unparse(self.inherited[name].returns or function)}"
                yield function, f"`{name}` returns nothing; it must {fix}"
            if name == "run":
                returned = [value for value in _returned(function, ast.Return) if isinstance(value, ast.Call)]
                if any(ast.unparse(value.func).split(".")[-1] == "Snapshot" for value in returned):
                    yield function, "`run` returns a Snapshot; it must yield it: write `yield` for `return`"
            if name == "signal":
                yield from self._signal(function, values)

    def _signal(self, function: ast.FunctionDef, values: list[ast.expr]) -> Iterator[tuple[ast.AST, str]]:
        for decorator in map(ast.unparse, function.decorator_list):
            if "no_grad" in decorator or "inference_mode" in decorator:
                yield function, f"`signal` under @{decorator} has no gradient; take that off, the harness knows when it needs none"
        for value in values:
            if _without_gradient(value):
                yield value, f"`signal` returns {ast.unparse(value):.60}, which has no gradient; return the 0-d tensor itself"

    def _headline(self) -> Iterator[tuple[ast.AST, str]]:
        headline, expression = self.literal("headline", None), self.own.get("headline")
        if expression is None or "headline" not in self.known or not isinstance(headline, str):
            return
        hook = "read" if "read" in self.abstract and "measure" not in self.own else "measure"
        function = self.functions.get(hook)
        names = {"phi"} if function is None else _keys_of(_returned(function))
        if names is not None and headline.removesuffix("_change" if hook == "read" else "") not in names | {"phi"}:
            what = f"`{hook}` returns" if function else "there is, for it has no `measure`"
            yield expression, f"headline = {headline!r} is not among what {what}; {did_you_mean(headline, names | {'phi'})}"

    def _never_set(self) -> Iterator[tuple[ast.AST, str]]:
        """What a hook reads of `self` and nobody sets."""
        if self.node.decorator_list or len(self.node.bases) > 1 or UNTRACKED.search(self.text):
            return
        there = set(self.own) | self.known | set(_stored(self.node))
        for parent in self.above:
            for name, function in _functions(parent).items():
                if name not in self.functions or _calls_super(self.functions[name]):
                    there |= set(_stored(function))
        for hook, function in self.functions.items():
            for node in ast.walk(function):
                if _is_of_self(node, ast.Load) and node.attr not in there and not node.attr.startswith("__"):
                    yield node, f"`{hook}` uses self.{node.attr}, which {set_where(self.above[-1].name, node.attr)}"


def set_where(base: str, attribute: str) -> str:
    """The rest of a sentence about an attribute that is not there: where a plug-in should have set it."""
    if attribute == "options":
        return "__init__ never set; call super().__init__(options) in it"
    if base == "Method":
        return f"nothing set; set self.{attribute} in __init__(self, options), after super().__init__(options)"
    if attribute in ("world", "surrogate"):
        return "prepare never set; call super().prepare(world) in it, and super().__init__(options) in __init__"
    return f"prepare never set; set self.{attribute} in prepare(self, world)"


def _body(node: ast.ClassDef) -> dict[str, ast.expr | None]:
    """The names a class sets, with the expressions of its attributes."""
    names: dict[str, ast.expr | None] = {}
    for part in node.body:
        if isinstance(part, ast.FunctionDef):
            names[part.name] = None
        targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        names |= {target.id: part.value for target in targets if isinstance(target, ast.Name)}
    return names


def _functions(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}


def _is_abstract(function: ast.FunctionDef) -> bool:
    return any("abstractmethod" in ast.unparse(decorator) for decorator in function.decorator_list)


def _signature(function: ast.FunctionDef) -> str:
    return f"{function.name}({', '.join(argument.arg for argument in function.args.args)})"


def _calls_super(function: ast.FunctionDef) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "super" for part in ast.walk(function))


def _stored(node: ast.AST) -> Iterator[str]:
    """The attributes of `self` that are set somewhere inside."""
    return (part.attr for part in ast.walk(node) if _is_of_self(part, ast.Store))


def _is_of_self(node: ast.AST, context: type) -> bool:
    return (
        isinstance(node, ast.Attribute) and isinstance(node.ctx, context) and isinstance(node.value, ast.Name) and node.value.id == "self"
    )


def _returned(function: ast.FunctionDef, *kinds: type) -> list[ast.expr]:
    """What it returns or yields, or one of these `kinds` of it; None and functions inside it left out."""
    values, parts = [], list(function.body)
    while parts:
        part = parts.pop()
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(part, kinds or (ast.Return, ast.Yield, ast.YieldFrom)) and part.value is not None:
            values += [] if isinstance(part.value, ast.Constant) and part.value.value is None else [part.value]
        parts += ast.iter_child_nodes(part)
    return values


def _without_gradient(value: ast.expr) -> bool:
    """Whether an expression is certainly no tensor with a gradient."""
    if isinstance(value, ast.UnaryOp):
        return _without_gradient(value.operand)
    if isinstance(value, ast.BinOp):
        return _without_gradient(value.left) and _without_gradient(value.right)
    if isinstance(value, ast.Call):
        function = value.func
        return function.attr in GRADIENT_LOST if isinstance(function, ast.Attribute) else ast.unparse(function) in ("float", "int")
    return isinstance(value, ast.Constant)


def _keys_of(values: list[ast.expr]) -> set[str] | None:
    """The keys of all dicts that are returned; None if one of them is not written out."""
    keys: set[str] = set()
    for value in values:
        if not isinstance(value, ast.Dict) or not all(isinstance(key, ast.Constant) for key in value.keys):
            return None
        keys |= {key.value for key in value.keys if isinstance(key.value, str)}
    return keys


def _ancestors(node: ast.ClassDef, tree: ast.Module, base: str) -> list[ast.ClassDef] | None:
    """Those of dpgbench's own classes that a class extends, up to `base` (Task or Method); None if it is no subclass of that."""
    for parent in (ast.unparse(expression).split(".")[-1] for expression in node.bases):
        if parent == base:
            return [_class_of("dpgbench.api", base)]
        for part in tree.body:
            if isinstance(part, ast.ClassDef) and part.name == parent and part is not node:
                above = _ancestors(part, tree, base)
                if above is not None:
                    return [part, *above]
            if isinstance(part, ast.ImportFrom) and (part.module or "").startswith("dpgbench."):
                if not any((name.asname or name.name) == parent for name in part.names):
                    continue
                found = _of_ours(part.module, parent, base)
                if found is not None:
                    return found
    return None


@functools.cache
def _of_ours(module: str, name: str, base: str) -> list[ast.ClassDef] | None:
    """A class of one of dpgbench's own modules and those above it, up to `base`; None if it is no subclass of that."""
    node = _class_of(module, name)
    above = None if node is None else _ancestors(node, _tree_of(_written_in(module, name)), base)
    return None if above is None else [node, *above]


def _class_of(module: str, name: str) -> ast.ClassDef | None:
    return next((node for node in _tree_of(_written_in(module, name)).body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _written_in(module: str, name: str) -> str:
    """The one of dpgbench's own modules that defines what `module` may only hand on."""
    for node in _tree_of(module).body:
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpgbench.")
        if ours and any(imported.name == name for imported in node.names):
            return _written_in(node.module, name)
    return module


@functools.cache
def _tree_of(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
