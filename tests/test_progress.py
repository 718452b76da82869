import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_loop import RECIPE, build, two_classes

import training
from training.checkpoints import Checkpoint
from training.optimize import schedule
from training.progress import Divergence, Progress


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_classes(tmp_path_factory)


@pytest.mark.heavy
@pytest.mark.first
def test_a_run_that_diverges_stops_and_names_the_step_and_the_last_weights(
    data, tmp_path, capsys
):
    recipe = RECIPE.replace(learning_rate=1e30, warmup_epochs=0, clip_norm=None)
    message = r"at step \d of epoch 1; .*learning_rate"
    with pytest.raises(RuntimeError, match=message) as stopped:
        training.fit(build, data, recipe, tmp_path / "first")
    assert stopped.tb and capsys.readouterr().err.endswith("\n")  # the bar is closed
    assert not (tmp_path / "first" / "state.npz").exists()
    # One update an epoch, the first of them without a learning rate.
    recipe = recipe.replace(batch_size=54, warmup_epochs=1)
    with pytest.raises(RuntimeError, match=r"epoch [23]") as error:
        training.fit(build, data, recipe, tmp_path / "later")
    good = tmp_path / "later" / "last.keras"
    assert str(error.value).endswith(f"--from {good} starts from them.")
    loaded = keras.saving.load_model(good)
    assert all(np.isfinite(to_numpy(v)).all() for v in loaded.weights)


def test_weights_that_are_no_numbers_are_not_written(tmp_path):
    model = build()
    training.compile_model(model, RECIPE, 1)
    watching = training.callbacks(tmp_path)
    for callback in watching:
        callback.set_model(model)
    stop = next(x for x in watching if isinstance(x, Divergence))
    assert watching.index(stop) < [type(x) for x in watching].index(Checkpoint)
    model.get_layer("head").bias.assign([np.nan, 0.0])
    with pytest.raises(RuntimeError, match=r"head/bias is not finite after epoch 3"):
        stop.on_epoch_end(2, {"loss": 1.0})


def test_a_loss_ten_times_that_of_the_first_step_has_exploded(tmp_path):
    stop = Divergence(tmp_path)
    stop.on_epoch_begin(0)
    stop.on_train_batch_end(0, {"loss": 2.0})
    stop.on_train_batch_end(1, {"loss": 19.0})
    with pytest.raises(RuntimeError, match=r"grown from 2 to 21 at step 3 of epoch 1"):
        stop.on_train_batch_end(2, {"loss": 21.0})
    small = Divergence(tmp_path, first_loss=1e-4)
    small.on_epoch_begin(0)
    small.on_train_batch_end(0, {"loss": 0.1})  # one hard batch of a good model
    with pytest.raises(RuntimeError, match=r"grown from 0.0001 to 11 "):
        small.on_train_batch_end(1, {"loss": 11.0})
    with pytest.raises(RuntimeError, match=r"The loss is nan at step 4 of epoch 1"):
        stop.on_train_batch_end(3, {"loss": float("nan")})


def test_the_bar_tells_the_learning_rate_and_counts_what_this_process_did(capsys):
    model = build()
    training.compile_model(model, RECIPE, 6)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(2 * 6)  # two epochs are done
    bar = Progress(images_per_step=8)
    bar.set_model(model)
    bar.set_params({"steps": 6, "epochs": 4})
    bar.on_epoch_begin(2)
    for batch in range(6):
        bar.on_train_batch_begin(batch)
        bar.bar.mininterval = 0  # it is shown after each step
        bar.on_train_batch_end(batch, {"loss": 1.0})
    told = bar.bar.format_dict
    assert (told["initial"], told["n"], told["total"]) == (2 * 6 * 8, 3 * 6 * 8, 192)
    assert told["elapsed"] > 0 and "images/s" in str(bar.bar)
    rate = float(schedule(RECIPE, 6)(2 * 6 + 5))
    assert f"lr {rate:.2g}" in str(bar.bar)
    logs = {"loss": 0.5, "val_accuracy": 0.75, "learning_rate": 1e-3}
    bar.on_epoch_end(2, logs)
    bar.on_train_end()
    last = capsys.readouterr().err.strip().splitlines()[-1].rsplit("\r", 1)[-1]
    assert "epoch 3/4" in last
    assert last.strip().endswith("lr 0.001, loss 0.500, val_accuracy 0.750")
