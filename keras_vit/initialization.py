"""How the sources initialise their weights: one column of numbers for each.

A column is chosen by name (`initialization="jax"`), so that a layer's configuration
stays a plain value; the weight says which role it plays.

`jax`   google-research/vision_transformer, `models_vit.py`: the ViT paper's code.
`timm`  timm's `VisionTransformer` with its default `weight_init`.
`deit`  facebookresearch/deit: as timm, with a class token like the position table.
`twins` Meituan-AutoML/Twins, `gvt.py`: as deit, convolutions by their fan-out.

PEG is not in the first three; there it has PyTorch's default, as in the CPVT paper.

"Truncated normal (0.02)" in timm and DeiT has bounds of +-2, a hundred standard
deviations, and is a plain normal distribution in effect.
"""

from keras import initializers


def _xavier_square(fan_in, fan_out):
    """Xavier uniform of a `(D, D)` matrix, also when several are stacked sideways."""
    return initializers.VarianceScaling(1.0, "fan_in", "uniform")


def _zeros(fan_in, fan_out):
    return initializers.Zeros()


def _normal(stddev):
    return lambda fan_in, fan_out: initializers.RandomNormal(stddev=stddev)


def _xavier(fan_in, fan_out):
    return initializers.GlorotUniform()


def _lecun(fan_in, fan_out):
    return initializers.LecunNormal()


def _torch_uniform(fan_in, fan_out):
    """PyTorch's default for a convolution, kernel and bias alike."""
    bound = fan_in**-0.5
    return initializers.RandomUniform(-bound, bound)


def _normal_of_fan_in(fan_in, fan_out):
    return initializers.RandomNormal(stddev=fan_in**-0.5)


def _normal_of_fan_out(fan_in, fan_out):
    return initializers.RandomNormal(stddev=(2 / fan_out) ** 0.5)


INITIALIZATIONS = {
    "jax": {
        "patch_kernel": _lecun,
        "patch_bias": _zeros,
        "position": _normal(0.02),
        "token": _zeros,
        "attention_kernel": _xavier_square,
        "mlp_kernel": _xavier,
        "mlp_bias": _normal(1e-6),
        "peg_kernel": _torch_uniform,
        "peg_bias": _torch_uniform,
        "probe": _xavier,
        "representation_kernel": _lecun,
        "head_kernel": _zeros,
    },
    "timm": {
        "patch_kernel": _torch_uniform,
        "patch_bias": _torch_uniform,
        "position": _normal(0.02),
        "token": _normal(1e-6),
        "attention_kernel": _normal(0.02),
        "mlp_kernel": _normal(0.02),
        "mlp_bias": _zeros,
        "peg_kernel": _torch_uniform,
        "peg_bias": _torch_uniform,
        "probe": _normal_of_fan_in,
        "representation_kernel": _normal(0.02),
        "head_kernel": _normal(0.02),
    },
}
INITIALIZATIONS["deit"] = {**INITIALIZATIONS["timm"], "token": _normal(0.02)}
INITIALIZATIONS["twins"] = {
    **INITIALIZATIONS["deit"],
    "patch_kernel": _normal_of_fan_out,
    "patch_bias": _zeros,
    "peg_kernel": _normal_of_fan_out,
    "peg_bias": _zeros,
}


def initializer(initialization, role, fan_in=None, fan_out=None):
    """Return a new Keras initializer for one weight.

    Args:
        initialization: Key of `INITIALIZATIONS`.
        role: Which weight it is: a key of that column.
        fan_in: Number of inputs of one output, for the roles that scale by it.
        fan_out: Number of outputs that one input reaches, likewise.

    Raises:
        ValueError: If `initialization` is not a key of `INITIALIZATIONS`.
    """
    if initialization not in INITIALIZATIONS:
        known = ", ".join(repr(key) for key in INITIALIZATIONS)
        raise ValueError(
            f"initialization must be one of {known}, got {initialization!r}."
        )
    return INITIALIZATIONS[initialization][role](fan_in, fan_out)
