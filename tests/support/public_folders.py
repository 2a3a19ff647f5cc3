"""Likenesses of public model folders: the files that the hub has under a name, each tiny, with tokenizers that work.

Configs are those of the hub in the form in which they lie there, smaller: entries of older versions of transformers
included. Weights are random, in bfloat16.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

TEXT = [
    "the quick brown fox jumps over the lazy dog and the cat sat on the mat",
    "In 1984, 12345.678 of 9,876,543 people said it's we'll they're",
    "def f(x):\n    return x ** 2  # nothing else\n",
]
"""What the tokenizers learn their merges on."""
VOCAB = 512
"""Rows of every embedding; the tokenizers have fewer tokens."""
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}


def _special(names: list[str]) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _decoder_entries(tokenizer: Tokenizer) -> dict[str, Any]:
    """`added_tokens_decoder` of a tokenizer_config.json."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(index): {name: getattr(token, name) for name in names}
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


def _byte_level(expression: str, special: list[str], *, ignore_merges: bool = False, nfc: bool = False) -> Tokenizer:
    """A BPE on bytes whose text is cut by `expression`, special tokens behind the others as Qwen and LLaMA 3 do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(_special(special))
    return tokenizer


def _pieces(special: list[str], *, gemma: bool) -> Tokenizer:
    """A BPE of SentencePiece: a mark for a space, and bytes for characters that it does not know."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=len(special) + 256 + 120, special_tokens=[*special, *bytes_])
    tokenizer.train_from_iterator(TEXT, trainer)
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = [entry for entry in settings["added_tokens"] if entry["content"] in special]
    settings["normalizer"] = settings["normalizer"] if gemma else None
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    if gemma:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if gemma else [*steps, decoders.Strip(" ", 1, 0)])
    start = "<bos>" if gemma else "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    return tokenizer


def _sentencepiece(tokenizer: Tokenizer) -> bytes:
    """tokenizer.model of the same pieces, as the sentencepiece library writes it."""
    library: Any = sentencepiece
    proto = library.ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for name, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        kind = 2 if name == "<unk>" else 3 if name in special else 6 if name.startswith("<0x") else 1
        proto.pieces.add(piece=name, score=-float(index), type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


Files = Mapping[str, bytes | str | dict[str, Any] | list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """A folder of the hub in small."""

    config: dict[str, Any]
    tokenizer: Callable[[], Tokenizer]
    tokenizer_config: dict[str, Any]
    files: Callable[[Tokenizer], Files]
    """All but weights, config.json, tokenizer.json and tokenizer_config.json."""
    carried: tuple[str, ...]
    """Files that an output has as they are."""
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    """File or folder -> reason."""
    sharded: bool = False
    without_prefix: bool = False
    """Saved from the base model: names without `model.` in front, and no head."""
    consolidated: bool = False
    """The same weights lie there under the names of another program too."""
    refused: str | None = None
    """What every verb says of it, where none can take it."""
    license: str | None = None
    """What the front matter says."""

    def build(self, folder: Path) -> Path:
        """Write the folder."""
        folder.mkdir(parents=True)
        tokenizer = self.tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = self.tokenizer_config | {"added_tokens_decoder": _decoder_entries(tokenizer)}
        for name, content in {**self.files(tokenizer), "tokenizer_config.json": settings}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            data = content if isinstance(content, bytes | str) else json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        self._weights(folder)
        return folder

    def _weights(self, folder: Path) -> None:
        text = json.dumps(self.config, indent=2)
        generation = folder / "generation_config.json"
        said = generation.read_bytes() if generation.exists() else None
        (folder / "config.json").write_text(text)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not re.search("norm", name):
                    parameter.normal_(std=0.15)
        stored = model.model if self.without_prefix else model
        size = "60KB" if self.sharded else "5GB"
        stored.to(torch.bfloat16).save_pretrained(folder, max_shard_size=size)
        # In the words of the hub, which are not those of the version that is installed.
        (folder / "config.json").write_text(text)
        generation.unlink(missing_ok=True)
        if said is not None:
            generation.write_bytes(said)
        if self.consolidated:
            tensors = {name.replace("model.", ""): t.clone() for name, t in model.state_dict().items()}
            save_file(tensors, folder / "consolidated.safetensors", metadata={"format": "pt"})


def _mistral_files(tokenizer: Tokenizer) -> Files:
    return {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": (
            "---\nlibrary_name: vllm\nlicense: apache-2.0\nbase_model: mistralai/Mistral-7B-v0.3\n"
            "extra_gated_description: >-\n  If you want to learn more about how we process your data, please\n"
            '  read our <a href="https://mistral.ai/terms/">Privacy Policy</a>.\ntags:\n- mistral-common\n---\n\n'
        ),
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "transformers_version": "4.42.0.dev0",
        },
        "params.json": {"dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 64, "n_heads": 4, "vocab_size": VOCAB},
        "special_tokens_map.json": {
            name: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
        },
        "tokenizer.model": _sentencepiece(tokenizer),
        "tokenizer.model.v3": _sentencepiece(tokenizer),
    }


_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}"
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[control_8]"]


def _gemma_files(tokenizer: Tokenizer) -> Files:
    return {
        ".gitattributes": "tokenizer.json filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": (
            "---\nlicense: gemma\nlibrary_name: transformers\npipeline_tag: text-generation\n"
            "extra_gated_heading: Access Gemma on Hugging Face\nextra_gated_prompt: >-\n  To access Gemma, you are\n"
            "  required to review and agree to Google's usage license.\nextra_gated_button_content: Acknowledge "
            "license\nbase_model: google/gemma-3-1b-pt\n---\n# Gemma 3 model card\n"
        ),
        "added_tokens.json": {"<image_soft_token>": tokenizer.token_to_id("<image_soft_token>")},
        "generation_config.json": {
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": [1, 6],
            "pad_token_id": 0,
            "top_k": 64,
            "top_p": 0.95,
            "transformers_version": "4.50.0.dev0",
        },
        "special_tokens_map.json": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            **{
                name: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
                for name, token in (("bos_token", "<bos>"), ("eos_token", "<eos>"), ("pad_token", "<pad>"))
            },
        },
        "tokenizer.model": _sentencepiece(tokenizer),
    }


_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + (message['role'] if message['role'] == 'user' "
    "else 'model') + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GEMMA_SPECIAL = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
]


def _chat_ml(system: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + system + "<|im_end|>\n{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _qwen_settings(template: str) -> dict[str, Any]:
    """Return tokenizer_config.json of Qwen2's tokenizer, which chat and embedding models share."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": _QWEN_SPECIAL[1:],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _merges(tokenizer: Tokenizer) -> dict[str, str | dict[str, Any]]:
    """vocab.json and merges.txt of a byte-level BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    return {"vocab.json": model["vocab"], "merges.txt": "\n".join(lines) + "\n"}


_QWEN_SPLIT = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}"
_QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _qwen_tokenizer() -> Tokenizer:
    return _byte_level(_QWEN_SPLIT, _QWEN_SPECIAL, nfc=True)


def _end() -> int:
    """The id of Qwen's `<|endoftext|>`; the two others follow."""
    found = _qwen_tokenizer().token_to_id("<|endoftext|>")
    assert found is not None
    return found


def _qwen_files(tokenizer: Tokenizer) -> Files:
    end: Any = tokenizer.token_to_id("<|endoftext|>")
    return {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "LICENSE": "Apache License\nVersion 2.0, January 2004\n",
        "README.md": (
            "---\nlicense: apache-2.0\nlicense_link: https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/"
            "LICENSE\nlanguage:\n- en\npipeline_tag: text-generation\nbase_model: Qwen/Qwen2.5-0.5B\ntags:\n- chat\n"
            "library_name: transformers\n---\n\n# Qwen2.5-0.5B-Instruct\n"
        ),
        "generation_config.json": {
            "bos_token_id": end,
            "pad_token_id": end,
            "do_sample": True,
            "eos_token_id": [end + 2, end],
            "repetition_penalty": 1.1,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
        **_merges(tokenizer),
    }


def _llama_files(tokenizer: Tokenizer) -> Files:
    ids = [tokenizer.token_to_id(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")]
    return {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "LICENSE.txt": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n",
        "USE_POLICY.md": "**Llama 3.2** **Acceptable Use Policy**\n",
        "README.md": (
            "---\nlanguage:\n- en\n- de\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- facebook\n"
            "- llama-3\nlicense: llama3.2\nextra_gated_prompt: >-\n  ### LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n\n\n"
            "  Llama 3.2 Version Release Date: September 25, 2024\nextra_gated_fields:\n  First Name: text\n"
            "  Job title:\n    type: select\n    options:\n    - Student\n---\n\n## Model Information\n"
        ),
        "generation_config.json": {
            "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
            "do_sample": True,
            "eos_token_id": ids,
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.45.0.dev0",
        },
        "special_tokens_map.json": {
            "bos_token": {
                "content": "<|begin_of_text|>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            },
            "eos_token": {
                "content": "<|eot_id|>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            },
        },
        "original/consolidated.00.pth": b"PK\x03\x04 a pickle",
        "original/params.json": {"dim": 32, "n_layers": 2},
        "original/tokenizer.model": "IQ== 0\nIg== 1\n",
    }


_LLAMA_NAMES = ("begin_of_text", "end_of_text", "eom_id", "eot_id", "python_tag", "start_header_id", "end_header_id")
_LLAMA_SPECIAL = [f"<|{name}|>" for name in _LLAMA_NAMES]


def _llama_tokenizer() -> Tokenizer:
    expression = f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}"
    tokenizer = _byte_level(expression, _LLAMA_SPECIAL, ignore_merges=True)
    start = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A {start}:1 $B:1",
        special_tokens=[(start, tokenizer.token_to_id(start))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return tokenizer


def _llama_id(name: str) -> int:
    return _llama_tokenizer().token_to_id(f"<|{name}|>") or 0


def _embedding_files(tokenizer: Tokenizer) -> Files:
    end: Any = tokenizer.token_to_id("<|endoftext|>")
    results = "".join(
        f"  - task:\n      type: Retrieval\n    dataset:\n      type: mteb/d{number}\n      name: MTEB D{number}\n"
        f"    metrics:\n    - type: ndcg_at_10\n      value: {number}.5\n"
        for number in range(40)
    )
    return {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": (
            "---\nlicense: apache-2.0\nbase_model:\n- Qwen/Qwen3-0.6B-Base\ntags:\n- transformers\n"
            "- sentence-transformers\n- sentence-similarity\n- feature-extraction\n- text-embeddings-inference\n"
            f"pipeline_tag: feature-extraction\nmodel-index:\n- name: small\n  results:\n{results}---\n# Embedding\n"
        ),
        "generation_config.json": {
            "bos_token_id": end,
            "eos_token_id": end,
            "max_new_tokens": 2048,
            "transformers_version": "4.51.3",
        },
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": "Instruct: Given a query, retrieve passages\nQuery:", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
        "onnx/model.onnx": b"\x08\x08",
        "onnx/model.onnx_data": b"\x00" * 64,
        "onnx/config.json": {"model_type": "qwen3"},
        **_merges(tokenizer),
    }


def _embedding_tokenizer() -> Tokenizer:
    tokenizer = _qwen_tokenizer()
    end = "<|endoftext|>"
    template = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def _e5_files(tokenizer: Tokenizer) -> Files:
    modules = _embedding_files(_embedding_tokenizer())
    names = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
    return {
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "README.md": "---\ntags:\n- mteb\n- sentence-transformers\nlicense: mit\nlanguage:\n- en\n---\n# E5\n",
        "lora/adapter_config.json": {"peft_type": "LORA"},
        "lora/adapter_model.bin": b"PK",
        "tokenizer.model": _sentencepiece(tokenizer),
        **{name: modules[name] for name in names},
    }


_HIDDEN = {".gitattributes": "hidden"}
_MISTRAL_TOKENIZER: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "bos_token": "<s>",
    "chat_template": _MISTRAL_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
_MISTRAL: dict[str, Any] = _SIZES | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.42.0.dev0",
}
LIKENESSES: dict[str, Likeness] = {
    "Mistral-7B-Instruct-v0.3": Likeness(
        config=_MISTRAL,
        tokenizer=lambda: _pieces(_MISTRAL_SPECIAL, gemma=False),
        tokenizer_config=_MISTRAL_TOKENIZER,
        files=_mistral_files,
        carried=(
            *("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
            *("tokenizer.model.v3", "tokenizer_config.json"),
        ),
        left_out=_HIDDEN
        | {
            "consolidated.safetensors": "weights that were not read",
            "params.json": "describes weights that were not read",
        },
        sharded=True,
        consolidated=True,
        license="apache-2.0",
    ),
    "gemma-3-1b-it": Likeness(
        config=_SIZES
        | {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 6],
            "final_logit_softcapping": None,
            "head_dim": 16,
            "hidden_activation": "gelu_pytorch_tanh",
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 16,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 8,
            "sliding_window_pattern": 6,
            "transformers_version": "4.50.0.dev0",
        },
        tokenizer=lambda: _pieces(_GEMMA_SPECIAL, gemma=True),
        tokenizer_config={
            "add_bos_token": True,
            "add_eos_token": False,
            "boi_token": "<start_of_image>",
            "bos_token": "<bos>",
            "chat_template": _GEMMA_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eoi_token": "<end_of_image>",
            "eos_token": "<eos>",
            "extra_special_tokens": {
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
            },
            "image_token": "<image_soft_token>",
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "Gemma3Processor",
            "sp_model_kwargs": None,
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
        files=_gemma_files,
        carried=(
            *("added_tokens.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json"),
            *("tokenizer.model", "tokenizer_config.json"),
        ),
        left_out=_HIDDEN,
        license="gemma",
    ),
    "Qwen2.5-0.5B-Instruct": Likeness(
        config=_SIZES
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "bos_token_id": _end(),
            "eos_token_id": _end() + 2,
            "hidden_act": "silu",
            "max_window_layers": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "tie_word_embeddings": True,
            "transformers_version": "4.43.1",
            "use_sliding_window": False,
        },
        tokenizer=_qwen_tokenizer,
        tokenizer_config=_qwen_settings(_chat_ml("You are Qwen.")),
        files=_qwen_files,
        carried=(
            "LICENSE",
            "generation_config.json",
            "merges.txt",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
        ),
        left_out=_HIDDEN,
        license="apache-2.0",
    ),
    "Llama-3.2-1B-Instruct": Likeness(
        config=_SIZES
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": _llama_id("begin_of_text"),
            "eos_token_id": [_llama_id("end_of_text"), _llama_id("eom_id"), _llama_id("eot_id")],
            "head_dim": 8,
            "hidden_act": "silu",
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "transformers_version": "4.45.0.dev0",
        },
        tokenizer=_llama_tokenizer,
        tokenizer_config={
            "bos_token": "<|begin_of_text|>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|eot_id|>",
            "chat_template": "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] "
            "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        files=_llama_files,
        carried=(
            *("LICENSE.txt", "USE_POLICY.md", "generation_config.json", "special_tokens_map.json", "tokenizer.json"),
            "tokenizer_config.json",
        ),
        left_out=_HIDDEN | {"original/": "a folder of weights that were not read"},
        license="llama3.2",
    ),
    "Qwen3-Embedding-0.6B": Likeness(
        config=_SIZES
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "bos_token_id": _end(),
            "eos_token_id": _end(),
            "head_dim": 16,
            "hidden_act": "silu",
            "max_window_layers": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "transformers_version": "4.51.3",
            "use_sliding_window": False,
        },
        tokenizer=_embedding_tokenizer,
        tokenizer_config=_qwen_settings(_chat_ml("none")),
        files=_embedding_files,
        carried=(
            *("1_Pooling/config.json", "config_sentence_transformers.json", "generation_config.json", "merges.txt"),
            *("modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
        ),
        left_out=_HIDDEN | {"onnx/": "a folder of weights that were not read"},
        without_prefix=True,
        license="apache-2.0",
    ),
    "e5-mistral-7b-instruct": Likeness(
        config=_MISTRAL | {"architectures": ["MistralModel"], "sliding_window": 4096},
        tokenizer=lambda: _pieces(_MISTRAL_SPECIAL, gemma=False),
        tokenizer_config=_MISTRAL_TOKENIZER,
        files=_e5_files,
        carried=(),
        without_prefix=True,
        sharded=True,
        refused="the checkpoint has no head, so it predicts no tokens: it is a base model, as those for embeddings "
        "are; got no tensor 'lm_head.weight', and tie_word_embeddings is false",
    ),
}
"""Name on the hub -> its likeness."""
