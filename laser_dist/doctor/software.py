"""Versions: of Python, of what laser_dist requires, and of what a machine adds to them."""

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from laser_dist.doctor.finding import Context, Finding, failed, ok, skipped, warning

_INSTALL = "run launchers/setup.sh, or pip install --upgrade laser-dist"
_MAIN = ("torch", "deepspeed", "transformers")
_SILENT = {
    "CUDA_LAUNCH_BLOCKING": ("1", "runs every kernel alone, which is slow: unset it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "makes a rank wait for ever for one that died: unset it"),
    "NCCL_ASYNC_ERROR_HANDLING": ("0", "makes a rank wait for ever for one that died: unset it"),
    "NCCL_P2P_DISABLE": ("1", "keeps GPUs from talking directly, which is slow: unset it unless it cures a hang"),
    "NCCL_IB_DISABLE": ("1", "keeps hosts from using InfiniBand, which is slow: unset it unless it cures a hang"),
    "TRITON_INTERPRET": ("1", "runs kernels in an interpreter, some thousand times slower: unset it"),
    "WDS_SECURE": ("0", "lets shards run code where webdataset is used directly: unset it"),
}


def python(_: Context) -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11):
        return failed(found, "laser_dist needs Python 3.11 or newer: launchers/setup.sh finds one, or install it")
    return ok(found)


def torch(_: Context) -> Finding:
    return _one("torch")


def deepspeed(_: Context) -> Finding:
    return _one("deepspeed")


def transformers(_: Context) -> Finding:
    return _one("transformers")


def packages(_: Context) -> Finding:
    """Everything else that laser_dist requires, without extras."""
    wrong, good = [], 0
    requirements = _requirements()
    if not requirements:
        return skipped("laser_dist was not installed as a package, so that nobody says what it requires")
    for name, wanted in requirements.items():
        if name not in _MAIN:
            version = _version(name)
            if version is None or not _fits(version, wanted):
                wrong.append(f"{name} {version or 'is missing'} (wanted: {wanted or 'any'})")
            good += 1
    if wrong:
        return failed(", ".join(wrong), _INSTALL)
    return ok(f"{good} other requirements are met")


def kernels(context: Context) -> Finding:
    """The losses' package is there, and its fast path agrees with its reference (compared in the loopback)."""
    error = context.facts.get("kernels_error")
    if "kernels_difference" in context.facts:
        difference = float(str(context.facts["kernels_difference"]))
        if difference > 1e-4:
            return failed(f"the loss and its reference differ by {difference:.1e}", f"another torch? {_INSTALL}")
        return ok(f"laser_kernels agrees with its reference to {difference:.0e}")
    if error:
        return failed(f"laser_kernels: {error}", f"{_INSTALL}; in a checkout put kernels/ on PYTHONPATH")
    return skipped("the loopback did not get that far")


def gpu(context: Context) -> Finding:
    devices = context.facts.get("gpus")
    has_device_file = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if devices:
        return ok(f"{devices}, CUDA {context.facts.get('cuda')}, bfloat16: {context.facts.get('bf16')}")
    if has_device_file:
        said = context.facts.get("gpu_error") or "torch sees no GPU"
        remedy = "install a torch that is built for this driver's CUDA (nvidia-smi names it): pip install torch"
        return failed(f"there is an NVIDIA GPU, but {said} (CUDA of torch: {context.facts.get('cuda')})", remedy)
    return skipped("no NVIDIA GPU on this machine: training runs on the CPU with gloo")


def triton(context: Context) -> Finding:
    version = _version("triton")
    if version:
        return ok(version)
    if context.facts.get("gpus"):
        return failed("missing", "the losses' kernels need it on a GPU: pip install 'laser-dist[kernels]'")
    return skipped("not installed; only GPUs need it")


def compiler(_: Context) -> Finding:
    """DeepSpeed compiles a helper for CPU ranks, and its offload, at their first use."""
    found = [name for name in (os.environ.get("CXX", ""), "g++", "clang++") if name and shutil.which(name)]
    if not found:
        return warning(
            "no C++ compiler",
            "CPU offload and the faster CPU collectives are compiled at first use: apt install g++ (or a module)",
        )
    ninja = shutil.which("ninja") or _version("ninja")
    return ok(f"{found[0]}{'' if ninja else ', without ninja: compiling takes longer'}")


def environment(_: Context) -> Finding:
    """Variables that were set once and forgotten."""
    wrong = {f"{n}={v}": f"{n} {why}" for n, (v, why) in _SILENT.items() if os.environ.get(n) == v}
    for name in ("RANK", "WORLD_SIZE"):
        if (value := os.environ.get(name)) is not None:
            wrong[f"{name}={value}"] = f"{name} makes a command that is run by hand wait for other ranks: unset it"
    if wrong:
        return warning(", ".join(wrong), "; ".join(wrong.values()))
    return ok("none of the variables that slow a run down or make it hang is set")


def exported_secrets(_: Context) -> Finding:
    """What .deepspeed_env hands to other hosts shows in their process lists."""
    from laser_dist.errors import UserError
    from laser_dist.launch.environment import own_lines

    try:
        names = [name for name, _ in own_lines()]
    except UserError as error:
        return failed(str(error), "write NAME=value lines, without export")
    secret = [name for name in names if any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "_KEY"))]
    if secret:
        remedy = "whoever can list processes on a host reads them: keep them in ~/.netrc, ~/.aws or `hf auth login`"
        return warning(f".deepspeed_env hands {', '.join(secret)} to all hosts", remedy)
    return ok(f".deepspeed_env hands over {', '.join(names)}" if names else "no .deepspeed_env, no secret handed over")


def _one(name: str) -> Finding:
    version, wanted = _version(name), _requirements().get(name, "")
    if version is None:
        return failed("missing", _INSTALL)
    if not _fits(version, wanted):
        return failed(f"{version}, wanted: {wanted}", f"pip install '{name}{wanted}'")
    return ok(version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """Package -> versions that the installed laser-dist asks for, extras aside."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("laser-dist") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {r.name: str(r.specifier) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)
