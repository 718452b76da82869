import numpy as np
import pytest
from PIL import Image
from test_data import few_scenes, tiny_segmenter

from keras_vit import LVViT, ViT
from training import load_data, picture
from training.picture import draw_segmentation
from training.token_picture import draw_mixing, draw_tokens


def test_a_picture_has_a_column_for_each_scene(tmp_path):
    widths = {}
    for count in (3, 6):
        path = tmp_path / "new" / f"{count}.png"
        draw_segmentation(tiny_segmenter(), few_scenes(), path, count=count)
        with Image.open(path) as image:
            pixels, widths[count] = np.asarray(image.convert("RGB")), image.width
        assert image.format == "PNG"
        # Digits are 13 % of the truth, in ten colours.
        shown = set(map(tuple, pixels.reshape(-1, 3)))
        colours = np.round(picture.colours(11) * 255).astype(int)
        assert sum(tuple(colour) in shown for colour in colours[:11]) >= 6
    assert widths[3] < 0.7 * widths[6]


@pytest.mark.parametrize("count", [2, 11, 40])
def test_every_class_has_a_colour_of_its_own(count):
    colours = picture.colours(count)
    assert len(np.unique(colours, axis=0)) == count + 1
    assert 0 <= colours.min() and colours.max() <= 1


def test_a_picture_of_a_classifier_is_refused(tmp_path):
    model = ViT("tiny", image_size=16, patch_size=8, depth=1, num_classes=11)
    with pytest.raises(ValueError, match=r"logits for each pixel .* got \(None, 11\)"):
        draw_segmentation(model, few_scenes(), tmp_path / "x.png")


def lvvit(**kwargs):
    settings = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    settings |= {"image_size": 24, "num_classes": 10, "stem_width": 4}
    return LVViT("tiny", **{**settings, **kwargs})


def test_a_picture_of_tokens_shows_labels_and_answers(tmp_path):
    path, model = tmp_path / "tokens.png", lvvit()
    model.get_layer("token_head").bias.assign([0] * 3 + [99] + [0] * 6)
    draw_tokens(model, load_data("placed_digits"), path, count=3)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    colour = np.round(picture.colours(11)[4] * 255)  # of class 3, behind background
    sure = np.abs(pixels - colour).max(-1) < 2
    rows = np.flatnonzero(sure.mean(1) > 0.7) / len(pixels)
    assert rows.min() > 0.65  # the last row alone: the trained model is sure of it


def test_a_picture_of_mixing_frames_the_tokens_by_what_they_show(tmp_path):
    draw_mixing(load_data("placed_digits"), tmp_path / "mixing.png")
    with Image.open(tmp_path / "mixing.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = np.abs(pixels - (255, 42, 42)).max(-1) < 40
    columns = np.flatnonzero(red.any(0)) / pixels.shape[1]
    assert 0.5 < columns.min() and columns.max() < 0.75  # CutMix alone


def test_a_picture_of_tokens_needs_a_token_head_and_label_maps(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"a model with a token head, such as LVViT"):
        draw_tokens(lvvit(token_weight=0), load_data("placed_digits"), path)
    with pytest.raises(ValueError, match=r"needs label maps, 'digits' has none"):
        draw_tokens(lvvit(), load_data("digits"), path)
