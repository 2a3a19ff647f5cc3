"""Prune a LLaMA's MLP channels with a peer, on the windows that structprune draws, and save a stock checkpoint.

    python benchmarks/peers/run.py --peer torch-pruning --importance taylor --model DIR --sparsity 0.3 \
        --calibration train.txt --num-samples 48 --seq-len 1024 -o OUT

Prints one JSON line: seconds, bytes, what share of the MLP's parameters went. Evaluate the output from outside
(`structprune eval`), so that every model is measured by the same code. One run is one process: peak memory is the
process's own. Peers load the whole model; how to install them: README.md beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import load_model
from structprune.calibration.context import SourceContext, draw_windows
from structprune.calibration.sources.file import read_text
from structprune.checkpoint.folder import write_companions
from structprune.memory import PeakMeter

Peer = Callable[[Any, Tensor, float], None]
"""(model, calibration windows (N, S), share of the channels to remove): prunes the model in place."""


def torch_pruning_taylor(model: Any, ids_NS: Tensor, sparsity: float) -> None:
    """First-order importance |w dL/dw|, summed over a channel's weights; gradients summed over the windows."""
    import torch_pruning

    for ids_S in ids_NS:
        model(input_ids=ids_S[None], labels=ids_S[None], use_cache=False).loss.backward()
    _torch_pruning(model, torch_pruning.importance.GroupTaylorImportance(), ids_NS, sparsity)


def torch_pruning_magnitude(model: Any, ids_NS: Tensor, sparsity: float) -> None:
    """L2 norm of a channel's weights; the windows only trace the graph."""
    import torch_pruning

    _torch_pruning(model, torch_pruning.importance.GroupMagnitudeImportance(p=2), ids_NS, sparsity)


def _torch_pruning(model: Any, importance: Any, ids_NS: Tensor, sparsity: float) -> None:
    """Its pruner of dependency groups, with every group left out that holds more than MLP channels."""
    import torch_pruning

    outside = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside += [module for layer in model.model.layers for module in (layer.self_attn, layer.mlp.down_proj)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs={"input_ids": ids_NS[:1, :8], "use_cache": False},
        importance=importance,
        global_pruning=False,
        pruning_ratio=sparsity,
        # down_proj's outputs are the hidden size; its inputs go with the channels all the same.
        ignored_layers=outside,
        output_transform=lambda output: output.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()


def optipfair_static(model: Any, ids_NS: Tensor, sparsity: float) -> None:
    """Peak-to-peak magnitude of the rows of gate and up; no data."""
    _optipfair(model, None, sparsity)


def optipfair_data(model: Any, ids_NS: Tensor, sparsity: float) -> None:
    """The same of gate, up and down, times the norm of the channel's activations."""
    _optipfair(model, [{"input_ids": ids_S[None]} for ids_S in ids_NS], sparsity)


def _optipfair(model: Any, batches: Any, sparsity: float) -> None:
    from optipfair.pruning import prune_model_mlp_glu

    width = model.config.intermediate_size
    # It rounds the number of channels down; half a channel more gives the number that structprune removes.
    remove = math.ceil(sparsity * width - 1e-9)
    prune_model_mlp_glu(
        model,
        neuron_selection_method="MAW",
        pruning_percentage=100 * (remove + 0.5) / width,
        dataloader=batches,
        show_progress=False,
    )


PEERS: dict[str, dict[str, Peer]] = {
    "torch-pruning": {"taylor": torch_pruning_taylor, "magnitude": torch_pruning_magnitude},
    "optipfair": {"static": optipfair_static, "data": optipfair_data},
}


def mlp_parameters(model: Any) -> int:
    return sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())


def mlp_width(model: Any) -> int:
    """Channels per block. The peers prune every block alike, which a stock config can say."""
    widths = {layer.mlp.down_proj.in_features for layer in model.model.layers}
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            module: nn.Linear = layer.mlp.get_submodule(name)
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), name
        assert layer.mlp.gate_proj.out_features == layer.mlp.up_proj.out_features == layer.mlp.down_proj.in_features
    assert len(widths) == 1, f"the peer left blocks of widths {sorted(widths)}"
    return widths.pop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("--importance", required=True, help="taylor, magnitude | static, data")
    parser.add_argument("--model", default="smollm2", help="Hugging Face directory of a LLaMA, or smollm2 (bundled)")
    parser.add_argument("--sparsity", type=float, default=0.3, help="share of the MLP channels to remove")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.importance not in PEERS[given.peer]:
        parser.error(f"{given.peer} has --importance {', '.join(PEERS[given.peer])}; got {given.importance}")
    if not 0 < given.sparsity < 1:
        parser.error(f"--sparsity is a share between 0 and 1; got {given.sparsity:g}")
    if given.output.exists():
        parser.error(f"{given.output} exists")
    if importlib.util.find_spec(given.peer.replace("-", "_")) is None:
        parser.error(f"{given.peer} is not installed here; make peers-setup, then .venv-peers/bin/python")
    # Before the meter: what libraries take is not the run's.
    importlib.import_module(given.peer.replace("-", "_"))

    reader = open_model(given.model)
    started = time.perf_counter()
    with PeakMeter() as meter:
        context = SourceContext(
            encode=TextEncoder(reader.directory).encode,
            sample=lambda *_: torch.empty(0),
            num_samples=given.num_samples,
            seq_len=given.seq_len,
            seed=given.seed,
        )
        ids_NS = draw_windows(read_text(given.calibration), given.calibration.name, context).ids_NS
        dtype = getattr(torch, given.dtype)
        model: Any = load_model(reader, torch.device("cpu"), dtype)
        before = mlp_parameters(model)
        PEERS[given.peer][given.importance](model, ids_NS, given.sparsity)
        after = mlp_parameters(model)
        model.config.intermediate_size = mlp_width(model)
        model.zero_grad(set_to_none=True)
        model.save_pretrained(given.output)
        # The tokenizer and the rest beside it, and the config as the stock class wrote it.
        write_companions(reader.directory, given.output, json.loads((given.output / "config.json").read_text("utf-8")))
    row = {
        "peer": given.peer,
        "version": importlib.metadata.version(given.peer),
        "importance": given.importance,
        "sparsity": given.sparsity,
        "removed": 1 - after / before,
        "kept": model.config.intermediate_size,
        "calibration": given.calibration.name,
        "calibration_windows": len(ids_NS),
        "seq_len": given.seq_len,
        "compute_dtype": given.dtype,
        "seconds": time.perf_counter() - started,
        # Above the process's size with its libraries, as in structprune's reports; and the process as a whole.
        "peak_bytes": meter.peak_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "output": str(given.output),
    }
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
