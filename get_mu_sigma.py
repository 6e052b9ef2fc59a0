"""Computes the mean and standard deviation of the three channels over all training pictures.

    python3 get_mu_sigma.py

writes them to `mu_sigma.txt` in the folder [get_mu_sigma] path_to_save, and prints a [utils]
section to paste into config.txt. Every picture has the same weight, whatever its size, because the
network sees the same number of crops of each.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import utils
from utils import UserError

import numpy as np
from PIL import Image

from preprocess import (
    Failures,
    Pictures,
    copies_of_others,
    map_pictures,
    training_pictures,
    why_unused,
)


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    if args.shorter_side:
        pictures = resized(pictures, config.preprocess.path_to_save, args.shorter_side)
    print(
        f"{utils.plural(len(pictures), 'training picture')} in {pictures.folder}, {pictures.layout}"
    )
    result = utils.make_folder(config.get_mu_sigma.path_to_save) / "mu_sigma.txt"
    check_own(result)
    failures = Failures(len(pictures))
    text = toml(*mu_sigma(pictures, failures))
    utils.write_text(result, text)
    print(f"{text}\nAlso saved to {result}; {failures}. Next: paste it into {args.config}")


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Computes the mean and standard deviation of the training pictures' channels.",
        "get_mu_sigma.py",
    )
    text = "read preprocess.py's copies, not the originals"
    parser.add("--shorter_side", utils.whole(1), text)
    return parser.parse()


def resized(pictures: Pictures, root: Path, side: int) -> Pictures:
    """The copies of the pictures at this shorter side. Raises UserError if they are unusable."""
    folder = root / str(side)
    if copies_of_others(root, pictures):
        raise UserError(f"{folder}: holds copies of other pictures; use another path_to_save")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; preprocess.py makes copies of shorter side 256, 263, … 480"
        )
    if reason := why_unused(root, side, pictures):
        raise UserError(f"{folder}: {reason}; run preprocess.py --shorter_side={side} first")
    return replace(pictures, folder=folder)


def check_own(result: Path) -> None:
    """Raises UserError if the result would overwrite a file that this script did not write."""
    if os.path.lexists(result) and not (
        result.is_file() and utils.read_file(result).startswith(b"[utils]\nmu_0 = ")
    ):
        raise UserError(
            f"{result}: get_mu_sigma.py did not write this file and would overwrite it; use "
            f"another [get_mu_sigma] path_to_save, or move the file"
        )


def mu_sigma(pictures: Pictures, failures: Failures) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [3] each, RGB, pixels scaled to 0…1.

    Computes E[x] and E[x²] of each picture exactly, from its histogram, and averages them in the
    order of the pictures. So the result is the same to the last bit on any number of cores.
    """

    def moments(_index: int, image: Image.Image) -> np.ndarray:
        """E[x] and E[x²] of a picture, float64 [2, 3]."""
        counts = np.array(image.histogram(), np.int64).reshape(3, 256)
        levels = np.arange(256, dtype=np.int64)
        sums = np.stack([counts @ levels, counts @ levels**2])
        return sums / counts[0].sum()

    total, used = np.zeros((2, 3)), 0
    everything = range(len(pictures))
    for result in map_pictures(pictures, everything, pictures.decoded, moments, failures):
        if result is not None:
            total, used = total + result, used + 1
    mean, mean_square = total / used
    return mean / 255, np.sqrt(mean_square - mean**2) / 255


def toml(mu: np.ndarray, sigma: np.ndarray) -> str:
    """The [utils] section of config.txt."""
    lines = ["[utils]"]
    lines += [f"mu_{i} = {value:.5f}" for i, value in enumerate(mu)]
    lines += [f"sigma_{i} = {value:.5f}" for i, value in enumerate(sigma)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    utils.run(main)
