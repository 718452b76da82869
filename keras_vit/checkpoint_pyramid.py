"""Arguments of a Twins-PCPVT, from the shapes of its checkpoint."""

import dataclasses

from keras_vit import pcpvt
from keras_vit.checkpoint_configs import ASK
from keras_vit.checkpoint_shapes import row_of


def pyramid(reader):
    """All arguments of `PCPVT`.

    Args:
        reader: That of `checkpoint_arguments`.
    """
    stages = range(reader.shapes.depth(r"patch_embeds\.(\d+)\."))
    if len(stages) != len(pcpvt.PATCH_SIZES):
        raise ValueError(f"A PCPVT must have 4 stages, got {len(stages)}.")
    convolutions = [
        reader.shapes.dims(f"patch_embeds.{s}.proj.weight", 4) for s in stages
    ]
    patches = tuple(shape[2] for shape in convolutions)
    if patches != pcpvt.PATCH_SIZES:
        raise ValueError(
            f"Patches of a PCPVT must be {pcpvt.PATCH_SIZES}, got {patches}."
        )
    dims = tuple(shape[0] for shape in convolutions)
    first = [f"blocks.{s}.0." for s in stages]
    reductions = [f"{x}attn.sr.weight" for x in first]
    row = {f.name: f.default for f in dataclasses.fields(pcpvt.Variant)}
    row |= {
        "embed_dims": dims,
        "depths": tuple(reader.shapes.depth(rf"blocks\.{s}\.(\d+)\.") for s in stages),
        "mlp_ratios": tuple(
            reader.shapes.hidden(f"{x}mlp.fc1.weight", dim) / dim
            for x, dim in zip(first, dims, strict=True)
        ),
        "sr_ratios": tuple(
            reader.shapes.dims(x, 4)[2] if x in reader.shapes else 1 for x in reductions
        ),
        "peg": reader.shapes.any(r"^pos_block\."),
        "qkv_bias": reader.shapes.any(r"attn\.(q|kv)\.bias"),
        "gelu": reader.value("gelu", "exact"),
    }
    if dims == row["embed_dims"] == pcpvt.VARIANTS["small"].embed_dims:
        row["num_heads"] = reader.value("num_heads", (1, 2, 5, 8), "Twins-PCPVT")
    else:
        ask = ASK["num_heads"].format(sizes=f", of each stage; widths {dims}")
        row["num_heads"] = reader.value("num_heads", (1, 1, 1, 1), ask=ask)
    row["num_classes"] = reader.shapes.classes(dims[-1])
    row |= reader.pixels("PCPVT", row)
    return {"variant": row_of(pcpvt.VARIANTS, row, ("depths", "embed_dims")), **row}
