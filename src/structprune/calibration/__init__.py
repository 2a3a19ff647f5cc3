"""Calibration text: its sources, the token windows that a run takes from it, and the stores of their hidden states.

Read first: `context.py`, what a source is given and returns; then `store.py`, hidden states in memory or in a file.
"""

from structprune.calibration.context import Source
from structprune.registry import Registry

SOURCES: Registry[Source] = Registry(
    "calibration source",
    Source,
    {
        "wikitext2": "structprune.calibration.sources.hub:WIKITEXT2",
        "c4": "structprune.calibration.sources.hub:C4",
        "boolq": "structprune.calibration.sources.boolq:BOOLQ",
        "python": "structprune.calibration.sources.python_code:PYTHON",
        "self": "structprune.calibration.sources.self_sampled:SELF_SAMPLED",
    },
    group="structprune.sources",
)
