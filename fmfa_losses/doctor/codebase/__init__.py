"""What of a codebase this library replaces: files are parsed, never imported or run."""

from .examination import examine, scan
from .files import LeftOut, Limits, Unreadable
from .findings import Examination, Finding, Import, Missing, Suggestion

__all__ = [
    "Examination",
    "Finding",
    "Import",
    "LeftOut",
    "Limits",
    "Missing",
    "Suggestion",
    "Unreadable",
    "examine",
    "scan",
]
