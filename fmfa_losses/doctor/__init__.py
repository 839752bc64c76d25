"""Reports what runs on this machine, what of a codebase the library replaces, and what looks wrong in a batch.

Its modules are imported when a name is used: `search_path` must run before anything imports torch.
"""

TYPE_CHECKING = False  # typing itself is imported after `search_path`

if TYPE_CHECKING:
    from .batch import BatchReport as BatchReport
    from .batch import check_batch as check_batch
    from .codebase import Finding as Finding
    from .codebase import Unreadable as Unreadable
    from .codebase import scan as scan
    from .diagnosis import diagnose as diagnose
    from .diagnosis import self_test as self_test

__all__ = ["BatchReport", "Finding", "Unreadable", "check_batch", "diagnose", "scan", "self_test"]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name in __all__:
            from . import diagnosis

            return getattr(diagnosis, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
