"""Recovery: a pruned model learns again from the dense one. A mode is one file.

Read first: `run.py`, a recovery from start to end; then `stream.py`, the default mode.
"""

from structprune.engine.run.context import Repair
from structprune.registry import Registry
from structprune.training.context import Mode

MODES: Registry[Mode] = Registry(
    "recovery mode",
    Mode,
    {
        "stream": "structprune.training.stream:STREAM",
        "blocks": "structprune.training.blocks:BLOCKS",
        "scales": "structprune.training.stream:SCALES",
        "lora": "structprune.training.lora:LORA",
    },
)

REPAIRS: Registry[Repair] = Registry(
    "repair",
    Repair,
    {
        "scales": "structprune.training.repair:SCALES",
        "scales+biases": "structprune.training.repair:SCALES_AND_BIASES",
    },
)
"""What `prune --repair` names."""
