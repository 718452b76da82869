"""What a server asks itself before it serves, and how it puts requests together."""

import functools
import re

import numpy as np
import pytest
import tensorflow as tf
from hand_made import LABEL_MAPS, publish_two
from tensorflow_serving.apis import prediction_log_pb2

from export import Runtime, StatusError
from export.bundle import BATCH_SIZES, batching_parameters
from export.messages import pb
from export.warmup import (
    LIMIT,
    NAME,
    read_warmup,
    replayed,
    sample_image,
    warmup_requests,
    write_warmup,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return publish_two(tmp_path_factory.mktemp("models") / "digits")


@pytest.fixture(scope="module")
def runtime(folder):
    with Runtime(folder / "2") as runtime:
        yield runtime


def test_every_signature_is_warmed_at_every_batch_size(folder, runtime):
    path = folder / "2/assets.extra" / NAME
    found = [(name, len(*inputs.values())) for name, inputs in read_warmup(path)]
    expected = [(name, x) for name in sorted(runtime.signatures) for x in BATCH_SIZES]
    assert found == expected


def test_every_record_is_answered_by_the_cpp_session(folder, runtime):
    for name, inputs in read_warmup(folder / "2/assets.extra" / NAME):
        outputs = runtime.run(name, **inputs)
        rows = len(*inputs.values())
        assert all(len(x) == rows for x in outputs.values())
        assert all(np.isfinite(x).all() for x in outputs.values())


def test_the_records_are_what_tensorflow_reads(folder):
    """In TensorFlow's own reader of records, of messages and of tensors."""
    path = folder / "2/assets.extra" / NAME
    records = list(tf.data.TFRecordDataset(str(path)))
    read = read_warmup(path)
    assert len(records) == len(read)
    for record, (name, inputs) in zip(records, read, strict=True):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        assert request.model_spec.signature_name == name
        for key, tensor in request.inputs.items():
            array = tf.make_ndarray(tensor)
            assert array.dtype == inputs[key].dtype
            np.testing.assert_array_equal(array, inputs[key])


def test_pixels_take_the_room_of_one(folder, runtime):
    pixels = {x: runtime.signatures[x] for x in ("images", "images_uint8")}
    requests = warmup_requests(pixels, BATCH_SIZES, b"")
    assert max(x.ByteSize() for x in requests) < 100
    sizes = {x.inputs["images"].tensor_shape.dim[1].size for x in requests}
    assert sizes == {224, 16}  # of any size, and of its own


def test_a_damaged_or_too_long_warmup_is_refused(tmp_path):
    requests = warmup_requests(LABEL_MAPS, [1], sample_image(8, 8))
    assert write_warmup(tmp_path / "w", requests * LIMIT) == LIMIT
    assert len(read_warmup(tmp_path / "w")) == LIMIT
    with pytest.raises(ValueError, match="1 to 1000 warm-up requests, got 1001"):
        write_warmup(tmp_path / "w", requests * (LIMIT + 1))
    with pytest.raises(ValueError, match="got 0"):
        write_warmup(tmp_path / "w", [])
    write_warmup(tmp_path / "w", requests * 2)
    whole = (tmp_path / "w").read_bytes()
    for data in (whole[:-1], whole[:30], whole[:4], whole.replace(b"JFIF", b"JFIG", 1)):
        (tmp_path / "w").write_bytes(data)
        with pytest.raises(ValueError, match="is damaged at byte"):
            read_warmup(tmp_path / "w")
    unnamed = pb.PredictRequest()
    with pytest.raises(ValueError, match="must name its signature"):
        write_warmup(tmp_path / "w", [unnamed])


def test_verify_replays_every_record_and_misses_none(folder, runtime, tmp_path):
    path = tmp_path / "assets.extra" / NAME
    ask = functools.partial(replayed, runtime, tmp_path, {"batch_sizes": BATCH_SIZES})
    assert replayed(runtime, folder / "2", {"batch_sizes": BATCH_SIZES}) == (
        True,
        "30 requests answered",
    )
    assert ask()[0] is False  # there is no file
    jpeg = sample_image(8, 8)
    requests = warmup_requests(runtime.signatures, BATCH_SIZES, jpeg)
    write_warmup(path, requests[1:])
    assert ask() == (False, "1 of them are missing, as classify of 1 rows")
    write_warmup(path, warmup_requests(runtime.signatures, BATCH_SIZES, b"no image"))
    with pytest.raises(StatusError, match="INVALID_ARGUMENT"):
        ask()
    path.write_bytes(path.read_bytes()[:-1])
    assert ask()[0] is False


def test_an_unknown_input_is_not_guessed():
    odd = {"x": {"inputs": {"sound": {"dtype": "DT_STRING", "shape": [-1]}}}}
    with pytest.raises(ValueError, match=r"image_bytes, images or inputs.*got 'sound'"):
        warmup_requests(odd, [1], b"")


# --- batching ---


def parse_batching(text):
    """BatchingParameters by the rules of the server's protocol; it is in no package."""
    known = {
        "max_batch_size": True,  # wrapped in a message
        "batch_timeout_micros": True,
        "max_enqueued_batches": True,
        "num_batch_threads": True,
        "allowed_batch_sizes": False,
    }
    found = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        wrapped = re.fullmatch(r"(\w+) \{ value: (\d+) \}", line)
        name, value = (wrapped or re.fullmatch(r"(\w+): (\d+)", line)).groups()
        assert known[name] == bool(wrapped)
        if wrapped:
            assert name not in found
            found[name] = int(value)
        else:
            found.setdefault(name, []).append(int(value))
    return found


def test_the_last_allowed_batch_size_is_the_maximum(folder):
    text = (folder / "2/batching_params.pbtxt").read_text()
    assert text == batching_parameters()
    assert text == (folder / "bundle/batching_params.pbtxt").read_text()
    found = parse_batching(text)
    assert found["allowed_batch_sizes"] == list(BATCH_SIZES)
    assert found["max_batch_size"] == BATCH_SIZES[-1]
    assert found["batch_timeout_micros"] == 5000
    assert parse_batching(batching_parameters((3, 5)))["max_batch_size"] == 5


@pytest.mark.parametrize("sizes", [(), (0, 1), (1, 1), (4, 2)])
def test_batch_sizes_increase(sizes):
    with pytest.raises(ValueError, match="must increase from 1"):
        batching_parameters(sizes)
