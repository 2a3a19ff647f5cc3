"""Statistics of activations, added up batch by batch: sums and counts, never means, so that two can be merged.

Read first: `gram.py`.
"""

from structprune.statistics.gram import GramAccumulator

__all__ = ["GramAccumulator"]
