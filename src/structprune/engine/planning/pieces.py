"""The few things that a run spends its time on, by name: `work.py` counts them, and `engine/run/pace.py` times them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from structprune.kinds import SublayerKind


class What(StrEnum):
    """One kind of work. A window has as many tokens as the run's windows."""

    STAGE = "stage"
    """One window through the sublayers of one block that read the same state of the stream."""
    CONSUMER = "consumer"
    """One window's cached inputs through a sublayer's last product."""
    BACKWARD = "backward"
    """One window through a whole block, and its gradient back to the block's input."""
    WEIGHT_BACKWARD = "weight backward"
    """The same, and the gradients of the block's weights."""
    HEAD = "head"
    """The loss of one window from its last hidden states."""
    HEAD_BACKWARD = "head backward"
    """The same, and its gradient."""
    SUMS = "sums"
    """The products of one window's consumer inputs, and those with their targets where they have some."""
    STREAM_SUMS = "stream sums"
    """The products of one window's hidden states, or of their gradients."""
    CHOICE = "choice"
    """The units of one sublayer's part chosen by a search."""
    SOLVE = "solve"
    """The consumer of one sublayer's part solved again."""
    COSTS = "costs"
    """The cost of every removal from one sublayer's part."""
    SEARCH_SOLVE = "search solve"
    """The consumer of one sublayer's part solved for a width that a search measures, with a ridge that is given."""
    MAP_INPUTS = "map inputs"
    """One window through one block up to every group of maps that is measured in a pass of its own."""
    MAP_SUMS = "map sums"
    """The products of all inputs of one window that maps of one block read."""
    MAP_SOLVE = "map solve"
    """All maps of one block's sublayer with their zeros, and what they lose."""
    ROW_SOLVE = "row solve"
    """One head row fitted to what missing tokens would have been given."""
    BASIS = "basis"
    """The leading directions of the stream at one position."""


class Piece(NamedTuple):
    """One kind of work, of one kind of sublayer where that makes a difference."""

    what: What
    kind: SublayerKind | None = None
    """The first kind in it, for a stage."""


Counts = Mapping[Piece, float]
Work = Mapping[str, Counts]
"""Name of a stretch of the run -> how often it does what."""
