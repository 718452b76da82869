import numpy as np
import pytest
from PIL import Image
from test_data import few_scenes, tiny_segmenter

from keras_vit import ViT
from training import picture
from training.picture import draw_segmentation


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
        colours = np.round(picture._colours(11) * 255).astype(int)
        assert sum(tuple(colour) in shown for colour in colours[:11]) >= 6
    assert widths[3] < 0.7 * widths[6]


@pytest.mark.parametrize("count", [2, 11, 40])
def test_every_class_has_a_colour_of_its_own(count):
    colours = picture._colours(count)
    assert len(np.unique(colours, axis=0)) == count + 1
    assert 0 <= colours.min() and colours.max() <= 1


def test_a_picture_of_a_classifier_is_refused(tmp_path):
    model = ViT("tiny", image_size=16, patch_size=8, depth=1, num_classes=11)
    with pytest.raises(ValueError, match=r"logits for each pixel .* got \(None, 11\)"):
        draw_segmentation(model, few_scenes(), tmp_path / "x.png")
