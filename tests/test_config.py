"""config.txt and command lines: every mistake is one line that names it, nothing else ever happens.

python3 -m pytest tests/test_config.py
"""

import ast
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import toolkit
import utils
from utils import UserError

import pytest

SHIPPED = (toolkit.ROOT / "config.txt").read_text(encoding="utf-8")

REQUIRED = {
    "preprocess": {"ImageNet_folder": str, "path_to_save": str, "N": 50000},
    "get_mu_sigma": {"path_to_save": str},
    "train": {
        "buffer_folder": str,
        "path_for_saving": "saved_models",
        "N": 1281167,
        "sgd_momentum": 0.9,
        "buffer_size": 1000,
        "sleep_time": 100,
    },
    "batch_renorm": {
        "moving_avgs_momentum": 0.99,
        "rmax_max": 3,
        "dmax_max": 5,
        "start_relaxing_rmax": "3 epochs",
        "reach_rmax_max": "7 epochs",
        "start_relaxing_dmax": "3 epochs",
        "reach_dmax_max": "7 epochs",
    },
    "runtime_preprocessing": {"sleep_time": 10, "num_of_threads": 3},
    "utils": {
        "mu_0": 0.48180,
        "mu_1": 0.44969,
        "mu_2": 0.39839,
        "sigma_0": 0.27336,
        "sigma_1": 0.26435,
        "sigma_2": 0.27563,
    },
    "l2": {"l2_penalty": 0.0001},
}
"""The required keys and their shipped values; `str` where the path is left to the file."""

COMMANDS = {
    "preprocess.py": ["--shorter_side=256"],
    "preprocess_val.py": [],
    "get_mu_sigma.py": [],
    "runtime_preprocessing.py": ["--epoch_start=0", "--epoch_end=30", "--batch_size=64"],
    "train.py": [
        "--run_folder=mytestrun",
        "--epoch_start=0",
        "--epoch_end=30",
        "--batch_size=64",
        "--learning_rate=0.01",
    ],
    "check_accuracy.py": ["--run_folder=mytestrun", "--epoch_start=0", "--epoch_end=30"],
}
"""Each script with the arguments that the manual shows."""

WITHOUT_TENSORFLOW = list(COMMANDS)[:4]
SCRIPTS = [*COMMANDS, "resnet50.py"]


# --- the shipped file -------------------------------------------------------------------------


def test_the_shipped_file_has_the_required_keys_and_values():
    found = tomllib.loads(SHIPPED)
    assert {section: list(keys) for section, keys in found.items()} == {
        section: list(keys) for section, keys in REQUIRED.items()
    }
    for section, keys in REQUIRED.items():
        for key, value in keys.items():
            if value is str:
                assert isinstance(found[section][key], str) and found[section][key]
            else:
                assert found[section][key] == value, (section, key)
    assert found["train"]["buffer_folder"].startswith("/dev/shm/")


def test_optional_keys_have_defaults_and_the_rest_is_required():
    required = {
        section: [name for name in keys if (section, name) not in utils.OPTIONAL]
        for section, keys in utils.KEYS.items()
    }
    assert required == {section: list(keys) for section, keys in REQUIRED.items()}


def test_the_shipped_file_loads_with_its_types():
    config = utils.load_config(toolkit.ROOT / "config.txt")
    assert config.train.path_for_saving == toolkit.ROOT / "saved_models"
    assert config.train.seed == 0 and config.runtime_preprocessing.crop == "side"
    assert isinstance(config.train.sleep_time, float) and config.train.sleep_time == 100
    assert isinstance(config.batch_renorm.rmax_max, float)
    assert config.batch_renorm.reach_rmax_max == utils.Epochs(7)
    assert config.utils.mu == [0.48180, 0.44969, 0.39839]
    assert config.utils.sigma == [0.27336, 0.26435, 0.27563]


def test_every_key_is_commented():
    lines = SHIPPED.splitlines()
    for section in REQUIRED:
        start = lines.index(f"[{section}]")
        assert any(line.startswith("# ") for line in lines[start + 1 : start + 3]), section


# --- mistakes in the file ---------------------------------------------------------------------


def with_line(section: str, key: str, *replacement: str) -> str:
    """The shipped file with these lines in place of the line of a key."""
    lines = SHIPPED.splitlines()
    start = lines.index(f"[{section}]")
    at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"{key} ="))
    return "\n".join([*lines[:at], *replacement, *lines[at + 1 :]]) + "\n"


def with_value(section: str, key: str, value: str) -> str:
    return with_line(section, key, f"{key} = {value}")


def without_section(section: str) -> str:
    lines = SHIPPED.splitlines()
    start = lines.index(f"[{section}]")
    end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("[")), len(lines))
    return "\n".join([*lines[:start], *lines[end:]]) + "\n"


def load(folder: Path, content: str | bytes):
    file = folder / "config.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return utils.load_config(file)


IMAGENET = ("preprocess", "ImageNet_folder")
MISTAKES = {
    "wrong section": (SHIPPED.replace("[train]", "[trian]"), ["trian", "did you mean train?"]),
    "foreign section": (SHIPPED + "\n[model]\n", ["section model"]),
    "missing section": (without_section("l2"), ["missing section", "l2"]),
    "section as a key": ("l2 = 3\n" + without_section("l2"), ["l2", "section", "[l2]"]),
    "list of sections": (SHIPPED.replace("[l2]", "[[l2]]"), ["l2", "section", "[l2]"]),
    "missing key": (
        with_line("train", "sgd_momentum"),
        ["[train]", "missing", "sgd_momentum", "a number from 0 to 0.9999"],
    ),
    "missing path": (with_line(*IMAGENET), ["[preprocess]", "ImageNet_folder", "path in quotes"]),
    "unknown key": (
        with_line("train", "buffer_size", "buffersize = 1000"),
        ["[train]", "buffersize", "did you mean buffer_size?"],
    ),
    "foreign key": (
        with_line("l2", "l2_penalty", "l2_penalty = 0", "xyz = 1"),
        ["[l2]", "unknown key xyz", "known: l2_penalty"],
    ),
    "key before any section": ("batch_size = 1\n" + SHIPPED, ["batch_size"]),
    "key given twice": (
        with_line("l2", "l2_penalty", "l2_penalty = 0", "l2_penalty = 1"),
        ["line ", "l2_penalty appears twice"],
    ),
    "section given twice": (SHIPPED + "\n[l2]\n", ["line ", "only one section [l2]"]),
    "unquoted path": (
        with_value(*IMAGENET, "/data/imagenet"),
        ["line ", "quotes", 'ImageNet_folder = "/data/imagenet"'],
    ),
    "unquoted path from home": (
        with_value(*IMAGENET, "~/imagenet"),
        ["quotes", 'ImageNet_folder = "~/imagenet"'],
    ),
    "unquoted path with a variable": (
        with_value(*IMAGENET, "$HOME/imagenet"),
        ["quotes", 'ImageNet_folder = "$HOME/imagenet"'],
    ),
    "typographic quotes": (with_value(*IMAGENET, "“/data”"), ["line ", "straight quotes"]),
    "decimal comma": (
        with_line("batch_renorm", "rmax_max", "rmax_max = 3,0"),
        ["line ", "without commas"],
    ),
    "commas in a whole number": (
        with_line("train", "N", "N = 1,281,167"),
        ["line ", "numbers without commas"],
    ),
    "number for a path": (
        with_value(*IMAGENET, "2012"),
        ["[preprocess]", "ImageNet_folder", "path in quotes", "2012"],
    ),
    "empty path": (with_value(*IMAGENET, '""'), ["[preprocess]", "ImageNet_folder", "path"]),
    "blank path": (with_value(*IMAGENET, '"  "'), ["[preprocess]", "ImageNet_folder", "path"]),
    "path with a zero byte": (
        with_value(*IMAGENET, '"a\\u0000b"'),
        ["[preprocess]", "ImageNet_folder", "path"],
    ),
    "list for a path": (with_value(*IMAGENET, '["/a"]'), ["ImageNet_folder", '["/a"]']),
    "text for a number": (
        with_value("preprocess", "N", '"50000"'),
        ["[preprocess]", "N", "a whole number", '"50000"'],
    ),
    "yes for a number": (
        with_value("preprocess", "N", "true"),
        ["[preprocess]", "N", "a whole number", "true"],
    ),
    "yes for a fraction": (
        with_value("train", "sgd_momentum", "false"),
        ["[train]", "sgd_momentum", "a number", "false"],
    ),
    "fraction for a whole number": (
        with_value("train", "buffer_size", "10.5"),
        ["[train]", "buffer_size", "a whole number", "10.5"],
    ),
    "date for a number": (
        with_value("train", "sgd_momentum", "1979-05-27"),
        ["[train]", "sgd_momentum", "a number", "1979-05-27"],
    ),
    "below the range": (
        with_value("preprocess", "N", "-1"),
        ["[preprocess]", "N", "a whole number", "0", "-1"],
    ),
    "above the range": (
        with_value("train", "sgd_momentum", "1.5"),
        ["[train]", "sgd_momentum", "from 0 to 0.9999", "1.5"],
    ),
    "no threads": (
        with_value("runtime_preprocessing", "num_of_threads", "0"),
        ["[runtime_preprocessing]", "num_of_threads", "1"],
    ),
    "deviation of zero": (with_value("utils", "sigma_1", "0"), ["[utils]", "sigma_1"]),
    "r_max below one": (
        with_value("batch_renorm", "rmax_max", "0.5"),
        ["[batch_renorm]", "rmax_max", "a number", "1", "0.5"],
    ),
    "NaN": (with_value("train", "sgd_momentum", "nan"), ["[train]", "sgd_momentum", "NaN"]),
    "infinity": (with_value("batch_renorm", "dmax_max", "inf"), ["dmax_max", "Infinity"]),
    "number beyond floats": (
        with_value("batch_renorm", "rmax_max", "1" + 400 * "0"),
        ["[batch_renorm]", "rmax_max", "a number"],
    ),
    "whole number beyond floats": (
        with_value("batch_renorm", "reach_rmax_max", "1" + 400 * "0"),
        ["[batch_renorm]", "reach_rmax_max", "a whole number"],
    ),
    "r_max beyond 32-bit floats": (
        with_value("batch_renorm", "rmax_max", "1e39"),
        ["[batch_renorm]", "rmax_max", "a number", "1e+39"],
    ),
    "number of 5000 digits": (with_value("train", "buffer_size", 5000 * "1"), []),
    "brackets without end": (with_value("train", "buffer_size", 5000 * "["), []),
    "epochs without quotes": (
        with_value("batch_renorm", "reach_rmax_max", "7 epochs"),
        ["line "],
    ),
    "epochs in a fraction": (
        with_value("batch_renorm", "reach_rmax_max", "7.5"),
        ["[batch_renorm]", "reach_rmax_max", '"3 epochs"', "whole number of updates", "7.5"],
    ),
    "epochs by another name": (
        with_value("batch_renorm", "reach_rmax_max", '"7 ep"'),
        ["[batch_renorm]", "reach_rmax_max", '"3 epochs"', '"7 ep"'],
    ),
    "epochs below zero": (
        with_value("batch_renorm", "start_relaxing_dmax", '"-1 epochs"'),
        ["[batch_renorm]", "start_relaxing_dmax", '"3 epochs"', "-1 epochs"],
    ),
    "updates below zero": (
        with_value("batch_renorm", "start_relaxing_dmax", "-1"),
        ["[batch_renorm]", "start_relaxing_dmax", '"3 epochs"', "-1"],
    ),
    "another crop": (
        SHIPPED.replace("[runtime_preprocessing]\n", '[runtime_preprocessing]\ncrop = "centre"\n'),
        ["[runtime_preprocessing]", "crop", '"side" or "area"', '"centre"'],
    ),
    "no TOML": (SHIPPED.replace("[l2]", "[l2"), ["line "]),
    "empty file": ("", ["missing section", "preprocess"]),
    "not UTF-8": (SHIPPED.encode().replace("Σ".encode(), b"\xe9"), ["UTF-8"]),
    "UTF-16": (SHIPPED.encode("utf-16"), ["UTF-8"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(name, tmp_path):
    content, words = MISTAKES[name]
    with pytest.raises(UserError) as error:
        load(tmp_path, content)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(tmp_path / "config.txt"))
    for word in words:
        assert word in message, (word, message)


SHOWN = ["wrong section", "missing key", "unquoted path", "NaN", "no TOML", "not UTF-8", "UTF-16"]
SHOWN += ["number beyond floats", "number of 5000 digits", "brackets without end"]


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_real_commands_print_the_mistake_and_leave(number, tmp_path):
    content, words = MISTAKES[SHOWN[number]]
    file = tmp_path / "config.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    script = WITHOUT_TENSORFLOW[number % len(WITHOUT_TENSORFLOW)]
    result = toolkit.run(script, file, *COMMANDS[script])
    toolkit.assert_one_line_error(result, script, str(file), *words)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_file_is_named(tmp_path):
    for script in WITHOUT_TENSORFLOW:
        result = toolkit.run(script, tmp_path / "nope.txt", *COMMANDS[script])
        toolkit.assert_one_line_error(result, script, str(tmp_path / "nope.txt"), "no such file")


def test_a_folder_is_no_config_file(tmp_path):
    result = toolkit.run("preprocess_val.py", tmp_path)
    toolkit.assert_one_line_error(result, "preprocess_val.py", str(tmp_path), "directory")


def test_a_pipe_is_no_config_file(tmp_path):
    """Such as --config=<(sed …): nothing waits for its other end."""
    os.mkfifo(tmp_path / "config.txt")
    result = toolkit.run("preprocess_val.py", tmp_path / "config.txt", timeout=toolkit.PATIENCE)
    toolkit.assert_one_line_error(result, "preprocess_val.py", "config.txt: a pipe")


def test_line_breaks_in_a_key_stay_within_the_line(tmp_path):
    file = tmp_path / "config.txt"
    file.write_text(SHIPPED + '\n"a\\nb\\rc\\u2028d" = 1\n', encoding="utf-8")
    result = toolkit.run("get_mu_sigma.py", file)
    toolkit.assert_one_line_error(result, "get_mu_sigma.py", "[l2]", "a\\nb")


def test_the_quoting_hint_leaves_the_comment_out(tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, with_value(*IMAGENET, "/data/imagenet  # the big disk"))
    assert str(error.value).endswith('ImageNet_folder = "/data/imagenet"')


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert load(tmp_path, b"\xef\xbb\xbf" + SHIPPED.encode()).train.buffer_size == 1000


def test_line_ends_of_windows_are_no_mistake(tmp_path):
    assert load(tmp_path, SHIPPED.replace("\n", "\r\n")).train.buffer_size == 1000


# --- paths in the file ------------------------------------------------------------------------


PATHS = {
    "~/data": "{home}/data",
    "$TOOLKIT_DISK/data": "/big/disk/data",
    "${TOOLKIT_DISK}data": "/big/diskdata",
    "$TOOLKIT_HOME/data": "{home}/x/data",
    "data": "{folder}/data",
    "./a/../data": "{folder}/data",
    "../data": "{above}/data",
    "/data/": "/data",
    "with space, 'quotes' and ünïcode": "{folder}/with space, 'quotes' and ünïcode",
}


@pytest.mark.parametrize("written", PATHS)
def test_paths_are_expanded_and_start_from_the_file(written, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("TOOLKIT_DISK", "/big/disk")
    monkeypatch.setenv("TOOLKIT_HOME", "~/x")
    folder = tmp_path / "settings"
    folder.mkdir()
    monkeypatch.chdir("/")
    config = load(folder, with_value(*IMAGENET, json.dumps(written, ensure_ascii=False)))
    expected = PATHS[written].format(home="/home/someone", folder=folder, above=tmp_path)
    assert config.preprocess.ImageNet_folder == Path(expected)


def test_a_relative_config_file_gives_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    load(tmp_path / "sub", SHIPPED)
    monkeypatch.chdir(tmp_path)
    config = utils.load_config(Path("sub/config.txt"))
    assert config.train.path_for_saving == tmp_path / "sub" / "saved_models"


def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    """Else a folder called $TOOLKIT_DISK would fill up beside the config file."""
    monkeypatch.delenv("TOOLKIT_DISK", raising=False)
    with pytest.raises(UserError, match=r"\[preprocess\] path_to_save.*TOOLKIT_DISK"):
        load(tmp_path, with_value("preprocess", "path_to_save", '"$TOOLKIT_DISK/x"'))


@pytest.mark.parametrize("written", ["~nobody_of_this_name/data", "~nobody_of_this_name"])
def test_a_home_that_is_unknown_is_named(written, tmp_path):
    """Else a folder called ~nobody_of_this_name would be made beside the config file."""
    with pytest.raises(UserError, match=rf"ImageNet_folder: no home folder.*{written}"):
        load(tmp_path, with_value(*IMAGENET, json.dumps(written)))


def test_a_home_that_is_not_set_is_named(tmp_path):
    """In a container with a user that its /etc/passwd does not know."""
    code = (
        "import os, pwd, sys; from pathlib import Path; import utils\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\n"
        "utils.run(lambda: utils.load_config(Path(sys.argv[1])))"
    )
    file = tmp_path / "config.txt"
    file.write_text(with_value(*IMAGENET, '"~/data"'))
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=toolkit.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    toolkit.assert_one_line_error(result, "-c", "no home folder is known for ~/data")


WHEN = {
    '"3 epochs"': 3.0,
    '"1 epoch"': 1.0,
    '"0.25 epochs"': 0.25,
    '" 3  epochs "': 3.0,
    '"0 epochs"': 0.0,
}


@pytest.mark.parametrize("written", WHEN)
def test_limits_may_be_relaxed_in_epochs(written, tmp_path):
    value = load(
        tmp_path, with_value("batch_renorm", "reach_rmax_max", written)
    ).batch_renorm.reach_rmax_max
    assert type(value) is utils.Epochs and value == WHEN[written]


def test_a_whole_number_counts_updates(tmp_path):
    config = load(tmp_path, with_value("batch_renorm", "reach_rmax_max", "140000"))
    assert type(config.batch_renorm.reach_rmax_max) is int
    assert config.batch_renorm.reach_rmax_max == 140000


@pytest.mark.parametrize("crop", ["side", "area"])
def test_the_crop_may_be_chosen(crop, tmp_path):
    text = SHIPPED.replace(
        "[runtime_preprocessing]\n", f'[runtime_preprocessing]\ncrop = "{crop}"\n'
    )
    assert load(tmp_path, text).runtime_preprocessing.crop == crop


RANGES = {
    "[preprocess] N": (0, 10**12), "[train] N": (0, 10**12), "[train] seed": (0, 2**31 - 1),
    "[train] sgd_momentum": (0, 0.9999), "[train] buffer_size": (1, 10**7),
    "[train] sleep_time": (0.01, 86_400), "[runtime_preprocessing] sleep_time": (0.01, 86_400),
    "[runtime_preprocessing] num_of_threads": (1, 1024),
    "[batch_renorm] moving_avgs_momentum": (0, 0.999999),
    "[batch_renorm] rmax_max": (1, 1e6), "[batch_renorm] dmax_max": (0, 1e6),
    "[utils] mu_0": (0, 1), "[utils] mu_1": (0, 1), "[utils] mu_2": (0, 1),
    "[utils] sigma_0": (0.001, 1), "[utils] sigma_1": (0.001, 1), "[utils] sigma_2": (0.001, 1),
    "[l2] l2_penalty": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("key", RANGES)
def test_the_ends_of_a_range_are_accepted_and_nothing_beyond(key, tmp_path):
    section, name = re.fullmatch(r"\[(\w+)\] (\w+)", key).groups()
    low, high = RANGES[key]

    def value_of(text: str) -> object:
        lines = SHIPPED if name == "seed" else with_line(section, name)
        lines = lines.replace(f"[{section}]\n", f"[{section}]\n{name} = {text}\n")
        return getattr(getattr(load(tmp_path, lines), section), name)

    for value in (low, high):
        assert value_of(repr(value)) == value
    for value in (low - 1e-9, math.nextafter(high, math.inf) if high % 1 else high + 1):
        with pytest.raises(UserError, match=rf"\[{section}\] {name}: expected"):
            value_of(repr(value))


# --- any file at all --------------------------------------------------------------------------

NASTY_VALUES = (
    *("nan", "inf", "-inf", "+nan", "1e999", "-1e999", "1e-999", "-0.0", "-0", "0", "1", "-1"),
    *("0x10", "0o7", "0b1", "1_000", "1__0", "01", ".5", "5.", "1e5", "true", "false", "null"),
    *('""', "''", '"a"', "'~'", '"$HOME"', '"\\u0000"', '"\\ud800"', '"""a\n"""', '"unclosed'),
    *("1979-05-27", "1979-13-45", "07:32:00", "25:61:61", "1979-05-27T07:32:00+99:99", "[]"),
    *("{}", "[1, 2]", "{a = 1}", "[[]]", "[", "{", "", "=", "#", "/path", "~", "C:\\x", "1,5"),
    *('"3 epochs"', '"1e3 epochs"', '"nan epochs"', '"area"', '"~x/y"', '"٣ epochs"'),
    *("9" * 19, "9" * 400, "9" * 5000, "[" * 3000, "{a=" * 3000, "0." + "1" * 500),
)
CHARACTERS = "\0\t\n\r\x0b\x1f\x7f\x85 \"'#=[]{}.,:;$~\\/-+_0123456789abcNnxyzé\u2028\ufeff𝟙"


def mutated(draw: random.Random) -> bytes:
    """The shipped file after one to four random changes."""
    lines = SHIPPED.splitlines()
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(lines)) if draw.random() < 0.3 else draw.choice(key_lines(lines))
        change = draw.randrange(7)
        if change == 0:
            del lines[at]
        elif change == 1:
            lines.insert(draw.randrange(len(lines)), lines[at])
        elif change in (2, 3):
            lines[at] = f"{lines[at].split('=')[0]}= {draw.choice(NASTY_VALUES)}"
        elif change == 4:
            start = draw.randrange(len(lines[at]) + 1)
            end = start + draw.randrange(3)
            lines[at] = lines[at][:start] + draw.choice(CHARACTERS) + lines[at][end:]
        elif change == 5:
            other = draw.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            value = draw.choice((draw.randrange(-9, 10**6), draw.uniform(-1, 4)))
            lines[at] = f"{lines[at].split('=')[0]}= {value}"
    content = "\n".join(lines).encode()
    if draw.random() < 0.1:
        at = draw.randrange(len(content))
        content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    return content[: draw.randrange(len(content))] if draw.random() < 0.05 else content


def key_lines(lines: list[str]) -> list[int]:
    found = [i for i, line in enumerate(lines) if line[:1] not in ("#", "")]
    return found or [0]


def assert_well_formed(config) -> None:
    for section, keys in REQUIRED.items():
        for name, shipped in keys.items():
            value = getattr(getattr(config, section), name)
            if isinstance(value, Path):
                assert value.is_absolute() and not value.name.startswith("~")
            elif "relaxing" in name or "reach" in name:
                assert type(value) in (int, utils.Epochs) and 0 <= value <= 10**12
            else:
                low, high = RANGES[f"[{section}] {name}"]
                assert math.isfinite(value) and low <= value <= high
                assert type(value) in (type(shipped), float)
    assert config.runtime_preprocessing.crop in ("side", "area")


def test_any_mutated_file_gives_a_config_or_one_line(ram):
    draw = random.Random(20240229)
    accepted = refused = 0
    for _ in range(5000):
        content = mutated(draw)
        try:
            assert_well_formed(load(ram, content))
            accepted += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1, content
            assert str(error).startswith(f"{ram}/config.txt: "), content
            refused += 1
    assert accepted > 300 and refused > 3000


# --- command lines ----------------------------------------------------------------------------

VALUES = (
    *("0", "1", "-1", "3", "64", "256", "263", "480", "257", "all", "ALL", "", " ", "0.1", "1e3"),
    *("nan", "inf", "1e999", "-0.5", "99999999999999999999", "٣", "1_0", "+5", "0x10", "0,1"),
    *("0,0", "1,2,3", "3,2,1", ",", "20,40,", "step", "cosine", "constant", "float32", "a\nb"),
    *("mixed_float16", "../x", "run", "-", "--", "%s", "{}", "\udcff", "é", "a b", "=", "x" * 3000),
)
FLAGS = (
    *("--config", "--help", "-h", "--shorter_side", "--epoch_start", "--epoch_end", "--batch_size"),
    *("--learning_rate", "--run_folder", "--lr_schedule", "--lr_drop_epochs", "--warmup_epochs"),
    *("--label_smoothing", "--resume", "--checkpoint_minutes", "--log_seconds", "--precision"),
    *("--jit_compile", "--gpu", "--deterministic", "--synthetic", "--verbose", "--pictures"),
    *("--preview", "--benchmark", "--nonsense", "--epoch", "--batch-size", "--", "-x"),
)


def random_arguments(draw: random.Random, usual: list[str]) -> list[str]:
    """The usual arguments of a script after a few random changes."""
    arguments = list(usual) if draw.random() < 0.9 else []
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        at = draw.randrange(len(arguments) + 1)
        change = draw.randrange(4)
        if change == 0:
            del arguments[at : at + 1]
        elif change == 1:
            flag = draw.choice(arguments or list(FLAGS)).partition("=")[0]
            arguments[at : at + 1] = [f"{flag}={draw.choice(VALUES)}"]
        elif change == 2:
            arguments[at:at] = [draw.choice(FLAGS), draw.choice(VALUES)][: draw.choice((1, 2))]
        else:
            arguments.insert(at, f"{draw.choice(FLAGS)}={draw.choice(VALUES)}")
    return arguments


class Parsed(Exception):
    """Raised in place of reading config.txt: the arguments were accepted."""


def accept(_file: Path):
    raise Parsed


@pytest.mark.parametrize("script", COMMANDS)
def test_any_arguments_are_accepted_or_refused_in_one_line(script, monkeypatch, capsys):
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(utils, "load_config", accept)
    draw = random.Random(script)
    outcomes = {"accepted": 0, "refused": 0, "helped": 0}
    for _ in range(300):
        arguments = random_arguments(draw, COMMANDS[script])
        monkeypatch.setattr(sys, "argv", [str(toolkit.ROOT / script), *arguments])
        try:
            module.main()
        except Parsed:
            outcomes["accepted"] += 1
        except UserError as error:
            assert str(error).strip(), arguments
            outcomes["refused"] += 1
        except SystemExit as error:
            assert not error.code, arguments
            assert {"--help", "-h"} & {argument.strip() for argument in arguments}, arguments
            outcomes["helped"] += 1
    assert min(outcomes.values()) > 0, outcomes
    assert capsys.readouterr().err == ""


WRONG_ARGUMENTS = {
    "preprocess.py": [
        ([], "--shorter_side"),
        (["--shorter_side=257"], "263"),
        (["--shorter_side=-256"], "--shorter_side"),
        (["--shorter_side"], "--shorter_side"),
        (["--shorter_side=--"], "--shorter_side"),
        (["--shorter_side=256", "--nonsense"], "--nonsense"),
        (["--shorter_side=256", "stray"], "stray"),
    ],
    "get_mu_sigma.py": [(["--shorter_side=tall"], "'tall'")],
    "runtime_preprocessing.py": [
        (["--epoch_start=0", "--epoch_end=30"], "--batch_size"),
        (["--epoch_start=3", "--epoch_end=3", "--batch_size=64"], "--epoch_end=3"),
        (["--epoch_start=-1", "--epoch_end=3", "--batch_size=64"], "--epoch_start"),
        (["--epoch_start=0", "--epoch_end=3", "--batch_size=6.5"], "'6.5'"),
        (["--epoch_start=0", "--epoch_end=3", "--batch_size=a\nb"], "--batch_size"),
    ],
}


@pytest.mark.parametrize("script", WRONG_ARGUMENTS)
def test_wrong_arguments_are_one_line_on_stderr(script):
    for arguments, word in WRONG_ARGUMENTS[script]:
        result = toolkit.run(script, None, *arguments)
        toolkit.assert_one_line_error(result, script, word)
        assert result.stdout == ""


MISSPELLED = {
    "--learning-rate=0.1": "--learning_rate",
    "--batch-size=64": "--batch_size",
    "--bach_size": "--batch_size",
    "--epochs=90": "--epoch_start",
    "epoch_start=0": "--epoch_start",
}


@pytest.mark.parametrize("flag", MISSPELLED)
@pytest.mark.parametrize("usual", [COMMANDS["train.py"], []], ids=["besides", "alone"])
def test_a_misspelled_flag_gets_its_name(flag, usual, monkeypatch):
    """Also where a required flag is missing, which argparse says first."""
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *usual, flag])
    with pytest.raises(UserError) as error:
        train.main()
    name = flag.partition("=")[0]
    assert f"unrecognized argument {name}; did you mean {MISSPELLED[flag]}" in str(error.value)


@pytest.mark.parametrize("file", ["mine.txt", "settings/mine.toml"])
def test_a_config_file_without_its_flag_gets_the_flag(file):
    result = toolkit.run("preprocess_val.py", None, file)
    toolkit.assert_one_line_error(result, "preprocess_val.py", f"did you mean --config={file}?")


def test_a_flag_like_no_other_is_named_alone():
    result = toolkit.run("preprocess_val.py", None, "--lr=0.1")
    toolkit.assert_one_line_error(result, "preprocess_val.py", "unrecognized arguments: --lr=0.1;")
    assert "did you mean" not in result.stderr


def example(text: str) -> list[str]:
    """The command of the example in a help text, without the interpreter."""
    command = text.partition("example:")[2].replace("\\\n", " ")
    return shlex.split(command)[1:]


@pytest.fixture
def no_tensorflow(tmp_path) -> dict[str, str]:
    """An environment in which importing TensorFlow fails."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError('no TensorFlow here')\n")
    return {"PYTHONPATH": str(tmp_path), "COLUMNS": "80"}


@pytest.mark.parametrize("script", WITHOUT_TENSORFLOW)
def test_help_needs_no_tensorflow_and_fits_a_terminal(script, no_tensorflow):
    result = toolkit.run(script, None, "--help", **no_tensorflow)
    assert result.returncode == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) <= 24
    assert [line for line in lines if len(line) > 80] == []
    assert example(result.stdout)[0] == script
    for flag in ("--config", *COMMANDS[script]):
        assert flag.partition("=")[0] in result.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_the_example_of_the_help_is_the_manuals_and_works(script, monkeypatch, capsys):
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [str(toolkit.ROOT / script), "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert len(text.splitlines()) <= 40
    assert example(text) == [script, *COMMANDS[script]]
    monkeypatch.setattr(utils, "load_config", accept)
    monkeypatch.setattr(sys, "argv", [str(toolkit.ROOT / script), *COMMANDS[script]])
    with pytest.raises(Parsed):
        module.main()


def test_the_config_beside_the_script_is_the_default(tmp_path):
    """From whatever folder the command is typed."""
    for name in ("preprocess_val.py", "preprocess.py", "utils.py"):
        (tmp_path / name).write_bytes((toolkit.ROOT / name).read_bytes())
    (tmp_path / "config.txt").write_text(with_value(*IMAGENET, '"nowhere"'))
    result = subprocess.run(
        [sys.executable, str(tmp_path / "preprocess_val.py")],
        cwd="/",
        capture_output=True,
        text=True,
    )
    toolkit.assert_one_line_error(result, "preprocess_val.py", str(tmp_path / "nowhere"))


# --- what a script needs ----------------------------------------------------------------------


def without(module: str, folder: Path) -> dict[str, str]:
    """An environment in which there is no such module."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    return {"PYTHONPATH": str(folder)}


LACKS = {
    "tomllib": ["needs Python 3.11 or newer, but this is 3."],  # as on Python 3.10
    "fcntl": ["needs Linux or macOS"],  # as on Windows
    "numpy": ["needs the package numpy:", "-m pip install -r", "requirements.txt"],
    "PIL": ["needs the package pillow:", "-m pip install -r", "requirements.txt"],
    "tensorflow": ["needs the package tensorflow:", "-m pip install -r", "requirements.txt"],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("module", LACKS)
def test_what_is_lacking_is_one_line(module, script, tmp_path):
    result = toolkit.run(script, None, "--help", **without(module, tmp_path))
    if module == "tensorflow" and script in WITHOUT_TENSORFLOW:
        assert result.returncode == 0 and result.stderr == ""
    else:
        toolkit.assert_one_line_error(result, script, *LACKS[module])
        assert result.stdout == ""


def test_a_broken_package_or_our_own_mistake_keeps_its_traceback():
    for name in ("numpy.core", "absl", "utilities", None):
        with pytest.raises(ModuleNotFoundError), utils.quiet_tensorflow():
            raise ModuleNotFoundError(name, name=name)


def test_too_little_memory_for_tensorflow_is_one_line():
    """Its import might hang, or end in a traceback."""
    shell = f"ulimit -v 1500000; {shlex.join(toolkit.command('train.py', None, '--help'))}"
    result = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, timeout=toolkit.PATIENCE
    )
    toolkit.assert_one_line_error(result, "train.py", "more memory than `ulimit -v` allows")


def test_every_module_can_be_read_by_an_older_python():
    """Else a syntax error comes before the line that says which Python is needed."""
    for path in sorted(toolkit.ROOT.glob("*.py")):
        ast.parse(path.read_text(), feature_version=(3, 9))


def test_every_script_imports_utils_before_the_packages():
    for script in SCRIPTS:
        text = (toolkit.ROOT / script).read_text()
        packages = re.search(r"^\s*(import|from) (numpy|PIL|tensorflow)", text, re.MULTILINE)
        ours = re.search(r"^import utils\b", text, re.MULTILINE)
        assert ours.start() < packages.start(), script


# --- output that nobody takes -----------------------------------------------------------------

NOWHERE = {"a full disk": ">/dev/full 2>&1", "closed": ">&- 2>&-", "all closed": "<&- >&- 2>&-"}
"""Redirections of a shell."""


def status_in_shell(redirection: str, command: list[str]) -> int:
    return subprocess.run(["bash", "-c", f"{shlex.join(command)} {redirection}"]).returncode


def status_of_closed_pipe(command: list[str]) -> int:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(command, stdout=writing, stderr=writing).returncode
    finally:
        os.close(writing)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_that_nobody_reads_is_no_error(script):
    command = toolkit.command(script, None, "--help")
    assert status_in_shell(">/dev/full 2>&-", command) == 0
    if script in WITHOUT_TENSORFLOW:  # the others take their time
        assert {status_in_shell(shell, command) for shell in NOWHERE.values()} == {0}
        assert status_of_closed_pipe(command) == 0


def test_work_is_done_whatever_becomes_of_the_output(config, tmp_path):
    command = toolkit.command("preprocess.py", config, "--shorter_side=256")
    folder = tmp_path / "preprocessed"
    runs = {name: partial(status_in_shell, shell) for name, shell in NOWHERE.items()}
    for name, run in {**runs, "a closed pipe": status_of_closed_pipe}.items():
        shutil.rmtree(folder, ignore_errors=True)
        assert run(command) == 0, name
        copies = list((folder / "256").rglob("*.JPEG"))
        assert len(copies) == 40, name
        for path in copies:  # no message among the pictures
            assert path.read_bytes()[:2] == b"\xff\xd8" and path.read_bytes()[-2:] == b"\xff\xd9"


def test_an_error_that_nobody_reads_keeps_its_status(tmp_path):
    command = toolkit.command("preprocess.py", tmp_path / "nope.txt", "--shorter_side=256")
    assert {status_in_shell(shell, command) for shell in NOWHERE.values()} == {2}
    assert status_of_closed_pipe(command) == 2


def test_a_closed_stream_is_nobody_elses(tmp_path):
    """The next file to be opened would get its number, and what libraries say would go into it."""
    code = "import os, utils; os._exit(os.open(os.devnull, os.O_RDONLY))"
    shell = f"cd {shlex.quote(str(toolkit.ROOT))}; {shlex.join([sys.executable, '-c', code])}"
    for redirection in NOWHERE.values():
        number = subprocess.run(["bash", "-c", f"{shell} {redirection}"]).returncode
        assert number > 2, redirection
