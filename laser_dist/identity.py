"""What must stay the same for a run to go on with the same numbers: in each checkpoint, and compared key by key."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from laser_dist.config import RunConfig
from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.streaming.sets import TrainingData

Settings = dict[str, Any]
"""Dotted key -> value, as JSON has it; beside the recipe's keys data.sets and tokenizer."""

# Keys of the recipe that are younger than some checkpoints, and off by default. While they are off they are no part of
# the hash, or checkpoints that have nothing else would be refused.
NEWER = frozenset({"objective.steps_weight", "objective.refinement_weight", "objective.teacher"})


def fingerprint(config: RunConfig, sets: list[Any]) -> str:
    """Hash of what must not change on resume: all that decides the numbers, the data itself included."""
    table = _table(config)
    for key in NEWER:
        section, _, name = key.partition(".")
        if not table[section].get(name):
            table[section].pop(name, None)
    table["data"]["sets"] = sets
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def settings(config: RunConfig, data: "TrainingData", tokenizer: str | None) -> Settings:
    """The same, key by key. `tokenizer`: its hash."""
    parts = [
        f"{len(shards)} shards, weight {weight}, {hashlib.sha256(''.join(shards).encode()).hexdigest()[:12]}"
        for weight, shards in data.fingerprint()
    ]
    return {**_flat(_table(config)), "data.sets": parts, "tokenizer": tokenizer}


def require_same(place: str, saved: tuple[str, Settings | None], ours: tuple[str, Settings | None]) -> None:
    """UserError names each key that differs between a checkpoint and this run, with both values.

    Both are a fingerprint and settings, where they are known; a hash alone cannot say what differs.
    """
    if saved[1] is None or ours[1] is None:
        if saved[0] != ours[0]:
            raise UserError(
                f"{place} belongs to another configuration (model, thinking, text, data, objective, optimizer or "
                "batch differ); compare config.toml in the run's folder, or choose another --output"
            )
        return
    if lines := differences(saved[1], ours[1]):
        flag = next((f", e.g. {flag}" for key in lines if (flag := _flag(key, saved[1].get(key)))), "")
        listed = "\n  ".join(lines.values())
        raise UserError(
            f"{place} belongs to another configuration:\n  {listed}\nGo on with the checkpoint's values{flag}, or "
            "start a run of its own with another --output"
        )


def differences(saved: Settings, ours: Settings) -> dict[str, str]:
    """Key -> what differs. A key that a checkpoint does not have had its default when that was written."""
    known = {**_flat(_table(RunConfig())), "tokenizer": ours.get("tokenizer"), "data.sets": ours.get("data.sets")}
    before = known | {key: value for key, value in saved.items() if not (key == "tokenizer" and value is None)}
    return {
        key: f"{key}: {json.dumps(before[key])} in the checkpoint, {json.dumps(ours[key])} in this run"
        if key in ours
        else f"{key}: {json.dumps(before[key])} in the checkpoint, and this version does not know the key"
        for key in before
        if key not in ours or before[key] != ours[key]
    }


def _table(config: RunConfig) -> dict[str, Any]:
    """Not where the data lies or who reads it, nor how many queries a step takes: the data goes on at its position.

    Not how ZeRO shards either: a checkpoint is converted.
    """
    kept = ("seed", "model", "thinking", "text", "data", "objective", "optimizer", "train")
    table: dict[str, Any] = {name: value for name, value in asdict(config).items() if name in kept}
    order = ("homogeneous", "negatives", "shuffle", "shuffle_shards")
    table["data"] = {name: table["data"][name] for name in order}
    for name in ("queries_per_rank", "chunk_tokens", "reduce_gradients", "deepspeed"):
        del table["train"][name]
    del table["model"]["activation_checkpointing"], table["model"]["attention"]
    del table["objective"]["kernel"], table["objective"]["passages"]
    return table


def _flat(table: dict[str, Any]) -> Settings:
    flat: Settings = {}
    for name, part in table.items():
        flat |= {f"{name}.{key}": value for key, value in part.items()} if isinstance(part, dict) else {name: part}
    return json.loads(json.dumps(flat))  # tuples are lists, as they come back from a file


def _flag(key: str, value: object) -> str:
    """The flag that gives a key its value; '' where that is no plain number or name."""
    plain = type(value) in (int, float) or (isinstance(value, str) and value.isalnum())
    return f"--{key.replace('_', '-')} {value}" if plain and key != "tokenizer" else ""
