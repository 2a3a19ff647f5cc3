"""StreamedModel statistics: update with a batch, merge two, finalize. Sums and counts, never means."""

from structprune.statistics.gram import GramAccumulator

__all__ = ["GramAccumulator"]
