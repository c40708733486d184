"""Text of tokens, piece by piece: what each token adds, with who drafted it. Pieces joined are the whole text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


class TextPieces:
    """Takes a sequence token by token, and gives the text that each adds.

    A token may hold part of a character: its text then comes with the token that completes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Tokens are decoded behind those of the piece before, since the first ones of a text may lose a space.
        self._before, self._held = list[int](), list[int]()

    def put(self, token: int) -> str:
        """The text that is whole with this token; empty if it is not yet."""
        self._held.append(token)
        return self._taken(whole=True)

    def end(self) -> str:
        """What is left, whole or not."""
        return self._taken(whole=False)

    def _taken(self, whole: bool) -> str:
        known, text = (str(self.tokenizer.decode(ids)) for ids in (self._before, self._before + self._held))
        if whole and (len(text) <= len(known) or text.endswith("\ufffd")):
            return ""
        self._before, self._held = self._held or self._before, []
        return text[len(known) :]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], sources: Iterable[str]) -> list[tuple[str, str]]:
    """The text of tokens as (text, source), one a token; of tokens that are only whole together, with the last's.

    Args:
        ids: tokens of a sequence.
        sources: who drafted each, as `Trail.sources` gives them; any other words will do.

    Raises:
        ValueError: there are more ids than sources, or fewer.
    """
    text, source = TextPieces(tokenizer), ""
    found = []
    for token, source in zip(ids, sources, strict=True):
        found.append((text.put(token), source))
    found.append((text.end(), source))
    return [piece for piece in found if piece[0]]
