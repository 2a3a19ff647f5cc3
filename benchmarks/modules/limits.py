"""Small random models of many kinds: which ones can be pruned, here and by Torch-Pruning, told nothing but an input.

    python benchmarks/modules/limits.py -o out/limits.jsonl

Torch-Pruning runs in a process of its own, for it may not end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from structprune import ModuleRecipe, prune_module
from structprune.errors import StructPruneError

SECONDS = 60
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}


def pictures(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 99, (2, 7))}


def uncached() -> dict[str, Any]:
    return {**tokens(), "use_cache": False}


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=32, patch_size=8))


def swin() -> nn.Module:
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    return hf.SwinForImageClassification(config)


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16
    )
    return hf.SegformerForSemanticSegmentation(config)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
    return hf.ResNetForImageClassification(config)


def mobilenet() -> nn.Module:
    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(image_size=32, depth_multiplier=0.35))


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40]))


def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        **{**SMALL, "vocab_size": 30},
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return hf.Wav2Vec2ForCTC(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=60,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=10,
        max_source_positions=20,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def heard() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 10, 40),
        "decoder_input_ids": torch.randint(3, 60, (2, 6)),
        "use_cache": False,
    }


def t5() -> nn.Module:
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return hf.T5ForConditionalGeneration(config)


def translated() -> dict[str, Any]:
    return {**uncached(), "decoder_input_ids": torch.randint(3, 99, (2, 5))}


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "ResNet": (resnet, pictures),
    "MobileNetV2": (mobilenet, pictures),
    "ConvNeXt": (convnext, pictures),
    "ViT": (vit, pictures),
    "Swin": (swin, pictures),
    "SegFormer": (segformer, lambda: pictures(64)),
    "BERT": (lambda: hf.BertModel(hf.BertConfig(**SMALL)), tokens),
    "DistilBERT": (
        lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
        tokens,
    ),
    "ALBERT": (lambda: hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=16)), tokens),
    "T5": (t5, translated),
    "Whisper": (whisper, heard),
    "wav2vec2": (wav2vec2, lambda: {"input_values": torch.randn(2, 400)}),
    "GPT-2": (gpt2, uncached),
    "LLaMA with KV groups": (llama, uncached),
}


def ours(name: str) -> dict[str, Any]:
    """Remove 15% of the parameters, and say what came of it."""
    model, example = MODELS[name][0]().eval(), MODELS[name][1]()
    start = time.perf_counter()
    try:
        result = prune_module(model, [example], ModuleRecipe(sparsity=0.15, repair=False, ranking="global"))
    except StructPruneError as error:
        return {"outcome": str(error)[:200]}
    form = "own class" if result.is_native else "graph"
    removal = result.removal
    assert removal is not None
    return {
        "outcome": f"{form}, {removal.difference:.0e} from zeros",
        "families": len(result.widths),
        "left": result.costs["parameters"][1] / result.costs["parameters"][0],
        "seconds": round(time.perf_counter() - start, 1),
    }


def theirs(name: str) -> dict[str, Any]:
    """Prune a quarter of all channels by torch-pruning, and run the result."""
    import torch_pruning as tp

    model, example = MODELS[name][0]().eval(), MODELS[name][1]()
    before = sum(each.numel() for each in model.parameters())
    heads = [
        each
        for path, each in model.named_modules()
        if isinstance(each, nn.Linear | nn.Conv2d) and HEADS & set(path.split("."))
    ]
    try:
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.25,
            ignored_layers=heads,
        )
        pruner.step()
    except Exception as error:
        return {"outcome": f"fails while it prunes: {type(error).__name__}: {str(error)[:100]}"}
    after = sum(each.numel() for each in model.parameters())
    try:
        with torch.no_grad():
            model(**example)
    except Exception as error:
        return {
            "outcome": f"the pruned model fails: {type(error).__name__}: {str(error)[:100]}",
            "left": after / before,
        }
    return {"outcome": "runs" if after < before else "runs, and nothing left it", "left": after / before}


HEADS = {"classifier", "lm_head", "proj_out"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--peer", help="one model, by torch-pruning: what the processes are")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peer:
        print(json.dumps(theirs(options.peer)))
        return
    for name in MODELS:
        line = {"model": name, "ours": ours(name)}
        command = [sys.executable, __file__, "--peer", name]
        try:
            ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
            lines = ended.stdout.strip().splitlines()
            line["torch-pruning"] = json.loads(lines[-1]) if lines else {"outcome": ended.stderr.strip()[-200:]}
        except subprocess.TimeoutExpired:
            line["torch-pruning"] = {"outcome": f"does not end in {SECONDS} s"}
        print(json.dumps(line), flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
