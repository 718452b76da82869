"""Shapes of a checkpoint's tensors, read so that damage becomes a sentence."""

import re


class Shapes:
    """Shapes by timm's names.

    Args:
        location: What a message calls the checkpoint.
        of: The shapes.
    """

    def __init__(self, location, of):
        self.location = location
        self.of = of

    def __contains__(self, name):
        return name in self.of

    def __iter__(self):
        return iter(self.of)

    def any(self, pattern):
        """Whether the pattern is found in any name."""
        return any(re.search(pattern, name) for name in self.of)

    def dims(self, name, rank):
        """The shape of a tensor that must be there."""
        if name not in self.of:
            raise ValueError(
                f"{self.location} must have the tensor {name}; it is damaged, or "
                "the checkpoint of another model."
            )
        shape = self.of[name]
        if len(shape) != rank or 0 in shape:
            raise ValueError(
                f"{self.location}: the tensor {name} must have {rank} dimensions, got "
                f"shape {shape}; the file is damaged, or of another model."
            )
        return shape

    def depth(self, pattern):
        """Number of blocks or stages: their indices must be 0, 1, 2, ..."""
        found = {int(m[1]) for x in self.of if (m := re.match(pattern, x))}
        if found != set(range(len(found))):
            lost = min(set(range(len(found) + 1)) - found)
            raise ValueError(
                f"{self.location} lacks number {lost} of its blocks or stages; it "
                "is damaged."
            )
        return len(found)

    def agree(self, name, width, dim):
        """Refuse a tensor of another width before a model of it is built."""
        if width != dim:
            raise ValueError(
                f"{self.location}: the tensor {name} has shape "
                f"{self.of[name]}, which does not fit the width {dim} of its "
                "patches. The file is damaged, or the checkpoint of another model."
            )

    def hidden(self, name, dim):
        hidden, inside = self.dims(name, 2)
        self.agree(name, inside, dim)
        return hidden

    def not_gated(self, name, hidden):
        """Refuse an MLP whose second layer takes another width than the first gives."""
        inside = self.dims(name, 2)[1]
        if inside != hidden:
            raise ValueError(
                f"{self.location}: the tensor {name} takes {inside} values, the layer "
                f"before it gives {hidden}. It is a gated MLP (SwiGLU), which no model "
                "of keras_vit has, or damaged."
            )

    def classes(self, width):
        if not self.any(r"^head\."):
            return 0
        classes, inside = self.dims("head.weight", 2)
        self.agree("head.weight", inside, width)
        return classes


def row_of(variants, arguments, sizes):
    """The row of `VARIANTS` with these sizes and heads, for the model's name.

    The first row where none has them.
    """
    same = [
        name
        for name, row in variants.items()
        if all(getattr(row, x) == arguments[x] for x in (*sizes, "num_heads"))
    ]
    return same[0] if same else next(iter(variants))
