"""Two-stream models and their tokenizers: CLIP, and one small enough for a CPU."""

from .tokenizer import WordTokenizer
from .two_stream import Neck, TwoStream

__all__ = ["Neck", "TwoStream", "WordTokenizer"]
