"""What half precision does to a training: its curve, its speed, its memory.

    python benchmarks/precision.py                        # the digits, on any device
    python benchmarks/precision.py --speed --steps 1000   # ViT-B/16, on an accelerator

The first trains the model of the recipe `digits` under float32, mixed_bfloat16 and
mixed_float16, from the same weights with the same batches, and prints each epoch's loss
and the largest relative distance to float32's. The second trains ViT-B/16 at 224 pixels
on noise and prints images a second (median of the steps after the first ten), the peak
of the device's memory and whether any loss was no number. Each policy has a process of
its own. Neither reads files nor needs TensorFlow: KERAS_BACKEND=jax or torch will do.
float32 is TF32 on a GPU to JAX, unless JAX_DEFAULT_MATMUL_PRECISION says otherwise.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
LAST = 10  # epochs whose mean loss is compared
WARM = 10  # steps that are not timed
PACKAGES = ("keras", "keras-vit", "tensorflow", "jax", "torch")


def digits():
    """1,437 digits of 32 x 32 pixels, three channels, 0..255, and their classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)[:1437] * (255 / 16)
    images = images.repeat(4, axis=1).repeat(4, axis=2)
    return np.repeat(images[..., None], 3, axis=-1).astype("float32"), labels[:1437]


def curve(policy, epochs):
    """Loss of each epoch of the recipe `digits` under a policy."""
    import keras

    from training.loss import SoftCrossEntropy
    from training.optimize import optimizer
    from training.recipes import find_recipe

    recipe = find_recipe("digits").replace(epochs=epochs, warmup_epochs=1)
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    images, labels = digits()
    model = recipe.build_model(10)
    steps = len(images) // recipe.batch_size
    model.compile(optimizer(model, recipe, steps), SoftCrossEntropy())
    count = steps * recipe.batch_size
    history = model.fit(
        images[:count],
        labels[:count],
        batch_size=recipe.batch_size,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    )
    return {"policy": policy, "loss": history.history["loss"]}


def distance(losses, reference):
    """Relative distance of the mean loss of the last epochs."""
    ours, theirs = (statistics.mean(x[-LAST:]) for x in (losses, reference))
    return abs(ours - theirs) / theirs


def speed(policy, steps, batch_size, depth):
    """Images a second, peak memory and the losses of ViT-B/16 on noise."""
    import keras

    import keras_vit
    from training.loss import SoftCrossEntropy
    from training.optimize import optimizer
    from training.recipes import find_recipe

    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    recipe = find_recipe("deit").replace(batch_size=batch_size, epochs=steps + 100)
    recipe = recipe.replace(warmup_epochs=0, warmup_steps=min(100, steps))
    model = keras_vit.ViT("base", depth=depth)
    model.compile(optimizer(model, recipe, 1), SoftCrossEntropy())
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 255, (batch_size, 224, 224, 3)).astype("float32")
    images = keras.ops.convert_to_tensor(images)
    labels = keras.ops.convert_to_tensor(generator.integers(0, 1000, batch_size))
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(model.train_on_batch(images, labels)))  # waits for it
        seconds.append(time.perf_counter() - start)
    rate = batch_size / statistics.median(seconds[WARM:] or seconds)
    return {
        "policy": policy,
        "images_per_second": rate,
        "peak_bytes": _peak_bytes(),
        "not_finite": int(np.sum(~np.isfinite(losses))),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _peak_bytes():
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def _ask(arguments, policy):
    """The row of one policy, from a process of its own."""
    command = [sys.executable, __file__, *arguments, "--policy", policy]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        sys.exit(f"{policy} failed, see above.")
    return json.loads(answer.stdout.splitlines()[-1])


def _versions():
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _print_curves(rows):
    reference = rows[0]["loss"]
    print("epoch " + "".join(f"{row['policy']:>16}" for row in rows))
    for epoch in range(len(reference)):
        print(f"{epoch + 1:5} " + "".join(f"{x['loss'][epoch]:16.4f}" for x in rows))
    for row in rows[1:]:
        apart = distance(row["loss"], reference)
        last = min(LAST, len(reference))
        print(f"{row['policy']}: mean of the last {last} losses {apart:.1%} apart")


def _print_speeds(rows):
    print("policy            images/s   ratio   peak GiB   not finite   last loss")
    for row in rows:
        ratio = row["images_per_second"] / rows[0]["images_per_second"]
        peak = row["peak_bytes"]
        memory = "-" if peak is None else f"{peak / 2**30:.2f}"
        print(
            f"{row['policy']:16} {row['images_per_second']:9.1f} {ratio:7.2f} "
            f"{memory:>10} {row['not_finite']:12} {row['last_loss']:11.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--speed", action="store_true", help="ViT-B/16 on noise")
    parser.add_argument("--epochs", type=int, default=30, help="of the digits")
    parser.add_argument("--steps", type=int, default=1000, help="of ViT-B/16")
    parser.add_argument("--batch-size", type=int, default=64, help="of ViT-B/16")
    parser.add_argument("--depth", type=int, default=12, help="blocks of ViT-B/16")
    parser.add_argument("--policy", choices=POLICIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.policy and given.speed:
        row = speed(given.policy, given.steps, given.batch_size, given.depth)
        print(json.dumps(row))
        return
    if given.policy:
        print(json.dumps(curve(given.policy, given.epochs)))
        return
    rows = []
    for policy in POLICIES:
        print(f"{policy} ...", file=sys.stderr, flush=True)
        rows.append(_ask(sys.argv[1:], policy))
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    print(f"\n{backend}; {_versions()}")
    (_print_speeds if given.speed else _print_curves)(rows)


if __name__ == "__main__":
    main()
