"""Terminals that are not UTF-8: what they cannot show is written plainer, and never ends a command."""

from __future__ import annotations

import codecs
import io
import sys

# Cells of plans, bars of sensitivity, progress bars, marks of sources.
PLAIN = str.maketrans("█▓░·▁▂▃▄▅▆▇━╸╺…–—“”‘’⟦⟧«»", "#84._234567---.--\"\"''[]{}")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = error.object[error.start : error.end].translate(PLAIN)
    return "".join(c if c.isascii() else "." if "\u2800" <= c <= "\u28ff" else "?" for c in shown), error.end


def plain_where_needed() -> None:
    """Let stdout and stderr replace what their encoding does not hold."""
    codecs.register_error("skipsearch-plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="skipsearch-plainer")
