"""Can a picture be read where README and docs/ show it, 800 pixels wide?"""

from itertools import combinations
from pathlib import Path

from matplotlib.text import Text
from PIL import Image

WIDTH = 800  # pixels
SMALLEST = 10  # pixels of a font's em
SLACK = 1  # pixels by which boxes, which are larger than the letters, may overlap


def overlap(a, b) -> bool:
    """Boxes as x0, y0, x1, y1."""
    return all(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) > SLACK for i in (0, 1))


def assert_legible(draw, path: Path, monkeypatch) -> None:
    """Nothing that draw() writes into its picture `path` is small, cut off, or runs into something
    else."""
    boxes, sizes, draw_text = {}, {}, Text.draw

    def noted(text, renderer):
        draw_text(text, renderer)
        if text.get_text().strip() and text.get_visible():
            boxes[text] = text.get_window_extent(renderer).extents
            sizes[text] = renderer.points_to_pixels(text.get_fontsize())

    with monkeypatch.context() as patched:
        patched.setattr(Text, "draw", noted)
        draw()
    width, height = Image.open(path).size
    smallest = SMALLEST * max(1, width / WIDTH)
    assert boxes
    for text, (x0, y0, x1, y1) in boxes.items():
        what = repr(text.get_text())
        assert sizes[text] >= smallest, f"{what} is small: {sizes[text]:.1f}, not {smallest:.1f}"
        assert 0 <= x0 and x1 <= width and 0 <= y0 and y1 <= height, f"{what} is cut off"
    for one, other in combinations(boxes, 2):
        collide = overlap(boxes[one], boxes[other])
        assert not collide, f"{one.get_text()!r} runs into {other.get_text()!r}"
