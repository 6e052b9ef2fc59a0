"""Computes the mean and standard deviation of the three channels over all training pictures.

    python3 get_mu_sigma.py

writes them to `mu_sigma.txt` in the folder [get_mu_sigma] path_to_save, and prints a [utils]
section for config.txt. Every picture has the same weight, whatever its size, because the network
sees the same number of crops of each.
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import UserError

# isort: split
import functools
import re
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess import Failures, Pictures, copies_for, map_pictures, training_pictures


def main() -> None:
    parser = utils.Parser(
        "Computes the mean and standard deviation of the training pictures' channels.",
        "get_mu_sigma.py",
    )
    text = "read preprocess.py's copies, not the originals"
    parser.add("--shorter_side", utils.whole(1), text)
    args = parser.parse()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    copies = None
    if args.shorter_side:
        copies = copies_at(config.preprocess.path_to_save, pictures, args.shorter_side)
    folder = copies or pictures.folder
    print(f"{utils.plural(len(pictures), 'training picture')} in {folder}, {pictures.layout}")
    result = utils.make_folder(config.get_mu_sigma.path_to_save) / "mu_sigma.txt"
    refuse_others_result(result)
    failures = Failures(len(pictures))
    text = toml(*mu_sigma(pictures, failures, copies))
    utils.write_text(result, text)
    print(
        f"{text}\nAlso saved to {result}; {failures}. Paste it into {args.config} only if your "
        f"pictures do not look like photographs, and never to fine-tune a model: it needs the "
        f"values that it was trained with"
    )


def copies_at(root: Path, pictures: Pictures, side: int) -> Path:
    """The folder with the copies at this shorter side. Raises UserError if they are unusable."""
    folder = copies_for(root, pictures).get(side)
    if folder is None:
        raise UserError(
            f"{root / str(side)}: no copies of all pictures at shorter side {side}; run "
            f"preprocess.py --shorter_side={side} first (256, 263, … 480)"
        )
    return folder


def refuse_others_result(result: Path) -> None:
    """Raises UserError if the result would overwrite a file that this script did not write."""
    ours = rb"\[utils\]\n((mu|sigma)_[012] = [0-9.]+\n){6}"
    if os.path.lexists(result) and not (
        result.is_file() and re.fullmatch(ours, utils.read_file(result))
    ):
        raise UserError(
            f"{result}: get_mu_sigma.py did not write this file and would overwrite it; use "
            f"another [get_mu_sigma] path_to_save, or move the file"
        )


def mu_sigma(
    pictures: Pictures, failures: Failures, copies: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [3] each, RGB, pixels scaled to 0…1. `copies`: the
    folder with copies to use instead of the originals.

    Computes E[x] and E[x²] of each picture exactly, from its histogram, and averages them in the
    order of the pictures. So the result is the same to the last bit on any number of cores.
    """

    def moments(_index: int, image: Image.Image) -> np.ndarray:
        """E[x] and E[x²] of a picture, float64 [2, 3]."""
        counts = np.array(image.histogram(), np.int64).reshape(3, 256)
        levels = np.arange(256, dtype=np.int64)
        sums = np.stack([counts @ levels, counts @ levels**2])
        return sums / counts[0].sum()

    load = functools.partial(pictures.decoded, copies=copies)
    total, used = np.zeros((2, 3)), 0
    for result in map_pictures(pictures, range(len(pictures)), load, moments, failures):
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
