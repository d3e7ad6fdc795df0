"""The alignment loss against other ways to compute it: time, TFLOP/s and peak memory, forward and with backward.

1. Each implementation runs in a process of its own, so that its peak of memory is its own. All take turns twice, the
   second time in reverse order, so that a machine that slows down slows all of them.
2. Before it is timed, an implementation must have the loss and the gradients of the float64 reference at a small shape
   that takes the same path (several chunks, the last one ragged). One that has not gets no row, and the exit code is 1.
3. What would not fit into memory is predicted and not run; its row says so.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from implementations import IMPLEMENTATIONS, Implementation, Rows, Shape, eager_fp32, make_rows, small_chunks
from measuring import Failed, answer, append, available_bytes, environment, in_a_process, measure, times

from laser_dist.errors import UserError

# Relative to the norm of what is compared. float32: a score errs by some 1e-7, a logit by 1/tau times that, the plain
# way by 1e-5 in the end. bfloat16: gradients are rounded twice, in the workspace and at the end, each by 2^-9.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 5e-3}
GRADIENTS = (0, 1, 2, 4)  # of Rows; the teacher's steps get none
PASSES = ("forward", "forward+backward")
# Grids that the options fall back to. On a GPU the largest shapes fit the fused paths only.
ON_CUDA: dict[str, tuple] = {
    "width": (1024, 4096),
    "queries": (64, 1024),
    "passages": (1024, 8192, 32768, 131072, 1048576),
    "dtype": ("bfloat16",),
}
ON_CPU: dict[str, tuple] = {"width": (256,), "queries": (64,), "passages": (1024, 4096, 16384), "dtype": ("float32",)}

HELP = f"""{__doc__}
Examples:
  python kernels/benchmarks/alignment.py                                   # a grid that suits the device
  python kernels/benchmarks/alignment.py --width 1024 --queries 1024 --passages 131072 --out rows.jsonl --plot rows.png
  python kernels/benchmarks/alignment.py --implementations eager_fp32 chunked --queries 1000 --passages 100000 \\
      --width 64 --memory-gib 15 --repeats 2
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured: every combination of the lists."""

    width: tuple[int, ...] | None = None
    """D, sizes of a row; unset: 1024 4096 on a GPU, 256 on a CPU."""
    queries: tuple[int, ...] | None = None
    """B; unset: 64 1024 on a GPU, 64 on a CPU."""
    passages: tuple[int, ...] | None = None
    """N; unset: 1024 to 1048576 on a GPU, to 16384 on a CPU."""
    steps: tuple[int, ...] = (3,)
    """K, latent steps."""
    dtype: tuple[str, ...] | None = None
    """Of the inputs; unset: bfloat16 on a GPU, float32 on a CPU."""
    implementations: tuple[str, ...] | None = None
    """Unset: all that the device can run."""
    world: int = 8
    """W: ranks whose rows the published scheme computes on each of them."""
    repeats: int | None = None
    """Timed calls; unset: 20 on a GPU, 4 on a CPU."""
    forward_only: bool = False
    """Leave the backward out."""
    memory_gib: float | None = None
    """What a process may take; unset: 0.9 of the GPU's free memory, 0.6 of the host's."""
    out: Path | None = None
    """JSON lines to append the rows to."""
    plot: Path | None = None
    """PNG to draw this run's rows in."""

    def validate(self) -> None:
        for name in ("width", "queries", "passages", "steps"):
            if any(value < 1 for value in getattr(self, name) or ()):
                raise UserError(f"--{name}: must be at least 1")
        if self.world < 1 or (self.repeats is not None and self.repeats < 1):
            raise UserError("--world and --repeats must be at least 1")
        for given, known, option in (
            (self.implementations, list(IMPLEMENTATIONS), "--implementations"),
            (self.dtype, ["float32", "bfloat16"], "--dtype"),
        ):
            if unknown := set(given or ()) - set(known):
                raise UserError(f"{option} {' '.join(sorted(unknown))}: choose from {', '.join(known)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    try:
        settings = tyro.cli(Settings, args=arguments, description=HELP)
        settings.validate()
        if settings.plot is not None:
            from plot import draw, require_matplotlib

            require_matplotlib()  # before an hour of measuring, not after
        rows, failures = run(settings)
        if settings.plot is not None and rows:
            draw(rows, settings.plot)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return int(bool(failures))


def run(settings: Settings) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, which are also printed and written as they come, and what went wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = ON_CUDA if device.type == "cuda" else ON_CPU
    chosen = settings.implementations or [
        name for name, how in IMPLEMENTATIONS.items() if device.type == "cuda" or not how.needs_cuda
    ]
    repeats = settings.repeats or (20 if device.type == "cuda" else 4)
    limit = int(settings.memory_gib * 2**30) if settings.memory_gib else available_bytes(device)
    rows: list[dict[str, Any]] = []
    failures: dict[str, None] = {}  # each once, in order
    print(_line("implementation", "pass", "shape", "p50 ms", "TFLOP/s", "x eager", "extra MiB", "error"), flush=True)
    for dtype in settings.dtype or default["dtype"]:
        for shape in _shapes(settings, default, getattr(torch, dtype).itemsize):
            found, failed = _turns(list(chosen), shape, dtype, settings, repeats, limit, device)
            for row in found:
                print(_describe(row), flush=True)
            append(found, settings.out)
            rows += found
            failures |= dict.fromkeys(failed)
    return rows, list(failures)


def _shapes(settings: Settings, default: dict[str, tuple], itemsize: int) -> Iterator[Shape]:
    for d in settings.width or default["width"]:
        for b in settings.queries or default["queries"]:
            for k in settings.steps:
                for n in settings.passages or default["passages"]:
                    yield Shape(B=b, N=n, D=d, K=k, W=settings.world, itemsize=itemsize)


def _turns(
    chosen: list[str], shape: Shape, dtype: str, settings: Settings, repeats: int, limit: int, device: torch.device
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one shape, and why implementations have none."""
    passes = PASSES[:1] if settings.forward_only else PASSES
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    not_run = {name: reason for name in chosen if (reason := _obstacle(name, shape, limit, device))}
    failures: dict[str, str] = {}
    for turn in range(min(2, repeats)):
        share = repeats // 2 if turn else (repeats + 1) // 2
        for name in chosen[:: -1 if turn else 1]:
            if name in not_run or name in failures:
                continue
            job = {"implementation": name, "shape": shape, "dtype": dtype, "repeats": share, "passes": passes}
            try:
                found = in_a_process(__file__, job)
            except Failed as failed:
                failures[name] = f"{name}, {dtype}, {_sizes(shape._asdict())}: {failed}"
                continue
            if "not_run" in found:
                not_run[name] = found["not_run"]
            outcomes[name].append(found)
    measured = {name: found for name, found in outcomes.items() if name not in not_run and name not in failures}
    rows = []
    for which in passes:
        eager = measured.get("eager_fp32")
        eager_s = times([found[which] for found in eager])["p50_s"] if eager else None
        for name in chosen:
            row = {
                **environment(device),
                "implementation": name,
                "pass": which,
                "dtype": dtype,
                **{key: value for key, value in shape._asdict().items() if key != "itemsize"},
            }
            if name in not_run:
                rows.append(row | {"not_run": not_run[name]})
            elif name in measured:
                rows.append(row | _figures(measured[name], which, shape, eager_s))
    return rows, list(failures.values())


def _figures(found: list[dict[str, Any]], which: str, shape: Shape, eager_s: float | None) -> dict[str, Any]:
    quantiles = times([outcome[which] for outcome in found])
    return {
        **quantiles,
        "tflops": useful_flops(shape, which) / quantiles["p50_s"] / 1e12,
        "speedup_over_eager_fp32": eager_s and eager_s / quantiles["p50_s"],
        "peak_extra_bytes": max(outcome[which]["extra_bytes"] for outcome in found),
        "gradient_bytes": found[0][which]["gradient_bytes"],
        "gate_error": found[0]["gate_error"],
        "gate_tolerance": found[0]["gate_tolerance"],
    }


def useful_flops(s: Shape, which: str) -> int:
    """Of this rank's B rows without recomputation, the same for every implementation whatever it does beside.

    Forward scores 2 sides of B outputs and B K steps: 2 (1 + K) products of 2 B N D. Backward has gradients of B
    outputs of both sides and of B K steps, 2 + K products, and as many into the passages. At K = 3: 16 and 20 B N D.
    """
    product = 2 * s.B * s.N * s.D
    return product * (2 * (1 + s.K) + (0 if which == "forward" else 2 * (2 + s.K)))


def _obstacle(name: str, shape: Shape, limit: int, device: torch.device) -> str | None:
    """Why an implementation is not run at a shape."""
    how = IMPLEMENTATIONS[name]
    if how.needs_cuda and device.type != "cuda":
        return "needs an NVIDIA GPU"
    if name == "all_rows" and shape.W * shape.B > shape.N:
        return f"{shape.W} ranks of {shape.B} queries have more than {shape.N} passages"
    needed = 2 * shape.rows_bytes + how.extra_bytes(shape)
    return None if needed <= limit else f"would take {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB"


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One implementation at one shape in this process: the gate, then times and memory of each pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how, shape, dtype = IMPLEMENTATIONS[job["implementation"]], Shape(*job["shape"]), getattr(torch, job["dtype"])
    everyone = job["implementation"] == "all_rows"
    try:
        error, tolerance = gate(how, shape, dtype, device, world=2 if everyone else 1)
        rows = make_rows(shape.B * (shape.W if everyone else 1), shape.N, shape.D, shape.K, dtype, device)
        found: dict[str, Any] = {"gate_error": error, "gate_tolerance": tolerance}
        for which in job["passes"]:
            found[which] = _measure(how, rows, shape.W, device, job["repeats"], backward=which != "forward")
        return found
    except torch.OutOfMemoryError as full:
        return {"not_run": f"out of memory: {str(full).splitlines()[0]}"}


def _measure(
    how: Implementation, rows: Rows, world: int, device: torch.device, repeats: int, *, backward: bool
) -> dict[str, Any]:
    leaves = [x.requires_grad_(backward) for i, x in enumerate(rows) if i in GRADIENTS]

    def call() -> None:
        loss = how.loss(rows, world)
        if backward:
            loss.backward()
            for x in leaves:
                x.grad = None

    measured = measure(call, device, repeats)
    gradient_bytes = sum(x.numel() * x.element_size() for x in leaves) if backward else 0
    # The peak need not hold all gradients at once, so the difference can be slightly too kind, but to all alike.
    extra_bytes = max(measured.extra_bytes - gradient_bytes, 0)
    return asdict(measured) | {"extra_bytes": extra_bytes, "gradient_bytes": gradient_bytes}


def gate(
    how: Implementation, shape: Shape, dtype: torch.dtype, device: torch.device, world: int
) -> tuple[float, float | None]:
    """The largest relative error of loss and gradients, and its tolerance. Raises Failed where it is above.

    D, K and the dtype are those of the measurement, since they choose the code path. An implementation with a `formula`
    is inexact by design: the formula has to be right in float64, the error of what is timed is only reported (None).
    """
    b = min(shape.B, 256 if device.type == "cuda" else 24)
    rows = make_rows(b * world, 1037, shape.D, shape.K, dtype, device)
    exact = Rows._make([*(x.double() for x in rows[:5]), rows.labels_B])
    expected = outcome(eager_fp32, exact, world, world)
    tolerance: float | None = TOLERANCE[dtype]
    with small_chunks():
        error = _error(outcome(how.loss, rows, world, world), expected)
        if how.formula is not None:
            formula = how.formula
            in_float64 = _error(outcome(lambda rows, _: formula(rows), exact, world, world), expected)
            _check(in_float64, TOLERANCE[torch.float64], "its formula in float64")
            return error, None
    _check(error, TOLERANCE[dtype], f"it in {str(dtype).removeprefix('torch.')}")
    return error, tolerance


def outcome(loss: Any, rows: Rows, world: int, parts: int) -> list[torch.Tensor]:
    """The loss, and its gradients of the first of `parts` equal parts of each input: this rank's."""
    leaves = Rows(*(x.clone().requires_grad_(i in GRADIENTS) for i, x in enumerate(rows)))
    value = loss(leaves, world)
    gradients = torch.autograd.grad(value, [leaves[i] for i in GRADIENTS])
    return [value.detach(), *(gradient[: len(gradient) // parts] for gradient in gradients)]


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """NaN, which no tolerance admits, where anything is."""
    errors = [((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]
    return torch.stack(errors).max().item()


def _check(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:  # so that NaN fails, too
        raise Failed(
            f"{what} is {error:.1e} off the float64 reference, more than {tolerance:.0e}: what computes something else "
            "is not compared, and has no row"
        )


def _describe(row: dict[str, Any]) -> str:
    start = (row["implementation"], row["pass"], _sizes(row) + f" {row['dtype']}")
    if "not_run" in row:
        return f"{_line(*start, '', '', '', '', '')[:94].rstrip()}  not run: {row['not_run']}"
    speedup = row["speedup_over_eager_fp32"]
    return _line(
        *start, f"{row['p50_s'] * 1e3:.2f}", f"{row['tflops']:.3g}", f"{speedup:.2f}" if speedup else "-",
        f"{row['peak_extra_bytes'] / 2**20:.0f}", f"{row['gate_error']:.0e}",
    )  # fmt: skip


def _sizes(row: dict[str, Any]) -> str:
    return " ".join(f"{name} {row[name]}" for name in "BNDK")


def _line(name: str, which: str, sizes: str, *figures: str) -> str:
    return f"{name:<12}{which:<18}{sizes:<44}" + "".join(f"{figure:>11}" for figure in figures)


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        answer(work)
    else:
        sys.exit(main())
