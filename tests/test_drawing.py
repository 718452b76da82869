"""Pictures of what a model sees: what they show is what is computed."""

import io

import keras
import numpy as np
import pytest
from conftest import to_numpy
from PIL import Image
from test_command import run
from test_inspection import MODELS, pictures, spread, vit

import keras_vit
from keras_vit import LVViT, drawing

pytestmark = pytest.mark.first  # what they show is tested on every backend


def shown(figure):
    """Every image of a figure, a list for each axes that has one."""
    return [
        np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images
    ]


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_attention_has_a_row_for_each_image_and_a_column_for_each_head():
    model = spread(MODELS["registers"]())
    images = pictures(model, batch=2)
    figure = drawing.draw_attention(model, images, 1)
    assert titles(figure) == ["image", "head 0", "head 1", "head 2"]
    panels = shown(figure)
    expected = keras_vit.class_attention(model, images, 1)
    np.testing.assert_array_equal(panels[0], images[0].astype("uint8"))
    np.testing.assert_array_equal(panels[5], expected[1, 0])
    extents = {tuple(axes.images[0].get_extent()) for axes in figure.axes}
    assert extents == {(-0.5, 47.5, 31.5, -0.5)}  # heat lies where the image does


def test_a_notebook_shows_a_picture_without_pyplot():
    figure = drawing.draw_positions(vit())
    with Image.open(io.BytesIO(figure._repr_png_())) as image:
        assert image.format == "PNG" and image.width == 100 * figure.get_figwidth()


@pytest.mark.parametrize("draw", [drawing.draw_attention, drawing.draw_rollout])
def test_tensors_are_drawn_as_arrays_are(draw):
    model = spread(MODELS["registers"]())
    images = pictures(model)
    found = shown(draw(model, keras.ops.convert_to_tensor(images)))
    for a, b in zip(found, shown(draw(model, images)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rollout_lies_over_the_image():
    model = spread(MODELS["cpvt"]())
    images = pictures(model, batch=1)
    figure = drawing.draw_rollout(model, images)
    _, heat, _ = shown(figure)
    np.testing.assert_array_equal(heat, keras_vit.attention_rollout(model, images)[0])
    grey, over = figure.axes[2].images
    assert grey.get_array().shape == over.get_array().shape == (32, 48)
    assert np.ptp(over.get_alpha()) > 0.5


def test_distance_has_a_point_for_each_head():
    model = spread(MODELS["rotary"]())
    images = pictures(model)
    figure = drawing.draw_distance(model, images)
    points = figure.axes[0].collections[0].get_offsets()
    expected = keras_vit.attention_distance(model, images)
    np.testing.assert_allclose(points[:, 1], expected.ravel())
    assert points[:, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("position", ["learned", "sincos_2d", "rotary", "relative"])
def test_positions_have_a_tile_for_each_patch(position):
    model = spread(vit(position=position))
    figure = drawing.draw_positions(model)
    (canvas,) = shown(figure)[:1]
    expected = keras_vit.position_similarity(model)
    assert canvas.shape == (4 * 5 - 1, 6 * 7 - 1)
    np.testing.assert_array_equal(canvas[5:9, 14:20], expected[1, 2])
    words = figure.axes[-1].get_ylabel()
    assert ("bias" if position == "relative" else "cosine") in words


def test_a_large_grid_shows_as_many_tiles_as_a_reader_can_tell_apart():
    model = vit(image_size=(8 * 20, 8 * 30))
    (canvas,) = shown(drawing.draw_positions(model))[:1]
    assert canvas.shape == (14 * 21 - 1, 14 * 31 - 1)
    peg = MODELS["cpvt"]()
    figure = drawing.draw_positions(peg, pictures(peg))
    assert figure.axes[-1].get_ylabel() == "attention of block1"


def test_heat_lies_over_the_patches_whose_rest_is_outside_the_image():
    model = spread(vit(image_size=None, position="rotary"))
    images = pictures(model)[:, :21, :29]
    for figure in (
        drawing.draw_attention(model, images),
        drawing.draw_features(model, images, 0),
    ):
        heat = figure.axes[1]
        assert heat.images[0].get_extent() == [-0.5, 31.5, 23.5, -0.5]
        assert heat.get_xlim() == (-0.5, 28.5) and heat.get_ylim() == (20.5, -0.5)
    pyramid = MODELS["pcpvt"]()
    panel = drawing.draw_features(pyramid, pictures(pyramid), "stage2").axes[1]
    assert panel.images[0].get_extent() == [-0.5, 63.5, 31.5, -0.5]


def test_one_patch_has_a_colour_too_and_tall_grids_fit_a_page():
    pyramid = MODELS["pcpvt"]()
    (_, colours) = shown(drawing.draw_features(pyramid, pictures(pyramid, 1), 3))
    assert colours.shape == (1, 2, 3)
    model = vit(image_size=(8 * 32, 16))
    assert drawing.draw_positions(model).get_figheight() < 12


def test_pegs_show_the_largest_kernels():
    model = spread(MODELS["pcpvt"]())
    kernel = model.get_layer("stage0_peg").kernel
    changed = to_numpy(kernel)
    changed[0, 2, 5, 0] = 9.0
    kernel.assign(changed)
    figure = drawing.draw_pegs(model, channels=4)
    assert titles(figure)[0] == "5"
    np.testing.assert_array_equal(shown(figure)[0], changed[:, :, 5, 0])
    with pytest.raises(ValueError, match="must have a PEG to draw its kernels"):
        drawing.draw_pegs(MODELS["registers"]())


def test_alike_tokens_have_alike_colours():
    model = spread(MODELS["registers"]())
    images = np.zeros((1, 32, 48, 3), "float32")
    images[:, :, 24:] = 255
    panels = shown(drawing.draw_features(model, images, [0]))
    colours = panels[1]  # (4, 6, 3)
    inside = np.abs(colours[:, :3] - colours[:1, :1]).mean()
    assert colours.shape == (4, 6, 3) and 0 <= colours.min() and colours.max() <= 1
    assert np.abs(colours[:, 3:] - colours[:1, :1]).mean() > 2 * inside
    figure = drawing.draw_features(MODELS["pcpvt"](), pictures(MODELS["pcpvt"]()))
    assert titles(figure) == ["image", "stage0", "stage1", "stage2", "stage3"]


def test_token_answers_have_the_colours_of_their_classes():
    model = MODELS["lvvit"]()
    model.get_layer("token_head").bias.assign([0, 0, 50, 0, 0])
    figure = drawing.draw_token_answers(model, pictures(model))
    patches = shown(figure)[1]
    assert patches.shape == (4, 6, 3) and np.ptp(patches.reshape(-1, 3), 0).max() < 1e-3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["2"]
    labels = tuple(f"a class with a rather long name, {i}" for i in range(40))
    many = LVViT(
        "tiny",
        image_size=64,
        patch_size=8,
        depth=1,
        num_classes=40,
        embed_dim=24,
        num_heads=3,
        stem_width=8,
        labels=labels,
    )
    figure = drawing.draw_token_answers(spread(many), pictures(many, 12))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 20 and names[-1].endswith("others")
    assert all(len(name) <= 32 for name in names)
    with pytest.raises(ValueError, match="must have a token head, as LVViT"):
        drawing.draw_token_answers(MODELS["registers"](), pictures(model))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    paths = [folder / "a.png", folder / "b.jpg"]
    for i, path in enumerate(paths):
        image = np.random.default_rng(i).integers(0, 256, (40, 50, 3), "uint8")
        Image.fromarray(image).save(path)
    return paths


ALL = {"features", "attention", "rollout", "distance", "positions"}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("registers", ALL),
        ("cpvt", {*ALL, "pegs"}),
        ("pcpvt", {"features", "pegs"}),
        ("lvvit", {*ALL, "tokens"}),
    ],
)
def test_look_writes_the_pictures_that_a_model_has(
    name, expected, photos, tmp_path, capsys, monkeypatch
):
    MODELS[name]().save(tmp_path / "model.keras")
    words = ["look", tmp_path / "model.keras", *photos, "--out", tmp_path / "new/look"]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    files = {path.stem: path for path in (tmp_path / "new/look").iterdir()}
    assert set(files) == expected
    for path in files.values():
        assert f"Picture: {path}" in out.replace("\n", "")
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 100


def test_look_says_in_a_sentence_what_is_wrong(photos, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model.keras"
    MODELS["registers"]().save(model)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[1].read_bytes()[:200])
    out = ["--out", tmp_path / "look"]
    for words, sentence in (
        ([broken], "must be a whole JPEG, PNG, GIF or BMP file; it could not be"),
        ([tmp_path / "none.jpg"], "There is no image file"),
        ([photos[0], "--block", "7"], "must be in 0..2, the blocks of"),
        ([photos[0], "--image-size", "64"], "takes images of 32 x 48 pixels only"),
        ([photos[0].parent], "must be an image file, such as"),
        ([photos[0], "--out", photos[1]], "--out must be a folder"),
    ):
        code, _, err = run(capsys, monkeypatch, "look", model, *out, *words)
        assert code == 1 and sentence in err and "Traceback" not in err
