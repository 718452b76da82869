"""Training runs that survive: precision, compile, callbacks, resume.

A run directory holds
    run.json      recipe, data, labels, versions, device: all that a repetition needs
                  (training/runs.py)
    history.csv, last.keras, best.keras, state.npz, state.previous.npz
                  what it has come to (training/checkpoints.py)
    damaged.txt   files that could not be decoded, if there are some
    tensorboard   the curves for TensorBoard (training/events.py)
    curves.png    the curves of history.csv, drawn at the end if matplotlib is there
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import keras

from keras_vit import kernels, remat_blocks
from training.batches import (
    check_labels,
    steps_per_epoch,
    training_batches,
    validation_batches,
)
from training.checkpoints import (
    Average,
    Checkpoint,
    first_loss,
    restore,
    use_average,
)
from training.curves import draw_run
from training.damage import Damage, naming_what_stops
from training.data import Dataset, subset
from training.distribution import (
    Devices,
    distributed,
)
from training.events import TensorBoard
from training.interruption import Sigterm, fit_from
from training.loss import CountedAccuracy
from training.optimize import frozen, optimizer
from training.progress import Divergence, LearningRate, Progress
from training.recipe import Recipe
from training.runs import describe_run
from training.service import connect, explaining
from training.task import (
    check_fits,
    has_own_loss,
    is_segmentation,
    network_of,
    objective,
    preprocess_for,
    token_grid,
    trainer,
)
from training.weights import weights_of_classes


def fit(
    build_model: Callable[[], keras.Model],
    data: Dataset,
    recipe: Recipe,
    run_dir: str | Path,
    devices: str | int | Devices | None = None,
    data_service: str | None = None,
) -> keras.Model:
    """Train a model by a recipe; killed at any moment, the same call goes on.

    SIGTERM ends it as soon as a step is done, and the same call goes on at the next
    step. Of several processes SIGTERM saves nothing: they go on after the last epoch.

    The dtype policy that the recipe asks for is set before `build_model` is called
    and restored on return; where it says `remat`, `build_model` is called within
    `keras_vit.remat_blocks`, for what is built is computed again, not what was.

    Args:
        build_model: Returns the model, with one logit for each label of `data`, in
            each pixel where `data` has masks.
        data: What `load_data` returns.
        recipe: How to train.
        run_dir: Where the run is kept; a run that it holds already is continued, on
            whatever devices. Several processes share it, and one writes.
        devices: `"all"`, a number of copies of the model, or `Devices`; None for one
            device. The batch of the recipe is that of all together.
        data_service: Address of a tf.data service, `grpc://HOST:PORT`, whose workers
            make the training batches, the same ones; a run may go on with or without.
            A damaged training image then stops the run. None makes them here.

    Returns:
        The model after the last epoch; where the recipe says `ema` its averaged
        weights.

    Raises:
        ValueError: If `run_dir` holds a run of another recipe, checkpoint, data or
            backend, its state is damaged, the model and the data do not fit, there are
            not such devices, more images are damaged than the recipe allows (with a
            service one), or a service cannot read the data.
        RuntimeError: If the loss is no number any more, or ten times what it was.
        OSError: If a file cannot be written, on a full disk for example, or the
            service is not there.
        SystemExit: With status 143, when the run is saved after SIGTERM.
    """
    run_dir = Path(run_dir)
    service = None if data_service is None else connect(data_service)
    if recipe.train_images is not None:
        data = subset(data, recipe.train_images, recipe.seed)
    updates = steps_per_epoch(data, recipe.batch_size)
    with contextlib.ExitStack() as stack:
        placement = stack.enter_context(distributed(devices))
        policy = stack.enter_context(precision(recipe))
        placement.check_batches(recipe)
        keras.utils.set_random_seed(recipe.seed)
        with remat_blocks() if recipe.remat else contextlib.nullcontext():
            network = build_model()
        check_fits(network, data)
        preprocess = preprocess_for(network, data)
        model = trainer(network, recipe)
        labels = {
            "augmentation": recipe.augmentation,
            "token_grid": token_grid(network, preprocess, recipe),
            "class_labels": _class_labels(recipe),
        }
        check_labels(data, **labels)
        class_weights = weights_of_classes(recipe.class_weights, data)
        describe_run(run_dir, recipe, data, preprocess, policy, placement)
        stack.enter_context(frozen(model, recipe))
        compile_model(model, recipe, updates)
        model.optimizer.build(model.trainable_variables)  # not while it is traced
        placement.adapt(model.optimizer)
        damage = Damage(
            data, recipe, updates * recipe.batch_size, run_dir, placement.part
        )
        labels |= {"class_weights": class_weights, "service": service}
        batches, held_out = _streams(
            data, preprocess, recipe, placement, damage, labels
        )
        place, metrics = restore(model, run_dir, held_out)
        done = (place.epochs, place.step)
        placement.check_same(data=data.fingerprint, epochs_done=done)
        sigterm = Sigterm()
        step_size = recipe.batch_size // recipe.accumulation_steps
        watching = callbacks(run_dir, step_size, placement.is_chief, sigterm)
        for callback in watching:
            if isinstance(callback, Progress):
                stack.callback(callback.close)
        if place.epochs < recipe.epochs:
            stack.enter_context(naming_what_stops(data))
            if service is not None:
                stack.enter_context(explaining(data))
            if placement.processes == 1:  # several would have to stop at one step
                stack.enter_context(sigterm)
            fit_from(
                place,
                model,
                batches,
                held_out,
                recipe.epochs,
                updates * recipe.accumulation_steps,
                [*watching, damage],
                metrics,
            )
        if placement.is_chief:
            with contextlib.suppress(ModuleNotFoundError):  # matplotlib
                draw_run(run_dir)
        use_average(model)
        placement.wait("the end of fit")
    return network


def _streams(data, preprocess, recipe, placement, damage, options):
    """Training batches, but for where they begin and end; and the held-out batches."""
    batches = functools.partial(
        training_batches,
        data,
        preprocess,
        recipe.batch_size,
        seed=recipe.seed,
        accumulation_steps=recipe.accumulation_steps,
        part=placement.part,
        damaged=damage.train if options["service"] is None else None,
        **options,
    )
    held_out = validation_batches(
        data,
        preprocess,
        recipe.batch_size // recipe.accumulation_steps,
        devices=placement.devices.data,
        part=placement.part,
        damaged=damage.held_out.tell,
    )
    return batches, held_out


def _class_labels(recipe):
    how = recipe.token_labeling
    return "truth" if how is None else how.class_labels


def compile_model(model: keras.Model, recipe: Recipe, updates_per_epoch: int) -> None:
    """Compile a model of logits by a recipe, for those who call `model.fit`.

    Loss and metrics are those of `training.task.objective`; a `TokenLabeling` or a
    `Distillation` has its own.

    Args:
        model: With logits, or a trainer around one.
        recipe: How to train.
        updates_per_epoch: Batches of the recipe's size in an epoch; where it says
            `accumulation_steps`, that many steps of `model.fit` are one update.
    """
    if has_own_loss(model):
        model.compile(optimizer(model, recipe, updates_per_epoch))
        return
    network = network_of(model)
    loss, metrics = objective(network, recipe.loss)
    if recipe.class_weights is not None and not is_segmentation(network):
        metrics = [CountedAccuracy(name="accuracy")]
    # Rows that fill up a batch weigh nothing; pixels that do are of no class.
    kind = "metrics" if is_segmentation(network) else "weighted_metrics"
    rule = optimizer(model, recipe, updates_per_epoch)
    model.compile(rule, loss, **{kind: metrics})


def callbacks(
    run_dir: str | Path,
    images_per_step: int = 1,
    is_chief: bool = True,
    sigterm: Sigterm | None = None,
) -> list[keras.callbacks.Callback]:
    """A progress bar, checkpoints and curves, for those who call `model.fit`.

    They validate and save the average of the weights where the optimizer keeps one, and
    stop a run whose loss is no number any more, or ten times what it was.

    Args:
        run_dir: Where `tensorboard` goes, and what `training.checkpoints` lists.
        images_per_step: Batch size, for the rate that the bar shows.
        is_chief: Whether this process writes and shows anything; one of several does.
        sigterm: What `fit` enters, to save within an epoch; None to do no such thing.
    """
    run_dir = Path(run_dir)
    watching = [Average(), Divergence(run_dir, first_loss(run_dir)), LearningRate()]
    if is_chief:
        watching += [TensorBoard(run_dir, images_per_step)]
        watching += [Checkpoint(run_dir, sigterm), Progress(images_per_step)]
    return watching


@contextlib.contextmanager
def precision(recipe: Recipe) -> Iterator[str]:
    """Set the global dtype policy of the recipe; restore the old one on exit."""
    policy = recipe.precision
    if policy == "auto":
        policy = kernels.half_precision() or "float32"
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield policy
    finally:
        keras.config.set_dtype_policy(before)
