"""Computes mean and standard deviation of the three channels over all training pictures.

    python3 get_mu_sigma.py

writes them to `mu_sigma.txt` in the folder that [get_mu_sigma] path_to_save names, and prints a
[utils] section to paste into config.txt. Every picture weighs the same, whatever its size, because
the network sees equally many crops of each.
"""

from dataclasses import replace

import numpy as np

import utils
from preprocess import (
    DECODING_ERRORS,
    Failures,
    Pictures,
    as_rgb,
    copies_of_others,
    open_picture,
    training_pictures,
)
from utils import UserError


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    pictures = training_pictures(config)
    if args.shorter_side:
        folder = config.preprocess.path_to_save / str(args.shorter_side)
        if copies_of_others(config.preprocess.path_to_save, pictures):
            raise UserError(
                f"{folder}: its copies are of other pictures; take another path_to_save"
            )
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; preprocess.py makes those of the shorter sides 256, "
                f"263, … 480"
            )
        pictures = replace(pictures, folder=folder)
    print(
        f"{utils.plural(len(pictures), 'training picture')} in {pictures.folder}, {pictures.layout}"
    )
    result = utils.make_folder(config.get_mu_sigma.path_to_save) / "mu_sigma.txt"
    failures = Failures(len(pictures))
    text = toml(*mu_sigma(pictures, failures))
    utils.write_text(result, text)
    print(f"{text}\nThis is in {result} too; {failures}. Next: paste it into {args.config}")


def parse_arguments():
    parser = utils.Parser(
        "Computes mean and standard deviation of the training pictures' channels.",
        "get_mu_sigma.py",
    )
    parser.add_argument(
        "--shorter_side",
        type=utils.whole(1),
        metavar="S",
        help="read the resized copies of preprocess.py, not the originals",
    )
    return parser.parse()


def mu_sigma(pictures: Pictures, failures: Failures) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [3] each, RGB, pixels scaled to 0…1.

    E[x] and E[x²] are each picture's, exact from its histogram of integers, averaged over all
    pictures in their order: the same to the last bit on any number of cores.
    """

    def moments(path: str) -> np.ndarray | None:
        """E[x] and E[x²] of a picture, float64 [2, 3]."""
        try:
            with open_picture(pictures.folder / path) as image:
                histogram = as_rgb(image).histogram()
        except DECODING_ERRORS as error:
            failures.add(path, error)
            return None
        counts = np.array(histogram, np.int64).reshape(3, 256)
        levels = np.arange(256, dtype=np.int64)
        sums = np.stack([counts @ levels, counts @ levels**2])
        return sums / counts[0].sum()

    total, used = np.zeros((2, 3)), 0
    progress = utils.Progress(len(pictures), "pictures")
    for result in utils.map_in_order(moments, pictures.paths, utils.cores()):
        progress.add()
        if result is not None:
            total, used = total + result, used + 1
    if not used:
        raise UserError(f"{pictures.folder}: not one picture could be decoded")
    mean, mean_square = total / used
    return mean / 255, np.sqrt(mean_square - mean**2) / 255


def toml(mu: np.ndarray, sigma: np.ndarray) -> str:
    """The [utils] section of config.txt."""
    lines = [f"{name}_{i} = {v:.5f}" for name, vs in (("mu", mu), ("sigma", sigma))
             for i, v in enumerate(vs)]  # fmt: skip
    return "\n".join(["[utils]", *lines]) + "\n"


if __name__ == "__main__":
    utils.run(main)
