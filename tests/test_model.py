"""The saved model: against Keras's layers and Pillow, as others call it, and from the command line.

python3 -m pytest tests/test_model.py
"""

import csv
import functools
import io
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import toolkit
import utils

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import import_torchvision
import preprocess_val
import resnet50
from preprocess import decode
from resnet50 import ModelRecipe, ResNet50, export_model, load_model, model_recipe, read_weights
from test_resnet50 import BLOCKS, EPSILON, keras_resnet50, pour, random_network

NAMES = ["a\nb", "tiger cat", "line\nbreak", "Käse", "lone \udcff byte", "\x1b]0;owned\x07", "g\n"]
IN_GRAPH = [*NAMES[:4], "lone \\udcff byte", *NAMES[5:]]
PRINTED = ["a\\nb", "tiger cat", "line\\nbreak", "Käse", IN_GRAPH[4], "\\x1b]0;owned\\x07", "g\\n"]
"""Three have a line break: so has one of any five."""
MU, SIGMA = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def recipe(names: list[str]) -> ModelRecipe:
    return ModelRecipe(names, MU, SIGMA, {"lr_drop_epochs": [3, 4]}, step=12)


loaded = functools.cache(lambda model: tf.saved_model.load(str(model)))


def signature(model: Path, name: str):
    """As others use it: TensorFlow's own."""
    return loaded(model).signatures[name]


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
    export_model(trained_network(3, seed=5), folder / "2", recipe(["a", "b", "c"]))
    export_model(network, folder / "10", recipe(NAMES))
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
    classify, its = load_model(model)
    assert its.class_names == NAMES
    probabilities = classify(images=tf.constant(crops))["probabilities"].numpy()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3)
    found = signature(model, "features")(images=tf.constant(crops))["features"].numpy()
    expected = pooled(normalised, training=False).numpy()
    assert (found.shape, found.dtype) == ((4, 2048), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.std())


@pytest.mark.parametrize("shape", [(1, 480, 320, 3), (2, 224, 223, 3), (1, 224, 224, 1)])
@pytest.mark.parametrize("name", ["serving_default", "features"])
def test_crops_of_another_size_are_refused_by_the_served_function(model, name, shape):
    function = signature(model, name)
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


ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


def without_adobe(content: bytes) -> bytes:
    """The same CMYK picture, as Pillow and other decoders see it, without Adobe's segment."""
    assert content.count(ADOBE) == 1
    return content.replace(ADOBE, b"")


def deep_grey(size: tuple[int, int], kind: str) -> bytes:
    """Grey of 16 bits, no two neighbours alike in their lower 8."""
    grey = np.asarray(drawn(size, "L")).astype(np.uint16)
    return encoded(Image.fromarray(grey * 256 + np.arange(size[0], dtype=np.uint16) % 251), kind)


def transparent_gif() -> bytes:
    """A GIF with holes, smaller than what it says that the screen is."""
    image = drawn((330, 300)).quantize(32)
    content = bytearray(encoded(image, "GIF", transparency=3))
    content[6:10] = (400).to_bytes(2, "little") + (320).to_bytes(2, "little")
    return bytes(content)


PICTURES = {
    "jpeg": encoded(drawn((500, 375)), "JPEG", quality=85),
    "portrait": encoded(drawn((333, 501)), "JPEG", quality=95, subsampling=0),
    "progressive": encoded(drawn((640, 411)), "JPEG", progressive=True),
    "large": encoded(drawn((1501, 1003)), "JPEG"),
    "small": encoded(drawn((100, 64)), "JPEG"),
    "long": encoded(drawn((1500, 90)), "JPEG"),
    "grey": encoded(drawn((400, 300), "L"), "JPEG"),
    "cmyk": encoded(drawn((300, 400), "CMYK"), "JPEG"),
    "cmyk without a mark": without_adobe(encoded(drawn((300, 400), "CMYK"), "JPEG")),
    "png": encoded(drawn((400, 301)), "PNG"),
    "16 bits": deep_grey((320, 300), "PNG"),
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
    assert difference.max() <= (2 if name.startswith("cmyk") else 1)
    assert difference.mean() < 0.5


OTHERS = {
    "transparent.gif": transparent_gif(),
    "grey16.tif": deep_grey((320, 300), "TIFF"),
    "picture.bmp": encoded(drawn((300, 280)), "BMP"),
    "picture.ppm": encoded(drawn((300, 280)), "PPM"),
}


@pytest.mark.parametrize("content", [*OTHERS.values(), b"", b"\xff", b"no picture"])
def test_picture_files_that_are_neither_jpeg_nor_png_are_refused(model, content):
    with pytest.raises(tf.errors.InvalidArgumentError, match="not JPEG or PNG"):
        signature(model, "jpeg")(contents=tf.constant([PICTURES["jpeg"], content]))


def test_picture_files_get_names_and_probabilities_of_their_five_best_classes(model):
    """Files of several sizes and kinds at once. A random network magnifies a level's difference, so
    the crops here are those that the test above holds against the checker's.
    """
    contents = [PICTURES[name] for name in ("jpeg", "portrait", "grey", "png", "large")]
    classify = signature(model, "serving_default")
    crops = np.stack([resnet50.centre_crop(tf.constant(content)) for content in contents])
    expected = classify(images=tf.constant(crops))["probabilities"].numpy()
    best = signature(model, "jpeg")(contents=tf.constant(contents))
    labels = best["labels"].numpy()
    assert (labels.dtype, best["probabilities"].dtype) == (np.int32, tf.float32)
    found = best["probabilities"].numpy()
    assert found.shape == labels.shape == best["names"].shape == (5, 5)
    for row, its in enumerate(expected):
        np.testing.assert_allclose(found[row], np.sort(its)[::-1][:5], rtol=1e-3)
        np.testing.assert_allclose(found[row], its[labels[row]], rtol=1e-3)
        names = [name.decode() for name in best["names"][row].numpy()]
        assert names == [IN_GRAPH[label] for label in labels[row]]


def test_a_model_of_three_classes_names_three(run):
    best = signature(run / "2", "jpeg")(contents=tf.constant([PICTURES["png"]]))
    assert best["probabilities"].shape == (1, 3)
    assert sorted(best["names"][0].numpy()) == [b"a", b"b", b"c"]


# --- what lies beside the weights -------------------------------------------------------------


def test_a_model_holds_its_recipe_and_a_fingerprint_of_its_variables(network, model, run):
    found, given = model_recipe(model), recipe(NAMES)
    values = b"".join(variable.numpy().tobytes() for variable in network.variables)
    given.fingerprint = f"{zlib.crc32(values):08x}"
    assert found == given
    assert model_recipe(run / "2").fingerprint != found.fingerprint


def test_a_model_is_saved_where_temporary_files_cannot_be(tmp_path, monkeypatch):
    """Logouts remove TMPDIR, and Python's tempfile remembers where it was."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    export_model(ResNet50(2), tmp_path / "0", recipe(["a", "b"]))
    assert load_model(tmp_path / "0")[1].class_names == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


SCALES = '"mu": [0.5, 0.5, 0.5], "sigma": [0.5, 0.5, 0.5]'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"mu": [1, 1, 1], "sigma": [1, 1, 1], "step": 3}', "class_names is missing"),  # of old
        ("[" * 10**5, "recursion"),
        ("null", "no JSON object"),
        ('{"class_names": "ab", "mu": [], "sigma": [], "flags": {}}', "class_names is"),
        ('{"class_names": ["a", 3], "mu": [], "sigma": [], "flags": {}}', "class_names is"),
        ('{"class_names": ["a"], "mu": [NaN], "sigma": [], "flags": {}}', "mu is"),
        ('{"class_names": ["a", "b"], "mu": [], "sigma": [], "flags": {}}', "must be those of a"),
        (f'{{"class_names": ["a", "b"], {SCALES}, "flags": {{}}}}', "names 2 classes"),
        (f'{{"class_names": ["a"], {SCALES}, "flags": {{}}, "step": {10**30}}}', "no training has"),
    ],
)
def test_a_recipe_that_is_none_is_refused_in_a_line(run, tmp_path, content, words):
    model = tmp_path / "model"
    (model / "assets").mkdir(parents=True)
    for name in ("saved_model.pb", "variables"):
        (model / name).symlink_to(run / "2" / name)
    (model / "assets" / "recipe.json").write_text(content)
    with pytest.raises(utils.UserError) as error:
        load_model(model)
    assert words in str(error.value) and str(model) in str(error.value)


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
    line = read_weights(fresh, model, NAMES, MU, SIGMA)
    assert line == f"initialised from {model} (7 classes); the dense layer is copied"
    assert_same_variables(fresh, network, dense=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [["x", "y"], [*NAMES[1:], NAMES[0]]])
def test_weights_for_other_classes_leave_the_dense_layer_new(network, model, names):
    """Of another number, or of the same in another order."""
    fresh = ResNet50(len(names))
    kernel, bias = fresh.dense_kernel.numpy(), fresh.dense_bias.numpy()
    line = read_weights(fresh, model, names, MU, SIGMA)
    assert line.endswith(f"(7 classes); the dense layer is new: {len(names)} classes")
    assert_same_variables(fresh, network, dense=False)
    np.testing.assert_array_equal(fresh.dense_kernel, kernel)
    np.testing.assert_array_equal(fresh.dense_bias, bias)


def test_weights_reach_every_replica_and_a_model_of_replicas_is_as_any(network, model, tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        mirrored = ResNet50(len(NAMES))
    read_weights(mirrored, model, NAMES, MU, SIGMA)
    for variable, its in zip(mirrored.variables, network.variables, strict=True):
        for copy in strategy.experimental_local_results(variable):
            np.testing.assert_array_equal(copy, its, variable.name)
    export_model(mirrored, tmp_path / "0", recipe(NAMES))
    assert model_recipe(tmp_path / "0") == model_recipe(model)
    crops = tf.constant(random_crops(2))
    found, expected = (load_model(each)[0](images=crops) for each in (tmp_path / "0", model))
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], rtol=1e-4)


def test_weights_of_pixels_normalised_otherwise_are_warned_of(model, capsys):
    read_weights(ResNet50(2), model, ["x", "y"], MU, [1.0] * 3)
    warning = capsys.readouterr().err
    assert f"sigma = {SIGMA}" in warning and "mu =" not in warning


def test_a_folder_that_is_no_model_of_the_toolkit_is_refused_in_a_line(run, tmp_path):
    foreign = tmp_path / "foreign"
    module = tf.Module()
    module.weight = tf.Variable([1.0])
    tf.saved_model.save(module, str(foreign))
    cut = {}
    for name in ("saved_model.pb", "variables/variables.index", "variables/variables.data-00000"):
        cut[name] = tmp_path / name.replace("/", "-")
        shutil.copytree(run / "2", cut[name])
        (file,) = cut[name].glob(f"{name}*")
        file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "empty", "it is not complete"),
        (foreign, "it is not complete"),
        (run, f"it is a run; name one of its epochs, such as {run / '10'}"),
        *((folder, "the model is damaged: ") for folder in cut.values()),
    ):
        refusals = []
        if folder != cut["saved_model.pb"]:  # for its variables alone the graph is not needed
            with pytest.raises(utils.UserError) as error:
                read_weights(ResNet50(2), folder, NAMES, MU, SIGMA)
            refusals.append(str(error.value))
        with pytest.raises(utils.UserError) as error:
            load_model(folder)
        for refusal in (*refusals, str(error.value)):
            assert refusal.startswith(f"{folder}: ") and words in refusal


@pytest.mark.parametrize("name", ["fingerprint.pb", "variables/variables.index"])
def test_a_pipe_in_a_model_is_refused(name, run, tmp_path):
    """TensorFlow would wait for ever for its content."""
    model = tmp_path / "model"
    shutil.copytree(run / "2", model)
    toolkit.make_pipe(model / name)
    with pytest.raises(utils.UserError, match=f"damaged: {Path(name).name} is not a file"):
        load_model(model)


# --- the run's folder ---------------------------------------------------------------------------


def test_only_folders_of_models_are_epochs(tmp_path):
    assert resnet50.epochs_in(tmp_path / "gone") == []
    for name in ("3", "20", "0", "007", "20260101", "1", "state_2_1", "²"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").write_bytes(b"content")
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "30").mkdir()
    (tmp_path / "31").write_text("a file")
    (tmp_path / "32").symlink_to("nowhere")
    assert resnet50.epochs_in(tmp_path) == [0, 3, 20]
    assert resnet50.epochs_in(tmp_path / "31") == []


def cells(columns: dict, **changes: str) -> str:
    """A table of these columns with a row of ones, but for some cells."""
    return f"{','.join(columns)}\n{','.join(changes.get(name, '1') for name in columns)}\n"


@pytest.mark.parametrize(
    ("columns", "name", "read", "refused"),
    [
        ("LOG_COLUMNS", "step", {"7": 7}, ["", "1.5", "-1", "nan", "x"]),
        ("LOG_COLUMNS", "loss", {"7.5": 7.5, "1e-3": 0.001}, ["", "nan", "inf", "x"]),
        ("LOG_COLUMNS", "top1", {"0.5": 0.5}, ["", "1.5", "-0.1"]),
        ("LOG_COLUMNS", "gradient_norm", {"2": 2, "inf": np.inf}, ["", "x"]),
        ("ACCURACY_COLUMNS", "epoch", {"7": 7}, ["", "1.5", "inf"]),
        ("ACCURACY_COLUMNS", "step", {"7": 7, "": None}, ["x"]),
        ("ACCURACY_COLUMNS", "top1_10crop", {"0.25": 0.25, "": None}, ["nan", "x", "7"]),
        ("ACCURACY_COLUMNS", "top1_centre", {"0.25": 0.25}, ["", "nan", "x", "7"]),
        ("ACCURACY_COLUMNS", "model", {"12ab": "12ab"}, []),
    ],
)
def test_tables_are_read_in_their_types_and_ranges(columns, name, read, refused, tmp_path):
    file, columns = tmp_path / "table.csv", getattr(resnet50, columns)
    for cell, value in read.items():
        file.write_text(cells(columns, **{name: cell}))
        assert utils.read_csv(file, columns)[0][name] == value
    for cell in refused:
        file.write_text(cells(columns, **{name: cell}))
        with pytest.raises(utils.UserError, match="table.csv: line 2"):
            utils.read_csv(file, columns)


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
    assert model_recipe(model).class_names == names
    crops = random_crops(3)
    normalised = (crops / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = tf.nn.softmax(reference(normalised.astype(np.float32), training=False)).numpy()
    assert expected.std(0).max() > 0.01
    probabilities = load_model(model)[0](images=tf.constant(crops))["probabilities"]
    np.testing.assert_allclose(probabilities, expected, rtol=2e-3)
    fresh = ResNet50(len(NAMES))
    line = read_weights(fresh, model, NAMES, MU, SIGMA)
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
    parts = [part.split("% ", 1) for part in line.rpartition(": ")[2].split(", ")]
    return [(float(share), name) for share, name in parts]


def expected(model: Path, content: bytes) -> np.ndarray:
    """The probabilities for the crop that the checker evaluates: float32 [classes]."""
    crops = tf.constant(checkers_crop(content)[None])
    return signature(model, "serving_default")(images=crops)["probabilities"].numpy()[0]


def test_a_prediction_leaves_the_gpu_to_training(model, tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *chosen: told.append(chosen))
    (tmp_path / "some.jpg").write_bytes(PICTURES["jpeg"])
    monkeypatch.setattr(sys, "argv", ["resnet50.py", str(model), str(tmp_path / "some.jpg")])
    resnet50.main()
    assert told == [([], "GPU")] and "%" in capsys.readouterr().out


def test_a_picture_of_any_format_gets_a_line_of_its_five_best_classes(model, tmp_path):
    """Decoded as in training. Names are printable. What is no picture is named. Whatever Keras is
    said to be, and whether or not Python looks for modules beside the script.
    """
    contents = OTHERS | {"some.jpg": PICTURES["jpeg"], "cmyk.jpg": PICTURES["cmyk without a mark"]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    (tmp_path / "cut.jpg").write_bytes(PICTURES["jpeg"][:5000])
    names = ["none.jpg", *contents, "cut.jpg", "gone.jpg"]
    result = toolkit.run(
        "resnet50.py", None, str(model), *(str(tmp_path / name) for name in names),
        KERAS_BACKEND="torch", TF_USE_LEGACY_KERAS="1", PYTHONSAFEPATH="1",
    )  # fmt: skip
    assert result.returncode == 2
    lines = result.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / n) for n in contents]
    for line, content in zip(lines, contents.values(), strict=True):
        shares, found = zip(*seen(line), strict=True)
        probabilities = expected(model, content)
        np.testing.assert_allclose(shares, 100 * np.sort(probabilities)[::-1][:5], atol=0.06)
        assert list(found) == [PRINTED[label] for label in np.argsort(-probabilities)[:5]]
    *warnings, error = result.stderr.splitlines()
    assert len(warnings) == 3
    for name in ("none.jpg", "cut.jpg", "gone.jpg"):
        assert sum(f"warning: {tmp_path / name}: left out, " in each for each in warnings) == 1
    assert error == (
        "resnet50.py: error: 3 of 9 pictures could not be read; see the warnings above"
    )


@pytest.fixture
def folders(run, tmp_path) -> Path:
    """Folders of the classes a and b, one of them a link, and of others. The model of epoch 2 has
    the classes a, b and c.
    """
    root = tmp_path / "pictures"
    (root / "a" / "deeper").mkdir(parents=True)
    (root / "elsewhere").mkdir()
    (tmp_path / "b").mkdir()
    (root / "b").symlink_to(tmp_path / "b")
    for i, content in enumerate(PICTURES.values()):
        place = ("a", "a/deeper", "b", "elsewhere")[i % 4]
        (root / place / f"{i}, {place[0]}.jpg").write_bytes(content)
    (root / "a" / "readme.txt").write_text("no picture")
    (root / "a" / "._0.jpg").write_text("no picture")
    return root


def test_folders_named_like_classes_are_evaluated_and_a_table_is_written(run, folders, tmp_path):
    model, table = run / "2", tmp_path / "table.csv"
    result = toolkit.run("resnet50.py", None, str(model), f"--csv={table}", str(folders))
    assert result.returncode == 0, result.stderr
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    files = sorted(path for path in folders.rglob("*, *.jpg")) + sorted((folders / "b").iterdir())
    assert sorted(row["path"] for row in rows) == sorted(map(str, files))
    right = []
    for row in rows:
        path = Path(row["path"])
        probabilities = expected(model, path.read_bytes())
        labels = np.argsort(-probabilities).tolist()
        assert [row[f"label_{i}"] for i in range(1, 6)] == [*map(str, labels), "", ""]
        assert [row[f"name_{i}"] for i in range(1, 4)] == ["abc"[label] for label in labels]
        found = [float(row[f"probability_{i}"]) for i in range(1, 4)]
        np.testing.assert_allclose(found, probabilities[labels], rtol=1e-3, atol=1e-4)
        if "elsewhere" not in path.parts:
            right.append(path.relative_to(folders).parts[0] == "abc"[labels[0]])
    assert 0 < sum(right) < len(right)  # else the share would say little
    assert result.stdout.splitlines()[-1] == (
        f"{len(right)} pictures in folders with names of classes: top-1 "
        f"{np.mean(right):.2%}, top-5 100.00% (centre crop)"
    )
    assert f"{len(rows)} of {len(rows)} pictures" in result.stdout
    assert "%" not in "".join(result.stdout.splitlines()[:-1])  # no lines beside the table


def test_the_folder_of_a_class_itself_and_readable_names_count(run, folders, monkeypatch):
    names = ["a", "b", "c"]
    assert set(resnet50.find_pictures([folders / "a"], names).values()) == {"a"}
    monkeypatch.chdir(folders / "a")
    assert set(resnet50.find_pictures([Path()], names).values()) == {"a"}
    (folders / "LOC_synset_mapping.txt").write_text("a tench, Tinca tinca\nb goldfish\n")
    found = resnet50.find_pictures([folders], ["tench, Tinca tinca", "b"])
    by_folder = {path.relative_to(folders).parts[0]: name for path, name in found.items()}
    assert by_folder == {"a": "tench, Tinca tinca", "b": "b", "elsewhere": None}
    with pytest.raises(utils.UserError, match="no pictures in this folder"):
        resnet50.find_pictures([run / "2" / "assets"], names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arguments are required: MODEL, PATH"),
        (["model"], "arguments are required: PATH"),
        (["picture", "model"], "some.jpg: not a saved model"),
        (["folder", "model"], "not a saved model such as saved_models/mytestrun/29, nor a run"),
        (["gone", "picture"], "not a saved model such as saved_models/mytestrun/29, nor a run"),
        (["model", "picture", "--csv=x.txt"], "--csv=x.txt: expected a name ending in .csv"),
        (["model", "picture", "--csv=no/x.csv"], "--csv=no/x.csv: expected"),
        (["model", "folder"], "pictures: no pictures in this folder"),
    ],
)
def test_a_swapped_or_missing_argument_is_named(arguments, words, run, tmp_path, monkeypatch):
    places = {
        "model": run / "2",
        "picture": tmp_path / "some.jpg",
        "folder": tmp_path / "pictures",
        "gone": tmp_path / "gone",
    }
    (tmp_path / "some.jpg").write_bytes(PICTURES["png"])
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["resnet50.py", *(str(places.get(a, a)) for a in arguments)])
    with pytest.raises(utils.UserError) as error:
        resnet50.main()
    assert words in str(error.value)


@pytest.mark.parametrize("fault", ["a folder", "in a folder that is read-only"])
def test_a_table_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    fault, tmp_path, monkeypatch
):
    table = tmp_path / "table.csv"
    if fault == "a folder":
        table.mkdir()
    else:
        monkeypatch.setattr(resnet50.os, "access", lambda path, _: Path(path) != tmp_path)
    monkeypatch.setattr(sys, "argv", ["resnet50.py", "model", "picture", f"--csv={table}"])
    with pytest.raises(utils.UserError, match="--csv=.*table.csv: expected"):
        resnet50.main()


def test_help_says_that_a_model_can_run_code():
    result = toolkit.run("resnet50.py", None, "--help")
    assert "load only models that you trust" in result.stdout.replace("\n", " ")


def test_a_run_stands_for_its_newest_epoch(run):
    assert resnet50.find_model(run) == run / "10"
    assert resnet50.find_model(run / "2") == run / "2"
    with pytest.raises(utils.UserError, match="mistyped: not a saved model"):
        resnet50.find_model(Path("mistyped"))
