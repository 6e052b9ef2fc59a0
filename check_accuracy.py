"""Evaluates the model of each epoch on ten crops a picture, while training goes on.

    python3 check_accuracy.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30

takes `saved_models/mytestrun/<epoch>/` one after the other, waiting where one is not there yet,
prints top-1 and top-5 of the average over ten crops and of the centre crop alone, adds them to
`accuracy.csv` in the run's folder (a restart skips what is done there), and draws `accuracy.png`
and `training.png` anew.
"""

import collections
import csv
import math
import time
from pathlib import Path

import utils
from utils import UserError

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess_val import Crops

with utils.quiet_tensorflow():
    import tensorflow as tf

    from resnet50 import load_model, warn_of_other_classes

COLUMNS = ["epoch", "top1_10crop", "top5_10crop", "top1_centre", "top5_centre", "pictures"]
CENTRE = 8
"""Index of the centre crop among the ten; the one after it is its mirror image."""

POLL_SECONDS = 5.0


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    run = config.train.path_for_saving / args.run_folder
    gpu = args.gpu or [1]
    found = utils.choose_gpus(gpu, required=args.gpu is not None)
    print(f"evaluating on {f'GPU {gpu[0]}' if found else 'the CPU'}")
    crops = Crops(config.preprocess.path_to_save / "val", config.preprocess.N)
    wait_for_run(run)
    utils.lock(run / ".check_accuracy.lock", f"{run}: another check_accuracy.py is at work on it")
    utils.remove_leftovers(run)
    table = run / "accuracy.csv"
    print(
        f"{utils.plural(len(crops), 'picture')} of {utils.plural(crops.classes, 'class')}, "
        f"results go to {table}"
    )
    if any(row["pictures"] != len(crops) for row in read_table(table)):
        utils.warn(f"{table}: rows made from other validation pictures are made anew")
    left_out = 0
    for epoch in range(args.epoch_start, args.epoch_end):
        rows = read_table(table)
        if epoch not in [row["epoch"] for row in rows if row["pictures"] == len(crops)]:
            wait_for(run / str(epoch))
            try:
                row = {"epoch": epoch, **evaluate(run / str(epoch), crops, args.pictures)}
            except UserError as error:
                utils.warn(f"{error}; going on to the next epoch")
                left_out += 1
                continue
            rows = [old for old in rows if old["epoch"] != epoch]  # of other pictures
            rows = sorted([*rows, row], key=lambda row: row["epoch"])
            write_table(table, rows)
            write_events(run, rows)
        row = next(row for row in rows if row["epoch"] == epoch)
        print(describe(row))
        draw_accuracy(rows, learning_rate_drops(run), run / "accuracy.png")
        draw_training(run / "training_log.csv", run / "training.png")
    print(f"the results are in {table}, drawn in {run / 'accuracy.png'}")
    if left_out:
        raise UserError(
            f"{utils.plural(left_out, 'epoch')} could not be evaluated; see the warnings above"
        )


def parse_arguments():
    parser = utils.Parser(
        "Evaluates the model of each epoch on ten crops a picture, while training runs.",
        "check_accuracy.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30",
    )
    parser.add_run()
    parser.add_epochs()
    parser.add_argument(
        "--gpu", type=utils.whole(0), metavar="I", help="GPU to use (default: 1, else the CPU)"
    )
    parser.add_argument(
        "--pictures",
        type=utils.whole(1),
        default=16,
        metavar="K",
        help="pictures evaluated at a time, ten crops each (default: 16)",
    )
    parser.add_argument("--verbose", action="store_true", help="show TensorFlow's own messages")
    args = parser.parse()
    args.gpu = None if args.gpu is None else [args.gpu]
    return args


def runs_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return f"{folder} has {', '.join(names)}" if names else f"{folder} has no runs yet"


def wait_for_run(run: Path, seconds: float = 30.0) -> None:
    """Gives train.py the time to start. Raises UserError if the run does not appear."""
    if not run.is_dir():
        print(f"waiting {seconds:.0f} seconds for {run}, in case train.py is just starting")
    end = time.monotonic() + seconds
    while not run.is_dir():
        if time.monotonic() > end:
            raise UserError(
                f"{run}: no such run; {runs_there(run.parent)}. Start train.py, or correct "
                f"--run_folder"
            )
        time.sleep(0.5)


def wait_for(folder: Path) -> None:
    """Returns when the folder is there, which it is only when complete."""
    if not folder.is_dir():
        print(f"waiting for {folder}")
    while not folder.is_dir():
        time.sleep(POLL_SECONDS)


# --- evaluation -----------------------------------------------------------------------------


def evaluate(folder: Path, crops: Crops, pictures: int) -> dict:
    """Accuracies of a saved model, each 0…1. Raises UserError for a model that cannot be used.

    The probabilities (softmax, not logits) of the ten crops are averaged.
    """
    classify, classes = load_model(folder)
    if crops.classes > classes:
        raise UserError(
            f"{folder}: a model of {classes} classes, but the validation pictures have "
            f"{crops.classes}"
        )
    warn_of_other_classes(folder, crops.names, str(crops.folder))
    ranks = {"10crop": [], "centre": []}
    progress = utils.Progress(len(crops), f"pictures, epoch {folder.name}")
    groups = np.array_split(crops.indices, math.ceil(len(crops) / pictures))
    for indices, images in zip(groups, utils.map_in_order(crops.load, groups, 1), strict=True):
        try:
            probabilities = classify(images=tf.constant(images))["probabilities"].numpy()
        except tf.errors.ResourceExhaustedError:
            raise UserError(
                f"not enough memory for {pictures} pictures at a time; take a smaller --pictures"
            ) from None
        probabilities = probabilities.reshape(len(indices), 10, classes)
        labels = crops.labels[indices]
        ranks["10crop"].append(rank(probabilities.mean(axis=1), labels))
        ranks["centre"].append(rank(probabilities[:, CENTRE], labels))
        progress.add(len(indices))
    result = {}
    for name, parts in ranks.items():
        all_ranks = np.concatenate(parts)
        result[f"top1_{name}"] = float(np.mean(all_ranks < 1))
        result[f"top5_{name}"] = float(np.mean(all_ranks < 5))
    return result | {"pictures": len(crops)}


def rank(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes are at least as probable as the right one, itself not counted: int64 [n].

    Ties count against the model: one that says the same for all classes is right never, not always.
    """
    right = np.take_along_axis(probabilities, labels[:, None], axis=1)
    return (~(probabilities < right)).sum(axis=1) - 1


def describe(row: dict) -> str:
    return (
        f"epoch {row['epoch']}: 10 crops top-1 {row['top1_10crop']:.2%}, "
        f"top-5 {row['top5_10crop']:.2%}; centre crop top-1 {row['top1_centre']:.2%}, "
        f"top-5 {row['top5_centre']:.2%}"
    )


def read_table(path: Path) -> list[dict]:
    """The rows of accuracy.csv, whole ones only."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)][1:]
    kinds = [int, float, float, float, float, int]
    try:
        return [
            {name: kind(cell) for name, kind, cell in zip(COLUMNS, kinds, row, strict=True)}
            for row in rows
        ]
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct it or remove it") from None


def write_table(path: Path, rows: list[dict]) -> None:
    with utils.written_aside(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()})


def write_events(run: Path, rows: list[dict]) -> None:
    """The accuracies for TensorBoard, against the epoch."""
    events = utils.EventFile(run / "events" / "accuracy")
    for row in rows:
        events.add(row["epoch"], {f"accuracy/{name}": row[name] for name in COLUMNS[1:5]})
    events.close()


# --- charts ---------------------------------------------------------------------------------

INK, FAINT, PAPER = (40, 44, 52), (222, 225, 230), (255, 255, 255)
BLUE, ORANGE, GREEN = (31, 99, 196), (222, 108, 21), (20, 134, 84)
OVERSAMPLING = 2
"""Charts are drawn larger and scaled down, which smooths the lines."""


class Chart:
    """Axes with ticks, and lines over them. Opaque white, so that it reads on dark screens too."""

    def __init__(self, title: str, x_range, y_range, percent: bool = False, right: int = 760):
        self.scale, self.size = OVERSAMPLING, (1000, 600)
        self.left, self.top, self.right, self.bottom = 90, 70, right, 530
        self.x_range, self.y_range = x_range, y_range
        self.image = Image.new("RGB", [n * self.scale for n in self.size], PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.legend_at = self.top
        self.text((self.left, 26), title, 22, "ls")
        self._axes(percent)

    def text(self, at, text: str, size: int, anchor: str, colour=INK) -> None:
        at = [n * self.scale for n in at]
        self.pen.text(at, text, colour, ImageFont.load_default(size * self.scale), anchor)

    def line(self, points, colour, width: float = 1, dash: int = 0) -> None:
        points = [(x * self.scale, y * self.scale) for x, y in points]
        width = round(width * self.scale)
        if dash:
            for start, end in _dashes(points, dash * self.scale):
                self.pen.line([start, end], colour, width)
        elif len(points) > 1:
            self.pen.line(points, colour, width, joint="curve")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies, in pixels."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        y = min(max(y, y0), y1)
        return (
            self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
            self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top),
        )

    def _axes(self, percent: bool) -> None:
        for value in ticks(*self.y_range):
            _, y = self.place(self.x_range[0], value)
            self.line([(self.left, y), (self.right, y)], FAINT)
            label = f"{value:.0%}" if percent else f"{value:g}"
            self.text((self.left - 12, y), label, 16, "rm")
        for value in ticks(*self.x_range, whole=True):
            x, _ = self.place(value, self.y_range[0])
            self.line([(x, self.bottom), (x, self.bottom + 6)], INK)
            self.text((x, self.bottom + 12), f"{value:g}", 16, "mt")
        self.line([(self.left, self.top), (self.left, self.bottom)], INK)
        self.line([(self.left, self.bottom), (self.right, self.bottom)], INK)
        self.text(((self.left + self.right) / 2, self.bottom + 42), "epoch", 18, "mt")

    def mark(self, x: float, label: str) -> None:
        """A dotted line across the chart."""
        at, _ = self.place(x, self.y_range[0])
        self.line([(at, self.top), (at, self.bottom)], (150, 155, 165), 1, dash=3)
        self.text((at, self.top - 6), label, 13, "mb", (110, 115, 125))

    def curve(self, xs, ys, colour, name: str, notes: list[str], dash: int = 0) -> None:
        """A line, with its name and notes in the legend beside the chart."""
        points = [self.place(x, y) for x, y in zip(xs, ys, strict=True)]
        self.line(points, colour, 2.5, dash)
        if len(points) <= 40:
            for x, y in points:
                box = [(x - 4) * self.scale, (y - 4) * self.scale,
                       (x + 4) * self.scale, (y + 4) * self.scale]  # fmt: skip
                self.pen.ellipse(box, PAPER if dash else colour, colour, 2 * self.scale)
        left = 782
        self.line([(left, self.legend_at + 9), (left + 30, self.legend_at + 9)], colour, 3, dash)
        self.text((left + 40, self.legend_at + 9), name, 17, "lm")
        for i, note in enumerate(notes):
            self.text((left + 40, self.legend_at + 33 + 20 * i), note, 15, "lm", (90, 95, 105))
        self.legend_at += 42 + 20 * len(notes)

    def save(self, path: Path) -> None:
        small = self.image.resize(self.size, Image.Resampling.BOX)
        with utils.written_aside(path) as aside:
            small.save(aside, format="PNG")


def _dashes(points: list, length: float):
    """Pieces of a line, every other one left out."""
    drawn = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        distance = math.hypot(x1 - x0, y1 - y0)
        at = 0.0
        while at < distance:
            step = min(length - drawn % length, distance - at)
            if int(drawn / length) % 2 == 0:
                a, b = at / distance, (at + step) / distance
                yield ((x0 + a * (x1 - x0), y0 + a * (y1 - y0)),
                       (x0 + b * (x1 - x0), y0 + b * (y1 - y0)))  # fmt: skip
            at, drawn = at + step, drawn + step + 1e-9


def ticks(low: float, high: float, whole: bool = False, most: int = 8) -> list[float]:
    """Round values from low to high, at most so many."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most or (whole and step < 1):
        step *= 2 if f"{step:e}"[0] in "15" else 2.5
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_accuracy(rows: list[dict], drops: list[float], path: Path) -> None:
    """Top-5 and top-1 against the epoch, of ten crops and of the centre crop."""
    epochs = [row["epoch"] for row in rows]
    x_range = (min(epochs), max(epochs)) if len(set(epochs)) > 1 else (epochs[0] - 1, epochs[0] + 1)
    chart = Chart(f"{path.parent.name}: validation accuracy", x_range, (0, 1), percent=True)
    for drop in drops:
        if x_range[0] <= drop <= x_range[1]:
            chart.mark(drop, "lower rate")
    curves = [
        ("top5_10crop", "top-5, 10 crops", BLUE, 0),
        ("top5_centre", "top-5, centre crop", BLUE, 5),
        ("top1_10crop", "top-1, 10 crops", ORANGE, 0),
        ("top1_centre", "top-1, centre crop", ORANGE, 5),
    ]
    for column, name, colour, dash in curves:
        values = [row[column] for row in rows]
        best = max(rows, key=lambda row, column=column: row[column])
        notes = [f"last {values[-1]:.2%}", f"best {best[column]:.2%} (epoch {best['epoch']})"]
        chart.curve(epochs, values, colour, name, notes, dash)
    chart.save(path)


def read_training_log(path: Path) -> dict[str, list[float]]:
    """The columns of training_log.csv; empty if there is none yet."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in map(numbers, csv.DictReader(file)) if row]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def numbers(row: dict) -> dict[str, float] | None:
    """A row of a csv file as numbers; None if it is cut off, or was edited."""
    try:
        return {name: float(value) for name, value in row.items()}
    except (TypeError, ValueError):
        return None


def learning_rate_drops(run: Path) -> list[float]:
    """Epochs at whose start a constant learning rate fell to a fifth or less, and stayed there."""
    log = read_training_log(run / "training_log.csv")
    steps = zip(log.get("epoch", []), log.get("learning_rate", []), strict=True)
    steps, rows = list(steps), collections.Counter(log.get("learning_rate", []))
    return [
        epoch - 0.5
        for (_, before), (epoch, after) in zip(steps, steps[1:], strict=False)
        if 0 < after <= before / 5 and min(rows[before], rows[after]) > 1
    ]


def draw_training(log_file: Path, path: Path, most: int = 300) -> None:
    """Loss and top-1 on training batches against the epoch, averaged to at most so many points."""
    log = read_training_log(log_file)
    if not log:
        return
    last_batch = max(log["batch"]) + 1
    log["epochs"] = [e + b / last_batch for e, b in zip(log["epoch"], log["batch"], strict=True)]
    groups = np.array_split(np.arange(len(log["epochs"])), min(len(log["epochs"]), most))
    log = {
        name: [float(np.mean(np.array(values)[group])) for group in groups]
        for name, values in log.items()
    }
    epochs, highest = log["epochs"], max(log["loss"])
    if len(set(epochs)) < 2:
        return
    first = 0 if epochs[0] < 1 else math.floor(epochs[0])
    x_range, y_range = (first, math.ceil(epochs[-1])), (0, highest * 1.05)
    chart = Chart(f"{path.parent.name}: training", x_range, y_range, right=725)
    for column, name, dash in (("loss", "loss", 0), ("loss_without_l2", "loss without L2", 5)):
        chart.curve(epochs, log[column], BLUE, name, [f"last {log[column][-1]:.3f}"], dash)
    notes = [f"last {log['top1'][-1]:.1%}"]
    chart.curve(epochs, [v * highest for v in log["top1"]], GREEN, "top-1 of batches", notes)
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):  # its own scale, at the right edge
        _, y = chart.place(epochs[0], share * highest)
        chart.text((chart.right + 44, y), f"{share:.0%}", 14, "rm", GREEN)
    chart.save(path)


if __name__ == "__main__":
    utils.run(main)
