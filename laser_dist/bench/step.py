"""`laser-dist bench step`: this package's training step against the published one, on the same examples in one run.

1. Each variant runs in a process of its own, so that its peak of memory is its own. All take turns twice, the second
   time in reverse order, so that a machine that slows down slows all of them.
2. Before it is timed, a variant must have the loss and the gradient norm of the first one; else nothing is reported.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from laser_dist.errors import UserError
from laser_dist.model.embedded import CACHED_BACKBONE

VARIANTS = {  # name -> (published, activation checkpointing); the first is what the others are compared with
    "ours": (False, False),
    "published": (True, False),
    "ours, checkpointing": (False, True),
    "published, checkpointing": (True, True),
}
# Both compute the same sums in another order. In float32 that moves a cosine by about 1e-7, which a temperature of 0.02
# makes 5e-6 of a logit, and the weight 10 of the output distillation 5e-5 of the loss.
LOSS_TOLERANCE = 1e-4
# A gradient is a sum of terms larger than itself, each with the error above.
GRADIENT_TOLERANCE = 1e-3

HELP = """Time one training step (forward and backward) of this package and of the published code, on the same examples.

Examples:
  laser-dist bench step --layers 4 --queries 4
  laser-dist bench step --model Qwen/Qwen3-0.6B --queries 8 --dtype bfloat16 --out step.json
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str | None = None
    """Hub id or folder of a causal LM; unset: the backbone that `laser-dist quickstart` has cached."""
    layers: int | None = None
    """Keep only the first n decoder layers."""
    queries: int = 8
    """B: queries of the micro-batch, each with a positive and a hard negative."""
    data: Path | None = None
    """Folder written by `laser-dist prepare`; unset: the embedded sample."""
    paper_lengths: float | None = None
    """Instead of the sample: texts as long as the paper's (query 222, rationale 985, passage 400 tokens on average),
    times this factor."""
    steps: int = 3
    """K, the number of latent steps."""
    repeats: int = 5
    """Timed steps per variant."""
    dtype: str = "float32"
    """Precision that is timed; bfloat16 needs a GPU. Losses are compared in float32 either way."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    def validate(self) -> None:
        """Raises UserError for values that no variant could be measured with."""
        for name in ("queries", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} = {getattr(self, name)}: must be at least 1")
        if self.paper_lengths is not None and not 0 < self.paper_lengths <= 4:
            raise UserError(f"--paper-lengths = {self.paper_lengths}: must be above 0 and at most 4; 1 is the paper's")
        if self.paper_lengths is not None and self.data is not None:
            raise UserError("--paper-lengths makes its own texts: leave out --data")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype = {self.dtype}: must be float32 or bfloat16")
        if self.out is not None and self.out.is_dir():
            raise UserError(f"--out {self.out}: is a folder: give the name of a file")
        if self.model is None and not (CACHED_BACKBONE / "config.json").is_file():
            raise UserError(
                f"no --model given, and {CACHED_BACKBONE} does not exist: give a hub id or a folder, "
                "or run `laser-dist quickstart` once, which makes it"
            )

    @property
    def backbone(self) -> str:
        return self.model or str(CACHED_BACKBONE)


@dataclass(frozen=True)
class Outcome:
    """What one process found for one variant. `environment` names device and versions."""

    loss: float
    gradient_norm: float
    seconds: list[float]
    peak_gib: float
    layer_tokens: int  # that the first layer sees in one forward, pads included
    head_tokens: int  # that the LM head sees
    sweeps: int  # forward passes through the layers, each of which ZeRO-3 gathers every parameter for
    packed_tokens: int  # tokens of the examples, each view's prefix once
    environment: dict[str, str]


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or variants that disagree."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench step", description=HELP)
    settings.validate()
    result = summarise(settings, run_all(settings))
    _print(result)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def run_all(settings: Settings) -> dict[str, list[Outcome]]:
    """Every variant's outcomes, one per round. UserError as soon as one disagrees with the first."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in VARIANTS}
    reference: Outcome | None = None
    for turn in range(min(2, settings.repeats)):
        repeats = settings.repeats // 2 if turn else (settings.repeats + 1) // 2
        for name in list(VARIANTS)[:: -1 if turn else 1]:
            print(f"round {turn + 1}: {name} ...", file=sys.stderr, flush=True)
            outcome = _in_a_process(replace(settings, repeats=repeats), name, reference)
            outcomes[name].append(outcome)
            reference = reference or outcome
    return outcomes


def _in_a_process(settings: Settings, variant: str, reference: Outcome | None) -> Outcome:
    expected = None if reference is None else (reference.loss, reference.gradient_norm)
    job = json.dumps({"settings": asdict(settings), "variant": variant, "expected": expected}, default=str)
    code = "from laser_dist.bench.step import _child; _child()"
    child = subprocess.run([sys.executable, "-c", code], input=job, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        known = last.startswith("error: ")
        raise UserError(last.removeprefix("error: ") if known else f"{variant}: its process failed: {last}")
    return Outcome(**json.loads(child.stdout.splitlines()[-1]))


def _child() -> None:
    job = json.load(sys.stdin)
    settings = job["settings"]
    data = None if settings["data"] is None else Path(settings["data"])
    try:
        outcome = measure(Settings(**settings | {"data": data, "out": None}), job["variant"], job["expected"])
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(asdict(outcome)))


def measure(settings: Settings, variant: str, expected: tuple[float, float] | None) -> Outcome:
    """One variant in this process. `expected`: loss and gradient norm that it must have before it is timed."""
    import torch

    from laser_dist.observability.clock import StepClock, peak_memory_gib

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.dtype == "bfloat16" and device.type == "cpu":
        raise UserError("--dtype bfloat16: needs a GPU; CPUs are measured in float32")
    batch = load_batch(settings).to(device)
    step, loss_of = build(settings, variant)
    step.to(device)

    def forward_backward() -> Any:
        step.zero_grad(set_to_none=True)
        loss = loss_of(step(batch), batch)
        loss.backward()
        return loss

    seen = _count_tokens(step)
    loss = forward_backward().item()
    gradients = [p.grad for p in step.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    layer_tokens, head_tokens, sweeps = seen()
    if expected is not None:
        _check_agreement(variant, (loss, norm), expected)
    step.to(getattr(torch, settings.dtype))
    forward_backward()  # warm up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, seconds = StepClock(device), []
    for _ in range(settings.repeats):
        with clock.phase("step"):
            forward_backward()
        seconds.append(clock.reset()["step"])
    return Outcome(
        loss=loss,
        gradient_norm=norm,
        seconds=seconds,
        peak_gib=peak_memory_gib(device),
        layer_tokens=layer_tokens,
        head_tokens=head_tokens,
        sweeps=sweeps,
        packed_tokens=len(batch.tokens_T),
        environment=_environment(device),
    )


def _check_agreement(variant: str, actual: tuple[float, float], expected: tuple[float, float]) -> None:
    tolerances = (LOSS_TOLERANCE, GRADIENT_TOLERANCE)
    for name, found, wanted, tolerance in zip(("loss", "gradient norm"), actual, expected, tolerances, strict=True):
        if not abs(found - wanted) <= tolerance * abs(wanted):  # so that NaN disagrees, too
            first = next(iter(VARIANTS))
            raise UserError(
                f"{variant}: its {name} is {found:.7g}, that of `{first}` {wanted:.7g}: more than {tolerance:g} apart. "
                "Steps that compute different things are not compared, and nothing is reported"
            )


def load_batch(settings: Settings) -> Any:
    """The examples that every variant sees, as a PackedBatch on the CPU."""
    from laser_dist.bench.synthetic import MeanTokens, paper_examples
    from laser_dist.config import ModelConfig, TextConfig
    from laser_dist.data import sample_folder
    from laser_dist.data.schema import decode_example
    from laser_dist.data.streaming.stream import ExampleStream, draw_passages
    from laser_dist.data.text import TextFormat
    from laser_dist.model.backbone import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name=settings.backbone))
    if settings.paper_lengths is not None:
        scaled = {name: length * settings.paper_lengths for name, length in asdict(MeanTokens()).items()}
        items = list(enumerate(paper_examples(settings.queries, 1, tokenizer, MeanTokens(**scaled))))
    elif settings.data is None:
        path = sample_folder() / "train.jsonl"
        lines = path.read_bytes().splitlines()
        # Where there are too few, from the start again: time and memory do not mind.
        rows = [decode_example(lines[i % len(lines)], f"{path}:{i + 1}") for i in range(settings.queries)]
        items = list(enumerate(rows))
    else:
        stream = ExampleStream(settings.data, seed=0, queries_per_rank=settings.queries, total_batches=1)
        items = next(iter(stream)).items
    text = TextFormat(tokenizer, TextConfig(), steps=settings.steps)
    passages = [draw_passages(example, 1, (0, position)) for position, example in items]
    return text.batch([example for _, example in items], passages, with_rationale=True)


def build(settings: Settings, variant: str) -> tuple[Any, Any]:
    """The step (PackedBatch -> Views) and its loss (Views, PackedBatch -> scalar), in float32 on the CPU."""
    from laser_dist.config import ModelConfig, ObjectiveConfig
    from laser_dist.model.backbone import load_backbone, prepare_for_training
    from laser_dist.model.retriever import LaserRetriever
    from laser_dist.objective.alignment import AlignmentObjective
    from laser_dist.testing import published

    is_published, checkpointing = VARIANTS[variant]
    config = ModelConfig(
        name=settings.backbone, layers=settings.layers, dtype="float32", activation_checkpointing=checkpointing
    )
    lm = prepare_for_training(load_backbone(config), config)
    # The published objective masks nothing, so neither does ours here.
    objective = AlignmentObjective(ObjectiveConfig(mask_false_negatives=False), trajectory_temperature=0.05)
    if is_published:
        lm.set_attn_implementation("sdpa")  # type: ignore[operator]
        step: Any = published.PublishedStep(lm, steps=settings.steps, checkpointing=checkpointing)
        return step, lambda views, batch: published.all_rows_loss(objective, views, batch, 0).total
    return LaserRetriever(lm, steps=settings.steps), lambda views, batch: objective(views, batch, 0).total


def _count_tokens(step: Any) -> Any:
    """Counts tokens that the first layer and the LM head see, and passes, until the function it returns is called."""
    counts = [0, 0, 0]
    layer, head = step.lm.get_decoder().layers[0], step.lm.get_output_embeddings()

    def counter(which: int) -> Any:
        def count(_: Any, arguments: tuple, keywords: dict) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            counts[which] += hidden.shape[:-1].numel()
            counts[2] += which == 0

        return count

    # Recomputation in backward does not pass the layer's hooks, so this counts forward work in either case.
    hooks = [module.register_forward_pre_hook(counter(i), with_kwargs=True) for i, module in enumerate((layer, head))]

    def stop() -> list[int]:
        for hook in hooks:
            hook.remove()
        return counts

    return stop


def _environment(device: Any) -> dict[str, str]:
    import platform

    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def summarise(settings: Settings, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """The table as plain values: one row per variant, times in seconds, ratios to the variant of ours alike."""
    import numpy as np

    rows: dict[str, dict[str, Any]] = {}
    for name, found in outcomes.items():
        p20, p50, p80 = np.percentile([s for outcome in found for s in outcome.seconds], [20, 50, 80]).tolist()
        rows[name] = {
            "p20_s": p20,
            "p50_s": p50,
            "p80_s": p80,
            "peak_gib": max(outcome.peak_gib for outcome in found),
            "layer_tokens": found[0].layer_tokens,
            "head_tokens": found[0].head_tokens,
            "sweeps": found[0].sweeps,
            "loss": found[0].loss,
            "gradient_norm": found[0].gradient_norm,
        }
        rows[name]["ratio"] = p50 / rows[name.replace("published", "ours")]["p50_s"]
    first = next(iter(outcomes.values()))[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **first.environment,
        "settings": {key: None if value is None else str(value) for key, value in asdict(settings).items()},
        "packed_tokens": first.packed_tokens,
        "variants": rows,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    table = Table(title="One training step, forward and backward, on the same examples", caption_justify="left")
    times_and_memory = ("step", "p20 s", "p50 s", "p80 s", "time / ours", "peak GiB")
    for heading in (*times_and_memory, "sweeps", "layer tokens", "LM-head tokens"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name, row in result["variants"].items():
        times = [f"{row[key]:.3f}" for key in ("p20_s", "p50_s", "p80_s")]
        tokens = [f"{row[key]:,}" for key in ("sweeps", "layer_tokens", "head_tokens")]
        table.add_row(name, *times, f"{row['ratio']:.2f}", f"{row['peak_gib']:.2f}", *tokens)
    table.caption = (
        f"{result['date']} · {result['device']}, {result['threads']} threads · torch {result['torch']} · "
        f"transformers {result['transformers']}\n"
        f"{settings['model'] or CACHED_BACKBONE}, layers {settings['layers'] or 'all'} · {settings['dtype']} · "
        f"B {settings['queries']} · K {settings['steps']} · {result['packed_tokens']:,} packed tokens, no pads\n"
        f"losses agree to {LOSS_TOLERANCE:g} and gradient norms to {GRADIENT_TOLERANCE:g}, in float32; "
        "sweeps over all parameters, layer and LM-head tokens: forward, pads included"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
