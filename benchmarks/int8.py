"""What TensorFlow's int8 product would give a served vision transformer on a CPU.

    python benchmarks/int8.py --rounds 6

The two Dense layers of the MLP of ViT-S, eight times one after the other, for the
tokens of 16 images and of one: float32 and bfloat16 as an export
writes them, and int8 as TensorFlow has it, tokens quantised to 8 bits by a known range
and the result dequantised in the kernel. They take turns in one process.

int8 has one kernel for product, bias and dequantisation; a GELU it does not fuse, and
the next layer gets float32. The rows with a GELU have the tanh approximation behind the
first of the two layers, which the other precisions fuse.
"""

import argparse
import statistics
import time

import numpy as np
import tensorflow as tf
from machine import show

TOKENS, WIDTH, HIDDEN, LAYERS = 197, 384, 1536, 8
LIMIT = 4.0  # tokens are quantised from -4 to 4
KINDS = ("float32", "bfloat16", "int8")


def dense(x, kernel, bias, kind):
    """A Dense layer with constant weights."""
    if kind != "int8":
        kernel, bias = (tf.cast(tf.constant(w), kind) for w in (kernel, bias))
        return tf.nn.bias_add(tf.matmul(x, kernel), bias)
    largest = float(np.abs(kernel).max())
    quantised = np.round(kernel / largest * 127).astype("int8")
    x, low, high = tf.raw_ops.QuantizeV2(
        input=x,
        min_range=-LIMIT,
        max_range=LIMIT,
        T=tf.quint8,
        mode="MIN_FIRST",
        round_mode="HALF_AWAY_FROM_ZERO",
    )
    return tf.raw_ops.QuantizedMatMulWithBiasAndDequantize(
        a=x,
        b=tf.bitcast(tf.constant(quantised), tf.qint8),
        bias=bias,
        min_a=low,
        max_a=high,
        min_b=-largest,
        max_b=largest,
        min_freezed_output=-2 * LIMIT,
        max_freezed_output=2 * LIMIT,
        Toutput=tf.float32,
        input_quant_mode="MIN_FIRST",
    )


def network(kind, gelu):
    """Function of tokens `(N, 384)`, in a session as a server has it."""
    generator = np.random.default_rng(0)
    shapes = (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    weights = [generator.normal(0, 0.05, shape).astype("float32") for shape in shapes]
    biases = [np.full(shape[1], 0.1, "float32") for shape in shapes]
    graph = tf.Graph()
    with graph.as_default():
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        tokens = tf.compat.v1.placeholder(dtype, (None, WIDTH))
        x = tokens
        for _ in range(LAYERS):
            x = dense(x, weights[0], biases[0], kind)
            if gelu:
                x = tf.nn.gelu(x, approximate=True)
            x = dense(x, weights[1], biases[1], kind)
        x = tf.cast(x, "float32")
    session = tf.compat.v1.Session(graph=graph)
    return lambda values: session.run(
        x, {tokens: values.astype(tokens.dtype.as_numpy_dtype)}
    )


def table(rounds: int, steps: int = 3) -> list[dict[str, str]]:
    """A row for each number of images and kind, of medians over the rounds."""
    result = []
    for images in (16, 1):
        tokens = np.random.default_rng(1).normal(size=(images * TOKENS, WIDTH))
        cells = {(k, gelu): network(k, gelu) for gelu in (False, True) for k in KINDS}
        seconds = {cell: [] for cell in cells}
        for turn in range(rounds + 1):
            for cell, run in cells.items():
                start = time.perf_counter()
                for _ in range(steps):
                    run(tokens)
                if turn:  # the first prepares the graph
                    seconds[cell].append((time.perf_counter() - start) / steps)
        operations = 4 * len(tokens) * WIDTH * HIDDEN * LAYERS
        for (kind, gelu), found in seconds.items():
            half = seconds["bfloat16", gelu]
            ratios = [b / a for a, b in zip(found, half, strict=True)]
            result.append(
                {
                    "images": str(images),
                    "precision": kind,
                    "GELU": "tanh" if gelu else "none",
                    "GOP/s": f"{operations / statistics.median(found) / 1e9:.0f}",
                    "/ bfloat16": f"{statistics.median(ratios):.2f}",
                }
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    show(table(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
