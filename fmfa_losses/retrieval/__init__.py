"""Evaluation and search, without a [Q, G] matrix in memory."""

from .evaluator import Evaluator
from .fused import FusedMetrics, fused_metrics
from .metrics import RankingMetrics, RetrievalMetrics, ranking_metrics, retrieval_metrics, similarity_metrics
from .search import search

__all__ = [
    "Evaluator",
    "FusedMetrics",
    "RankingMetrics",
    "RetrievalMetrics",
    "fused_metrics",
    "ranking_metrics",
    "retrieval_metrics",
    "search",
    "similarity_metrics",
]
