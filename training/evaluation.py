"""How good a model is on the held-out part of a dataset."""

import keras
from tqdm.auto import tqdm

from training.batches import validation_batches
from training.data import Dataset
from training.task import check_fits, objective, preprocess_for


def evaluate(
    model: keras.Model,
    data: Dataset,
    batch_size: int = 64,
    image_size: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Loss and metrics over all held-out images.

    Args:
        model: With logits `(B, C)`, or `(B, H, W, C)` for data with masks.
        data: What `load_data` returns.
        batch_size: Images a step.
        image_size: `(H, W)` to which files are resized; None for the model's own, or
            where it takes any size for that of the data.

    Returns:
        `loss` and `accuracy`; for data with masks also `mean_iou`.

    Raises:
        ValueError: If the model and the data do not fit, the model does not take
            images of that size, or a file is damaged.
    """
    check_fits(model, data)
    preprocess = preprocess_for(model, data, image_size)
    loss, metrics = objective(model)
    model.compile(loss=loss, metrics=metrics)
    batches = validation_batches(data, preprocess, batch_size)
    steps = -(-data.sizes["validation"] // batch_size)
    bar = tqdm(total=steps, unit=" batches", desc="evaluate", dynamic_ncols=True)
    progress = keras.callbacks.LambdaCallback(
        on_test_batch_end=lambda batch, logs: bar.update()
    )
    with data.naming_damaged_files(), bar:
        return model.evaluate(
            batches, callbacks=[progress], return_dict=True, verbose=0
        )
