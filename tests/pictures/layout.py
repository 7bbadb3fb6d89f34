"""Owns how boxes and arrows on a grid become an SVG: all sizes follow from the text, nothing is placed by hand."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

TITLE, TEXT = 14.0, 12.5  # font sizes
_LINE, _PAD, _MARGIN = 17.0, 12.0, 16.0
_GAPS = (34.0, 26.0)  # at least, between columns and between rows
_FRAME, _LABEL = 13.0, 20.0  # between a frame and what is in it; the frame's own label
_NARROW, _WIDE = frozenset(" ijltfrI.,:;'|()[]/-"), frozenset("mwMW@%→")
_LIGHT = {
    "ground": "#ffffff", "edge": "#d0d7de", "frame": "#f6f8fa", "box": "#ffffff", "line": "#57606a", "text": "#1f2328",
    "quiet": "#57606a", "own": "#ddf4e4", "cloud": "#ddeefc", "answer": "#1a7f37", "request": "#0969da",
}  # fmt: skip
_DARK = {
    "ground": "#0d1117", "edge": "#30363d", "frame": "#161b22", "box": "#0d1117", "line": "#9198a1", "text": "#f0f6fc",
    "quiet": "#9198a1", "own": "#12331f", "cloud": "#10294a", "answer": "#3fb950", "request": "#58a6ff",
}  # fmt: skip


@dataclass(frozen=True)
class Cells:
    """A rectangle of the grid."""

    column: int
    row: int
    columns: int = 1
    rows: int = 1

    def range(self, axis: int) -> range:
        start, count = ((self.column, self.columns), (self.row, self.rows))[axis]
        return range(start, start + count)


@dataclass(frozen=True)
class Box:
    """What does something: a title, and short lines that say what. ``kind`` is its colour: box, own or cloud."""

    name: str
    cells: Cells
    title: str
    lines: tuple[str, ...] = ()
    kind: str = "box"

    @property
    def width(self) -> float:
        return 2 * _PAD + max(width_of(self.title, TITLE, bold=True), *(width_of(line, TEXT) for line in self.lines), 0)

    @property
    def height(self) -> float:
        return 2 * _PAD - 4 + _LINE * (1 + len(self.lines))


@dataclass(frozen=True)
class Frame:
    """What boxes are in: a machine, a process, a step."""

    label: str
    cells: Cells


@dataclass(frozen=True)
class Arrow:
    """From box to box, in a straight line; ``at`` is the column or row where both have several in common."""

    start: str
    end: str
    label: str = ""
    kind: str = "line"  # or request or answer
    at: int | None = None
    dashed: bool = False
    both: bool = False


@dataclass(frozen=True)
class Place:
    """Where something came to lie."""

    left: float
    top: float
    right: float
    bottom: float

    def middle(self, axis: int) -> float:
        return (self.left + self.right) / 2 if axis == 0 else (self.top + self.bottom) / 2


@dataclass(frozen=True)
class Drawing:
    """A drawing as plain data."""

    name: str
    title: str
    description: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    frames: tuple[Frame, ...] = field(default=())


def width_of(text: str, size: float, bold: bool = False) -> float:
    """How wide a text is at most: by DejaVu Sans, than which no usual font is wider."""
    ems = sum(
        0.42 if letter in _NARROW else 0.98 if letter in _WIDE else 0.76 if letter.isupper() else 0.635
        for letter in text
    )
    return ems * size * (1.12 if bold else 1.0)


def lay_out(drawing: Drawing) -> tuple[dict[str, Place], list[Place], float, float]:
    """Places of boxes by name and of frames in their order, and the size of the whole."""
    spans = [_spans(drawing, axis) for axis in (0, 1)]
    size = [spans[axis][-1][1] + _edge(drawing, axis, len(spans[axis]) - 1, True) + _MARGIN for axis in (0, 1)]

    def place(cells: Cells, before: tuple[float, float] = (0, 0), after: tuple[float, float] = (0, 0)) -> Place:
        across, down = cells.range(0), cells.range(1)
        return Place(
            spans[0][across[0]][0] - before[0],
            spans[1][down[0]][0] - before[1],
            spans[0][across[-1]][1] + after[0],
            spans[1][down[-1]][1] + after[1],
        )

    boxes = {box.name: place(box.cells) for box in drawing.boxes}
    frames = []
    for frame in drawing.frames:
        before, after = ((_room(drawing, frame, 0, end), _room(drawing, frame, 1, end)) for end in (False, True))
        frames.append(place(frame.cells, before, after))
    return boxes, frames, size[0], size[1]


def _spans(drawing: Drawing, axis: int) -> list[tuple[float, float]]:
    """Start and end of each column (axis 0) or row."""
    count = 1 + max(box.cells.range(axis)[-1] for box in drawing.boxes)
    sizes = [0.0] * count
    for box in sorted(drawing.boxes, key=lambda each: len(each.cells.range(axis))):
        cells, wanted = box.cells.range(axis), (box.width, box.height)[axis]
        lacking = wanted - sum(sizes[cell] for cell in cells) - _GAPS[axis] * (len(cells) - 1)
        for cell in cells:
            sizes[cell] += max(lacking, 0) / len(cells)
    position, spans = _MARGIN + _edge(drawing, axis, 0, False), []
    for cell, wanted in enumerate(sizes):
        spans.append((position, position + wanted))
        position += wanted + _gap(drawing, axis, cell)
    return spans


def _gap(drawing: Drawing, axis: int, cell: int) -> float:
    """Room behind a column or row: for the frames that end and begin there, and for the labels of arrows."""
    frames = _edge(drawing, axis, cell, True), _edge(drawing, axis, cell + 1, False)
    room = sum(frames) + (_FRAME if all(frames) else 10.0 if any(frames) else 0.0)
    boxes = {box.name: box.cells.range(axis) for box in drawing.boxes}
    for arrow in drawing.arrows:
        near, far = sorted((boxes[arrow.start], boxes[arrow.end]), key=lambda each: each[0])
        if (near[-1], far[0]) == (cell, cell + 1) and arrow.label:
            room = max(room, width_of(arrow.label, TEXT) + 20 if axis == 0 else _LINE + 22)
    return max(room, _GAPS[axis])


def _edge(drawing: Drawing, axis: int, cell: int, end: bool) -> float:
    """How far frames reach beyond a column or row, at its start or its end."""
    edges = (frame for frame in drawing.frames if frame.cells.range(axis)[-1 if end else 0] == cell)
    return max((_room(drawing, frame, axis, end) for frame in edges), default=0.0)


def _room(drawing: Drawing, frame: Frame, axis: int, end: bool) -> float:
    """How far a frame reaches beyond its cells: beyond the frames inside that share the edge as well."""
    own = _FRAME + (_LABEL if axis == 1 and not end else 0.0)
    inner = (
        _room(drawing, each, axis, end)
        for each in drawing.frames
        if each != frame
        and all(set(each.cells.range(which)) <= set(frame.cells.range(which)) for which in (0, 1))
        and each.cells.range(axis)[-1 if end else 0] == frame.cells.range(axis)[-1 if end else 0]
    )
    return own + max(inner, default=0.0)


def route(drawing: Drawing, arrow: Arrow, places: dict[str, Place]) -> tuple[float, float, float, float]:
    """Where an arrow begins and ends."""
    cells = {box.name: box.cells for box in drawing.boxes}
    start, end = places[arrow.start], places[arrow.end]
    axis = 1 if set(cells[arrow.start].range(0)) & set(cells[arrow.end].range(0)) else 0
    common = set(cells[arrow.start].range(1 - axis)) & set(cells[arrow.end].range(1 - axis))
    if not common:
        raise ValueError(f"{arrow.start} and {arrow.end} have neither a row nor a column in common")
    line = arrow.at if arrow.at is not None else min(common)
    aligned = [place for name, place in places.items() if list(cells[name].range(1 - axis)) == [line]]
    across = (aligned[0] if len(common) > 1 else _shorter(start, end, 1 - axis)).middle(1 - axis)
    if axis == 0:
        along = (start.right, end.left) if start.left < end.left else (start.left, end.right)
        return along[0], across, along[1], across
    along = (start.bottom, end.top) if start.top < end.top else (start.top, end.bottom)
    return across, along[0], across, along[1]


def _shorter(one: Place, other: Place, axis: int) -> Place:
    return min(one, other, key=lambda each: (each.right - each.left, each.bottom - each.top)[axis])


def to_svg(drawing: Drawing) -> str:
    """The drawing, readable on light and on dark grounds."""
    places, frames, width, height = lay_out(drawing)
    body: list[str] = []
    for frame, place in zip(drawing.frames, frames, strict=True):
        body.append(_rect(place, "frame", 10))
        body.append(_text(place.left + _FRAME, place.top + _FRAME + 6, frame.label, "label", "start"))
    for arrow in drawing.arrows:
        x1, y1, x2, y2 = route(drawing, arrow, places)
        marks = f' marker-end="url(#{arrow.kind})"' + (f' marker-start="url(#{arrow.kind})"' if arrow.both else "")
        dashes = ' stroke-dasharray="5 4"' if arrow.dashed else ""
        line = f'<line class="{arrow.kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"{marks}{dashes}/>'
        body.append(line)
        if arrow.label and y1 == y2:
            body.append(_text((x1 + x2) / 2, y1 - 7, arrow.label, "quiet", "middle"))
        elif arrow.label:
            body.append(_text(x1 + 9, (y1 + y2) / 2 + 4, arrow.label, "quiet", "start"))
    for box in drawing.boxes:
        place = places[box.name]
        x, y = place.middle(0), place.middle(1) - _LINE * len(box.lines) / 2 + TITLE * 0.36
        lines = [_text(x, y, box.title, "title", "middle")]
        lines += [_text(x, y + _LINE * (1 + n), line, "text", "middle") for n, line in enumerate(box.lines)]
        body.append(f"<g>{_rect(place, box.kind, 6)}{''.join(lines)}</g>")
    return "\n".join((*_head(drawing, width, height), *body, "</svg>", ""))


def _head(drawing: Drawing, width: float, height: float) -> Iterable[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-labelledby="title description">'
    )
    yield f'<title id="title">{escape(drawing.title)}</title>'
    yield f'<desc id="description">{escape(drawing.description)}</desc>'
    yield f"<style>{_style(_LIGHT)}"
    yield f"text {{ font-family: system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; font-size: {TEXT:g}px }}"
    yield f".title {{ font-size: {TITLE:g}px }} .title, .label {{ font-weight: 600 }} line {{ stroke-width: 1.6 }}"
    yield f"@media (prefers-color-scheme: dark) {{ {_style(_DARK)} }}</style>"
    kinds = ("line", "request", "answer")
    marks = (
        f'<marker id="{kind}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path class="{kind}" d="M0 0 L8 4 L0 8 z"/></marker>'
        for kind in kinds
    )
    yield f"<defs>{''.join(marks)}</defs>"
    yield _rect(Place(0.5, 0.5, width - 0.5, height - 0.5), "ground", 8)


def _style(palette: dict[str, str]) -> str:
    rules = [f"rect.{kind} {{ fill: {palette[kind]}; stroke: {palette['edge']} }}" for kind in ("ground", "frame")]
    rules += [f"rect.{kind} {{ fill: {palette[kind]}; stroke: {palette['line']} }}" for kind in ("box", "own", "cloud")]
    rules += [f"line.{kind} {{ stroke: {palette[kind]} }}" for kind in ("line", "request", "answer")]
    rules += [f"path.{kind} {{ fill: {palette[kind]} }}" for kind in ("line", "request", "answer")]
    rules += [f"text {{ fill: {palette['text']} }} .quiet, .label {{ fill: {palette['quiet']} }}"]
    return " ".join(rules)


def _rect(place: Place, kind: str, radius: int) -> str:
    x, y, width, height = place.left, place.top, place.right - place.left, place.bottom - place.top
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
