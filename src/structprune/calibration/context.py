"""What a calibration source is given, and what it gives back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.kinds import StartToken
from structprune.types import Render


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStart:
    """The tokens that every window of a text begins with; they count as part of its length."""

    ids: tuple[int, ...] = ()
    text: str = ""
    """The same as the tokenizer spells them; empty: there are none."""

    def room(self, seq_len: int) -> int:
        """Return how many tokens of text a window holds. Raises InputError if that is none."""
        if seq_len <= len(self.ids):
            raise InputError(
                "a window has no room beside its start token", got=f"--seq-len {seq_len}", wanted=len(self.ids) + 1
            )
        return seq_len - len(self.ids)

    def stripped(self, ids: Tensor) -> Tensor:
        """Return the tokens of a text without the start that it may have itself, as one by a chat template has."""
        own = torch.tensor(self.ids, dtype=ids.dtype)
        return ids[len(own) :] if len(own) and torch.equal(ids[: len(own)], own) else ids

    def before(self, ids_NS: Tensor) -> Tensor:
        """Return the windows with the start in front of each."""
        if not self.ids:
            return ids_NS
        return torch.cat([torch.tensor(self.ids, dtype=ids_NS.dtype).expand(len(ids_NS), -1), ids_NS], dim=1)


NO_START = WindowStart()


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRequest:
    """Which windows are wanted of a text."""

    num_samples: int
    seq_len: int
    seed: int
    bos: StartToken
    """Whether each begins with the model's start token."""
    num_held_out: int = 0
    """Windows beside those, which nothing will be fitted on."""
    num_repair: int = 0
    """Windows beside all of those, which only a repair will learn from."""
    min_samples: int = 1
    """Windows that are needed to fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """The request and the model's own means, so that sources need neither a tokenizer nor a model library."""

    encode: Callable[[str], Tensor]
    """Text -> token ids (tokens,)."""
    sample: Callable[[int, int, int], Tensor]
    """(number of windows, window length, seed) -> windows sampled from the model itself (windows, length)."""
    num_samples: int
    seq_len: int
    seed: int
    num_held_out: int = 0
    """Windows to draw beside those, which nothing will be fitted on."""
    num_repair: int = 0
    """Windows to draw beside all of those, for a repair. Sources are asked for them with the held-out ones."""
    min_samples: int = 1
    """Windows that are needed to fit: fewer are not left where the text is so short that held-out ones are taken away.
    """
    decode: Callable[[Tensor], str] | None = None
    """Token ids (tokens,) -> text; None where nobody asks."""
    render: Render | None = None
    """What writes a chat by the model's template; None where it has none."""
    start: WindowStart = NO_START
    """What every window is to begin with; a source gives windows without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextWindows:
    """Which windows are of one text."""

    name: str
    """Name of a built-in text, or path of a file."""
    description: str
    weight: float
    windows: tuple[int, ...]
    """Numbers of those that are fitted on."""
    held_out: tuple[int, ...]
    """Numbers of the held-out ones."""
    repair: tuple[int, ...] = ()
    """Numbers of those for a repair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationWindows:
    """Token windows and where they came from."""

    ids_NS: Tensor
    description: str
    start: str = ""
    """What each begins with, as the tokenizer spells it; empty: with the text itself."""
    held_out_NS: Tensor | None = None
    """Windows of the same text that nothing is fitted on; None: there are none."""
    repair_NS: Tensor | None = None
    """Windows of the same text that only a repair learns from; None: there are none."""
    set_apart: bool = False
    """Whether a text had no more windows than were asked for, so that those held out are missing from the others."""
    texts: tuple[TextWindows, ...] = ()
    """Where windows of several texts are mixed, what is of which."""
    held_out_bytes: int | None = None
    """Bytes of the text that the predicted tokens of the held-out windows write; None: not counted."""

    @property
    def num_held_out(self) -> int:
        """How many windows are held out."""
        return 0 if self.held_out_NS is None else len(self.held_out_NS)

    @property
    def num_repair(self) -> int:
        """How many windows there are for a repair alone."""
        return 0 if self.repair_NS is None else len(self.repair_NS)

    def divided(self, num_held_out: int) -> CalibrationWindows:
        """Give those of the held-out windows to a repair that are more than so many."""
        if self.held_out_NS is None or self.num_held_out <= num_held_out:
            return self
        held_out_NS, repair_NS = self.held_out_NS[:num_held_out], self.held_out_NS[num_held_out:]
        return replace(self, held_out_NS=held_out_NS if len(held_out_NS) else None, repair_NS=repair_NS)

    def for_repair(self, number: int) -> CalibrationWindows:
        """Return the windows of a repair: those that are there for it, before them some of the others if they are few.

        The last ones of every text are those that nothing was fitted on.
        """
        apart_NS = self.ids_NS[:0] if self.repair_NS is None else self.repair_NS[:number]
        fitted_NS = self.ids_NS[: number - len(apart_NS)]
        texts = [
            replace(
                text,
                windows=(
                    *(place for place in text.windows if place < len(fitted_NS)),
                    *(place + len(fitted_NS) for place in text.repair if place < len(apart_NS)),
                ),
            )
            for text in self.texts
        ]
        return replace(self, ids_NS=torch.cat([fitted_NS, apart_NS]), texts=tuple(texts))

    def with_held_out(self, num_held_out: int, min_samples: int) -> CalibrationWindows:
        """Set some of the windows apart, the last ones, if none are held out yet and there are enough.

        At most an eighth of them and at most `num_held_out`, but one at least; `min_samples` stay in any case.
        """
        found = len(self.ids_NS)
        number = min(num_held_out, max(1, found // 8), found - min_samples)
        if self.held_out_NS is not None or number < 1:
            return self
        return replace(
            self,
            ids_NS=self.ids_NS[:-number],
            description=f"{self.description} ({number} of its {found} windows held out)",
            held_out_NS=self.ids_NS[-number:],
            set_apart=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A text that windows of tokens are taken from."""

    draw: Callable[[SourceContext], CalibrationWindows]
    """Raises InputError for a text that cannot be had, or is shorter than one window."""
    packages: tuple[str, ...] = ()
    """Modules that it imports beside the dependencies of structprune."""
    remote: bool = False
    """Whether its text comes from the hub."""

    @property
    def missing(self) -> list[str]:
        """Modules of `packages` that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def behind_start(draw: Callable[[SourceContext], CalibrationWindows], context: SourceContext) -> CalibrationWindows:
    """Let `draw` make windows of the text alone, and put the start in front of each. Raises InputError as it does."""
    start = context.start
    encode = context.encode
    found = draw(
        replace(
            context,
            encode=lambda text: start.stripped(encode(text)),
            seq_len=start.room(context.seq_len),
            start=NO_START,
        )
    )
    held_out_NS = None if found.held_out_NS is None else start.before(found.held_out_NS)
    return replace(found, ids_NS=start.before(found.ids_NS), held_out_NS=held_out_NS, start=start.text)


def consecutive_windows(ids: Tensor, seq_len: int, what: str, where: str) -> Tensor:
    """Cut token ids (tokens,) into windows (N, S), the tail dropped. Raises InputError when there is not one."""
    num_windows = len(ids) // seq_len
    if num_windows == 0:
        raise InputError(
            f"the {what} is shorter than one window",
            where=where,
            got=f"{len(ids)} tokens",
            wanted=f"at least {seq_len}",
            do="give more text, or lower --seq-len",
        )
    return ids[: num_windows * seq_len].reshape(num_windows, seq_len)


def draw_windows(text: str, description: str, context: SourceContext) -> CalibrationWindows:
    """Cut the tokenised text into consecutive windows and draw `num_samples` of them without replacement.

    Held-out windows are drawn behind them. Fewer windows than asked are all used, and the description says so. Raises
    InputError when there is not one.
    """
    windows = consecutive_windows(context.encode(text), context.seq_len, "calibration text", description)
    num_windows = len(windows)
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(context.seed))
    chosen = order[: context.num_samples]
    if len(chosen) < context.num_samples:
        description += f" (all of its {num_windows} windows; {context.num_samples} were asked for)"
    beside = order[context.num_samples : context.num_samples + context.num_held_out]
    return CalibrationWindows(
        ids_NS=windows[chosen], description=description, held_out_NS=windows[beside] if len(beside) else None
    )
