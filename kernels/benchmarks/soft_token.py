"""Whether soft tokens should be streamed over the vocabulary, so that no [R, V] matrix is in memory.

Three ways to turn R last states into the next inputs, softmax(h E^T) E with tied embeddings, forward and backward:
plain - the LM head and `SoftToken`, as in training; checkpoint - the same, computed again in backward; streamed - a
chunk of the vocabulary at a time in both directions. Each runs in a process of its own, in turns as in alignment.py,
and must first agree with the plain way in float64.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from measuring import Failed, answer, append, environment, in_a_process, measure, times
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laser_dist.model.thinking import SoftToken

# Scores of a chunk are [R, CHUNK]: 6 MiB in float32 at R = 192, and the products are still large.
CHUNK = 8192
WAYS = ("plain", "checkpoint", "streamed")
# Relative to the norm. float32: logits of some 20 err by 1e-6, and their exponentials with them; bfloat16 likewise.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}

HELP = f"""{__doc__}
Examples:
  python kernels/benchmarks/soft_token.py --out rows.jsonl
  python kernels/benchmarks/soft_token.py --rows 192 --vocabulary 151936 --width 1024 --repeats 6
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured: every combination of the lists."""

    rows: tuple[int, ...] = (24, 192)
    """R: queries and passages that think at once, three for each of B = 8 and B = 64 queries."""
    vocabulary: tuple[int, ...] = (49152, 151936)
    """V: of SmolLM2 and of Qwen3."""
    width: tuple[int, ...] = (576, 1024)
    """D: of SmolLM2-135M and of Qwen3-0.6B."""
    dtype: str = "float32"
    """Of states and embeddings: float32 or bfloat16."""
    repeats: int = 4
    """Timed calls."""
    out: Path | None = None
    """JSON lines to append the rows to."""


class StreamedSoftToken(torch.autograd.Function):
    """(softmax(h E^T) E, mean entropy) with scores of one chunk of the vocabulary at a time, in both directions."""

    @staticmethod
    def forward(ctx: Any, state_RD: Tensor, embedding_VD: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        precise = torch.float64 if state_RD.dtype == torch.float64 else torch.float32
        top_R1 = state_RD.new_full((len(state_RD), 1), -torch.inf, dtype=precise)
        sum_R1, score_R1 = torch.zeros_like(top_R1), torch.zeros_like(top_R1)
        mixed_RD = torch.zeros_like(state_RD, dtype=precise)
        for part_CD in embedding_VD.split(chunk):
            logits_RC = (state_RD @ part_CD.T).to(precise)
            higher_R1 = torch.maximum(top_R1, logits_RC.amax(-1, keepdim=True))
            shrink_R1, top_R1 = (top_R1 - higher_R1).exp(), higher_R1
            e_RC = (logits_RC - top_R1).exp()
            sum_R1 = sum_R1 * shrink_R1 + e_RC.sum(-1, keepdim=True)
            score_R1 = score_R1 * shrink_R1 + (e_RC * logits_RC).sum(-1, keepdim=True)
            mixed_RD = mixed_RD * shrink_R1 + e_RC.to(part_CD.dtype) @ part_CD
        level_R1 = top_R1 + sum_R1.log()
        soft_RD = (mixed_RD / sum_R1).to(state_RD.dtype)
        entropy = (level_R1 - score_R1 / sum_R1).mean()
        ctx.save_for_backward(state_RD, embedding_VD, soft_RD, level_R1)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return soft_RD, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_soft_RD: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        state_RD, embedding_VD, soft_RD, level_R1 = ctx.saved_tensors
        along_R1 = (to_soft_RD * soft_RD).to(level_R1.dtype).sum(-1, keepdim=True)
        to_state_RD = torch.zeros_like(state_RD, dtype=level_R1.dtype)
        to_embedding_VD = torch.empty_like(embedding_VD)
        for part_CD, out_CD in zip(embedding_VD.split(ctx.chunk), to_embedding_VD.split(ctx.chunk), strict=True):
            p_RC = ((state_RD @ part_CD.T).to(level_R1.dtype) - level_R1).exp()
            to_logits_RC = (p_RC * (to_soft_RD @ part_CD.T - along_R1)).to(state_RD.dtype)
            to_state_RD += to_logits_RC @ part_CD
            torch.mm(to_logits_RC.T, state_RD, out=out_CD)
            out_CD.addmm_(p_RC.to(state_RD.dtype).T, to_soft_RD)
        return to_state_RD.to(state_RD.dtype), to_embedding_VD, None


def soft_token(way: str, state_RD: Tensor, embedding: nn.Embedding, chunk: int = CHUNK) -> Tensor:
    """(R, D) soft tokens; their mean entropy is computed as in training, and dropped."""
    if way == "streamed":
        return StreamedSoftToken.apply(state_RD, embedding.weight, chunk)[0]
    module = SoftToken(embedding)

    def plain(state_RD: Tensor) -> Tensor:
        return module(state_RD @ embedding.weight.T)[0]

    return checkpoint(plain, state_RD, use_reentrant=False) if way == "checkpoint" else plain(state_RD)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One way at one shape in this process: the gate, then time and memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, job["dtype"])
    error = gate(job["way"], job["D"], dtype, device)
    state_RD, embedding = _inputs(job["R"], job["V"], job["D"], dtype, device)
    to_soft_RD = torch.randn_like(state_RD) / job["R"]

    def call() -> None:
        soft_token(job["way"], state_RD, embedding).backward(to_soft_RD)
        state_RD.grad = embedding.weight.grad = None

    measured = measure(call, device, job["repeats"])
    gradient_bytes = sum(x.numel() * x.element_size() for x in (state_RD, embedding.weight))
    extra_bytes = max(measured.extra_bytes - gradient_bytes, 0)
    return asdict(measured) | {"extra_bytes": extra_bytes, "gate_error": error}


def _inputs(r: int, v: int, d: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, nn.Embedding]:
    """Logits with a standard deviation of about 3: a few dozen tokens carry the softmax, as in a language model."""
    generator = torch.Generator(device).manual_seed(0)
    weight_VD = torch.empty(v, d, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    state_RD = torch.empty(r, d, dtype=dtype, device=device).normal_(0, 150 / d**0.5, generator=generator)
    return state_RD.requires_grad_(), nn.Embedding.from_pretrained(weight_VD, freeze=False)


def gate(way: str, d: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error, of values and both gradients, in `dtype`. Raises Failed where it is too large.

    Against the plain way in float64: exactly so in float64, and within rounding in `dtype`.
    """

    def outcome(way: str, dtype: torch.dtype) -> list[Tensor]:
        state_RD, embedding = _inputs(7, 1037, d, base, device)
        leaf_RD = state_RD.detach().to(dtype).requires_grad_()
        soft_RD = soft_token(way, leaf_RD, embedding.to(dtype), chunk=100)
        soft_RD.backward(torch.linspace(-1, 1, soft_RD.numel(), device=device).view_as(soft_RD).to(base).to(dtype))
        assert leaf_RD.grad is not None and embedding.weight.grad is not None
        return [soft_RD.detach(), leaf_RD.grad, embedding.weight.grad]

    base = dtype  # both see the same rounded inputs
    expected, errors = outcome("plain", torch.float64), {}
    for precision in (torch.float64, dtype):
        found = outcome(way, precision)
        errors[precision] = max(
            ((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)
        )
        if not errors[precision] <= TOLERANCE[precision]:
            raise Failed(f"{way} is {errors[precision]:.1e} off the plain way in {precision}: it has no row")
    return errors[dtype]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    settings = tyro.cli(Settings, args=arguments, description=HELP)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures: list[str] = []
    print(f"{'R':>4} {'V':>7} {'D':>5}  {'way':<11}{'p50 ms':>9}{'time / plain':>14}{'extra MiB':>11}{'error':>9}")
    for r in settings.rows:
        for v in settings.vocabulary:
            for d in settings.width:
                rows = _turns({"R": r, "V": v, "D": d}, settings, device, failures)
                append(rows, settings.out)
                for row in rows:
                    print(
                        f"{r:>4} {v:>7} {d:>5}  {row['way']:<11}{row['p50_s'] * 1e3:>9.1f}"
                        f"{row['time_over_plain']:>14.2f}{row['peak_extra_bytes'] / 2**20:>11.0f}"
                        f"{row['gate_error']:>9.0e}",
                        flush=True,
                    )
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


def _turns(
    shape: dict[str, int], settings: Settings, device: torch.device, failures: list[str]
) -> list[dict[str, Any]]:
    outcomes: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(min(2, settings.repeats)):
        repeats = settings.repeats // 2 if turn else (settings.repeats + 1) // 2
        for way in WAYS[:: -1 if turn else 1]:
            try:
                found = in_a_process(__file__, {**shape, "way": way, "dtype": settings.dtype, "repeats": repeats})
            except Failed as failed:
                failures.append(f"{way} at {shape}: {failed}")
                return []  # without one of them there is nothing to compare
            outcomes[way].append(found)
    rows: list[dict[str, Any]] = []
    for way, several in outcomes.items():
        row = {**environment(device), "way": way, "dtype": settings.dtype, **shape, **times(several)}
        row["time_over_plain"] = row["p50_s"] / (rows[0] if rows else row)["p50_s"]
        row["peak_extra_bytes"] = max(outcome["extra_bytes"] for outcome in several)
        row["gate_error"] = several[0]["gate_error"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        answer(work)
    else:
        sys.exit(main())
