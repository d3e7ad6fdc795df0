"""No line of ours unpickles, evaluates or hands text to a shell, nor reads a file of others without bounds.

What is allowed stands here with its reason; anything else that is found fails.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for top in ("laser_dist", "kernels/laser_kernels") for path in (ROOT / top).rglob("*.py"))
OURS = "what this package has written itself, a moment ago or in a file of its own"

ALLOWED = {
    "import pickle": {
        "laser_dist/distributed/pickles.py": "the type of torch's error; nothing is loaded with it",
        "laser_dist/testing/distributed.py": "between a test and the processes it starts",
        "laser_dist/testing/hostile.py": "makes the bombs of tests/hostile",
    },
    "tarfile.open that unpacks": {"laser_dist/doctor/decoding.py": "writes the archive that must be refused"},
    "os.system": {"laser_dist/testing/hostile.py": "what the bombs would call"},
    "trust_remote_code=True": {"laser_dist/bench/encode.py": "an export of ours, made for the comparison"},
    "json.loads": {
        "laser_dist/data/annotation/journal.py": f"lines that decode_json has read before; {OURS}",
        "laser_dist/data/mining/task.py": OURS,
        "laser_dist/data/preparation/convert.py": OURS,
        "laser_dist/data/preparation/dev.py": OURS,
        "laser_dist/data/preparation/partial.py": OURS,
        "laser_dist/doctor/network.py": "between a process and the ones it starts",
        "laser_dist/guard/dump.py": "values that are no numbers are what it is about; the file is read in bounds",
        "laser_dist/launch/attempt.py": OURS,
        "laser_dist/run_page/read.py": f"{OURS}; what is no number is shown as such",
        "laser_dist/watch/pulse.py": OURS,
        "laser_dist/watch/verdict.py": OURS,
        **dict.fromkeys((f"laser_dist/study/{name}.py" for name in ("cells", "measure", "rewriting")), OURS),
        "laser_dist/observability/profiler.py": OURS,
        "laser_dist/planning/recipe.py": "a file of ds_configs/, which ds_config has checked",
        "laser_dist/retrieval/evaluation/benchmark.py": OURS,
        "laser_dist/retrieval/evaluation/mteb_adapter.py": "a file of this package",
        "laser_dist/retrieval/evaluation/tasks.py": "what mteb has written a moment ago",
        "laser_dist/retrieval/exporting/formats.py": OURS,
        "laser_dist/retrieval/exporting/modeling_laser.py": "stands alone in exports, whose code is trusted by then",
        "laser_dist/retrieval/workers.py": "between a process and the ones it starts",
        "laser_dist/testing/commands.py": "between a process and the ones it starts",
        **dict.fromkeys(
            (
                f"laser_dist/bench/{name}.py"
                for name in (
                    "chunks",
                    "corpus",
                    "encode",
                    "reliability",
                    "resume",
                    "soak/judge",
                    "soak/rank",
                    "soak/run",
                    "step",
                    "synthetic",
                    "faults/rank",
                    "faults/run",
                    "guard",
                    "killed_runs",
                    "nursery",
                    "saving_ranks",
                )
            ),
            "between a process and the ones it starts, and the embedded sample",
        ),
        "laser_dist/bench/latency_variants.py": OURS,
    },
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "commands.getoutput"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNPACKERS = {"extractall", "unpack_archive"}
LOADERS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def found(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(what, line) of everything in a file that must be allowed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((f"import {name}", node.lineno) for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in SHELLS:
            yield ast.unparse(node), node.lineno
        if isinstance(node, ast.Call):
            yield from ((what, node.lineno) for what in found_in_call(node))


def found_in_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    values = {arg: value.value for arg, value in given.items() if isinstance(value, ast.Constant)}
    if name in BUILTINS:
        yield name
    if name.rpartition(".")[2] in UNPACKERS:
        yield name.rpartition(".")[2]
    if name in LOADERS and values.get(LOADERS[name][0]) is not LOADERS[name][1]:
        yield f"{name} without {'='.join(map(str, LOADERS[name]))}"
    for flag in ("shell", "trust_remote_code"):
        if values.get(flag) is True:
            yield f"{flag}=True"
    if name == "tarfile.open" and values.get("mode") not in ("r:", "a:"):
        yield "tarfile.open that unpacks"
    if name in ("json.loads", "json.load") and not (call.args and ast.unparse(call.args[0]).startswith("json.dumps(")):
        yield "json.loads"


def test_only_what_is_allowed():
    refused = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        met = found(ast.parse(path.read_text(encoding="utf-8")))
        refused += [f"{name}:{line}: {what}" for what, line in met if name not in ALLOWED.get(what, {})]
    told = "use laser_dist.reading, safe_load and the like, or allow it with a reason"
    assert not refused, "\n".join([*refused, told])


def test_nothing_is_allowed_that_is_gone():
    known = {path.relative_to(ROOT).as_posix(): path for path in SOURCES}
    for what, files in ALLOWED.items():
        for name in files:
            assert what in dict(found(ast.parse(known[name].read_text(encoding="utf-8")))), (what, name)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "import pickle"),
        ("from yaml import load", "import yaml"),
        ("eval('1')", "eval"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("f = os.system", "os.system"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("tarfile.open(path)", "tarfile.open that unpacks"),
        ("archive.extractall(path)", "extractall"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("json.loads(path.read_text())", "json.loads"),
    ],
)
def test_the_search_finds(code, what):
    assert what in dict(found(ast.parse(code)))
