"""A streamed step is a step on the whole model: gradients, the optimiser, the loss, the order of windows, the shares.

Shape suffixes: B windows, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from structprune.architectures.stock.model import StockModel
from structprune.architectures.units import missing_biases
from structprune.calibration.context import CalibrationWindows
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.planning.plan import PrunePlan
from structprune.engine.planning.shapes import DIVERGENCE_TOKENS
from structprune.engine.streaming.divergence import divergence
from structprune.engine.streaming.model import StreamedModel
from structprune.phases import Phase
from structprune.recipe.training import RecoverySettings
from structprune.texts import OBJECTIVES, ObjectiveName
from structprune.training.adam import BETAS, EPSILON, adam_step, course
from structprune.training.blocks import token_error
from structprune.training.context import RecoveryContext, Workplace
from structprune.training.loop import distil
from structprune.training.mix import Mix, MixState, robust_shares
from structprune.training.parameters import parameters_of, scales_of
from structprune.training.stream import StreamedStudent
from structprune.training.texts import Texts
from support.models import TINY_MODELS, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN = 24
TRAIN, HELD_OUT = (0, 1, 2), (3,)


def texts_of(windows: CalibrationWindows) -> Texts:
    return Texts(names=("tiny",), windows=windows, train=(TRAIN,), held_out=(HELD_OUT,))


@functools.cache
def stock_of(directory: Path) -> StockModel:
    """The model of a run, which makes a new module of each block; the tests share it as the steps of a run do."""
    return StockModel(CheckpointReader(directory))


def context_for(teacher: Path, student: Path, *, resident: bool = True, **settings: Any) -> RecoveryContext:
    ids_NS = torch.randint(0, 250, (4, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    windows = CalibrationWindows(ids_NS=ids_NS, description="random")
    plan = PrunePlan(
        budget_bytes=2**30, phases={Phase.EMBED: 0}, store="memory", store_bytes=0, micro_batch_windows=2, disk_bytes=0
    )
    sides = [
        StreamedModel(
            stock=stock_of(directory),
            windows=windows,
            plan=plan,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for directory in (teacher, student)
    ]
    return RecoveryContext(
        teacher=sides[0],
        student=sides[1],
        settings=RecoverySettings.build(seq_len=SEQ_LEN, **settings).resolved(),
        texts=texts_of(windows),
        targets=(1, 2),
        resident=resident,
    )


def perturbed(kind: str, directory: Path) -> tuple[Path, Path]:
    """A tiny model, and the same with other weights in its blocks: a student without any pruning."""
    dense = save_tiny(kind, directory / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".0." in name or ".1." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory / "student")
    return dense, directory / "student"


def whole_gradients(dense: Path, student: Path, windows: Sequence[Tensor]) -> tuple[dict[str, Tensor], float]:
    """Autograd on the whole model: name -> gradient of the mean KL divergence, and that."""
    teacher = AutoModelForCausalLM.from_pretrained(dense).eval()
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    loss = torch.zeros(())
    for ids_S in windows:
        with torch.no_grad():
            wanted = teacher(input_ids=ids_S[None]).logits.log_softmax(-1)
        found = model(input_ids=ids_S[None]).logits.log_softmax(-1)
        kl = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
        loss = loss + kl / (len(windows) * SEQ_LEN)
    loss.backward()
    gradients: dict[str, Tensor] = {
        n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()
    }
    # Stock code holds the experts of a mixture as one tensor, the checkpoint each by itself.
    for name in [name for name in gradients if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stem, _, stacked = name.rpartition(".")
        for expert, part in enumerate(gradients.pop(name)):
            names = ("gate_proj", "up_proj") if stacked == "gate_up_proj" else ("down_proj",)
            gradients |= {
                f"{stem}.{expert}.{n}.weight": piece for n, piece in zip(names, part.chunk(len(names)), strict=True)
            }
    return gradients, float(loss.detach())


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The teacher and the student of one kind. Do not modify."""
    return perturbed(request.param, tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def autograd(models: tuple[Path, Path]) -> tuple[dict[str, Tensor], float]:
    """What autograd says of the first and third window."""
    ids_NS = context_for(*models).student.windows.ids_NS
    return whole_gradients(*models, (ids_NS[0], ids_NS[2]))


def saved(student: StreamedStudent, context: RecoveryContext, folder: Path, what: str = "weights") -> dict[str, Tensor]:
    """Name -> weights or first moment of all blocks, as a checkpoint would have them."""
    folder.mkdir()
    student.save(folder, moments=True)
    result: dict[str, Tensor] = {}
    for block in context.student.stock.layout.blocks:
        flat_P = load_file(folder / f"block-{block.index:05d}.safetensors")[what]
        views = parameters_of(context.student, block).views(flat_P)
        result |= {block.prefix + name: view for name, view in views.items()}
    return result


def test_streamed_gradient_is_autograd_s(
    models: tuple[Path, Path], autograd: tuple[dict[str, Tensor], float], tmp_path: Path
) -> None:
    context = context_for(*models)
    student = StreamedStudent(context, tmp_path)
    expected, loss = autograd
    assert student.step((0, 2), 1e-3, 1) == pytest.approx(loss, rel=1e-4)
    # The first moment starts at zero, so after one step it is a tenth of the gradient.
    found = saved(student, context, tmp_path / "first", "first")
    assert set(found) == {
        name for name in expected if name.startswith(f"{context.student.stock.layout.blocks_module}.")
    }
    largest = max(float(gradient.abs().amax()) for gradient in expected.values())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor / (1 - BETAS[0]), expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert student.step((0, 2), 1e-3, 2) < loss


def test_the_gradient_of_scales_is_autograd_s(
    models: tuple[Path, Path], autograd: tuple[dict[str, Tensor], float], tmp_path: Path
) -> None:
    """A scale of one multiplies a column of the consumer's weight: its derivative is W's, summed against W."""
    context = context_for(*models)
    student = StreamedStudent(context, tmp_path, scales_of)
    gradients, loss = autograd
    assert student.step((0, 2), 1e-3, 1) == pytest.approx(loss, rel=1e-4)
    folder = tmp_path / "first"
    folder.mkdir()
    student.save(folder, moments=True)
    num_scales = 0
    for block in context.student.stock.layout.blocks:
        tensors = context.student.reader.read(block.shapes, block.prefix)
        learning = scales_of(context.student, block)
        first_P = load_file(folder / f"block-{block.index:05d}.safetensors")["first"]
        largest = float(first_P.abs().amax()) / (1 - BETAS[0])
        for name, found in learning.views(first_P / (1 - BETAS[0])).items():
            if name in learning.consumers:
                part = learning.consumers[name]
                products = gradients[block.prefix + part.tensor] * tensors[part.tensor]
                expected = products.movedim(part.axis, 0).flatten(1).sum(dim=1)
                num_scales += 1
            else:
                expected = gradients[block.prefix + name]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert num_scales >= (2 if context.student.stock.family.name != "qwen3_moe" else 1)
    assert student.step((0, 2), 1e-3, 2) < loss
    student.close()


@pytest.mark.parametrize(("kind", "kinds"), [("llama", {"attention", "mlp"}), ("gemma2", {"attention"})])
def test_the_gradient_of_new_biases_is_autograd_s(kind: str, kinds: set[str], tmp_path: Path) -> None:
    """Biases that no shard has are read as zeros, change no prediction, and have the gradients of any others."""
    dense, plain = perturbed(kind, tmp_path)
    reader = CheckpointReader(plain)
    layout = stock_of(plain).layout
    fields = {g.bias_field for g in layout.blocks[0].groups if g.kind in kinds}
    writer = ModelWriter(tmp_path / "shards", len(layout.blocks), layout.blocks_module)
    (tmp_path / "shards").mkdir()
    outer = list(layout.outer_tensors)
    writer.write_embeddings(reader.read(outer[:1]))
    for block in layout.blocks:
        writer.write_block(block.index, reader.read(block.shapes, block.prefix))
    writer.write_rest(reader.read(outer[1:]))
    zeros = {
        block.prefix + name: torch.zeros(shape)
        for block in layout.blocks
        for name, shape in missing_biases(block).items()
    }
    assert {name.rpartition(".")[0].rpartition("layers.")[2][2:] for name in zeros} == {
        module for group in layout.blocks[0].groups if group.kind in kinds for module in group.bias_modules
    }
    biased = tmp_path / "biased"
    biased.mkdir()
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (biased / "config.json").write_text(json.dumps(config | dict.fromkeys(fields, True)), encoding="utf-8")
    writer.link(biased, zeros)
    context = context_for(dense, biased)
    ids_NS = context.student.windows.ids_NS
    expected, loss = whole_gradients(dense, biased, (ids_NS[0], ids_NS[2]))
    assert loss == pytest.approx(whole_gradients(dense, plain, (ids_NS[0], ids_NS[2]))[1], rel=1e-6)
    student = StreamedStudent(context, tmp_path, scales_of)
    assert student.step((0, 2), 1e-3, 1) == pytest.approx(loss, rel=1e-4)
    (tmp_path / "first").mkdir()
    student.save(tmp_path / "first", moments=True)
    found: dict[str, Tensor] = {}
    for block in context.student.stock.layout.blocks:
        first_P = load_file(tmp_path / "first" / f"block-{block.index:05d}.safetensors")["first"] / (1 - BETAS[0])
        views = scales_of(context.student, block).views(first_P)
        found |= {block.prefix + name: view for name, view in views.items() if block.prefix + name in zeros}
    assert set(found) == set(zeros)
    largest = max(float(expected[name].abs().amax()) for name in zeros)
    assert largest > 1e-4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    student.close()


def test_scales_are_folded_into_the_consumers(models: tuple[Path, Path], tmp_path: Path) -> None:
    context = context_for(*models)
    streamed = context.student
    block = streamed.stock.layout.blocks[1]
    learning = scales_of(streamed, block)
    tensors = streamed.reader.read(block.shapes, block.prefix)
    start_P = learning.packed(tensors, streamed.device)
    unchanged = learning.stored(tensors, start_P)
    assert all(torch.equal(unchanged[name], tensor) for name, tensor in tensors.items())
    moved_P = start_P + 0.1 * torch.randn(start_P.shape, generator=torch.Generator().manual_seed(2))
    student = StreamedStudent(context, tmp_path)
    hidden_BSD = student._inputs.read(0, 1)  # pyright: ignore[reportPrivateUsage]
    propagator = student._propagator  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        scaled = learning.module(streamed, block, moved_P, learning.fixed(tensors))
        folded = streamed.stock.block(block.index, learning.stored(tensors, moved_P))
        outputs = [propagator.apply(module, block.index, hidden_BSD) for module in (scaled, folded)]
        before = propagator.apply(streamed.stock.block(block.index, tensors), block.index, hidden_BSD)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert float((outputs[1] - before).abs().amax()) > 1e-2
    student.close()


def test_files_and_memory_give_the_same_steps(tmp_path: Path) -> None:
    dense, directory = perturbed("llama", tmp_path)
    results: list[dict[str, Tensor]] = []
    for resident in (True, False):
        context = context_for(dense, directory, resident=resident)
        folder = tmp_path / f"resident-{resident}"
        folder.mkdir()
        student = StreamedStudent(context, folder)
        for number in (1, 2):
            student.step((0, 1), 1e-3, number)
        results.append(saved(student, context, folder / "weights"))
        # Both moments survive a snapshot, so that the next step is the same.
        (folder / "snapshot").mkdir()
        student.save(folder / "snapshot", moments=True)
        (folder / "again").mkdir()
        again = StreamedStudent(context, folder / "again")
        again.load(folder / "snapshot", moments=True)
        assert student.step((2,), 1e-3, 3) == again.step((2,), 1e-3, 3)
        first, second = (saved(s, context, folder / n) for s, n in ((student, "a"), (again, "b")))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(
            first["model.layers.0.mlp.up_proj.weight"], results[-1]["model.layers.0.mlp.up_proj.weight"]
        )
        student.close()
        again.close()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_divergence_and_its_derivative() -> None:
    torch.manual_seed(0)
    length = DIVERGENCE_TOKENS + 7
    heads = [nn.Linear(8, 11, bias=False).double() for _ in range(2)]
    found, wanted = torch.randn(length, 8, dtype=torch.float64), torch.randn(length, 8, dtype=torch.float64)
    gradient = torch.empty(length, 8)
    total = divergence(heads[0], heads[1], found, wanted, gradient)
    leaf = found.clone().requires_grad_(True)
    logs = [heads[0](leaf).log_softmax(-1), heads[1](wanted).log_softmax(-1)]
    expected = nn.functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad.float(), rtol=1e-4, atol=1e-5)
    assert divergence(heads[0], heads[0], found, found) == pytest.approx(0, abs=1e-4)


def test_token_error_counts_every_token_alike() -> None:
    wanted = torch.tensor([[[1000.0, 0.0], [0.0, 1.0]]])
    output = torch.tensor([[[1000.0, 100.0], [0.1, 1.0]]])
    assert float(token_error(output, wanted)) == pytest.approx(0.01 + 0.01)


def test_adam_is_torch_s() -> None:
    torch.manual_seed(0)
    weights = torch.randn(50)
    state = torch.zeros(3, 50)
    state[0] = weights
    reference = weights.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([reference], lr=0.1, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    for number in range(1, 5):
        gradient = torch.randn(50)
        adam_step(state, gradient, rate=0.1, number=number)
        reference.grad = gradient
        optimiser.step()
    torch.testing.assert_close(state[0], reference.detach())


def test_course_rises_and_falls() -> None:
    values = [course(step, 4, step / 20) for step in range(21)]
    assert values[0] == pytest.approx(0.2)
    assert max(values) == values[4] or max(values) == values[3]
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert course(0, 0, 0.0) == 1.0


def mixed(robust: bool) -> tuple[Texts, Mix]:
    windows = CalibrationWindows(ids_NS=torch.zeros(12, 4, dtype=torch.int64), description="none")
    texts = Texts(names=("a", "b"), windows=windows, train=(tuple(range(6)), (7, 8, 9)), held_out=((6,), (10, 11)))
    return texts, Mix(texts, robust=robust, radius=0.1, seed=3)


def test_alike_every_window_comes_once_per_pass() -> None:
    texts, mix = mixed(robust=False)
    state = mix.judged(MixState(), [1.0, 2.0])
    passes = [[w for step in range(5) for w in mix.windows(state, p * 5 + step, 2)] for p in range(3)]
    assert all(sorted(one) == list(texts.all_train) for one in passes)
    assert passes[0] != passes[1]


def test_robust_draws_by_the_shares() -> None:
    texts, mix = mixed(robust=True)
    state = mix.judged(MixState(), [0.5, 1.0])
    assert state.shares[1] > 1 / 3
    drawn: list[int] = []
    for step in range(600):
        windows = mix.windows(state, step, 2)
        assert windows == mix.windows(state, step, 2)
        state = mix.drawn(state, windows)
        drawn += windows
    assert set(drawn) == set(texts.all_train)
    assert state.drawn == [sum(w in part for w in drawn) for part in texts.train]
    assert state.drawn[1] / 1200 == pytest.approx(state.shares[1], abs=0.05)
    # Within a text each window comes as often as any other, by one.
    counts = [drawn.count(w) for w in texts.train[0]]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("radius", [1e-4, 0.01, 0.05])
def test_shares_are_the_closed_optimum(radius: float) -> None:
    """Where no text is left out the optimum is q = p (1 + sqrt(2 radius) (l - mean) / std), moments under p."""
    prior, loss = [0.5, 0.3, 0.2], [1.0, 1.3, 0.9]
    mean = sum(p * x for p, x in zip(prior, loss, strict=True))
    deviation = math.sqrt(sum(p * (x - mean) ** 2 for p, x in zip(prior, loss, strict=True)))
    expected = [p * (1 + math.sqrt(2 * radius) * (x - mean) / deviation) for p, x in zip(prior, loss, strict=True)]
    assert min(expected) > 0
    assert robust_shares(prior, loss, radius) == pytest.approx(expected, rel=1e-6)


def test_shares_where_texts_are_left_out() -> None:
    prior, loss = [0.5, 0.3, 0.2], [1.0, 1.3, 0.9]
    for radius in (0.5, 0.8):
        shares = robust_shares(prior, loss, radius)
        assert sum(shares) == pytest.approx(1)
        assert min(shares) == 0
        assert sum(p * (q / p - 1) ** 2 for p, q in zip(prior, shares, strict=True)) / 2 == pytest.approx(radius)
        # No feasible distribution on a grid has a larger loss.
        best = sum(q * x for q, x in zip(shares, loss, strict=True))
        grid = [(a / 200, b / 200, (200 - a - b) / 200) for a in range(201) for b in range(201 - a)]
        feasible = [
            q for q in grid if sum(p * (x / p - 1) ** 2 for p, x in zip(prior, q, strict=True)) / 2 <= radius + 1e-12
        ]
        assert max(sum(x * y for x, y in zip(q, loss, strict=True)) for q in feasible) <= best + 1e-9
    assert robust_shares(prior, loss, 100.0) == pytest.approx([0.0, 1.0, 0.0])
    assert robust_shares(prior, [2.0, 2.0, 2.0], 0.1) == prior


class Divided:
    """A student whose first step helps one text much and harms the other a little; its second helps both a little."""

    BY_STEP = ((1.0, 1.0), (0.2, 1.1), (0.9, 0.9))

    def __init__(self) -> None:
        self.steps = 0
        self.loaded: list[int] = []

    def step(self, windows: Sequence[int], rate: float, number: int) -> float:
        self.steps = number
        return 0.0

    def measure(self, windows: Sequence[int]) -> list[float]:
        return [self.BY_STEP[self.steps][0 if windows == (2,) else 1]]

    def prepare(self, windows: Sequence[int]) -> None:
        pass

    def save(self, folder: Path, *, moments: bool) -> None:
        (folder / "steps").write_text(str(self.steps))

    def load(self, folder: Path, *, moments: bool) -> None:
        self.loaded.append(int((folder / "steps").read_text()))


@pytest.mark.parametrize(
    ("objective", "best", "divergences"), [("mean", 1, [1.0, 0.65, 0.9]), ("worst", 2, [1.0, 1.1, 0.9])]
)
def test_the_best_state_of_the_mean_and_of_the_worst_text(
    objective: ObjectiveName, best: int, divergences: list[float], tmp_path: Path
) -> None:
    source = save_tiny("llama", tmp_path / "model")
    context = context_for(source, source, mode="scales", batch=1, epochs=2)
    texts = replace(context.texts, names=("a", "b"), train=((0,), ()), held_out=((2,), (3,)))
    context = replace(context, texts=texts, objective=OBJECTIVES[objective])
    place = Workplace(folder=tmp_path / "state", scratch=tmp_path / "scratch")
    for folder in (place.folder, place.scratch):
        folder.mkdir()
    student = Divided()
    history = distil(context, student, place)
    assert [entry.divergence for entry in history.evaluations] == pytest.approx(divergences)
    assert history.best.step == best
    # The last state is the best one already, an earlier one is loaded.
    assert student.loaded == ([] if best == 2 else [best])
