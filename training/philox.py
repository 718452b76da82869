"""TensorFlow's normal numbers, from its generator, on any backend.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", of which this
is Philox4x32-10, and Box and Muller 1958, as in TensorFlow's `philox_random.h` and
`random_distributions.h`. A word is 32 bits in an int32: sums and products that overflow
leave the same bits on every backend.

Shapes: B generators.
"""

import math

from keras import ops

ROUNDS = 10
FACTORS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def normal(state, count: int):
    """The first numbers of `tf.random.stateless_normal`: float32 `(B, count)`.

    Args:
        state: int32 `(B, 6)`: two words of the key, four of the counter.
        count: How many.
    """
    groups = -(-count // 4)
    words = philox(state, groups)  # four of (B, groups)
    pairs = [_box_muller(*words[i : i + 2]) for i in (0, 2)]
    numbers = ops.stack([*pairs[0], *pairs[1]], axis=-1)
    return ops.reshape(numbers, (-1, 4 * groups))[:, :count]


def philox(state, groups: int):
    """Four words of each of the first groups, each int32 `(B, groups)`.

    The lowest word of the counter may not overflow; it begins at 0.
    """
    state = ops.cast(state, "int32")
    key = [state[:, i : i + 1] for i in (0, 1)]
    steps = ops.reshape(ops.arange(groups, dtype="int32"), (1, -1))
    words = [state[:, i : i + 1] + 0 * steps for i in range(2, 6)]
    words[0] = words[0] + steps
    for _ in range(ROUNDS):
        low, high = zip(
            *(_product(words[2 * i], FACTORS[i]) for i in (0, 1)), strict=True
        )
        words = [
            _xor(high[1], words[1], key[0]),
            low[1],
            _xor(high[0], words[3], key[1]),
            low[0],
        ]
        key = [k + _signed(step) for k, step in zip(key, KEY_STEPS, strict=True)]
    return words


def _product(word, factor):
    """Lower and upper word of a product."""
    low, high = _halves(word)
    factor_low, factor_high = factor & 0xFFFF, factor >> 16
    middle = _halves(high * factor_low), _halves(low * factor_high)
    carry = _halves(low * factor_low)[1] + middle[0][0] + middle[1][0]
    upper = high * factor_high + _halves(carry)[1] + middle[0][1] + middle[1][1]
    return word * _signed(factor), upper


def _xor(a, b, c):
    return ops.bitwise_xor(ops.bitwise_xor(a, b), c)


def _halves(word):
    """Its lower and upper 16 bits, both >= 0."""
    upper = ops.bitwise_and(ops.right_shift(word, 16), 0xFFFF)
    return ops.bitwise_and(word, 0xFFFF), upper


def _signed(number):
    """A number of 32 bits as an int32 has it."""
    return number - 2**32 if number >= 2**31 else number


def _box_muller(first, second):
    """Two normal numbers of two words."""
    uniform = ops.maximum(_uniform(first), 1e-7)
    angle = 2 * math.pi * _uniform(second)
    radius = ops.sqrt(-2 * ops.log(uniform))
    return ops.sin(angle) * radius, ops.cos(angle) * radius


def _uniform(word):
    """In [0, 1), of the lower 23 bits, as a float32 has them."""
    return ops.cast(ops.bitwise_and(word, 0x7FFFFF), "float32") * 2.0**-23
