"""The KL divergence from the teacher's predictions or the loss of a text, and the derivative by the last hidden states.

With logits z of the student and distributions p (teacher) and q (student), dKL(p || q)/dz = q - p.

Shape suffixes: S positions, D hidden size, V vocabulary, T tokens of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.engine.planning.shapes import DIVERGENCE_TOKENS, LOGIT_TOKENS
from structprune.engine.streaming.model import StreamedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Hidden states behind the last block -> logits, of both models; one module where the two are the same."""

    teacher: nn.Module
    student: nn.Module


def load_heads(teacher: StreamedModel, student: StreamedModel) -> Heads:
    """Load final norm and output projection of both, in the dtype of the forward passes."""
    first, first_tensors = _head(teacher)
    names = {teacher.stock.head_weight: student.stock.head_weight}
    tensors = student.reader.read(student.stock.head_tensors(), dtype=student.dtype)
    shared = all(torch.equal(tensors[names.get(name, name)], tensor) for name, tensor in first_tensors.items())
    del first_tensors
    return Heads(teacher=first, student=first if shared else _module(student, tensors))


def _head(streamed: StreamedModel) -> tuple[nn.Module, dict[str, Tensor]]:
    tensors = streamed.reader.read(streamed.stock.head_tensors(), dtype=streamed.dtype)
    return _module(streamed, tensors), tensors


def _module(streamed: StreamedModel, tensors: dict[str, Tensor]) -> nn.Module:
    return streamed.stock.head({name: tensor.to(streamed.device) for name, tensor in tensors.items()})


def divergence(
    student_head: nn.Module,
    teacher_head: nn.Module,
    hidden_SD: Tensor,
    wanted_SD: Tensor,
    gradient_SD: Tensor | None = None,
) -> float:
    """Sum over the positions of KL(teacher || student), in nats; its derivative by `hidden_SD` goes to `gradient_SD`.

    `wanted_SD` are the teacher's hidden states. The heads may be any maps to logits.
    """
    total = 0.0
    for start in range(0, len(hidden_SD), DIVERGENCE_TOKENS):
        part = slice(start, start + DIVERGENCE_TOKENS)
        with torch.no_grad():
            wanted_TV = _log_softmax(teacher_head(wanted_SD[part]).float())
        part_TD = hidden_SD[part].detach().requires_grad_(gradient_SD is not None)
        with torch.set_grad_enabled(gradient_SD is not None):
            logits_TV = student_head(part_TD)
        with torch.no_grad():
            found_TV = _log_softmax(logits_TV.detach().float().clone())
            total += float(nn.functional.kl_div(found_TV, wanted_TV, reduction="sum", log_target=True))
            if gradient_SD is None:
                continue
            slope_TV = found_TV.exp_().sub_(wanted_TV.exp_())
        gradient_SD[part] = torch.autograd.grad(logits_TV, part_TD, slope_TV.to(logits_TV.dtype))[0].float()
    return total


def text_loss(head: nn.Module, hidden_SD: Tensor, ids_S: Tensor, gradient_SD: Tensor | None = None) -> float:
    """Sum the negative log-likelihoods of a window's next tokens; the derivative by `hidden_SD` goes to `gradient_SD`.

    The last position predicts a token outside the window and takes no part: its derivative is zero.
    """
    if gradient_SD is not None:
        gradient_SD.zero_()
    total, last = 0.0, len(hidden_SD) - 1
    for start in range(0, last, LOGIT_TOKENS):
        part = slice(start, min(start + LOGIT_TOKENS, last))
        part_TD = hidden_SD[part].detach().requires_grad_(gradient_SD is not None)
        with torch.set_grad_enabled(gradient_SD is not None):
            logits_TV = head(part_TD)
            loss = nn.functional.cross_entropy(logits_TV.float(), ids_S[1:][part], reduction="sum")
        total += float(loss.detach())
        if gradient_SD is not None:
            gradient_SD[part] = torch.autograd.grad(loss, part_TD)[0].float()
    return total


@torch.no_grad()
def divergences(head: nn.Module, students: Sequence[Callable[[], Tensor]], wanted_SD: Tensor) -> list[float]:
    """Compute what `divergence` does for several students that share the teacher's head.

    Each student gives its hidden states, (S, D), whenever it is asked, so that one window at a time is there. The
    teacher's predictions are made once for all.
    """
    # KL(p || q) = sum p log p + logsumexp(z) - sum p z: one exponential for each logit of a student, and its buffer is
    # used again, since taking large buffers anew costs more than the arithmetic.
    totals = [0.0] * len(students)
    logits_TV: Tensor | None = None
    for start in range(0, len(wanted_SD), DIVERGENCE_TOKENS):
        part = slice(start, start + DIVERGENCE_TOKENS)
        wanted_TV = _log_softmax(head(wanted_SD[part]).float())
        shares_TV = wanted_TV.exp()
        known = float(torch.linalg.vecdot(shares_TV, wanted_TV).sum(dtype=torch.float64))
        del wanted_TV
        if logits_TV is None or logits_TV.shape != shares_TV.shape:
            logits_TV = torch.empty_like(shares_TV)
        for number, hidden in enumerate(students):
            logits_TV.copy_(head(hidden()[part]))
            expected_T = torch.stack([torch.dot(p_V, z_V) for p_V, z_V in zip(shares_TV, logits_TV, strict=True)])
            largest_T1 = logits_TV.amax(dim=-1, keepdim=True)
            weights_T = logits_TV.sub_(largest_T1).exp_().sum(dim=-1)
            lost_T = weights_T.log() + largest_T1[:, 0] - expected_T
            totals[number] += known + float(lost_T.sum(dtype=torch.float64))
    return totals


def _log_softmax(logits_TV: Tensor) -> Tensor:
    """Compute the log-softmax in place."""
    return logits_TV.sub_(logits_TV.logsumexp(dim=-1, keepdim=True))
