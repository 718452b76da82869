"""Published checkpoints, in one line.

    model = keras_vit.from_checkpoint("hf:timm/vit_small_patch16_224.augreg_in21k")

The way of a checkpoint: `checkpoint_files` opens it, `checkpoint_layouts` gives its
tensors timm's names, `checkpoint_arguments` infers the model, `checkpoint_weights` fits
the tensors to the model's variables. `checkpoint_write` goes back.
"""

import dataclasses
import math
import warnings
from pathlib import Path

import keras
import numpy as np

from keras_vit.checkpoint_arguments import MODULES, architecture
from keras_vit.checkpoint_files import open_checkpoint
from keras_vit.checkpoint_layouts import describe_unknown, recognize
from keras_vit.checkpoint_weights import adapt, weights

# What an argument of the caller may leave out of the file, or make fresh in the model:
# beginnings of timm's names, or of our paths where timm has none.
TOUCHED = {
    "num_classes": ("head.", "head_dist.", "aux_head."),
    "token_weight": ("aux_head.",),
    "position": ("pos_embed", "pos_block.", "block"),
    "peg_positions": ("pos_block.", "peg_before"),
    "peg": ("pos_block.",),
    "pool": ("attn_pool.", "reg_token"),
    "num_registers": ("reg_token",),
    "distillation_token": ("dist_token", "head_dist."),
    "representation_size": ("pre_logits.",),
    "layer_scale": ("blocks.",),
    "qk_norm": ("blocks.",),
}
GROUPS = {  # of the blocks, what exactly
    "layer_scale": (".ls1.", ".ls2."),
    "qk_norm": (".q_norm.", ".k_norm."),
    "position": ("pos_", "/attention/bias/"),
}
SIZES = {  # parts of timm's names of the tensors whose shape an argument decides
    "num_heads": ("q_norm", "k_norm"),
    "embed_dim": ("",),
    "embed_dims": ("",),
    "mlp_ratio": ("mlp.",),
    "mlp_ratios": ("mlp.",),
    "sr_ratios": ("attn.sr",),
    "num_registers": ("reg_token",),
    "peg_kernel_size": ("pos_block",),
    "stem_width": ("patch_embed",),
}
SHOWN_FIRST = ("image_size", "patch_size", "num_classes", "normalization")
NOT_SHOWN = ("labels", "variant", "initialization")
SHOW_PROGRESS = 100_000_000  # values


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """What `from_checkpoint` makes of a checkpoint.

    Args:
        source: File, folder or name on the hub.
        layout: `"google"`, `"timm"`, `"hf"` or `"keras"`.
        family: Function of `keras_vit`.
        arguments: What it is called with.
        parameters: Number of values of the model.
        table_grid: `(h, w)` of the file's position table; None without one.
        used: Number of tensors of the file that are in the model.
        fresh: Weights that are not in the file: reasons, by our paths.
        left_out: Tensors of the file that are not in the model: reasons, by name.
        assumed: What nothing in the file says: reasons, by argument.
        notes: What was done to tensors on the way.
    """

    source: str
    layout: str
    family: str
    arguments: dict
    parameters: int
    table_grid: tuple[int, int] | None
    used: int
    fresh: dict[str, str]
    left_out: dict[str, str]
    assumed: dict[str, str]
    notes: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """What a user must know: what is fresh, guessed or no longer exact."""
        said = [note for note in self.notes if "kernel" in note or "labels" in note]
        if self.fresh:
            layers = sorted({path.rpartition("/")[0] for path in self.fresh})
            reasons = sorted(set(self.fresh.values()))
            said.append(
                f"fresh because of {', '.join(reasons)}, to be trained: "
                f"{', '.join(layers)}"
            )
        if self.layout in ("timm", "hf"):
            values = {**self.arguments, "table_grid": self.table_grid}
            said += [
                f"assumed {name}={values[name]!r} ({self.assumed[name]})"
                for name in ("num_heads", "normalization", "table_grid", "pool")
                if name in self.assumed
            ]
        return said

    def rows(self) -> list[tuple[str, str]]:
        """What to show of it: pairs of a name and a text."""
        rows = [
            ("source", self.source),
            ("layout", self.layout),
            ("model", f"keras_vit.{self.family}"),
            ("parameters", f"{self.parameters:,}"),
        ]
        if self.table_grid is not None:
            why = self.assumed.get("table_grid")
            text = "{} x {} patches".format(*self.table_grid)
            text += f" (assumed: {why})" if why else ""
            rows.append(("position table", text))
        names = [x for x in SHOWN_FIRST if x in self.arguments]
        names += [x for x in self.arguments if x not in (*SHOWN_FIRST, *NOT_SHOWN)]
        for name in names:
            why = self.assumed.get(name)
            text = repr(self.arguments[name])
            rows.append((name, f"{text} (assumed: {why})" if why else text))
        labels = self.arguments.get("labels")
        if labels:
            some = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
            rows.append(("labels", f"{len(labels)}: {some}"))
        rows.append(("tensors used", str(self.used)))
        rows += [("note", note) for note in self.notes]
        rows += _grouped("fresh", self.fresh)
        rows += _grouped("left out", self.left_out)
        return rows

    def __str__(self):
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _grouped(what, reasons):
    """One row a reason."""
    groups = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    rows = []
    for reason, names in groups.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        rows.append((what, f"{', '.join(names[:4])}{more}: {reason}"))
    return rows


def from_checkpoint(source, **overrides):
    """Build the model of a published checkpoint and load its weights.

    Reads Google's `.npz` (vision_transformer, AugReg, big_vision), safetensors of timm
    and Hugging Face (ViT, DeiT, DeiT III, registers, CLIP's and SigLIP's image towers,
    Twins-PCPVT), `.pth` of DeiT, LV-ViT and Twins (these need torch), CPVT, and our own
    `.keras` files. Which it is, its tensors tell.

    Every tensor of the file is used or left out for a reason, every weight of the model
    is loaded or fresh because an override makes it so; anything else is an error.
    `inspect_checkpoint` says all of it.

    Args:
        source: A file; a folder with `config.json` and weights; or
            `"hf:OWNER/NAME"`, perhaps with `@REVISION`, on the Hugging Face hub.
        **overrides: Arguments of the model that shall be others. `image_size` (an int,
            `(height, width)` or None for any) resamples the position table by the
            method of the checkpoint's own code; `patch_size` the patch kernel by
            FlexiViT's pseudo-inverse; `num_classes` other than the file's gives a fresh
            head, 0 none; `normalization=None` leaves the pixels to the caller. What the
            file does not tell, such as `num_heads`, is asked for by an error. Of a file
            whose position table is not square, `table_grid=(h, w)` tells its grid.

    Returns:
        `keras.Model`: raw images `(B, height, width, 3)` of 0..255 to logits.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If a library for this kind of file is not installed.
        OSError: If the hub cannot be reached.
        ValueError: If the file is damaged, of another model, or does not tell all that
            is needed; or an override is unknown or does not fit.
    """
    model, report = load(source, **overrides)
    if report.warnings:
        warnings.warn(f"{source}: {'; '.join(report.warnings)}.", stacklevel=2)
    return model


def load(source, **overrides):
    """`from_checkpoint` that warns of nothing and returns its report too."""
    model, plan, report = _prepare(source, overrides)
    _load(plan, report)
    return model, report


def inspect_checkpoint(source, **overrides) -> CheckpointReport:
    """Say what `from_checkpoint` would do with the same arguments.

    The tensors are not read.

    Raises:
        Exception: As `from_checkpoint` does.
    """
    return _prepare(source, overrides)[2]


def _prepare(source, overrides):
    """The model, pairs of a weight and its tensor, and the report."""
    file = _open(source)
    if file.kind == "keras":
        named, layout, left_out = dict(file.tensors), "keras", {}
        found = architecture(None, file, overrides)
    else:
        recognized = recognize(file.tensors, file.location)
        named, layout = recognized.tensors, recognized.layout
        left_out = {**file.left_out, **recognized.left_out}
        found = architecture(recognized, file, overrides)
    arguments = _arguments(found, overrides)
    model = getattr(MODULES[found.family], found.family)(**arguments)
    adapted = adapt(named, found, model)
    plan, fresh, reasons = _match(model, adapted.tensors, overrides, arguments, file)
    report = CheckpointReport(
        source=str(source),
        layout=layout,
        family=found.family,
        arguments=arguments,
        parameters=model.count_params(),
        table_grid=found.table_grid,
        used=len({name for _, tensor in plan for name in tensor.names}),
        fresh=fresh,
        left_out={**left_out, **reasons},
        assumed={k: v for k, v in found.assumed.items() if k not in overrides},
        notes=(*adapted.notes, *_other_labels(found, overrides, fresh)),
    )
    return model, plan, report


def _other_labels(found, overrides, fresh):
    """A note on a head that was trained for other classes, as many as those wanted."""
    old, new = found.arguments.get("labels"), overrides.get("labels")
    if not old or not new or tuple(old) == tuple(new) or "head/kernel" in fresh:
        return []
    return ["the head is that of other labels: it was trained for the file's"]


def _open(source):
    if isinstance(source, str | Path) and str(source).endswith(".keras"):
        from keras_vit.checkpoint_write import as_checkpoint
        from keras_vit.model_file import read_model

        return as_checkpoint(read_model(Path(source).expanduser()), str(source))
    return open_checkpoint(source)


def _arguments(found, overrides):
    """Arguments of the model, and those that follow from others."""
    given = {key: x for key, x in overrides.items() if key != "table_grid"}
    arguments = {**found.arguments, **given}
    num_classes, labels = arguments["num_classes"], arguments.get("labels")
    if "labels" not in given and labels is not None and len(labels) != num_classes:
        arguments["labels"] = None
    new_head = num_classes != found.arguments["num_classes"]
    if found.family == "LVViT" and new_head and "token_weight" not in given:
        arguments["token_weight"] = 0  # an untrained token head only adds noise
    if found.table_grid is not None and "position_grid" not in given:
        size = arguments["image_size"]
        dynamic = size is None or (isinstance(size, tuple | list) and None in size)
        arguments["position_grid"] = found.table_grid if dynamic else None
    return arguments


def _match(model, tensors, overrides, arguments, file):
    """Give every weight its tensor.

    Returns:
        Pairs of a weight and a tensor; reasons for fresh weights, by our paths; reasons
        for tensors without a weight, by their names in the file.
    """
    plan, fresh, missing, used = [], {}, [], set()
    for weight in weights(model):
        tensor = tensors.get(weight.name)
        if tensor is not None and tensor.shape != weight.shape:
            head = weight.name.startswith(TOUCHED["num_classes"])
            if not (head and "num_classes" in overrides):
                raise ValueError(_wrong_shape(weight, tensor, file, overrides))
            tensor = None
        if tensor is not None:
            plan.append((weight, tensor))
            used.add(weight.name)
        elif why := _override(weight.name, overrides):
            fresh[weight.variable.path] = f"{why}={overrides[why]!r}"
        else:
            missing.append(weight)
    if missing:
        names = [f"{x.name} (our {x.variable.path})" for x in missing[:3]]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{file.location} lacks tensors that this model needs, by timm's names "
            f"{', '.join(names)}{more}. The file is damaged, or the checkpoint of "
            "another model."
        )
    left_out, unknown = {}, []
    for name, tensor in tensors.items():
        if name in used:
            continue
        why = _override(name, overrides)
        if why is None:
            unknown.append(tensor)
        for theirs in tensor.names if why else ():
            left_out[theirs] = f"{why}={overrides[why]!r}"
            if name.startswith("aux_head.") and not arguments["token_weight"]:
                left_out[theirs] += "; untrained, it would only add noise"
    if unknown:
        raise ValueError(
            f"{file.location} has tensors that keras_vit's {model.name} has no place "
            f"for: {describe_unknown(unknown)}. It is another model, or damaged."
        )
    return plan, fresh, left_out


def _override(name, overrides):
    """The override that explains why a tensor has no weight, or a weight no tensor."""
    for key in overrides:
        if not name.startswith(TOUCHED.get(key, ("\0",))):
            continue
        if key not in GROUPS or any(part in name for part in GROUPS[key]):
            return key
    return None


def _wrong_shape(weight, tensor, file, overrides):
    """Which tensor, both shapes, and the likely cause."""
    sizes = [
        key
        for key, parts in SIZES.items()
        if key in overrides and any(part in weight.name for part in parts)
    ]
    if sizes:
        cause = f"Leave out {', '.join(f'{key}=' for key in sizes)}: the file knows"
    elif weight.name == "pos_embed":
        cause = "Give table_grid=(height, width) of its table, or another position"
    else:
        cause = "The file is damaged, or the checkpoint of another model"
    return (
        f"{file.location}: the tensor {', '.join(tensor.names)} has shape "
        f"{tensor.shape}, the model needs {weight.shape} ({weight.variable.path}). "
        f"{cause}."
    )


def _load(plan, report):
    """Read every tensor, check that it holds numbers, and assign it."""
    total = sum(math.prod(weight.shape) for weight, _ in plan)
    bar = (
        keras.utils.Progbar(total, unit_name="value") if total > SHOW_PROGRESS else None
    )
    for weight, tensor in plan:
        array = tensor.read()
        if not np.isfinite(array).all():
            raise ValueError(
                f"{report.source}: the tensor {', '.join(tensor.names)} holds values "
                "that are not finite; the file is damaged, or its training diverged."
            )
        weight.variable.assign(np.ascontiguousarray(weight.to_ours(array)))
        if bar is not None:
            bar.add(array.size)
