"""A small ResNet, trained here on a part of CIFAR-10: accuracy before and after, without any training behind.

The network is trained once and kept beside the results. Calibrated on training pictures, tested on test pictures.

    python benchmarks/modules/resnet.py --data DATA -o out/resnet.jsonl
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from common import arguments, bisected, judged, macs, seeded, try_ours, write
from PIL import Image
from torch import Tensor, nn

from structprune import ModuleRecipe

TRAINED, EPOCHS, BATCH = 6_000, 5, 64
TESTED, EXAMPLES = 1_024, 8
WIDTH, BLOCKS = 16, 1


class Block(nn.Module):
    """Two convolutions and a sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network of CIFAR-10 (arXiv 1512.03385, section 4.2): three stages, each twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH] * (BLOCKS + 1) + [2 * WIDTH] * BLOCKS + [4 * WIDTH] * BLOCKS
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def pictures(file: Path, labels: Path, count: int) -> tuple[Tensor, Tensor]:
    """Read pictures, (count, 3, 32, 32) of mean 0, and their classes: a row of the file is a picture."""
    Image.MAX_IMAGE_PIXELS = None
    pixels = numpy.asarray(Image.open(file).convert("RGB"))[:count].reshape(count, 32, 32, 3)
    values = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    return (values - 0.48) / 0.25, torch.tensor(json.loads(labels.read_text())[:count])


def train(model: nn.Module, given: Tensor, classes: Tensor, epochs: int, rate: float) -> None:
    """Train by gradient descent, on pictures that are shifted and mirrored."""
    steps = epochs * (len(given) // BATCH)
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    model.train()
    loss = torch.zeros(())
    for epoch in range(epochs):
        start = time.perf_counter()
        for chosen in torch.randperm(len(given))[: len(given) // BATCH * BATCH].split(BATCH):
            shifts = torch.randint(0, 9, (2,)).tolist()
            batch = F.pad(given[chosen], (4, 4, 4, 4))[..., shifts[0] : shifts[0] + 32, shifts[1] : shifts[1] + 32]
            batch = torch.where(torch.rand(len(chosen), 1, 1, 1) < 0.5, batch.flip(-1), batch)
            optimiser.zero_grad()
            loss = F.cross_entropy(model(batch), classes[chosen])
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch}: loss {float(loss.detach()):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()


def main() -> None:
    options = arguments("a ResNet of CIFAR-10")
    seeded()
    folder = options.data / "cifar/package"
    given, classes = pictures(folder / "data_batch_1.png", folder / "train_lables.json", TRAINED)
    tested, wanted_classes = pictures(folder / "test_batch.png", folder / "test_lables.json", TESTED)
    model = ResNet()
    weights = options.output.with_suffix(".pt")
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, given, classes, EPOCHS, 0.2)
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
    model.eval()
    examples = list(given[: EXAMPLES * BATCH].split(BATCH))

    def loss(module: nn.Module) -> Iterator[Tensor]:
        for example, right in zip(examples, classes.split(BATCH), strict=False):
            yield F.cross_entropy(module(example), right)

    def measure(module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            guessed = torch.cat([module(part).argmax(1) for part in tested.split(BATCH) if len(part) == BATCH])
        return {"accuracy": float((guessed == wanted_classes[: len(guessed)]).double().mean())}

    write(options.output, way="dense", sparsity=0.0, **judged(model, examples[0], measure))
    for sparsity in options.sparsities:
        recipes = {
            f"{importance}, {ranking}{', repaired' if repair else ''}": ModuleRecipe(
                sparsity=sparsity, cost="macs", importance=importance, ranking=ranking, repair=repair
            )
            for importance in ("magnitude", "taylor")
            for ranking in ("local", "global")
            for repair in (False, True)
        }
        recipes["taylor, pattern, repaired"] = ModuleRecipe(
            sparsity=sparsity, cost="macs", importance="taylor", ranking="pattern"
        )
        recipes["hessian, global, repaired"] = ModuleRecipe(
            sparsity=sparsity, cost="macs", importance="hessian", ranking="global"
        )
        recipes["taylor, global, repaired, 4 steps"] = ModuleRecipe(
            sparsity=sparsity, cost="macs", importance="taylor", ranking="global", steps=4
        )
        try_ours(model, examples, recipes, measure, options.output, loss, options.only)
        for importance in ("magnitude", "taylor"):
            for everywhere in (False, True):
                name = f"torch-pruning, {importance}, {'global' if everywhere else 'local'}"
                if options.only and name not in options.only:
                    continue
                pruned = bisected(
                    lambda ratio, i=importance, e=everywhere: peer(model, examples[0], loss, i, e, ratio),
                    examples[0],
                    (1 - sparsity) * macs(model, examples[0]),
                )
                write(options.output, way=name, sparsity=sparsity, **judged(pruned, examples[0], measure))


def peer(model: ResNet, example: Tensor, loss: Any, importance: str, everywhere: bool, ratio: float) -> nn.Module:
    """Prune channels by torch-pruning."""
    import torch_pruning as tp

    pruned: Any = copy.deepcopy(model)
    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    pruner = tp.pruner.BasePruner(
        pruned,
        example,
        importance=kinds[importance](),
        pruning_ratio=ratio,
        global_pruning=everywhere,
        max_pruning_ratio=0.9,
        ignored_layers=[pruned.head],
    )
    if importance == "taylor":
        pruned.zero_grad()
        for each in loss(pruned):
            each.backward()
    pruner.step()
    return pruned.eval()


if __name__ == "__main__":
    main()
