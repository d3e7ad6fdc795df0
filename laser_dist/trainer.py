"""The training loop. One optimizer step reads top to bottom in `Trainer.step`:

batch -> engine(batch) -> Views -> gathered passages -> four terms -> finite on every rank? -> backward -> update.
"""

import hashlib
import json
import math
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from laser_dist.batch import Views
from laser_dist.config import RunConfig, to_toml
from laser_dist.data.loader import TrainingBatch, training_batches
from laser_dist.data.shards import load_manifest
from laser_dist.data.stream import check_enough
from laser_dist.data.text import TextFormat
from laser_dist.distributed.checkpoint import CheckpointStore, TrainerState
from laser_dist.distributed.collectives import gather_table, mean_over_ranks, rank, world_size
from laser_dist.distributed.engine import Engine, NonFiniteGradient, init_distributed
from laser_dist.errors import UserError
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective, LossTerms
from laser_dist.observability.clock import StepClock, peak_memory_gib
from laser_dist.observability.console import TrainingProgress
from laser_dist.observability.metrics import MetricsLog
from laser_dist.optim import build_optimizer, learning_rate
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.collection import read_collection
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.evaluate import evaluate


class Trainer:
    """A run: built from a config, then `fit`. The same on every rank; rank 0 also writes and prints."""

    def __init__(self, config: RunConfig, ds_config: dict[str, Any]):
        self.config = config
        # Read everything that can be wrong before any process waits for another.
        self.total_steps = self._check_data()
        tokenizer = load_tokenizer(config.model)
        self.text = TextFormat(tokenizer, config.text, steps=config.thinking.steps)
        if config.objective.needs_rationale:
            _ = self.text.eos
        evaluation = config.evaluation
        self.dev = (
            read_collection(evaluation.corpus, evaluation.queries, evaluation.qrels) if evaluation.corpus else None
        )

        device = init_distributed()
        check_enough(load_manifest(Path(config.data.train)), self._queries_per_step())
        if config.train.max_steps is None:
            self.total_steps = max(1, int(self.total_steps / world_size()))
        torch.manual_seed(config.seed)
        lm = prepare_for_training(load_backbone(config.model), config.model)
        retriever = LaserRetriever(lm, steps=config.thinking.steps, convention=config.thinking.convention)
        retriever.to(device)
        self.engine = Engine(retriever, build_optimizer(retriever, config.optimizer), ds_config)
        torch.manual_seed(config.seed + 1 + rank())  # dropout differs between ranks; initial adapters did not
        self.objective = AlignmentObjective(config.objective, config.trajectory_temperature)
        self.card = RetrieverCard(
            thinking=config.thinking, text=config.text, backbone=config.model.name, layers=config.model.layers
        )
        self.encoder = LaserEncoder(retriever, self.text, self.card, over_ranks=True)
        self.clock = StepClock(device)
        self.store = CheckpointStore(Path(config.output) / "checkpoints", config.checkpoint)
        self.stop_requested = False

    def fit(self) -> bool:
        """Train to the end; False if a signal stopped the run early (its checkpoint is saved)."""
        config, start = self.config, self._resume()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: setattr(self, "stop_requested", True))
        if rank() == 0:
            Path(config.output).mkdir(parents=True, exist_ok=True)
            (Path(config.output) / "config.toml").write_text(to_toml(config), encoding="utf-8")
        per_step = config.train.accumulation
        batches = training_batches(
            config,
            self.text,
            rank=rank(),
            world_size=world_size(),
            start=start * per_step,
            total=self.total_steps * per_step,
        )
        with (
            MetricsLog(Path(config.output), start_step=start, enabled=rank() == 0) as self.log,
            TrainingProgress(self.total_steps, start, enabled=rank() == 0) as self.progress,
        ):
            self.log.config(config)
            self._announce(start)
            for step in range(start, self.total_steps):
                values = self.step(step, batches)
                if step % config.logging.every == 0 or step + 1 == self.total_steps:
                    self.log.scalars(step + 1, values)
                    self.progress.update(step + 1, values)
                if self._after_step(step + 1):
                    return step + 1 == self.total_steps
        return True

    def step(self, step: int, batches: Any) -> dict[str, float]:
        """One optimizer step over `accumulation` micro-batches; returns scalars, reduced over ranks."""
        config, clock = self.config, self.clock
        rate = learning_rate(step, self.total_steps, config.optimizer)
        self.engine.set_learning_rate(rate)
        rows = []
        for _ in range(config.train.accumulation):
            with clock.phase("data"):
                loaded: TrainingBatch = next(batches)
                batch = loaded.packed.to(self.engine.device)
            with clock.phase("forward"):
                views = self.engine(batch)
                loss = self.objective(views, batch, step)
            self._check_finite(step, loss, batch.query_ids)
            norms = self._term_gradient_norms(step, views, loss)
            with clock.phase("backward"):
                self.engine.backward(loss.total)
            rows.append(self._micro_scalars(loaded, loss) | norms)
        with clock.phase("optimizer"):
            try:
                gradient_norm = self.engine.step()
            except NonFiniteGradient:
                self._refuse(step, "the gradient is not finite on at least one rank", batch.query_ids)
        values = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        weights = {f"weight/{name}": value for name, value in self.objective.weights(step).items()}
        return (
            self._reduced(values, len(rows))
            | weights
            | {
                "train/gradient_norm": gradient_norm,
                "train/learning_rate": rate,
                "train/epoch": loaded.epoch,
            }
        )

    def _after_step(self, step: int) -> bool:
        """Evaluate and save where due; True if the run ends here."""
        config, last = self.config, step == self.total_steps
        stop = any(row["stop"] for row in gather_table({"stop": float(self.stop_requested)}))
        due = {
            name: every and step % every == 0
            for name, every in (("evaluate", config.evaluation.every), ("save", config.checkpoint.every))
        }
        metric = self._evaluate(step) if self.dev and (last or due["evaluate"]) and not stop else None
        best = self.store.best_metric()
        improved = metric is not None and (best is None or metric > best)
        if last or stop or due["save"] or improved:
            state = TrainerState(step, world_size(), self.engine.stage, self._fingerprint(), metric)
            saved = self.store.save(self.engine, state, self.text.tokenizer, self.card)
            if improved:
                self.store.mark_best(saved)
            self.store.prune()
            self.progress.say(f"saved {saved}" + (" (stopping: a signal asked for it)" if stop else ""))
        return stop or last

    def _evaluate(self, step: int) -> float:
        corpus, queries, qrels = self.dev
        metrics = evaluate(self.encoder, corpus, queries, qrels).metrics
        self.log.scalars(step, {f"dev/{name}": value for name, value in metrics.items()})
        self.progress.say(f"step {step} · dev " + " · ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        if self.config.evaluation.metric not in metrics:
            raise UserError(
                f"evaluation.metric = {self.config.evaluation.metric!r}: must be one of {', '.join(metrics)}"
            )
        return metrics[self.config.evaluation.metric]

    def _resume(self) -> int:
        """The step to start from: 0, or that of the newest complete checkpoint."""
        if not self.config.resume:
            return 0
        checkpoint, skipped = self.store.newest_complete()
        if rank() == 0:
            for reason in skipped:
                print(f"skipped an incomplete checkpoint: {reason}", flush=True)
        if checkpoint is None:
            return 0
        return self.store.load(self.engine, checkpoint, self._fingerprint()).step

    def _check_finite(self, step: int, loss: LossTerms, query_ids: tuple[str, ...]) -> None:
        """Stop, on all ranks alike, before a term that is not a number reaches a gradient."""
        table = gather_table({name: float(value.detach()) for name, value in loss.terms.items()})
        bad = [
            f"{name} on rank {r}"
            for r, row in enumerate(table)
            for name, value in row.items()
            if not math.isfinite(value)
        ]
        if bad:
            self._refuse(step, f"not finite: {', '.join(bad)}", query_ids)

    def _refuse(self, step: int, reason: str, query_ids: tuple[str, ...]) -> None:
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, query_ids)
        ids = "; ".join(f"rank {r}: {', '.join(own)}" for r, own in enumerate(everyone))
        raise UserError(
            f"step {step + 1}: {reason}. No parameter was updated; the last checkpoint is good. Queries of the last "
            f"micro-batch: {ids}. Look at these examples, lower optimizer.learning_rate, or ramp objective weights in"
        )

    def _term_gradient_norms(self, step: int, views: Views, loss: LossTerms) -> dict[str, float]:
        """Norm of each term's gradient with respect to this rank's vectors and states, where asked for."""
        every = self.config.logging.term_gradient_norms_every
        if not every or step % every:
            return {}
        inputs = [x for x in views[:4] if x is not None and x.requires_grad]
        norms = {}
        for name, term in loss.terms.items():
            if term.requires_grad:
                gradients = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
                norms[f"gradient_norm/{name}"] = float(
                    torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
                )
        return norms

    def _micro_scalars(self, loaded: TrainingBatch, loss: LossTerms) -> dict[str, float]:
        counts = loaded.counts
        shares = {
            "prompts_cut": counts["prompts_cut"] / counts["rows"],
            "queries_reusing_negatives": counts["queries_reusing_negatives"] / loaded.packed.queries,
        }
        if counts["rationales"]:
            for name in ("rationales_cut", "fewer_segments_than_steps"):
                shares[name] = counts[name] / counts["rationales"]
        return {
            **{f"loss/{name}": float(value.detach()) for name, value in loss.terms.items()},
            "loss/total": float(loss.total.detach()),
            **{f"train/{name}": float(value) for name, value in loss.diagnostics.items()},
            **{f"data/{name}": value for name, value in shares.items()},
            "tokens": float(len(loaded.packed.tokens_T)),
        }

    def _reduced(self, values: dict[str, float], micro_batches: int) -> dict[str, float]:
        """Means over ranks, and speed from the step's wall time."""
        seconds = self.clock.reset()
        memory = peak_memory_gib(self.clock.device)
        tokens = values.pop("tokens") * micro_batches * world_size()
        values = mean_over_ranks(
            {**values, **{f"time/{name}": value for name, value in seconds.items()}, "tokens": tokens}
        )
        values["memory/peak"] = max(row["memory"] for row in gather_table({"memory": memory}))
        wall = sum(value for name, value in values.items() if name.startswith("time/"))
        values["speed/tokens_per_second"] = values.pop("tokens") / wall
        values["speed/queries_per_second"] = self._queries_per_step() / wall
        return values

    def _queries_per_step(self) -> int:
        return self.config.train.queries_per_rank * self.config.train.accumulation * world_size()

    def _check_data(self) -> int:
        """Optimizer steps of the run (of a run on one rank where epochs decide)."""
        config, manifest = self.config, load_manifest(Path(self.config.data.train))
        if config.objective.needs_rationale and manifest.without_rationale:
            raise UserError(
                f"{config.data.train} holds {manifest.without_rationale} examples without a rationale, which the explicit "
                "view needs: prepare with --missing-rationale drop, or set explicit, output and trajectory weights to 0"
            )
        if config.train.max_steps is not None:
            return config.train.max_steps
        return int(
            config.train.epochs * manifest.examples / (config.train.queries_per_rank * config.train.accumulation)
        )

    def _fingerprint(self) -> str:
        kept = ("seed", "model", "thinking", "text", "data", "objective", "optimizer", "train")
        data = {name: value for name, value in asdict(self.config).items() if name in kept}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def _announce(self, start: int) -> None:
        config, base = self.config, self.engine.module.base.config
        kept = f" (the first {base.num_hidden_layers} layers only)" if config.model.layers else ""
        kind = f"LoRA rank {config.model.lora_rank}" if config.model.lora_rank else "all weights"
        self.progress.say(
            f"{config.model.name}{kept} · {kind} · {config.model.dtype} · ZeRO-{self.engine.stage} · {world_size()} ranks · "
            f"{self._queries_per_step()} queries a step · {self.total_steps} steps"
            + (f" · resuming after step {start}" if start else "")
        )
