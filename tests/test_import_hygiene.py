"""Imports run one way, `kernels/` stays a plain folder, and help is instant."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for top in ("laser_dist", "kernels/laser_kernels") for path in (ROOT / top).rglob("*.py"))
LOWER = ("laser_dist/model/", "laser_dist/objective/", "kernels/laser_kernels/")
UPPER = (
    "laser_dist.train",
    "laser_dist.trainer",
    "laser_dist.cli",
    "laser_dist.quickstart",
    "laser_dist.retrieval",
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function, except for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, base] if base else package)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        pending += ast.iter_child_nodes(node)
    return names


def importers(*modules: str) -> set[str]:
    """Files of ours that import one of these modules, or a part of one."""
    dotted = tuple(f"{module}." for module in modules)
    return {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name in modules or name.startswith(dotted) for name in imports(path))
    }


def run(code: str, cwd: Path, *flags: str) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_not_a_package():
    # `kernels` is a package on PyPI, which transformers imports; one of ours on the path would stand in for it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("conftest.py", "tests/__init__.py"):  # pytest would then put the root on the path
        assert not (ROOT / name).exists()
    origin = run("import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)", ROOT)
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")


def test_packages_import_from_anywhere(tmp_path):
    run("import laser_dist, laser_kernels", tmp_path)


@pytest.mark.parametrize(
    "module, allowed",
    [
        ("deepspeed", {f"laser_dist/distributed/{name}.py" for name in ("engine", "pickles", "universal")}),
        ("webdataset", None),
        ("triton", None),
    ],
)
def test_only_its_owner_imports(module, allowed):
    found = importers(module)
    if allowed is None:
        folder = {"webdataset": "laser_dist/data/", "triton": "kernels/laser_kernels/"}[module]
        found = {path for path in found if not path.startswith(folder)}
    assert found <= (allowed or set())


def test_lower_layers_do_not_import_upper_ones():
    assert not {path for path in importers(*UPPER) if path.startswith(LOWER)}


def test_kernels_stand_alone():
    assert not {path for path in importers("laser_dist") if path.startswith("kernels/")}


def test_config_and_errors_are_at_the_bottom():
    ours = {name for file in ("config.py", "errors.py", "batch.py") for name in imports(ROOT / "laser_dist" / file)}
    assert {name for name in ours if name.startswith("laser_dist")} <= {
        "laser_dist.errors",
        "laser_dist.errors.UserError",
        "laser_dist.errors.suggest",
        # At the bottom too: how files are read, and what may stand in messages.
        "laser_dist.redaction",
        "laser_dist.redaction.check_address",
        "laser_dist.redaction.find_secret",
    }


def test_help_is_instant_and_imports_nothing_heavy():
    code = (
        "import sys; from laser_dist.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'transformers', 'deepspeed', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    seconds = []  # of its own, whatever else the machine does
    for _ in range(2):  # the first writes byte code
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = run(code, ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1
    assert told.startswith("usage: laser-dist COMMAND") and told.endswith("[]")


@pytest.mark.parametrize(
    "command",
    [["inspect", "no-shards"], ["export", "no-run", "--out", "e"], ["replay", "no-dump"], ["report", "no-run"]],
)
def test_a_mistyped_path_is_answered_before_anything_heavy_is_imported(command, tmp_path):
    """Each of them once took seconds of importing torch to say that a folder is not there."""
    code = (
        f"import sys; from laser_dist.cli import main; assert main({command}) == 2; "
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    assert run(code, tmp_path).endswith("[]")
