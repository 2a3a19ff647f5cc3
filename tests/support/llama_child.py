"""The process of llama_runtime.py: python tests/support/llama_child.py SPEC RESULT. Imports nothing slow."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

_SECONDS = 60


def _main(spec_path: str, result_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = spec["model"]
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 1
    params.cpuparams.n_threads = 1
    # What is left to differ from transformers is the order of the sums.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = []
    for prompt in spec["prompts"]:
        # Which token is drawn decides nothing, but one that is no whole character would not be reported: "$" is drawn.
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": spec["n"], "n_probs": spec["n"]}
        answer = server.handle_completions({**request, "logit_bias": [["$", 1000.0]], "cache_prompt": False})
        assert "choices" in answer, answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({item["id"]: item["logprob"] for item in top})
    tokens = [_tokenize(server.listening_address, text, spec) for text in spec["texts"]]
    Path(result_path).write_text(json.dumps({"logprobs": found, "tokens": tokens}), encoding="utf-8")


def _tokenize(address: str, text: str, spec: dict[str, object]) -> list[int]:
    flags = {name: spec[name] for name in ("add_special", "parse_special")}
    body = json.dumps({"content": text, **flags}).encode()
    request = urllib.request.Request(f"{address}/tokenize", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return json.load(answer)["tokens"]


if __name__ == "__main__":
    _main(*sys.argv[1:])
