"""The guard of a run: what every rank must agree on before a step changes a parameter.

Trainer.step calls, in this order: `begin`, for each micro-batch `note` (before its forward) and `check` (after its
loss), `check_replicas` and `update`. A broken rule raises on all ranks alike, the batch is dumped,
and parameters, optimizer states and the data's position are those before the step.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch

from laser_dist.batch import PackedBatch, Views
from laser_dist.config import RunConfig
from laser_dist.data.streaming.loader import TrainingBatch
from laser_dist.data.streaming.sets import TrainingData
from laser_dist.distributed.collectives import gather_objects, gather_scalars, gather_table, rank, world_size
from laser_dist.distributed.engine import Engine, NonFiniteGradient
from laser_dist.distributed.rng import rng_state
from laser_dist.errors import UserError
from laser_dist.guard import rules
from laser_dist.guard.dump import Report, write_dump
from laser_dist.guard.evidence import MicroBatch, of_batch, of_loss, of_views, watch_gradients
from laser_dist.guard.replicas import compare_replicas
from laser_dist.guard.rules import RULES, Alarm, Moment, Windows
from laser_dist.objective.alignment import LossTerms

QUIET = 100
"""Steps for which a warning is not said again."""
SHOWN = 8
"""Ids and ranks told in a message; the dump has all of them."""


class Guard:
    """One per run, alike on all ranks."""

    def __init__(self, config: RunConfig, data: TrainingData, engine: Engine):
        self.config, self.engine, self.on = config, engine, config.guard.alarm != "off"
        # Elsewhere an example may rightly come again within a pass.
        once = len(data.sets) == 1 and config.data.on_error == "stop"
        self.examples = data.examples if once else None
        self.windows = Windows()
        self.said: dict[str, int] = {}
        self.say: Callable[[str], None] = lambda line: None
        """For alarms that do not stop; the trainer puts its own here."""
        self.last: Alarm | None = None
        self.scalars: dict[str, float] = {}
        """How near the rules of the last step were to their limits."""

    def begin(self, step: int, learning_rate: float, weights: dict[str, float]) -> None:
        """A new optimizer step (from 0)."""
        self.step, self.micros, self.number = step, list[MicroBatch](), 0
        self.known = {"step": float(step), "learning_rate": learning_rate, "weights": math.fsum(weights.values())}
        self.weights = weights

    def note(self, loaded: TrainingBatch, batch: PackedBatch, chunks: int) -> None:
        """Keep what a replay needs of a micro-batch, before its forward; `batch` is `loaded`'s on the device."""
        self.loaded, self.number = loaded, len(self.micros)
        self.micros.append(MicroBatch(batch, chunks, rng_state(self.engine.device)))

    def check(self, views: Views, loss: LossTerms) -> dict[str, float]:
        """Compare what all ranks know of this micro-batch; returns this rank's row. Raises UserError on all ranks."""
        micro = self.micros[-1]
        values, known = of_loss(loss), dict(self.known)
        if self.on:
            values |= of_views(views) | loss.evidence
            known |= of_batch(micro.batch, self.loaded.counts)
        micro.table = table = gather_scalars(values, known)
        moment = self._moment(views)
        if alarm := rules.finite(table, moment, self.windows, self.config):
            self._stop(alarm, self._broken_parameters())
        if not self.on:
            return table[rank()]
        watch_gradients(views, micro)
        shortest = min(row["shortest"] / max(row["typical"], 1e-30) for row in table)
        spread = max(row["spread"] for row in table)
        self.scalars = {"guard/shortest_row": shortest, "guard/passage_spread": spread}
        found = [check(table, moment, self.windows, self.config) for check in rules.CHECKS[1:]]
        for alarm in filter(None, found):
            self._raise(alarm, self._stale(alarm, loss))
        return table[rank()]

    def check_replicas(self) -> None:
        """Where due, compare what ranks hold in common; right before an update, which would write over it."""
        every = self.config.guard.checksums_every
        if not self.on or not every or (self.step + 1) % every:
            return
        if found := compare_replicas(self.engine):
            term = found.parameters[0] if found.parameters else "master copy"
            self._raise(Alarm("replicas", found.reason, len(found.parameters), 0, found.ranks, term=term))

    def update(self) -> float:
        """The optimizer's update, if nothing speaks against it; returns the norm of the gradient before clipping."""
        try:
            norm = self.engine.step(self._judge if self.on else None)
        except NonFiniteGradient:
            reason = "the gradient is not finite on at least one rank"
            self._stop(self._blame(Alarm("finite", reason, math.inf, math.inf, term="gradient")))
        return norm

    def _judge(self, norm: float) -> None:
        if self.engine.stage == 0 and world_size() > 1:  # elsewhere the norm itself comes from a collective
            norm = max(row["norm"] for row in gather_table({"norm": norm}))
        limit = rules.gradient_limit(self.windows, self.config)
        self.scalars["guard/gradient_share"] = norm / limit
        if norm > limit:
            reason = f"the norm of the gradient is {norm:.4g}, limit {limit:.4g}"
            largest = max(self.weights, key=lambda name: self.weights[name] * self.micros[-1].table[0][f"loss/{name}"])
            self._raise(self._blame(Alarm("gradient_spike", reason, norm, limit, term=largest)))
        self.windows.norms.append(norm)

    def _moment(self, views: Views) -> Moment:
        queries, ranks = len(views.query_BD), world_size()
        whole = None
        if self.examples is not None:
            first = round(self.loaded.epoch * self.examples)
            passes = first // self.examples, (first + queries * ranks - 1) // self.examples
            whole = passes[0] if passes[0] == passes[1] else None
        return Moment(self.step, queries * ranks, len(views.passage_PD) * ranks, whole)

    def _blame(self, alarm: Alarm) -> Alarm:
        """The rank and rows with the largest gradients, those that are not numbers first."""
        own: list[tuple[float, int, int]] = []  # (length, micro-batch, row)
        for number, micro in enumerate(self.micros):
            if (found_R := micro.row_gradients()) is not None:
                found_R = found_R.nan_to_num(math.inf, math.inf)
                own += [(float(found_R[row]), number, int(row)) for row in found_R.topk(min(3, len(found_R))).indices]
        everyone = [(*row, r) for r, rows in enumerate(gather_objects(own)) for row in rows]
        worst, number, _, guilty = max(everyone, default=(0.0, 0, 0, 0))
        if not everyone or (math.isfinite(worst) and not math.isfinite(alarm.value)):
            return alarm  # it comes from inside the model
        rows = tuple(row for value, n, row, r in sorted(everyone, reverse=True) if (n, r) == (number, guilty))
        self.number = number
        reason = f"{alarm.reason}; the largest of a row is {worst:.3g}, in micro-batch {number + 1} on rank {guilty}"
        return replace(alarm, reason=reason, ranks=(guilty,), rows=rows)

    def _broken_parameters(self) -> str:
        """Names of parameters that are not finite, on any rank: for a message."""
        lm: Any = self.engine.module.lm
        named = lm.named_parameters()
        tensors = ((name, getattr(p, "ds_tensor", p).detach()) for name, p in named)
        own = [name for name, x in tensors if not torch.isfinite(x).all()]
        found = sorted({name for names in gather_objects(own) for name in names})
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return f" Parameter {found[0]}{more} holds values that are not finite." if found else ""

    def _stale(self, alarm: Alarm, loss: LossTerms) -> str:
        """Whose passages were not what a rank received."""
        if alarm.rule != "gather" or loss.received_W is None:
            return ""
        sent = [row["sent"] for row in self.micros[-1].table]
        everyone = gather_objects(loss.received_W.tolist())
        pairs = [
            f"{r} got another {s}" for r, got in enumerate(everyone) for s in range(len(sent)) if got[s] != sent[s]
        ]
        return f" Rank {', rank '.join(pairs[:SHOWN])}."

    def _raise(self, alarm: Alarm, addition: str = "") -> None:
        self.last, stops = alarm, RULES[alarm.rule].stops
        if stops or (stops is None and self.config.guard.alarm == "stop"):
            self._stop(alarm, addition)
        if self.step - self.said.get(alarm.rule, -QUIET) >= QUIET:
            self.said[alarm.rule] = self.step
            where = f" {self._dump(alarm, weights=False)[1]}." if stops is None else ""
            self.say(f"step {self.step + 1}: {alarm.reason}.{addition} {RULES[alarm.rule].remedy}.{where}")

    def _stop(self, alarm: Alarm, addition: str = "") -> NoReturn:
        self.last = alarm
        report, where = self._dump(alarm, weights=self.config.guard.dump_weights)
        concerned = (alarm.ranks or tuple(range(world_size())))[:SHOWN]
        told = "; ".join(f"rank {r}: {_shown(report.query_ids[r][self.number])}" for r in concerned)
        named = f" Named first: {', '.join(report.examples)}." if report.examples else ""
        raise UserError(
            f"step {self.step + 1}: {alarm.reason}. No parameter was updated; the last checkpoint is good.{addition}"
            f"{named} Queries of micro-batch {self.number + 1}: {told}. {RULES[alarm.rule].remedy}. {where}"
        )

    def _dump(self, alarm: Alarm, *, weights: bool) -> tuple[Report, str]:
        ids = gather_objects([micro.batch.query_ids for micro in self.micros])
        report = Report.of(alarm, self.config, self.known, self.weights, self.number, self.micros, ids)
        return report, write_dump(report, self.micros, self.engine, self.config, weights=weights)


def _shown(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
