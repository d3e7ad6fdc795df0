"""Ways to compute the objective that are compared: all of them sum to one loss that autograd can differentiate.

Axes: B queries of this rank · W ranks · K latent steps · N passages of all ranks · D hidden size.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from laser_kernels import AlignmentTerms, alignment, alignment_loss, alignment_loss_reference, pair_torch
from torch import Tensor

# The published objective: temperatures, and weights of infonce_latent, infonce_explicit, kl_output, kl_trajectory.
TEMPERATURES = {"temperature": 0.02, "distill_temperature": 0.02, "trajectory_temperature": 0.05}
WEIGHTS = (1.0, 1.0, 10.0, 0.1)
# Fewer queries at a time would leave matrix products too thin to be worth comparing with.
FEWEST_LIGER_QUERIES = 16


class Rows(NamedTuple):
    """Unit rows, as `alignment_loss` takes them."""

    student_BD: Tensor
    teacher_BD: Tensor
    student_steps_BKD: Tensor
    teacher_steps_BKD: Tensor
    passages_ND: Tensor
    labels_B: Tensor


class Shape(NamedTuple):
    """Sizes of one measurement; rows of all_rows are W·B."""

    B: int
    N: int
    D: int
    K: int
    W: int
    itemsize: int

    @property
    def rows_bytes(self) -> int:
        """Of the inputs; those that need a gradient, nearly all, take as much again for it."""
        return (self.B * (2 + 2 * self.K) + self.N) * self.D * self.itemsize

    def matrices(self, queries: int, itemsize: int) -> int:
        """Bytes of the plain way's [queries, N] and [queries, K, N] matrices at its peak, plus copies of the passages.

        12 of the one and 7 of the other: scores, logits, log-softmax, exponentials and their gradients, as far as they
        live at once. At K = 3 that is 33 in all, 132 B N in float32; 32.9 were measured.
        """
        copies = 2 * self.N * self.D * itemsize if itemsize != self.itemsize else 0
        return (12 + 7 * self.K) * queries * self.N * itemsize + copies


def eager_fp32(rows: Rows, world: int) -> Tensor:
    """The reference: plain PyTorch, statistics in float32."""
    return total(alignment_loss_reference(*rows, **TEMPERATURES))


def eager_bf16(rows: Rows, world: int) -> Tensor:
    return eager_in(torch.bfloat16, rows)


def eager_in(dtype: torch.dtype, rows: Rows) -> Tensor:
    """Plain PyTorch with scores and logits in `dtype`, as under the published recipe's autocast."""
    *values, labels_B = rows
    student_BD, teacher_BD, steps_BKD, teacher_steps_BKD, passages_ND = (x.to(dtype) for x in values)
    t = TEMPERATURES
    student_BN, teacher_BN = student_BD @ passages_ND.T, teacher_BD @ passages_ND.T

    def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_p, log_q = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()

    return total(
        AlignmentTerms(
            F.cross_entropy(student_BN / t["temperature"], labels_B),
            F.cross_entropy(teacher_BN / t["temperature"], labels_B),
            kl(student_BN, teacher_BN.detach(), t["distill_temperature"]),
            kl(
                steps_BKD @ passages_ND.T,
                teacher_steps_BKD.detach() @ passages_ND.detach().T,
                t["trajectory_temperature"],
            ),
        )
    )


def compiled(rows: Rows, world: int) -> Tensor:
    """The reference under torch.compile, each shape compiled for itself."""
    return _compiled()(rows, world)


@functools.cache
def _compiled() -> Callable[[Rows, int], Tensor]:
    return torch.compile(eager_fp32, dynamic=False)


def liger(rows: Rows, world: int) -> Tensor:
    """A few queries at a time, gradients computed in forward: what Liger Kernel does for fused linear losses.

    Our own few lines after the idea (linkedin/Liger-Kernel, chunked_loss and FusedLinearCrossEntropy): passages take
    the vocabulary's place, queries the tokens'. A chunk's scores are [chunk, N] in float32 and never leave it.
    """
    return _GradientsInForward.apply(*rows)


def liger_queries(b: int, n: int, d: int) -> int:
    """Queries per chunk, as Liger chooses tokens: so few that a chunk's scores are about the size of all rows."""
    return max(FEWEST_LIGER_QUERIES, 1 << (-(-b // -(-n // d)) - 1).bit_length())


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        student_BD, teacher_BD, steps_BKD, teacher_steps_BKD, passages_ND, labels_B = rows = Rows(*tensors)
        b, wanted = len(labels_B), ctx.needs_input_grad[4]
        chunk = liger_queries(b, *passages_ND.shape)
        gradients = [torch.zeros_like(x, dtype=_precise(x)) for x in (*rows[:3], passages_ND)] if wanted else []
        loss = gradients[0].new_zeros(()) if wanted else torch.zeros((), device=passages_ND.device)
        for first in range(0, b, chunk):
            part = slice(first, first + chunk)

            def loss_of(
                student: Tensor, teacher: Tensor, steps: Tensor, passages: Tensor, part: slice = part
            ) -> Tensor:
                rows = Rows(student, teacher, steps, teacher_steps_BKD[part], passages, labels_B[part])
                return eager_fp32(rows, 1) * (len(student) / b)

            arguments = (student_BD[part], teacher_BD[part], steps_BKD[part], passages_ND)
            if not wanted:
                loss += loss_of(*arguments)
                continue
            found, value = torch.func.grad_and_value(loss_of, argnums=(0, 1, 2, 3))(*arguments)
            loss += value
            for gradient, share in zip(gradients[:3], found[:3], strict=True):
                gradient[part] = share
            gradients[3] += found[3]
        ctx.save_for_backward(*(g.to(passages_ND.dtype) for g in gradients))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_loss: Tensor) -> tuple[Tensor | None, ...]:
        *to_rows, to_passages_ND = (gradient.mul_(to_loss) for gradient in ctx.saved_tensors)
        return *to_rows, None, to_passages_ND, None


def all_rows(rows: Rows, world: int) -> Tensor:
    """The published scheme: every rank computes the loss of all W·B rows, with gradients for its own part alone.

    Its factor W, which averaging over ranks takes back, is left out: it costs nothing.
    """

    def own_gradient(x: Tensor) -> Tensor:
        own = len(x) // world
        return torch.cat([x[:own], x[own:].detach()])

    return eager_fp32(Rows._make([*map(own_gradient, rows[:5]), rows.labels_B]), 1)


def chunked(rows: Rows, world: int) -> Tensor:
    return total(alignment_loss(*rows, **TEMPERATURES, kernel="chunked"))


def triton(rows: Rows, world: int) -> Tensor:
    return total(alignment_loss(*rows, **TEMPERATURES, kernel="triton"))


def total(terms: AlignmentTerms) -> Tensor:
    return torch.stack([weight * term for weight, term in zip(WEIGHTS, terms, strict=True)]).sum()


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _eager_bytes(s: Shape) -> int:
    return s.matrices(s.B, 4)


def _chunked_bytes(s: Shape) -> int:
    """A dozen matrices of a chunk's scores, the workspace, and rows once more in float32."""
    rows = s.B * (2 + s.K)
    scores = max(pair_torch.CHUNK_SCORES, s.B * (1 + s.K) * pair_torch.SHORTEST_CHUNK)
    return 12 * 4 * scores + 2 * pair_torch.WORKSPACE_BYTES + 12 * rows * s.D


@dataclass(frozen=True)
class Implementation:
    """A way to the loss, and what it is expected to take beside inputs and their gradients."""

    label: str
    loss: Callable[[Rows, int], Tensor]
    extra_bytes: Callable[[Shape], int]
    # Where given, this is what must agree with the reference, in float64: `loss` itself is known to be inexact.
    formula: Callable[[Rows], Tensor] | None = None
    needs_cuda: bool = False


IMPLEMENTATIONS = {
    "eager_fp32": Implementation("eager fp32 (reference)", eager_fp32, _eager_bytes),
    "eager_bf16": Implementation(
        "eager bf16 (inexact)",
        eager_bf16,
        lambda s: s.matrices(s.B, 2),
        formula=lambda rows: eager_in(torch.float64, rows),
    ),
    "compiled": Implementation("torch.compile of the reference", compiled, _eager_bytes),
    "liger": Implementation(
        "Liger-style, chunks of queries",
        liger,
        lambda s: s.matrices(min(s.B, liger_queries(s.B, s.N, s.D)), 4) + 8 * s.N * s.D,
    ),
    "all_rows": Implementation(
        "published, all W·B rows",
        all_rows,
        lambda s: s.matrices(s.W * s.B, 4) + 3 * s.N * s.D * s.itemsize,
    ),
    "chunked": Implementation("ours, chunked PyTorch", chunked, _chunked_bytes),
    "triton": Implementation("ours, Triton", triton, _chunked_bytes, needs_cuda=True),
}


@contextmanager
def small_chunks() -> Iterator[None]:
    """Several chunks, the last of them ragged, at the sizes of the gate."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(pair_torch, "CHUNK_SCORES", 1))
        stack.enter_context(mock.patch.object(pair_torch, "SHORTEST_CHUNK", 100))
        stack.enter_context(mock.patch.object(alignment, "LONGEST_CHUNK", 128))
        stack.enter_context(mock.patch(f"{__name__}.liger_queries", lambda b, n, d: max(b // 3, 1)))
        yield


def unit_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Unit rows whose mean cosine is about 0.5, as real encoders have it; made in parts, to be lean."""
    generator = torch.Generator(device).manual_seed(seed)
    common_D = torch.randn(shape[-1], generator=torch.Generator(device).manual_seed(99), device=device)
    out = torch.empty(shape, dtype=dtype, device=device)
    for part in out.view(-1, shape[-1]).split(2**14):
        values = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(F.normalize(values + common_D, dim=-1))
    return out


def make_rows(b: int, n: int, d: int, k: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """Views near their own positive, the teacher nearer than the student, so that no term is noise."""
    passages_ND = unit_rows((n, d), dtype, device, seed=4)
    labels_B = torch.arange(b, device=device) * n // b

    def near(shape: tuple[int, ...], distance: float, seed: int) -> Tensor:
        own = passages_ND[labels_B].view(b, *[1] * (len(shape) - 2), d).float()
        return F.normalize(own + distance * unit_rows(shape, torch.float32, device, seed), dim=-1).to(dtype)

    return Rows(
        near((b, d), 1.5, 0), near((b, d), 1.2, 1), near((b, k, d), 2.5, 2), near((b, k, d), 2.0, 3),
        passages_ND, labels_B,
    )  # fmt: skip
