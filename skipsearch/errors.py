"""The errors for users. Each message is one sentence that names the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def shown(value: object, most: int = 120) -> str:
    """A value in a message: its repr, cut short. What strangers wrote may be of any size."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 4,300 digits, or deep nesting
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def first_line(error: BaseException, most: int = 160) -> str:
    """The first line of another library's message, or the error's kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class SkipsearchError(Exception):
    """Base class of all errors for users. The CLI prints the message as one line and exits with 1."""


class MaskError(SkipsearchError, ValueError):
    """A mask or mask file is malformed, or does not belong to this model."""


class UnsupportedModel(SkipsearchError):
    """It cannot be proven that the model's sublayers can be skipped and that its KV cache can be rolled back."""


class ModelLoadError(SkipsearchError):
    """A model or preset cannot be found, downloaded or read."""


class PromptError(SkipsearchError, ValueError):
    """A prompt source is missing or empty, or does not fit the model's context."""


class DecodingError(SkipsearchError, ValueError):
    """Self-speculative decoding does not support a generation option, or the logits are unusable."""


class StudyMismatch(SkipsearchError):
    """The existing study was made with another model, prompt set, space or set-up."""


class ResultsError(SkipsearchError, OSError):
    """A results folder or file cannot be read or written."""


class MemoryShortage(SkipsearchError, MemoryError):
    """A stage needs more memory than there is."""


class ExportError(SkipsearchError, ValueError):
    """A format cannot hold this draft, or what was written does not load back as the draft."""


class BackendError(SkipsearchError):
    """A backend does not support this model or this machine."""


class SkipsearchWarning(UserWarning):
    """Base class of our warnings, of which the CLI prints one line; itself: something beside the results failed."""


class BackendWarning(SkipsearchWarning):
    """Decoding is eager, or its backend is not the one that the mask was tuned for."""


class DecodingWarning(SkipsearchWarning):
    """Something that the model's generation config asks for is not applied."""


class StudyWarning(SkipsearchWarning):
    """Something happened to a study's storage or workers; nothing is lost."""


class PromptWarning(SkipsearchWarning):
    """Some rows of a prompt source were left out, or taken in another way than the others."""


ALLOCATORS = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")  # how they say it, in any case


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of Python, of the CPU or of a GPU raised this."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in ALLOCATORS)
    )


@contextmanager
def enough_memory(what: str, remedy: str) -> Iterator[None]:
    """Around what may need too much memory.

    Raises:
        MemoryShortage: it did.
    """
    try:
        yield
    except SkipsearchError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryShortage(f"memory does not suffice to {what}; {remedy}") from None
