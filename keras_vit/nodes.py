"""Parts of a model by their names: its blocks, its tokens' grid, its features.

Shapes in this file:
    B batch, H x W pixels, h x w patch grid, N = h * w patch tokens, R prefix tokens, D
    embedding.
"""

import numbers

import keras

from keras_vit.embedding import FeatureMap
from keras_vit.encoder import unknown
from keras_vit.transformer import TransformerBlock

FORMATS = ("grid", "tokens")


def features(model, layers=-1, format="grid", *, prefix=False, normalize=False):
    """A Keras model of what chosen blocks put out, prefix tokens apart.

        model = keras_vit.features(vit, [3, 7, 11])
        maps = model(images)  # {"block3": (B, h, w, D), ...}

    It shares its weights with the model, and takes images of the same sizes; it can be
    saved and exported like any other.

    Args:
        model: Model of this package, or one that is built on it (`SemanticFPN`).
        layers: Which blocks, one or a list: numbers, -1 being the last, or names, such
            as `"block3"`, or `"peg0"` for what comes out of a PEG. Of a pyramid
            (`PCPVT`) numbers are those of its stages.
        format: `"grid"` for `(B, h, w, D)`, `"tokens"` for `(B, N, D)`.
        prefix: Whether class token, distillation token and registers come too,
            `(B, R, D)`, as `"block3_prefix"`.
        normalize: Whether each token passes the LayerNorm that the model has after its
            last block, with the weights that it has now.

    Returns:
        `keras.Model`: raw images `(B, H, W, 3)` to a dictionary by the name of the
        layer.

    Raises:
        ValueError: If there is no such layer or format; `prefix` is asked of a model or
            a layer without such tokens; or `normalize` of a model without that
            LayerNorm, of itself, or of a layer that is not as wide.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    given = [layers] if isinstance(layers, str | numbers.Integral) else list(layers)
    if not given:
        raise ValueError("layers must be at least one, such as -1, got none.")
    names = [node_name(model, layer) for layer in given]
    num_prefix = prefix_length(model)
    found = {}
    for name in names:
        x = model.get_layer(name).output
        is_map = len(x.shape) == 4  # patches, or a stage of a pyramid
        if prefix and (is_map or not num_prefix):
            raise ValueError(
                f"prefix must be False for {name!r} of {model.name!r}: there are no "
                "prefix tokens."
            )
        x = _normalized(model, name, x) if normalize else x
        if is_map:
            tokens = keras.layers.Reshape((-1, x.shape[-1]), name=f"{name}_flat")
            found[name] = x if format == "grid" else tokens(x)
            continue
        if format == "grid":
            grid = _grid_node(model, name).output
            found[name] = FeatureMap(num_prefix, name=f"{name}_map")(x, grid)
        else:
            found[name] = x[:, num_prefix:]
        if prefix:
            found[f"{name}_prefix"] = x[:, :num_prefix]
    return keras.Model(model.input, found, name=f"{model.name}_features")


def node_name(model, layer, argument="layers"):
    """Name of the node that a number or a name of a layer means.

    Raises:
        ValueError: If there is none; the text names the `argument`.
    """
    names = [x.name for x in model.layers]
    kind = "stage" if "stage0" in names else "block"
    numbered = [x for x in names if x.removeprefix(kind).isdecimal()]
    if not numbered:
        raise ValueError(not_ours(model))
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        if not -len(numbered) <= layer < len(numbered):
            raise ValueError(
                f"{argument} must be in 0..{len(numbered) - 1}, the {kind}s of "
                f"{model.name!r}, or from the end, -1; got {layer}."
            )
        return numbered[layer]
    known = [x.name for x in model.layers if len(_output_shape(x)) in (3, 4)]
    if layer not in known:
        raise ValueError(unknown(argument, layer, known))
    return layer


def not_ours(model):
    """Sentence for a model whose blocks are not there, or not told apart."""
    return (
        f"{model.name!r} must be a model of keras_vit that holds its blocks itself, "
        "each called once; one within another is model.get_layer(NAME)."
    )


def _output_shape(layer):
    shape = getattr(getattr(layer, "output", None), "shape", ())
    return shape or ()


def _normalized(model, name, x):
    """`x` after a copy of the model's last LayerNorm: to share it would entangle."""
    norms = [layer for layer in model.layers if layer.name == "norm"]
    if not norms or name == "norm":
        raise ValueError(
            f"normalize must be False for {name!r}: {model.name!r} has no LayerNorm "
            "after it."
        )
    norm = norms[0]
    if norm.gamma.shape[0] != x.shape[-1]:
        raise ValueError(
            f"normalize must be False for {name!r}: it is {x.shape[-1]} wide, the "
            f"last LayerNorm {norm.gamma.shape[0]}."
        )
    own = type(norm).from_config({**norm.get_config(), "name": f"{name}_norm"})
    y = own(x)
    own.set_weights(norm.get_weights())
    return y


def _grid_node(model, name):
    """The layer whose output has the grid that the tokens of a node were."""
    names = [layer.name for layer in model.layers]
    if "patches" in names:
        return model.get_layer("patches")
    own = f"{name.partition('_')[0]}_patches"
    last = [x for x in names if x.startswith("stage") and x.endswith("_patches")][-1]
    return model.get_layer(own if own in names else last)


def stride_of(model, name):
    """How many pixels a token of a node is wide."""
    grid = _grid_node(model, name).name
    stride = 1
    for layer in model.layers:
        if layer.name.endswith("patches"):
            stride *= layer.patch_size
        if layer.name == grid:
            break
    return stride


def prefix_length(model):
    """R, the number of tokens before the patches."""
    tokens = [layer for layer in model.layers if layer.name == "tokens"]
    return sum(weight.shape[1] for layer in tokens for weight in layer.prefix)


def block_name(model, block):
    """Name of a block, of its number or its name.

    Raises:
        ValueError: If there is no such block.
    """
    name = node_name(model, block, "block")
    if not isinstance(model.get_layer(name), TransformerBlock):
        raise ValueError(f"block must be one that attends, such as -1, got {block!r}.")
    return name
