"""Makes a small dataset of clearly different classes: real JPEG files of various shapes.

    python3 tests/toy_dataset.py FOLDER

writes FOLDER/train/<class>/*.JPEG and FOLDER/val/<class>/*.JPEG, a few megabytes.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = [(400, 300), (300, 400), (375, 375), (500, 333), (320, 480), (280, 420)]


def discs(pen: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    for _ in range(14):
        x, y, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(18, 50)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], colour(rng, (200, 60, 50)))


def stripes(pen: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    width = rng.uniform(14, 30)
    slant = rng.uniform(-1, 1) * size[1]
    for x in np.arange(-size[0] - size[1], 2 * size[0] + size[1], 2 * width):
        pen.line([(x, 0), (x + slant, size[1])], colour(rng, (40, 90, 190)), round(width))


def tiles(pen: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    side = round(rng.uniform(24, 44))
    for row, y in enumerate(range(0, size[1], side)):
        for column, x in enumerate(range(0, size[0], side)):
            if (row + column) % 2:
                pen.rectangle([x, y, x + side, y + side], colour(rng, (45, 140, 70)))


def stars(pen: ImageDraw.ImageDraw, size: tuple[int, int], rng: np.random.Generator) -> None:
    pen.rectangle([0, 0, *size], colour(rng, (25, 25, 60)))
    for _ in range(250):
        x, y, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(0.8, 3.5)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], colour(rng, (235, 225, 190)))


CLASSES: dict[str, Callable] = {"discs": discs, "stars": stars, "stripes": stripes, "tiles": tiles}


def colour(rng: np.random.Generator, about: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(about + rng.normal(0, 18, 3), 0, 255))


def picture(name: str, rng: np.random.Generator) -> Image.Image:
    size = SHAPES[rng.integers(len(SHAPES))]
    image = Image.new("RGB", size, colour(rng, (190, 185, 175)))
    CLASSES[name](ImageDraw.Draw(image), size, rng)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))


def make(folder: Path, train: int = 24, val: int = 6, seed: int = 0) -> None:
    """So many pictures of each class for training and for validation."""
    write(folder, picture, CLASSES, train, val, seed)


def write(folder: Path, draw: Callable, classes: Iterable, train: int, val: int, seed: int):
    """As many JPEG files of each class as asked for; draw(class, generator) makes a picture."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for name in classes:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = draw(name, rng)
                image.save(folder / part / name / f"{name}_{i}.JPEG", "JPEG", quality=90)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
