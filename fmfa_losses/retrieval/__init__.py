"""Evaluation and search, without a [Q, G] matrix in memory."""

from .metrics import (
    Evaluator,
    RankingMetrics,
    RetrievalMetrics,
    ranking_metrics,
    retrieval_metrics,
    search,
    similarity_metrics,
)

__all__ = [
    "Evaluator",
    "RankingMetrics",
    "RetrievalMetrics",
    "ranking_metrics",
    "retrieval_metrics",
    "search",
    "similarity_metrics",
]
