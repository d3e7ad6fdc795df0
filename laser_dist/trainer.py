"""The training loop. One optimizer step reads top to bottom in `Trainer.step`:

batch -> Views (maybe in chunks) -> gathered passages -> four terms -> good on every rank? -> backward -> update.
"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laser_dist.config import RunConfig
from laser_dist.data.streaming.loader import TrainingBatch, micro_batches_of, training_batches
from laser_dist.data.streaming.together import next_together
from laser_dist.distributed.checkpoint import CheckpointStore, TrainerState
from laser_dist.distributed.collectives import gather_objects, gather_table, rank, world_size
from laser_dist.distributed.engine import Engine, launched_world_size
from laser_dist.distributed.grad_cache import GradCache
from laser_dist.guard.guard import Guard
from laser_dist.identity import fingerprint
from laser_dist.launch.meeting import meet
from laser_dist.launch.preflight import preflight
from laser_dist.model.backbone import check_attention
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.observability.clock import StepClock
from laser_dist.observability.console import TrainingProgress
from laser_dist.observability.flops import ModelSize, peak_flops
from laser_dist.observability.ledger import RunLedger
from laser_dist.observability.metrics import MetricsLog
from laser_dist.observability.profiler import StepProfiler
from laser_dist.observability.scalars import Scalars, micro_batch_scalars, step_scalars, term_gradient_norms
from laser_dist.optim import build_optimizer, learning_rate
from laser_dist.rehearsal import Rehearsal
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.evaluation.evaluate import evaluate
from laser_dist.run_folder import checkpoints_of
from laser_dist.run_inputs import open_inputs, open_quarantine, total_steps, write_config
from laser_dist.run_models import build_retriever, frozen_teacher
from laser_dist.run_page.report import page_at_end
from laser_dist.watch import pulse, watchdog


class Trainer:
    """A run: built from a config, then `fit`. The same on every rank; rank 0 also writes and prints."""

    def __init__(self, config: RunConfig, ds_config: dict[str, Any]):
        self.config = config
        self.queries_per_step = config.train.queries_per_rank * config.train.accumulation * launched_world_size()
        # What can be wrong with files is found before any process waits for another.
        device, inputs = meet(lambda: open_inputs(config, self.queries_per_step), config.launch.timeout)
        self.data, self.text, self.dev, self.settings = inputs.data, inputs.text, inputs.dev, inputs.settings
        self.total_steps = inputs.total_steps
        watchdog.meet(gather_objects)
        if config.launch.preflight:
            with pulse.phase("preflight"):
                preflight(config, ds_config, self.data, device)
        self.objective = AlignmentObjective(
            config.objective,
            config.trajectory_temperature,
            frozen_teacher(config, device),
            evidence=config.guard.alarm != "off",
        )
        self.kernel = self.objective.kernel_on(device)
        self.attention = check_attention(config.model, device)
        torch.manual_seed(config.seed)
        self.retriever = build_retriever(config, ds_config)
        self.size = ModelSize.of(self.retriever)
        self.peak_flops = peak_flops(device, config.logging.peak_tflops)
        self.engine = Engine(
            self.retriever,
            build_optimizer(self.retriever, config.optimizer),
            ds_config,
            reduce_once=config.reduce_once,
        )
        self.grad_cache = GradCache(self.engine)
        self.guard = Guard(config, self.data, self.engine)
        torch.manual_seed(config.seed + 1 + rank())  # ranks drop out differently; they did not initialise differently
        self.card = RetrieverCard.of(config)
        self.encoder = LaserEncoder(self.retriever, self.text, self.card, over_ranks=True)
        self.clock = StepClock(device)
        self.store = CheckpointStore(checkpoints_of(Path(config.output)), config.checkpoint)
        self.stop_requested = False

    def fit(self) -> bool:
        """Train to the end; False if a signal stopped the run early (its checkpoint is saved)."""
        config, output, is_first = self.config, Path(self.config.output), rank() == 0
        with pulse.phase("resume"):
            start = self._resume()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "stop_requested", True))
        write_config(config)
        self.quarantine = open_quarantine(config, self.data, output / "quarantine.jsonl")
        batches = training_batches(
            config,
            self.data,
            self.text,
            rank=rank(),
            world_size=world_size(),
            start=self.position,
            total=(self.total_steps - start) * config.train.accumulation,
            gaps=micro_batches_of(config.data.skip_steps, start, self.total_steps, config.train.accumulation),
        )
        self.best_metric = self.store.best_metric()
        ledger = RunLedger(output, start_step=start, total_steps=self.total_steps, enabled=is_first)
        with (
            page_at_end(output, enabled=is_first),
            contextlib.closing(batches),
            MetricsLog(output, start_step=start, enabled=is_first) as self.log,
            TrainingProgress(self.total_steps, start, enabled=is_first) as self.progress,
            StepProfiler(config.profile, output, self.engine.device, self.log, self.progress.say) as profiler,
            ledger as self.ledger,
        ):
            self.guard.say = self.progress.say
            self.log.config(config)
            self.progress.say(self._headline(start))
            rehearsal = Rehearsal(self, start)
            for step in range(start, self.total_steps):
                if step + 1 in config.data.skip_steps:
                    self._pass_over(step + 1)
                else:
                    with profiler.step(step + 1), pulse.step(step + 1):
                        values = self.step(step, batches)
                    self.ledger.book("data", values["time/data"] + values["time/wait"])
                    if step % config.logging.every == 0 or step + 1 == self.total_steps:
                        self.log.scalars(step + 1, values)
                        self.progress.update(step + 1, values)
                    rehearsal(step + 1, values)
                ended = self._after_step(step + 1)
                self.ledger.step(step + 1)
                if ended:
                    return step + 1 == self.total_steps
        return True

    def step(self, step: int, batches: Iterator[TrainingBatch]) -> Scalars:
        """One optimizer step over `accumulation` micro-batches; returns scalars, reduced over ranks."""
        config, clock = self.config, self.clock
        rate = learning_rate(step, self.total_steps, config.optimizer)
        self.engine.set_learning_rate(rate)
        self.guard.begin(step, rate, self.objective.weights(step))
        norms_due = config.logging.term_gradient_norms_every and step % config.logging.term_gradient_norms_every == 0
        rows = []
        with self.engine.reduction():
            for micro_batch in range(1, config.train.accumulation + 1):
                with clock.phase("data"):
                    loaded, chunks = self._next(batches)
                    batch = loaded.packed.to(self.engine.device)
                    pulse.examples(batch.query_ids)
                    self.guard.note(loaded, batch, chunks)
                with clock.phase("forward"):
                    views = self.grad_cache.forward(batch, chunks)
                with clock.phase("loss"):
                    loss = self.objective(views, batch, step)
                    values = self.guard.check(views, loss)
                vectors = [x for x in views[:4] if x is not None]
                norms = term_gradient_norms(loss, vectors) if norms_due else {}
                with clock.phase("backward"):
                    self.grad_cache.backward(loss.total, last=micro_batch == config.train.accumulation)
                rows.append(micro_batch_scalars(loaded, values, self.size) | {"train/chunks": float(chunks)} | norms)
        with clock.phase("optimizer"):
            self.guard.check_replicas()
            gradient_norm = self.guard.update()
        self.position += self.queries_per_step
        return {
            **step_scalars(rows, clock, self.queries_per_step, self.peak_flops),
            **{f"weight/{name}": value for name, value in self.objective.weights(step).items()},
            **self.guard.scalars,
            "train/gradient_norm": gradient_norm,
            "train/learning_rate": rate,
            "train/epoch": loaded.epoch,
            "data/skipped_shards": float(self.quarantine.shards),
            "data/skipped_examples": float(self.quarantine.lost),
            "data/skipped_steps": float(sum(skipped <= step for skipped in config.data.skip_steps)),
        }

    def _pass_over(self, step: int) -> None:
        self.position += self.queries_per_step
        self.progress.say(f"step {step} passed over with its {self.queries_per_step} queries, as data.skip_steps says")

    def _after_step(self, step: int) -> bool:
        """Evaluate and save where due; True if the run ends here."""
        every_evaluation, every_save = self.config.evaluation.every, self.config.checkpoint.every
        last = step == self.total_steps
        flags = {"stop": float(self.stop_requested), "sealed": float(self.store.sealed)}
        table = gather_table(flags)
        stop = any(row["stop"] for row in table)
        if all(row["sealed"] for row in table):  # so that all ranks publish after the same step
            self._publish()
        evaluation_due = last or (every_evaluation and step % every_evaluation == 0)
        metric = self._evaluate(step) if evaluation_due and (last or not stop) else None
        improved = metric is not None and (self.best_metric is None or metric > self.best_metric)
        if last or stop or improved or (every_save and step % every_save == 0):
            self._publish()
            with self.doing("save"):
                self.store.save(self.engine, self.state(step, metric), self.text.tokenizer, self.card, best=improved)
            if improved:
                self.best_metric = metric
            if last or stop or not self.config.checkpoint.asynchronous:
                self._publish(" (stopping: a signal asked for it)" if stop else "")
        return stop or last

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Something that is no part of a step: other ranks are told, and its seconds are booked."""
        with pulse.phase(name), self.ledger.booked(name):
            yield

    def state(self, step: int, metric: float | None) -> TrainerState:
        """What a checkpoint after `step` says of the run."""
        hashed = fingerprint(self.config, self.data.fingerprint())
        return TrainerState(step, world_size(), self.engine.stage, hashed, metric, self.position, self.settings)

    def _publish(self, why: str = "") -> None:
        with self.doing("save"):
            saved = self.store.publish()
        if saved:
            self.progress.say(f"saved {saved}{why}")

    def _evaluate(self, step: int) -> float | None:
        if self.dev is None:
            return None
        with self.doing("evaluate"):
            metrics = evaluate(self.encoder, *self.dev).metrics
        self.log.scalars(step, {f"dev/{name}": value for name, value in metrics.items()})
        self.progress.say(f"step {step} · dev " + " · ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        # Rank 0's, to the last bit: whether it is the best decides whether all ranks save.
        return gather_objects(metrics[self.config.evaluation.metric])[0]

    def _resume(self) -> int:
        """The step to start from, 0 or that of the newest complete checkpoint; sets `position` and `total_steps`."""
        self.position = 0
        if not self.config.resume:
            return 0
        checkpoint = self.store.to_resume()
        if checkpoint is None:
            return 0
        hashed = fingerprint(self.config, self.data.fingerprint())
        state = self.store.load(self.engine, checkpoint, hashed, self.config.seed, self.settings)
        self.position = state.step * self.queries_per_step if state.position is None else state.position
        self.total_steps = total_steps(self.config, self.data, self.queries_per_step, state.step, self.position)
        return state.step

    def _next(self, batches: Iterator[TrainingBatch]) -> tuple[TrainingBatch, int]:
        return next_together(batches, self.quarantine, self.clock)

    def _headline(self, start: int) -> str:
        model = self.config.model
        kept = f" (the first {model.layers} layers only)" if model.layers else ""
        kind = f"LoRA rank {model.lora_rank}" if model.lora_rank else "all weights"
        resuming = f" · resuming after step {start}" if start else ""
        return (
            f"{model.name}{kept} · {kind} · {model.dtype} · ZeRO-{self.engine.stage} · {world_size()} ranks · "
            f"{self.attention} attention · {self.kernel} loss · {self.queries_per_step} queries a step · "
            f"{self.total_steps} steps{resuming}"
        )
