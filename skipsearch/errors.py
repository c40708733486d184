"""The errors a user can meet: one root, one sentence each, naming the field, the value and the mend."""

from __future__ import annotations


class SkipsearchError(Exception):
    """Root of everything that skipsearch raises for its users; the CLI prints it as one line, exit 1."""


class MaskError(SkipsearchError, ValueError):
    """A mask or a mask file that is malformed, or does not belong to this model."""


class UnsupportedModel(SkipsearchError):
    """A model whose sublayers cannot be skipped, or whose KV cache cannot be rolled back, with proof."""


class ModelLoadError(SkipsearchError):
    """A model or preset that cannot be found, fetched or read."""


class PromptError(SkipsearchError, ValueError):
    """A prompt source that is missing, empty, or does not fit the model's context."""


class DecodingError(SkipsearchError, ValueError):
    """A generation option that self-speculative decoding cannot honour, or unusable logits."""


class StudyMismatch(SkipsearchError):
    """An existing study that was made with another model, prompt set, space or set-up."""


class ResultsError(SkipsearchError, OSError):
    """A results folder or file that cannot be read or written."""


class BackendError(SkipsearchError):
    """A backend that cannot serve this model, or this machine."""


class BackendWarning(UserWarning):
    """Why decoding is eager, or another backend than a mask was tuned for; the CLI prints it as one line."""
