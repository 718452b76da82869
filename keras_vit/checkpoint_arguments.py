"""Which model a checkpoint is for: family and arguments, from shapes and configuration.

What neither tells is asked for by name, all of it at once.

Shapes in this file: D embedding, P patch side, K prefix rows of a position table.
"""

import dataclasses
import math
import re

from keras_vit import cpvt, lvvit, pcpvt, vit
from keras_vit.checkpoint_configs import ASK, NUM_HEADS, facts, usual_pixels
from keras_vit.checkpoint_files import CheckpointFile
from keras_vit.checkpoint_layouts import Recognized, describe_unknown
from keras_vit.checkpoint_pyramid import pyramid
from keras_vit.checkpoint_shapes import Shapes, row_of
from keras_vit.checkpoint_weights import is_known
from keras_vit.encoder import POOLS

MODULES = {"ViT": vit, "CPVT": cpvt, "LVViT": lvvit, "PCPVT": pcpvt}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The model of a checkpoint, at the size of the file.

    Args:
        family: Function of `keras_vit`.
        arguments: All its arguments.
        table_grid: `(h, w)` of the file's position table; None without one.
        table_prefix: K, rows of the table before those of the patches.
        assumed: What nothing in the file said: reasons, by argument.
    """

    family: str
    arguments: dict
    table_grid: tuple[int, int] | None
    table_prefix: int
    assumed: dict[str, str]


def architecture(
    recognized: Recognized, file: CheckpointFile, given: dict
) -> Architecture:
    """Infer the model of a checkpoint.

    Args:
        recognized: Its tensors by timm's names.
        file: The file, for its configuration.
        given: What the caller says; it wins.

    Raises:
        ValueError: If something is missing that cannot be inferred.
    """
    if file.description:
        return _described(file.description)
    unknown = [x for name, x in recognized.tensors.items() if not is_known(name)]
    if unknown:
        raise ValueError(
            f"{file.location} has tensors that no model of keras_vit has a place for: "
            f"{describe_unknown(unknown)}. It is another model, or damaged."
        )
    reader = _Reader(recognized, file, given)
    family = reader.family()
    arguments = pyramid(reader) if family == "PCPVT" else reader.plain(family)
    if reader.missing:
        asked = "; ".join(f"{name}= ({why})" for name, why in reader.missing.items())
        raise ValueError(f"{file.location} does not tell {asked}. Please give it.")
    return Architecture(
        family, arguments, reader.grid, reader.table_prefix, reader.assumed
    )


def _described(description):
    try:
        family, arguments = description["family"], dict(description["arguments"])
        for name, value in arguments.items():
            if isinstance(value, list):
                arguments[name] = tuple(value)
        grid = description["table_grid"]
        return Architecture(
            family,
            arguments,
            None if grid is None else tuple(grid),
            int(description["table_prefix"]),
            {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The description of the model in the file must be whole: {error!r}."
        ) from error


CLASSED = ("cls_token", "attn_pool.latent")


class _Reader:
    """One pass over the facts; what is missing and assumed is collected."""

    def __init__(self, recognized, file, given):
        shapes = {name: x.shape for name, x in recognized.tensors.items()}
        self.shapes = Shapes(file.location, shapes)
        self.recognized = recognized
        self.file = file
        self.given = given
        self.facts = facts(file.config, file.preprocessor)
        self.timm = recognized.layout == "timm"
        self.missing = {}
        self.assumed = {}
        self.grid, self.table_prefix = None, 0

    def family(self):
        if "patch_embeds.0.proj.weight" in self.shapes:
            return "PCPVT"
        if self.shapes.any(r"^patch_embed\.(conv|bn)"):
            return "LVViT"
        pegs = any(name.startswith("pos_block.") for name in self.shapes)
        return "CPVT" if pegs and "pos_embed" not in self.shapes else "ViT"

    def value(self, name, otherwise=None, why=None, ask=None):
        """What the caller gives, the configuration says, or else is assumed."""
        if name in self.given:
            return self.given[name]
        if name in self.facts:
            return self.facts[name]
        if ask is not None:
            self.missing[name] = ask
        elif why is not None:
            self.assumed[name] = why
        return otherwise

    # --- ViT, CPVT, LV-ViT

    def plain(self, family):
        conv = "patch_embed.proj.weight"
        dim, channels, patch, width = self.shapes.dims(conv, 4)
        if patch != width:
            raise ValueError(
                f"{self.file.location}: Patches must be square, got {patch} x {width}."
            )
        if family != "LVViT" and channels != 3:
            raise ValueError(
                f"{self.file.location}: Images must have 3 channels, got {channels}."
            )
        hidden = self.shapes.hidden("blocks.0.mlp.fc1.weight", dim)
        self.shapes.not_gated("blocks.0.mlp.fc2.weight", hidden)
        depth = self.shapes.depth(r"blocks\.(\d+)\.")
        row = {f.name: f.default for f in dataclasses.fields(MODULES[family].Variant)}
        row |= {
            "embed_dim": dim,
            "depth": depth,
            "mlp_ratio": hidden / dim,
            "qkv_bias": self.shapes.any(r"attn\.qkv\.bias"),
            "qk_norm": self.shapes.any(r"attn\.[qk]_norm\."),
            "layer_scale": 1e-5 if self.shapes.any(r"\.ls\d\.gamma") else None,
            "constant_drop_path": self.facts.get("constant_drop_path", False),
            "initialization": "jax" if self.recognized.layout == "google" else "timm",
        }
        row["num_heads"] = self.heads(dim, hidden, family)
        arguments = {"patch_size": patch, **row}
        arguments |= {"ViT": self.vit, "CPVT": self.cpvt, "LVViT": self.lvvit}[family](
            arguments
        )
        width = arguments.get("representation_size") or dim
        arguments["num_classes"] = self.shapes.classes(width)
        arguments |= self.pixels(family, arguments)
        arguments["epsilon"], arguments["gelu"] = (
            self.epsilon(family),
            self.gelu(family),
        )
        if family != "CPVT":
            arguments["resampling"] = self.resampling(family)
        variant = row_of(MODULES[family].VARIANTS, arguments, ("depth", "embed_dim"))
        return {"variant": variant, **arguments}

    def heads(self, dim, hidden, family):
        if self.recognized.num_heads:
            return self.given.get("num_heads", self.recognized.num_heads)
        if "blocks.0.attn.q_norm.weight" in self.shapes:
            heads = dim // self.shapes.dims("blocks.0.attn.q_norm.weight", 1)[0]
            return self.given.get("num_heads", heads)
        known = NUM_HEADS.get((dim, hidden))
        if family == "LVViT":
            rows = lvvit.VARIANTS.values()
            known = next((r.num_heads for r in rows if r.embed_dim == dim), None)
        if known is not None:
            return self.value("num_heads", known, f"every published model of D={dim}")
        sizes = f"; D={dim}, MLP {hidden}"
        return self.value("num_heads", 1, ask=ASK["num_heads"].format(sizes=sizes))

    def vit(self, found):
        names = self.shapes
        prefix, num_tokens, registers = self.prefix()
        self.table(found["embed_dim"], found["patch_size"], num_tokens, registers)
        position = "learned" if "pos_embed" in names else self.no_table()
        if position == "learned" and "pos_block.0.proj.0.weight" in names:
            position = "learned_peg"
        pre_logits = "pre_logits.fc.weight"
        activation = self.facts.get("pooler_act", "tanh")
        if pre_logits in names and activation != "tanh":
            raise ValueError(f"The pooler must have a tanh, it has {activation!r}.")
        return {
            **prefix,
            "class_position": self.table_prefix > 0,
            "norm_after_pool": prefix["pool"] == "mean" and "fc_norm.weight" in names,
            "position": position,
            "pre_norm": "norm_pre.weight" in names,
            "representation_size": self.shapes.dims(pre_logits, 2)[0]
            if pre_logits in names
            else None,
        }

    def prefix(self):
        """Arguments of the prefix tokens, and how many stand in the file.

        A class or distillation token that nobody pools is a register of ours.
        """
        names = self.shapes
        pool = self.pool()
        tokens = [x for x in ("cls_token", "dist_token") if x in names]
        registers = self.shapes.dims("reg_token", 3)[1] if "reg_token" in names else 0
        one_head = "head.weight" in names and "head_dist.weight" not in names
        unpooled = [
            name
            for name in tokens
            if pool != "class"
            or (name == "dist_token" and (one_head or self.hf_without_heads()))
        ]
        prefix = {
            "pool": pool,
            "num_registers": registers + len(unpooled),
            "distillation_token": "dist_token" in set(tokens) - set(unpooled),
        }
        return prefix, len(tokens), registers

    def hf_without_heads(self):
        """`DeiTModel`: its features are those of the class token alone."""
        return self.recognized.layout == "hf" and "head.weight" not in self.shapes

    def pool(self):
        if "attn_pool.latent" in self.shapes:
            default = "attention"
        elif "cls_token" in self.shapes and "fc_norm.weight" not in self.shapes:
            default = "class"
        else:
            default = "mean"
        guess = self.timm and not {"fc_norm.weight", *CLASSED} & set(self.shapes)
        why = "there is no class token" if guess and default == "mean" else None
        pool = self.value("pool", default, why)
        if pool not in POOLS:
            raise ValueError(
                f"{self.file.location} pools by {pool!r}; keras_vit by "
                f"{', '.join(map(repr, POOLS))}. Give pool='class' or pool='mean' to "
                "pool in another way."
            )
        if self.recognized.layout == "hf":
            self.shapes.dims("cls_token", 3)
        if pool == "class" and "cls_token" not in self.shapes:
            raise ValueError(
                f"pool='class' needs a class token, {self.file.location} has none; "
                "pool='mean' needs none."
            )
        return pool

    def cpvt(self, found):
        pegs = [
            int(m[1]) for x in self.shapes if (m := re.match(r"pos_block\.(\d+)", x))
        ]
        kernel = self.shapes.dims(f"pos_block.{min(pegs)}.proj.0.weight", 4)
        return {
            **self.prefix()[0],
            "peg_positions": tuple(sorted(set(pegs))),
            "peg_kernel_size": kernel[2],
            "initialization": "deit",
        }

    def lvvit(self, found):
        stem = self.shapes.dims("patch_embed.conv1.weight", 4)[0]
        sizes = found["embed_dim"], found["depth"], stem
        known = {
            (row.embed_dim, row.depth, row.stem_width): row.residual_scale
            for row in lvvit.VARIANTS.values()
        }.get(sizes)
        if known is None:
            scale = self.value("residual_scale", 1.0, ask=ASK["residual_scale"])
        else:
            scale = self.value("residual_scale", known, "LV-ViT of these sizes")
        self.table(found["embed_dim"], 2 * found["patch_size"], 1, 0)
        return {
            "patch_size": 2 * found["patch_size"],
            "stem_width": stem,
            "residual_scale": scale,
            "token_weight": 0.5 if self.shapes.any(r"^aux_head\.") else 0,
            "initialization": "deit",
        }

    def table(self, dim, patch, num_tokens, registers):
        """Find K and the grid of the position table."""
        if "pos_embed" not in self.shapes:
            return
        rows = self.shapes.dims("pos_embed", 3)[1]
        self.shapes.agree("pos_embed", self.shapes.of["pos_embed"][2], dim)
        choices = sorted({0, num_tokens, num_tokens + registers}, reverse=True)
        size = self.facts.get("image_size")
        grids = [
            self.given.get("table_grid"),
            size and [side // patch for side in size],
        ]
        for grid in grids:
            if grid is not None and rows - math.prod(grid) in choices:
                self.grid, self.table_prefix = tuple(grid), rows - math.prod(grid)
                return
        if self.given.get("table_grid") is not None:
            raise ValueError(
                f"table_grid={tuple(self.given['table_grid'])} must fit the "
                f"{rows} rows of the position table."
            )
        square = [
            k for k in choices if rows > k and math.isqrt(rows - k) ** 2 == rows - k
        ]
        if len(square) != 1:
            prefix = "with" if "cls_token" in self.shapes else "without a"
            self.missing["table_grid"] = (
                f"{ASK['table_grid']}, which has {rows} rows {prefix} cls_token"
            )
            square = [0]
        if square[0] < num_tokens and self.unsure_of_class_position():
            why = "square without a row for the class token"
            self.assumed["table_grid"] = why
        side = math.isqrt(rows - square[0])
        self.grid, self.table_prefix = (side, side), square[0]

    def no_table(self):
        """A file without a table: blind to positions, or knowing them otherwise."""
        why = "there is no table pos_embed: 'none', or 'rotary', 'sincos_2d', ..."
        return self.value("position", "none", ask=why)

    def unsure_of_class_position(self):
        """DeiT III, registers and big_vision have none; of others it is a guess."""
        sure = {"blocks.0.ls1.gamma", "reg_token"} & set(self.shapes)
        return self.timm and not sure and "table_grid" not in self.given

    def pixels(self, family, found):
        """Image size, normalisation and preprocessing."""
        size = self.facts.get("image_size")
        if self.grid is not None:
            size = tuple(side * found["patch_size"] for side in self.grid)
        size = size if "image_size" not in self.given else self.given["image_size"]
        normalization, crop, interpolation, why = usual_pixels(
            MODULES[family],
            self.recognized.layout,
            self.shapes,
            self.table_prefix,
            size,
        )
        if why is None:
            normalization = self.value("normalization", ask=ASK["normalization"])
        else:
            normalization = self.value("normalization", normalization, why)
        if normalization == "imagenet" and why is None:
            crop = 0.875 if crop == 0.9 else crop
        return {
            "image_size": size,
            "normalization": normalization,
            "crop_ratio": self.facts.get("crop_ratio", crop),
            "interpolation": self.facts.get("interpolation", interpolation),
            "labels": self.facts.get("labels"),
        }

    def epsilon(self, family):
        if family == "LVViT":
            return self.value("epsilon", 1e-5, "LV-ViT's own code")
        if self.recognized.layout == "hf":
            return self.value("epsilon", 1e-12, "the default of transformers")
        if "norm_pre.weight" in self.shapes:
            return self.value("epsilon", 1e-5, "that of CLIP")
        return self.value("epsilon", 1e-6, "that of all published ViT")

    def gelu(self, family):
        if self.recognized.layout == "google":
            return self.value("gelu", "tanh", "Flax's GELU")
        if {"norm_pre.weight", "attn_pool.latent"} & set(self.shapes):
            return self.value("gelu", "exact", ask=ASK["gelu"])  # CLIP, SigLIP: either
        return self.value("gelu", "exact", "that of PyTorch code")

    def resampling(self, family):
        if self.recognized.layout == "google":
            return "linear_corners"
        if family == "LVViT" or self.recognized.layout == "hf":
            return "bicubic"
        torch_file = self.file.kind == "torch" and not self.file.config
        return "bicubic" if torch_file else "bicubic_antialias"  # DeiT's, timm's
