"""Vision transformers in Keras 3, for TensorFlow, JAX and PyTorch."""

from keras_vit.attention import SelfAttention
from keras_vit.embedding import PatchEmbedding, PixelNormalization, PrefixTokens
from keras_vit.head import AttentionPool, MeanPool, TokenPool
from keras_vit.position import LearnedPosition
from keras_vit.transformer import MLP, LayerScale, TransformerBlock
from keras_vit.vit import ViT

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AttentionPool",
    "LayerScale",
    "LearnedPosition",
    "MeanPool",
    "PatchEmbedding",
    "PixelNormalization",
    "PrefixTokens",
    "SelfAttention",
    "TokenPool",
    "TransformerBlock",
    "ViT",
]
