"""The optimizers of the recipes: AdamW, LAMB and SGD, with a rule for each variable.

Keras gives a rule to all variables alike. Here each variable has its own factor of the
learning rate and its own decay; the average of the weights is kept beside them; and a
batch that is sent through the model in parts has the update of the whole batch: the
learning rate, the bias correction of Adam and the average count updates, not parts.
"""

import keras
from keras import ops

from training.distribution import to_numpy

serializable = keras.saving.register_keras_serializable("training")


class _Rules:
    """What AdamW, LAMB and SGD share here; the update of a variable is `move`.

    Args:
        learning_rate: Of a variable whose factor is 1: a number, or a schedule, which
            is asked with the number of updates done.
        factors: Factor of the learning rate for each trainable variable, in the order
            of `model.trainable_variables`; None for 1 for all.
        decays: Decay of each, which its learning rate multiplies; None for none.
        ema: Decay of the average, below 1: after each update average = ema * average +
            (1 - ema) * variable, starting from the first weights; None for no average.
        accumulation_steps: Steps an update: the gradient of an update is the mean of
            theirs.
        global_clipnorm: Largest norm of all gradients together; None for no clipping.
        **kwargs: Those of the optimizer of Keras.

    Raises:
        ValueError: If it is built for another number of variables.
    """

    def __init__(
        self,
        learning_rate,
        *,
        factors=None,
        decays=None,
        ema=None,
        accumulation_steps=1,
        **kwargs,
    ):
        schedule = learning_rate
        if callable(schedule):
            learning_rate = _PerStep(schedule, accumulation_steps)
        if accumulation_steps > 1:
            kwargs["gradient_accumulation_steps"] = accumulation_steps
        super().__init__(learning_rate, **kwargs)
        self.schedule = schedule
        self.factors = None if factors is None else tuple(factors)
        self.decays = None if decays is None else tuple(decays)
        self.ema = ema
        self.accumulation_steps = accumulation_steps

    def build(self, variables):
        if self.built:
            return
        for name in ("factors", "decays"):
            values = getattr(self, name)
            if values is not None and len(values) != len(variables):
                raise ValueError(
                    f"{name} must be one for each of the {len(variables)} trainable "
                    f"variables, got {len(values)}."
                )
        super().build(variables)
        if self.ema is not None:
            self.averages = [
                self.add_variable_from_reference(x, "average", _copy_of(x))
                for x in variables
            ]

    @property
    def iterations(self):
        """Number of updates that are done."""
        if self.accumulation_steps == 1:
            return self._iterations
        return ops.floor_divide(self._iterations, self.accumulation_steps)

    def update_step(self, gradient, variable, learning_rate):
        i = self._get_variable_index(variable)
        if self.factors is not None:
            learning_rate = learning_rate * self.factors[i]
        decay = 0.0 if self.decays is None else self.decays[i]
        self.move(gradient, variable, learning_rate, decay)
        if self.ema is not None:
            average = self.averages[i]
            step = (variable - average) * ops.cast(1 - self.ema, variable.dtype)
            self.assign_add(average, step)

    def move(self, gradient, variable, learning_rate, decay):
        """Decay a variable and step along its gradient, as in decoupled decay."""
        if decay:
            rate = ops.cast(learning_rate, variable.dtype)
            self.assign_sub(variable, variable * rate * decay)
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        config = super().get_config()
        del config["gradient_accumulation_steps"]
        names = ("factors", "decays", "ema", "accumulation_steps")
        if callable(self.schedule):
            rate = keras.saving.serialize_keras_object(self.schedule)
            config["learning_rate"] = rate
        return {**config, **{name: getattr(self, name) for name in names}}


class _PerStep(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over updates, asked with the number of steps."""

    def __init__(self, schedule, accumulation_steps):
        self.schedule = schedule
        self.accumulation_steps = accumulation_steps

    def __call__(self, step):
        if self.accumulation_steps == 1:
            return self.schedule(step)
        return self.schedule(ops.floor_divide(step, self.accumulation_steps))

    def get_config(self):
        return {}  # the optimizer that made it says what it was made of


def _copy_of(variable):
    """An initializer, which Keras calls outside of any graph.

    It copies, for JAX donates every buffer once.
    """

    def initializer(shape, dtype=None):
        return ops.copy(variable.value)

    return initializer


@serializable
class AdamW(_Rules, keras.optimizers.Adam):
    """Adam with decoupled decay, and a rule for each variable.

        w <- w - lr * decay * w
        w <- w - lr * m / (sqrt(v) + epsilon)        with the bias of m and v corrected

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization",
    https://arxiv.org/abs/1711.05101.
    """


@serializable
class SGD(_Rules, keras.optimizers.SGD):
    """Gradient descent with momentum and decoupled decay, and a rule for each variable.

        w <- w - lr * decay * w
        m <- momentum * m - lr * g
        w <- w + m

    Differs from Flax and PyTorch in that the learning rate is a part of m, as in Keras:
    the two are the same while the learning rate is.
    """


@serializable
class Lamb(_Rules, keras.optimizers.Adam):
    """LAMB, with a rule for each variable.

        u = m / (sqrt(v) + epsilon) + decay * w      with the bias of m and v corrected
        w <- w - lr * |w| / |u| * u

    where a factor |w| / |u| of no or infinite size is 1, and where nothing is decayed.

    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT
    in 76 minutes", https://arxiv.org/abs/1904.00962, algorithm 2. That variables
    without decay have no such factor is as in FusedLAMB of NVIDIA's Apex, which DeiT
    III trains with. Differs from `keras.optimizers.Lamb`, whose factor does not see the
    decay.
    """

    def move(self, gradient, variable, learning_rate, decay):
        dtype = variable.dtype
        rate = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, dtype)
        i = self._get_variable_index(variable)
        m, v = self._momentums[i], self._velocities[i]
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        count = ops.cast(self.iterations + 1, dtype)
        step = m / (1 - ops.power(ops.cast(self.beta_1, dtype), count))
        scale = v / (1 - ops.power(ops.cast(self.beta_2, dtype), count))
        step = step / (ops.sqrt(scale) + self.epsilon)
        if decay:
            step = step + decay * variable
            of_weights = ops.sqrt(ops.sum(ops.square(variable)))
            of_step = ops.sqrt(ops.sum(ops.square(step)))
            whole = ops.logical_and(of_weights > 0, of_step > 0)
            rate = rate * ops.where(whole, of_weights / of_step, 1.0)
        self.assign_sub(variable, rate * step)


def weights_average(optimizer: keras.optimizers.Optimizer) -> list | None:
    """The averages that an optimizer keeps, in the order of the variables; else None.

    Args:
        optimizer: One of this file or any other, alone or inside a loss scale.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "averages", None)


def steps_done(optimizer: keras.optimizers.Optimizer) -> int:
    """Number of steps of `model.fit` that are in the weights, parts of updates too.

    On JAX it is current between epochs only.

    Args:
        optimizer: Any of Keras or of this file, alone or inside a loss scale.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return int(to_numpy(inner._iterations.value))


def learning_rate(optimizer: keras.optimizers.Optimizer, step: int) -> float:
    """The learning rate by which a step moves the weights.

    It is that of a variable whose factor is 1.

    Args:
        optimizer: As that of `steps_done`.
        step: Number of steps before this one.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = inner._learning_rate  # a schedule or a variable; what it gives is public
    rate = rate(step) if callable(rate) else rate.value
    return float(to_numpy(rate))
