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
