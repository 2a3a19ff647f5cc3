"""Errors that a user can act on. Every message says what, where, got, wanted and what to do (exit code 2)."""

from __future__ import annotations

from typing import Self

NOT_FINITE_ADVICE = "use --dtype float32; where that is what runs, the source checkpoint is damaged"
"""What to do about numbers of a forward pass that are NaN or infinite."""


class StructPruneError(Exception):
    """Base of every error that is the input's fault, not ours.

    The parts are kept as attributes so that `--json` can print them as data.
    """

    elsewhere = False
    """Whether another process of a shared run says it to the user."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object | None = None,
        wanted: object | None = None,
        do: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.got = got
        self.wanted = wanted
        self.do = do
        super().__init__(self._render())

    def _render(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        # Values may carry line breaks of other libraries' messages; ours is one line.
        named = (("got", self.got), ("wanted", self.wanted))
        details = [f"{label} {' '.join(str(value).split())}" for label, value in named if value is not None]
        if details:
            text += "; " + ", ".join(details)
        if self.do:
            text += f". {self.do[0].upper()}{self.do[1:]}"
        return text + ("" if text.endswith((".", "?", "!")) else ".")

    def inside(self, where: str) -> Self:
        """Return the same error, with the larger place in which it happened named first."""
        place = where if self.where is None else f"{where}, {self.where}"
        return type(self)(self.what, where=place, got=self.got, wanted=self.wanted, do=self.do)

    def to_dict(self) -> dict[str, object]:
        """Return the parts as JSON-ready values."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "got": None if self.got is None else str(self.got),
            "wanted": None if self.wanted is None else str(self.wanted),
            "do": self.do,
        }


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class InputError(StructPruneError):
    """A flag, recipe, text or path that cannot be used as given."""


class CheckpointError(StructPruneError):
    """A checkpoint that is missing, truncated, inconsistent or not finite."""


class UnsupportedError(StructPruneError):
    """A family, format or combination that this version does not handle."""


class MemoryBudgetError(StructPruneError):
    """The work does not fit in the memory budget."""


class NumericalError(StructPruneError):
    """A value that is not finite, or a factorisation that failed after its bounded retries."""


class DiskFullError(StructPruneError):
    """A write failed for want of space. What the run had done is kept."""


class RankError(StructPruneError):
    """Another rank of a shared run died, hung or failed. What the run had done is kept."""
