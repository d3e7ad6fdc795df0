"""From the settings of `prepare` to a plan, and from what was built to its manifest."""

import os
from array import array
from typing import TYPE_CHECKING

import numpy as np

from laser_dist import __version__
from laser_dist.data.manifest import DevSplit, Manifest, Source
from laser_dist.data.preparation.build import Builder, Plan
from laser_dist.data.preparation.console import Bar
from laser_dist.data.preparation.convert import Record, Rules, detect_form, load_tokenizer
from laser_dist.data.preparation.dev import CORPUS, QRELS, QUERIES
from laser_dist.data.preparation.partial import SKIPPED
from laser_dist.data.preparation.select import Selection
from laser_dist.data.sources.layouts import RowForm, parse_fields
from laser_dist.data.sources.read import hash_files, open_source
from laser_dist.errors import UserError

if TYPE_CHECKING:
    from laser_dist.data.preparation.prepare import PrepareConfig


def make_plan(config: "PrepareConfig") -> Plan:
    """The opened sources and how their rows are read. Raises UserError."""
    if config.tokenizer:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        load_tokenizer(config.tokenizer)
    given = RowForm(config.layout, parse_fields([pair for group in config.fields for pair in group]))
    origins = [open_source(name, given) for name in config.sources]
    forms = [detect_form(given, origin) for origin in origins]
    rules = [
        Rules(form, config.max_characters, config.too_long, config.contradictions, config.tokenizer) for form in forms
    ]
    return Plan(
        origins, rules, config.shard_examples, config.limit, config.on_error, config.max_skipped, config.processes
    )


def make_selection(config: "PrepareConfig", dev_below: int) -> Selection:
    """The judge of this run's rows."""
    return Selection(
        missing_rationale=config.missing_rationale,
        duplicates=config.duplicates,
        duplicate_queries=config.duplicate_queries,
        dev_below=dev_below,
    )


def find_dev_below(config: "PrepareConfig", plan: Plan) -> int:
    """The query key below which a query goes to the dev split. UserError if there are too few queries."""
    if config.dev_queries is None:
        return int(config.dev_share * 2**64)

    selection, keys, kept = make_selection(config, 0), array("Q"), 0
    bar = Bar("choosing the dev split", plan.sizes)
    with bar:
        for converted in plan.converted():
            for outcome in converted.outcomes:
                if isinstance(outcome, Record) and kept != config.limit and selection.judge(outcome).kind == "train":
                    keys.append(outcome.query_key)
                    kept += 1
            bar.update(kept, converted)
    distinct = np.unique(np.frombuffer(keys, dtype=np.uint64)) if keys else np.zeros(0)
    if len(distinct) <= config.dev_queries:
        raise UserError(f"--dev-queries {config.dev_queries}: there are only {len(distinct)} distinct queries")
    return int(distinct[config.dev_queries])


def make_manifest(config: "PrepareConfig", plan: Plan, builder: Builder, identities: list[dict[str, str]]) -> Manifest:
    """What was built, and from what; `identities` are those of the sources."""
    counts, folder = builder.totals.counts, builder.partial.folder
    sources = tuple(
        Source(
            origin.name,
            rows=counts[f"rows {i}"],
            examples=counts[f"examples {i}"],
            layout=plan.rules[i].form.layout,
            licence=licence or origin.licence(),
            weight=weight,
            **identities[i],
        )
        for i, (origin, licence, weight) in enumerate(
            zip(plan.origins, config.per_source("licence", ""), config.per_source("weight", 1.0), strict=True)
        )
    )
    dropped = builder.totals.named("dropped")
    dropped |= {f"wrong, see {SKIPPED}": counts["skipped"]} if counts["skipped"] else {}
    return Manifest(
        examples=counts["examples"],
        without_rationale=counts["without rationale"],
        shards=tuple(builder.partial.shards),
        sources=sources,
        dropped=dropped,
        dev=DevSplit(counts["dev"], builder.dev.passages) if counts["dev"] else None,
        files={
            name: hash_files([folder / name]) for name in (CORPUS, QUERIES, QRELS, SKIPPED) if (folder / name).is_file()
        },
        lengths=builder.totals.lengths.summary(),
        settings=config.settings(),
        created_with=f"laser-dist {__version__}",
    )
