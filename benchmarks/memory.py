"""Memory that a training step of ViT-S/16 takes, with and without rematerialisation.

    python benchmarks/memory.py
    python benchmarks/memory.py --backends torch --variant large --batch-size 32

Each row is a process of its own, which takes a gradient of the loss of one batch.
`kept` is what the forward pass leaves for the backward one, weights aside: on PyTorch
the tensors that autograd saves, on JAX the residuals of `jax.vjp`; TensorFlow tells
nothing of the kind. `peak` is by how much the memory of the process has grown at most,
the compiler's own included. On a CPU JAX's `peak` is no smaller: XLA drops the barriers
there that hold the second computation back.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import peak_memory, show

BACKENDS = ("tensorflow", "jax", "torch")
MIB = 2**20


def kept_bytes(model: Any, images: Any) -> int | None:
    """Take a gradient, and say how many bytes wait for the backward pass."""
    import keras

    step = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    return step[keras.backend.backend()](model, images)


def _loss(outputs):
    from keras import ops

    return ops.mean(ops.square(outputs - 1.0))  # the logits of a new model are 0


def _tensorflow(model, images):
    import tensorflow as tf

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = _loss(model(images, training=True))
        return tape.gradient(loss, model.trainable_variables)

    step()
    return None


def _jax(model, images):
    import jax

    def loss(weights, others, images):
        outputs, others = model.stateless_call(weights, others, images, training=True)
        return _loss(outputs), others

    def residuals(weights, *rest):
        backward = jax.vjp(lambda x: loss(x, *rest), weights, has_aux=True)[1]
        return jax.tree_util.tree_leaves(backward)

    variables = model.trainable_variables, model.non_trainable_variables
    given = *([v.value for v in group] for group in variables), images
    traced = jax.make_jaxpr(residuals)(*given).jaxpr
    found = [x for x in traced.outvars if not hasattr(x, "val")]  # no constants
    kept = set(found) - set(traced.invars)  # weights aside
    jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(*given))
    return sum(x.aval.size * x.aval.dtype.itemsize for x in kept)


def _torch(model, images):
    import torch

    own = {v.value.untyped_storage().data_ptr() for v in model.variables}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model(images, training=True))
    loss.backward()
    return sum(kept.values())


def measure(options: argparse.Namespace) -> dict[str, float | None]:
    """In this process: what is kept, by how much it grows, and a step's seconds."""
    import keras
    import numpy as np

    import keras_vit

    if options.precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    scope = keras_vit.remat_blocks() if options.remat else contextlib.nullcontext()
    with scope:
        model = keras_vit.ViT(
            options.variant,
            image_size=options.image_size,
            drop_path_rate=0.1,
        )
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    images = np.random.default_rng(0).uniform(0, 255, shape).astype("float32")
    images = keras.ops.convert_to_tensor(images)
    before = peak_memory()
    start = time.perf_counter()
    kept = kept_bytes(model, images)
    grown = peak_memory() - before
    seconds = time.perf_counter() - start
    return {"kept": kept, "peak": grown, "seconds": seconds}


def ask(backend: str, remat: bool, options: argparse.Namespace) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child"]
    for name in ("variant", "image_size", "batch_size", "precision"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--remat"] * remat
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {result.returncode}: {last}"}
    return json.loads(result.stdout.splitlines()[-1])


def rows(options: argparse.Namespace) -> list[dict]:
    """A row for each backend, without and with rematerialisation."""
    from tqdm import tqdm

    found = []
    turns = [(x, remat) for x in options.backends for remat in (False, True)]
    for backend, remat in tqdm(turns, "memory", disable=None):
        told = ask(backend, remat, options)
        row = {"benchmark": "memory of a training step", "backend": backend}
        row |= {"model": f"ViT {options.variant}", "image size": options.image_size}
        row |= {"batch size": options.batch_size, "precision": options.precision}
        row |= {"remat": "yes" if remat else "no", "error": told.get("error", "")}
        for name in ("kept", "peak"):
            value = told.get(name)
            row[f"{name} MiB"] = "-" if value is None else round(value / MIB, 1)
        found.append(row)
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--backends", default=BACKENDS, type=lambda x: x.split(","), metavar="LIST")
    add("--variant", default="small")
    add("--image-size", type=int, default=224)
    add("--batch-size", type=int, default=16)
    add("--precision", default="float32", choices=("float32", "bfloat16"))
    add("--output", type=Path, help="a .csv or .json file")
    add("--remat", action="store_true", help=argparse.SUPPRESS)
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    show(rows(options), options.output)


if __name__ == "__main__":
    main()
