"""Small models with the interfaces of the codebases in docs/recipes, as text that the recipes' diffs apply to.

Same names, shapes and dtypes: half-precision linear and attention weights beside float32 LayerNorms, image tokens
[B, 1 + N, D], text tokens [B, L, D], a 0-dim CPU logit_scale, and a dictionary of losses. Around them what else a diff
changes: loaders, training loops, evaluation. The lines that diffs name are as there, in every version.
"""

from .fmfa import FMFA_2025_04, FMFA_2025_08, FMFA_DATASETS, FMFA_FINETUNE
from .irra import IRRA, IRRA_BASES, IRRA_PROCESSOR, IRRA_TRAIN
from .rde import RDE, RDE_LAYERS, RDE_PROCESSOR, RDE_TRAIN
from .tbps_clip import TBPS_CLIP

__all__ = [
    "FMFA_2025_04",
    "FMFA_2025_08",
    "FMFA_DATASETS",
    "FMFA_FINETUNE",
    "IRRA",
    "IRRA_BASES",
    "IRRA_PROCESSOR",
    "IRRA_TRAIN",
    "RDE",
    "RDE_LAYERS",
    "RDE_PROCESSOR",
    "RDE_TRAIN",
    "TBPS_CLIP",
]
