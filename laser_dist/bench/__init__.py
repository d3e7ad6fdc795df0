"""`laser-dist bench NAME ...`: measurements that check first that what they compare computes the same."""

import importlib
import sys

from laser_dist.errors import suggest

BENCHMARKS = {
    "step": "laser_dist.bench.step",
    "chunks": "laser_dist.bench.chunks",
    "loader": "laser_dist.bench.loader",
    "damage": "laser_dist.bench.damage",
    "prepare": "laser_dist.bench.prepare",
    "resume": "laser_dist.bench.resume",
    "killed-saves": "laser_dist.bench.killed_saves",
    "killed-runs": "laser_dist.bench.killed_runs",
    "encode": "laser_dist.bench.encode",
    "corpus": "laser_dist.bench.corpus",
    "latency": "laser_dist.bench.latency",
    "scaling": "laser_dist.bench.scaling",
    "faults": "laser_dist.bench.faults",
    "soak": "laser_dist.bench.soak",
    "guard": "laser_dist.bench.guard",
    "reliability": "laser_dist.bench.reliability",
}
USAGE = """usage: laser-dist bench NAME ...

benchmarks:
  step     One training step, ours and the published one: time, memory, tokens
  chunks   A large batch in chunks by token budget (GradCache): memory and time
  loader   Reading, tokenising and packing, ours and plain pipelines: examples/s, tokens/s
  damage   Damaged shards, read by this package and by WebDataset: what is noticed, and what noticing costs
  prepare  Rows per second and memory of `prepare` and `prepare --check`
  resume   Seconds to the first batch when a run continues at several places of a large set
  killed-saves  Ranks killed while they save: what is left loads, and is no mixture
  killed-runs   Runs killed and resumed at random moments, compared step by step with a whole one
  encode   Texts per second of LaserEncoder and of sentence-transformers, on mixed lengths
  corpus   `encode` and exact search of a large corpus, killed and continued: bytes, memory, time
  latency  Encoding with K latent steps, one encoder pass, and rewriting before encoding: time, ratios
  guard    Anomalies put into real trainings and clean steps: what is caught, false alarms, overhead
  scaling  Bytes held and sent and FLOPs of a step on 1, 2 and 4 processes, counted, beside what `plan` says
  faults   Real runs struck by faults in every phase: which recover, which stop, who is blamed, how soon
  soak     One real run, struck again and again for minutes: weights, losses, ledger and verdicts at its end
  reliability   All that must hold when things go wrong, in one table: faults, kills, damage, anomalies, bad input

example:
  laser-dist bench step --model Qwen/Qwen3-0.6B --queries 8 --out step.json
  laser-dist bench loader --paper-lengths --out loader.json
  laser-dist bench prepare --rows 1000000 --workers 2
  laser-dist bench latency --random-weights qwen3-0.6b --dtype bfloat16 --device cuda --out latency.json
"""


def main(arguments: list[str]) -> int:
    """Run one benchmark; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHMARKS:
        print(f'laser-dist bench: unknown benchmark "{name}".{suggest(name, BENCHMARKS)}\n\n{USAGE}', file=sys.stderr)
        return 2
    return importlib.import_module(BENCHMARKS[name]).main(rest)
