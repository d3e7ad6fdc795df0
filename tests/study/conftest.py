"""A study whose cells are not trained: what they would leave behind is written in their place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from laser_dist.files import write_json
from laser_dist.retrieval.evaluation import significance
from laser_dist.study.cells import Workspace, digest
from laser_dist.study.data import Prepared
from laser_dist.study.reading import read_study
from laser_dist.study.running import Runner

QUERIES = [f"q{i}" for i in range(12)]
TEXT = """
title = "A study"
seeds = [0, 1]
baseline = "contrastive"
reference = "laser"
[base]
model = { name = "m" }
train = { max_steps = 3 }
[datasets.d]
licence = "CC0"
[grid]
optimizer.learning_rate = [1e-4, 2e-4]
[methods.contrastive]
[methods.laser]
[methods.both-views]
ablation = true
point_of = "laser"
[methods.offline-teacher]
ablation = true
point_of = "laser"
teacher = "both-views"
[tests.six]
steps = 6
methods = ["laser"]
[tests.oracle]
rationale = "oracle"
view = "explicit"
methods = ["laser"]
[tests.rewritten]
title = "rewrite-then-retrieve"
rationale = "generated"
methods = ["contrastive"]
"""


class Pretended:
    """Stands in for a cell's processes; `calls` is what they were asked to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: Callable[[str], Exception | None] = lambda call: None

    def __call__(self, runner: Runner, cell, stage: str, command: list[str]) -> None:
        call = f"{stage} {cell.name}"
        self.calls.append(call)
        if error := self.fail(call):
            raise error
        if stage == "training":
            checkpoints = cell.run / "checkpoints"
            (checkpoints / "step-000003").mkdir(parents=True, exist_ok=True)
            (checkpoints / "latest").write_text("step-000003")
            rows = [{"step": s, "loss/infonce_latent": 3.0 / s, "time/forward": 0.5} for s in (1, 2, 3)]
            rows.append({"step": 3, "dev/ndcg@10": 0.4})
            (cell.run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return
        job = json.loads((cell.folder / "measure.json").read_text())
        out = Path(job["out"])
        results = json.loads(out.read_text()) if out.is_file() else {"key": job["key"], "measured": {}}
        for task in job["tasks"]:
            name = f"{task['split']}/{task['test']['name']}"
            results["measured"][name] = {"key": task["key"], **self.found(cell, name)}
        write_json(out, results)  # whole, as the real one writes it: other parts of the study read it meanwhile

    def found(self, cell, name: str) -> dict:
        """Values from a hash: alike every time; the higher learning rate is better on dev, LaSER than contrastive."""
        level = {"contrastive": 0.3, "laser": 0.5}.get(cell.method, 0.4) + 1e2 * cell.config.optimizer.learning_rate
        level += 0.1 * ("oracle" in name)
        chance = {q: int(digest([cell.name, name, q])[:4], 16) / 65536 for q in QUERIES}
        per_query = {q: dict.fromkeys(METRICS, level + 0.05 * chance[q]) for q in QUERIES}
        means = dict.fromkeys(METRICS, sum(row["ndcg@10"] for row in per_query.values()) / len(QUERIES))
        seconds = 0.01 + 0.5 * ("rewritten" in name)
        found = {"metrics": means, "per_query": per_query, "seconds_per_query": seconds}
        # Seed 0 of contrastive was measured before there was such a value.
        return found | ({} if "contrastive" in cell.name and "seed-0" in cell.name else {"recall_unshared": level})


METRICS = ("ndcg@10", "recall@10", "recall@100", "mrr@10")


@pytest.fixture
def pretended(monkeypatch) -> Pretended:
    return pretend(monkeypatch)


def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    stub = Pretended()
    monkeypatch.setattr(Runner, "_call", lambda self, *args: stub(self, *args))
    monkeypatch.setattr(significance, "_RESAMPLES", 500)
    return stub


@pytest.fixture
def text() -> str:
    return TEXT


@pytest.fixture
def make(tmp_path) -> Callable[..., Workspace]:
    return lambda text=TEXT, rows="rows": workspace_in(tmp_path, text, rows)


def workspace_in(folder: Path, text: str = TEXT, rows: str = "rows") -> Workspace:
    """The study of this text; `rows` stands for the content of the training data."""
    (folder / "s.toml").write_text(text)
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "manifest.json").touch()
    files = (folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels.tsv")
    hashes = {"train": rows, "dev": "d", "test": "t"}
    data = Prepared(folder / "shards", {"dev": files, "test": files}, hashes, None)
    study = read_study(folder / "s.toml")
    return Workspace(study, folder / "out", dict.fromkeys(study.datasets, data), "")


@pytest.fixture
def go() -> Callable[..., list[str]]:
    """Run a whole study; what was said."""
    return run_all


def run_all(workspace: Workspace, jobs: int = 1) -> list[str]:
    said: list[str] = []
    names = ["bm25", "untrained", *(method.name for method in workspace.study.ordered())]
    groups = [(dataset, name) for dataset in workspace.study.datasets for name in names]
    Runner(workspace, said.append, jobs).run(groups)
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workspace:
    """All cells of the study, pretended; for tests that only read them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        workspace = workspace_in(tmp_path_factory.mktemp("finished"))
        run_all(workspace)
    return workspace
