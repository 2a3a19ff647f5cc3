"""What a search over widths takes: how the calibration windows are shared out to its parts, and how often it measures.

Some windows fit what candidates consist of, others are what they are measured on, and the last ones are seen by the
final judgement alone. Every text has its share of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from structprune.allocation.proposers import Rung, Search, SearchOptions
from structprune.errors import InputError

NUM_FINALISTS = 4
"""Choices that the final judgement compares with the one that the search started from."""
NUM_MASKS = 4
"""Draws of other units at the widths that were chosen: how much of a gain is luck."""
KEPT_VARIANTS = 16
"""Solved widths of a sublayer that stay on disk, the newest ones."""
LEAST_WINDOWS = 4
"""Calibration windows that a text needs."""
ANCHOR_RUNG = Rung(windows=4)
"""What single sublayers are measured on."""
# Tokens of the final judgement: with fewer a gain of a few percent is not told from chance.
_JUDGED_TOKENS = 32_768
# Of the blocks that a candidate passes, the share that it does not have in common with others of its round.
_OWN_SHARE = 0.75
# Sublayers whose width a proposed choice has and no choice before it had.
_NEW_WIDTHS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowShares:
    """How many of a text's windows go to which part, in their order."""

    fitted: int
    """Windows that consumers are solved on."""
    measured: int
    """Windows that every round draws some of."""
    judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchWork:
    """What a search does at most."""

    generations: int
    children: int
    rounds: tuple[tuple[int, int], ...]
    """(choices, windows) of each round of a generation, the start among the choices of the last one."""
    windows: WindowShares
    """Sums over the texts."""
    anchors: tuple[int, int] = (0, 0)
    """(candidates, windows) of the measurements of single sublayers."""


def window_shares(num_windows: int, backward: int, num_texts: int, seq_len: int) -> WindowShares:
    """Share out the windows of one text; `backward` are those of the sensitivity pass, of all texts.

    Raises InputError where there are too few.
    """
    if num_windows < LEAST_WINDOWS:
        raise InputError(
            "a text has too few calibration windows for a search over widths",
            got=f"{num_windows} windows",
            wanted=f"at least {LEAST_WINDOWS} of each text",
            do="raise --num-samples or lower --seq-len, or leave --search out",
        )
    judged = min(num_windows // 4, max(1, _JUDGED_TOKENS // (seq_len * num_texts)))
    fitted = min(num_windows // 2, max(1, -(-backward // num_texts)))
    return WindowShares(fitted=fitted, measured=num_windows - fitted - judged, judged=judged)


def windows_per_text(rung: Rung, num_texts: int) -> int:
    """Return how many windows of each text a round is measured on: as many of one as of another."""
    return -(-rung.windows // num_texts)


def search_work(
    search: Search,
    options: SearchOptions,
    *,
    num_windows: int,
    backward: int,
    num_texts: int,
    seq_len: int,
    num_anchors: int = 0,
) -> SearchWork:
    """Count what a search does at most; `num_anchors` are candidates that measure single sublayers.

    Raises InputError where there are too few windows.
    """
    per_text = window_shares(num_windows // num_texts, backward, num_texts, seq_len)
    rounds: list[tuple[int, int]] = []
    for number, rung in enumerate(search.rungs):
        choices = options.children if rung.choices is None else min(options.children, rung.choices)
        if number + 1 == len(search.rungs):
            # The best one so far, and the start.
            choices += 2
        rounds.append((choices, min(num_windows, num_texts * windows_per_text(rung, num_texts))))
    rest = num_windows - num_texts * (per_text.fitted + per_text.judged)
    return SearchWork(
        generations=options.generations,
        children=options.children,
        rounds=tuple(rounds),
        anchors=(num_anchors, num_texts * windows_per_text(ANCHOR_RUNG, num_texts)),
        windows=WindowShares(fitted=num_texts * per_text.fitted, measured=rest, judged=num_texts * per_text.judged),
    )


def stores_at_once(room: int, num_windows: int, num_candidates: int) -> int:
    """Return how many candidates run together: their stores take no more than those of the pass that prunes.

    `room` are the windows of all of its stores together.
    """
    return max(1, min(num_candidates, room // num_windows))


def candidate_windows(work: SearchWork) -> tuple[float, int]:
    """Count windows that pass all blocks as part of candidates, prefixes that are shared once, and those of heads."""
    each = [(choices * windows) * work.generations for choices, windows in work.rounds]
    last = (1 + NUM_FINALISTS + NUM_MASKS) * work.windows.judged
    # These begin where the dense model is changed, half way on average.
    single = work.anchors[0] * work.anchors[1]
    return _OWN_SHARE * (sum(each) + last) + single / 2, sum(each) + last + single


def solved_widths(work: SearchWork, num_sublayers: int) -> float:
    """Estimate how many widths are solved."""
    return num_sublayers * (1 + NUM_MASKS) + _NEW_WIDTHS * work.generations * work.children
