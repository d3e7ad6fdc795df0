"""What the Triton kernels take of a Hopper multiprocessor, found by compiling them ahead of time: no GPU is needed.

    python kernels/benchmarks/resources.py                       # a table on the screen
    python kernels/benchmarks/resources.py --out resources.json  # and the rows, with versions and date

Per variant: registers a thread, bytes spilled to memory, shared memory, and whether the tensor cores' own instruction
(wgmma) is used. Spills or a compile error end with exit code 1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Interpreted functions cannot be compiled, and Triton decides which they are when they are defined.
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
import tyro  # noqa: E402
from laser_kernels import latent_attention_triton, pair_triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024  # bytes a block of an H100 or H200 may use
POINTERS = {
    "rows_ptr": None, "partners_ptr": None, "passages_ptr": None, "labels_ptr": "i32", "query_keys_ptr": "i32",
    "keys_ptr": "i32", "own_ptr": "fp32", "scales_ptr": "fp32", "shifts_ptr": "fp32",
    "levels_ptr": "fp32", "coefficients_ptr": "fp32", "own_gradients_ptr": "fp32",
}  # fmt: skip
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel; the defaults are training's: a teacher, ids, D a multiple of the tile's depth."""

    kernel: str
    dtype: torch.dtype = torch.bfloat16
    pairs: int = 4096
    has_partners: bool = True
    has_keys: bool = True
    has_margin: bool = False
    two_temperatures: bool = False
    running_shift: bool = False
    even_depth: bool = True

    @property
    def name(self) -> str:
        flags = ("has_margin", "two_temperatures", "running_shift")
        notes = [flag.removeprefix("has_").replace("_", " ") for flag in flags if getattr(self, flag)]
        notes += [] if self.has_partners else ["no teacher"]
        notes += [] if self.has_keys else ["no keys"]
        notes += [] if self.even_depth else ["ragged D"]
        return ", ".join([f"{self.kernel}, {DTYPES[self.dtype]}, P {self.pairs}", *notes])


@dataclass(frozen=True)
class Resources:
    """What the assembler reports; registers are per thread, bytes of shared memory per program."""

    variant: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: bool


def variants() -> list[Variant]:
    found = []
    for kernel in ("statistics", "score_gradients"):
        found += [Variant(kernel, dtype, pairs) for dtype in DTYPES for pairs in (64, 4096)]
        found += [Variant(kernel, **{flag: True}) for flag in ("has_margin", "two_temperatures")]
        found += [
            Variant(kernel, has_partners=False),
            Variant(kernel, even_depth=False),
            Variant(kernel, has_keys=False),
        ]
        found += [Variant(kernel, torch.float32, has_margin=True)]
        found += [Variant(kernel, has_margin=True, two_temperatures=True, running_shift=True, even_depth=False)]
    return [
        *found,
        Variant("statistics", running_shift=True),
        Variant("statistics", running_shift=True, two_temperatures=True),
    ]


def compile_variant(v: Variant) -> Resources:
    """Compile for sm_90 and read the assembler's report from the binary. Raises what Triton raises."""
    kernel: Any = getattr(pair_triton, f"_{v.kernel}_kernel")
    t = pair_triton.tile(v.dtype, v.pairs, crowded=v.has_margin or v.two_temperatures)
    options = {
        "RUNNING_SHIFT": v.running_shift, "HAS_TEACHER": v.has_partners, "HAS_PARTNERS": v.has_partners,
        "HAS_KEYS": v.has_keys, "HAS_MARGIN": v.has_margin, "TWO_TEMPERATURES": v.two_temperatures,
        "EVEN_DEPTH": v.even_depth,
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32", "WIDEN": False,
        "BLOCK_P": t.pairs, "BLOCK_N": t.columns, "BLOCK_D": t.depth,
    }  # fmt: skip
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        aligned = True
        if name in options:
            signature[name] = "constexpr"
            aligned = False
        elif name in POINTERS:
            signature[name] = f"*{POINTERS[name] or DTYPES[v.dtype]}"
        elif name == "out_ptr":
            signature[name] = "*fp32" if v.kernel == "statistics" else f"*{DTYPES[v.dtype]}"
        elif name == "margin":
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32"
            # What a launch finds to be a multiple of 16: sizes of vectors and workspaces are, counts need not be.
            aligned = name in ("stride_passages", "stride_out", "D")
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return _compile(kernel, signature, options, attributes, v.name, f"{t.pairs}x{t.columns}x{t.depth}", t)


def compile_latent_attention(direction: str, dtype: torch.dtype, group: int, head_size: int) -> Resources:
    """As `compile_variant`, for the latent step's attention; `group`: query heads that share keys and values."""
    kernel: Any = getattr(latent_attention_triton, f"_{direction}_kernel")
    t = latent_attention_triton.tile(group, 8, head_size)
    options = {
        "GROUP": group, "HEAD": head_size, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "WIDEN": False,
        "TOKENS": t.tokens, "QUERIES": t.queries, "SOFT": t.soft, "DEPTH": t.depth,
    }  # fmt: skip
    kinds = {"scale": "fp32", "G": "i32", "J": "i32", "logsumexp_ptr": "*fp32"}
    kinds |= dict.fromkeys(("starts_ptr", "lengths_ptr"), "*i64")
    signature = {
        name: "constexpr" if name in options else kinds.get(name, f"*{DTYPES[dtype]}") for name in kernel.arg_names
    }
    pointers = [position for position, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    attributes = {(position,): [["tt.divisibility", 16]] for position in pointers}
    name = f"latent attention {direction}, {DTYPES[dtype]}, {group} queries a head of {head_size}"
    return _compile(kernel, signature, options, attributes, name, f"{t.tokens}x{t.queries}x{t.depth}", t)


def _compile(kernel: Any, signature: dict, options: dict, attributes: dict, name: str, size: str, t: Any) -> Resources:
    constants = {argument: options[argument] for argument in kernel.arg_names if argument in options}
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    launch = {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGET, options=launch)
    registers, stack = _assembler_report(compiled.asm["cubin"])
    return Resources(
        name, size, t.warps, t.stages, registers, stack, compiled.metadata.shared, "wgmma" in compiled.asm["ptx"]
    )


def _assembler_report(binary: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which is where spills go."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dict(re.findall(r"(REG|STACK):(\d+)", report))
    return int(values["REG"]), int(values["STACK"])


@dataclass(frozen=True)
class Settings:
    """Options of the command."""

    out: Path | None = None
    """JSON file to write."""


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    rows = [compile_variant(v) for v in variants()]
    rows += [
        compile_latent_attention(direction, dtype, group, head_size)
        for direction in ("forward", "backward")
        for dtype, group, head_size in ((torch.bfloat16, 2, 128), (torch.float16, 4, 128), (torch.bfloat16, 8, 64))
    ]
    for row in rows:
        print(
            f"{row.variant:<80} {row.tile:>10}, {row.warps} warps, {row.registers:>3} registers, "
            f"{row.spilled_bytes} B spilled, {row.shared_bytes / 1024:.0f} KiB shared{', wgmma' if row.wgmma else ''}"
        )
    if settings.out is not None:
        table = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "target": "sm_90",
            "triton": triton.__version__,
            "rows": [asdict(row) for row in rows],
        }
        settings.out.write_text(json.dumps(table, indent=1) + "\n")
    return int(any(row.spilled_bytes or row.shared_bytes > SHARED_LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
