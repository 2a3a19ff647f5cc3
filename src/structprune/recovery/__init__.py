"""Recovery: a pruned model learns again from the dense one. A mode is one file."""

from structprune.recovery.job import Mode
from structprune.registry import Registry

MODES: Registry[Mode] = Registry(
    "recovery mode",
    {
        "stream": "structprune.recovery.stream:STREAM",
        "blocks": "structprune.recovery.blocks:BLOCKS",
        "lora": "structprune.recovery.lora:LORA",
    },
)
