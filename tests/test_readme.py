"""README.md: its commands have flags that exist, its paths and function names are there.

python3 -m pytest tests/test_readme.py
"""

import ast
import re
import shlex
import subprocess
import sys

import toolkit

import pytest

README = (toolkit.ROOT / "README.md").read_text()
SCRIPTS = sorted(path.name for path in toolkit.ROOT.glob("*.py"))
MADE_BY_COMMANDS = {"saved_models", "nette_prepared", "mine", "imagenette2-320"}


def functions(module: str) -> set[str]:
    """The functions, classes and methods of a module: `f`, `C`, `C.f`."""
    found = set()
    for node in ast.parse((toolkit.ROOT / module).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{each.name}"
                for each in node.body
                if isinstance(each, ast.FunctionDef)
            }
    return found


def test_the_walk_of_a_batch_names_functions_where_they_stand():
    walk = README.partition("The walk of a batch")[2].partition("The same seed")[0]
    module, found = "", []
    where = {1: "preprocess.py", 10: "check_accuracy.py"} | dict.fromkeys(range(7, 10), "train.py")
    for step in re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]:
        number = len(found) + 1
        module = where.get(number, "runtime_preprocessing.py")
        names = [name for name in re.findall(r"`([\w.]+)`", step) if "npy" not in name]
        for name in names:
            name = name.removeprefix(module.removesuffix("py"))
            known = functions(module) | functions("train.py")
            assert name in known or f"Trainer.{name}" in known, (module, name)
        found.append(names)
    assert len(found) == 10 and all(found)


def commands() -> list[list[str]]:
    """All commands of the README that run a script of ours, as words."""
    text = README.replace("\\;", " ; ")
    quoted = re.findall(r"'(python3 [^']*)'", text)
    plain = re.findall(r"^ *(?:t\(\) \{ )?(python3 \w[\w/]*\.py .*?)(?: \"\$@\"; \})?$", text, re.M)
    inline = re.findall(r"`(python3 \w+\.py[^`]*)`", text)
    return [shlex.split(line) for line in [*quoted, *plain, *inline]]


def test_the_commands_use_flags_that_exist():
    helps = {
        script: subprocess.run(
            toolkit.command(script, None, "--help"), capture_output=True, text=True
        ).stdout
        for script in SCRIPTS
        if script not in ("utils.py", "batch_renorm.py")
    }
    found = commands()
    assert len(found) > 15
    for _, script, *arguments in found:
        for argument in arguments:
            if argument.startswith("--") and script in helps:
                assert argument.partition("=")[0] in helps[script].split(), (script, argument)


def test_the_files_that_are_named_exist():
    named = set(re.findall(r"[(`]((?:tests/)[\w/.]+)[)`]", README))
    named |= {f"tests/{path}" for path in re.findall(r"tests/([\w/]+\.py)", README)}
    assert named and all((toolkit.ROOT / path).exists() for path in named)
    for script in set(re.findall(r"`(\w+\.py)`", README)):
        assert script in SCRIPTS, script


def test_the_settings_for_imagenette_are_what_the_text_says(tmp_path):
    import utils

    line = next(line for line in README.splitlines() if line.startswith("sed "))
    command = line.replace(" config.txt > nette.txt", f" config.txt > {tmp_path}/nette.txt")
    subprocess.run(command, shell=True, check=True, cwd=toolkit.ROOT)
    config = utils.load_config(tmp_path / "nette.txt")
    assert config.preprocess.ImageNet_folder == tmp_path / "imagenette2-320"
    assert config.preprocess.path_to_save == config.get_mu_sigma.path_to_save
    assert (config.preprocess.N, config.train.N, config.train.buffer_size) == (0, 0, 50)
    assert config.batch_renorm.start_relaxing_rmax == utils.Epochs(1)
    assert config.batch_renorm.reach_dmax_max == utils.Epochs(3)


STATUSES = {"ends well": [0], "is killed twice": [137, 137, 0], "must be mended": [130, 2]}


@pytest.mark.parametrize("name", STATUSES)
def test_the_restart_loop_ends_when_it_should(name, tmp_path):
    """With a stand-in for train.py, which ends with one status after the other."""
    loop = re.search(r"^ *t\(\) \{ .*\n *t; while .*$", README, re.MULTILINE)[0]
    (tmp_path / "train.py").write_text(
        "import pathlib, sys\n"
        "log = pathlib.Path('calls'); calls = log.read_text() if log.exists() else ''\n"
        "log.write_text(calls + ' '.join(sys.argv[1:]) + '\\n')\n"
        f"sys.exit({STATUSES[name]}[calls.count(chr(10))])\n"
    )
    loop = loop.replace("sleep 10", "sleep 0").replace("python3", sys.executable)
    for shell in ("bash", "sh"):
        (tmp_path / "calls").unlink(missing_ok=True)
        subprocess.run([shell, "-c", loop], cwd=tmp_path, timeout=60)
        calls = (tmp_path / "calls").read_text().splitlines()
        assert len(calls) == len(STATUSES[name])
        assert ["--resume" in call for call in calls] == [False] + [True] * (len(calls) - 1)
