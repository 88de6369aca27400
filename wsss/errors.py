"""Exceptions whose messages are meant for users."""

from __future__ import annotations


class WsssError(Exception):
    """A problem that the user can fix: *where: what was expected, what came*, then a hint.

    The command line prints it without a traceback and exits with 1.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class UsageError(WsssError):
    """An invalid flag or argument; exit code 2."""


class SpecError(WsssError):
    """A manifest, tensor spec or setting that contradicts itself."""


class FeedError(WsssError):
    """A tensor that does not fit the engine's input."""


class BundleError(WsssError):
    """A bundle that is incomplete, damaged or of another format."""


class WeightsError(WsssError):
    """A checkpoint that is missing, damaged or of another architecture."""


class ParityError(WsssError):
    """A graph or engine that does not compute what its reference computes."""


class ImageError(WsssError):
    """A file that cannot be read as a photograph."""


class ClassError(WsssError):
    """A class list that does not exist, contradicts itself, or has names that no caption can contain."""


class StoreError(WsssError):
    """A label store that cannot be read or written."""


class OutOfMemory(WsssError):
    """A call of an engine that needs more memory than its device has; a smaller batch may fit."""


class NotANumber(WsssError):
    """A graph gave NaN for a photograph: an overflow in half precision, or damaged weights. Other photographs may do well."""


class WsssWarning(UserWarning):
    """A non-fatal problem: the result is likely not what the user intended."""
