"""The options that have a name: for each its type, which a type checker knows, and its values, which are checked."""

from typing import Literal, TypeAlias, get_args

# Of all losses.
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Backend: TypeAlias = Literal["auto", "triton", "torch"]
Gather: TypeAlias = bool | Literal["ring"]
# Of a similarity distribution.
Objective: TypeAlias = Literal["divergence", "cross_entropy"]
Positive: TypeAlias = Literal["paired", "any"]
Normalize: TypeAlias = Literal["sum", "released"]
# Of pairs: which count as positive (ITC, sigmoid), which as negative (EFA, triplet; TRL).
Matching: TypeAlias = Literal["paired", "identity"]
Negatives: TypeAlias = Literal["all", "different_identity"]
TRLNegatives: TypeAlias = Literal["different_identity", "released"]
# Of the hard similarity.
Pool: TypeAlias = Literal["lse", "sum", "mean"]
# Of the objective.
Dataset: TypeAlias = Literal["CUHK-PEDES", "ICFG-PEDES", "RSTPReid"]

REDUCTIONS = get_args(Reduction)
BACKENDS = get_args(Backend)
GATHER = (False, True, "ring")
OBJECTIVES = get_args(Objective)
POSITIVES = get_args(Positive)
NORMALIZE = get_args(Normalize)
MATCHINGS = get_args(Matching)
NEGATIVES = get_args(Negatives)
TRL_NEGATIVES = get_args(TRLNegatives)
POOLS = get_args(Pool)

# Options that are none any more, of the code released with the papers, which `compat` computes.
MOVED = {
    "gap": "fmfa_losses.compat.fmfa.compute_sdm",
    "target": "fmfa_losses.compat.irra.compute_sdm",
    "ranking": "fmfa_losses.compat.released.released_efa",
}
