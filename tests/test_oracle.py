"""Training as a whole against the second trainer of oracle.py, every part active within 14 steps.

    python3 -m pytest tests/test_oracle.py

The real commands train, are stopped and resumed; the second trainer repeats it from the same
batches. A network with batch statistics amplifies rounding, from step to step and where a ReLU
lets pass in one what it holds back in the other. So the learning rate is small, and each kind of
number has a tolerance of its own, about five times what was measured. The second part compares
single steps of a small network, which hardly amplifies, on one device, on two, and in each
precision.
"""

import dataclasses
import functools
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import toolkit

import numpy as np
import pytest
import tensorflow as tf

import oracle
import toy_dataset
from oracle import Recipe, Saved, State

RECIPE = Recipe()
OTHER_RATE = dataclasses.replace(RECIPE, learning_rate=0.6 * RECIPE.learning_rate)
"""Training after the stop: the rate is the command line's, not that of the state."""

Batch = tuple[np.ndarray, np.ndarray]
Row = dict[str, float]


def wait_for(condition, *processes, seconds: float = 900) -> None:
    """Until `condition()`, while the processes run."""
    end = time.monotonic() + seconds
    while not condition():
        dead = [process.args[1] for process in processes if process.poll() is not None]
        assert not dead, f"ended too early: {dead}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


class Commands:
    """The two scripts at work on a recipe, in folders of their own. A context manager."""

    def __init__(self, recipe: Recipe, dataset: Path, folder: Path, ram: Path):
        for path in (folder, ram):
            path.mkdir(parents=True)
        self.recipe, self.folder, self.buffer = recipe, folder, ram
        self.run, self.log = folder / "saved_models" / "run", folder / "log"
        settings = recipe.settings() | {"train__buffer_size": 40}
        self.config = toolkit.write_config(folder, dataset, ram, **settings)
        span, log = recipe.flags()[:3], folder / "preprocessing.log"
        self.processes = [toolkit.start("runtime_preprocessing.py", self.config, *span, log=log)]

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def batches(self) -> list[Batch]:
        """All batches, once they are there: pictures and labels."""
        recipe = self.recipe
        places = [divmod(step, recipe.batches) for step in range(recipe.steps)]
        files = [oracle.batch_files(self.buffer, *place) for place in places]
        wait_for(lambda: all(x.exists() and y.exists() for x, y in files), *self.processes)
        return [(np.load(x), np.load(y)) for x, y in files]

    def train(self, recipe: Recipe, *more: str):
        """Starts train.py."""
        arguments = ["--run_folder=run", *recipe.flags(), "--log_seconds=0", *more]
        process = toolkit.start("train.py", self.config, *arguments, log=self.log)
        self.processes.append(process)
        return process

    def train_until(self, step: int, recipe: Recipe, *more: str) -> tuple[int, Saved]:
        """Trains and is told to stop once so many steps are done. Returns how many it took, too."""
        process = self.train(recipe, *more)
        line = f"epoch {step // recipe.batches}, {step % recipe.batches} of"
        wait_for(lambda: line in self.log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM, self.log.read_text()
        epoch, batch, folder = oracle.rolling_state(self.run)
        return epoch * recipe.batches + batch, oracle.read_state(folder)


# --- the real commands ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """28 drawn pictures: 7 batches of 4."""
    folder = tmp_path_factory.mktemp("drawn")
    toy_dataset.make(folder, train=RECIPE.batches, val=1)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder on the disk, and one on the RAM disk where there is one."""
    shm = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="toolkit-test-", dir=shm) as ram:
        yield tmp_path_factory.mktemp("oracle"), Path(ram)


@dataclasses.dataclass
class Beginning:
    batches: list[Batch]
    weights: State
    """The initial ones."""


@pytest.fixture(scope="module")
def beginnings(dataset, places) -> list[Beginning]:
    """Of the recipe's seed and of another one: a step or two with a rate of 0 leave the weights."""

    def begin(seed: int) -> Beginning:
        recipe = dataclasses.replace(RECIPE, seed=seed, learning_rate=0.0)
        folder, ram = (place / f"seed_{seed}" for place in places)
        with Commands(recipe, dataset, folder, ram) as commands:
            batches = commands.batches()
            _, state = commands.train_until(1, recipe)
        return Beginning(batches, oracle.initial(state.weights))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(begin, [RECIPE.seed, RECIPE.seed + 1]))


@pytest.fixture(scope="module")
def second_trainer() -> oracle.Trainer:
    return oracle.Trainer(RECIPE)


@dataclasses.dataclass
class Both:
    """What the commands did, and what the second trainer did."""

    states: list[tuple[Saved, Saved]]
    """After the first epoch, at the stop, and at the end."""
    rows: list[tuple[Row, Row]]
    """Of the log, one a step."""


@pytest.fixture(scope="module")
def both(dataset, places, beginnings, second_trainer) -> Both:
    """Two epochs, stopped in the second one, and resumed with another learning rate."""
    with Commands(RECIPE, dataset, *(place / "whole" for place in places)) as commands:
        stop, stopped = commands.train_until(RECIPE.batches + 2, RECIPE)
        process = commands.train(OTHER_RATE, "--resume")
        assert process.wait() == 0, commands.log.read_text()
    real = [oracle.read_state(commands.run / "0"), stopped, oracle.read_state(commands.run / "1")]
    expected, rows = [], []
    second_trainer.start(beginnings[0].weights)
    for step, batch in enumerate(beginnings[0].batches):
        rate = (RECIPE if step < stop else OTHER_RATE).rate(step)
        rows.append(second_trainer.step(*batch, rate))
        if step + 1 in (RECIPE.batches, stop, RECIPE.steps):
            expected.append(second_trainer.state())
    logged = oracle.read_log(commands.run)
    return Both(list(zip(real, expected, strict=True)), list(zip(logged, rows, strict=True)))


def assert_close(distances: oracle.Distances, tolerances: dict, what: str) -> None:
    """By kind of array: how far all together may be apart, and how far the worst one, if told.

    Prints what was found: `python -m pytest -s tests/test_oracle.py` shows it.
    """
    print(f"\n{what}, all arrays of a kind and the worst one:")
    for kind, (of_all, worst) in sorted(distances.items()):
        print(f"  {kind:12} {of_all:.1e} {worst:.1e}")
    far = {}
    for kind, most in tolerances.items():
        found = distances.get(kind, ())[: len(most)]
        if not all(value < limit for value, limit in zip(found, most, strict=False)):
            far[kind] = found, most
    assert not far, f"{what}, found and allowed: {far}"


TOLERANCES = {
    "dense_kernel": (5e-4,),
    "dense_bias": (5e-4,),
    "kernel": (0.05, 0.06),
    "gamma": (0.2, 0.8),
    "beta": (0.25, 1.0),
    "moving_mean": (3e-4, 1e-3),
    "moving_std": (3e-4, 1e-3),
}


@pytest.mark.parametrize("moment", range(3), ids=["after an epoch", "at the stop", "at the end"])
def test_weights_averages_and_momentum_of_the_real_commands(both, beginnings, moment):
    real, expected = both.states[moment]
    assert real.updates == expected.updates
    moved = oracle.apart(real.weights, expected.weights, beginnings[0].weights)
    velocity = oracle.apart(real.velocity, expected.velocity)
    assert_close(moved, TOLERANCES, "weights and averages")
    assert_close(velocity, TOLERANCES, "momentum")


def test_every_row_of_the_log(both):
    for step, (logged, expected) in enumerate(both.rows):
        assert (logged["epoch"], logged["batch"]) == divmod(step, RECIPE.batches)
        assert logged["steps"] == 1
        for name in ("learning_rate", "r_max", "d_max"):
            assert logged[name] == pytest.approx(expected[name], rel=1e-5), (step, name)
        print(f"step {step}: loss {logged['loss_without_l2']}, {expected['loss_without_l2']:.7g}")
        tolerance = 5e-5 if step < RECIPE.batches else 3e-4
        plain, l2 = expected["loss_without_l2"], expected["loss"] - expected["loss_without_l2"]
        assert logged["loss_without_l2"] == pytest.approx(plain, rel=tolerance), step
        assert logged["loss"] - logged["loss_without_l2"] == pytest.approx(l2, rel=1e-4), step
        assert logged["top1"] == expected["top1"], step


def test_every_part_matters(both):
    """Limits that bind some channels and not others, averages past their warm-up, all rates."""
    shares = np.array([expected["clipped"] for _, expected in both.rows])
    assert (shares[4:].mean(axis=0) > 0.1).all()
    assert (shares[4:].mean(axis=0) < 0.6).all()
    rates = [row["learning_rate"] for row, _ in both.rows]
    assert len(set(rates)) == RECIPE.steps - 1  # warm-up ends with the rate the cosine begins with
    assert len({row["top1"] for row, _ in both.rows}) > 1
    momenta = [RECIPE.averages_momentum(step) for step in range(RECIPE.steps)]
    assert momenta.count(RECIPE.moving_avgs_momentum) == 10


def test_another_seed_gives_other_batches_and_other_initial_weights(beginnings):
    """That the same seed gives the same of both is part of the comparison with the whole run."""
    one, other = beginnings
    for (x, _), (other_x, _) in zip(one.batches, other.batches, strict=True):
        assert not np.array_equal(x, other_x)
    orders = [np.concatenate([y for _, y in each.batches]) for each in beginnings]
    assert not np.array_equal(*orders)
    for name, kernel in one.weights.items():
        if name.endswith("kernel"):
            difference = np.std(kernel - other.weights[name]) / np.std(kernel)
            assert difference == pytest.approx(2**0.5, rel=0.1), name


HALF_TOLERANCES = {
    "dense_kernel": (5e-3,),
    "dense_bias": (5e-3,),
    "kernel": (0.15,),
    "moving_mean": (2e-3,),
    "moving_std": (2e-3,),
}


def test_float16_of_the_real_command(dataset, places, beginnings, second_trainer):
    with Commands(RECIPE, dataset, *(place / "half" for place in places)) as commands:
        steps, real = commands.train_until(1, RECIPE, "--precision=mixed_float16")
    second_trainer.start(beginnings[0].weights)
    for step, batch in enumerate(beginnings[0].batches[:steps]):
        second_trainer.step(*batch, RECIPE.rate(step))
    expected = second_trainer.state()
    assert real.updates == steps
    assert real.loss_scale == 2**15
    moved = oracle.apart(real.weights, expected.weights, beginnings[0].weights)
    assert_close(moved, HALF_TOLERANCES, "weights and averages")
    assert_close(oracle.apart(real.velocity, expected.velocity), HALF_TOLERANCES, "momentum")


# --- the step of a small network, in this process ---------------------------------------------

SMALL = ((1, 64, 1), (1, 128, 2))
STEPS = 10


@pytest.fixture(scope="module")
def batches(dataset, tmp_path_factory) -> list[Batch]:
    """Those that the commands have, cut to a size that is quick to train on."""
    folder = tmp_path_factory.mktemp("recipe")
    config = toolkit.write_config(folder, dataset, folder, **RECIPE.settings())
    recipe = toolkit.batches_of(config, RECIPE.batch_size)
    made = [toolkit.made(recipe, step) for step in range(STEPS)]
    return [(np.ascontiguousarray(images[:, :128, :128]), labels) for images, labels in made]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to take the same step, and how far it may be off: kernels, gammas, losses …"""

    precision: str
    replicas: int = 1
    xla: bool = False

    def tolerances(self) -> dict[str, tuple[float, ...]]:
        kernel, other, average = {
            "float32": (0.02, 0.02, 5e-5),
            "mixed_float16": (0.06, 0.06, 2e-3),
            "mixed_bfloat16": (0.15, 0.15, 1e-2),
        }[self.precision]
        return {
            "dense_kernel": (4 * average,),
            "dense_bias": (4 * average,),
            "kernel": (kernel,),
            "gamma": (other,),
            "beta": (other,),
            "moving_mean": (average,),
            "moving_std": (average,),
        }

    def loss_tolerance(self) -> float:
        return {"float32": 1e-5, "mixed_float16": 3e-4, "mixed_bfloat16": 3e-3}[self.precision]


WAYS = {
    "float32": Way("float32"),
    "xla": Way("float32", xla=True),
    "two replicas": Way("float32", replicas=2),
    "float16": Way("mixed_float16"),
    "bfloat16": Way("mixed_bfloat16"),
    "two replicas in float16": Way("mixed_float16", replicas=2),
}


class ScriptsTrainer:
    """train.py's Trainer in this process, where two replicas fit on one processor."""

    def __init__(self, recipe: Recipe, folder: Path, way: Way, monkeypatch: pytest.MonkeyPatch):
        import utils

        import train
        from test_training import two_replicas

        self.folder = folder
        config = toolkit.write_config(folder, folder, folder, **recipe.settings())
        flags = ["--run_folder=run", *recipe.flags(), f"--precision={way.precision}"]
        flags += ["--jit_compile"] if way.xla else []
        monkeypatch.setattr("sys.argv", ["train.py", *flags])
        strategy = two_replicas() if way.replicas > 1 else tf.distribute.get_strategy()
        settings, args = utils.load_config(config), train.parse_arguments()
        self.trainer = train.Trainer(strategy, settings, recipe.classes, recipe.batches, args)

    def state(self) -> Saved:
        state = self.folder / "training_state"
        self.trainer.state(averaged=False).write(str(state / "state"))
        tf.train.Checkpoint(network=self.trainer.network).write(str(state / "weights"))
        return oracle.read_state(self.folder)

    def step(self, images: np.ndarray, labels: np.ndarray, rate: float) -> Row:
        """The values of the log that a step has."""
        from train import METRICS

        batch = self.trainer.to_device(images, labels)
        values = self.trainer.train_batch(*batch, rate).numpy()
        return dict(zip(METRICS, values.tolist(), strict=True))


@functools.cache
def small_second_trainer() -> oracle.Trainer:
    return oracle.Trainer(RECIPE, SMALL)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_steps_of_a_small_network(way, batches, tmp_path, monkeypatch):
    """Weights, averages, momentum, limits and losses, with each replica's own statistics."""
    stages = [(count, channels, 4 * channels, stride) for count, channels, stride in SMALL]
    monkeypatch.setattr("resnet50.STAGES", stages)
    trainer, second = ScriptsTrainer(RECIPE, tmp_path, way, monkeypatch), small_second_trainer()
    start = trainer.state()
    second.start(start.weights)
    for step, batch in enumerate(batches):
        real = trainer.step(*batch, RECIPE.rate(step))
        expected = second.step(*batch, RECIPE.rate(step), way.replicas)
        for name in ("loss", "loss_without_l2"):
            assert real[name] == pytest.approx(expected[name], rel=way.loss_tolerance()), step
        for name in ("r_max", "d_max"):
            assert real[name] == pytest.approx(expected[name], rel=1e-5), (step, name)
        assert real["top1"] == expected["top1"], step
    real, expected = trainer.state(), second.state()
    assert real.updates == expected.updates == STEPS
    assert real.loss_scale == start.loss_scale == 2**15
    moved = oracle.apart(real.weights, expected.weights, start.weights)
    assert_close(moved, way.tolerances(), "weights and averages")
    assert_close(oracle.apart(real.velocity, expected.velocity), way.tolerances(), "momentum")
