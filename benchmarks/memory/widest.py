"""One map with as many inputs as LLaMA 3 70B's `down_proj`, and fewer outputs: what a pruner of single weights holds.

    python benchmarks/memory/widest.py --method alps --outputs 512 --steps 1

The squares, which most of the memory is, have their true size (3.06 GiB each); what grows with the outputs is planned
by the same formula. Steps are those of ADMM and of the refit: the memory of one is that of all, and one takes minutes.
"""

from __future__ import annotations

import argparse
import json
import time

import psutil
import torch
from one import ResidentPeak

from structprune.memory import release_free_memory
from structprune.patterns import as_pattern
from structprune.solvers.elements import PRUNERS, alps, unit
from structprune.solvers.elements.problem import SparseProblem
from structprune.types import Moments

_INPUTS, _TOKENS = 28672, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(PRUNERS), default="alps")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--inputs", type=int, default=_INPUTS)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    alps.MOST_STEPS = unit.REFIT_STEPS = options.steps
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(_TOKENS, options.inputs, generator=generator)
    gram_II = x_TI.T @ x_TI
    # As of many tokens: a Gram of so few would be nothing but its ridge.
    gram_II.diagonal().add_(_TOKENS)
    weight_OI = torch.randn(options.outputs, options.inputs, generator=generator).to(torch.bfloat16)
    problem = SparseProblem(
        weight_OI=weight_OI,
        pattern=as_pattern(options.pattern, 0.5, "layer"),
        moments=Moments(gram_II=gram_II, num_tokens=_TOKENS),
        damping=1e-2,
    )
    del x_TI
    release_free_memory()
    before, resident, started = psutil.Process().memory_info().rss, ResidentPeak(), time.process_time()
    pruner = PRUNERS.get(options.method)
    solution = pruner.prune(problem)
    result = {
        **vars(options),
        "sums_bytes": 4 * options.inputs**2,
        "planned_bytes": pruner.workspace(options.inputs, options.outputs),
        "measured_bytes": resident.stop() - before,
        "kept": float(solution.keep_OI.float().mean()),
        "cpu_seconds": time.process_time() - started,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
