"""Scalars of a run: TensorBoard events and metrics.jsonl, written by rank 0 only."""

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from laser_dist.config import RunConfig
from laser_dist.files import replacing
from laser_dist.objective.terms import STEP_TERMS, TERMS
from laser_dist.reading import decode_json
from laser_dist.recipe import to_toml

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# name -> (unit, how it is reduced over ranks, what it says)
SCALARS = {
    **{f"loss/{term}": ("nats", "mean", f"the {term} term, unweighted") for term in (*TERMS, *STEP_TERMS)},
    "loss/total": ("nats", "mean", "the weighted sum that is minimised"),
    **{
        f"weight/{term}": ("1", "equal on all ranks", f"weight of {term} at this step")
        for term in (*TERMS, *STEP_TERMS)
    },
    **{
        f"gradient_norm/{term}": ("1/cosine", "mean", f"norm of d {term} / d vectors and states")
        for term in (*TERMS, *STEP_TERMS)
    },
    "train/gradient_norm": ("1", "global", "norm of all gradients before clipping"),
    "guard/shortest_row": (
        "share",
        "min",
        "shortest vector of the last micro-batch before it gets unit length, of the rank's median; see guard.row_norm",
    ),
    "guard/passage_spread": ("1", "max", "variance of a rank's passage vectors, last micro-batch; see guard.spread"),
    "guard/gradient_share": (
        "share",
        "global",
        "norm of the gradient over the one that stops; 0 until there is a median to compare with",
    ),
    "train/learning_rate": ("1", "equal on all ranks", "of this step"),
    "train/chunks": ("chunks", "equal on all ranks", "that a micro-batch ran in; see train.chunk_tokens"),
    "train/epoch": ("epochs", "equal on all ranks", "passes over the data so far"),
    "train/positive_mean_rank": ("rank", "mean", "of the positive among all passages; chance is (N + 1) / 2"),
    "train/latent_top1_accuracy": ("share", "mean", "queries whose latent view ranks the positive first"),
    "train/explicit_top1_accuracy": ("share", "mean", "the same for the explicit view"),
    "train/soft_token_entropy": ("nats", "mean", "of the distributions that soft tokens are made of; at most ln V"),
    "train/false_negatives_masked": ("share", "mean", "score columns dropped as false negatives"),
    "data/prompts_cut": ("share", "mean", "queries and passages that truncation shortened"),
    "data/rationales_cut": ("share", "mean", "rationales that truncation shortened"),
    "data/fewer_segments_than_steps": ("share", "mean", "rationales with M < K segments"),
    "data/queries_reusing_negatives": ("share", "mean", "queries with fewer hard negatives than asked for"),
    "data/skipped_shards": ("shards", "sum", "distinct damaged shards met so far, see quarantine.jsonl"),
    "data/skipped_examples": ("examples", "sum", "distinct examples left out so far, those of damaged shards included"),
    "data/skipped_steps": ("steps", "equal on all ranks", "steps of data.skip_steps passed over so far"),
    "speed/tokens_per_second": ("tokens/s", "sum", "packed tokens, all ranks"),
    "speed/queries_per_second": ("queries/s", "sum", "all ranks"),
    "speed/tokens_per_sweep": (
        "tokens",
        "mean",
        "per sweep of all layers, packed and latent ones; GradCache's chunks taken together",
    ),
    "speed/model_tflops": (
        "TFLOP/s",
        "mean",
        "per rank, without what is computed twice; formula in observability/flops.py",
    ),
    "speed/mfu": (
        "share",
        "mean",
        "of the device's bfloat16 peak (see logging.peak_tflops); absent where that is unknown",
    ),
    "time/data": ("s", "mean", "per step, until a rank has its own batch"),
    "time/wait": ("s", "mean", "per step, until all ranks have theirs"),
    "time/forward": ("s", "mean", "per step, both views; with ZeRO-3 its gathers, and waiting in them"),
    "time/loss": ("s", "mean", "per step, the objective; its gathers, and waiting for the slowest rank in them"),
    "time/backward": ("s", "mean", "per step, gradient reduction included"),
    "time/optimizer": ("s", "mean", "per step"),
    "ranks/slowest": ("rank", "the rank", "that waited least for others before backward, see ranks/lag"),
    "ranks/lag": (
        "s",
        "median - min",
        "of time/wait + time/loss: what the slowest rank makes others wait (not in ZeRO-3's gathers)",
    ),
    "ranks/imbalance": ("1", "max / mean", "model FLOPs of a rank's texts; 1: all ranks have equally much to do"),
    "communication/gathered": (
        "MiB",
        "mean",
        "received per step by gathers of passages, keys and gradients; not ZeRO's, not the ring's",
    ),
    "profile/compute": ("share", "mean", "of traced steps; kernels run, or operators on CPU"),
    "profile/communication": ("share", "mean", "of traced steps; collectives run and no kernel does"),
    "profile/idle": ("share", "mean", "of traced steps; neither"),
    "memory/peak": ("GiB", "max", "peak of the accelerator's allocations, or of the process's resident set on CPU"),
}


class Healthy(NamedTuple):
    """What a scalar looks like in a run that goes well; limits where a number can tell it."""

    text: str
    low: float | None = None
    high: float | None = None

    def fits(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


_MACHINE = Healthy("none known: depends on the machine; compare with another run on the same")

# For every name in SCALARS, what is healthy, judged by the median of a run's last tenth. The limits are rules of thumb
# of this project, not measured thresholds: they say where to look first.
HEALTHY = {
    **{
        f"loss/{term}": Healthy("finite; contrastive ones falling from about ln N", low=-1e-3)
        for term in (*TERMS, *STEP_TERMS)
    },
    "loss/total": Healthy("finite, and falling once all weights are up", low=-1e-3),
    **{f"weight/{term}": Healthy("as the recipe says", low=0) for term in (*TERMS, *STEP_TERMS)},
    **{
        f"gradient_norm/{term}": Healthy("none known; the terms within a factor of 10 of each other")
        for term in (*TERMS, *STEP_TERMS)
    },
    "train/gradient_norm": Healthy("steady; one step at many times the median is a bad batch", low=1e-6),
    "guard/shortest_row": Healthy("above 0.1; a row without length takes the whole gradient", low=0.1),
    "guard/passage_spread": Healthy("above 0.01; 0 means that all passages are alike", low=1e-2),
    "guard/gradient_share": Healthy("below 1, where the run stops", 0, 1),
    "train/learning_rate": Healthy("as the schedule says", low=0),
    "train/chunks": Healthy("none known; fewer are faster", low=1),
    "train/epoch": Healthy("none known", low=0),
    "train/positive_mean_rank": Healthy("far below chance, (N + 1) / 2, after warm-up, or labels are wrong", low=1),
    "train/latent_top1_accuracy": Healthy("rising", 0, 1),
    "train/explicit_top1_accuracy": Healthy("rising, at first above the latent view's", 0, 1),
    "train/soft_token_entropy": Healthy("above 0.01, where a soft token is one word, and below ln V", low=0.01),
    "train/false_negatives_masked": Healthy("below 0.05; more: many duplicate passages", 0, 0.05),
    "data/prompts_cut": Healthy("below 0.05; more: raise text.max_query_tokens or max_passage_tokens", 0, 0.05),
    "data/rationales_cut": Healthy("below 0.1; more: raise text.max_explicit_tokens", 0, 0.1),
    "data/fewer_segments_than_steps": Healthy("below 0.2; more: lower thinking.steps", 0, 0.2),
    "data/queries_reusing_negatives": Healthy("below 0.2; more: mine more negatives, or lower data.negatives", 0, 0.2),
    "data/skipped_shards": Healthy("0", 0, 0),
    "data/skipped_examples": Healthy("0", 0, 0),
    "data/skipped_steps": Healthy("0", 0, 0),
    "speed/tokens_per_second": _MACHINE,
    "speed/queries_per_second": _MACHINE,
    "speed/tokens_per_sweep": Healthy("thousands on a GPU; with few, kernels are too short to fill it"),
    "speed/model_tflops": _MACHINE,
    "speed/mfu": Healthy("none known for this method; nothing was measured on a GPU yet", 0, 1),
    "time/data": Healthy("below 5 % of the step; more: raise data.workers"),
    "time/wait": Healthy("below 5 % of the step; more: one rank's data is slow"),
    "time/forward": _MACHINE,
    "time/loss": _MACHINE,
    "time/backward": _MACHINE,
    "time/optimizer": _MACHINE,
    "ranks/slowest": Healthy("changing; always the same one is a slow host"),
    "ranks/lag": Healthy("below 10 % of the step"),
    "ranks/imbalance": Healthy("below 1.5; more: texts' lengths differ much between ranks", 1, 1.5),
    "communication/gathered": Healthy("none known: follows from N and D"),
    "profile/compute": Healthy("above 0.5", low=0.5),
    "profile/communication": Healthy("below 0.3", high=0.3),
    "profile/idle": Healthy("below 0.2", high=0.2),
    "memory/peak": Healthy("level after the first steps; growing is a leak"),
}
UNKNOWN = Healthy("none known")

# What one wants to see in one chart: TensorBoard's "custom scalars" tab.
CHARTS = {
    "objective": {
        "terms": [f"loss/{term}" for term in TERMS],
        "weights": [f"weight/{term}" for term in TERMS],
    },
    "retrieval": {
        "dev": ["dev/.*"],
        "in-batch": ["train/latent_top1_accuracy", "train/explicit_top1_accuracy"],
    },
    "speed": {
        "seconds per step": [name for name in SCALARS if name.startswith("time/")],
        "TFLOP/s of a rank": ["speed/model_tflops"],
        "traced steps": [name for name in SCALARS if name.startswith("profile/")],
    },
    "ranks": {"seconds that the slowest makes others wait": ["ranks/lag"], "imbalance": ["ranks/imbalance"]},
}


class MetricsLog:
    """Writes scalars under their names in SCALARS (and dev/* metrics); silent on other ranks than 0."""

    def __init__(self, folder: Path, *, start_step: int, enabled: bool):
        self.file = folder / "metrics.jsonl"
        self.writer: SummaryWriter | None = None
        if enabled:
            from torch.utils import tensorboard  # here, because who reads the legend needs no torch

            folder.mkdir(parents=True, exist_ok=True)
            # What an interrupted run logged after its last checkpoint is about to happen again.
            self._forget_after(start_step)
            self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record values after optimizer step `step`."""
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")

    def config(self, config: RunConfig) -> None:
        """The resolved config and the legend of all scalars, as TensorBoard text."""
        if self.writer is None:
            return
        empty = {"dev"} if config.evaluation.corpus is None else set()
        empty |= set() if config.profile.active else {"traced steps"}
        layout = {
            name: {title: ["Multiline", tags] for title, tags in charts.items() if title not in empty}
            for name, charts in CHARTS.items()
        }
        self.writer.add_custom_scalars(layout)
        self.writer.add_text("config", "```toml\n" + to_toml(config) + "```")
        legend = "\n".join(
            f"| {n} | {u} | {r} | {d} | {HEALTHY.get(n, UNKNOWN).text} |" for n, (u, r, d) in SCALARS.items()
        )
        titles = "| scalar | unit | over ranks | meaning | healthy |\n|---|---|---|---|---|\n"
        self.writer.add_text("legend", titles + legend)
        self.writer.flush()

    def text(self, step: int, name: str, markdown: str) -> None:
        if self.writer is not None:
            self.writer.add_text(name, markdown, step)
            self.writer.flush()

    def figure(self, step: int, name: str, figure: "Figure") -> None:
        """A chart, drawn once; needs matplotlib."""
        if self.writer is not None:
            self.writer.add_image(name, _pixels(figure), step, dataformats="HWC")
            self.writer.flush()

    def _forget_after(self, step: int) -> None:
        if not self.file.is_file():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a crash can cut the last line off
                if decode_json(line)["step"] <= step:
                    kept.append(line + "\n")
        with replacing(self.file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()


def _pixels(figure: "Figure") -> "np.ndarray":
    """(height, width, 3) uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
