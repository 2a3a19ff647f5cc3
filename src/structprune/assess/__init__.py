"""The library's entry points for finished models: perplexity, zero-shot tasks, speed.

Read first: `quality.py`; then `speed.py`.
"""

from structprune.assess.columns import side_by_side
from structprune.assess.latency import record_time, time_widths
from structprune.assess.quality import EvaluationRequest, evaluate, evaluate_all, generate, load_with_tokenizer
from structprune.assess.speed import SpeedRequest, bench
from structprune.assess.vocabulary import VocabularyRequest, choose_vocabulary

__all__ = [
    "EvaluationRequest",
    "SpeedRequest",
    "VocabularyRequest",
    "bench",
    "choose_vocabulary",
    "evaluate",
    "evaluate_all",
    "generate",
    "load_with_tokenizer",
    "record_time",
    "side_by_side",
    "time_widths",
]
