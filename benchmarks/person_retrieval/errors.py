"""What a user of the commands can mend: told in one sentence, without a traceback."""

__all__ = ["RunError"]


class RunError(Exception):
    """States the invariant, what came, and what to do."""
