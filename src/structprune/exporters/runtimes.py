"""Which runtimes load a checkpoint, as far as that is known: what was run here, and what was read in their source.

Read: vLLM 0.33, SGLang. Run: transformers 5.23 (every output, by the reload check), llama.cpp in the wheel of
xllamacpp 2026.10 (every row of gguf_families.py, by tests/e2e/test_gguf.py). Nothing else is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.modeling.sliced import SLICED_ENTRY
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.sources.gguf_families import GGUF_FAMILIES
from structprune.architectures.stock.config import has_own_layers
from structprune.kinds import Structure

Loads = Literal["yes", "no", "unverified"]
Basis = Literal["checked", "by its source"]

# The model files of vLLM and SGLang that were read.
_READ = ("llama", "qwen2", "qwen3")
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
    uneven = has_own_layers(config) or config.get(REMOVED_ENTRY)
    heads, hidden, head_dim = (config.get(name) for name in ("num_attention_heads", "hidden_size", "head_dim"))
    model_type = str(config.get("model_type"))
    return ResultShape(
        model_type=model_type,
        structure=Structure.PER_LAYER if uneven else Structure.UNIFORM,
        sliced=SLICED_ENTRY in config,
        tied=tied,
        other_heads=bool(model_type in _EVEN_HEADS and heads and hidden and head_dim and heads * head_dim != hidden),
        narrow_values=has_narrow_values(config),
        removed_sublayers=any(len(kinds) == 1 for kinds in (config.get(REMOVED_ENTRY) or {}).values()),
        wrapper=wrapper,
        tensor_parallel=tensor_parallel,
        indivisible=indivisible,
    )


def runtimes(shape: ResultShape) -> list[RuntimeSupport]:
    """List which runtimes load a checkpoint of this shape, and why the others do not."""
    return [
        _transformers(shape),
        _shared_out(_vllm_native(shape), shape),
        _shared_out(_vllm_transformers(shape), shape),
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
    if shape.sliced:
        return _no(name, "the class is none of its own: matrices in the residual sums", None)
    if shape.structure == Structure.PER_LAYER:
        return _no(name, "its model files have no widths per layer", "by its source")
    return _uniform(name, shape)


def _vllm_transformers(shape: ResultShape) -> RuntimeSupport:
    name = "vLLM, Transformers backend"
    if shape.narrow_values:
        return _no(name, "it exchanges linear maps for its own, which do not pad the values of a head", "by its source")
    if shape.structure == Structure.PER_LAYER and not shape.removed_sublayers:
        return RuntimeSupport(
            runtime=name,
            loads="yes",
            basis="by its source",
            reason="it reads per_layer_config and asks for auto_map.AutoModel, and groups uneven KV heads; "
            "--trust-remote-code",
        )
    if shape.structure == Structure.PER_LAYER:
        return _unverified(name, "whether it takes blocks without attention or MLP was not read")
    return _unverified(name, "it was read for widths per layer only")


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
