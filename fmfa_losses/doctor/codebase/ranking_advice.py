"""What to write where a gallery is ranked: scores get similarity_metrics, features retrieval_metrics too."""

from typing import Any

from .findings import Suggestion
from .suggestions import operand

__all__ = ["ranking_advice"]

TUPLE = "(cmc [max_rank], mAP, mINP in percent, ranking [Q, G] in int64)"


def ranking_advice(ranking: dict[str, Any], published: bool) -> tuple[str, tuple[Suggestion, ...]]:
    """What the lines return, and what to write; `published`: the function that is called is IRRA's `rank`."""
    scores, queries, gallery = ranking["scores"], ranking["queries"], ranking["gallery"]
    ranks = _ranks(ranking) if published else ""
    suggestions = []
    if published:
        call = ", ".join([*ranking["arguments"], *(f"{k}={v}" for k, v in ranking["keywords"].items())])
        suggestions.append(Suggestion(f"compat.irra.rank({call})", True, "the same tuple; equal scores rank by index"))
    fused = "the scores as they are, fused or re-ranked; " if ranking["fused"] else ""
    reading = "read .cmc[k], .mAP and .mINP, in percent; nothing is sorted"
    if not ranking["inline"] and not published:
        reading += "; the metrics that your own rank returns besides are not among them"
    suggestions.append(Suggestion(f"similarity_metrics({scores}, {queries}, {gallery}{ranks})", True, fused + reading))
    features = ranking["features"]
    if features is not None:
        direction, arguments = "t2i", [*features, queries, gallery]
        if ranking["turned"]:
            direction, arguments = "i2t", [*features[::-1], gallery, queries]
        if not ranking["normalised"]:
            arguments.append("normalize=False")
        write = f"retrieval_metrics({', '.join(arguments)}{ranks}).{direction}"
        why = "from the features, without the matrix of scores; one call has both directions, .t2i and .i2t"
        suggestions.append(Suggestion(write, True, why))
    returns = TUPLE if published else "a ranking of the gallery for every query, and metrics of it"
    return returns, tuple(suggestions)


def _ranks(ranking: dict[str, Any]) -> str:
    """All ranks up to a literal max_rank; the default, 1, 5 and 10, are those that the table shows."""
    positional = ranking["arguments"][3:4]
    given = ranking["keywords"].get("max_rank") or (positional[0] if positional else "10")
    return "" if given == "10" else f", ranks=range(1, {operand(given)} + 1)"
