"""What a batch is trained towards: soft labels of images and of their tokens.

A score map covers the file of its image, row 0 at the top. For each of its cells it has
k `values` (probabilities) and their `classes`; what is missing to 1 belongs to all
classes alike. Matrices and seeds are those of `training.augment`.

Shapes: B images of H x W pixels, `(h, w)` tokens, C classes, maps of `(m, n)` cells.
"""

import tensorflow as tf

from training.augment import MIX


def token_labels(
    values: tf.Tensor,
    classes: tf.Tensor,
    matrices: tf.Tensor,
    grid: tuple[int, int],
    num_classes: int,
    samples: int | None = None,
    crops: tf.Tensor | None = None,
) -> tf.Tensor:
    """Label of each token, read off the score map where the token came from.

    Points spread evenly over the cell of a token are taken to the map, which is read
    there, bilinear between the centres of its cells and constant beyond the outermost;
    the label is the mean. A point from outside the image has no label: like what is
    missing in the map, it belongs to all classes alike.

    Source: Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better
    Vision Transformers", https://arxiv.org/abs/2104.10858, with the RoIAlign
    of He et al. 2017, "Mask R-CNN", https://arxiv.org/abs/1703.06870.
    Differs from the source's code in that probabilities are averaged, not scores before
    the softmax, that rows sum to 1, and that x and y of a crop are not exchanged.

    Args:
        values: float16 `(B, m, n, k)`.
        classes: int32 `(B, m, n, k)`.
        matrices: `(B, 3, 3)`, from the image that is trained on to the one that was
            warped; what they place outside of that came from outside.
        grid: `(h, w)`.
        num_classes: C.
        samples: Points a token along each axis; None takes as many as a token has cells
            of the map, at least 2: exact where nothing moved and the grid divides the
            map.
        crops: `(B, 3, 3)`, from the image that was warped to the file of the map; None
            where these are the same.

    Returns:
        float32 `(B, h, w, C)`; every row sums to 1.

    Raises:
        tf.errors.InvalidArgumentError: If a class is not in 0..C - 1.
    """
    known = tf.reduce_all((classes >= 0) & (classes < num_classes))
    rule = f"The classes of a label map must be in 0..{num_classes - 1}, got another."
    tf.debugging.assert_equal(known, True, rule)
    size = tf.shape(values)[1:3]
    counts = tf.maximum(2, -(-size // grid)) if samples is None else [samples] * 2
    places, seen = _places(_points(grid, counts), matrices, crops)
    cells, weights = _corners(places, size)  # (B, N, S, 2, 2)
    weights *= seen[..., None, None] / tf.cast(tf.shape(seen)[2], tf.float32)
    labels = _collect(values, classes, cells, weights, num_classes)
    labels = tf.reshape(labels, (-1, *grid, num_classes))
    total = tf.reduce_sum(labels, axis=-1, keepdims=True)
    missing = tf.maximum(1 - total, 0) / num_classes
    return labels / tf.maximum(total, 1) + missing  # float16 may sum to more than 1


def _places(points, matrices, crops):
    """Where in the file the points came from, x and y, and 0 for those from outside.

    Takes `(N, S, 3)`, S points for each of N tokens; returns `(B, N, S, 2)` and
    float32 `(B, N, S)`.
    """
    places = tf.einsum("bij,nsj->bnsi", matrices, points)
    seen = tf.reduce_all((places >= 0) & (places <= 1), axis=-1)  # the third is 1
    if crops is not None:
        places = tf.einsum("bij,bnsj->bnsi", crops, places)
    return places[..., :2], tf.cast(seen, tf.float32)


def _collect(values, classes, cells, weights, num_classes):
    """Sum of the scores of cells, by weight, for each token and class: `(B N C,)`.

    Only k of the C classes are touched in a cell, so no map of all C is built.
    """
    batch, rows, columns, k = tf.unstack(tf.shape(values))
    tokens = tf.shape(cells)[1]

    def read(x):
        x = tf.reshape(x, (batch, rows * columns, k))
        return tf.gather(x, cells, batch_dims=1)  # (B, N, S, 2, 2, k)

    row = tf.reshape(tf.range(batch * tokens), (batch, tokens, 1, 1, 1, 1))
    entries = row * num_classes + tf.cast(read(classes), tf.int32)
    scores = weights[..., None] * tf.cast(read(values), tf.float32)
    size = batch * tokens * num_classes
    return tf.math.unsorted_segment_sum(scores, entries, size)


def _points(grid, counts):
    """Points spread over the cells of a grid, `(x, y, 1)`: `(h w, S, 3)`."""

    def along(cells, count):
        count = tf.cast(cells * count, tf.float32)
        return tf.reshape((tf.range(count) + 0.5) / count, (cells, -1))

    y, x = (along(*pair) for pair in zip(grid, tf.unstack(counts), strict=True))
    y = y[:, None, :, None] + tf.zeros_like(x)[None, :, None, :]  # (h, w, Sy, Sx)
    x = x[None, :, None, :] + tf.zeros_like(y)
    points = tf.stack([x, y, tf.ones_like(x)], axis=-1)
    return tf.reshape(points, (grid[0] * grid[1], -1, 3))


def _corners(places, size):
    """The four cells of a map around each place, and their bilinear weights.

    Takes places `(..., 2)`, x first, and the size `(m, n)` of the map; returns the
    numbers of the cells, row by row, and the weights, both `(..., 2, 2)`.
    """

    def along(place, count):
        last = tf.cast(count - 1, tf.float32)
        place = tf.clip_by_value(place * (last + 1) - 0.5, 0, last)
        low = tf.floor(place)
        cells = tf.stack([low, tf.minimum(low + 1, last)], axis=-1)
        part = place - low
        return tf.cast(cells, tf.int32), tf.stack([1 - part, part], axis=-1)

    x, weights_x = along(places[..., 0], size[1])
    y, weights_y = along(places[..., 1], size[0])
    cells = y[..., :, None] * size[1] + x[..., None, :]
    return cells, weights_y[..., :, None] * weights_x[..., None, :]


def image_labels(
    values: tf.Tensor,
    classes: tf.Tensor,
    matrices: tf.Tensor,
    num_classes: int,
    crops: tf.Tensor | None = None,
) -> tf.Tensor:
    """Label of each image, read off the score map: `(B, C)`.

    Source: Yun et al. 2021, "Re-labeling ImageNet: from Single to Multi-Labels, from
    Global to Localized Labels", https://arxiv.org/abs/2101.05022.

    Args and errors are those of `token_labels`.
    """
    labels = token_labels(values, classes, matrices, (1, 1), num_classes, crops=crops)
    return labels[:, 0, 0]


def mix(
    images: tf.Tensor,
    targets: dict[str, tf.Tensor],
    seed: tf.Tensor,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_probability: float = 1.0,
    cutmix_probability: float = 0.5,
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """Mix each image and its targets with those of another image of the batch.

        MixUp    lambda x + (1 - lambda) x'
        CutMix   x' inside a box, x outside

    with lambda ~ Beta(a, a), drawn once for the batch. The box has sqrt(1 - lambda) of
    each side and its centre anywhere in the image, to which it is cut. Targets of an
    image are mixed by the area that is left, those of a token by the part of the token
    that lies in the box. The partner is the image of the same place in the reversed
    batch; the middle one of an odd batch stays as it is.

    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization",
    https://arxiv.org/abs/1710.09412; Yun et al. 2019, "CutMix: Regularization Strategy
    to Train Strong Classifiers with Localizable Features",
    https://arxiv.org/abs/1905.04899; one of both by chance, and the partner: timm.

    Args:
        images: float32 `(B, H, W, channels)`.
        targets: By name; of images `(B, C)`, of tokens `(B, h, w, C)`.
        seed: int64 `(2,)`.
        mixup: a of MixUp; 0 for none.
        cutmix: a of CutMix; 0 for none.
        mix_probability: How often a batch is mixed at all.
        cutmix_probability: Where both are given, how often a mixed batch is cut.

    Returns:
        Images and targets of the same shapes.

    Raises:
        ValueError: If one of both is negative, or a probability is not in 0..1.
    """
    amounts = mixup, cutmix, mix_probability, cutmix_probability
    drawn = mix_draws(seed, tf.shape(images)[1:3], *amounts)
    if drawn is None:
        return images, targets
    size = tf.shape(images)[1:3]
    targets = {name: mixed(x, drawn, size) for name, x in targets.items()}
    return mixed(images, drawn, size), targets


def mix_draws(
    seed: tf.Tensor,
    size: tf.Tensor,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_probability: float = 1.0,
    cutmix_probability: float = 0.5,
) -> tf.Tensor | None:
    """What `mix` draws for a batch of images of `size` (H, W).

    Returns:
        float32 `(5,)`: top, bottom, left and right of a box, in pixels, and how much of
        each pixel in it is the partner's; None where nothing is ever mixed.

    Raises:
        ValueError: As `mix`.
    """
    if min(mixup, cutmix) < 0:
        raise ValueError(
            f"mixup and cutmix must not be negative, got {mixup} and {cutmix}."
        )
    chances = mix_probability, cutmix_probability
    if not (0 <= min(chances) and max(chances) <= 1):
        raise ValueError(
            "mix_probability and cutmix_probability must be in 0..1, got "
            f"{mix_probability} and {cutmix_probability}."
        )
    if not (mixup or cutmix) or not mix_probability:
        return None
    if not (mixup and cutmix):
        cutmix_probability = float(cutmix > 0)
    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, MIX), 3))
    mixes, cuts = tf.unstack(tf.random.stateless_uniform((2,), seeds[0]))
    mixes, cuts = mixes < mix_probability, cuts < cutmix_probability
    alpha = tf.where(cuts, float(cutmix), float(mixup))
    gammas = tf.random.stateless_gamma((2,), seeds[1], alpha)
    kept = tf.math.divide_no_nan(gammas[0], tf.reduce_sum(gammas))  # Beta: lambda
    kept = tf.where(mixes, kept, 1.0)

    size = tf.cast(size, tf.float32)
    centre = tf.floor(tf.random.stateless_uniform((2,), seeds[2]) * size)
    half = tf.floor(tf.floor(size * tf.sqrt(1 - kept)) / 2)  # whole pixels, as in timm
    low, high = tf.maximum(centre - half, 0), tf.minimum(centre + half, size)
    box = tf.where(cuts, tf.stack([low, high], 1), tf.stack([0 * size, size], 1))
    part = tf.where(cuts, 1.0, 1 - kept)
    return tf.concat([tf.reshape(box, [-1]), [part]], 0)


def mixed(x: tf.Tensor, drawn: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Mix images, or labels, with those in reversed order.

    Args:
        x: `(B, C)` of images, or of a grid over them, `(B, h, w, C)`.
        drawn: What `mix_draws` gave.
        size: `(H, W)` of the images.

    Returns:
        Of the same shape.
    """
    size, shape = tf.cast(size, tf.float32), tf.shape(x)

    def covered(axis, count):
        """Part of each of `count` cells along one axis that lies in the box."""
        count = tf.cast(count, tf.float32)
        edges = tf.range(count + 1) * size[axis] / count
        edges = tf.clip_by_value(edges, drawn[2 * axis], drawn[2 * axis + 1])
        return (edges[1:] - edges[:-1]) * count / size[axis]

    is_grid = x.shape.rank == 4
    cells = shape[1:3] if is_grid else (1, 1)
    part = covered(0, cells[0])[:, None] * covered(1, cells[1]) * drawn[4]
    if is_grid:
        part = tf.tile(part[..., None], (1, 1, shape[3]))
    part = tf.reshape(part, (1, -1))
    rows = tf.reshape(x, (shape[0], -1))  # a long last axis is quick to go along
    rows = (1 - part) * rows + part * tf.reverse(rows, [0])
    return tf.ensure_shape(tf.reshape(rows, shape), x.shape)


def smooth(targets: dict[str, tf.Tensor], amount: float) -> dict[str, tf.Tensor]:
    """Spread a part of every target evenly over all classes: (1 - s) t + s / C.

    Rows that sum to 1 go on doing so.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer
    Vision", https://arxiv.org/abs/1512.00567.

    Args:
        targets: By name, `(..., C)`.
        amount: s, 0..1.
    """
    return {
        name: (1 - amount) * target + amount / target.shape[-1]
        for name, target in targets.items()
    }
