"""Evaluates the model of each epoch on the validation pictures, while training goes on.

    python3 check_accuracy.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30

evaluates `saved_models/mytestrun/<epoch>/`, epoch by epoch, and waits for models that training has
yet to save. It prints top-1 and top-5, once averaged over ten crops and once for the centre crop
alone, and the centre crop's loss. It adds them to `accuracy.csv` in the run's folder, and redraws
`accuracy.png` and `training.png`. When started again, it skips epochs that are in the table.
"""

import argparse
import math
import os
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import utils
from utils import UserError, whole

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess_val import Crops

with utils.quiet_tensorflow():
    import tensorflow as tf

    from resnet50 import epochs_in, load_model, model_recipe, runs_in, warn_of_other_classes

ACCURACIES = ("top1_10crop", "top5_10crop", "top1_centre", "top5_centre")
COLUMNS = ("epoch", "step", *ACCURACIES, "loss_centre", "pictures", "crops", "model")
"""Columns of accuracy.csv. Accuracies are 0…1. With --crops=1 those of ten crops are empty. The
loss is the mean cross-entropy in nats. `crops` changes with the validation pictures or labels,
`model` when the epoch is trained again."""

LOCK = ".check_accuracy.lock"
TRAINER_LOCK = ".train.lock"
POLL_SECONDS = 2.0
SAY_AGAIN_SECONDS = 600.0


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    run = config.train.path_for_saving / args.run_folder
    print(f"evaluating on {open_device(args.gpu)}")
    crops = Crops(config.preprocess.path_to_save / "val", config.preprocess.N, args.crops)
    wait_for_run(run)
    utils.lock(run / LOCK, f"{run}: another check_accuracy.py is evaluating this run")
    (run / LOCK).write_text(str(args.every))  # --keep_last keeps what is still to be evaluated
    utils.remove_leftovers(run)
    table = run / "accuracy.csv"
    print(
        f"{utils.plural(len(crops), 'picture')} of {utils.plural(crops.classes, 'class')}, "
        f"{utils.plural(args.crops, 'crop')} each; results go to {table}"
    )
    left_out = 0
    for epoch in wanted_epochs(args):
        rows = read_table(table)
        if not (row := current_row(rows, run / str(epoch), crops)):
            exists = wait_for(run / str(epoch))
            if exists is None:
                break
            if exists is False:
                continue
            try:
                row = evaluate(run / str(epoch), crops, args.pictures)
            except UserError as error:
                utils.warn(f"{error}; going on to the next epoch")
                left_out += 1
                continue
            rows = sorted([*(r for r in rows if r.epoch != epoch), row], key=lambda r: r.epoch)
            utils.write_csv(table, COLUMNS, [vars(r) for r in rows])
            show(run, rows)
        print(describe(row))
    if rows := read_table(table):
        show(run, rows)
        print(f"the results are in {table}")
    if left_out:
        raise UserError(
            f"{utils.plural(left_out, 'epoch')} could not be evaluated; see the warnings above"
        )


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Evaluates each epoch's model on the validation pictures while training runs.",
        "check_accuracy.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30",
    )
    parser.add_run()
    parser.add_epochs()
    parser.add("--crops", crop_count, "10, or 1: only the centre crop, a tenth of the work", 10)
    parser.add("--every", whole(1), "evaluate every K-th epoch and the last (default: 1)", 1)
    parser.add("--gpu", whole(0), "GPU to use (default: 1, else the CPU)")
    parser.add("--pictures", whole(1), "pictures evaluated at a time (default: 16)", 16)
    parser.add("--verbose", None, "show TensorFlow's own messages")  # see utils.quiet_tensorflow
    return parser.parse()


def crop_count(text: str) -> int:
    """Argument type: 1 or 10."""
    if text not in ("1", "10"):
        raise argparse.ArgumentTypeError(f"expected 1 or 10, not {text!r}")
    return int(text)


def wanted_epochs(args: argparse.Namespace) -> list[int]:
    last = args.epoch_end - 1
    return [e for e in range(args.epoch_start, last + 1) if (e + 1) % args.every == 0 or e == last]


def open_device(gpu: int | None) -> str:
    """Uses the GPU asked for, else GPU 1, else the CPU. Raises UserError if the GPU asked for does
    not exist.
    """
    if utils.choose_gpus([1 if gpu is None else gpu], required=gpu is not None):
        return f"GPU {1 if gpu is None else gpu}"
    os.nice(10)  # training and its preprocessor come first
    return "the CPU, at low priority"


# --- waiting --------------------------------------------------------------------------------


def wait_for_run(run: Path, seconds: float = 30.0) -> None:
    """Waits for train.py to start. Raises UserError if the run's folder does not appear."""
    if not run.is_dir():
        print(f"waiting {seconds:.0f} seconds for {run}, in case train.py is just starting")
    end = time.monotonic() + seconds
    while not run.is_dir():
        if time.monotonic() > end:
            raise UserError(
                f"{run}: no such run; {run.parent} has {runs_in(run.parent)}. Start train.py, or "
                f"correct --run_folder"
            )
        time.sleep(0.5)


def wait_for(folder: Path) -> bool | None:
    """Waits for a model and says so. A model's folder is complete as soon as it exists.

    Returns True when it exists, False if only later ones do, and None if training has ended without
    it, after the last epoch that it was asked for.
    """
    said, say_again = None, 0.0
    while not os.path.isdir(folder):  # False if the storage fails for a moment
        training = utils.is_locked(folder.parent / TRAINER_LOCK)
        if is_passed(folder):
            print(f"{folder} does not exist, but later ones do; epoch {folder.name} is left out")
            return False
        if not training and not os.path.isdir(folder) and has_ended_before(folder):
            print(f"training ended before epoch {folder.name}; there will be no more models")
            return None
        if training != said or time.monotonic() > say_again:
            work = "train.py is training this run" if training else "no train.py is running for it"
            print(f"waiting for {folder}; {work}")
            said, say_again = training, time.monotonic() + SAY_AGAIN_SECONDS
        time.sleep(POLL_SECONDS)
    return True


def is_passed(folder: Path) -> bool:
    """Whether a model does not exist, but a later one does. So it was removed (--keep_last)."""
    epochs, number = epochs_in(folder.parent), int(folder.name)
    return number not in epochs and max(epochs, default=-1) > number


def has_ended_before(folder: Path) -> bool:
    """Whether training has saved the last epoch it was asked for, and this model is later."""
    last = max(epochs_in(folder.parent), default=-1)
    wanted = model_recipe(folder.parent / str(last)).get("epoch_end")
    return wanted is not None and wanted <= last + 1 <= int(folder.name)


# --- evaluation -----------------------------------------------------------------------------


def evaluate(folder: Path, crops: Crops, pictures: int) -> SimpleNamespace:
    """Evaluates a saved model. Raises UserError if it cannot be used.

    Averages the probabilities of the ten crops, not their logits.
    """
    model, step = fingerprint(folder), model_recipe(folder).get("step")
    classify, classes = load_model(folder)
    if crops.classes > classes:
        raise UserError(
            f"{folder}: a model of {classes} classes, but the validation pictures have "
            f"{crops.classes}"
        )
    warn_of_other_classes(folder, crops.names, str(crops.folder))
    progress = utils.Progress(len(crops), f"pictures, epoch {folder.name}")
    results = []
    groups = np.array_split(crops.indices, math.ceil(len(crops) / pictures))
    for indices, images in zip(groups, utils.map_in_order(crops.load, groups, 1), strict=True):
        try:
            probabilities = classify(images=tf.constant(images))["probabilities"].numpy()
        except tf.errors.ResourceExhaustedError:
            raise UserError(
                f"not enough memory for {pictures} pictures at a time; use a smaller --pictures"
            ) from None
        except tf.errors.OpError as error:
            raise UserError(f"{folder}: cannot be evaluated: {error.message}") from None
        probabilities = probabilities.reshape(len(indices), crops.count, classes)
        labels, centre = crops.labels[indices], probabilities[:, crops.centre]
        average_rank, centre_rank = rank(probabilities.mean(axis=1), labels), rank(centre, labels)
        losses = -np.log(np.maximum(centre[np.arange(len(labels)), labels], 1e-12))
        hits = (average_rank < 1, average_rank < 5, centre_rank < 1, centre_rank < 5)
        results.append([*hits, losses])
        progress.add(len(indices))
    *accuracies, loss = np.concatenate(results, axis=1).mean(axis=1, dtype=np.float64).tolist()
    if crops.count == 1:
        accuracies[:2] = None, None
    return SimpleNamespace(
        epoch=int(folder.name),
        step=step,
        **dict(zip(ACCURACIES, accuracies, strict=True)),
        loss_centre=loss,
        pictures=len(crops),
        crops=crops.fingerprint,
        model=model,
    )


def rank(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many other classes are at least as probable as the right one: int64 [n].

    Ties count against the model: if all classes have the same probability, it is always wrong.
    """
    right = np.take_along_axis(probabilities, labels[:, None], axis=1)
    return (~(probabilities < right)).sum(axis=1) - 1


def fingerprint(folder: Path) -> str:
    """A text that changes when the epoch is trained again."""
    if known := model_recipe(folder).get("fingerprint"):
        return known
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size) for path in files]
    newest = max((path.stat().st_mtime_ns for path in files), default=0)
    return f"{zlib.crc32(repr((facts, newest)).encode()):08x}"


# --- the table ------------------------------------------------------------------------------


def current_row(rows: list[SimpleNamespace], folder: Path, crops: Crops) -> SimpleNamespace | None:
    """The row of a model, if it need not or cannot be evaluated again."""
    for row in (row for row in rows if row.epoch == int(folder.name)):
        enough = crops.count == 1 or row.top1_10crop is not None
        same_crops = enough and row.crops == crops.fingerprint
        training = utils.is_locked(folder.parent / TRAINER_LOCK)
        exists = os.path.isdir(folder)
        if is_passed(folder) or not (training or exists):
            if not same_crops:
                print(f"epoch {folder.name} keeps its row of other crops: its model is gone")
            return row
        if same_crops and exists and row.model == fingerprint(folder):
            return row
        print(f"epoch {folder.name} is evaluated again: other pictures, crops or weights")
    return None


def read_table(path: Path) -> list[SimpleNamespace]:
    """The rows of accuracy.csv; an empty cell is None. Raises UserError for a broken number."""
    kinds = {"epoch": int, "step": int, "pictures": int, "crops": str, "model": str}
    rows = []
    for row in utils.read_csv(path, COLUMNS):
        try:
            values = [kinds.get(name, float)(row[name]) if row[name] else None for name in COLUMNS]
        except ValueError as error:
            raise UserError(f"{path}: {error}; correct it or remove it") from None
        rows.append(SimpleNamespace(**dict(zip(COLUMNS, values, strict=True))))
    return rows


def describe(row: SimpleNamespace) -> str:
    ten = ""
    if row.top1_10crop is not None:
        ten = f"10 crops top-1 {row.top1_10crop:.2%}, top-5 {row.top5_10crop:.2%}; "
    return (
        f"epoch {row.epoch}: {ten}centre crop top-1 {row.top1_centre:.2%}, "
        f"top-5 {row.top5_centre:.2%}, loss {row.loss_centre:.3f}"
    )


def show(run: Path, rows: list[SimpleNamespace]) -> None:
    """Draws the charts by epoch, and writes the TensorBoard events by training step."""
    try:
        log = read_training_log(run / "training_log.csv")
        draw_accuracy(rows, learning_rate_drops(log), run / "accuracy.png")
        draw_training(log, rows, run / "training.png")
        write_events(run, rows)
    except (UserError, OSError, tf.errors.OpError) as error:
        utils.warn(f"{run}: charts or events could not be written: {error}")


def write_events(run: Path, rows: list[SimpleNamespace]) -> None:
    events = utils.new_event_file(run / "events" / "accuracy")
    for row in rows:
        step = row.epoch if row.step is None else row.step
        values = {name: getattr(row, name) for name in (*ACCURACIES, "loss_centre")}
        scalars = {f"accuracy/{name}": value for name, value in values.items() if value is not None}
        events.write(utils.event(step, scalars))
    events.close()


# --- charts ---------------------------------------------------------------------------------

INK, GREY, FAINT = (40, 44, 52), (110, 115, 125), (222, 225, 230)
BLUE, LIGHT_BLUE = (31, 99, 196), (140, 178, 232)
ORANGE, LIGHT_ORANGE = (222, 108, 21), (246, 181, 128)
GREEN = (20, 134, 84)


class Chart:
    """Axes with ticks and curves. The background is opaque white, so dark screens show it too.

    It is drawn at twice its size and scaled down, which smooths the lines.
    """

    left, top, bottom = 180, 140, 1060

    def __init__(self, title: str, x_range: tuple, y_range: tuple, percent: bool = False):
        self.x_range, self.y_range, self.right = x_range, y_range, 1460
        self.image = Image.new("RGB", (2000, 1200), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.legend_at = self.top
        self.text((self.left, 52), title, 44, "ls")
        for value in ticks(*y_range):
            _, y = self.place(x_range[0], value)
            self.pen.line([self.left, y, self.right, y], FAINT, 2)
            self.text((self.left - 24, y), f"{value:.0%}" if percent else f"{value:g}", 32, "rm")
        for value in ticks(*x_range, whole=True):
            x, _ = self.place(value, y_range[0])
            self.pen.line([x, self.bottom, x, self.bottom + 12], INK, 2)
            self.text((x, self.bottom + 24), f"{value:g}", 32, "mt")
        corners = [self.left, self.top, self.left, self.bottom, self.right, self.bottom]
        self.pen.line(corners, INK, 2)
        self.text(((self.left + self.right) / 2, self.bottom + 84), "epoch", 36, "mt")

    def text(self, at: tuple, text: str, size: int, anchor: str, colour: tuple = INK) -> None:
        """`anchor` as in Pillow: "ls" puts the left end of the text's base line `at` the pixel."""
        self.pen.text(at, text, colour, ImageFont.load_default(size), anchor)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point, before scaling."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        y = min(max(y, y0), y1)
        return (
            self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
            self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top),
        )

    def mark(self, x: float, label: str) -> None:
        """A thin vertical line with a label on top."""
        at, _ = self.place(x, self.y_range[0])
        self.pen.line([at, self.top, at, self.bottom], GREY, 1)
        self.text((at, self.top - 12), label, 26, "mb", GREY)

    def curve(self, points: list[tuple], colour: tuple, name: str, notes: list[str]) -> None:
        """A line through (x, y) points, with its name and notes in the legend beside the chart."""
        places = [self.place(x, y) for x, y in points]
        self.pen.line(places, colour, 5, joint="curve")
        if len(places) <= 40:
            for x, y in places:
                self.pen.ellipse([x - 8, y - 8, x + 8, y + 8], colour)
        at = self.legend_at + 18
        self.pen.line([1564, at, 1624, at], colour, 6)
        self.text((1644, at), name, 34, "lm")
        for line, note in enumerate(notes, 1):
            self.text((1644, at + 8 + 40 * line), note, 30, "lm", GREY)
        self.legend_at += 84 + 40 * len(notes)

    def save(self, path: Path) -> None:
        with utils.written_aside(path) as aside:
            self.image.resize((1000, 600), Image.Resampling.BOX).save(aside, format="PNG")


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round values from low to high, at most nine."""
    step = 10.0 ** math.floor(math.log10((high - low) / 8))
    while (high - low) / step > 8 or (whole and step < 1):
        step *= 2 if f"{step:e}"[0] in "15" else 2.5
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_accuracy(rows: list[SimpleNamespace], drops: list[float], path: Path) -> None:
    """Top-5 and top-1 of ten crops and of the centre crop, by epoch."""
    first, last = rows[0].epoch, rows[-1].epoch
    x_range = (first, last) if first < last else (first - 1, first + 1)
    chart = Chart(f"{path.parent.name}: validation accuracy", x_range, (0, 1), percent=True)
    for drop in drops:
        if first <= drop <= last:
            chart.mark(drop, "lower rate")
    for column, name, colour in (
        ("top5_centre", "top-5, centre crop", LIGHT_BLUE),
        ("top5_10crop", "top-5, 10 crops", BLUE),
        ("top1_centre", "top-1, centre crop", LIGHT_ORANGE),
        ("top1_10crop", "top-1, 10 crops", ORANGE),
    ):
        points = [(r.epoch, getattr(r, column)) for r in rows if getattr(r, column) is not None]
        if points:
            best, value = max(points, key=lambda point: point[1])
            notes = [f"last {points[-1][1]:.2%}", f"best {value:.2%} (epoch {best})"]
            chart.curve(points, colour, name, notes)
    chart.save(path)


def read_training_log(path: Path) -> list[SimpleNamespace]:
    """The columns of training_log.csv that the charts need. Skips rows with broken numbers."""
    names = ("epoch", "batch", "loss", "loss_without_l2", "top1", "learning_rate")
    rows = []
    for row in utils.read_csv(path, names):
        try:
            rows.append(SimpleNamespace(**{name: float(row[name]) for name in names}))
        except ValueError:
            continue
    return rows


def learning_rate_drops(log: list[SimpleNamespace]) -> list[float]:
    """Where a constant learning rate fell to a fifth or less and stayed there, in epochs."""
    rates = [row.learning_rate for row in log]
    return [
        row.epoch - 0.5
        for before, row in zip(rates, log[1:], strict=False)
        if 0 < row.learning_rate <= before / 5
        and min(rates.count(before), rates.count(row.learning_rate)) > 1
    ]


def draw_training(
    log: list[SimpleNamespace], rows: list[SimpleNamespace], path: Path, most: int = 300
) -> None:
    """Loss and top-1 of training batches, and the validation loss, by epoch. The training curves
    are averaged to at most `most` points. Top-1 has its own scale on the right.
    """
    batches = max((row.batch for row in log), default=0) + 1
    table = [(r.epoch + r.batch / batches, r.loss, r.loss_without_l2, r.top1) for r in log]
    if len({row[0] for row in table}) < 2:
        return
    groups = np.array_split(np.array(table), min(len(table), most))
    epochs, loss, plain, top1 = np.array([group.mean(axis=0) for group in groups]).T
    # The model of epoch e is saved at the end of the epoch.
    checked = [(row.epoch + 1, row.loss_centre) for row in rows if epochs[0] <= row.epoch + 1]
    first, last = math.floor(epochs[0]), max(math.ceil(epochs[-1]), *(x for x, _ in checked), 0)
    highest = max(loss.max(), *(y for _, y in checked), 0)
    chart = Chart(f"{path.parent.name}: training", (first, last), (0, highest * 1.05))
    for values, name, colour in ((loss, "loss", BLUE), (plain, "loss without L2", LIGHT_BLUE)):
        points = list(zip(epochs, values, strict=True))
        chart.curve(points, colour, name, [f"last {values[-1]:.3f}"])
    if checked:
        chart.curve(checked, ORANGE, "validation loss", [f"last {checked[-1][1]:.3f}"])
    points = list(zip(epochs, top1 * highest, strict=True))
    chart.curve(points, GREEN, "top-1 of batches", [f"last {top1[-1]:.1%}"])
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        _, y = chart.place(first, share * highest)
        chart.text((chart.right + 84, y), f"{share:.0%}", 28, "rm", GREEN)
    chart.save(path)


if __name__ == "__main__":
    utils.run(main)
