"""Makes resized copies of all training pictures, for machines that cannot feed their GPU otherwise.

    python3 preprocess.py --shorter_side=256

writes `<path_to_save>/256/<path of the original below the training folder>`: shorter side 256
pixels, aspect kept, JPEG. `--shorter_side=all` makes the 33 sides 256, 263, … 480, decoding each
original once. Started again, it goes on where it stopped. Nobody needs it: what is not there,
runtime_preprocessing.py takes from the originals; README says what it brings.
"""

import argparse
import errno
import io
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

import utils
from utils import SIDES, Pictures, UserError, plural

END_OF_IMAGE = b"\xff\xd9"
"""The last bytes of every JPEG."""

QUALITY = {"quality": 95, "subsampling": 0}
"""JPEG settings: a mean error of 1.1 levels of 256 on photographs (44 dB), which nobody sees.
Quality 90 with halved colour resolution would take 0.56 of the disk, at 1.9 levels (39 dB)."""


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    pictures = utils.training_pictures(config)
    root = config.preprocess.path_to_save
    check_source(root, pictures)
    utils.lock(
        root / utils.COPIES_OF,
        f"{root}: another preprocess.py adds to the copies there, or runtime_preprocessing.py "
        f"makes batches from them; wait for its end or take another path_to_save",
    )
    folders = {side: root / str(side) for side in args.shorter_side}
    jobs = missing(pictures, folders)
    total = sum(len(sides) for _, sides in jobs)
    print(
        f"{plural(len(pictures), 'training picture')}, {pictures.layout}; {total:,} of "
        f"{len(pictures) * len(folders):,} resized copies are still to be made"
    )
    failures = utils.Failures(len(pictures))
    if total:
        check_room(pictures, jobs, total, root)
        write_all(pictures, folders, jobs, total, failures)
    print(
        f"resized copies of {plural(len(pictures) - len(failures), 'picture')} in "
        f"{plural(len(folders), 'shorter side')} are in {root}; {failures}. "
        f"Next: runtime_preprocessing.py finds them there"
    )


def parse_arguments():
    parser = utils.Parser(
        "Makes resized copies of all training pictures.",
        "preprocess.py --shorter_side=256",
    )
    parser.add_argument(
        "--shorter_side",
        type=sides,
        required=True,
        metavar="S",
        help="shorter side in pixels, one of 256, 263, … 480, or all",
    )
    return parser.parse()


def sides(text: str) -> list[int]:
    """Argument type: one side, or "all"."""
    if text == "all":
        return list(SIDES)
    side = utils.whole(1)(text)
    if side not in SIDES:
        raise argparse.ArgumentTypeError(f"expected all or one of {', '.join(map(str, SIDES))}")
    return [side]


def check_source(root: Path, pictures: Pictures) -> None:
    """Notes in `root` which pictures its copies are of. Raises UserError if they are of others."""
    utils.make_folder(root)
    note = root / utils.COPIES_OF
    if utils.copies_of_others(root, pictures):
        others = utils.one_line(note.read_text(errors="replace"))
        raise UserError(
            f"{root} holds copies of pictures in {others}, not in {pictures.folder}; take another "
            f"path_to_save, or remove {note} if the pictures have only moved"
        )
    if not note.exists():
        utils.write_text(note, str(pictures.folder))


def missing(pictures: Pictures, folders: dict[int, Path]) -> list[tuple[int, tuple[int, ...]]]:
    """For each picture with copies still to be made: its index and their sides.

    Creates the folders, and removes what a killed process left half-written.
    """
    in_folder = defaultdict(list)
    for index, path in enumerate(pictures.paths):
        in_folder[os.path.dirname(path)].append(index)
    jobs, same = [], {}  # equal tuples are kept once: there may be millions
    for relative, indices in in_folder.items():
        done = {}
        for side, folder in folders.items():
            utils.make_folder(folder / relative)
            utils.remove_leftovers(folder / relative)
            done[side] = set(os.listdir(folder / relative))
        for index in indices:
            name = os.path.basename(pictures.paths[index])
            if wanted := tuple(side for side in folders if name not in done[side]):
                jobs.append((index, same.setdefault(wanted, wanted)))
    jobs.sort()
    return jobs


def resized_copies(path: Path, wanted: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """A picture, decoded once, at each of the shorter sides in turn.

    Raises one of utils.DECODING_ERRORS, before the first copy.
    """
    with utils.open_picture(path) as image:
        # Twice the pixels needed are enough to resize from; libjpeg halves while decoding.
        size = utils.resized_size(*image.size, 2 * max(wanted))
        original_size = image.size
        drafted = image.draft(image.mode, size)
        extent = drafted[1] if drafted else (0, 0, *image.size)
        picture = utils.as_rgb(image)

    def resized(side: int) -> Image.Image:
        size = utils.resized_size(*original_size, side)
        return picture.resize(size, Image.Resampling.BILINEAR, extent)

    return ((side, resized(side)) for side in wanted)


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Straight into the file: into memory, Pillow would compress one picture at a time.

    Raises OSError, also where Pillow overlooks that the disk took only a part.
    """
    with utils.written_aside(path) as aside, open(aside, "w+b") as file:
        image.save(file, "JPEG", **QUALITY)
        file.seek(-len(END_OF_IMAGE), os.SEEK_END)
        if file.read() != END_OF_IMAGE:
            raise OSError(errno.ENOSPC, "only a part could be written; is the disk full?")


def check_room(pictures: Pictures, jobs: list, total: int, folder: Path, samples: int = 16) -> None:
    """Says about how much disk the copies will take. Raises UserError if it is not there."""
    sizes = []
    for index, wanted in jobs[:: max(1, len(jobs) // samples)]:
        try:
            for _, image in resized_copies(pictures.folder / pictures.paths[index], wanted):
                copy = io.BytesIO()
                image.save(copy, "JPEG", **QUALITY)
                sizes.append(len(copy.getvalue()))
        except utils.DECODING_ERRORS:
            continue  # reported when its turn comes
    needed = total * sum(sizes) / max(len(sizes), 1)
    there = shutil.disk_usage(folder).free
    print(f"about {utils.file_size(needed)} needed in {folder}, {utils.file_size(there)} there")
    if needed > there:
        raise UserError(
            f"{folder}: the copies need about {utils.file_size(needed)}, but only "
            f"{utils.file_size(there)} are free"
        )


def write_all(pictures: Pictures, folders: dict, jobs: list, total: int, failures) -> None:
    """Makes the copies, each under its name only when it is whole."""

    def write(job: tuple[int, tuple[int, ...]]) -> int:
        index, wanted = job
        path = pictures.paths[index]
        try:
            copies = resized_copies(pictures.folder / path, wanted)
        except utils.DECODING_ERRORS as error:
            failures.add(path, error)
            return len(wanted)
        for side, image in copies:
            save_jpeg(image, folders[side] / path)
        return len(wanted)

    progress = utils.Progress(total, "copies")
    for count in utils.map_in_order(write, jobs, utils.cores()):
        progress.add(count)


if __name__ == "__main__":
    utils.run(main)
