"""`laser-dist plan --scaling`: how a step's cost grows from 1 to 1024 GPUs, modelled, with the bottleneck at each size.

Queries per GPU stay the same, so that compute per GPU does too, and the softmax, the passages that travel and the loss
grow with the number of GPUs.
"""

import csv
import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from laser_dist.errors import require
from laser_dist.planning.communication import transfers
from laser_dist.planning.job import GIB, Job
from laser_dist.planning.options import Option, fastest, nearest, options_of

if TYPE_CHECKING:
    from laser_dist.planning.cli import Settings

LARGEST = 1024


def sizes(job: Job) -> list[Job]:
    """The job on 1, 2, 4, ... 1024 GPUs: one node up to its size, then more of them."""
    per_node = job.gpus
    counts = [2**i for i in range(LARGEST.bit_length())]
    return [replace(job, gpus=min(w, per_node), nodes=max(1, w // per_node)) for w in counts]


def best_at_each_size(job: Job) -> list[Option]:
    """At each size the fastest way that fits, or the one nearest to it."""
    return [fastest(found) or nearest(found) for found in map(options_of, sizes(job))]


def row(option: Option) -> dict[str, Any]:
    """One size as plain values."""
    job, time = option.job, option.time
    moved = [t for t in transfers(job) if t.kind != "host"]
    return {
        "gpus": job.ranks,
        "nodes": job.nodes,
        "train": option.mode,
        "strategy": job.strategy.name,
        "recompute": option.recomputation,
        "verdict": option.verdict,
        "passages": job.columns,
        "gib_per_gpu": round(option.memory.peak / GIB, 1),
        "tflop_per_gpu": round(time.flops.total / 1e12, 2),
        "loss_share": round(time.flops.loss / time.flops.total, 5),
        "gb_received": round(sum(t.received(job) for t in moved) / 1e9, 3),
        "gb_from_other_nodes": round(sum(t.between_nodes(job) for t in moved) / 1e9, 3),
        "compute_ms": round(time.compute * 1e3, 1),
        "communication_ms": round(time.communication * 1e3, 1),
        "update_ms": round(time.update * 1e3, 1),
        "step_ms_best": round(time.best * 1e3, 1),
        "step_ms_worst": round(time.worst * 1e3, 1),
        "queries_per_s": round(job.queries * job.ranks / time.middle, 1),
        "bottleneck": time.bottleneck,
    }


def write_scaling(settings: "Settings") -> int:
    """scaling.csv, scaling.md and scaling.png in the folder of the settings; prints the table."""
    from laser_dist.planning.cli import write_text

    require("--scaling draws a chart, which", "matplotlib", extra="plots")
    assert settings.out is not None
    found = {rank: best_at_each_size(settings.job(rank)) for rank in settings.ranks}
    rows = [row(option) for options in found.values() for option in options]
    text = markdown(rows, settings)
    write_text(settings.out / "scaling.csv", _csv(rows))
    write_text(settings.out / "scaling.md", text)
    draw(found, settings)
    print(text)
    print(f"wrote scaling.csv, scaling.md and scaling.png to {settings.out}")
    return 0


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(rows: list[dict[str, Any]], settings: "Settings") -> str:
    """The rows as a table, what does not change left out."""
    names = {
        "gpus": "GPUs",
        "train": "train",
        "strategy": "strategy",
        "recompute": "recompute",
        "gib_per_gpu": "GiB",
        "passages": "passages",
        "gb_received": "GB received",
        "gb_from_other_nodes": "from other nodes",
        "compute_ms": "compute ms",
        "communication_ms": "communication ms",
        "step_ms_worst": "step ms, at most",
        "queries_per_s": "queries/s",
        "bottleneck": "bottleneck",
    }
    lines = [
        f"{settings.model}, {settings.queries_per_rank} queries per GPU, {settings.gpu}, nodes of {settings.gpus}. "
        "Modelled, not measured; GB per GPU and step.",
        "",
        "| " + " | ".join(names.values()) + " |",
        "|---" * len(names) + "|",
    ]
    for line in rows:
        cells = [f"{line[key]:,}" if isinstance(line[key], (int, float)) else str(line[key]) for key in names]
        if line["verdict"] != "fits":
            cells[-1] = line["verdict"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[int, list[Option]], settings: "Settings") -> None:
    """Step time by part and traffic over the number of GPUs, one column of panels per way of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(found), figsize=(8.4 * len(found), 8), squeeze=False, sharex=True)
    for column, options in enumerate(found.values()):
        _draw_time(panels[0][column], [o for o in options if o.fits])
        _draw_traffic(panels[1][column], [o for o in options if o.fits])
        panels[1][column].set_xlabel("GPUs")
    figure.suptitle(
        f"{settings.model}: one step of {settings.queries_per_rank} queries per GPU, {settings.gpu}, "
        f"nodes of {settings.gpus} (modelled)"
    )
    figure.tight_layout()
    assert settings.out is not None
    figure.savefig(settings.out / "scaling.png", dpi=120)
    plt.close(figure)


def _draw_time(panel: Any, options: list[Option]) -> None:
    gpus = [o.job.ranks for o in options]
    parts = {
        "packed sweep": [o.time.prefix for o in options],
        "latent steps": [o.time.latent for o in options],
        "loss": [o.time.loss for o in options],
        "update": [o.time.update for o in options],
        "communication": [o.time.communication for o in options],
    }
    for name, values in parts.items():
        shown = [value * 1e3 if value * 1e3 >= 0.01 else float("nan") for value in values]
        panel.plot(gpus, shown, marker="o", label=name)
    low, high = [o.time.best * 1e3 for o in options], [o.time.worst * 1e3 for o in options]
    panel.fill_between(gpus, low, high, alpha=0.25, color="black", label="step: full overlap to none")
    panel.plot(gpus, high, color="black", linewidth=1)
    changed = ""
    for option in options:  # a name wherever the choice changes
        if option.job.strategy.name != changed:
            changed = option.job.strategy.name
            place = (option.job.ranks, option.time.worst * 1e3)
            panel.annotate(changed, place, xytext=(0, 8), textcoords="offset points", fontsize=8)
    panel.set(xscale="log", yscale="log", ylabel="ms per step")
    if options:
        panel.set_title(options[0].mode)
        panel.set_xticks(gpus, [str(w) for w in gpus])
        panel.set_ylim(top=5 * max(high))
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _draw_traffic(panel: Any, options: list[Option]) -> None:
    by_name: dict[str, dict[int, float]] = {}
    for option in options:
        for transfer in transfers(option.job):
            by_name.setdefault(transfer.what, {})[option.job.ranks] = transfer.received(option.job) / 1e9
    for name, values in by_name.items():
        panel.plot(list(values), list(values.values()), marker="o", label=name)
    panel.set(xscale="log", yscale="log", ylabel="GB received per GPU and step")
    if options:
        gpus = [o.job.ranks for o in options]
        panel.set_xticks(gpus, [str(w) for w in gpus])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if by_name:
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
