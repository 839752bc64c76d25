"""The training objectives of FMFA for text-to-image person retrieval."""

__version__ = "0.1.0"
