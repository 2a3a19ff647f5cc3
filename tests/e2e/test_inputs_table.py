"""docs/inputs.md is what happens: each row of its tables is an input that is built here and given to the command line.

`STRUCTPRUNE_REWRITE=1 python -m pytest tests/e2e/test_inputs_table.py` writes the tables anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from structprune.api import export
from support.checkpoints import change, change_config, change_weights, hostile
from support.command_line import CommandLine
from support.models import COMMON, byte_tokenizer, save_tiny
from support.public_folders import LIKENESSES
from support.texts import CHATS, FORMS, json_lines
from support.wrappers import save_wrapper

gguf = pytest.importorskip("gguf")
pytest.importorskip("pyarrow")
from support.gguf_files import copy_gguf, plain_gguf  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"
Happens = Literal["accepted", "adapted", "refused"]
Arguments = Sequence[object]
SMALL = ("--method", "fasp", "--sparsity", 0.3, "--multiple-of", 8, "--num-samples", 2, "--dtype", "float32", "-q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder of one case: a model, a text, and where an output would go."""

    top: Path
    text: Path
    gguf: Path
    """A model that llama.cpp loads. Do not modify."""

    @property
    def model(self) -> Path:
        """A tiny LLaMA in float32, to change."""
        return self.top / "model"

    @property
    def out(self) -> Path:
        """Not there yet."""
        return self.top / "out"

    def shown(self, said: str) -> str:
        """What was said with names in the place of this machine's paths."""
        names = {self.out: "OUT", self.model: "MODEL", self.text: "TEXT", self.gguf: "MODEL.gguf", self.top: "DIR"}
        for path, name in sorted(names.items(), key=lambda item: -len(str(item[0]))):
            said = said.replace(str(path), name)
        # A name that is as long as a test can make it is cut by how long this machine's paths are.
        return re.sub("a{20,}", "aaa...", " ".join(said.split()))


Said = Callable[[Place, Any], list[str]]


def of_report(place: Place, result: Mapping[str, Any]) -> list[str]:
    """Notes, and files that are left out."""
    left = (result.get("files") or {}).get("left_out", {})
    return [*result.get("notes", ()), *(f"{name} is left out: {reason}" for name, reason in left.items())]


def of_card(place: Place, result: Mapping[str, Any]) -> list[str]:
    """What the output's README says of the source's."""
    return re.findall(r"^The front matter of .*$", (place.out / "README.md").read_text(), flags=re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row."""

    given: str
    """The input, in plain words."""
    build: Callable[[Place], Arguments]
    """Makes it, and returns the command that gets it."""
    happens: Happens
    test: str
    """The test that holds more of it: what the result is worth, in every form of the input."""
    said: Said = of_report
    """What a command that succeeds says of the input."""
    last_line: bool = False
    """Whether another library prints more in front of the message."""
    keeps: tuple[str, ...] = ()
    """Files of the input that an output has."""


def prune(place: Place, *more: object, model: object = None, calibration: object = None, seq_len: int = 8) -> Arguments:
    """Prune the place's model by the place's text, or others."""
    return (
        *("prune", model or place.model, "-o", place.out, "--calibration", calibration or place.text),
        *(*SMALL, "--seq-len", seq_len, *more),
    )


def changed(change_it: Callable[[Path], object], *, verb: str = "prune") -> Callable[[Place], Arguments]:
    """Change the model's folder first."""

    def build(place: Place) -> Arguments:
        change_it(place.model)
        return prune(place) if verb == "prune" else (verb, place.model)

    return build


def wrapper(folder: Path) -> Path:
    """Put a tiny image-text model in the place of the model."""
    shutil.rmtree(folder)
    return save_wrapper("llava", folder)


def with_file(name: str, content: bytes | str = b"x") -> Callable[[Place], Arguments]:
    """Put a file into the model's folder first."""

    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return changed(build)


def config(**entries: Any) -> Callable[[Place], Arguments]:
    """Set entries of config.json first."""
    return changed(lambda folder: change_config(folder, **entries))


def tensors(change_them: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Callable[[Place], Arguments]:
    """Change the weights first."""
    return changed(lambda folder: change_weights(folder, change_them))


def likeness(name: str) -> Callable[[Place], Arguments]:
    """The likeness of a folder of the hub, without the hidden files that all of them have."""

    def build(place: Place) -> Arguments:
        shutil.rmtree(place.model)
        (LIKENESSES[name].build(place.model) / ".gitattributes").unlink()
        return prune(place)

    return build


def text(name: str, content: bytes | str, *, field_name: str = "") -> Callable[[Place], Arguments]:
    """Calibrate on a file of this name and content."""

    def build(place: Place) -> Arguments:
        path = place.top / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return prune(place, calibration=f"{path}{field_name}")

    return build


def from_gguf(name: str = "copy.gguf", **changes: Any) -> Callable[[Place], Arguments]:
    """A copy of the GGUF file with other keys, tensors or types."""

    def build(place: Place) -> Arguments:
        return prune(place, model=copy_gguf(place.gguf, place.top / name, **changes))

    return build


# Builders of single cases


def sharded(folder: Path) -> None:
    shutil.rmtree(folder)
    save_tiny("llama", folder, max_shard_size="20KB")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def omit_and_invent(placed: dict[str, str]) -> None:
    placed["model.layers.7.nothing"] = placed.pop("model.layers.0.mlp.up_proj.weight")


def point_outside(placed: dict[str, str]) -> None:
    placed["model.norm.weight"] = "../model.safetensors"


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-0*"))[1].unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def stacked(folder: Path) -> None:
    shutil.rmtree(folder)
    torch.manual_seed(0)
    sizes = {**COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(folder, save_original_format=False)
    byte_tokenizer().save_pretrained(folder)


def one_nan(weights: dict[str, Any]) -> dict[str, Any]:
    weights["model.norm.weight"][3] = float("nan")
    return weights


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def linked(name: str) -> Callable[[Place], Arguments]:
    def build(place: Place) -> Arguments:
        (place.top / "elsewhere").write_text("private")
        (place.model / name).unlink(missing_ok=True)
        (place.model / name).symlink_to(place.top / "elsewhere")
        return prune(place)

    return build


def tokenizer_without_unknown(folder: Path) -> None:
    without_tokenizer(folder)
    tokenizer = Tokenizer(models.Unigram([(c, -1.0) for c in "abc "], None, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def extra_token(place: Place) -> Arguments:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra{number}>" for number in range(8)])
    tokenizer.save_pretrained(place.model)
    return text("extra.txt", "the cat <extra7> sat on the mat " * 40)(place)


def endless_expression(folder: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    change(folder / "tokenizer.json", pre_tokenizer=split)


def xs(place: Place) -> Arguments:
    endless_expression(place.model)
    return text("xs.txt", "x" * 3000)(place)


def hostile_model(place: Place) -> Arguments:
    shutil.rmtree(place.model)
    hostile(place.top)
    return prune(place)


def code_tokenizer(place: Place) -> Arguments:
    shutil.rmtree(place.model)
    hostile(place.top)
    change(place.model / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    return prune(place)


def code_type(place: Place) -> Arguments:
    shutil.rmtree(place.model)
    hostile(place.top)
    change_config(place.model, model_type="evil_type")
    return prune(place)


def parquet(place: Place) -> Arguments:
    import pyarrow
    from pyarrow import parquet

    path = place.top / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["one two three four five six", "seven eight nine ten"]}), path)
    return prune(place, calibration=path)


def output(make: Callable[[Place], Path], *, verb: str = "prune") -> Callable[[Place], Arguments]:
    """Another place for the output."""

    def build(place: Place) -> Arguments:
        path = make(place)
        if verb == "export":
            return ("export", place.gguf, "-o", path, "-q")
        return prune(place, "-o", path)

    return build


def made(path: Path, content: str | None = None) -> Path:
    """A folder, or a file with this content."""
    if content is None:
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        path.write_text(content)
    return path


def partial(place: Place) -> Path:
    made(place.top / "out.partial")
    return place.out


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def calibration(_: Place, result: dict[str, Any]) -> list[str]:
    """What the report says of the text."""
    return [f"the report's calibration is {result['calibration']['description']}"]


ODD, BAD, HOSTILE, FOLDER = "test_odd_checkpoints.py", "test_bad_input.py", "test_hostile_input.py", "test_folder.py"
PUBLIC, TEXTS, CODE, GGUF = (
    *("test_public_folders.py", "test_calibration.py", "test_code_of_the_checkpoint.py", "test_gguf_source.py"),
)
SECTIONS: dict[str, list[Case]] = {
    "Checkpoint files": [
        Case(
            given="one `model.safetensors`",
            build=lambda place: prune(place),
            happens="accepted",
            test="test_prune_tiny.py: test_fasp_is_least_squares_block_after_block",
        ),
        Case(
            given="numbered safetensors files with their index",
            build=changed(sharded),
            happens="accepted",
            test="test_prune_tiny.py: test_sharding_of_the_source_leaves_no_trace",
        ),
        Case(
            given="an index that leaves tensors of its files out, or names some that no file holds",
            build=changed(lambda folder: edit_index(folder, omit_and_invent)),
            happens="adapted",
            test=f"{ODD}: test_an_index_that_omits_and_invents",
        ),
        Case(
            given="an index that names a file outside of the folder",
            build=changed(lambda folder: edit_index(folder, point_outside)),
            happens="refused",
            test=f"{BAD}: test_index_that_points_elsewhere",
        ),
        Case(
            given="a numbered file without an index",
            build=changed(
                lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
            ),
            happens="refused",
            test=f"{ODD}: test_shards_without_an_index",
        ),
        Case(
            given="an index of which one file is missing",
            build=changed(without_a_shard),
            happens="refused",
            test=f"{BAD}: test_missing_shard",
        ),
        Case(
            given="a weight file that was not fetched to its end",
            build=changed(cut_weights),
            happens="refused",
            test=f"{BAD}: test_truncated_single_file",
        ),
        Case(
            given="pickled weights (`pytorch_model.bin`) and no others",
            build=changed(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")),
            happens="refused",
            test=f"{BAD}: test_pickled_weights_are_not_opened",
        ),
        Case(
            given="the same weights in another format too (Mistral's `consolidated.safetensors`)",
            build=likeness("Mistral-7B-Instruct-v0.3"),
            happens="adapted",
            test=f"{PUBLIC}: test_nothing_is_lost",
            keeps=("tokenizer.model", "tokenizer.model.v3"),
        ),
        Case(
            given="a folder of weights in another format (Llama's `original/`), licence and policy",
            build=likeness("Llama-3.2-1B-Instruct"),
            happens="adapted",
            test=f"{PUBLIC}: test_nothing_is_lost",
            keeps=("LICENSE.txt", "USE_POLICY.md"),
        ),
        Case(
            given="an embedding model whose head is the embedding, with the modules of sentence-transformers",
            build=likeness("Qwen3-Embedding-0.6B"),
            happens="adapted",
            test=f"{PUBLIC}: test_an_embedding_model_stays_one",
            keeps=("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"),
        ),
        Case(
            given="an embedding model, or any other, that was saved without its head",
            build=likeness("e5-mistral-7b-instruct"),
            happens="refused",
            test=f"{PUBLIC}: test_a_model_without_a_head_is_refused_by_all",
        ),
        Case(
            given="hidden files, as `.gitattributes`",
            build=with_file(".gitattributes"),
            happens="adapted",
            test=f"{FOLDER}: test_every_file_is_carried_rewritten_or_named",
        ),
        Case(
            given="what training left: optimiser, scheduler, checkpoints",
            build=with_file("checkpoint-500/optimizer.pt"),
            happens="adapted",
            test=f"{FOLDER}: test_every_file_is_carried_rewritten_or_named",
        ),
        Case(
            given="an adapter beside the weights",
            build=with_file("adapter_config.json", "{}"),
            happens="refused",
            test=f"{FOLDER}: test_an_adapter_is_never_ignored",
        ),
        Case(
            given="a tied head that is stored a second time, equal to the embedding",
            build=tensors(lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()}),
            happens="adapted",
            test=f"{ODD}: test_a_tied_head_that_is_stored_too_counts_once",
        ),
        Case(
            given="a head that differs from the embedding that the config ties it to",
            build=tensors(lambda w: {**w, "lm_head.weight": 2 * w["model.embed_tokens.weight"]}),
            happens="adapted",
            test=f"{ODD}: test_a_tied_head_that_differs_is_kept_and_untied",
        ),
        Case(
            given="a mixture of experts that transformers 5 stored stacked",
            build=lambda place: (stacked(place.model), ("inspect", place.model))[1],
            happens="adapted",
            test=f"{ODD}: test_experts_that_are_stored_stacked",
        ),
        Case(
            given="tensors under the names of torch.compile, FSDP or DataParallel",
            build=tensors(lambda w: {f"_orig_mod.{name}": tensor for name, tensor in w.items()}),
            happens="refused",
            test=f"{ODD}: test_names_that_another_program_left",
        ),
        Case(
            given="a tensor that the model has no place for",
            build=tensors(lambda w: {**w, "model.layers.0.mlp.gate_proj.scale": torch.ones(2)}),
            happens="refused",
            test=f"{BAD}: test_extra_tensors",
        ),
        Case(
            given="fewer blocks than the config says",
            build=config(num_hidden_layers=3),
            happens="refused",
            test=f"{BAD}: test_missing_tensor",
        ),
        Case(
            given="quantised weights",
            build=tensors(lambda w: {**w, "model.norm.weight": w["model.norm.weight"].to(torch.int8)}),
            happens="refused",
            test=f"{BAD}: test_quantised_tensor",
        ),
        Case(
            given="weights that are NaN or infinite",
            build=tensors(one_nan),
            happens="refused",
            test=f"{BAD}: test_nan_in_weights",
        ),
        Case(
            given="a link to a file outside of the folder",
            build=linked("NOTICE"),
            happens="adapted",
            test=f"{FOLDER}: test_links_lead_no_further_than_the_folder",
        ),
        Case(
            given="a pipe or a device in the place of a file",
            build=changed(pipe),
            happens="refused",
            test=f"{HOSTILE}: test_pipes_are_not_waited_for",
        ),
        Case(
            given="an empty folder",
            build=lambda place: ("inspect", made_empty(place.top / "empty")),
            happens="refused",
            test=f"{BAD}: test_empty_directory",
        ),
        Case(
            given="a path that is not there",
            build=lambda place: ("inspect", place.top / "nowhere"),
            happens="refused",
            test=f"{BAD}: test_model_directory_missing",
        ),
        Case(
            given="a name of the hub without a network",
            build=lambda place: ("inspect", "no-such-organisation/no-such-model"),
            happens="refused",
            test=f"{BAD}: test_hub_that_cannot_be_reached",
        ),
        Case(
            given="a README whose front matter is no YAML",
            build=with_file("README.md", "---\nlicense: [\n---\n"),
            happens="adapted",
            test=f"{HOSTILE}: test_front_matter_that_cannot_be_read",
            said=of_card,
        ),
    ],
    "Tokenizers": [
        Case(
            given="byte-level BPE as `tokenizer.json`, with `vocab.json` and `merges.txt` beside it",
            build=likeness("Qwen2.5-0.5B-Instruct"),
            happens="accepted",
            test=f"{PUBLIC}: test_nothing_is_lost",
            keeps=("tokenizer.json", "vocab.json", "merges.txt"),
        ),
        Case(
            given="SentencePiece: `tokenizer.model`, with `added_tokens.json` and a chat template",
            build=likeness("gemma-3-1b-it"),
            happens="accepted",
            test=f"{PUBLIC}: test_nothing_is_lost",
            keeps=("tokenizer.model", "added_tokens.json", "special_tokens_map.json"),
        ),
        Case(
            given="none",
            build=changed(without_tokenizer),
            happens="refused",
            test=f"{BAD}: test_tokenizer_missing",
        ),
        Case(
            given="a tokenizer whose file is a link to elsewhere",
            build=linked("merges.txt"),
            happens="refused",
            test=f"{FOLDER}: test_links_lead_no_further_than_the_folder",
        ),
        Case(
            given="a vocabulary without an unknown token, for a text with other characters",
            build=changed(tokenizer_without_unknown),
            happens="refused",
            test=f"{ODD}: test_a_tokenizer_that_cannot_encode",
        ),
        Case(
            given="a text with a token that the embedding has no row for",
            build=extra_token,
            happens="refused",
            test=f"{ODD}: test_a_token_beyond_the_embedding",
        ),
        Case(
            given="a regular expression that never ends on the text; the tokenizer's library prints a stack first",
            build=xs,
            last_line=True,
            happens="refused",
            test=f"{HOSTILE}: test_a_regular_expression_without_end",
        ),
        Case(
            given="a tokenizer that is code in the folder",
            build=code_tokenizer,
            happens="refused",
            test=f"{CODE}: test_a_tokenizer_that_is_only_code",
        ),
    ],
    "Configs": [
        Case(
            given="an `attn_implementation` whose package is not installed",
            build=config(attn_implementation="flash_attention_2"),
            happens="refused",
            test=f"{ODD}: test_settings_that_stock_code_refuses_are_found_first",
        ),
        Case(
            given="dtype `auto`",
            build=config(dtype="auto"),
            happens="adapted",
            test=f"{ODD}: test_an_automatic_dtype_is_that_of_the_weights",
        ),
        Case(
            given="an empty entry `quantization_config`",
            build=config(quantization_config={}),
            happens="adapted",
            test=f"{ODD}: test_an_empty_quantisation_is_none",
        ),
        Case(
            given="a quantisation that is left over beside merged weights",
            build=config(quantization_config={"quant_method": "gptq", "bits": 4}),
            happens="refused",
            test=f"{ODD}: test_a_quantisation_left_over_is_named",
        ),
        Case(
            given="`pad_token_id` -1, as LLaMA 1 has it",
            build=config(pad_token_id=-1),
            happens="accepted",
            test=f"{ODD}: test_negative_padding_is_no_token",
        ),
        Case(
            given="a family that is not known here",
            build=config(model_type="t5"),
            happens="refused",
            test=f"{BAD}: test_unknown_family",
        ),
        Case(
            given="an encoder, a vision or a speech model of stock transformers",
            build=config(model_type="vit", architectures=["ViTModel"]),
            happens="refused",
            test="test_prune_module.py: test_prune_names_the_command_that_works",
        ),
        Case(
            given="an image-text model: its text model is pruned",
            build=changed(wrapper),
            happens="accepted",
            test="test_wrappers.py: test_the_text_model_is_pruned_and_the_rest_stays",
            keeps=("preprocessor_config.json", "processor_config.json", "chat_template.jinja"),
        ),
        Case(
            given="an image-text model without the weights of its text model",
            build=changed(
                lambda folder: change_weights(
                    wrapper(folder), lambda w: {n: t for n, t in w.items() if "language_model" not in n}
                )
            ),
            happens="refused",
            test="test_text_views.py: test_no_weights_of_a_text_model",
        ),
        Case(
            given="a model with ears, whose text model is wrapped",
            build=changed(
                lambda folder: write(
                    folder / "config.json",
                    '{"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]}',
                )
            ),
            happens="refused",
            test=f"{ODD}: test_a_model_with_ears_says_where_its_text_model_is",
        ),
        Case(
            given="a width that is not that of the tensors",
            build=config(intermediate_size=40),
            happens="refused",
            test=f"{BAD}: test_tensor_of_another_shape",
        ),
        Case(
            given="a size of zero",
            build=config(num_attention_heads=0),
            happens="refused",
            test=f"{HOSTILE}: test_sizes_that_are_none",
        ),
        Case(
            given="a `config.json` that is no JSON",
            build=changed(lambda folder: write(folder / "config.json", "{")),
            happens="refused",
            test=f"{BAD}: test_config_that_is_no_json_object",
        ),
    ],
    "GGUF files": [
        Case(
            given="weights in 16 or 32 bits",
            build=lambda place: prune(place, model=place.gguf),
            happens="adapted",
            test=f"{GGUF}: test_a_file_is_read_as_llama_cpp_reads_it",
        ),
        Case(
            given="weights in Q8_0, or in another of ggml's types",
            build=from_gguf(quantise=gguf.GGMLQuantizationType.Q8_0),
            happens="adapted",
            test=f"{GGUF}: test_a_file_is_read_as_llama_cpp_reads_it",
        ),
        Case(
            given="an architecture that is not known here",
            build=lambda place: (plain_gguf(place.top / "a.gguf", "gptj"), ("inspect", place.top / "a.gguf"))[1],
            happens="refused",
            test=f"{BAD}: test_gguf_of_another_architecture",
        ),
        Case(
            given="a key of the architecture that nothing here reads",
            build=from_gguf(keys={"qwen2.attention.new_scale": 0.5}),
            happens="refused",
            test=f"{GGUF}: test_a_key_without_a_reader_ends_the_run",
        ),
        Case(
            given="a tensor that nothing here reads",
            build=from_gguf(change=lambda found: found.update({"blk.0.new.weight": found["output_norm.weight"]})),
            happens="refused",
            test=f"{GGUF}: test_a_tensor_without_a_reader_ends_every_verb",
        ),
        Case(
            given="a pre-tokenizer (`tokenizer.ggml.pre`) that is not known here",
            build=from_gguf(keys={"tokenizer.ggml.pre": "brand-new"}),
            happens="refused",
            test="test_gguf_tokenizer.py: test_tokenizers_that_cannot_be_read",
        ),
        Case(
            given="no sizes in the metadata",
            build=lambda place: (plain_gguf(place.top / "a.gguf", "llama"), ("inspect", place.top / "a.gguf"))[1],
            happens="refused",
            test=f"{BAD}: test_gguf_without_its_metadata",
        ),
        Case(
            given="a file that was not fetched to its end",
            build=lambda place: (
                (place.top / "a.gguf").write_bytes(place.gguf.read_bytes()[:200]),
                ("inspect", place.top / "a.gguf"),
            )[1],
            happens="refused",
            test=f"{BAD}: test_truncated_gguf",
        ),
    ],
    "Calibration files": [
        Case(
            given="plain text in UTF-8",
            build=lambda place: prune(place),
            happens="accepted",
            test=f"{TEXTS}: test_read_text",
        ),
        *(
            Case(
                given=given,
                build=text(name, FORMS[name]),
                happens="accepted",
                test=f"{TEXTS}: test_files_as_other_tools_write_them",
            )
            for given, name in {
                "plain text in UTF-16 with a mark": "wide.txt",
                "JSON, a row with a `text` per line": "lines.jsonl",
                "JSON, one array of rows or of texts": "array.json",
                "CSV or TSV with a column `text`": "rows.csv",
                "any of these, compressed by gzip": "lines.jsonl.gz",
            }.items()
        ),
        Case(given="parquet with a column `text`", build=parquet, happens="accepted", test=f"{TEXTS}: test_parquet"),
        Case(
            given="rows with the text in another field, given as FILE#FIELD",
            build=text("rows.jsonl", json_lines("body"), field_name="#body"),
            happens="accepted",
            test=f"{TEXTS}: test_another_field",
        ),
        Case(
            given="the same, given as FILE",
            build=text("rows.jsonl", json_lines("body")),
            happens="refused",
            test=f"{TEXTS}: test_another_field",
        ),
        Case(
            given="chats, for a model without a chat template",
            build=text("chats.jsonl", "\n".join([json.dumps(CHATS["messages"])] * 3)),
            happens="adapted",
            test=f"{TEXTS}: test_chats_go_through_the_template",
            said=calibration,
        ),
        Case(
            given="rows in a file of another name",
            build=text("rows.txt", json_lines("text")),
            happens="adapted",
            test=f"{TEXTS}: test_odd_forms",
            said=calibration,
        ),
        Case(
            given="rows whose text is null beside others",
            build=text("rows.jsonl", json_lines("text") + '\n{"text": null}\n'),
            happens="adapted",
            test=f"{TEXTS}: test_odd_forms",
            said=calibration,
        ),
        Case(
            given="UTF-16 without a mark",
            build=text("wide.txt", ("words " * 50).encode("utf-16-le")),
            happens="refused",
            test=f"{TEXTS}: test_forms_that_are_refused",
        ),
        Case(
            given="a CSV file with a quote that never ends",
            build=text("rows.csv", 'text\nwords\n"more words\n'),
            happens="refused",
            test=f"{TEXTS}: test_forms_that_are_refused",
        ),
        Case(
            given="a prompt with its completion per row",
            build=text("rows.jsonl", json.dumps({"prompt": "1 + 1 =", "completion": " 2, or so they say"})),
            happens="accepted",
            test=f"{TEXTS}: test_prompts_and_completions",
        ),
        Case(
            given="a line that is no JSON",
            build=text("rows.jsonl", '{"text": "a"}\n{"text"\n'),
            happens="refused",
            test=f"{TEXTS}: test_jsonl_line_that_is_not_json",
        ),
        Case(
            given="text in another encoding",
            build=text("latin.txt", b"caf\xe9 " * 50),
            happens="refused",
            test=f"{TEXTS}: test_text_file_errors",
        ),
        Case(
            given="a text that is shorter than one window",
            build=text("short.txt", "short"),
            happens="refused",
            test=f"{BAD}: test_text_shorter_than_one_window",
        ),
        Case(
            given="a folder",
            build=lambda place: prune(place, calibration=made(place.top / "texts")),
            happens="refused",
            test=f"{BAD}: test_text_is_a_directory",
        ),
        Case(
            given="a name that is neither a source nor a file",
            build=lambda place: prune(place, calibration="wikitext"),
            happens="refused",
            test=f"{BAD}: test_unknown_calibration",
        ),
        Case(
            given="a file without an end",
            build=lambda place: prune(place, calibration="/dev/zero"),
            happens="refused",
            test=f"{HOSTILE}: test_files_without_an_end",
        ),
    ],
    "Output places": [
        Case(
            given="a folder that is not there yet, its parents neither",
            build=output(lambda place: place.top / "new" / "deeper"),
            happens="accepted",
            test=f"{BAD}: test_no_parent_directory_stays_behind",
        ),
        Case(
            given="a folder that is there",
            build=output(lambda place: made(place.out)),
            happens="refused",
            test=f"{BAD}: test_output_exists",
        ),
        Case(
            given="a place beside somebody's folder `OUT.partial`",
            build=output(partial),
            happens="refused",
            test=f"{BAD}: test_working_directory_of_somebody_else",
        ),
        Case(
            given="a place below a file",
            build=output(lambda place: made(place.top / "file", "mine") / "out"),
            happens="refused",
            test=f"{BAD}: test_output_below_a_file",
        ),
        Case(
            given="a name that is too long for a file system",
            build=output(lambda place: place.top / ("a" * 250)),
            happens="refused",
            test=f"{HOSTILE}: test_names_that_are_too_long",
        ),
        Case(
            given="a name that is no text",
            build=output(lambda place: Path(os.fsdecode(bytes(place.top / "bad") + b"\xff"))),
            happens="refused",
            test=f"{HOSTILE}: test_names_that_are_no_text",
        ),
        Case(
            given="a place where nothing can be made",
            build=output(lambda place: Path("/proc/nowhere/out")),
            happens="refused",
            test=f"{HOSTILE}: test_places_that_cannot_be_made",
        ),
        Case(
            given="an exported file that is there",
            build=output(lambda place: made(place.top / "a.gguf", "mine"), verb="export"),
            happens="refused",
            test="test_gguf.py: test_an_output_in_the_way_is_refused",
        ),
    ],
    "Code": [
        Case(
            given="modelling files, and a config that names them (`auto_map`), for a family that is known here",
            build=hostile_model,
            happens="adapted",
            test=f"{CODE}: test_nothing_runs_and_the_output_names_no_code",
        ),
        Case(
            given="a type of model that only such code knows",
            build=code_type,
            happens="refused",
            test=f"{CODE}: test_a_type_that_only_code_knows_is_refused",
        ),
        Case(
            given="kernels of another repository (`attn_implementation`)",
            build=config(attn_implementation="someone/kernel"),
            happens="refused",
            test=f"{CODE}: test_kernels_of_other_repositories",
        ),
    ],
}


def made_empty(path: Path) -> Path:
    path.mkdir()
    return path


CASES = [pytest.param(case, id=case.given) for cases in SECTIONS.values() for case in cases]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2, exported in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    export(LIKENESSES["Qwen2.5-0.5B-Instruct"].build(folder / "model"), folder / "a.gguf", dtype="float32")
    return folder / "a.gguf"


@pytest.fixture
def place(tiny_llama: Path, text_file: Path, gguf_file: Path, tmp_path: Path) -> Place:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return Place(top=tmp_path, text=text_file, gguf=gguf_file)


def quoted(message: str) -> str:
    """A message as code, whatever marks it holds, the middle of a long one left out; a bar would end the cell."""
    if len(message) > 500:
        message = f"{message[:250]} [...] {message[-150:]}"
    mark = "``" if "`" in message else "`"
    return f"{mark}{message.replace('|', '/')}{mark}"


ROWS: dict[str, str] = {}
"""Input -> its row, of the cases that have run."""


def row(case: Case, said: str) -> str:
    what = {
        "accepted": "accepted as it is",
        "adapted": f"adapted: {quoted(said)}",
        "refused": f"refused, exit code 2: {quoted(said)}",
    }[case.happens]
    return f"| {case.given} | {what} | `{case.test}` |"


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_what_happens(case: Case, place: Place, command_line: CommandLine) -> None:
    arguments = case.build(place)
    before = sorted(place.top.rglob("*"))
    code, out, error = command_line(*arguments, "--json")
    assert "Traceback" not in error
    if case.happens == "refused":
        assert (code, sorted(place.top.rglob("*"))) == (2, before), error
        # As data on standard output, as one line elsewhere.
        _, _, error = command_line(*arguments)
        lines = error.splitlines()
        assert len(lines) == 1 or case.last_line, error
        said = place.shown(lines[-1].removeprefix("structprune: "))
    else:
        assert code == 0, error
        found = case.said(place, json.loads(out))
        assert bool(found) == (case.happens == "adapted"), found
        said = place.shown("; ".join(found))
        for name in case.keeps:
            assert (place.out / name).read_bytes() == (place.model / name).read_bytes()
    ROWS[case.given] = row(case, said)
    if os.environ.get("STRUCTPRUNE_REWRITE") != "1":
        assert ROWS[case.given] in PAGE.read_text(encoding="utf-8").splitlines(), "see the head of this file"


def test_the_page_has_these_rows_and_no_others() -> None:
    """In this order; the last test of the file, so that all rows are there when they are written."""
    page = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- made by tests/e2e/test_inputs_table.py -->", "<!-- end -->"
    before, _, rest = page.partition(start)
    found, _, after = rest.partition(end)
    if os.environ.get("STRUCTPRUNE_REWRITE") == "1":
        tables = [
            "\n".join(
                [f"## {title}", "", "| input | what happens | test |", "|---|---|---|"]
                + [ROWS[case.given] for case in cases]
            )
            for title, cases in SECTIONS.items()
        ]
        made_of_rows = "\n\n".join(tables)
        PAGE.write_text(f"{before}{start}\n\n{made_of_rows}\n\n{end}{after}", encoding="utf-8")
        return
    inputs = [line.split(" | ")[0].removeprefix("| ") for line in found.splitlines() if line.startswith("| ")]
    wanted = [given for cases in SECTIONS.values() for given in ("input", *(case.given for case in cases))]
    assert inputs == wanted
    assert re.findall(r"^## (.*)$", found, flags=re.MULTILINE) == list(SECTIONS)
    assert len(CASES) >= 40
