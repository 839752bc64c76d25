"""What users can cause and mend."""

__all__ = ["RunError"]


class RunError(Exception):
    """An option, a file or a folder is not as it must be; commands print the text as `error: ...` and exit with 1."""
