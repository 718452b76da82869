"""Who takes part in the comparisons of speed, each in a process of its own.

A worker answers requests, a JSON line each, and is alive between them. `Job` says what
it builds; a request says which task it runs, and how many batches.

The batch is on the device already, and every batch is waited for. bfloat16 is the Keras
policy `mixed_bfloat16`, autocast in timm, a hint in OpenVINO, `precision="bfloat16"` in
an exported model. Models are their libraries' defaults: keras_vit's alone normalises
pixels, and has the tanh approximation of GELU where KerasHub's and timm's compute erf.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from machine import run_python

KERAS_BACKENDS = "tensorflow", "jax", "torch"
PRECISIONS = "float32", "bfloat16"
TASKS = "inference", "training"
NUM_CLASSES = 1000
LEARNING_RATE = 1e-4
SIZES = {  # embed_dim, depth, num_heads, mlp_dim; patches of 16 pixels
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}
PATCH_SIZE = 16

# task -> function that runs one batch and returns once it is done
Steps = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One process of the comparison."""

    name: str  # key of `BUILDERS`
    backend: str
    needs: tuple[str, ...]  # modules
    trains: bool = True
    remat: bool = False

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def __str__(self) -> str:
        return f"{self.name} on {self.backend}" + ", remat" * self.remat


@dataclasses.dataclass(frozen=True)
class Job:
    """The model that a worker builds, and its batch."""

    batch_size: int = 16
    precision: str = "float32"
    variant: str = "small"
    image_size: int = 224
    remat: bool = False
    depth: int | None = None  # blocks, other than the variant's

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """As in `SIZES`."""
        embed_dim, depth, num_heads, mlp_dim = SIZES[self.variant]
        return embed_dim, self.depth or depth, num_heads, mlp_dim


def batch(job: Job) -> tuple[Any, Any]:
    """Raw float32 images `(B, H, W, 3)` of 0..255 and int32 labels `(B,)`."""
    import numpy as np

    generator = np.random.default_rng(0)
    shape = (job.batch_size, job.image_size, job.image_size, 3)
    images = generator.uniform(0, 255, shape).astype("float32")
    return images, generator.integers(NUM_CLASSES, size=job.batch_size).astype("int32")


def keras_vit_model(job: Job) -> Any:
    """Ours, with no bias that is 0 and no scale that is 1.

    A graph optimizer would leave those of a fresh model out, and with them the form in
    which TensorFlow fuses a LayerNorm.
    """
    import keras

    import keras_vit

    scope = keras_vit.remat_blocks() if job.remat else contextlib.nullcontext()
    with scope:
        model = keras_vit.ViT(
            job.variant,
            image_size=job.image_size,
            num_classes=NUM_CLASSES,
            depth=job.sizes[1],
        )
    for i, weight in enumerate(model.trainable_variables):
        if len(weight.shape) == 1:
            weight.assign(weight + keras.random.normal(weight.shape, 0, 0.02, seed=i))
    return model


def keras_hub_model(job: Job) -> Any:
    import keras
    import keras_hub

    embed_dim, depth, num_heads, mlp_dim = job.sizes
    backbone = keras_hub.models.ViTBackbone(
        (job.image_size, job.image_size, 3),
        PATCH_SIZE,
        depth,
        num_heads,
        hidden_dim=embed_dim,
        mlp_dim=mlp_dim,
    )
    head = keras.layers.Dense(NUM_CLASSES, dtype="float32")
    return keras.Model(backbone.input, head(backbone.output[:, 0]))


def keras_steps(
    build_model: Callable[[Job], Any], job: Job, jit_compile: bool | str = "auto"
) -> Steps:
    """One batch through the compiled functions of a Keras model."""
    import keras

    mixed = "mixed_" if job.precision == "bfloat16" else ""
    keras.config.set_dtype_policy(mixed + job.precision)
    model = build_model(job)
    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    images, labels = map(keras.ops.convert_to_tensor, batch(job))

    def train() -> None:
        model.train_on_batch(images, labels)
        # the loss is there before the update is: wait for the update
        keras.ops.convert_to_numpy(model.trainable_variables[0])

    def infer() -> None:
        model.predict_on_batch(images)  # waits, for it returns NumPy

    return {"inference": infer, "training": train}


def import_timm() -> Any:
    """timm, also where the operators of torchvision do not fit the torch build."""
    import torch

    try:
        import timm
    except RuntimeError:  # torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            boxes = "Tensor dets, Tensor scores, float iou_threshold"
            library.define(f"{name}({boxes}) -> Tensor")
        import timm
    return timm


def timm_steps(compiled: bool, job: Job) -> Steps:
    """One batch through timm's model, in eager mode or through `torch.compile`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"vit_{job.variant}_patch{PATCH_SIZE}_224"
    create = import_timm().create_model
    shape = {"img_size": job.image_size, "depth": job.sizes[1]}
    model = create(name, num_classes=NUM_CLASSES, **shape).to(device)
    model.set_grad_checkpointing(job.remat)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    forward = torch.compile(model) if compiled else model
    images, labels = (torch.from_numpy(x).to(device) for x in batch(job))
    images = images.permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
    labels = labels.long()
    autocast = functools.partial(
        torch.autocast, device, torch.bfloat16, enabled=job.precision == "bfloat16"
    )

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast():
            forward(images).float().cpu().numpy()

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with autocast():
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return {"inference": infer, "training": train}


def openvino_steps(job: Job) -> Steps:
    """One batch through keras_vit's model, converted from its TensorFlow graph."""
    import openvino
    import tensorflow as tf

    images, _ = batch(job)
    serve = tf.function(
        functools.partial(keras_vit_model(job), training=False),
        input_signature=[tf.TensorSpec(images.shape, tf.float32)],
    )
    compiled = openvino.compile_model(
        openvino.convert_model(serve.get_concrete_function()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "bf16" if job.precision == "bfloat16" else "f32"},
    )
    return {"inference": lambda: compiled(images)}


EXPORT = """
import json, sys
import contestants, export
job = contestants.Job(**json.loads(sys.argv[1]))
precision = {} if job.precision == "float32" else {"precision": job.precision}
model = contestants.keras_vit_model(job)
export.export_saved_model(model, sys.argv[2], progress=False, **precision)
"""


def exported_steps(job: Job) -> Steps:
    """One batch through the exported model in the C++ session of this process.

    Another process has exported it: this one never imports TensorFlow's Python, and
    nothing goes through a pipe while the time is taken.
    """
    import numpy as np

    from export.session import _Session

    folder = tempfile.TemporaryDirectory()
    run_python(EXPORT, json.dumps(dataclasses.asdict(job)), folder.name)
    session = _Session(os.path.join(folder.name, "1"))
    folder.cleanup()  # what is loaded needs no file
    images = np.ascontiguousarray(batch(job)[0])
    return {"inference": lambda: session.run("images", {"images": images})}


OPENVINO = "OpenVINO (keras_vit)"
EXPORTED = "keras_vit exported"
COMPILED = "keras_vit, jit_compile=True"
TIMM_COMPILED = "timm, torch.compile"
BUILDERS: dict[str, Callable[[Job], Steps]] = {
    "keras_vit": functools.partial(keras_steps, keras_vit_model),
    COMPILED: functools.partial(keras_steps, keras_vit_model, jit_compile=True),
    "KerasHub": functools.partial(keras_steps, keras_hub_model),
    "timm": functools.partial(timm_steps, False),
    TIMM_COMPILED: functools.partial(timm_steps, True),
    OPENVINO: openvino_steps,
    EXPORTED: exported_steps,
}


def device() -> tuple[str, int | None]:
    """Name of the device that this process computes on, and its peak of bytes."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch and torch.cuda.is_available():
        if torch.cuda.max_memory_allocated():
            return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    if jax and jax.default_backend() != "cpu":
        found = jax.devices()[0]
        peak = (found.memory_stats() or {}).get("peak_bytes_in_use")
        return found.device_kind, peak
    tensorflow = sys.modules.get("tensorflow")
    config = getattr(tensorflow, "config", None)  # of the C++ session there is none
    if config and config.list_physical_devices("GPU"):
        found = config.list_physical_devices("GPU")[0]
        name = config.experimental.get_device_details(found).get("device_name", "GPU")
        return name, config.experimental.get_memory_info("GPU:0")["peak"]
    return "cpu", None


def work(name: str) -> None:
    """Answer requests, a JSON line each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    build = functools.cache(BUILDERS[name])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            steps = build(Job(**request["job"]))
            seconds = []
            for _ in range(request["steps"]):
                start = time.perf_counter()
                steps[request["task"]]()
                seconds.append(time.perf_counter() - start)
            used, peak = device()
            answer = {"seconds": seconds, "device": used, "peak_bytes": peak}
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"[:300]}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """The process of a contestant, kept alive between the rounds."""

    def __init__(self, contestant: Contestant):
        self.contestant = contestant
        self.device = self.failure = ""  # the last one
        self._failed: set[tuple[Job, str]] = set()
        self.peak_bytes: int | None = None
        keras = contestant.backend in KERAS_BACKENDS
        environment = {
            "KERAS_BACKEND": contestant.backend if keras else "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # the workers share the GPU
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, contestant.name],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, job: Job, task: str, steps: int) -> list[float] | None:
        """Time of each batch; None from the first failure of a job and task on."""
        job = dataclasses.replace(job, remat=self.contestant.remat)
        if (job, task) in self._failed:
            return None
        request = {"job": dataclasses.asdict(job), "task": task, "steps": steps}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            answer = {"error": f"ended with exit code {self._process.wait()}"}
        if "error" in answer:
            self.failure = answer["error"]
            self._failed.add((job, task))
        self.device = answer.get("device", self.device)
        self.peak_bytes = answer.get("peak_bytes", self.peak_bytes)
        return answer.get("seconds")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    work(sys.argv[1])
