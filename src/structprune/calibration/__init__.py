"""Calibration text: where it comes from, which windows of it are used, and where their hidden states live."""

from structprune.calibration.context import Source
from structprune.registry import Registry

SOURCES: Registry[Source] = Registry(
    "calibration source",
    {
        "wikitext2": "structprune.calibration.sources.hub:wikitext2",
        "c4": "structprune.calibration.sources.hub:c4",
        "boolq": "structprune.calibration.sources.boolq:boolq",
        "self": "structprune.calibration.sources.self_sampled:self_sampled",
    },
)
