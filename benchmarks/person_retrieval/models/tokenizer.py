"""Words to numbers, with CLIP's conventions: padding is 0; mask, start and end of text are the last three ids."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["WordTokenizer"]

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|[.]")


class WordTokenizer:
    """One id a word of the training captions; unknown words share id 1.

    Example:
        >>> tokenizer = WordTokenizer(["a red coat"], context_length=6)
        >>> tokenizer(["A red hat"]).tolist()        # SOT a red ? EOT padding
        [[6, 2, 4, 1, 7, 0]]
        >>> tokenizer.words(tokenizer(["A red hat"])[0])
        ['a', 'red', '?']
    """

    pad_id = 0
    unknown_id = 1

    def __init__(self, captions: Iterable[str], *, context_length: int = 48) -> None:
        self.context_length = context_length
        vocabulary = sorted({word for text in captions for word in _WORD.findall(text.lower())})
        self.ids = {word: index + 2 for index, word in enumerate(vocabulary)}
        self.mask_id, self.sot_id, self.eot_id = (len(vocabulary) + 2 + offset for offset in range(3))
        self.vocab_size = len(vocabulary) + 5

    @property
    def special_ids(self) -> tuple[int, int, int]:
        """Ids that are never masked: padding, start and end of text."""
        return self.pad_id, self.sot_id, self.eot_id

    def __call__(self, captions: Iterable[str]) -> Tensor:
        """[B, context_length] int64; what is too long loses its end, never its EOT."""
        rows = []
        for text in captions:
            ids = [self.ids.get(word, self.unknown_id) for word in _WORD.findall(text.lower())]
            ids = [self.sot_id, *ids[: self.context_length - 2], self.eot_id]
            rows.append(ids + [self.pad_id] * (self.context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)

    def words(self, token_ids: Tensor) -> list[str]:
        """The words of one caption [L], without the special ids."""
        names = {index: word for word, index in self.ids.items()}
        inner = (int(i) for i in token_ids if int(i) not in self.special_ids)
        return [names.get(i, "[mask]" if i == self.mask_id else "?") for i in inner]
