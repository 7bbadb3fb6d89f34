"""Drawings of the README are what their data say today, hold their text, and overlap nothing."""

from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.pictures.drawings import DRAWINGS
from tests.pictures.layout import TEXT, TITLE, Arrow, Box, Cells, Drawing, Place, lay_out, route, to_svg

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "tests" / "pictures"
_SVG = "{http://www.w3.org/2000/svg}"
# A letter's part of the font's size, as wide fonts have it on the average.
_REGULAR, _BOLD = 0.6, 0.68

each_drawing = pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.name)


def reach(text: str, size: float, per_letter: float) -> float:
    return len(text) * size * per_letter


@each_drawing
def test_the_tree_has_the_drawing_of_today(drawing: Drawing) -> None:
    """Who changes a drawing's data writes its file as well: make pictures PICTURES=drawings."""
    assert (PICTURES / f"{drawing.name}.svg").read_text(encoding="utf-8") == to_svg(drawing)


@each_drawing
def test_it_is_told_to_those_who_do_not_see_it(drawing: Drawing) -> None:
    """A drawing parses, has a title and a description, and brings nothing from elsewhere."""
    root = ElementTree.fromstring(to_svg(drawing))
    assert root.findtext(f"{_SVG}title") == drawing.title
    assert root.findtext(f"{_SVG}desc") == drawing.description
    assert root.get("role") == "img"
    assert "href" not in to_svg(drawing)
    assert "@import" not in to_svg(drawing)


@each_drawing
def test_no_label_is_wider_than_its_box(drawing: Drawing) -> None:
    """Text fits in the box, the frame or the arrow that it belongs to, whatever font is there."""
    boxes, frames, _, _ = lay_out(drawing)
    for box in drawing.boxes:
        place = boxes[box.name]
        widest = max(reach(box.title, TITLE, _BOLD), *(reach(line, TEXT, _REGULAR) for line in box.lines), 0)
        assert widest < place.right - place.left - 8, box
        assert box.height <= place.bottom - place.top + 0.01, box
    for frame, place in zip(drawing.frames, frames, strict=True):
        assert reach(frame.label, TEXT, _BOLD) < place.right - place.left - 20, frame
    for arrow in drawing.arrows:
        x1, y1, x2, y2 = route(drawing, arrow, boxes)
        if arrow.label and y1 == y2:
            assert reach(arrow.label, TEXT, _REGULAR) < abs(x2 - x1), arrow


@each_drawing
def test_nothing_overlaps(drawing: Drawing) -> None:
    """Boxes keep apart, arrows go straight and through no box, and all is within the ground."""
    boxes, frames, width, height = lay_out(drawing)
    assert width <= 900
    for place in (*boxes.values(), *frames):
        assert 8 <= place.left < place.right <= width - 8
        assert 8 <= place.top < place.bottom <= height - 8
    for one, other in combinations(boxes.values(), 2):
        assert not meet(one, other)
    for arrow in drawing.arrows:
        x1, y1, x2, y2 = route(drawing, arrow, boxes)
        assert x1 == x2 or y1 == y2, arrow
        assert abs(x2 - x1) + abs(y2 - y1) >= 20, arrow
        within = (4, 0) if y1 == y2 else (0, 4)  # its ends touch the boxes that it joins
        left, top, right, bottom = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        way = Place(left + within[0], top + within[1], right - within[0], bottom - within[1])
        assert not any(meet(way, place) for place in boxes.values()), arrow


def meet(one: Place, other: Place) -> bool:
    across = min(one.right, other.right) - max(one.left, other.left)
    down = min(one.bottom, other.bottom) - max(one.top, other.top)
    return across >= 0 and down >= 0


def test_boxes_grow_with_their_text() -> None:
    """A long line makes its box, and with it the drawing, wider; an arrow's label makes room for itself."""

    def width_with(line: str, label: str) -> float:
        boxes = (Box("a", Cells(0, 0), "A", (line,)), Box("b", Cells(1, 0), "B"))
        return lay_out(Drawing("x", "x", "x", boxes, (Arrow("a", "b", label),)))[2]

    assert width_with("short", "") + 100 < width_with("a line that is a good deal longer", "")
    assert width_with("short", "") + 50 < width_with("short", "a long label")


def test_boxes_that_no_straight_arrow_joins_are_refused() -> None:
    """An arrow between boxes without a common row or column is a mistake in the data."""
    boxes = (Box("a", Cells(0, 0), "A"), Box("b", Cells(1, 1), "B"))
    with pytest.raises(ValueError, match="neither a row nor a column"):
        to_svg(Drawing("x", "x", "x", boxes, (Arrow("a", "b"),)))


def test_the_readme_shows_every_picture() -> None:
    """Each picture in the tree stands in the README with words for who cannot see it."""
    readme = (ROOT / "README.md").read_text()
    for path in (*PICTURES.glob("*.svg"), *PICTURES.glob("*.png")):
        assert any(
            f"](tests/pictures/{path.name})" in line and line.startswith("![") and len(line.split("]")[0]) > 20
            for line in readme.splitlines()
        ), path.name
