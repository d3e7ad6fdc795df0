"""A plan on the terminal: one line per option, then the chosen one in detail."""

from typing import TYPE_CHECKING

from laser_dist.planning.communication import transfers
from laser_dist.planning.job import GIB
from laser_dist.planning.options import Option, describe, nearest, seconds

if TYPE_CHECKING:
    from rich.console import Console


def show(shown: list[Option], chosen: Option | None, everything: list[Option]) -> None:
    """Print the options and what is chosen, or what is nearest to fitting."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    job = shown[0].job
    about = " (a shape made up between known ones)" if job.shape.interpolated else ""
    console.print(
        f"{job.shape.name}{about}: {job.shape.parameters / 1e9:.2f}B parameters · {job.ranks} GPUs"
        f"{f' in {job.nodes} nodes' if job.nodes > 1 else ''}, {job.hardware.memory:g} GiB, "
        f"{shown[0].usable / GIB:.1f} usable · {job.tokens:,} tokens per GPU and step, {job.tokens * job.ranks:,} in "
        f"all, {job.columns:,} passages in the softmax"
    )
    table = Table()
    for name in ("train", "strategy", "recompute", "GiB", "s per step", "bottleneck", "verdict"):
        table.add_column(name, justify="right" if name in ("GiB", "s per step") else "left", no_wrap=name == "strategy")
    for option in shown:
        style = "bold green" if option is chosen else "" if option.fits else "dim"
        table.add_row(
            option.mode,
            option.job.strategy.name,
            option.recomputation,
            f"{option.memory.peak / GIB:.1f}",
            seconds(option),
            option.time.bottleneck,
            "chosen" if option is chosen else option.verdict,
            style=style,
        )
    console.print(table)
    for remedy in dict.fromkeys(option.remedy for option in shown if not option.fits):
        names = [f"{o.mode}, {o.job.strategy.name}" for o in shown if not o.fits and o.remedy == remedy]
        console.print(f"  too much: {'; '.join(names)}: {remedy}")
    if chosen is None:
        best = nearest(everything)
        console.print(f"Nothing fits. Nearest is {describe(best)}, {best.verdict}: {best.remedy}")
    else:
        _detail(console, chosen)


def _detail(console: "Console", option: Option) -> None:
    job, time = option.job, option.time
    sizes = sorted(option.memory.parts().items(), key=lambda item: -item[1])
    parts = " · ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in sizes if size >= GIB / 200)
    console.print(f"\nChosen: {describe(option)}")
    console.print(f"  memory, GiB     {parts}")
    spent = {"packed sweep": time.prefix, "latent steps": time.latent, "loss": time.loss, "update": time.update}
    console.print("  time, ms        " + " · ".join(f"{name} {t * 1e3:.1f}" for name, t in spent.items()))
    flops = time.flops
    console.print(
        f"  FLOPs           {flops.total / 1e12:.1f} T per GPU and step, {flops.useful / 1e12:.1f} T of them not "
        f"twice; latent steps and LM head {flops.latent_share / flops.total:.1%}, loss {flops.loss / flops.total:.2%}"
    )
    for transfer in transfers(job):
        if transfer.kind == "host":
            console.print(f"  to the host     {transfer.what}: {transfer.whole / 1e9:.2f} GB")
            continue
        between = transfer.between_nodes(job) / 1e9
        console.print(
            f"  {transfer.kind:<15} {transfer.what}: {transfer.received(job) / 1e9:.2f} GB received per GPU"
            + (f", {between:.2f} of them from other nodes" if between else "")
            + f", {time.transfers[transfer.what] * 1e3:.1f} ms"
        )
    console.print(f"  host memory     {option.host / GIB:.0f} GiB per node (each rank loads the backbone whole)")
    tokens = job.tokens * job.ranks / time.middle
    console.print(f"  throughput      {tokens:,.0f} tokens/s, {job.queries * job.ranks / time.middle:,.1f} queries/s")
