"""`--bos`: windows begin with the model's start token where its tokenizer puts one there, in every measurement."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import SIZES, stock_checkpoint
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from structprune import Recipe, prune
from structprune.api import export, plan
from structprune.architectures.sources.gguf import open_gguf
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.assess import EvaluationRequest, evaluate_all
from structprune.calibration.context import CalibrationWindows, SourceContext, WindowStart, behind_start
from structprune.errors import CheckpointError, InputError
from structprune.results.summary import summary_rows
from support.command_line import CommandLine
from support.gguf_files import copy_gguf
from support.models import byte_tokenizer, save_tiny

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

START = 0
TEMPLATES = {
    "start": (["<s>", "$A"], (START,)),
    "end": (["$A", "<s>"], ()),
    "both": (["<s>", "$A", "<s>"], (START,)),
    "two": (["<s>", "!", "$A"], (START, 1)),
    "none": (["$A"], ()),
}


def with_template(directory: Path, name: str, **changes: Any) -> Path:
    """`directory` with a tokenizer that puts these tokens around a text."""
    tokenizer: Any = byte_tokenizer()
    pieces, _ = TEMPLATES[name]
    special = [(token, int(tokenizer.convert_tokens_to_ids(token))) for token in ("<s>", "!")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)
    for entry, value in changes.items():
        setattr(tokenizer, entry, value)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """A Gemma whose tokenizer puts a start token in front of every text."""
    return with_template(save_tiny("gemma3_text", tmp_path / "gemma"), "start")


def text_ids(source: Path, text_file: Path) -> Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    return torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"])


def windows(ids: Tensor, seq_len: int, start: tuple[int, ...]) -> Tensor:
    """Windows (N, S) by hand: the start, then the next tokens of the text."""
    step = seq_len - len(start)
    rows = [[*start, *ids[first : first + step].tolist()] for first in range(0, len(ids) - step + 1, step)]
    return torch.tensor(rows)


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "fasp", "num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 8}
    return Recipe.build(**{**settings, "calibration": str(text_file), **changes})


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_what_the_tokenizer_puts_there(name: str, tmp_path: Path) -> None:
    source = with_template(save_tiny("llama", tmp_path / "source"), name)
    encoder = TextEncoder(source, 260)
    assert encoder.start_ids("auto") == TEMPLATES[name][1]
    assert encoder.start_ids("no") == ()
    assert encoder.start_ids("yes") == (TEMPLATES[name][1] or (START,))


@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
@pytest.mark.parametrize("name", ["start", "none"])
def test_calibration_windows(bos: str, name: str, text_file: Path, tmp_path: Path) -> None:
    source = with_template(save_tiny("llama", tmp_path / "source"), name)
    report = prune(source, recipe(text_file, bos=bos, num_samples=10_000, held_out=0), tmp_path / "out")
    begins = bos == "yes" or (bos == "auto" and name == "start")
    expected = windows(text_ids(source, text_file), 32, (START,) if begins else ())
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    wanted = expected[order].contiguous()
    assert report.calibration.seq_len == wanted.shape[1] == 32
    assert report.calibration.fingerprint == hashlib.sha256(wanted.numpy().tobytes()).hexdigest()
    assert report.calibration.start == ("<s>" if begins else "")
    said = dict(summary_rows(report))["calibration"]
    assert said.endswith("each behind the start token <s>" if begins else "without a start token")
    assert report.recipe.bos == bos


@torch.no_grad()
def stock_perplexity(source: Path, windows_NS: Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    logits = model(input_ids=windows_NS).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows_NS[:, 1:].flatten()).exp())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("bos", ["auto", "no"])
def test_perplexity_of_a_model_that_wants_it(bos: Any, stream: bool, gemma: Path, text_file: Path) -> None:
    start = (START,) if bos == "auto" else ()
    expected = windows(text_ids(gemma, text_file), 40, start)[:6]
    request = EvaluationRequest(
        texts=[text_file], seq_len=40, max_windows=6, bos=bos, stream=stream, device="cpu", dtype="float32"
    )
    (found,) = evaluate_all(gemma, request).texts
    assert found.perplexity == pytest.approx(stock_perplexity(gemma, expected), rel=1e-5)
    assert (found.num_windows, found.num_predicted_tokens) == (6, 6 * 39)
    assert found.start == ("<s>" if start else "")


def test_the_perplexities_of_a_run_are_over_the_same_windows(gemma: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(gemma, recipe(text_file, sparsity=0.0), tmp_path / "out")
    expected = windows(text_ids(gemma, text_file), 32, (START,))
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))[:4]
    assert report.calibration.perplexity_windows == 4
    assert report.calibration.dense_perplexity == pytest.approx(stock_perplexity(gemma, expected[order]), rel=1e-5)


@pytest.mark.parametrize("added", [True, False, None])
def test_a_gguf_file_says_it_itself(added: bool | None, text_file: Path, tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "source")
    export(source, tmp_path / "model.gguf", dtype="float32")
    path = copy_gguf(tmp_path / "model.gguf", tmp_path / "said.gguf", keys={"tokenizer.ggml.add_bos_token": added})
    reader = open_gguf(path)
    bos = reader.config["bos_token_id"]
    assert TextEncoder(reader.directory).start_ids("auto") == ((bos,) if added else ())
    report = prune(path, recipe(text_file, multiple_of=32), tmp_path / "out")
    assert bool(report.calibration.start) == bool(added)


def test_text_that_the_model_samples_itself(gemma: Path, tmp_path: Path) -> None:
    report = prune(gemma, recipe(Path("self"), num_samples=3), tmp_path / "out")
    assert report.calibration.start == "<s>"
    assert report.calibration.seq_len == 32


def test_a_text_that_begins_with_it_itself_has_it_once(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    source = with_template(save_tiny("llama", tmp_path / "source"), "start", chat_template=template)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 62}]}) + "\n")
    report = prune(source, recipe(chats, num_samples=9, held_out=0), tmp_path / "out")
    wanted = torch.full((2, 32), int(text_ids_of(source, "x")))
    wanted[:, 0] = START
    assert report.calibration.fingerprint == hashlib.sha256(wanted.numpy().tobytes()).hexdigest()


def text_ids_of(source: Path, text: str) -> int:
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return token


def test_a_tokenizer_without_one(text_file: Path, tmp_path: Path) -> None:
    source = with_template(save_tiny("llama", tmp_path / "source"), "none", bos_token=None)
    for call in (
        lambda: prune(source, recipe(text_file, bos="yes"), tmp_path / "out"),
        lambda: plan(source, recipe(text_file, bos="yes")),
        lambda: evaluate_all(source, EvaluationRequest(texts=[text_file], bos="yes")),
    ):
        with pytest.raises(InputError, match="the tokenizer has no start token"):
            call()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_start_token_beyond_the_embedding(text_file: Path, tmp_path: Path) -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<far>", "additional_special_tokens": ["<a>", "<b>", "<c>", "<d>"]})
    source = save_tiny("llama", tmp_path / "source")
    far = int(tokenizer.convert_tokens_to_ids("<d>"))
    assert far >= 260
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["<d>", "$A"], special_tokens=[("<d>", far)]
    )
    tokenizer.save_pretrained(source)
    with pytest.raises(CheckpointError, match=f"no row for; got token {far}"):
        prune(source, recipe(text_file), tmp_path / "out")


@pytest.mark.parametrize(("text", "wanted"), [("yes", "yes"), ("no", "no"), ("auto", "auto"), ("'no'", "no")])
def test_what_yaml_makes_of_yes_and_no(text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: fasp\nbos: {text}\n")
    assert Recipe.from_yaml(path).bos == wanted
    assert Recipe.merged_values(path, {})["method"] == "fasp"


def test_the_command_line(gemma: Path, text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    code, out, _ = command_line("plan", gemma, "--method", "fasp", "--seq-len", 32, "--multiple-of", 8)
    assert code == 0
    assert any("windows" in line and "start token <s>" in line for line in out.splitlines())
    code, out, _ = command_line("plan", gemma, "--method", "fasp", "--multiple-of", 8, "--bos", "no", "--json")
    assert (code, json.loads(out)["start_token"]) == (0, "")
    flags = ["--text", text_file, "--seq-len", 40, "--max-windows", 2, "--dtype", "float32"]
    code, out, _ = command_line("eval", gemma, *flags)
    assert code == 0
    assert "2 windows, each behind the start token <s>" in out
    code, out, _ = command_line("eval", gemma, *flags, "--bos", "no", "--json")
    assert (code, json.loads(out)["texts"][0]["start"]) == (0, "")
    code, _, error = command_line("eval", gemma, *flags, "--bos", "perhaps")
    assert (code, "--bos is not usable" in error) == (2, True)


def test_a_window_must_have_room_for_the_text(gemma: Path, text_file: Path) -> None:
    with_template(gemma, "two")
    request = EvaluationRequest(texts=[text_file], seq_len=2, device="cpu")
    with pytest.raises(InputError, match="no room beside its start token"):
        evaluate_all(gemma, request)


def test_held_out_windows_begin_with_it_too() -> None:
    """A source draws both behind the start, in windows that have room for it."""
    start = WindowStart(ids=(7,), text="<s>")
    asked: list[SourceContext] = []

    def draw(inner: SourceContext) -> CalibrationWindows:
        asked.append(inner)
        ids_NS = torch.arange(inner.seq_len * (inner.num_samples + inner.num_held_out)).reshape(-1, inner.seq_len)
        held_out_NS = ids_NS[inner.num_samples :]
        return CalibrationWindows(ids_NS=ids_NS[: inner.num_samples], held_out_NS=held_out_NS, description="numbers")

    context = SourceContext(
        encode=lambda text: torch.tensor([len(text)]),
        sample=lambda *_: torch.zeros(0),
        num_samples=2,
        num_held_out=1,
        seq_len=4,
        seed=0,
        start=start,
    )
    found = behind_start(draw, context)
    assert asked[0].seq_len == 3
    assert found.ids_NS.tolist() == [[7, 0, 1, 2], [7, 3, 4, 5]]
    assert found.held_out_NS is not None
    assert found.held_out_NS.tolist() == [[7, 6, 7, 8]]
    assert found.with_held_out(1, 1) is found
