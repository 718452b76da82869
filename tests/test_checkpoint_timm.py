"""Checkpoints of timm answer as in timm, and ours are loaded by timm."""

import copy

import keras
import numpy as np
import pytest
from peers import (
    TOLERANCE,
    asked,
    assert_same,
    google_arrays,
    images,
    load_timm,
    make_timm,
    make_twins,
    ours,
    quick,
    random_ours,
    save_timm,
    timm,
)

from keras_vit import (
    CPVT,
    PCPVT,
    LVViT,
    ViT,
    from_checkpoint,
    inspect_checkpoint,
    to_checkpoint,
)

pytestmark = pytest.mark.heavy

MEAN = {"class_token": False, "global_pool": "avg"}
MAP = {"class_token": False, "global_pool": "map"}
MODELS = {
    "plain": {},
    "mlp": {"mlp_ratio": 3, "patch_size": 32},
    "distilled": {"architecture": "deit_tiny_distilled_patch16_224"},
    "deit3": {"architecture": "deit3_small_patch16_224"},
    "registers": {"reg_tokens": 3},
    "registers_without_position": {"reg_tokens": 3, "no_embed_class": True},
    "qk_norm": {"qk_norm": True},
    "no_bias": {"qkv_bias": False},
    "mean": MEAN,
    "mean_after_norm": {**MEAN, "fc_norm": False},
    "mean_beside_class_token": {"global_pool": "avg", "reg_tokens": 2},
    "mean_after_norm_beside_class_token": {"global_pool": "avg", "fc_norm": False},
    "normalised_class_token": {"fc_norm": True},
    "attention_pool": MAP,
    "attention_pool_beside_class_token": {"global_pool": "map"},
    "attention_pool_beside_registers": {**MAP, "reg_tokens": 2},
    "clip": {"architecture": "vit_base_patch16_clip_224"},
    "quick": {"architecture": "vit_base_patch16_clip_quickgelu_224"},
    "siglip": {"architecture": "vit_base_patch16_siglip_512"},
    "siglip_mean": {"architecture": "vit_base_patch16_siglip_gap_512"},
    "pre_norm": {"pre_norm": True, "act_layer": "quick_gelu"},
    "tanh": {"act_layer": "gelu_tanh"},
    "no_position": {"pos_embed": "none"},
    "no_head": {"num_classes": 0},
    "distilled_without_head": {
        "architecture": "deit_tiny_distilled_patch16_224",
        "num_classes": 0,
    },
    "mean_without_head": {**MEAN, "num_classes": 0},
    "not_square": {"img_size": (32, 96)},
}


def normalization(model):
    return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def saved(kind, folder, **kwargs):
    """A model of `MODELS`, and its checkpoint."""
    model = make_timm(**{**MODELS[kind], **kwargs})
    return model, save_timm(model, folder / "theirs")


@pytest.mark.parametrize(
    "kind",
    quick(MODELS, "distilled", "deit3", "mean_beside_class_token", "clip", "siglip"),
)
def test_checkpoint_answers_as_in_timm(kind, tmp_path):
    model, folder = saved(kind, tmp_path)
    raw = images(*MODELS[kind].get("img_size", (64, 64)))
    loaded = from_checkpoint(folder)
    assert_same(ours(loaded, raw), asked(model, raw, normalization(model)))


@pytest.mark.parametrize("size", [pytest.param(64, marks=pytest.mark.slow), (64, 96)])
@pytest.mark.first
@pytest.mark.slow
def test_pcpvt_answers_as_in_timm(size, tmp_path):
    height, width = (size, size) if isinstance(size, int) else size
    model = make_twins(img_size=size)
    raw = images(height, width)
    loaded = from_checkpoint(save_timm(model, tmp_path / "theirs"))
    assert_same(ours(loaded, raw), asked(model, raw, normalization(model)))


MISSING = "lacks tensors"
UNKNOWN = "has tensors that no model of keras_vit has a place for"
LACKING = [
    ({"pool_include_prefix": True, "global_pool": "avg"}, "pools its prefix"),
    ({"pool_include_prefix": True, "global_pool": "map"}, "pools its prefix"),
    ({"global_pool": "avgmax"}, "pools by 'avgmax'"),
    ({"global_pool": ""}, "pools by ''"),
    ({"final_norm": False}, MISSING),
    ({"norm_layer": "rmsnorm"}, MISSING),
    ({"proj_bias": False}, MISSING),
    ({"act_layer": "relu"}, "no activation 'relu'"),
    ({"scale_mlp_norm": True}, UNKNOWN),
    ({"embed_norm_layer": "layernorm"}, UNKNOWN),
    ({"in_chans": 1}, "Images must have 3 channels"),
    ({"patch_size": (16, 32)}, "Patches must be square"),
    ({"architecture": "vit_small_patch16_18x2_224"}, UNKNOWN),
    ({"architecture": "vit_base_patch16_rpn_224"}, "normalises after its branches"),
]


def test_where_we_lack_a_pooling_the_caller_may_choose_another(tmp_path):
    theirs = make_timm(global_pool="avgmax")
    folder = save_timm(theirs, tmp_path / "theirs")
    mean = make_timm(global_pool="avg")
    mean.load_state_dict(theirs.state_dict())
    loaded = from_checkpoint(folder, pool="mean")
    assert_same(ours(loaded, images()), asked(mean, images()))


@pytest.mark.first
@pytest.mark.parametrize("kwargs, message", LACKING)
def test_what_we_lack_is_refused(kwargs, message, tmp_path):
    folder = save_timm(make_timm(**kwargs), tmp_path / "theirs")
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(folder)


# --- another size


ANOTHER_SIZE = (
    "plain",
    "distilled",
    "deit3",
    "registers",
    "mean_beside_class_token",
    "attention_pool_beside_class_token",
    "not_square",
)


@pytest.mark.parametrize("size", [pytest.param(96, marks=pytest.mark.slow), (32, 64)])
@pytest.mark.parametrize("kind", quick(ANOTHER_SIZE, "distilled", "registers"))
@pytest.mark.first
@pytest.mark.slow
def test_another_size_answers_as_in_timm(kind, size, tmp_path):
    model, folder = saved(kind, tmp_path)
    model.set_input_size(img_size=size)
    raw = images(*np.broadcast_to(size, 2))
    loaded = from_checkpoint(folder, image_size=size)
    assert_same(ours(loaded, raw), asked(model, raw, normalization(model)))


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "registers_without_position"])
def test_any_size_answers_as_in_timm(kind, tmp_path):
    model, folder = saved(kind, tmp_path)
    loaded = from_checkpoint(folder, image_size=None)
    for size in [(64, 64), (96, 96), (32, 64)]:
        other = copy.deepcopy(model)
        other.set_input_size(img_size=size)
        raw = images(*size)
        assert_same(ours(loaded, raw), asked(other, raw, normalization(model)))


@pytest.mark.first
@pytest.mark.slow
def test_another_patch_size_answers_as_in_timm(tmp_path):
    model, folder = saved("plain", tmp_path)
    layers = __import__("timm.layers", fromlist=["layers"])
    other = make_timm(patch_size=8, img_size=32)
    state = model.state_dict()
    name = "patch_embed.proj.weight"
    state[name] = layers.resample_patch_embed(
        state[name], [8, 8], interpolation="bilinear", antialias=False
    )
    other.load_state_dict(state)
    loaded = from_checkpoint(folder, patch_size=8, image_size=32)
    assert_same(ours(loaded, images(32)), asked(other, images(32)))


def test_another_number_of_classes_gives_a_fresh_head(tmp_path):
    model, folder = saved("plain", tmp_path)
    with pytest.warns(
        UserWarning, match=r"fresh because of num_classes=10, .*: head[.;]"
    ):
        loaded = from_checkpoint(folder, num_classes=10)
    assert loaded.output_shape == (None, 10)
    features = keras.Model(loaded.input, loaded.get_layer("pool").output)
    assert_same(ours(features, images()), asked_features(model, images()))


def asked_features(model, raw):
    """What timm's head receives."""
    return asked(
        model,
        raw,
        normalization(model),
        lambda x: model.forward_head(model.forward_features(x), pre_logits=True),
    )


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "distilled", "mean_beside_class_token"])
def test_no_classes_leaves_the_features(kind, tmp_path):
    model, folder = saved(kind, tmp_path)
    loaded = from_checkpoint(folder, num_classes=0)
    assert_same(ours(loaded, images()), asked_features(model, images()))


# --- Google's files, which timm reads too

GOOGLE = {
    "published": {},
    "with_its_optimizer": {"prefix": "opt/target/"},
    "big_vision": {"new": True, "pooled": True, "prefix": "params/"},
    "big_vision_stacked": {"new": True, "stacked": True, "prefix": "params/"},
}


def google_file(kind, folder, size=64):
    """A file of Google's, and the model of timm that read it by timm's own reader."""
    arrays = google_arrays(**GOOGLE[kind])
    np.savez(folder / "google.npz", **arrays)
    kwargs = {"act_layer": "gelu_tanh", "img_size": size}
    model = make_timm(**kwargs, **(MAP if GOOGLE[kind].get("pooled") else {}))
    model.load_pretrained(str(folder / "google.npz"))
    return model, folder / "google.npz"


@pytest.mark.parametrize("kind", quick(GOOGLE, "published", "big_vision"))
@pytest.mark.first
@pytest.mark.slow
def test_google_file_answers_as_in_timm(kind, tmp_path):
    model, file = google_file(kind, tmp_path)
    loaded = from_checkpoint(file)
    assert_same(ours(loaded, images()), asked(model, images()))


@pytest.mark.parametrize("size", [pytest.param(96, marks=pytest.mark.slow), (32, 80)])
@pytest.mark.first
@pytest.mark.slow
def test_google_file_of_another_size_answers_as_in_timm_if_resampled_so(size, tmp_path):
    model, file = google_file("published", tmp_path, size)
    raw = images(*np.broadcast_to(size, 2))
    expected = asked(model, raw)
    assert_same(
        ours(from_checkpoint(file, image_size=size, resampling="linear"), raw), expected
    )
    google = ours(from_checkpoint(file, image_size=size), raw)
    assert np.abs(google - expected).max() > 100 * TOLERANCE


# --- the way back

SMALL = {"image_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL |= {"num_classes": 7}
WRITTEN = {
    "tiny": ("tiny", {}),
    "registers": ("tiny", {"num_registers": 3, "epsilon": 1e-6}),
    "mean": ("tiny", {"pool": "mean"}),
    "mean_norm_after_pool": ("tiny", {"pool": "mean", "norm_after_pool": True}),
    "mean_registers": ("deit_tiny", {"pool": "mean", "num_registers": 2}),
    "attention": ("tiny", {"pool": "attention", "num_registers": 2}),
    "pre_norm": ("tiny", {"pre_norm": True, "gelu": "quick"}),
    "pre_norm_registers": ("tiny", {"pre_norm": True, "num_registers": 2}),
    "qk_norm": ("tiny", {"qk_norm": True, "qkv_bias": False}),
    "deit": ("deit_tiny", {"layer_scale": 0.1, "mlp_ratio": 3.0}),
    "deit3": ("deit3_small", {"num_registers": 2}),
    "distilled": ("deit_tiny_distilled", {}),
    "no_position": ("tiny", {"position": "none"}),
    "no_head": ("tiny", {"num_classes": 0}),
    "not_square": ("tiny", {"image_size": (32, 96)}),
    "raw": ("tiny", {"normalization": None}),
    "own_pixels": ("tiny", {"normalization": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}),
    "distilled_no_head": ("deit_tiny_distilled", {"num_classes": 0}),
    "distilled_no_class_position": (
        "deit_tiny_distilled",
        {"class_position": False},
    ),
}


def pixels(model):
    """What timm shall be fed, as the model's config says: mean, deviation."""
    config = model.pretrained_cfg
    return config["mean"], config["std"]


@pytest.mark.parametrize("kind", quick(WRITTEN, "registers", "mean", "distilled"))
def test_our_model_answers_as_ours_in_timm(kind, tmp_path):
    timm()
    variant, kwargs = WRITTEN[kind]
    model = random_ours(ViT(variant, **{**SMALL, **kwargs}))
    to_checkpoint(model, tmp_path)
    theirs = load_timm(tmp_path)
    raw = images(*model.input_shape[1:3])
    assert_same(asked(theirs, raw, pixels(theirs)), ours(model, raw))


UNWRITTEN = {
    "distilled_registers": ("deit_tiny_distilled", {"num_registers": 2}),
    "distilled_registers_no_class_position": (
        "deit_tiny_distilled",
        {"num_registers": 2, "class_position": False},
    ),
    "representation": ("tiny", {"representation_size": 40}),
    "residual_scale": ("tiny", {"residual_scale": 2.0}),
}


@pytest.mark.first
@pytest.mark.parametrize("kind", UNWRITTEN)
def test_what_timm_lacks_is_refused_and_nothing_is_written(kind, tmp_path):
    variant, kwargs = UNWRITTEN[kind]
    model = ViT(variant, **{**SMALL, **kwargs})
    with pytest.raises(ValueError, match=r"timm has no model .*NAME\.safetensors"):
        to_checkpoint(model, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.first
@pytest.mark.slow
def test_our_pcpvt_answers_as_ours_in_timm(tmp_path):
    timm()
    model = random_ours(small_pcpvt())
    to_checkpoint(model, tmp_path)
    theirs = load_timm(tmp_path)
    assert_same(asked(theirs, images(), pixels(theirs)), ours(model, images()))


def small_pcpvt(**kwargs):
    small = {"embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)}
    small |= {"depths": (2, 2, 2, 1), "num_classes": 7, "image_size": 64}
    return PCPVT("small", **{**small, **kwargs})


OURS = {
    **{
        kind: lambda row=row: ViT(row[0], **{**SMALL, **row[1]})
        for kind, row in {**WRITTEN, **UNWRITTEN}.items()
    },
    **{
        position: lambda position=position: ViT("tiny", position=position, **SMALL)
        for position in ("rotary", "relative", "sincos_2d", "learned_peg", "sincos_1d")
    },
    "any_size": lambda: ViT("tiny", **{**SMALL, "image_size": None}),
    "pcpvt": small_pcpvt,
    "pcpvt_no_peg": lambda: small_pcpvt(peg=False),
    "pcpvt_no_bias": lambda: small_pcpvt(qkv_bias=False),
    "cpvt": lambda: CPVT("tiny", peg_positions=(-1, 0, 1), **SMALL),
    "cpvt_mean": lambda: CPVT("tiny", pool="mean", num_registers=2, **SMALL),
    "lvvit": lambda: LVViT("tiny", **{**SMALL, "stem_width": 16}),
    "lvvit_no_tokens": lambda: LVViT("tiny", token_weight=0, **SMALL),
}


@pytest.mark.parametrize("kind", quick(OURS, "distilled_registers", "relative", "cpvt"))
def test_our_model_comes_back_bit_equal(kind, tmp_path):
    pytest.importorskip("safetensors")
    model = random_ours(OURS[kind]())
    to_checkpoint(model, tmp_path / "model.safetensors")
    back = from_checkpoint(tmp_path / "model.safetensors")
    expected = {v.path: v.numpy() for v in model.weights}
    assert [v.path for v in back.weights] == list(expected)
    for weight in back.weights:
        np.testing.assert_array_equal(weight.numpy(), expected[weight.path])
    height, width = (side or 64 for side in model.input_shape[1:3])
    raw = images(height, width)
    np.testing.assert_array_equal(ours(back, raw), ours(model, raw))
