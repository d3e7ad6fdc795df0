"""Evaluation on an encoded corpus: the same numbers as encoding it, and vectors of something else refused."""

import json
import shutil

import pytest

from laser_dist.errors import UserError
from laser_dist.retrieval.encode import encode_corpus, weights_hash
from laser_dist.retrieval.encoder import LaserEncoder
from laser_dist.retrieval.evaluation.command import main
from laser_dist.retrieval.metrics import METRICS
from laser_dist.testing.tiny import tiny_model_folder

TEXTS = ["ice floats on water", "the sky is blue", "air scatters light", "water is dense", "a crystal holds molecules"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = tiny_model_folder(folder / "model")
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": f"q{i}", "text": f"why? {text}", "rationale": f"So.\n\n{text}"} for i, text in enumerate(TEXTS[:3])]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels.tsv").write_text("".join(f"q{i}\td{4 - i}\t1\n" for i in range(3)))
    encoder = LaserEncoder.from_pretrained(model, dim=24)
    encode_corpus(encoder, folder / "corpus.jsonl", folder / "vectors", weights=weights_hash(model))
    return folder


@pytest.fixture
def run(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "made")

    def evaluated(*flags, model="model"):
        flags = ["--no-bm25", *(str(flag).format(folder) for flag in flags)]
        assert (
            main(["--model", str(folder / model), "--data", str(folder), "--out", str(folder / "o.json"), *flags]) == 0
        )
        return json.loads((folder / "o.json").read_text())

    evaluated.folder = folder
    return evaluated


def test_the_numbers_are_those_of_encoding(run):
    stored, encoded = run("--vectors", "{}/vectors"), run("--dim", 24)
    assert {m: stored[m] for m in METRICS} == {m: encoded[m] for m in METRICS}
    assert stored["per_query"] == encoded["per_query"]
    assert stored["seconds"]["encode_passages"] < encoded["seconds"]["encode_passages"]


def test_the_explicit_view_is_another_one(run):
    latent, explicit = run(), run("--explicit")
    assert (latent["view"], explicit["view"]) == ("latent", "explicit")
    assert latent["per_query"] != explicit["per_query"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--steps", 6), "thinking.steps 3, not 6"),
        (("--max-tokens", 64), "text.max_passage_tokens 512, not 64"),
        (("--dim", 12), "has 24 components"),
    ],
)
def test_vectors_of_other_settings_are_refused(run, flags, told):
    with pytest.raises(UserError, match=told):
        run("--vectors", "{}/vectors", *flags)


def test_vectors_of_another_model_or_corpus_are_refused(run):
    """Retrained weights, and a passage edited in place: ids, counts and shapes are all the same."""
    tiny_model_folder(run.folder / "other", seed=1)
    with pytest.raises(UserError, match="give the model that made the vectors"):
        run("--vectors", "{}/vectors", model="other")
    corpus = run.folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("blue", "grey"))
    with pytest.raises(UserError, match="vectors of another corpus"):
        run("--vectors", "{}/vectors")
