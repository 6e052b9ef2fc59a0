"""Evaluates the model of each epoch on the validation pictures, while training goes on.

    python3 check_accuracy.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30

evaluates `saved_models/mytestrun/<epoch>/`, epoch by epoch, and waits for models that training has
yet to save. It prints top-1 and top-5, once averaged over ten crops and once for the centre crop
alone, and the centre crop's loss. When started again, it skips the epochs that it has evaluated.
After each epoch it writes into the run's folder:

    accuracy.csv    a row per epoch
    accuracy.png    top-1 and top-5 by epoch, beside the top-1 of training batches
    training.png    the loss of training batches, and the validation loss
    classes.csv     how often each class is recognised, and what it is most often taken for
    mistakes.png    the most confident wrong answers
    events/         the accuracies, for TensorBoard

Sections: waiting for models, evaluation, the results, where the model errs, charts.
"""

import os.path
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I leaves it out

import utils  # first: it says which package is missing
from utils import UserError, plural, whole

# isort: split
import argparse
import contextlib
import enum
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess_val import Crops
from runtime_preprocessing import contact_sheet

with utils.quiet_tensorflow():
    import tensorflow as tf

    import resnet50
    from resnet50 import epochs_in, model_recipe

POLL_SECONDS = 2.0


def main() -> None:
    args = parse_arguments()
    config = utils.load_config(args.config)
    run = config.train.path_for_saving / args.run_folder
    if args.gpu is not None:
        open_device(args.gpu, run)
    crops = Crops(config.preprocess.path_to_save / "val", config.preprocess.N, int(args.crops))
    wait_for_run(run)
    lock = run / resnet50.CHECKER_LOCK
    utils.lock(lock, f"{run}: another check_accuracy.py is evaluating this run")
    epochs = epochs_wanted(args.epoch_start, args.epoch_end, args.every)
    resnet50.write_lock_note(lock, resnet50.LockNote(epochs=epochs))
    utils.remove_leftovers(run, resnet50.ACCURACY, CLASSES, "*.png")
    results, failed = Results(run, crops), 0
    print(
        f"{plural(len(crops), 'picture')} of {plural(crops.classes, 'class')}, "
        f"{plural(crops.count, 'crop')} each; results go to {results.table}"
    )
    if results.rows:
        results.draw()
    for epoch in epochs:
        if not results.is_done(epoch, args.epoch_end):
            if not wait_for(run, epoch, args.epoch_end):
                continue
            open_device(args.gpu, run)
            try:
                results.add(*evaluate(run / str(epoch), crops, args.pictures))
            except UserError as error:
                utils.warn(f"{error}; going on to the next epoch")
                failed += 1
                continue
        print(describe(results.rows[epoch]))
    if failed:
        raise UserError(f"{plural(failed, 'epoch')} could not be evaluated; see the warnings above")


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        "Evaluates each epoch's model on the validation pictures while training runs.",
        "check_accuracy.py --run_folder=mytestrun --epoch_start=0 --epoch_end=30",
    )
    parser.add("--run_folder", resnet50.run_name, "name of the run", utils.REQUIRED)
    parser.add_epochs()
    crops = "10, or 1: only the centre crop, a tenth of the work"
    parser.add("--crops", ("10", "1"), crops, "10")
    parser.add("--every", whole(1), "evaluate every N-th epoch and the last (default: 1)", 1)
    gpu = "GPU to use (default: GPU 1 unless training uses it, else the CPU)"
    parser.add("--gpu", whole(0), gpu)
    parser.add("--pictures", whole(1), "pictures evaluated at a time (default: 16)", 16)
    parser.add("--verbose", None, "show TensorFlow's own messages")  # see utils.quiet_tensorflow
    return parser.parse()


def epochs_wanted(start: int, end: int, every: int) -> list[int]:
    """The last of every `every` epochs, and the last of all. No run has a million epochs: see
    `resnet50.epochs_in`.
    """
    epochs = range(start, min(end, 10**6))
    return [epoch for epoch in epochs if (epoch + 1) % every == 0 or epoch == end - 1]


@functools.cache  # TensorFlow's devices can be chosen only once
def open_device(gpu: int | None, run: Path) -> None:
    """Uses the GPU asked for. Without one, uses GPU 1, or the CPU if there is no GPU 1 or training
    uses it, as train.py's lock tells. So without --gpu, call it only once a model is there.

    Raises UserError if the GPU asked for does not exist.
    """
    wanted = [1 if gpu is None else gpu]
    if gpu is None and 1 in resnet50.read_lock_note(run / resnet50.RUN_LOCK).gpus:
        wanted = []
    if utils.choose_gpus(wanted, required=gpu is not None):
        print(f"evaluating on GPU {wanted[0]}")
    else:
        os.nice(10)  # training and its preprocessor come first
        print("evaluating on the CPU, at low priority")


# --- waiting for models -----------------------------------------------------------------------


class Model(enum.Enum):
    """What is known of an epoch's model."""

    SAVED = "it is there"
    REMOVED = "only later ones are there"  # by --keep_last, say
    TRAINING = "train.py is training this run"
    IDLE = "no train.py is running for it"


def state_of(run: Path, epoch: int, end: int) -> Model:
    """Looks at epochs before `end`. A backup, say, may have any other number for a name."""
    training = utils.is_locked(run / resnet50.RUN_LOCK)  # first: it may end now
    epochs = [e for e in epochs_in(run) if e < end]
    if epoch in epochs:
        return Model.SAVED
    if epochs and epochs[-1] > epoch:
        return Model.REMOVED
    return Model.TRAINING if training else Model.IDLE


def wait_for(run: Path, epoch: int, end: int) -> bool:
    """Waits for a model and says so. Returns whether it is there: it may have been removed."""
    said, model = None, run / str(epoch)
    while (state := state_of(run, epoch, end)) in (Model.TRAINING, Model.IDLE):
        if state is not said:
            print(f"waiting for {model}; {state.value}")
            said = state
        time.sleep(POLL_SECONDS)
    if state is Model.REMOVED:
        print(f"{model} does not exist, but later ones do; epoch {epoch} is left out")
    return state is Model.SAVED


def wait_for_run(run: Path, seconds: float = 30.0) -> None:
    """Waits for train.py to start. Raises UserError if the run's folder does not appear."""
    if not run.is_dir():
        print(f"waiting {seconds:.0f} seconds for {run}, in case train.py is just starting")
    end = time.monotonic() + seconds
    while not run.is_dir():
        if time.monotonic() > end:
            raise UserError(
                f"{run}: no such run; {run.parent} has {resnet50.runs_in(run.parent)}. Start "
                f"train.py, or correct --run_folder"
            )
        time.sleep(0.5)


# --- evaluation -------------------------------------------------------------------------------


def evaluate(model: Path, crops: Crops, pictures: int) -> tuple[dict, SimpleNamespace]:
    """Evaluates a saved model, `pictures` at a time. Returns the row of accuracy.csv, and
    what `ask` returns. Raises UserError if the model cannot be used.
    """
    classify, recipe = resnet50.load_model(model)
    if crops.classes > (classes := len(recipe.class_names)):
        raise UserError(
            f"{model}: a model of {plural(classes, 'class')}, but the validation pictures have "
            f"{crops.classes:,}"
        )
    resnet50.warn_of_other_classes(model, crops.names, str(crops.folder))
    answers = ask(classify, crops, pictures, model)
    ten = crops.count == 10
    row = {
        "epoch": int(model.name),
        "step": recipe.step,
        "top1_10crop": np.mean(answers.rank < 1) if ten else None,
        "top5_10crop": np.mean(answers.rank < 5) if ten else None,
        "top1_centre": np.mean(answers.centre_rank < 1),
        "top5_centre": np.mean(answers.centre_rank < 5),
        "loss_centre": np.mean(answers.loss, dtype=np.float64),
        "pictures": len(crops),
        "crops": crops.fingerprint,
        "model": recipe.fingerprint,
    }
    return row, answers


def ask(classify: Callable, crops: Crops, pictures: int, model: Path) -> SimpleNamespace:
    """What a model answers to each picture, as arrays of [pictures]; see `judge`."""
    progress = utils.Progress(len(crops), f"pictures, epoch {model.name}")
    groups, parts = np.array_split(crops.indices, math.ceil(len(crops) / pictures)), []
    for indices, images in zip(groups, utils.map_in_order(crops.load, groups, 1), strict=True):
        try:
            probabilities = classify(images=tf.constant(images))["probabilities"].numpy()
        except tf.errors.ResourceExhaustedError:
            raise UserError(
                f"not enough memory for {pictures} pictures at a time; use a smaller --pictures"
            ) from None
        except tf.errors.OpError as error:
            raise UserError(f"{model}: cannot be evaluated: {error.message}") from None
        probabilities = probabilities.reshape(len(indices), crops.count, -1)
        parts.append(judge(probabilities, crops.labels[indices], crops.centre))
        progress.add(len(indices))
    return SimpleNamespace(**{key: np.concatenate([p[key] for p in parts]) for key in parts[0]})


def judge(probabilities: np.ndarray, labels: np.ndarray, centre: int) -> dict[str, np.ndarray]:
    """`probabilities`: float32 [n, crops, classes]. The probabilities of the crops are averaged,
    not their logits. Returns arrays of [n]: the label, the most probable class (`guess`) and its
    probability, the right class's `rank`, and its rank and loss in the centre crop alone.
    """
    average, alone = probabilities.mean(axis=1), probabilities[:, centre]
    right = alone[np.arange(len(labels)), labels]
    return {
        "label": labels,
        "guess": average.argmax(axis=1),
        "probability": average.max(axis=1),
        "rank": rank(average, labels),
        "centre_rank": rank(alone, labels),
        "loss": -np.log(np.where(right > 1e-12, right, 1e-12)),
    }


def rank(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many other classes are at least as probable as the right one: int64 [n].

    Ties count against the model: if all classes have the same probability, it is always wrong.
    """
    right = np.take_along_axis(probabilities, labels[:, None], axis=1)
    return (~(probabilities < right)).sum(axis=1) - 1


# --- the results ------------------------------------------------------------------------------


class Results:
    """accuracy.csv of a run, and what is drawn and written after each epoch."""

    def __init__(self, run: Path, crops: Crops):
        self.run, self.crops, self.table = run, crops, run / resnet50.ACCURACY
        if self.table.is_dir():
            raise UserError(f"{self.table}: is a folder; move it away")
        rows = utils.read_csv(self.table, resnet50.ACCURACY_COLUMNS)
        self.rows = {row["epoch"]: row for row in rows}

    def is_done(self, epoch: int, end: int) -> bool:
        """Whether an epoch has a row, and its model need not or cannot be evaluated again."""
        if epoch not in self.rows:
            return False
        row, model = self.rows[epoch], self.run / str(epoch)
        state = state_of(self.run, epoch, end)
        enough = self.crops.count == 1 or row["top1_10crop"] is not None
        same_crops = enough and row["crops"] == self.crops.fingerprint
        if state in (Model.REMOVED, Model.IDLE):
            if not same_crops:
                print(f"epoch {epoch} keeps its row of other crops: its model is gone")
            return True
        if state is Model.SAVED and same_crops:
            with contextlib.suppress(UserError):  # evaluating a broken model says why
                if row["model"] == model_recipe(model).fingerprint:
                    return True
        print(f"epoch {epoch} is evaluated again: other pictures, crops or weights")
        return False

    def add(self, row: dict, answers: SimpleNamespace) -> None:
        """Writes the table and draws the charts; of the newest epoch also where it errs."""
        self.rows = dict(sorted((self.rows | {row["epoch"]: row}).items()))
        utils.write_csv(self.table, resnet50.ACCURACY_COLUMNS, self.rows.values())
        self.draw(answers if row["epoch"] == max(self.rows) else None)

    def draw(self, answers: SimpleNamespace | None = None) -> None:
        """Writes all that follows from the table, and from the newest epoch's answers."""
        rows, run = list(self.rows.values()), self.run
        jobs = [lambda: draw_charts(run, rows, self.crops.classes), self.write_events]
        if answers:
            title = f"{run.name}, epoch {max(self.rows)}"
            jobs += [
                lambda: write_classes(answers, self.crops.names, run / CLASSES),
                lambda: draw_mistakes(answers, self.crops, title, run / MISTAKES),
            ]
        for write in jobs:
            try:
                write()
            except (UserError, OSError, tf.errors.OpError) as error:
                utils.warn(f"{self.run}: a chart, table or event could not be written: {error}")

    def write_events(self) -> None:
        """Writes all rows, by training step, into a new file of events. Readers take the step 0
        for a restart, and forget what they have read before.
        """
        events = utils.Events(self.run / "events" / "accuracy", first_step=0)
        for epoch, row in self.rows.items():
            step = epoch if row["step"] is None else row["step"]
            names = [name for name in SCALARS if row[name] is not None]
            events.add(step, {f"accuracy/{name}": row[name] for name in names})
        events.close()


SCALARS = ("top1_10crop", "top5_10crop", "top1_centre", "top5_centre", "loss_centre")


def describe(row: dict) -> str:
    ten = ""
    if row["top1_10crop"] is not None:
        ten = f"10 crops top-1 {row['top1_10crop']:.2%}, top-5 {row['top5_10crop']:.2%}; "
    return (
        f"epoch {row['epoch']}: {ten}centre crop top-1 {row['top1_centre']:.2%}, "
        f"top-5 {row['top5_centre']:.2%}, loss {row['loss_centre']:.3f}"
    )


# --- where the model errs ---------------------------------------------------------------------

CLASSES, MISTAKES = "classes.csv", "mistakes.png"
CLASS_COLUMNS = ("label", "name", "pictures", "top1", "top5", "taken_for", "times")


def write_classes(answers: SimpleNamespace, names: list[str], path: Path) -> None:
    """A row per class: how many of its pictures are recognised, and the class that most of the
    others are taken for.
    """
    rows = []
    for label, name in enumerate(names):
        its = answers.label == label
        row = {"label": label, "name": utils.printable(name), "pictures": int(its.sum())}
        if its.any():
            row |= {"top1": np.mean(answers.rank[its] < 1), "top5": np.mean(answers.rank[its] < 5)}
        if len(wrong := answers.guess[its & (answers.guess != label)]):
            times = np.bincount(wrong)
            row |= {"taken_for": name_of(times.argmax(), names), "times": int(times.max())}
        rows.append(row)
    utils.write_csv(path, CLASS_COLUMNS, rows)


def name_of(label: int, names: list[str]) -> str:
    """The model may have more classes than the validation set."""
    return utils.printable(names[label]) if label < len(names) else f"class {label}"


def draw_mistakes(
    answers: SimpleNamespace, crops: Crops, model: str, path: Path, most: int = 20
) -> None:
    """A contact sheet of the wrong answers that the model is most sure of."""
    wrong = np.flatnonzero(answers.guess != answers.label)
    shown = wrong[np.argsort(-answers.probability[wrong], kind="stable")[:most]]
    pictures = crops.load(crops.indices[shown])[crops.centre :: crops.count]
    captions = [
        [
            name_of(answers.label[i], crops.names),
            f"{answers.probability[i]:.0%} {name_of(answers.guess[i], crops.names)}",
        ]
        for i in shown
    ]
    title = (
        f"{model}: {len(wrong):,} of {plural(len(crops), 'answer')} are wrong. "
        f"The {len(shown)} that it is most sure of: the right class, and the answer below it"
    )
    sheet = contact_sheet(pictures, captions, title, columns=5)
    with utils.written_aside(path) as file:
        sheet.save(file, format="PNG")


# --- charts -----------------------------------------------------------------------------------

INK, GREY, FAINT = (40, 44, 52), (110, 115, 125), (222, 225, 230)
BLUE, LIGHT_BLUE = (31, 99, 196), (140, 178, 232)
ORANGE, LIGHT_ORANGE = (222, 108, 21), (246, 181, 128)
GREEN = (20, 134, 84)


class Chart:
    """Axes with ticks and curves. The background is opaque white, so dark screens show it too.

    It is drawn at twice its size and scaled down, which smooths the lines.
    """

    left, right, top, bottom = 180, 1460, 140, 1060

    def __init__(self, title: str, x_range: tuple, y_range: tuple, percent: bool = False):
        self.x_range, self.y_range = x_range, y_range
        self.image = Image.new("RGB", (2000, 1200), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.legend_at = self.top
        self.text((self.left, 52), title, 44, "ls")
        for value in ticks(*y_range):
            _, y = self.place(x_range[0], value)
            self.pen.line([self.left, y, self.right, y], FAINT, 2)
            self.text((self.left - 24, y), f"{value:.0%}" if percent else f"{value:g}", 32, "rm")
        for value in filter(lambda value: value >= 0, ticks(*x_range, whole=True)):
            x, _ = self.place(value, y_range[0])
            self.pen.line([x, self.bottom, x, self.bottom + 12], INK, 2)
            self.text((x, self.bottom + 24), f"{value:g}", 32, "mt")
        corners = [self.left, self.top, self.left, self.bottom, self.right, self.bottom]
        self.pen.line(corners, INK, 2)
        self.text(((self.left + self.right) / 2, self.bottom + 84), "epoch, at its end", 36, "mt")

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
        with utils.written_aside(path) as file:
            self.image.resize((1000, 600), Image.Resampling.BOX).save(file, format="PNG")


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round values from low to high, at most nine."""
    step = 10.0 ** math.floor(math.log10((high - low) / 8))
    while (high - low) / step > 8 or (whole and step < 1):
        step *= 2 if f"{step:e}"[0] in "15" else 2.5
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_charts(run: Path, rows: list[dict], classes: int) -> None:
    """accuracy.png and training.png. The end of epoch e, where its model is saved, is at x = e."""
    log = utils.read_csv(run / resnet50.TRAINING_LOG, resnet50.LOG_COLUMNS)
    epochs = [row["epoch"] for row in (*rows, *log)]
    x_range = (min(epochs) - 1, max(epochs))
    curves = training_curves(log) if log else {}
    draw_accuracy(rows, curves, x_range, classes, run / "accuracy.png")
    if log:
        draw_training(rows, curves, x_range, run / "training.png")


def training_curves(log: list[dict], most: int = 150) -> dict[str, list[float]]:
    """Columns of the log and x, averaged to at most `most` points."""
    batches = max(row["batch"] for row in log) + 1
    for row in log:
        row["x"] = row["epoch"] - 1 + (row["batch"] + 1) / batches
    size = math.ceil(len(log) / most)
    groups = [log[i : i + size] for i in range(0, len(log), size)]
    return {
        name: [float(np.mean([row[name] for row in group])) for group in groups]
        for name in ("x", "loss", "loss_without_l2", "top1")
    }


def draw_accuracy(
    rows: list[dict], curves: dict[str, list], x_range: tuple, classes: int, path: Path
) -> None:
    """Top-5 and top-1 of ten crops, of the centre crop and of training batches, by epoch. No top-5
    of a few classes.
    """
    chart = Chart(f"{path.parent.name}: accuracy", x_range, (0, 1), percent=True)
    if curves:  # first, so that the others are drawn over it
        points = list(zip(curves["x"], curves["top1"], strict=True))
        chart.curve(points, GREEN, "top-1, training", [f"last {points[-1][1]:.2%}"])
    for column, name, colour in (
        ("top5_centre", "top-5, centre crop", LIGHT_BLUE),
        ("top5_10crop", "top-5, 10 crops", BLUE),
        ("top1_centre", "top-1, centre crop", LIGHT_ORANGE),
        ("top1_10crop", "top-1, 10 crops", ORANGE),
    ):
        points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
        if points and (classes > 5 or column.startswith("top1")):
            best, value = max(points, key=lambda point: point[1])
            notes = [f"last {points[-1][1]:.2%}", f"best {value:.2%} (epoch {best})"]
            chart.curve(points, colour, name, notes)
    chart.save(path)


def draw_training(rows: list[dict], curves: dict[str, list], x_range: tuple, path: Path) -> None:
    """The loss of training batches, without its L2 part, and the validation loss, by epoch."""
    plain, last = curves["loss_without_l2"], curves["loss"][-1]
    checked = [(row["epoch"], row["loss_centre"]) for row in rows]
    highest = max(*plain, *(y for _, y in checked), 0.01)
    chart = Chart(f"{path.parent.name}: loss", x_range, (0, highest * 1.05))
    notes = [f"last {plain[-1]:.3f}", f"L2 adds {last - plain[-1]:.3f}"]
    chart.curve(list(zip(curves["x"], plain, strict=True)), BLUE, "training", notes)
    chart.curve(checked, ORANGE, "validation", [f"last {checked[-1][1]:.3f}"])
    chart.save(path)


if __name__ == "__main__":
    utils.run(main)
