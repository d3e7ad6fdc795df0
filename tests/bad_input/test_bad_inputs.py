"""What users get wrong, one line each: flags, recipes, DeepSpeed configs, rows, collections, shards, vectors,
checkpoints. Every one ends with a code that is not 0 and a message that names the place and the remedy, before anything
expensive, and without a traceback.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import write_shards
from laser_dist.testing.hostile import Ended, command

GOOD = {
    "query": "q",
    "rationale": "r",
    "positives": [{"id": "p", "text": "t"}],
    "negatives": [{"id": "n", "text": "u"}],
}
RECIPE = '[model]\nname = "{0}/model"\n[data]\ntrain = "{0}/shards"\n'


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Everything that a command may need, in order."""
    root = tmp_path_factory.mktemp("intact")
    rows = (Example(f"q{i}", f"query {i}", "why", (Passage(f"p{i}", "t"),), (Passage(f"n{i}", "u"),)) for i in range(4))
    write_shards(rows, root / "shards", source="made", shard_examples=2)
    (root / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    (root / "corpus.jsonl").write_text('{"id": "p1", "text": "t"}\n{"id": "p2", "text": "u"}\n')
    (root / "queries.jsonl").write_text('{"id": "q1", "text": "q"}\n')
    (root / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\n")
    (root / "hosts").write_text("one slots=2\n")
    (root / "model").mkdir()  # none of these inputs gets as far as the model
    (root / "recipe.toml").write_text(RECIPE.format(root))
    return root


@pytest.fixture
def here(intact, tmp_path, monkeypatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(intact, tmp_path / "w")
    (tmp_path / "w" / "recipe.toml").write_text(RECIPE.format(tmp_path / "w"))
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def refused(*arguments: object) -> str:
    """What the command says, in one line."""
    with pytest.raises(Ended) as error:
        command(*arguments)
    assert error.value.code not in (0, None) and "Traceback" not in error.value.said, error.value.said
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", error.value.said).split())


def check(said: str, *words: str) -> None:
    missing = [word for word in words if word not in said]
    assert not missing, f"{missing} not in: {said}"


TRAIN = ("train", "recipe.toml", "--output", "out")
PREPARE = ("prepare", "--source", "rows.jsonl", "--out", "out")
EVALUATE = ("evaluate", "--model", "model", "--out", "r.json")
ANNOTATE = ("annotate", "--source", "rows.jsonl", "--out", "a.jsonl", "--model", "m", "--base-url", "http://h/v1")
LAUNCH = ("launch", "--hostfile", "hosts", "recipe.toml", "--output", "out")
AGAIN = "laser-dist prepare"
FILES = ("--corpus", "corpus.jsonl", "--queries", "queries.jsonl", "--qrels", "qrels.tsv")

# arguments -> what the message must name: the flag or key, the value, and how to mend it
FLAGS = {
    "no command": (("trian",), ("trian", 'Did you mean "train"')),
    "no benchmark": (("bench", "stepp"), ("stepp", 'Did you mean "step"')),
    "a recipe that does not exist": (("train", "no.toml"), ("no.toml", "does not exist", "launchers/recipes/")),
    "a recipe that is a folder": (("train", "shards"), ("shards", "cannot be read", "TOML file")),
    "no recipe and no model": (("train", "--output", "out"), ("model.name", "hub id or a folder")),
    "no output": (("train", "recipe.toml"), ("output", "--output runs/first")),
    "no data": (("train", "--output", "o", "--model.name", "x/y"), ("data.train", "laser-dist prepare")),
    "a misspelt flag": ((*TRAIN, "--thinking.step", "3"), ("--thinking.step", "--thinking.steps")),
    "a misspelt section": ((*TRAIN, "--thinkin.steps", "3"), ("--thinkin.steps", "--thinking.steps")),
    "a word for a number": ((*TRAIN, "--seed", "many"), ("--seed", "many", "int")),
    "a choice that there is not": ((*TRAIN, "--model.dtype", "float16"), ("--model.dtype", "float16", "bfloat16")),
    "a flag without its value": ((*TRAIN, "--seed"), ("--seed", "Missing value")),
    "no steps": ((*TRAIN, "--thinking.steps", "0"), ("thinking.steps", "0", "from 1 to 1024")),
    "a negative temperature": ((*TRAIN, "--objective.temperature", "-1"), ("objective.temperature", "above 0")),
    "a temperature that is nan": ((*TRAIN, "--objective.temperature", "nan"), ("objective.temperature", "nan")),
    "a learning rate of 2": ((*TRAIN, "--optimizer.learning-rate", "2"), ("optimizer.learning_rate", "(0, 1)")),
    "a warm-up in steps": ((*TRAIN, "--optimizer.warmup", "100"), ("optimizer.warmup", "100", "share of all steps")),
    "betas beyond 1": ((*TRAIN, "--optimizer.betas", "0.9", "1.5"), ("optimizer.betas", "[0, 1)")),
    "an infinite clip": ((*TRAIN, "--optimizer.gradient-clipping", "inf"), ("gradient_clipping", "finite")),
    "no queries": ((*TRAIN, "--train.queries-per-rank", "0"), ("train.queries_per_rank", "at least 1")),
    "no epochs": ((*TRAIN, "--train.epochs", "0"), ("train.epochs", "above 0")),
    "no steps to train": ((*TRAIN, "--train.max-steps", "0"), ("train.max_steps", "at least 1")),
    "negative chunks": ((*TRAIN, "--train.chunk-tokens", "-1"), ("train.chunk_tokens", "0 for no chunks")),
    "a ZeRO that there is not": ((*TRAIN, "--train.deepspeed", "zero4"), ("zero4", "zero3.json")),
    "no layers": ((*TRAIN, "--model.layers", "0"), ("model.layers", "at least 1")),
    "a negative LoRA rank": ((*TRAIN, "--model.lora-rank", "-4"), ("model.lora_rank", "positive rank")),
    "a LoRA dropout of 1": ((*TRAIN, "--model.lora-dropout", "1"), ("model.lora_dropout", "[0, 1)")),
    "a query of no length": ((*TRAIN, "--text.max-query-tokens", "2"), ("text.max_query_tokens", "at least 8")),
    "no room for a rationale": (
        (*TRAIN, "--text.max-explicit-tokens", "512"),
        ("text.max_explicit_tokens", "must exceed text.max_query_tokens = 512"),
    ),
    "a template without the query": (
        (*TRAIN, "--text.query-template", "{querry}"),
        ("text.query_template", "must contain {query}"),
    ),
    "a brace that stays open": ((*TRAIN, "--text.query-template", "{query"), ("text.query_template", "{{ and }}")),
    "shards that are not there": ((*TRAIN, "--data.train", "no"), ("no/manifest.json", "laser-dist prepare")),
    "shards by ftp": ((*TRAIN, "--data.train", "ftp://h/x"), ("ftp://", "folders, http(s):// and s3://")),
    "a presigned address": (
        (*TRAIN, "--data.train", "https://h/x?X-Amz-Signature=abc"),
        ("data.train", "password or a query", "not shown"),
    ),
    "negative negatives": ((*TRAIN, "--data.negatives", "-1"), ("data.negatives", "0 or more")),
    "a window of no shards": ((*TRAIN, "--data.shuffle-shards", "0"), ("data.shuffle_shards", "at least 1")),
    "negative workers": ((*TRAIN, "--data.workers", "-1"), ("data.workers", "0 or more")),
    "a patience of no seconds": ((*TRAIN, "--data.timeout", "0"), ("data.timeout", "finite and positive")),
    "skipping everything": ((*TRAIN, "--data.max-skipped", "1"), ("data.max_skipped", "[0, 1)")),
    "a third of a dev set": ((*TRAIN, "--evaluation.corpus", "corpus.jsonl"), ("evaluation", "or none of them")),
    "evaluation of nothing": ((*TRAIN, "--evaluation.every", "5"), ("evaluation.every", "needs corpus, queries")),
    "a dev corpus that is not there": (
        (*TRAIN, "--evaluation.corpus", "c", "--evaluation.queries", "q", "--evaluation.qrels", "r"),
        ("evaluation.corpus", "'c'", "does not exist"),
    ),
    "no checkpoint to keep": ((*TRAIN, "--checkpoint.keep", "0"), ("checkpoint.keep", "at least 2")),
    "a shard of no bytes": ((*TRAIN, "--checkpoint.max-shard-gb", "0"), ("checkpoint.max_shard_gb", "more than 0")),
    "logging never": ((*TRAIN, "--logging.every", "0"), ("logging.every", "at least 1")),
    "a profile of negative steps": ((*TRAIN, "--profile.active", "-1"), ("profile.active", "at least 0")),
    "a time-out of a second": ((*TRAIN, "--launch.timeout", "1"), ("launch.timeout", "at least 10")),
    "launch: no recipe": (("launch", "--num_gpus", "2"), ("name a recipe", "launchers/recipes/")),
    "launch: a misspelt option": (("launch", "--num_gpu", "2", "r.toml"), ("--num_gpu", "--num_gpus")),
    "launch: half a restart": (
        ("launch", "--max-restarts", "1.5", "recipe.toml", "--output", "out"),
        ("--max-restarts 1.5", "whole number"),
    ),
    "launch: no hostfile": (
        ("launch", "--hostfile", "no", "recipe.toml", "--output", "out"),
        ("--hostfile no", "no such file", "slots=8"),
    ),
    "launch: a launcher that there is not": (
        ("launch", "--launcher", "slrum", "recipe.toml", "--output", "out"),
        ("slrum", "slurm"),
    ),
    "prepare: nothing": (("prepare",), ("--source FILE", "--out FOLDER")),
    "prepare: no such source": (("prepare", "--source", "no.jsonl", "--out", "o"), ("no.jsonl", "does not exist")),
    "prepare: a kind of file": (("prepare", "--source", "hosts", "--out", "o"), ("hosts", "is not read", ".jsonl")),
    "prepare: an occupied folder": (
        ("prepare", "--source", "rows.jsonl", "--out", "shards"),
        ("shards", "--overwrite"),
    ),
    "prepare: shards again": (("prepare", "--source", "shards", "--out", "o"), ("prepared shards", "--data.train")),
    "prepare: a dev share of 1": ((*PREPARE, "--dev-share", "1"), ("--dev-share 1", "below 1")),
    "prepare: two dev sizes": ((*PREPARE, "--dev-share", ".1", "--dev-queries", "1"), ("--dev-share", "one of them")),
    "prepare: a weight of 0": ((*PREPARE, "--weight", "0"), ("--weight", "above 0")),
    "prepare: a field that is none": (
        (*PREPARE, "--fields", "querry=q"),
        ("querry", '"query"', "The fields are"),
    ),
    "prepare: a field without =": ((*PREPARE, "--fields", "query"), ("--fields query", "OURS=THEIRS")),
    "prepare: a layout that there is not": ((*PREPARE, "--layout", "triplet"), ("--layout", "triplet", "triplets")),
    "prepare: shards of nothing": ((*PREPARE, "--shard-examples", "0"), ("--shard-examples 0", "at least 1")),
    "prepare: check and write": ((*PREPARE, "--check", "shards"), ("--check", "without --source")),
    "prepare: check what is none": (("prepare", "--check", "model"), ("model/manifest.json", "no complete set")),
    "inspect: no shards": (("inspect", "--model", "model"), ("laser-dist inspect SHARDS",)),
    "inspect: no model": (("inspect", "shards"), ("--model", "--recipe")),
    "inspect: no such shards": (("inspect", "no", "--model", "model"), ("no/manifest.json", "laser-dist prepare")),
    "inspect: a share of 2": (
        ("inspect", "shards", "--model", "model", "--fail-on-suspicious", "2"),
        ("--fail-on-suspicious 2", "from 0 to 1"),
    ),
    "annotate: no http": (
        ("annotate", "--source", "rows.jsonl", "--out", "a.jsonl", "--model", "m", "--base-url", "host/v1"),
        ("--base-url host/v1", "http://host:8000/v1"),
    ),
    "annotate: a bad name": (
        ("annotate", "--source", "rows.jsonl", "--out", "a.json", "--model", "m", "--base-url", "http://h/v1"),
        ("--out a.json", ".jsonl"),
    ),
    "annotate: a body that is no JSON": ((*ANNOTATE, "--extra-body", "{"), ("--extra-body", "not valid JSON", "top_p")),
    "mine: no method": (("mine", "--source", "rows.jsonl", "--out", "m.jsonl"), ("--method bm25", "--model FOLDER")),
    "mine: ranks backwards": (
        ("mine", "--source", "rows.jsonl", "--out", "m.jsonl", "--method", "bm25", "--ranks", "9", "3"),
        ("--ranks 9 3", "first and the last rank"),
    ),
    "mine: a part beyond all": (
        ("mine", "--source", "rows.jsonl", "--out", "m.jsonl", "--method", "bm25", "--shard", "5/4"),
        ("--shard 5/4", "1/4, 2/4"),
    ),
    "evaluate: no files": (EVALUATE, ("--corpus, --queries and --qrels", "none of them")),
    "evaluate: two files": ((*EVALUATE, "--corpus", "c", "--qrels", "q"), ("found --corpus --qrels",)),
    "evaluate: a split alone": ((*EVALUATE, *FILES, "--split", "dev"), ("--split", "goes with --data")),
    "evaluate: no dimension": ((*EVALUATE, *FILES, "--dim", "0"), ("--dim 0", "at least 1")),
    "evaluate: a folder that is none": ((*EVALUATE, "--data", "no"), ("no", "BEIR's layout")),
    "evaluate: a model that is none": ((*EVALUATE, *FILES), ("model", "config.json or adapter_config.json")),
    "search: no question": (("search", "--vectors", "v"), ("--queries, --query or --query-vectors", "none of them")),
    "search: no model": (("search", "--vectors", "v", "--query", "q"), ("--model", "made the vectors")),
    "search: vectors that are none": (
        ("search", "--vectors", "model", "--model", "model", "--query", "q"),
        ("model is no folder of vectors",),
    ),
    "search: an index that there is not": (
        ("search", "--vectors", "v", "--index", "hsnw"),
        ("--index", "hsnw", "hnsw"),
    ),
    "encode: no corpus": (("encode", "--model", "model", "--out", "v"), ("--corpus",)),
    "encode: a corpus that is not there": (
        ("encode", "--model", "model", "--corpus", "no.jsonl", "--out", "v"),
        ("no.jsonl", "cannot be read", "check the path"),
    ),
    "encode: over shards": (
        ("encode", "--model", "model", "--corpus", "corpus.jsonl", "--out", "shards", "--overwrite"),
        ("shards", "something else than vectors"),
    ),
    "encode: no tokens at a time": (
        ("encode", "--model", "m", "--corpus", "c", "--out", "v", "--batch-tokens", "0"),
        ("--batch-tokens 0", "at least 1"),
    ),
    "export: a run that is none": (("export", "no", "--out", "e"), ("no", "does not exist", "a run, a checkpoint")),
    "export: onto a file": (("export", "model", "--out", "hosts"), ("model", "holds no model")),
    "explain: no query": (("explain", "--model", "model"), ("--query", '--query "TEXT"')),
    "compare: one that is none": (("compare", "hosts", "qrels.tsv"), ("hosts", "not a result file")),
    "compare: one that is not there": (("compare", "a.json", "b.json"), ("a.json", "check the path")),
    "plan: no model": (("plan",), ("--model", "hub id")),
    "plan: no GPUs": (("plan", "--model", "4B", "--gpus", "0"), ("--gpus", "at least 1")),
    "bench: no rounds": (("bench", "damage", "--rounds", "0"), ("--rounds 0", "at least 1")),
    "quickstart: a misspelt flag": (("quickstart", "--max-step", "1"), ("--max-step", "--max-steps")),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, here):
    arguments, words = FLAGS[name]
    check(refused(*arguments), *words)


# text behind an intact recipe -> what the message must name
RECIPES = {
    "an unknown key": ("sede = 1", ("recipe.toml", '"sede"', 'Did you mean "seed"')),
    "a key in the wrong section": ("[model]\nlearning_rate = 1e-4", ("model.learning_rate", "optimizer.learning_rate")),
    "an unknown section": ("[optimiser]\nlearning_rate = 1e-4", ("optimiser", 'Did you mean "optimizer"')),
    "a value for a section": ("model = 3", ("recipe.toml", "model is a section", "[model]")),
    "a number in quotes": ('[thinking]\nsteps = "3"', ("thinking.steps", "'3'", "expected int")),
    "a fraction for a whole": ("[thinking]\nsteps = 3.0", ("thinking.steps", "3.0", "expected int")),
    "1 for true": ("resume = 1", ("resume", "expected bool")),
    "a choice that there is not": ('[model]\ndtype = "fp16"', ("model.dtype", "'fp16'", "'bfloat16'")),
    "a list for a text": ('[model]\nname = ["a"]', ("model.name", "expected str")),
    "three betas": ("[optimizer]\nbetas = [0.9, 0.9, 0.9]", ("optimizer.betas",)),
    "a key twice": ("seed = 1\nseed = 2\n", ("recipe.toml", "not valid TOML", "Cannot overwrite", "line 2")),
    "a string that stays open": ('output = "x\n', ("recipe.toml", "not valid TOML", "line 1")),
    "YAML": ("model:\n  name: x\n", ("recipe.toml", "not valid TOML")),
    "no UTF-8": (b"output = '\xff'", ("recipe.toml", "not valid TOML", "utf-8")),
    "a weight in quotes": ('[data]\nmix = {"a" = "2"}', ("data.mix", "expected float")),
    "a weight of 0": ('[data]\nmix = {"a" = 0}', ("data.mix", "finite and positive")),
    "a secret": ('output = "hf_abcdefghijklmnopqrstuvwxyzabcdefgh"', ("output", "access key", "not shown")),
    "infinity": ("[train]\nepochs = inf", ("train.epochs", "inf", "finite")),
    "train and mix": ('[data]\ntrain = "a"\nmix = {"b" = 1}', ("data.mix", "either train or mix")),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, here):
    text, words = RECIPES[name]
    (here / "recipe.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    output = [] if "output" in str(text) else ["--output", "out"]
    check(refused("train", "recipe.toml", "--model.name", "x/y", *output), *words)


DS_CONFIGS = {
    "a misspelt key": ('{"gradient_cliping": 1.0}', ("ds.json", '"gradient_cliping"', '"gradient_clipping"')),
    "a misspelt key within": (
        '{"zero_optimization": {"stage3_max_live_parameter": 1}}',
        ("ds.json", "zero_optimization.stage3_max_live_parameter", "zero_optimization.stage3_max_live_parameters"),
    ),
    "what the recipe owns": ('{"gradient_clipping": 1.0}', ("gradient_clipping", "1.0", "optimizer.gradient_clipping")),
    "an optimizer": ('{"optimizer": {"type": "Adam"}}', ("ds.json", '"optimizer"', "[optimizer] in the recipe")),
    "float16": ('{"fp16": {"enabled": true}}', ("ds.json", '"fp16"', "model.dtype")),
    "an auto that nobody fills": (
        '{"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}',
        ("zero_optimization.sub_group_size", "auto", "write a value"),
    ),
    "no JSON": ('{"bf16": }', ("ds.json", "not valid JSON", "line 1 column")),
    "a list": ("[]", ("ds.json", "expected a JSON object")),
    "a disk that is not there": (
        '{"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/no"}}}',
        ("nvme_path", "/no", "does not exist"),
    ),
}


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_deepspeed_configs(name, here):
    text, words = DS_CONFIGS[name]
    (here / "ds.json").write_text(text)
    check(refused(*TRAIN, "--train.deepspeed", "ds.json"), *words)


def changed(**changes: object) -> str:
    return json.dumps({k: v for k, v in (GOOD | changes).items() if v is not None})


ROWS = {
    "no JSON": ("{query: 1}", ("rows.jsonl:1", "not valid JSON", "column")),
    "a list": ("[1]", ("rows.jsonl:1", "JSON object", "a list")),
    "no query": (changed(query=None), ("rows.jsonl:1", '"query" is missing')),
    "a misspelt query": (changed(query=None, qeury="q"), ("rows.jsonl:1", '"query" is missing', '"qeury"')),
    "an empty query": (changed(query=" "), ("rows.jsonl:1", '"query" is empty', "fill it in")),
    "a number for a query": (changed(query=5), ("rows.jsonl:1", '"query" must be a string', "a number")),
    "no positives": (changed(positives=None), ("rows.jsonl:1", "positives")),
    "empty positives": (changed(positives=[]), ("rows.jsonl:1", '"positives" is empty')),
    "a text for positives": (changed(positives="t"), ("rows.jsonl:1", '"positives" must be a list')),
    "a passage without text": (changed(positives=[{"id": "p"}]), ("rows.jsonl:1", "positives[0]", '"text" is missing')),
    "a passage that is a number": (changed(positives=[5]), ("rows.jsonl:1", "positives[0]", "must be an object")),
    "a misspelt list": (
        changed(negatives=None, negativs=[{"text": "n"}]),
        ("rows.jsonl:1", '"negatives"', '"negativs"', "Rename it"),
    ),
    "a negative that is a positive": (
        changed(negatives=[{"id": "p", "text": "t"}]),
        ("rows.jsonl:1", "negatives[0]", "also a positive", "remove it"),
    ),
    "no rationale": (changed(rationale=None), ("rows.jsonl:1", "rationale", "--missing-rationale")),
    "a NUL": (changed(query="a\0b"), ("rows.jsonl:1", '"query"', "NUL")),
    "half a surrogate": (changed(query="\ud83d"), ("rows.jsonl:1", '"query"', "surrogate")),
    "a query too long": (changed(query="x" * 200_001), ("rows.jsonl:1", "--max-characters")),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name, here):
    text, words = ROWS[name]
    (here / "rows.jsonl").write_text(text + "\n")
    check(refused(*PREPARE, "--workers", 1), *words)


def test_a_row_that_is_no_text(here):
    (here / "rows.jsonl").write_bytes(b'{"query": "\xff"}\n')
    check(refused(*PREPARE, "--workers", 1), "rows.jsonl:1", "byte 12 is not UTF-8", "save the file as UTF-8")


COLLECTIONS = {
    "a corpus that is no JSON": ("corpus.jsonl", "{", ("corpus.jsonl:1", "not valid JSON")),
    "an id twice": ("corpus.jsonl", '{"id": "p1", "text": "t"}\n' * 2, ("corpus.jsonl:2", "'p1'", "unique")),
    "no id": ("queries.jsonl", '{"text": "t"}', ("queries.jsonl:1", "id is missing")),
    "an empty text": ("queries.jsonl", '{"id": "q1", "text": ""}', ("queries.jsonl:1", "text is missing or empty")),
    "a number for a text": ("queries.jsonl", '{"id": "q1", "text": 5}', ("queries.jsonl:1", "write it as text")),
    "an empty file": ("corpus.jsonl", "\n", ("corpus.jsonl", "the file is empty")),
    "qrels of two columns": ("qrels.tsv", "q1 p1\n", ("qrels.tsv:1", "2 columns", "separated by tabs")),
    "a word for a score": ("qrels.tsv", "q1\tp1\t1\nq1\tp2\tyes\n", ("qrels.tsv:2", "'yes'", "write 1")),
    "a judgement of another corpus": ("qrels.tsv", "q1\tp9\t1\n", ("qrels.tsv", "corpus-id", "'p9'", "one collection")),
    "contradicting judgements": ("qrels.tsv", "q1\tp1\t1\nq1\tp1\t0\n", ("qrels.tsv:2", "contradicts")),
    "nothing relevant": ("qrels.tsv", "q1\tp1\t0\n", ("relevant passage", "do the files match")),
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_collections(name, here):
    file, text, words = COLLECTIONS[name]
    (here / file).write_text(text)
    check(refused(*EVALUATE, *FILES), *words)


def damage(path: Path, text: str | None) -> None:
    path.unlink() if text is None else path.write_text(text)


FOLDERS = {
    "a shard that is gone": (
        "shards/shard-000001.tar",
        None,
        TRAIN,
        ("shard-000001.tar", "missing", "laser-dist prepare"),
    ),
    "a shard that is short": (
        "shards/shard-000001.tar",
        "x",
        TRAIN,
        ("shard-000001.tar", "1 bytes", "laser-dist prepare"),
    ),
    "a manifest that is gone": ("shards/manifest.json", None, TRAIN, ("shards/manifest.json", AGAIN)),
    "a manifest that is cut": (
        "shards/manifest.json",
        "{",
        TRAIN,
        ("shards/manifest.json is damaged", "laser-dist prepare"),
    ),
    "a manifest of the future": ("shards/manifest.json", '{"version": 9}', TRAIN, ("version 9", "reads 1 and 2")),
    "a hostfile of words": (
        "hosts",
        "one two",
        LAUNCH,
        ("hosts:1", "name slots=N"),
    ),
    "a host twice": (
        "hosts",
        "a slots=1\na slots=1",
        LAUNCH,
        ("hosts:2", "twice"),
    ),
    "a run without checkpoint": (
        "out/checkpoints/latest",
        "step-000001",
        ("export", "out", "--out", "e"),
        ("checkpoints/latest names step-000001", "is not there"),
    ),
    "a pointer to nowhere": ("out/checkpoints/latest", "../x", ("export", "out", "--out", "e"), ("latest", "'../x'")),
    "results that are cut": (
        "a.json",
        '{"per_query"',
        ("compare", "a.json", "a.json"),
        ("a.json", "not a result file"),
    ),
    "vectors that are unfinished": (
        "v/progress.json",
        "{}",
        ("search", "--vectors", "v", "--model", "m", "--query", "q"),
        ("v is not finished", "laser-dist encode"),
    ),
    "vectors that are cut": (
        "v/manifest.json",
        "{",
        ("search", "--vectors", "v", "--model", "m", "--query", "q"),
        ("v is damaged", "--overwrite"),
    ),
    "an occupied output": (
        "out/checkpoints/step-000001/x",
        "",
        TRAIN,
        ("output", "'out'", "already holds checkpoints", "--resume"),
    ),
    "a prompt without the query": (
        "p.txt",
        "Think!",
        (
            *FLAGS["annotate: a bad name"][0][:3],
            "--out",
            "a.jsonl",
            *FLAGS["annotate: a bad name"][0][5:],
            "--prompt",
            "p.txt",
        ),
        ("--prompt p.txt", "{query} is missing"),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, here):
    file, text, arguments, words = FOLDERS[name]
    (here / file).parent.mkdir(parents=True, exist_ok=True)
    damage(here / file, text)
    check(refused(*arguments), *words)


def test_there_are_more_than_a_hundred():
    assert sum(map(len, (FLAGS, RECIPES, DS_CONFIGS, ROWS, COLLECTIONS, FOLDERS))) + 1 > 160
