"""Weights of the papers' own code, by our names and in Keras' layouts.

`w` is an array of PyTorch: a linear layer's is (out, in), a convolution's
(out, in, height, width), a depthwise one's (channels, 1, height, width).
"""


def state_of(golden):
    """The state dict in a golden file."""
    return {k[6:]: golden[k] for k in golden.files if k.startswith("state/")}


def assign(model, weights):
    """Give a model exactly these weights, by path."""
    assert {v.path for v in model.weights} == set(weights)
    for variable in model.weights:
        variable.assign(weights[variable.path])


def dense(ours, theirs, state):
    return {
        f"{ours}/kernel": state[f"{theirs}.weight"].T,
        f"{ours}/bias": state[f"{theirs}.bias"],
    }


def patches(ours, theirs, state):
    """A convolution with stride = kernel: (P, P, C, D), flattened to a matrix."""
    w = state[f"{theirs}.weight"].transpose(2, 3, 1, 0)
    return {
        f"{ours}/project/kernel": w.reshape(-1, w.shape[-1]),
        f"{ours}/project/bias": state[f"{theirs}.bias"],
    }


def norm(ours, theirs, state):
    return {
        f"{ours}/gamma": state[f"{theirs}.weight"],
        f"{ours}/beta": state[f"{theirs}.bias"],
    }


def peg(ours, theirs, state):
    return {
        f"{ours}/kernel": state[f"{theirs}.proj.0.weight"].transpose(2, 3, 0, 1),
        f"{ours}/bias": state[f"{theirs}.proj.0.bias"],
    }


def mlp(ours, theirs, state):
    return {
        **dense(f"{ours}/mlp/expand", f"{theirs}.mlp.fc1", state),
        **dense(f"{ours}/mlp/reduce", f"{theirs}.mlp.fc2", state),
        **norm(f"{ours}/norm1", f"{theirs}.norm1", state),
        **norm(f"{ours}/norm2", f"{theirs}.norm2", state),
    }


def vit(state, depth):
    """timm's `VisionTransformer`; `pos_block.{i}`, as in Twins, is a PEG."""
    weights = {
        **patches("patches", "patch_embed.proj", state),
        **norm("norm", "norm", state),
        **dense("head", "head", state),
        "tokens/class_token": state["cls_token"],
    }
    if "pos_embed" in state:
        weights["position/table"] = state["pos_embed"]
    if "dist_token" in state:
        weights["tokens/distillation_token"] = state["dist_token"]
        weights |= dense("head_dist", "head_dist", state)
    for i in range(depth):
        ours, theirs = f"block{i}", f"blocks.{i}"
        weights |= mlp(ours, theirs, state)
        weights |= dense(f"{ours}/attention/qkv", f"{theirs}.attn.qkv", state)
        weights |= dense(f"{ours}/attention/project", f"{theirs}.attn.proj", state)
        if f"pos_block.{i}.proj.0.weight" in state:
            weights |= peg(f"peg{i}", f"pos_block.{i}", state)
    return weights


def lvvit(state, depth):
    """TokenLabeling's `LV_ViT`; its auxiliary head is our token head."""
    weights = {
        **patches("patches/project", "patch_embed.proj", state),
        **norm("norm", "norm", state),
        **dense("head", "head", state),
        **dense("token_head", "aux_head", state),
        "tokens/class_token": state["cls_token"],
        "position/table": state["pos_embed"],
    }
    for i in (1, 2, 3):
        kernel = state[f"patch_embed.conv{i}.weight"].transpose(2, 3, 1, 0)
        ours, theirs = f"patches/norm{i}", f"patch_embed.bn{i}"
        weights[f"patches/convolution{i}/kernel"] = kernel
        weights |= norm(ours, theirs, state)
        weights[f"{ours}/moving_mean"] = state[f"{theirs}.running_mean"]
        weights[f"{ours}/moving_variance"] = state[f"{theirs}.running_var"]
    for i in range(depth):
        ours, theirs = f"block{i}", f"blocks.{i}"
        weights |= mlp(ours, theirs, state)
        kernel = state[f"{theirs}.attn.qkv.weight"].T
        weights[f"{ours}/attention/qkv/kernel"] = kernel
        weights |= dense(f"{ours}/attention/project", f"{theirs}.attn.proj", state)
    return weights


def pcpvt(state, depths):
    """timm's `Twins` with spatial-reduction attention."""
    weights = {**norm("norm", "norm", state), **dense("head", "head", state)}
    for s, depth in enumerate(depths):
        embed = f"patch_embeds.{s}"
        weights |= patches(f"stage{s}_patches", f"{embed}.proj", state)
        weights |= norm(f"stage{s}_patches_norm", f"{embed}.norm", state)
        weights |= peg(f"stage{s}_peg", f"pos_block.{s}", state)
        for i in range(depth):
            ours, theirs = f"stage{s}_block{i}", f"blocks.{s}.{i}"
            weights |= mlp(ours, theirs, state)
            ours, theirs = f"{ours}/attention", f"{theirs}.attn"
            weights |= dense(f"{ours}/query", f"{theirs}.q", state)
            weights |= dense(f"{ours}/key_value", f"{theirs}.kv", state)
            weights |= dense(f"{ours}/project", f"{theirs}.proj", state)
            if f"{theirs}.sr.weight" in state:
                weights |= patches(f"{ours}/reduce", f"{theirs}.sr", state)
                weights |= norm(f"{ours}/norm", f"{theirs}.norm", state)
    return weights
