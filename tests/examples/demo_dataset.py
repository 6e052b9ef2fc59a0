"""Makes the dataset of the demonstration: classes that differ in shape, texture and arrangement.

    python3 tests/examples/demo_dataset.py FOLDER

writes FOLDER/train/<class>/*.JPEG and FOLDER/val/<class>/*.JPEG, a few megabytes. The colours are
drawn at random for every picture, so they say nothing about its class.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toy_dataset

SIDE = 640
"""Pixels of the square canvas that is turned a little and cut to the shape of the picture."""
UNIT = 9
"""The radius of a figure in pixels, on average over the pictures."""


class Pen:
    """A square canvas, and the random choices that all classes share."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.unit = UNIT * rng.uniform(0.85, 1.15)
        ground, *self.colours = (tint(rng, light) for light in (200, 60, 75))
        self.image = Image.new("RGB", (SIDE, SIDE), tuple(ground.astype(int).tolist()))
        self.draw = ImageDraw.Draw(self.image)

    def colour(self) -> tuple[int, ...]:
        """One of the dark colours of this picture, never quite the same twice."""
        about = self.colours[self.rng.integers(len(self.colours))]
        return tuple(np.clip(about + self.rng.normal(0, 8, 3), 0, 255).astype(int).tolist())

    def line(self, points: list[tuple[float, float]], width: float) -> None:
        self.draw.line(points, self.colour(), round(width), joint="curve")

    def circle(self, x: float, y: float, radius: float, width: float = 0) -> None:
        """A disc, or a ring of so many pixels."""
        box, colour = [x - radius, y - radius, x + radius, y + radius], self.colour()
        self.draw.ellipse(box, None if width else colour, colour, round(width))

    def hexagon(self, x: float, y: float, radius: float) -> None:
        angles = [math.pi * (2 * i + 1) / 6 for i in range(6)]
        corners = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        self.draw.polygon(corners, self.colour())

    def scattered(self, size: float) -> Iterator[tuple[float, float, float]]:
        """Places of figures of about `size` units that hardly overlap: x, y and radius."""
        step = round(2.6 * size * self.unit)
        for x in range(0, SIDE, step):
            for y in range(0, SIDE, step):
                shift = self.rng.uniform(-0.3, 0.3, 2) * size * self.unit
                radius = size * self.unit * self.rng.uniform(0.8, 1.1)
                yield x + shift[0], y + shift[1], radius

    def rows(self, distance: float) -> np.ndarray:
        """Heights of horizontal lines over the whole canvas."""
        return np.arange(0, SIDE + distance, distance)


def tint(rng: np.random.Generator, light: float) -> np.ndarray:
    """A random colour of about this lightness: float64 [3], 0…255."""
    shift = rng.normal(0, 20, 3)
    return np.clip(light + rng.normal(0, 8) + shift - shift.mean(), 0, 255)


# --- shapes ---------------------------------------------------------------------------------


def discs(pen: Pen) -> None:
    for x, y, radius in pen.scattered(2.4):
        pen.circle(x, y, radius)


def rings(pen: Pen) -> None:
    for x, y, radius in pen.scattered(1.8):
        pen.circle(x, y, radius, 0.45 * radius)


def speckles(pen: Pen) -> None:
    most = 0.35 * pen.unit
    count = int(SIDE * SIDE / (5 * most * most))
    for x, y, radius in pen.rng.uniform((0, 0, 1), (SIDE, SIDE, most), (count, 3)).tolist():
        pen.circle(x, y, radius)


# --- textures -------------------------------------------------------------------------------


def stripes(pen: Pen) -> None:
    for y in pen.rows(1.1 * pen.unit):
        pen.line([(0, y), (SIDE, y)], 0.5 * pen.unit)


def palings(pen: Pen) -> None:
    for x in pen.rows(3.4 * pen.unit):
        pen.line([(x, 0), (x, SIDE)], 2.2 * pen.unit)


def waves(pen: Pen) -> None:
    xs = np.arange(0, SIDE + 4, 4)
    shift = 1.5 * pen.unit * np.sin(2 * math.pi * xs / (6 * pen.unit))
    for y in pen.rows(2.2 * pen.unit):
        pen.line(list(zip(xs.tolist(), (y + shift).tolist(), strict=True)), 0.7 * pen.unit)


# --- arrangements ---------------------------------------------------------------------------


def checks(pen: Pen) -> None:
    side = 2 * pen.unit
    for row, y in enumerate(pen.rows(side)):
        for x in pen.rows(2 * side) - row % 2 * side:
            pen.draw.rectangle([x, y, x + side, y + side], pen.colour())


def bricks(pen: Pen) -> None:
    width, height, joint = 5 * pen.unit, 2 * pen.unit, 0.35 * pen.unit
    for row, y in enumerate(pen.rows(height)):
        for x in pen.rows(width) - row % 2 * width / 2:
            pen.draw.rectangle([x, y, x + width - joint, y + height - joint], pen.colour())


def honeycombs(pen: Pen) -> None:
    radius = 1.2 * pen.unit
    width, height = math.sqrt(3) * radius, 1.5 * radius
    for row, y in enumerate(pen.rows(height)):
        for x in pen.rows(width) - row % 2 * width / 2:
            pen.hexagon(x, y, 0.85 * radius)


def nets(pen: Pen) -> None:
    for x in np.arange(0, 2 * SIDE, 4 * pen.unit):
        pen.line([(x, 0), (x - SIDE, SIDE)], 0.3 * pen.unit)
        pen.line([(SIDE - x, 0), (2 * SIDE - x, SIDE)], 0.3 * pen.unit)


DRAWN = (discs, rings, speckles, stripes, palings, waves, checks, bricks, honeycombs, nets)
CLASSES: dict[str, Callable] = {function.__name__: function for function in DRAWN}


def picture(name: str, rng: np.random.Generator) -> Image.Image:
    """A picture of a class, turned by up to 8 degrees, lit unevenly, with grain."""
    pen = Pen(rng)
    CLASSES[name](pen)
    width, height = toy_dataset.SHAPES[rng.integers(len(toy_dataset.SHAPES))]
    image = pen.image.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    image = image.crop((left, top, left + width, top + height))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0)))
    light = np.linspace(*rng.uniform(0.85, 1.1, 2), width)[:, None]
    grain = rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    pixels = np.asarray(image, np.float32) * light + grain
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))


def make(folder: Path, train: int, val: int, seed: int = 0) -> None:
    """So many pictures of each class for training and for validation."""
    toy_dataset.write(folder, picture, CLASSES, train, val, seed)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    make(Path(sys.argv[1]), train=8, val=3)
