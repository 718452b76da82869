"""Pictures of what a model sees in image files: those that its kind has."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_vit import drawing
from keras_vit.embedding import Preprocess
from keras_vit.inspection import check_square
from keras_vit.model_file import replacing
from keras_vit.nodes import block_name
from keras_vit.places import position_kind
from keras_vit.position import PEG
from training.preprocess import decode, resize
from training.task import preprocess_for_size


def read_images(
    model: keras.Model,
    files: Sequence[Path],
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Image files as the model takes them: float32 `(B, H, W, 3)` of 0..255.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is a folder or does not decode, or the model does not
            take images of `image_size`.
    """
    preprocess = preprocess_for_size(model, image_size)
    return np.stack([_read(file, preprocess) for file in files])


def _read(file: Path, preprocess: Preprocess) -> np.ndarray:
    if file.is_dir():
        raise ValueError(f"{file} must be an image file, such as {file}/*.png.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no image file {file}.")
    try:
        return resize(decode(tf.io.read_file(str(file))), preprocess).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise ValueError(
            f"{file} must be a whole JPEG, PNG, GIF or BMP file; it could not be "
            "decoded."
        ) from error


def pictures(
    model: keras.Model, images: np.ndarray, block: int | None = None
) -> dict[str, Callable]:
    """What draws each picture that there is of a model, by the name of its file.

    Args:
        model: Any model of this package.
        images: What `read_images` returns.
        block: Whose attention is shown; None for the last, and the second where it
            stands for positions.

    Raises:
        ValueError: If there is no such block, or a pyramid is to show one.
    """
    if block is not None:
        check_square(model, "Attention of a block")
        block_name(model, block)
    names = {layer.name for layer in model.layers}
    found = {"features": lambda: drawing.draw_features(model, images)}
    if "patches" in names:
        found["attention"] = lambda: drawing.draw_attention(model, images, block)
        found["rollout"] = lambda: drawing.draw_rollout(model, images)
        found["distance"] = lambda: drawing.draw_distance(model, images)
        if position_kind(model) != "none":
            found["positions"] = lambda: drawing.draw_positions(
                model, images, block=block
            )
    if any(isinstance(layer, PEG) for layer in model.layers):
        found["pegs"] = lambda: drawing.draw_pegs(model)
    if "token_head" in names:
        found["tokens"] = lambda: drawing.draw_token_answers(model, images)
    return found


def write_pictures(
    model: keras.Model, images: np.ndarray, out: Path, block: int | None = None
) -> Iterator[Path]:
    """Write each picture as a PNG file into the folder `out`, and tell its path."""
    from tqdm.auto import tqdm

    chosen = pictures(model, images, block)
    for name, draw in tqdm(chosen.items(), "pictures", disable=None, leave=False):
        path = out / f"{name}.png"
        with replacing(path) as temporary:
            draw().savefig(temporary, dpi=150, format="png")
        yield path
