import io
import os
import zipfile

import h5py
import numpy as np
import pytest
from test_loop import RECIPE, build

import training
from training.checkpoints import Checkpoint
from training.state import Place, find_state, read_state, write_state


def weights_in(path):
    """The weights in a `.keras` file, by their places in it, without a model."""
    with zipfile.ZipFile(path) as archive:
        file = io.BytesIO(archive.read("model.weights.h5"))
    found = {}

    def keep(place, item):
        if isinstance(item, h5py.Dataset):
            found[place] = item[()]

    with h5py.File(file) as weights:
        weights.visititems(keep)
    return found


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


@pytest.mark.first
def test_a_flipped_byte_anywhere_in_the_state_is_found(tmp_path):
    arrays = {"model/00000": np.random.default_rng(0).normal(size=(30, 30))}
    write_state(tmp_path, Place(({"loss": 1.0},)), arrays)
    whole = tmp_path / "state.npz"
    place, found = read_state(find_state(tmp_path)[0])
    assert place.history == ({"loss": 1.0},)
    np.testing.assert_array_equal(found["model/00000"], arrays["model/00000"])
    content = whole.read_bytes()
    name, directory = content.index(b"model/00000"), content.index(b"PK\1\2")
    values = content.index(arrays["model/00000"].tobytes())
    places = [
        0,
        name,
        values,
        values + 4000,
        directory,
        directory + 46,
        len(content) - 1,
    ]
    places += [len(content) - 65, content.index(b"PK\5\6") + 20]  # length of comment
    places += np.random.default_rng(1).integers(0, len(content), 100).tolist()
    for place in places:
        flipped(whole, place)
        with pytest.raises(ValueError, match=r"state.npz is damaged .* Delete it"):
            find_state(tmp_path)
        whole.write_bytes(content)
    assert find_state(tmp_path)[0] == whole


@pytest.mark.first
def test_the_state_before_is_kept_and_stands_in(tmp_path):
    assert find_state(tmp_path) == (None, "")
    for epoch in range(3):
        history = tuple({"epoch": i} for i in range(epoch + 1))
        write_state(tmp_path, Place(history), {"model/00000": np.full(9, epoch)})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state.npz", "state.previous.npz"]
    last, previous = (read_state(tmp_path / name) for name in names)
    assert (last[0].epochs, previous[0].epochs) == (3, 2)
    flipped(tmp_path / "state.npz", 500)
    path, wrong = find_state(tmp_path)
    assert path.name == "state.previous.npz" and "checksum" in wrong
    (tmp_path / "state.npz").unlink()
    assert find_state(tmp_path)[1] == "it is missing"
    os.truncate(path, 700)
    with pytest.raises(ValueError, match=r"previous.npz is damaged .* Delete it to"):
        find_state(tmp_path)
    (tmp_path / "state.npz").touch()
    with pytest.raises(ValueError, match=r"state.npz is damaged .* Delete both to"):
        find_state(tmp_path)


def test_model_fit_cannot_go_on_within_an_epoch(tmp_path):
    model = build()
    training.compile_model(model, RECIPE, 6)
    model.optimizer.build(model.trainable_variables)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.set_model(model)
    checkpoint.set_params({"epochs": 4, "steps": 6})
    checkpoint.on_train_begin()
    checkpoint.on_epoch_begin(0)
    checkpoint.sigterm.received = True
    with pytest.raises(SystemExit):
        checkpoint.on_train_batch_end(2)
    with pytest.raises(ValueError, match=r"ended at step 3 of epoch 1; training.fit"):
        training.resume(model, tmp_path)
