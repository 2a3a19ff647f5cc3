"""Metadata of a GGUF file by the rule that nothing of it may be lost: what is not read ends the run with its name.

Every entry is taken by the code that understands it, or stands in one of two tables here: keys that change no number
(`INERT`), and values by which a key has no effect (`NEUTRAL`). So is every tensor. What is left over then is something
that this version would compute wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from structprune.checkpoint.gguf_file import GgufHeader
from structprune.errors import CheckpointError, UnsupportedError

# Beginnings of keys that no runtime computes with. Those of the tokenizer have a reader of their own.
INERT = ("general.", "split.", "quantize.", "tokenizer.", "imatrix.", "mradermacher.")
# Of an architecture's own keys: what was done to make the file, not what is to be done with it.
_INERT_FIELDS = ("rope.scaling.finetuned", "tensor_data_layout")
# Entry -> values by which it has no effect, in whichever architecture it is written.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0.0, 1.0),
    # llama.cpp reads these for architectures that are not here; the others have its own values, which are these.
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
_ADVICE = "start from the model's Hugging Face checkpoint"


class GgufFields:
    """The entries of one file's architecture, each of which is to be taken by name (without the architecture in front).

    Raises CheckpointError for a value of another type or out of its bounds.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.where = str(header.path)
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError("the GGUF file does not say its architecture", where=self.where)
        self.architecture = architecture
        kind = header.metadata.get("general.type", "model")
        if kind != "model":
            raise UnsupportedError("the GGUF file holds no model of its own", where=self.where, got=f"type {kind!r}")
        self._used: set[str] = set()
        self._used_tensors: set[str] = set()

    def _take(self, name: str) -> Any:
        self._used.add(name)
        return self.header.metadata.get(f"{self.architecture}.{name}")

    def _wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"the GGUF file's {self.architecture}.{name} is not usable",
            where=self.where,
            got="nothing" if value is None else str(value)[:60],
            wanted=wanted,
        )

    def raw(self, name: str) -> Any:
        """Read a value as it is, a number as `number` does; None for a file without it."""
        value = self._take(name)
        return shortest(value) if isinstance(value, float) else value

    def skip(self, name: str) -> None:
        """Mark a key that the architecture does not read."""
        self._used.add(name)

    def integer(
        self,
        name: str,
        default: int | None = None,
        *,
        least: int = 1,
        most: int = 2**31 - 1,
        or_none: bool = False,
    ) -> int:
        """Read a whole number; a list with one number per block that are all the same is that number.

        With `or_none` blocks may have zero instead.
        """
        value = self._take(name)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            own = value[value != 0] if or_none else value
            if len(own) and (own == own[0]).all():
                value = int(own[0])
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Read a finite number, as the shortest decimal that is the same in float32, which the file has."""
        value = self._take(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return shortest(value)

    def flag(self, name: str, default: bool) -> bool:
        """Read a flag."""
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """Read a text."""
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def pattern(self, name: str, num_blocks: int, period: int) -> list[bool]:
        """Read which blocks have a window: a period (the last block of each has none) or one flag per block."""
        value = self._take(name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biu" and len(value) == num_blocks:
            return [bool(item) for item in value]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self._wrong(name, value, f"a period, or {num_blocks} flags")
        period = period if value is None else value
        return [(index + 1) % period != 0 for index in range(num_blocks)]

    def has_tensor(self, name: str) -> bool:
        """Whether the file holds it; that does not count as reading it."""
        return name in self.header.tensors

    def take_tensor(self, name: str) -> bool:
        """Mark the tensor `name` as read. Whether it is there."""
        self._used_tensors.add(name)
        return name in self.header.tensors

    def check_all_taken(self) -> None:
        """Raise UnsupportedError that names an entry or a tensor that nothing has read."""
        for key, value in self.header.metadata.items():
            own = key.removeprefix(f"{self.architecture}.")
            if own == key:
                if not key.startswith(INERT):
                    raise self._left(f"the metadata key {key!r}", value)
            elif own not in self._used and own not in _INERT_FIELDS and not is_one_of(value, NEUTRAL.get(own, ())):
                raise self._left(f"the metadata key {key!r}", value)
        left = [info for name, info in self.header.tensors.items() if name not in self._used_tensors]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise self._left(f"tensor {left[0].name!r}{more}", f"{left[0].kind_name} {list(left[0].shape)}")

    def _left(self, what: str, value: object) -> UnsupportedError:
        return UnsupportedError(
            f"the GGUF file holds something that would be lost: {what} has no reader for this architecture",
            where=self.where,
            got=f"{str(value)[:80]} in a file of architecture {self.architecture}",
            do=_ADVICE,
        )


def is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    """Whether a single value is one of these; a list never is."""
    return isinstance(value, int | float | str) and value in allowed


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same number in float32: 1e-05 for the float32 next to it."""
    return value if isinstance(value, int) else float(str(np.float32(value)))
