"""What an export does to a model: factors folded, another precision, constants."""

import collections
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy
from test_export import draw
from test_verify import flip

from export import Runtime, export_saved_model, frozen, verify
from export.precision import check_samples, compare, precision_cost, synthetic
from export.saved_model import logits_on_cpu
from keras_vit import CPVT, PCPVT, LVViT, SemanticFPN, ViT

pytestmark = pytest.mark.first  # TensorFlow writes the artifact of every backend

SMALL = {"image_size": 32, "patch_size": 8, "num_classes": 5}
NARROW = {"embed_dim": 24, "num_heads": 3, "depth": 2}


def pyramid(**kwargs):
    sizes = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}
    return PCPVT("small", depths=(1, 1, 1, 1), image_size=64, **sizes, **kwargs)


MODELS = {
    "layer scale": lambda: ViT("deit3_small", **SMALL, **NARROW),
    "normalised queries": lambda: ViT("tiny", qk_norm=True, **SMALL, **NARROW),
    "no bias": lambda: ViT("tiny", qkv_bias=False, **SMALL, **NARROW),
    "rotary": lambda: ViT("tiny", position="rotary", **SMALL, **NARROW),
    "relative": lambda: ViT("tiny", position="relative", **SMALL, **NARROW),
    "attention pool": lambda: ViT("tiny", pool="attention", **SMALL, **NARROW),
    "any size": lambda: ViT("tiny", **(SMALL | {"image_size": None}), **NARROW),
    "distilled": lambda: CPVT("tiny", distillation_token=True, **SMALL, **NARROW),
    "residual divisor": lambda: LVViT(
        "tiny", residual_scale=2.0, **SMALL, stem_width=8, **NARROW
    ),
    "pyramid": lambda: pyramid(num_classes=5),
    "label maps": lambda: SemanticFPN(pyramid(num_classes=0), 5, channels=16),
}


def drawn(name):
    return draw_weights(MODELS[name]())


def draw_weights(model):
    """A model whose every weight is drawn, so that none is without effect."""
    generator = np.random.default_rng(0)
    for variable in model.trainable_weights:
        value = to_numpy(variable) + generator.normal(0, 0.1, variable.shape)
        variable.assign(value.astype("float32"))
    return model


def images(model, count=3):
    height, width = (side or 36 for side in model.input_shape[1:3])
    return draw(count, height, width, 3)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="an export folds in TensorFlow"
)
@pytest.mark.parametrize("name", MODELS)
def test_folding_changes_answers_by_rounding_alone(name):
    model = drawn(name)
    x = images(model)
    expected = to_numpy(model(x))
    before = [to_numpy(v) for v in model.weights]
    frozen.fold(model)
    changed = sum(
        not np.array_equal(a, to_numpy(b))
        for a, b in zip(before, model.weights, strict=True)
    )
    assert changed >= 2
    difference = np.abs(to_numpy(model(x)) - expected).max()
    assert difference <= 1e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="an export folds in TensorFlow"
)
def test_what_is_folded_is_computed_no_more():
    model = drawn("layer scale")
    frozen.fold(model)
    block = model.get_layer("block1")
    assert block.scale1 is None and block.attention.scale == 1
    assert model.get_layer("normalize").statistics is None
    other = drawn("residual divisor")
    assert other.get_layer("block0").residual_scale != 1
    frozen.fold(other)
    assert other.get_layer("block0").residual_scale == 1
    assert other.get_layer("normalize").statistics is not None  # zeros around it


def kernels_of(directory, signature="images"):
    """How often the C++ session runs each kernel for a batch, by its fused ops."""
    graph = tf.Graph()
    session = tf.compat.v1.Session(graph=graph)
    meta = tf.compat.v1.saved_model.load(session, ["serve"], str(directory))
    signature = meta.signature_def[signature]
    told = tf.compat.v1.RunMetadata()
    x = {signature.inputs["images"].name: draw(2, 32, 32, 3)}
    options = tf.compat.v1.RunOptions(output_partition_graphs=True)
    session.run(signature.outputs["logits"].name, x, options=options, run_metadata=told)
    count = collections.Counter()
    for part in told.partition_graphs:
        for node in part.node:
            fused = [op.decode() for op in node.attr["fused_ops"].list.s]
            count["+".join([node.op.removeprefix("_Mkl"), *fused])] += 1
    return count


def has_onednn():
    from tensorflow.python.util import _pywrap_util_port

    return _pywrap_util_port.IsMklEnabled()


@pytest.mark.parametrize(
    ("gelu", "precision"),
    [("exact", "float32"), ("tanh", "float32"), ("exact", "bfloat16")],
)
def test_a_block_is_as_few_kernels_as_onednn_has_for_it(tmp_path, gelu, precision):
    """Each LayerNorm one; bias and GELU, bias and residual within their products."""
    if not has_onednn():
        pytest.skip("this TensorFlow is built without oneDNN")
    # Drawn, since factors of 1 and sums with 0 are taken out before kernels are chosen.
    model = draw_weights(ViT("tiny", gelu=gelu, **SMALL, **NARROW))
    options = {"precision": precision, "progress": False}
    artifact = export_saved_model(model, tmp_path, **options)
    count = kernels_of(artifact)
    kind = {"exact": "GeluExact", "tanh": "GeluApproximate"}[gelu]
    product = "NativeFusedMatMul+BiasAdd"
    assert count["LayerNorm"] == 2 * 2 + 1, count
    assert count[f"{product}+{kind}"] == 2, count
    assert count[f"{product}+Add"] == 2 * 2, count
    assert count["Softmax"] == 2 + 1, count  # and that of the classes
    assert not any(op in count for op in ("Mean", "Erf", "Tanh")), count
    offset = precision == "bfloat16"  # of the pixels, which float32 has folded
    assert count["AddV2"] == 1 + offset, count  # and the table of positions
    if precision == "bfloat16":  # pixels to bfloat16, pooled tokens back, answers
        assert count["Cast"] <= 4, count


@pytest.fixture(scope="module")
def wide():
    """11 MB of weights: more than a graph has besides."""
    return draw_weights(
        ViT("tiny", image_size=32, patch_size=8, depth=6, num_classes=5)
    )


@pytest.fixture(scope="module")
def half(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    return export_saved_model(wide, folder, precision="bfloat16", progress=False)


def manifest_of(artifact):
    return json.loads((artifact / "assets.extra/manifest.json").read_text())


def test_bfloat16_is_constants_that_stand_once_in_the_graph(wide, half):
    manifest = manifest_of(half)
    assert (manifest["precision"], manifest["weights"]) == ("bfloat16", "constants")
    size = (half / "saved_model.pb").stat().st_size
    assert 2 * wide.count_params() < size < 3.2 * wide.count_params()
    check = next(x for x in verify(half, progress=False).checks if "once" in x.name)
    assert check.ok and "as constants" in check.detail


def test_every_signature_computes_in_bfloat16_and_answers_in_float32(wide, half):
    x = images(wide, 4)
    expected = to_numpy(wide(x))
    with Runtime(half) as runtime:
        logits = runtime.run("images", images=x)["logits"]
        bytes_of = runtime.run("images_uint8", images=x.astype("uint8"))["logits"]
    scale = max(1.0, np.abs(expected).max())
    assert logits.dtype == bytes_of.dtype == "float32"
    assert 0 < np.abs(logits - expected).max() <= 5e-2 * scale


def test_the_report_tells_what_the_precision_costs(wide, half):
    report = json.loads((half / "assets.extra/report.json").read_text())
    cost = report["precision"]
    assert cost["images"] == 32 and 0.5 < cost["same_best_class"] <= 1
    assert 0 < cost["mean_difference"] < cost["largest_difference"] < 5e-2
    again = compare(half, *check_samples(None, wide), answer_of(wide))
    assert again == pytest.approx(cost)
    assert "best class as that of the model in" in precision_cost(half)


def answer_of(model):
    return lambda images: logits_on_cpu(model, images)


def test_accuracy_is_compared_where_labels_are_given(wide, half):
    x = synthetic(32, 32)[:10]
    best = logits_on_cpu(wide, x.astype("float32")).argmax(-1)
    labels = np.where(np.arange(10) < 9, best, -1)  # one that does not count
    labels[0] = (best[0] + 1) % 5
    cost = compare(half, *check_samples((x, labels), wide), answer_of(wide))
    assert cost["accuracy_of_model"] == pytest.approx(8 / 9)
    with Runtime(half) as runtime:
        found = runtime.run("images", images=x.astype("float32"))["logits"].argmax(-1)
    assert cost["accuracy"] == pytest.approx((found == labels)[:9].mean())


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (np.zeros((2, 30, 30, 3)), r"an array of shape \(2, 30, 30, 3\)"),
        (np.zeros((0, 32, 32, 3)), r"an array of shape \(0, 32"),
        ([np.zeros((2, 32, 32, 3)), np.zeros(3)], r"shape \(2,\), got \(3,\)"),
    ],
)
def test_samples_that_do_not_fit_are_refused_first(wide, tmp_path, samples, sentence):
    options = {"precision": "bfloat16", "samples": samples}
    with pytest.raises(ValueError, match=sentence):
        export_saved_model(wide, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


def test_samples_without_a_lower_precision_are_refused(wide, tmp_path):
    with pytest.raises(ValueError, match="samples are for a lower precision"):
        export_saved_model(wide, tmp_path, samples=np.zeros((2, 32, 32, 3)))


def test_a_flipped_bit_of_a_constant_is_found(half):
    file = half / "saved_model.pb"
    flip(file)
    try:
        report = verify(half, progress=False)
        assert "checksums" in [check.name for check in report.checks if not check.ok]
    finally:
        flip(file)


def test_the_choice_of_constants_is_the_callers(wide, tmp_path):
    options = {"precision": "bfloat16", "freeze": False, "progress": False}
    artifact = export_saved_model(wide, tmp_path, **options)
    assert manifest_of(artifact)["weights"] == "variables"
    stored = sum(x.stat().st_size for x in (artifact / "variables").iterdir())
    assert stored >= 4 * wide.count_params()
    assert (artifact / "saved_model.pb").stat().st_size < 2 * wide.count_params()


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="an export freezes in TensorFlow"
)
def test_weights_that_no_graph_holds_stay_variables(monkeypatch):
    model = drawn("layer scale")
    monkeypatch.setattr(frozen, "BY_DEFAULT", 1000)
    monkeypatch.setattr(frozen, "LARGEST", 1000)
    frozen.set_precision(model, "bfloat16")
    assert frozen.constants(model, None) is None
    with pytest.raises(ValueError, match=r"less than 1,000 bytes.*pass freeze=None"):
        frozen.constants(model, True)


@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("int8", r"got 'int8'\. No int8 is made.*bfloat16 is what is nearest"),
        ("half", "must be 'float32', 'bfloat16' or None, the model's own; got 'half'"),
    ],
)
def test_another_precision_is_refused_before_anything_is_written(
    wide, tmp_path, precision, sentence
):
    with pytest.raises(ValueError, match=sentence):
        export_saved_model(wide, tmp_path / "models", precision=precision)
    assert not (tmp_path / "models").exists()
