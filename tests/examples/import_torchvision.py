"""Turns torchvision's ResNet-50 weights into a saved model, for `train.py --init_from`.

    python3 tests/examples/import_torchvision.py resnet50.npz saved_models/torchvision/0

Where torchvision is installed, these lines make the first file; PyTorch is not needed afterwards:

    import numpy as np, torchvision
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    arrays = torchvision.models.resnet50(weights=weights).state_dict()
    arrays = {name: array.numpy() for name, array in arrays.items()}
    np.savez("resnet50.npz", class_names=weights.meta["categories"], **arrays)

The model computes what torchvision's does, and resnet50.py and check_accuracy.py take it as any
other. torchvision normalises with a mean and deviation of its own; they go into the model.
"""

import argparse
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toolkit  # noqa: F401  (puts the scripts on the path)
import utils
from utils import UserError

import numpy as np

with utils.quiet_tensorflow():
    import tensorflow as tf

    from batch_renorm import EPSILON
    from resnet50 import ModelRecipe, ResNet50, export_model

MU, SIGMA = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of torchvision's `transforms.Normalize`."""

NORM = {
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_std": "running_var",
}  # fmt: skip


def main() -> None:
    args = parse_arguments()
    if args.folder.exists():
        raise UserError(f"{args.folder}: is there already; remove it, or name another folder")
    tf.config.set_visible_devices([], "GPU")
    arrays = read_arrays(args.weights)
    if "fc.bias" not in arrays:
        raise UserError(f"{args.weights}: has no fc.bias; it holds no ResNet-50 of torchvision")
    classes = len(arrays["fc.bias"])
    names = arrays.get("class_names", range(classes))
    if args.class_names:
        names = args.class_names.read_text(encoding="utf-8").splitlines()
    if len(names) != classes:
        where = args.class_names or args.weights
        raise UserError(f"{where}: has {len(names):,} names, but there are {classes:,} classes")
    network = ResNet50(classes)
    try:
        pour(arrays, network)
    except (KeyError, ValueError) as error:
        raise UserError(f"{args.weights}: no ResNet-50 of torchvision: {error.args[0]}") from None
    utils.make_folder(args.folder.parent)
    with utils.folder_written_aside(args.folder) as aside:
        source = {"source": f"torchvision, {args.weights.name}"}
        recipe = ModelRecipe([str(name) for name in names], MU, SIGMA, source)
        export_model(network, aside, recipe)
    print(
        f"wrote {args.folder} ({utils.plural(classes, 'class')}). Next: train.py with "
        f"--init_from={args.folder}, and in [utils] of config.txt mu = {MU}, sigma = {SIGMA}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = utils.Parser(
        __doc__,
        "tests/examples/import_torchvision.py resnet50.npz saved_models/torchvision/0",
    )
    add = parser.add_argument
    add("weights", type=Path, metavar="NPZ", help="the state_dict as .npz; see this file's start")
    add("folder", type=Path, metavar="FOLDER", help="the saved model to write")
    names = "a file with a class name per line"
    parser.add("--class_names", Path, names)
    return parser.parse()


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Raises UserError for what is no .npz file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; --help says how it is made") from None
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError):
        raise UserError(f"{file}: not an .npz file of arrays; --help says how it is made") from None


def pour(arrays: dict[str, np.ndarray], network: ResNet50) -> None:
    """Gives the network the weights of torchvision's state_dict.

    Raises KeyError or ValueError where one is missing, has another shape, or is left over.
    """
    left = {name for name in arrays if name.endswith(("weight", "bias", "mean", "var"))}
    for variable in network.variables:
        name = their_name(variable.name)
        if name not in arrays:
            raise KeyError(f"{name} is missing")
        value = np.asarray(arrays[name], np.float32)
        if value.ndim == 4:  # outputs, inputs, height, width
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        if name.endswith("running_var"):
            value = np.sqrt(value + EPSILON)
        if value.shape != variable.shape:
            raise ValueError(f"{name} has another shape")
        variable.assign(value)
        left.remove(name)
    if left:
        raise ValueError(f"{min(left)} is left over")


def their_name(ours: str) -> str:
    """resnet50/stage2_block1/conv3/norm/gamma:0 is layer2.0.bn3.weight in torchvision."""
    path = ours.removeprefix("resnet50/").removesuffix(":0")
    if path.startswith("dense_"):
        return {"dense_kernel": "fc.weight", "dense_bias": "fc.bias"}[path]
    *block, convolution, attribute = path.replace("/norm/", "/").split("/")
    number = {"stem": "1", "shortcut": ""}.get(convolution, convolution[-1])
    if convolution == "shortcut":
        layer = "downsample.0" if attribute == "kernel" else "downsample.1"
    else:
        layer = f"conv{number}" if attribute == "kernel" else f"bn{number}"
    if block:
        stage, index = map(int, re.findall(r"\d+", block[0]))
        layer = f"layer{stage}.{index - 1}.{layer}"
    return f"{layer}.{NORM.get(attribute, 'weight')}"


if __name__ == "__main__":
    utils.run(main)
