"""The process of vllm_runtime.py, run by the Python that has vLLM: vllm_child.py SPEC RESULT.

One process loads several models after another: importing vLLM takes longer than any of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# All in this process, so that its errors arrive as they were raised; nothing is asked of the hub.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def _answer(model: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model["directory"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=model["max_model_len"],
        max_logprobs=-1,
        kv_cache_memory_bytes=model["cache_bytes"],
        # The log-probabilities of a cached beginning are not computed again.
        enable_prefix_caching=False,
        **model["options"],
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found: list[dict[str, Any]] = []
    for ids, output in zip(prompts, outputs, strict=True):
        following = output.outputs[0].logprobs[0]
        inside = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append(
            {
                "prompt": [known[token].logprob for token, known in inside],
                "next": [following[token].logprob for token in sorted(following)],
            }
        )
    answer: dict[str, Any] = {"logprobs": found, "class": _class_name(engine)}
    if model["num_generated"]:
        answer["seconds"] = _generation_seconds(engine, prompts, model["num_generated"])
    return answer


def _class_name(engine: Any) -> str:
    names = engine.apply_model(_name_of_class)
    return str(names[0])


def _name_of_class(module: Any) -> str:
    return type(module).__name__


def _generation_seconds(engine: Any, prompts: list[list[int]], num_tokens: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - begun


def _main(spec_path: str, result_path: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    # vLLM collects garbage whenever an engine ends; what the imports left has none.
    gc.freeze()
    answers: list[dict[str, Any]] = []
    for model in spec["models"]:
        begun = time.perf_counter()
        try:
            answer = _answer(model, spec["prompts"])
        except Exception as error:
            # Whatever it raises is its reason.
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.append(answer | {"wall": time.perf_counter() - begun})
        cleanup_dist_env_and_memory()
        Path(result_path).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
