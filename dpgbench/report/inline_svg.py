"""A figure as an element of the page: a third of the bytes of matplotlib's SVG, colours left to the page, methods marked for the filter.

Same picture: what goes is white space, wrappers, names that nothing or one place refers to, clips that cut nothing, and digits of
coordinates beyond a tenth of a point. Lines are written as steps from point to point. A style is said once, in a sheet for all plots.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import accumulate, pairwise
from xml.etree import ElementTree

from markupsafe import Markup, escape

from dpgbench.core.text import visible
from dpgbench.report.plot_style import FAINT, INK

COLORS = {INK: "var(--ink)", FAINT: "var(--rule)", "#ffffff": "var(--paper)"}
COORDINATES = ("x", "y", "transform", "points", "width", "height", "viewBox")
SAID_BY_THE_PAGE = ("font-family", "stroke-linejoin")  # page.css, for all of `.plot`


class StyleSheet:
    """The styles of all plots of a page, each a class."""

    def __init__(self):
        self._names: dict[str, str] = {}

    def name(self, style: str) -> str:
        """The class that has this style."""
        return self._names.setdefault(style, f"p{len(self._names)}")

    def css(self) -> Markup:
        """One rule a class, stronger than those of page.css for the texts of plots."""
        return Markup("\n".join(f".plot .{name} {{{style}}}" for style, name in self._names.items()))


def inline_svg(svg: bytes, prefix: str, alt: str, sheet: StyleSheet) -> Markup:
    """The <svg> element with `alt` as its label; `prefix` makes its ids unique on the page, and its styles go into `sheet`."""
    root = ElementTree.fromstring(svg)
    referred = dict.fromkeys(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg.decode("utf-8")))
    named = {name: f"{prefix}{at}" for at, name in enumerate(referred)}
    outlined = {element.get("id") for element in root.iter() if "stroke:" in element.get("style", "")} & set(named)
    _clean(root, named, {f"#{named[name]}" for name in outlined})
    _draw_in_place(root)
    _leave_unclipped_what_is_inside(root)
    _styles_into(sheet, root)
    view_box = root.get("viewBox")
    root.attrib.clear()
    label = {"class": "plot", "viewBox": view_box, "role": "img", "aria-label": visible(alt)}
    start = "<svg " + " ".join(f'{name}="{escape(value)}"' for name, value in label.items()) + ">"
    inside = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
    return Markup(start + inside.replace(" />", "/>") + "</svg>")


def _clean(element: ElementTree.Element, named: dict[str, str], outlined: set[str]) -> None:
    """`named` has the new names of what is referred to, `outlined` those of markers that bring their own stroke."""
    children = []
    for child in element:
        child.tag = child.tag.rpartition("}")[2]
        if child.tag in ("metadata", "style"):
            continue
        _clean(child, named, outlined)
        if child.tag in ("g", "defs") and not len(child):
            continue
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = children
    if element.tag != "text":
        element.text = None
    for child in children:
        child.tail = None
    _attributes(element, named)
    styles = {child.get("style") for child in children}
    if element.tag == "g" and "style" not in element.attrib and len(styles) == 1 and all(child.tag == "use" for child in children):
        said = [part for part in (styles.pop() or "").split(";") if not (part.startswith("stroke") and children[0].get("href") in outlined)]
        element.set("style", ";".join(said))  # inherited by the marker
        for child in children:
            child.attrib.pop("style", None)


def _draw_in_place(root: ElementTree.Element) -> None:
    """Shapes that are used once stand where they are used."""
    uses = Counter(element.get("href") for element in root.iter("use"))
    shapes = {f"#{shape.get('id')}": (defs, shape) for defs in root.iter("defs") for shape in defs if shape.tag == "path"}
    for use in list(root.iter("use")):
        if uses[use.get("href")] == 1 and use.get("href") in shapes:
            defs, shape = shapes[use.attrib.pop("href")]
            defs.remove(shape)
            x, y = use.attrib.pop("x", "0"), use.attrib.pop("y", "0")
            use.tag = "path"
            use.attrib.update({name: value for name, value in shape.attrib.items() if name != "id" and name not in use.attrib})
            there = moved(use.get("d", ""), float(x), float(y))
            use.attrib.update({"d": there} if there else {})
            if there is None:
                use.set("transform", f"translate({x} {y})")
    for parent in list(root.iter()):
        parent[:] = [_unwrapped(child) for child in parent if child.tag != "defs" or len(child)]


def _unwrapped(element: ElementTree.Element) -> ElementTree.Element:
    """A path instead of the group that it is alone in, unless it is moved inside it, or clipped or marked in another way."""
    if element.tag != "g" or [child.tag for child in element] != ["path"]:
        return element
    path, style = element[0], ";".join(filter(None, (element.attrib.get("style"), element[0].attrib.get("style"))))
    if {"transform", *(element.attrib.keys() - {"style"})} & path.attrib.keys():
        return element
    path.attrib.update(element.attrib | ({"style": style} if style else {}))
    return path


def _leave_unclipped_what_is_inside(root: ElementTree.Element) -> None:
    """Where all points of a line are inside what it is clipped to."""
    rooms = {}
    for clip in root.iter("clipPath"):
        x, y, width, height = (float(clip[0].get(name, "0")) for name in ("x", "y", "width", "height"))
        rooms[f"url(#{clip.get('id')})"] = (x, y, x + width, y + height)
    for path in root.iter("path"):
        room, corners = rooms.get(path.get("clip-path")), corners_of(path.get("d", ""))
        if room and corners:
            beyond = [edge - at for at, edge in zip(corners[:2], room[:2], strict=True)]
            beyond += [at - edge for at, edge in zip(corners[2:], room[2:], strict=True)]
            if max(beyond) < 0.15:  # coordinates are tenths
                del path.attrib["clip-path"]


def _styles_into(sheet: StyleSheet, element: ElementTree.Element) -> None:
    for child in element:
        if child.tag == "defs":  # copies of what is inside stand outside of the plot for a style sheet
            continue
        if style := child.attrib.pop("style", None):
            child.set("class", sheet.name(style))
        _styles_into(sheet, child)


def _attributes(element: ElementTree.Element, named: dict[str, str]) -> None:
    given = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in given.items():
        if name == "id":
            method = re.fullmatch(r"method-(\d+)-\d+", value)
            if method:
                element.set("data-method", method[1])
            elif value in named:
                element.set("id", named[value])
        elif name == "style":
            if style := _style(value, element.tag):
                element.set("style", style)
        elif name == "href":
            element.set("href", f"#{named[value.removeprefix('#')]}")
        elif name == "d":
            element.set("d", steps(value))
        elif name in COORDINATES:
            if short := _short(value):
                element.set(name, short)
        else:
            element.set(name, re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{named[found[1]]})", value))


def _style(style: str, tag: str) -> str:
    parts = [part.strip().split(":", 1) for part in style.split(";") if ":" in part]
    said = []
    for name, value in ((name.strip(), value.strip()) for name, value in parts):
        if name in SAID_BY_THE_PAGE or (tag == "text" and name == "fill" and value == INK):
            continue
        said.append(f"{name}:{COLORS.get(value, value)}")
    return ";".join(said)


def _short(value: str) -> str:
    """A tenth of a point; a rotation by nothing is nothing."""
    value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found.group()):.1f}".removesuffix(".0"), value)
    value = re.sub(r"(?<![\d.])-0(?![\d.])", "0", value)
    return "" if re.fullmatch(r"rotate\(0 [^)]*\)", value) else value


def steps(path: str) -> str:
    """The path with each straight line relative to its start, and lines that go on in the same direction as one.

    Rounded before the steps are taken, so that errors do not add up.
    """
    parts = re.findall(r"([MLCQzZ])([^MLCQzZ]*)", path)
    absolute = [(command, [round(10 * float(number)) for number in numbers.split()]) for command, numbers in parts]
    taken: list[tuple[str, list[int]]] = []
    for (_, start), (command, numbers) in pairwise([("", []), *absolute]):
        if command == "L" and len(start) >= 2:
            command, numbers = "l", [numbers[0] - start[-2], numbers[1] - start[-1]]
            if taken[-1][0] == "l" and _same_direction(taken[-1][1], numbers):
                numbers = [before + more for before, more in zip(taken.pop()[1], numbers, strict=True)]
        taken.append((command, numbers))
    written, before = [], ""
    for command, numbers in taken:
        text = "".join(_tenth(number) for number in numbers)
        written.append(text if command == before == "l" else command + text.lstrip(" "))
        before = command
    return "".join(written)


def _same_direction(first: list[int], second: list[int]) -> bool:
    return first[0] * second[1] == first[1] * second[0] and first[0] * second[0] + first[1] * second[1] > 0


STEPS = re.compile(r"M(?P<start>[^A-Za-z]+)(l(?P<steps>[^A-Za-z]+))?(?P<end>[zZ]?)")
NUMBER = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+)")


def moved(path: str, x: float, y: float) -> str | None:
    """A path of one piece, as `steps` writes it, somewhere else; None for any other."""
    found = STEPS.fullmatch(path)
    if found is None:
        return None
    start = [round(10 * (float(number) + by)) for number, by in zip(NUMBER.findall(found["start"]), (x, y), strict=True)]
    return f"M{''.join(map(_tenth, start)).lstrip(' ')}{path[found.end('start') :]}"


def corners_of(path: str) -> tuple[float, float, float, float] | None:
    """The least x and y and the greatest x and y of a path of one piece, as `steps` writes it; None for any other."""
    found = STEPS.fullmatch(path)
    if found is None:
        return None
    numbers = [float(number) for part in (found["start"], found["steps"] or "") for number in NUMBER.findall(part)]
    xs, ys = (list(accumulate(numbers[first::2])) for first in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def _tenth(tenths: int) -> str:
    """A number with what parts it from the one before it: a minus does, otherwise a space."""
    text = f"{tenths / 10:.1f}".removesuffix(".0") if tenths % 10 else f"{tenths // 10}"
    text = text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
    return text if text.startswith("-") else f" {text}"
