"""Plain NumPy versions of the paper equations: slow, obvious, no Keras."""

import math

import numpy as np


def patches(image, patch_size):
    """(H, W, C) -> (N, P * P * C), row by row from the top left."""
    height, width, _ = image.shape
    return np.stack(
        [
            image[i : i + patch_size, j : j + patch_size].reshape(-1)
            for i in range(0, height, patch_size)
            for j in range(0, width, patch_size)
        ]
    )


def layer_norm(x, gamma, beta, epsilon=1e-6):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu(x, form="exact"):
    if form == "exact":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if form == "quick":
        return x / (1 + np.exp(-1.702 * x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(query, key, value, num_heads):
    """(N, D), (M, D), (M, D) -> (N, D): each head on its own slice of D."""
    out = np.empty_like(query)
    d = query.shape[-1] // num_heads
    for head in range(num_heads):
        s = slice(head * d, (head + 1) * d)
        weights = softmax(query[:, s] @ key[:, s].T / math.sqrt(d))
        out[:, s] = weights @ value[:, s]
    return out


def cubic(t, a=-0.5):
    """Keys' bicubic kernel."""
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def resize_axis(x, new):
    """Antialiased bicubic resize of axis 0, pixel by pixel."""
    old, scale = len(x), len(x) / new
    out = []
    for i in range(new):
        centre, stretch = (i + 0.5) * scale, max(scale, 1)
        weights = [cubic((j + 0.5 - centre) / stretch) for j in range(old)]
        out.append(sum(w * v for w, v in zip(weights, x, strict=True)) / sum(weights))
    return np.stack(out)


def sincos_1d(height, width, dim):
    """(h * w, D): place n, channel pair t, one number at a time."""
    table = np.zeros((height * width, dim))
    for n in range(height * width):
        for t in range(dim // 2):
            angle = n / 10_000 ** (2 * t / dim)
            table[n, 2 * t : 2 * t + 2] = math.sin(angle), math.cos(angle)
    return table


def sincos_2d(height, width, dim):
    table = np.zeros((height, width, 4, dim // 4))
    for y in range(height):
        for x in range(width):
            for t in range(dim // 4):
                w = 10_000 ** (-t / (dim // 4 - 1))
                table[y, x, :, t] = [f(w * p) for p in (x, y) for f in (np.sin, np.cos)]
    return table.reshape(height * width, dim)


def peg(x, kernel, bias, padding):
    """The encoding of one grid (h, w, D), without the residual."""
    height, width, _ = x.shape
    size = len(kernel)
    margin = size // 2
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            rows, columns = i + np.arange(size) - margin, j + np.arange(size) - margin
            inside = [
                (0 <= r < height) and (0 <= c < width) for r in rows for c in columns
            ]
            if padding == "none" and not all(inside):
                continue
            out[i, j] = bias
            for a, r in enumerate(rows):
                for b, c in enumerate(columns):
                    if padding == "circular" or (
                        (0 <= r < height) and (0 <= c < width)
                    ):
                        out[i, j] += kernel[a, b, :, 0] * x[r % height, c % width]
    return out


def rotary(x, height, width, temperature=100.0):
    """Turn one head's (h * w, d) as complex numbers."""
    d = x.shape[-1]
    z = x[:, : d // 2] + 1j * x[:, d // 2 :]
    for n in range(height * width):
        for t in range(d // 4):
            w = temperature ** (-t / (d // 4))
            z[n, t] *= np.exp(1j * w * (n % width))
            z[n, d // 4 + t] *= np.exp(1j * w * (n // width))
    return np.concatenate([z.real, z.imag], -1)


def relative_bias(height, width, hidden, hidden_bias, out):
    """(H, N, N): a two-layer network of the log distance, pair by pair."""
    n = height * width
    bias = np.zeros((out.shape[-1], n, n))
    for i in range(n):
        for j in range(n):
            distance = np.array([i % width - j % width, i // width - j // width])
            scaled = np.sign(distance) * np.log(1 + np.abs(distance))
            bias[:, i, j] = np.maximum(scaled @ hidden + hidden_bias, 0) @ out
    return bias


def mixtoken_box(grid, kept, centre):
    """Rows and columns of the box of MixToken (LV-ViT), lambda = `kept`."""
    edges = []
    for side, middle in zip(grid, centre, strict=True):
        length = int(side * np.sqrt(1 - kept))
        first, last = middle - length // 2, middle + length // 2
        edges.append((max(first, 0), min(last, side)))
    return edges
