"""A generated text in which one sees who drafted each token: in styles, or between marks where there are no colours.

It stays the text that was decoded: drafts that were rejected are counted, not shown, so that it can be read and copied.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from skipsearch.decoding.sources import MASK, TARGET
from skipsearch.decoding.stats import LETTERS
from skipsearch.decoding.text import TextPieces
from skipsearch.generate.method import SelfSpeculative

STYLES = {MASK: "cyan", TARGET: "bold yellow"}
OTHER_STYLE = "magenta underline"  # n-grams, and what else drafts beside the mask
MARKS, OTHER_MARKS = {MASK: "⟦⟧", TARGET: "", "": ""}, "«»"  # on terminals that are not UTF-8: [] and {}


def _marks(console: Console, source: str) -> tuple[str, str]:
    """What opens and closes the text of a source; empty where its style tells."""
    marks = "" if console.color_system and not console.no_color else MARKS.get(source, OTHER_MARKS)
    return marks[:1], marks[1:]


def _style(source: str) -> str:
    return STYLES.get(source, OTHER_STYLE) if source else ""


class ExplainingStreamer(BaseStreamer):  # type: ignore[misc]
    """Prints a prompt and the tokens behind it as they are decoded, each marked with its source.

    Args:
        method: decodes; its statistics name the sources.
        skip_prompt: print the tokens behind the prompt alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, method: SelfSpeculative, console: Console, skip_prompt: bool = False
    ) -> None:  # fmt: skip
        self._text, self._method, self._console = TextPieces(tokenizer), method, console
        self._skip_prompt = skip_prompt
        self._source, self._prompted, self._at = "", False, 0  # of the last text; and its place in the trail

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        for token in value.flatten().tolist():
            text = self._text.put(token)
            if self._prompted or not self._skip_prompt:
                self._write(text, self._next_source() if self._prompted else "")
        self._prompted = True

    def _next_source(self) -> str:
        marks = self._method.stats.trails[0].marks
        while marks[self._at].isupper():  # rejected
            self._at += 1
        self._at += 1
        return LETTERS[marks[self._at - 1]]

    def end(self) -> None:
        self._write(self._text.end(), self._source)
        self._write("\n", "")

    def _write(self, text: str, source: str) -> None:
        if not text:
            return
        if source != self._source:
            text = _marks(self._console, self._source)[1] + _marks(self._console, source)[0] + text
            self._source = source
        # As it is: a `Text` would expand tabs and lose carriage returns.
        segment = Segment(text, self._console.get_style(_style(source)))
        self._console.print(Segments([segment]), end="", soft_wrap=True)


def _sample(console: Console, words: str, source: str) -> Text:
    return Text(words.join(_marks(console, source)), _style(source))


def legend(console: Console) -> Text:
    """What each style or mark says."""
    words = {MASK: "drafted and accepted", "ngram": "from n-grams", TARGET: "the target's own"}
    return Text("   ").join(_sample(console, text, source) for source, text in words.items())


def sources_line(found: dict[str, Any], console: Console) -> Text:
    """How many tokens came from where; `found` is what `continue_text` returns."""
    drafted = {source: count for source, count in found["accepted_from"].items() if count}
    own, passes = len(found["tokens"]) - sum(drafted.values()), found["verifies"] + (not found["lossy"])
    words = {MASK: "drafted", "ngram": "from n-grams"}
    parts = [_sample(console, f"{n} {words.get(name, f'from {name}')}", name) for name, n in drafted.items()]
    parts.append(_sample(console, f"{own} by the target", TARGET))
    line = Text(f"of {len(found['tokens'])} tokens: ") + Text(", ").join(parts) + f" in {passes} passes"
    return line + f"; {found['drafted'] - found['accepted']} drafted tokens were rejected"
