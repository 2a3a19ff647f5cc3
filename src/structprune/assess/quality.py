"""Perplexity and zero-shot tasks of a finished model, and what it says to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.config import max_positions
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import WindowStart
from structprune.calibration.select import held_out_text
from structprune.engine.run.calibration import renderer, window_start
from structprune.engine.run.device import resolve_device, resolve_dtype
from structprune.engine.streaming.evaluate import TextWindows, evaluate_streamed, plan_evaluation
from structprune.errors import InputError
from structprune.evaluation.generation import generate_text
from structprune.evaluation.perplexity import PerplexityResult, make_reference, perplexity, text_bytes, text_windows
from structprune.evaluation.zero_shot import TaskRunner
from structprune.kinds import StartToken
from structprune.memory import PeakMeter, bound_hidden_memory, parse_bytes
from structprune.observer import Observer, SilentObserver
from structprune.recipe import Recipe
from structprune.results.measured import Evaluation, TaskResult, TextResult
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What to measure on a model, beside its name."""

    texts: Sequence[str | Path] = ()
    """Text or jsonl files, or the names of held-out passages, boolq and sciq."""
    merge_adapter: str = NO_ADAPTER
    """Folder of a LoRA adapter that is merged into the model, or `beside`."""
    against: str | Path | None = None
    """Another model, of the same vocabulary: how far are the predictions from its?"""
    seq_len: int = 2048
    """Tokens per window; stride the same."""
    max_windows: int | None = None
    """Only the first so many windows of each text."""
    bos: StartToken = "auto"
    """Whether every window begins with the model's start token, as `--bos` of `prune`."""
    tasks: Sequence[str] = ()
    """Zero-shot tasks by lm-eval's names."""
    tasks_dir: str | Path | None = None
    """Local task files; without `tasks`, all of them."""
    task_limit: int | None = None
    batch_size: int = 8
    """Batch size of the tasks' requests."""
    stream: bool = False
    """One block in memory at a time."""
    tokens: KeptTokens = ALL_TOKENS
    """Tokens of the vocabulary that stay, of a streamed model: rows of the others are not read."""
    memory: str | int | None = None
    """Bytes that a streamed evaluation may add."""
    device: str = "auto"
    dtype: str = "auto"

    @property
    def wants_tasks(self) -> bool:
        return bool(self.tasks) or self.tasks_dir is not None

    def check(self) -> None:
        """Raise InputError for what cannot be meant."""
        if not self.texts and not self.wants_tasks:
            raise InputError("there is nothing to evaluate on", do="give --text, --tasks or --tasks-dir")
        if self.against is not None and not self.texts:
            raise InputError("--against compares predictions on texts", do="give --text too")
        if self.memory is not None and not self.stream:
            raise InputError("--memory bounds a streamed evaluation only", do="add --stream")
        if self.tokens and not self.stream:
            raise InputError("a model of which some tokens stay is measured block by block", do="set stream")
        if self.stream and self.wants_tasks:
            raise InputError("tasks need the whole model in memory", got="--stream", do="run them without --stream")
        if self.task_limit is not None and not self.wants_tasks:
            raise InputError("--limit is about tasks", do="give --tasks or --tasks-dir, or use --max-windows")


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    stream: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> TextResult:
    """Measure the perplexity of `model` on `text`, a file or a name; `evaluate_all` takes every setting."""
    request = EvaluationRequest(
        texts=[text],
        against=against,
        seq_len=seq_len,
        max_windows=max_windows,
        stream=stream,
        device=device,
        dtype=dtype,
    )
    return evaluate_all(model, request).texts[0]


def evaluate_all(model: str | Path, request: EvaluationRequest, observer: Observer | None = None) -> Evaluation:
    """Measure all that `request` asks of `model`, loaded by stock transformers or streamed. Raises StructPruneError."""
    bound_hidden_memory()
    request.check()
    recipe = Recipe.build(device=request.device, dtype=request.dtype, seq_len=request.seq_len, bos=request.bos)
    memory = None if request.memory is None else parse_bytes(request.memory)
    observer = observer or SilentObserver()
    render = renderer(open_model(str(model), adapter=request.merge_adapter))
    texts = [
        (str(path), held_out_text(path, render, partial(_note_text, observer, str(path)))) for path in request.texts
    ]
    tasks_dir = None if request.tasks_dir is None else Path(request.tasks_dir)
    runner = TaskRunner(request.tasks, tasks_dir) if request.wants_tasks else None
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe, device)
    planned: int | None = None
    tasks: list[TaskResult] = []
    models = _stock_models(model, request) if request.stream else []
    with PeakMeter() as meter:
        if request.stream:
            results, planned = _streamed(models, request, texts, memory, device, dtype, observer)
        else:
            loaded, encoder = load_with_tokenizer(model, device, dtype, request.merge_adapter)
            results = _in_memory(loaded, encoder, request, texts, device, dtype)
            if runner is not None:
                scores = runner.run(
                    loaded,
                    encoder.tokenizer,
                    limit=request.task_limit,
                    batch_size=request.batch_size,
                    starts=_tasks_start(encoder, request.bos),
                )
                tasks = [TaskResult(**asdict(score)) for score in scores]
    return Evaluation(
        model=str(model),
        against=None if request.against is None else str(request.against),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        streamed=request.stream,
        planned_peak_bytes=planned,
        measured_peak_bytes=meter.peak_bytes,
        texts=[TextResult(**result.to_dict()) for result in results],
        tasks=tasks,
        task_limit=request.task_limit,
    )


def _in_memory(
    loaded: Any,
    encoder: TextEncoder,
    request: EvaluationRequest,
    texts: Sequence[tuple[str, str]],
    device: torch.device,
    dtype: torch.dtype,
) -> list[PerplexityResult]:
    limit = max_positions(loaded.config)
    start = window_start(encoder, request.bos)
    windows = [_windows(limit, encoder, request, start, name, content) for name, content in texts]
    other: Any = None
    if request.against is not None:
        other, _ = load_with_tokenizer(request.against, device, dtype)
        _check_same_vocabulary(loaded.config.vocab_size, other.config.vocab_size)
    found = [
        perplexity(
            loaded, text.ids_NS, text.name, reference=None if other is None else make_reference(other, text.ids_NS)
        )
        for text in windows
    ]
    return [
        replace(result.over_text(text_bytes(encoder, text.ids_NS)), start=start.text)
        for result, text in zip(found, windows, strict=True)
    ]


def _stock_models(model: str | Path, request: EvaluationRequest) -> list[StockModel]:
    """Open the reference first, if there is one, then the model. Raises StructPruneError if they cannot be streamed."""
    readers = [] if request.against is None else [open_model(str(request.against))]
    readers.append(open_model(str(model), adapter=request.merge_adapter, tokens=request.tokens))
    models = [StockModel(reader) for reader in readers]
    _check_same_vocabulary(models[-1].layout.vocab_size, models[0].layout.vocab_size)
    return models


def _streamed(
    models: Sequence[StockModel],
    request: EvaluationRequest,
    texts: Sequence[tuple[str, str]],
    memory: int | None,
    device: torch.device,
    dtype: torch.dtype,
    observer: Observer,
) -> tuple[list[PerplexityResult], int]:
    """Evaluate the models one block at a time; return the results and the planned peak."""
    limit = min(stock.layout.max_positions for stock in models)
    encoder = TextEncoder(models[-1].reader.directory, models[-1].layout.vocab_size, models[-1].tokenizer_config)
    start = window_start(encoder, request.bos)
    windows = [_windows(limit, encoder, request, start, name, content) for name, content in texts]
    sizes = [text_bytes(encoder, text.ids_NS) for text in windows]
    del encoder
    num_windows = sum(len(text.ids_NS) for text in windows)
    plan = plan_evaluation(models, num_windows, request.seq_len, dtype, memory)
    results = evaluate_streamed(models, windows, plan, device=device, dtype=dtype, observer=observer)
    found = [replace(result.over_text(size), start=start.text) for result, size in zip(results, sizes, strict=True)]
    return found, plan.peak_bytes


def _note_text(observer: Observer, name: str, note: str) -> None:
    observer.note(f"{name}: {note}")


def _tasks_start(encoder: TextEncoder, bos: StartToken) -> bool:
    """Whether prompts of tasks begin with the start token. Raises InputError for one that the tokenizer does not add.

    lm-eval leaves that to the tokenizer.
    """
    if bos == "yes" and not encoder.start_ids("auto"):
        raise InputError(
            "tasks are encoded by the tokenizer, which adds no start token", got="--bos yes", wanted="--bos auto or no"
        )
    return bool(encoder.start_ids(bos))


def _windows(
    limit: int, encoder: TextEncoder, request: EvaluationRequest, start: WindowStart, name: str, content: str
) -> TextWindows:
    ids_NS = text_windows(limit, encoder, content, name, request.seq_len, request.max_windows, start)
    return TextWindows(name=name, ids_NS=ids_NS)


def _check_same_vocabulary(vocab_size: int, other: int) -> None:
    if vocab_size != other:
        raise InputError(
            "the two models have different vocabularies",
            got=f"{vocab_size} and {other} tokens",
            wanted="a pruned model and the one it came from, with as many",
            do="evaluate each by itself, and compare their bits per byte",
        )


def load_with_tokenizer(
    model: str | Path, device: torch.device, dtype: torch.dtype, adapter: str = NO_ADAPTER
) -> tuple[Any, TextEncoder]:
    """Load the stock model in evaluation mode, `adapter` merged, and its tokenizer. Raises StructPruneError."""
    # Headers first: a damaged checkpoint gets a clear error instead of the stock loader's.
    reader = open_model(str(model), adapter=adapter)
    loaded = load_model(reader, device, dtype)
    return loaded, TextEncoder(reader.directory, loaded.get_input_embeddings().num_embeddings, loaded.config)


def generate(
    model: str | Path, prompt: str, *, max_new_tokens: int = 32, device: str = "auto", dtype: str = "auto"
) -> str:
    """Answer `prompt` with `model`: greedily, in its chat template where it has one. Raises StructPruneError."""
    recipe = Recipe.build(device=device, dtype=dtype)
    target = resolve_device(recipe.device)
    loaded, encoder = load_with_tokenizer(model, target, resolve_dtype(recipe, target))
    return generate_text(loaded, encoder, prompt, max_new_tokens)
