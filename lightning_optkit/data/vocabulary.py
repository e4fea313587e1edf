# SPDX-License-Identifier: Apache-2.0
"""Maps text to ids and back, with the tokens of the training texts.

Source: names as torchtext's `build_vocab_from_iterator` (min_freq, max_tokens).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit._checks import (
    NO_LIST,
    check_bools,
    check_callable,
    check_int,
    check_listed,
    check_tensor,
    check_text,
    iterate,
    kind_shown,
    shown,
)
from lightning_optkit.data.merge_across_ranks import merge_across_ranks

__all__ = ["Vocabulary"]


def words(text: str) -> list[str]:
    """`text.split()` as a function, so that a configuration file can name it.

    Example:
        >>> words(" the  cat ")
        ['the', 'cat']
    """
    return text.split()


class Vocabulary(nn.Module):
    """Numbers the tokens of texts: 0 is padding, 1 unknown, then by decreasing frequency, ties alphabetical.

    The tokens are part of the state dict (as a list of strings); the counts are discarded by `finalize()`.

    Args:
        tokenize: Splits a text into tokens: by default words, `list` for characters, None for the text itself, e.g. a
            column of categories (then `OneHot`). It is not saved.
        min_freq: Occurrences a token needs to be included, in [1, inf).
        max_tokens: Largest number of ids, including the two special ones, in [2, inf). Default: no limit.
        pad_token: The token that `decode` shows for id 0, if asked.
        unk_token: The token that `decode` shows for id 1.

    Raises:
        TypeError: if a batch of texts is not a sequence of strings.
        ValueError: if an argument is outside its range, or there was no text.
        RuntimeError: if applied before it is fitted, or fitted further after `finalize()`.

    Cost: one string per token.

    Example:
        >>> vocabulary = Vocabulary().fit(["the cat sat", "the dog"])
        >>> vocabulary.encode(["the bird", "the cat sat"])
        tensor([[2, 1, 0],
                [2, 3, 5]])
        >>> vocabulary.decode(torch.tensor([[2, 1, 0]]))
        [['the', '<unk>']]
    """

    pad_id = 0
    unk_id = 1

    def __init__(
        self,
        *,
        tokenize: Callable[[str], Sequence[str]] | None = words,
        min_freq: int = 1,
        max_tokens: int | None = None,
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
    ) -> None:
        super().__init__()
        if tokenize is not None:
            check_callable(type(self).__name__, "tokenize", tokenize, "tokenize(text)", classes=True)
        self.tokenize = tokenize
        self.min_freq = check_int(type(self).__name__, "min_freq", min_freq, minimum=1)
        self.max_tokens = (
            None if max_tokens is None else check_int(type(self).__name__, "max_tokens", max_tokens, minimum=2)
        )
        for name, token in (("pad_token", pad_token), ("unk_token", unk_token)):
            check_text(type(self).__name__, name, token, 'a string, such as "<pad>"')
        if pad_token == unk_token:
            raise ValueError(f"{type(self).__name__}(unk_token={shown(unk_token)}): must differ from pad_token.")
        self.pad_token, self.unk_token = pad_token, unk_token
        self._set(Counter(), [])

    @property
    def fitted(self) -> bool:
        """Whether it can be applied."""
        return self._fitted

    @property
    def tokens(self) -> list[str]:
        """All tokens, indexed by id; empty before `finalize()`."""
        return [self.pad_token, self.unk_token, *self._learned] if self._fitted else []

    def __len__(self) -> int:
        return len(self.tokens)

    def partial_fit(self, texts: Sequence[str]) -> "Vocabulary":
        """Counts the tokens of one more batch of texts."""
        self._require_open()
        for text in _checked(texts):
            self._counts.update(self._split(text))
        return self

    def merge(self, other: "Vocabulary") -> "Vocabulary":
        """Adds the counts of `other`."""
        if not isinstance(other, Vocabulary):
            raise TypeError(f"{type(self).__name__}.merge(other={kind_shown(other)}): other must be a Vocabulary too.")
        self._require_open()
        other._require_open()
        self._counts.update(other._counts)
        return self

    def finalize(self) -> "Vocabulary":
        """Ends the fit: numbers the tokens and discards the counts."""
        self._require_open()
        if not self._counts:
            raise ValueError(f"{type(self).__name__}(texts=[]): fitting needs at least one token.")
        special = (self.pad_token, self.unk_token)
        kept = [(token, n) for token, n in self._counts.items() if n >= self.min_freq and token not in special]
        kept.sort(key=lambda pair: (-pair[1], pair[0]))
        room = None if self.max_tokens is None else self.max_tokens - len(special)
        self._set(Counter(), [token for token, _ in kept[:room]], fitted=True)
        return self

    def fit(self, batches: Iterable[str | Sequence[str]], *, across_ranks: bool = False) -> "Vocabulary":
        """Fits anew in one pass over texts or batches of texts; on all processes if `across_ranks`."""
        check_bools(f"{type(self).__name__}.fit", across_ranks=across_ranks)
        reading = iterate(
            f"{type(self).__name__}.fit", "batches", batches, 'an iterable of texts, such as ["the cat", "the dog"]'
        )
        before = self.get_extra_state()
        self._set(Counter(), [])
        try:
            for batch in reading:
                self.partial_fit([batch] if isinstance(batch, str) else batch)
            if across_ranks:
                merge_across_ranks(self)
            return self.finalize()
        except BaseException:
            self.set_extra_state(before)
            raise

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> Tensor:
        """Ids, shape (N, length), int64, on the CPU: padded on the right with 0; longer texts are truncated.

        Args:
            texts: One batch of N texts.
            length: Ids per text, in [1, inf). Default: the length of the longest text.
        """
        if not self._fitted:
            raise RuntimeError(
                f"{type(self).__name__}(fitted=False): call fit(texts), or partial_fit(texts) and finalize(), "
                "before applying it."
            )
        if length is not None:
            check_int(f"{type(self).__name__}.encode", "length", length, minimum=1)
        rows = [[self._ids.get(token, self.unk_id) for token in self._split(text)] for text in _checked(texts)]
        width = length if length is not None else max(map(len, rows), default=0)
        padded = [row[:width] + [self.pad_id] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), width)

    def decode(self, ids: Tensor) -> list[list[str]]:
        """The tokens of every row of `ids`, shape (N, L), without padding.

        Raises:
            ValueError: if an id is not in [0, len(self)).
        """
        tokens = self.tokens
        check_tensor(f"{type(self).__name__}.decode", "ids", ids, "real", meta=False)
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"{type(self).__name__}.decode(ids={shown(ids)}): ids must be integers of shape (N, L).")
        rows: list[list[int]] = ids.tolist()
        wrong = [i for row in rows for i in row if not 0 <= i < len(tokens)]
        if wrong:
            raise ValueError(f"{type(self).__name__}.decode(id={wrong[0]}): ids must be in [0, {len(tokens)}).")
        return [[tokens[i] for i in row if i != self.pad_id] for row in rows]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Same as `encode(texts)`."""
        return self.encode(texts)

    def get_extra_state(self) -> dict[str, Any]:
        """The extra state of the state dict: only strings and numbers."""
        return {"counts": dict(self._counts), "tokens": list(self._learned), "fitted": self._fitted}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the result of `get_extra_state`."""
        self._set(Counter(state["counts"]), list(state["tokens"]), fitted=state["fitted"])

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"min_freq={self.min_freq}, max_tokens={self.max_tokens}"

    def _split(self, text: str) -> Sequence[str]:
        tokens = [text] if self.tokenize is None else self.tokenize(text)
        if not isinstance(tokens, Sequence) or not all(isinstance(token, str) for token in tokens):
            raise TypeError(
                f"{type(self).__name__}(tokenize=...): tokenize must return a list of strings, got {shown(tokens)}."
            )
        return tokens

    def _set(self, counts: "Counter[str]", learned: list[str], *, fitted: bool = False) -> None:
        self._counts, self._learned, self._fitted = counts, learned, fitted
        self._ids = {token: i for i, token in enumerate(learned, start=2)}

    def _require_open(self) -> None:
        if self._fitted:
            raise RuntimeError(
                f"{type(self).__name__}(fitted=True): the counts were forgotten by finalize(), so nothing can be "
                "added; call fit(texts)."
            )


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, NO_LIST) or not isinstance(texts, Iterable):
        raise TypeError(f"Vocabulary(texts={kind_shown(texts)}): texts must be a sequence of strings.")
    listed = check_listed("Vocabulary", "texts", texts, "a sequence of strings", empty=True)
    if not all(isinstance(text, str) for text in listed):
        raise TypeError(f"Vocabulary(texts={kind_shown(texts)}): texts must be a sequence of strings.")
    return listed
