"""A study's report: report.md with its charts, results.csv, HParams for TensorBoard; made of stored runs only."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from laser_dist.files import replacing
from laser_dist.retrieval.evaluation.significance import Comparison
from laser_dist.retrieval.metrics import METRICS
from laser_dist.study.cells import FAILED, FINISHED
from laser_dist.study.collect import Results, spread_of
from laser_dist.study.definition import OWN, flat

READING = """\
Values are means over the test queries, ± the standard deviation over seeds (n − 1). The change and its 95 % interval
(paired bootstrap over queries) and p (paired randomisation test, two-sided, with Holm's correction for the rows of a
table) compare with {baseline}, where a table names no other method, query by query, after averaging each query over the
seeds that both have: they speak of other queries, not of other seeds. Test queries took part in no choice. "No word
shared" is recall@100 of those relevant passages that share no word with their query, stop words and endings aside: no
keyword search finds them."""


def write_report(results: Results, out: Path) -> Path:
    """Write everything into `out`; returns report.md. Charts whose data is not there are left out."""
    from laser_dist.study.figures import draw_all
    from laser_dist.study.hparams import write_hparams

    out.mkdir(parents=True, exist_ok=True)
    charts = draw_all(results, out)
    write_hparams(results, out / "tensorboard")
    _write(out / "results.csv", _csv(results.table()))
    _write(out / "report.md", report(results, charts))
    return out / "report.md"


def report(results: Results, charts: dict[str, str]) -> str:
    """The report as Markdown; `charts`: file name -> caption."""
    study = results.study
    parts = [f"# {study.title or study.name}", study.notes.strip(), _setting(results), _progress(results)]
    for dataset in study.datasets:
        parts += [f"## {dataset}", _main_table(results, dataset), _reference(results, dataset)]
        parts += [_ablations(results, dataset), _tests(results, dataset), _gap(results, dataset)]
    parts += [READING.format(baseline=results.label(results.baseline))]
    if charts:
        parts += ["## Charts", *(f"![{caption}]({name})\n\n{caption}" for name, caption in charts.items())]
    parts += [_choices(results), _failures(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Numbers to the right, the first column to the left."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _setting(results: Results) -> str:
    study, rows = results.study, []
    for dataset in study.datasets.values():
        found = [e for e in results.entries.values() if e.dataset == dataset.name]
        queries = len(found[0].runs[0]["per_query"]) if found else "?"
        rows.append((dataset.name, str(queries), dataset.licence or "not stated"))
    method = study.methods[results.baseline]
    config = study.config(method, study.points(method)[0])
    model = config.model
    kind = f"LoRA rank {model.lora_rank}" if model.lora_rank else "all weights"
    name = Path(model.name or results.workspace.model).name
    kept = f", its first {model.layers} layers" if model.layers else ""
    batch = config.train.queries_per_rank * config.train.accumulation * study.processes
    negatives = f"{config.data.negatives} hard negative{'s' * (config.data.negatives != 1)}"
    said = (
        f"Backbone {name}{kept}, {kind}, {model.dtype}. {config.train.max_steps} steps of {batch} queries with "
        f"{negatives} each, where a method does not say otherwise; seeds "
        f"{', '.join(map(str, study.seeds))}."
    )
    said += f" Measured in {study.encode_dtype}." if study.encode_dtype else ""
    return said + "\n\n" + markdown_table(("dataset", "test queries", "licence"), rows)


def _progress(results: Results) -> str:
    counts = {state: count for state, count in results.counts().items() if count and state != FINISHED}
    if not counts:
        return f"All {len(results.rows)} cells are finished."
    left = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"**Not complete:** of {len(results.rows)} cells {left}. What is shown is of the others."


def _main_table(results: Results, dataset: str) -> str:
    rows = [_row(results, dataset, name, test) for name, test in results.listed()]
    head = ("method", *METRICS, "no word shared", f"change in {results.study.metric}", "p", "seeds", "s per step")
    return markdown_table(head, rows)


def _row(results: Results, dataset: str, name: str, test: str) -> list[str]:
    entry, label = results.entry(dataset, name, test), results.title(name, test)
    failed = [r for r in results.rows if (r.cell.dataset, r.cell.method, r.state) == (dataset, name, FAILED)]
    if entry is None:
        return [label, "failed" if failed else "not run", *[""] * (len(METRICS) + 4)]
    change = p = ""
    if found := results.against_baseline.get((dataset, name, test)):
        comparison, corrected = found
        change, p = change_of(comparison), _p(corrected)
    count = "–"
    if name in results.study.methods:
        wanted = len(results.study.seeds_of(results.study.methods[name]))
        count = f"{len(entry.runs)}" + (f" of {wanted}" if len(entry.runs) < wanted else "")
    steps = results.seconds_per_step(dataset, name)
    values = [value_of(entry.mean(m), entry.spread(m)) for m in METRICS]
    values.append(value_of(mean(entry.unshared), spread_of(entry.unshared)) if entry.unshared else "–")
    return [label, *values, change, p, count, f"{steps:.2f}" if steps else "–"]


def _reference(results: Results, dataset: str) -> str:
    """The method that the study is about, against every row of the table of methods."""
    rows = [
        (results.title(*pair), change_of(comparison), f"{comparison.wins} / {comparison.losses}", _p(corrected))
        for pair, (comparison, corrected) in results.of_reference(dataset).items()
    ]
    if not rows:
        return ""
    head = (f"{results.label(results.study.reference)} against", results.study.metric, "queries better / worse", "p")
    return markdown_table(head, rows)


def _ablations(results: Results, dataset: str) -> str:
    methods, metric = results.methods(ablation=True), results.study.metric
    if not methods:
        return ""
    reference = results.study.reference or results.baseline
    rows = []
    for name in (reference, *(method.name for method in methods)):
        entry = results.entry(dataset, name)
        found = results.compare((dataset, reference), (dataset, name)) if name != reference else None
        value = value_of(entry.mean(metric), entry.spread(metric)) if entry else "not there"
        change = change_of(found) if found else ""
        rows.append((results.label(name), value, change, _p(found.p_randomisation) if found else ""))
    head = ("ablation", metric, f"change from {results.label(reference)}", "p, not corrected")
    return "### Ablations\n\n" + markdown_table(head, rows)


def _tests(results: Results, dataset: str) -> str:
    metric, rows = results.study.metric, []
    for (where, method, test), entry in results.entries.items():
        if where != dataset or test == OWN.name:
            continue
        found = results.compare((dataset, method), (dataset, method), (OWN.name, test))
        change = change_of(found) if found else ""
        cost = f"{1000 * entry.seconds:.0f}" if entry.seconds else ""
        rows.append((entry.label, test, value_of(entry.mean(metric), entry.spread(metric)), change, cost))
    head = ("method", "asked", metric, "change from as trained", "ms per query")
    return "### Asked otherwise\n\n" + markdown_table(head, rows) if rows else ""


def _gap(results: Results, dataset: str) -> str:
    """How much of the way from the baseline to the view that reads the written rationale a method goes without it."""
    study, base, lines = results.study, results.entry(dataset, results.baseline), []
    oracles = [t.name for t in study.tests.values() if t.rationale == "oracle" and t.view == "explicit"]
    for method in study.methods.values():
        own = results.entry(dataset, method.name)
        for test in oracles:
            oracle = results.entry(dataset, method.name, test)
            if not (base and own and oracle) or method.name == results.baseline:
                continue
            low, mine, high = (entry.mean(study.metric) for entry in (base, own, oracle))
            if high > low:
                lines.append(
                    f"{method.label}: its explicit view, which reads the written rationale, has {study.metric} "
                    f"{high:.3f}; {base.label} {low:.3f}. Its latent view, with {mine:.3f}, goes "
                    f"{(mine - low) / (high - low):.0%} of that way."
                )
    return "\n\n".join(lines)


def _choices(results: Results) -> str:
    study, rows = results.study, []
    for dataset in study.datasets:
        for method in study.methods.values():
            made = results.choice(dataset, method.name)
            for tried in made.get("tried", ()):
                is_best = tried["point"] == flat(made["point"])
                point = ", ".join(f"{key} = {value}" for key, value in tried["point"].items())
                score = f"{tried['score']:.3f}"
                rows.append((dataset, method.label, f"**{point}**" if is_best else point, score))
    if not rows:
        return ""
    said = f"One run per point, with seed {study.seeds[0]}; the same number of points for every method that chooses."
    return "## Chosen on dev\n\n" + said + "\n\n" + markdown_table(("dataset", "method", "values", "dev"), rows)


def _failures(results: Results) -> str:
    failed = [row for row in results.rows if row.state == FAILED]
    if not failed:
        return ""
    lines = [f"- `{row.name}`, {row.failure['stage']}: {row.failure['line']}" for row in failed]
    return "## Failed\n\n" + "\n".join(lines)


def change_of(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{comparison.difference:+.3f} ({low:+.3f} … {high:+.3f})"


def value_of(mean: float, spread: float | None) -> str:
    return f"{mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
