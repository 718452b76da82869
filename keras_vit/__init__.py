"""Vision transformers in Keras 3, for TensorFlow, JAX and PyTorch."""

from keras_vit.attention import SelfAttention, SpatialReductionAttention
from keras_vit.checkpoint import CheckpointReport, from_checkpoint, inspect_checkpoint
from keras_vit.checkpoint_write import to_checkpoint
from keras_vit.cpvt import CPVT
from keras_vit.embedding import (
    FeatureMap,
    PatchEmbedding,
    PixelNormalization,
    PrefixTokens,
)
from keras_vit.head import (
    AttentionPool,
    Classifier,
    MeanPool,
    TokenMax,
    TokenPool,
    class_labels,
)
from keras_vit.inspection import (
    attention_distance,
    attention_maps,
    attention_rollout,
    class_attention,
)
from keras_vit.lvvit import LVViT
from keras_vit.mixtoken import MixToken
from keras_vit.nodes import features
from keras_vit.pcpvt import PCPVT
from keras_vit.places import position_similarity
from keras_vit.position import PEG, LearnedPosition, SinCosPosition
from keras_vit.relative import RelativePositionBias, RotaryPosition
from keras_vit.rematerialization import remat_blocks
from keras_vit.segmentation import SemanticFPN, feature_pyramid
from keras_vit.stem import ConvStem
from keras_vit.transformer import MLP, LayerScale, PyramidBlock, TransformerBlock
from keras_vit.vit import ViT

__version__ = "0.1.0"

__all__ = [
    "CPVT",
    "MLP",
    "PCPVT",
    "PEG",
    "AttentionPool",
    "CheckpointReport",
    "Classifier",
    "ConvStem",
    "FeatureMap",
    "LVViT",
    "LayerScale",
    "LearnedPosition",
    "MeanPool",
    "MixToken",
    "PatchEmbedding",
    "PixelNormalization",
    "PrefixTokens",
    "PyramidBlock",
    "RelativePositionBias",
    "RotaryPosition",
    "SelfAttention",
    "SemanticFPN",
    "SinCosPosition",
    "SpatialReductionAttention",
    "TokenMax",
    "TokenPool",
    "TransformerBlock",
    "ViT",
    "attention_distance",
    "attention_maps",
    "attention_rollout",
    "class_attention",
    "class_labels",
    "feature_pyramid",
    "features",
    "from_checkpoint",
    "inspect_checkpoint",
    "position_similarity",
    "remat_blocks",
    "to_checkpoint",
]
