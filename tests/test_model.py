"""The saved model: against Keras's layers and Pillow, as others call it, and from the command line.

python3 -m pytest tests/test_model.py
"""

import io
import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, features

import import_torchvision
import preprocess_val
import resnet50
from preprocess import decode
from resnet50 import ResNet50, export_model, load_model, load_signature, model_recipe, read_weights
from test_resnet50 import BLOCKS, EPSILON, keras_resnet50, pour, random_network

NAMES = ["tabby", "tiger cat", "line\nbreak", "Käse", "lone \udcff byte", "f", "g"]
WRITTEN = ["tabby", "tiger cat", "line\\nbreak", "Käse", "lone \\udcff byte", "f", "g"]
MU, SIGMA = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
RECIPE = {"mu": MU, "sigma": SIGMA, "step": 12, "lr_drop_epochs": (3, 4)}
SPEC = SimpleNamespace(class_names=NAMES, mu=MU, sigma=SIGMA)


def trained_network(classes: int, seed: int = 0) -> ResNet50:
    """A random network whose probabilities depend on the picture, and are neither 0 nor 1."""
    network = random_network(classes, seed)
    pooled = network.features(((random_crops(8) / 255 - MU) / SIGMA).astype(np.float32))
    between_pictures = tf.reduce_mean(tf.math.reduce_std(pooled, 0))
    network.dense_kernel.assign(network.dense_kernel / between_pictures)
    network.dense_bias.assign(-tf.reduce_mean(pooled @ network.dense_kernel, 0))
    return network


@pytest.fixture(scope="module")
def network() -> ResNet50:
    return trained_network(len(NAMES))


@pytest.fixture(scope="module")
def run(network, tmp_path_factory) -> Path:
    """The folder of a run that has models of the epochs 2 and 10. Read only."""
    folder = tmp_path_factory.mktemp("saved_models") / "mytestrun"
    export_model(trained_network(3, seed=5), folder / "2", ["a", "b", "c"], RECIPE)
    export_model(network, folder / "10", NAMES, RECIPE)
    return folder


@pytest.fixture(scope="module")
def model(run) -> Path:
    return run / "10"


def random_crops(n: int) -> np.ndarray:
    """uint8 [n, 224, 224, 3]: the coarse patches make pictures that differ."""
    draw = np.random.default_rng(1)
    coarse = draw.integers(0, 192, (n, 7, 7, 3)).repeat(32, 1).repeat(32, 2)
    return (coarse + draw.integers(0, 64, (n, 224, 224, 3))).astype(np.uint8)


# --- what it computes -------------------------------------------------------------------------


def saved_variables(model: Path) -> SimpleNamespace:
    """The variables in the checkpoint of a saved model, by the names that `pour` knows."""
    reader = tf.train.load_checkpoint(str(model / "variables" / "variables"))
    blocks = [f"stage{s}_block{b}" for s, n in enumerate(BLOCKS, 1) for b in range(1, n + 1)]
    variables = []
    for key in reader.get_variable_to_shape_map():
        name, found, _ = key.partition("/.ATTRIBUTES/VARIABLE_VALUE")
        if not found or not name.startswith("network/"):
            continue
        name = name.removeprefix("network/")
        if name.startswith("blocks/"):
            _, index, rest = name.split("/", 2)
            name = f"{blocks[int(index)]}/{rest}"
        variables.append(tf.Variable(reader.get_tensor(key), name=f"resnet50/{name}"))
    return SimpleNamespace(variables=variables)


def test_the_saved_model_computes_what_keras_layers_do_with_its_variables(model):
    """Normalisation and softmax are NumPy's."""
    import keras

    variables, crops = saved_variables(model), random_crops(4)
    reference = keras_resnet50(len(NAMES))
    assert len(variables.variables) == len(reference.variables)
    pour(variables, reference)
    pooled = keras.Model(reference.inputs, reference.layers[-2].output)
    normalised = ((crops / 255 - MU) / SIGMA).astype(np.float32)
    logits = reference(normalised, training=False).numpy().astype(np.float64)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    assert (
        expected.max() < 0.99 and expected.std(0).max() > 0.01
    )  # else a model that looks at nothing would do
    classify, classes = load_model(model)
    assert classes == len(NAMES)
    probabilities = classify(images=tf.constant(crops))["probabilities"].numpy()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3)
    found = load_signature(model, "features")(images=tf.constant(crops))["features"].numpy()
    expected = pooled(normalised, training=False).numpy()
    assert (found.shape, found.dtype) == ((4, 2048), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.std())


@pytest.mark.parametrize("shape", [(1, 480, 320, 3), (2, 224, 223, 3), (1, 224, 224, 1)])
@pytest.mark.parametrize("signature", ["serving_default", "features"])
def test_crops_of_another_size_are_refused_by_the_served_function(model, signature, shape):
    function = load_signature(model, signature)
    with pytest.raises(tf.errors.InvalidArgumentError, match="224,224,3"):
        function(images=tf.zeros(shape, tf.uint8))


# --- picture files ----------------------------------------------------------------------------


def drawn(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A picture with soft and hard edges and fine grain."""
    draw = np.random.default_rng(size)
    coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 4), np.uint8), "RGBA")
    soft = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    soft[size[1] // 3 :, size[0] // 2 :] //= 3
    grain = draw.integers(-20, 21, soft.shape)
    image = Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURES = {
    "jpeg": encoded(drawn((500, 375)), "JPEG", quality=85),
    "portrait": encoded(drawn((333, 501)), "JPEG", quality=95, subsampling=0),
    "progressive": encoded(drawn((640, 411)), "JPEG", progressive=True),
    "large": encoded(drawn((1501, 1003)), "JPEG"),
    "small": encoded(drawn((100, 64)), "JPEG"),
    "long": encoded(drawn((1500, 90)), "JPEG"),
    "grey": encoded(drawn((400, 300), "L"), "JPEG"),
    "cmyk": encoded(drawn((300, 400), "CMYK"), "JPEG"),
    "png": encoded(drawn((400, 301)), "PNG"),
    "grey png": encoded(drawn((300, 300), "L"), "PNG"),
    "palette": encoded(drawn((350, 300)).quantize(64), "PNG"),
    "transparent": encoded(drawn((350, 300), "RGBA"), "PNG"),
}


def checkers_crop(content: bytes) -> np.ndarray:
    """The centre crop that check_accuracy.py evaluates: uint8 [224, 224, 3]."""
    return preprocess_val.ten_crops(decode(content))[8]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_files_centre_crop_is_the_checkers_within_a_level(name):
    crop = resnet50.centre_crop(tf.constant(PICTURES[name])).numpy().astype(int)
    difference = np.abs(crop - checkers_crop(PICTURES[name]))
    # A CMYK picture's colours are multiplied by the black in whole levels, in another order.
    assert difference.max() <= (2 if name == "cmyk" else 1)
    assert difference.mean() < 0.5
    assert resnet50.SHORTER_SIDE == preprocess_val.SHORTER_SIDE


def test_picture_files_get_names_and_probabilities_of_their_five_best_classes(model):
    """Files of several sizes and kinds at once. A random network magnifies a level's difference, so
    the crops here are those that the test above holds against the checker's.
    """
    contents = [PICTURES[name] for name in ("jpeg", "portrait", "grey", "png", "large")]
    classify, _ = load_model(model)
    crops = np.stack([resnet50.centre_crop(tf.constant(content)) for content in contents])
    expected = classify(images=tf.constant(crops))["probabilities"].numpy()
    best = load_signature(model, "jpeg")(contents=tf.constant(contents))
    labels = best["labels"].numpy()
    assert (labels.dtype, best["probabilities"].dtype) == (np.int32, tf.float32)
    found = best["probabilities"].numpy()
    assert found.shape == labels.shape == best["names"].shape == (5, 5)
    for row, its in enumerate(expected):
        np.testing.assert_allclose(found[row], np.sort(its)[::-1][:5], rtol=1e-3)
        np.testing.assert_allclose(found[row], its[labels[row]], rtol=1e-3)
        names = [name.decode() for name in best["names"][row].numpy()]
        assert names == [WRITTEN[label] for label in labels[row]]


def test_a_model_of_three_classes_names_three(run):
    best = load_signature(run / "2", "jpeg")(contents=tf.constant([PICTURES["png"]]))
    assert best["probabilities"].shape == (1, 3)
    assert sorted(best["names"][0].numpy()) == [b"a", b"b", b"c"]


# --- what lies beside the weights -------------------------------------------------------------


def test_a_model_holds_its_recipe_and_a_fingerprint_of_its_variables(network, model, run):
    recipe = model_recipe(model)
    values = b"".join(variable.numpy().tobytes() for variable in network.variables)
    assert recipe.pop("fingerprint") == f"{zlib.crc32(values):08x}"
    assert recipe == RECIPE | {"lr_drop_epochs": [3, 4]}
    assert model_recipe(run / "2")["fingerprint"] != model_recipe(model)["fingerprint"]
    assert model_recipe(run) == {}
    assert utils.read_lines(model / "assets" / "class_names.txt") == WRITTEN
    loaded = tf.saved_model.load(str(model))  # others find both without knowing the folder
    assert json.loads(tf.io.read_file(loaded.recipe.asset_path).numpy())["step"] == 12
    assert tf.io.read_file(loaded.class_names.asset_path).numpy().startswith(b"tabby\n")


def test_a_model_moved_elsewhere_without_its_training_state_serves(model, tmp_path):
    moved = tmp_path / "elsewhere"
    for path in [path for path in model.rglob("*") if path.is_file()]:
        target = moved / path.relative_to(model)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    crops = tf.constant(random_crops(2))
    found, expected = (load_model(each)[0](images=crops) for each in (moved, model))
    np.testing.assert_array_equal(found["probabilities"], expected["probabilities"])


# --- weights for another training -------------------------------------------------------------


def assert_same_variables(network: ResNet50, source: ResNet50, dense: bool) -> None:
    for variable, its in zip(network.variables, source.variables, strict=True):
        if dense or "dense" not in variable.name:
            np.testing.assert_array_equal(variable, its, variable.name)


def test_weights_of_the_same_classes_are_taken_over_whole(network, model, capsys):
    fresh = ResNet50(len(NAMES))
    line = read_weights(fresh, model, SPEC)
    assert line == f"initialised from {model} (7 classes); the dense layer is copied"
    assert_same_variables(fresh, network, dense=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [["x", "y"], [*NAMES[1:], NAMES[0]]])
def test_weights_for_other_classes_leave_the_dense_layer_new(network, model, names):
    """Of another number, or of the same in another order."""
    fresh = ResNet50(len(names))
    kernel, bias = fresh.dense_kernel.numpy(), fresh.dense_bias.numpy()
    line = read_weights(fresh, model, SimpleNamespace(class_names=names, mu=MU, sigma=SIGMA))
    assert line.endswith(f"(7 classes); the dense layer is new: {len(names)} classes")
    assert_same_variables(fresh, network, dense=False)
    np.testing.assert_array_equal(fresh.dense_kernel, kernel)
    np.testing.assert_array_equal(fresh.dense_bias, bias)


def test_weights_reach_every_replica_and_a_model_of_replicas_is_as_any(network, model, tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        mirrored = ResNet50(len(NAMES))
    read_weights(mirrored, model, SPEC)
    for variable, its in zip(mirrored.variables, network.variables, strict=True):
        for copy in strategy.experimental_local_results(variable):
            np.testing.assert_array_equal(copy, its, variable.name)
    export_model(mirrored, tmp_path / "0", NAMES, RECIPE)
    assert model_recipe(tmp_path / "0") == model_recipe(model)
    crops = tf.constant(random_crops(2))
    found, expected = (load_model(each)[0](images=crops) for each in (tmp_path / "0", model))
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], rtol=1e-4)


def test_weights_of_pixels_normalised_otherwise_are_warned_of(model, capsys):
    read_weights(ResNet50(2), model, SimpleNamespace(class_names=["x", "y"], mu=MU, sigma=[1] * 3))
    warning = capsys.readouterr().err
    assert f"sigma = {SIGMA}" in warning and "mu =" not in warning


def test_a_folder_that_is_no_model_of_the_toolkit_is_refused_in_a_line(run, tmp_path):
    cut, foreign = tmp_path / "cut", tmp_path / "foreign"
    (cut / "variables").mkdir(parents=True)
    for file in (run / "2" / "variables").iterdir():
        (cut / "variables" / file.name).write_bytes(file.read_bytes()[:100_000])
    module = tf.Module()
    module.weight = tf.Variable([1.0])
    tf.saved_model.save(module, str(foreign))
    for folder, words in (
        (tmp_path / "none", "there is no such folder"),
        (cut, "not a model"),
        (foreign, "no network of this toolkit"),
        (run, f"a run; name one of its epochs, such as {run / '10'}"),
    ):
        with pytest.raises(utils.UserError, match=str(folder)) as error:
            read_weights(ResNet50(2), folder, SPEC)
        assert words in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(utils.UserError, match=str(folder)):
            load_model(folder)


# --- torchvision's weights ----------------------------------------------------------------------


def torchvision_arrays(reference) -> dict[str, np.ndarray]:
    """The state_dict of torchvision's ResNet-50 that is the same network as a Keras one."""
    pairs = {"stem": ("conv1", "bn1")}
    for stage, count in enumerate(BLOCKS, 1):
        for block in range(count):
            ours, theirs = f"stage{stage}_block{block + 1}", f"layer{stage}.{block}"
            for i in "123":
                pairs[f"{ours}-conv{i}"] = (f"{theirs}.conv{i}", f"{theirs}.bn{i}")
            if block == 0:
                pairs[f"{ours}-shortcut"] = tuple(f"{theirs}.downsample.{i}" for i in "01")
    arrays = {}
    for layer, (convolution, norm) in pairs.items():
        kernel = reference.get_layer(layer).kernel.numpy()
        arrays[f"{convolution}.weight"] = np.einsum("hwio->oihw", kernel)
        its = reference.get_layer(f"{layer}-norm")
        arrays |= {f"{norm}.weight": its.gamma.numpy(), f"{norm}.bias": its.beta.numpy()}
        arrays[f"{norm}.running_mean"] = its.moving_mean.numpy()
        arrays[f"{norm}.running_var"] = its.moving_variance.numpy()
        arrays[f"{norm}.num_batches_tracked"] = np.int64(3)
    dense = reference.get_layer("dense")
    return arrays | {"fc.weight": dense.kernel.numpy().T, "fc.bias": dense.bias.numpy()}


@pytest.fixture(scope="module")
def theirs(network):
    """The network of Keras layers and its arrays as torchvision has them."""
    reference = keras_resnet50(len(NAMES))
    pour(network, reference)
    return reference, torchvision_arrays(reference)


def test_torchvisions_weights_become_a_model_of_the_same_function(theirs, tmp_path):
    reference, arrays = theirs
    file, model = tmp_path / "resnet50.npz", tmp_path / "runs" / "torchvision" / "0"
    names = [f"name {label}" for label in range(len(NAMES))]
    np.savez(file, class_names=names, **arrays)
    result = toolkit.run("tests/examples/import_torchvision.py", None, str(file), str(model))
    assert result.returncode == 0, result.stderr
    assert resnet50.class_names_of(model) == names
    crops = random_crops(3)
    normalised = (crops / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = tf.nn.softmax(reference(normalised.astype(np.float32), training=False)).numpy()
    assert expected.std(0).max() > 0.01
    probabilities = load_model(model)[0](images=tf.constant(crops))["probabilities"]
    np.testing.assert_allclose(probabilities, expected, rtol=2e-3)
    fresh = ResNet50(len(NAMES))
    line = read_weights(fresh, model, SPEC)
    assert line.endswith("(7 classes); the dense layer is new: 7 classes")
    its = fresh.blocks[-1].conv3.norm
    norm = reference.get_layer("stage4_block3-conv3-norm")
    np.testing.assert_allclose(its.moving_std**2 - EPSILON, norm.moving_variance, rtol=1e-5)


def test_arrays_that_are_no_resnet50_are_refused_in_a_line(theirs, network):
    _, arrays = theirs
    import_torchvision.pour(arrays, network)
    lacking = {name: array for name, array in arrays.items() if name != "layer3.5.bn2.weight"}
    with pytest.raises(KeyError, match="layer3.5.bn2.weight is missing"):
        import_torchvision.pour(lacking, network)
    with pytest.raises(ValueError, match="layer3.6.conv1.weight is left over"):
        import_torchvision.pour(arrays | {"layer3.6.conv1.weight": np.zeros(3)}, network)
    with pytest.raises(ValueError, match="fc.bias has another shape"):
        import_torchvision.pour(arrays | {"fc.bias": np.zeros(3)}, network)


def test_an_import_that_cannot_be_done_is_refused_in_a_line(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: None)
    weights, names, target = tmp_path / "w.npz", tmp_path / "names.txt", tmp_path / "runs" / "0"
    names.write_text("only\ntwo\n")
    np.savez(weights, **theirs[1])
    there = tmp_path / "there"
    there.mkdir()
    for words, *arguments in (
        (
            "names.txt: has 2 names, but there are 7 classes",
            weights,
            target,
            "--class_names",
            names,
        ),
        ("names.txt: not an .npz file", names, target),
        ("gone.npz: no such file", tmp_path / "gone.npz", target),
        ("there: is there already", weights, there),
    ):
        monkeypatch.setattr("sys.argv", ["import_torchvision.py", *map(str, arguments)])
        with pytest.raises(utils.UserError, match=words):
            import_torchvision.main()
    assert not target.parent.exists()


# --- the command line ---------------------------------------------------------------------------


def seen(line: str) -> list[tuple[float, str]]:
    """Percentages and names of "cat.jpg: 93.1% tabby, 4.0% tiger cat"."""
    parts = [part.split("% ", 1) for part in line.partition(": ")[2].split(", ")]
    return [(float(share), name) for share, name in parts]


def test_a_prediction_leaves_the_gpu_to_training(model, tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *chosen: told.append(chosen))
    (tmp_path / "some.jpg").write_bytes(PICTURES["jpeg"])
    monkeypatch.setattr(sys, "argv", ["resnet50.py", str(model), str(tmp_path / "some.jpg")])
    resnet50.main()
    assert told == [([], "GPU")] and "%" in capsys.readouterr().out


def test_a_picture_gets_a_line_of_its_five_best_classes(model, tmp_path):
    """Also one of a format that TensorFlow does not read; one that is no picture is named."""
    (tmp_path / "some.jpg").write_bytes(PICTURES["jpeg"])
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    (tmp_path / "cut.jpg").write_bytes(PICTURES["jpeg"][:5000])
    with Image.open(io.BytesIO(PICTURES["jpeg"])) as image:
        other = "other.webp" if features.check("webp") else "other.tiff"
        image.save(tmp_path / other, **{"lossless": True} if other == "other.webp" else {})
    files = [
        str(tmp_path / name) for name in ("none.jpg", "some.jpg", "cut.jpg", "gone.jpg", other)
    ]
    result = toolkit.run("resnet50.py", None, str(model), *files)
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [files[1], files[4]]
    best = load_signature(model, "jpeg")(contents=tf.constant([PICTURES["jpeg"]]))
    for line in lines:
        shares, names = zip(*seen(line), strict=True)
        np.testing.assert_allclose(shares, 100 * best["probabilities"][0], atol=0.06)
        assert list(names) == [name.decode() for name in best["names"][0].numpy()]
    *warnings, error = result.stderr.splitlines()
    assert len(warnings) == 3
    for file, warning in zip((files[0], files[2], files[3]), warnings, strict=True):
        assert warning.startswith(f"resnet50.py: warning: {file}: cannot be read: ")
    assert warnings[2].endswith("No such file or directory")
    assert error == (
        "resnet50.py: error: 3 of 5 pictures could not be read; see the warnings above"
    )


def test_a_run_or_its_name_stands_for_its_newest_epoch(run, tmp_path):
    nowhere = tmp_path / "no config.txt"
    assert resnet50.find_model(run, nowhere) == run / "10"
    assert resnet50.find_model(run / "2", nowhere) == run / "2"
    settings = toolkit.write_config(
        tmp_path, tmp_path, tmp_path, train__path_for_saving=str(run.parent)
    )
    assert resnet50.find_model(Path("mytestrun"), settings) == run / "10"
    for given, file in ((Path("mistyped"), settings), (Path("mytestrun"), nowhere)):
        with pytest.raises(utils.UserError, match=f"{given}: no such folder"):
            resnet50.find_model(given, file)
