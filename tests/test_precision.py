import keras
import numpy as np
import pytest

from benchmarks.precision import POLICIES, curve, distance

BAND = 0.1  # of the mean loss; between two seeds it is as wide


@pytest.mark.slow
def test_in_half_precision_the_loss_of_the_digits_stays_with_that_of_float32():
    found = {}
    for policy in POLICIES:
        found[policy] = curve(policy, epochs=14)["loss"]
        assert np.isfinite(found[policy]).all()
        assert found[policy][-1] < 0.5 * found[policy][0]
        keras.backend.clear_session()
    apart = {policy: distance(x, found["float32"]) for policy, x in found.items()}
    assert max(apart.values()) < BAND, apart
    assert min(apart["mixed_bfloat16"], apart["mixed_float16"]) > 0  # they are others
