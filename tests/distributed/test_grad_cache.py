"""GradCache and its chunks, in float64 and without DeepSpeed: the whole batch's loss and gradients, digit for digit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laser_dist.batch import PackedBatch, Views
from laser_dist.chunks import chunks_needed, split_rows
from laser_dist.config import ModelConfig, ObjectiveConfig, TextConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat
from laser_dist.distributed.grad_cache import GradCache
from laser_dist.model.backbone import load_backbone, load_tokenizer
from laser_dist.model.retriever import LaserRetriever
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.testing import assert_close_relative, tiny_model_folder

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


class PlainEngine:
    """What GradCache needs of an engine."""

    device = torch.device("cpu")

    def __init__(self, module: LaserRetriever):
        self.module, self.marks = module, []

    def __call__(self, batch: PackedBatch) -> Views:
        return self.module(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.marks.append(last)
        loss.backward()


@pytest.fixture
def training_examples() -> list[Example]:
    """Rationales of one to four segments, passages of odd lengths."""
    words = "heat makes steam float above metal while cold stone keeps the drop still".split()
    made = []
    for i in range(4):
        rationale = "\n\n".join(" ".join(words[i + j : 2 * i + j + 2]) for j in range(1 + i))
        passages = [Passage(f"p{i}{j}", " ".join(words[j : 3 + 2 * i + j])) for j in range(2)]
        made.append(Example(f"q{i}", " ".join(words[2 * i : 9 - i]), rationale, (passages[0],), (passages[1],)))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", tied=True)


def retriever(folder, convention: str, steps: int) -> tuple[LaserRetriever, TextFormat]:
    lm = load_backbone(ModelConfig(name=str(folder), dtype="float32")).double().eval()
    text = TextFormat(load_tokenizer(ModelConfig(name=str(folder))), TextConfig(), steps=steps)
    return LaserRetriever(lm, steps=steps, convention=convention, passage_steps=steps > 2), text


def batch_of(text: TextFormat, examples, *, with_rationale: bool) -> PackedBatch:
    return text.batch(examples, [(e.positives[0], *e.negatives) for e in examples], with_rationale=with_rationale)


def gradients_of(model: LaserRetriever, batch: PackedBatch, chunks: int, objective: ObjectiveConfig):
    model.zero_grad()
    engine = PlainEngine(model)
    cache = GradCache(engine)
    loss = AlignmentObjective(objective, 0.1)(cache.forward(batch, chunks), batch, step=0)
    cache.backward(loss.total)
    assert engine.marks == [False] * (chunks - 1) + [True]
    entropy = loss.diagnostics["soft_token_entropy"]
    return loss, entropy, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("convention", "steps", "with_rationale"),
    [("official", 3, True), ("paper", 2, True), ("official", 1, True), ("official", 2, False)],
)
def test_any_number_of_chunks_gives_the_whole_batches_gradients(
    folder, training_examples, convention, steps, with_rationale
):
    """States or segments without their gradient, rows in the wrong places, a chunk without queries or passages."""
    model, text = retriever(folder, convention, steps)
    batch = batch_of(text, training_examples, with_rationale=with_rationale)
    weights = {} if with_rationale else {"explicit_weight": 0.0, "output_weight": 0.0, "trajectory_weight": 0.0}
    weights |= {"steps_weight": 0.5, "refinement_weight": 0.5} if steps > 2 else {}
    objective = ObjectiveConfig(temperature=0.1, distill_temperature=0.1, kernel="reference", **weights)
    loss, entropy, expected = gradients_of(model, batch, 1, objective)
    for chunks in (2, 3, 5, len(batch.lengths_R)):
        chunked, chunked_entropy, gradients = gradients_of(model, batch, chunks, objective)
        assert chunked.total.item() == pytest.approx(loss.total.item(), rel=1e-12)
        assert float(chunked_entropy) == pytest.approx(float(entropy), rel=1e-12)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close_relative(gradients[name], gradient, 1e-10, f"{name}, {chunks} chunks")


def test_one_chunk_runs_the_model_once(folder, training_examples):
    model, text = retriever(folder, "official", 2)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    batch = batch_of(text, training_examples, with_rationale=True)
    gradients_of(model, batch, 1, ObjectiveConfig())
    assert len(calls) == 1


def test_selected_rows_are_the_batch_of_these_rows(folder, training_examples):
    _, text = retriever(folder, "official", 2)
    whole = batch_of(text, training_examples, with_rationale=True)
    some = batch_of(text, training_examples[1:3], with_rationale=True)
    b, g = whole.queries, (len(whole.lengths_R) - whole.queries) // whole.queries
    chosen = whole.select(torch.tensor([1, 2, *range(b + g, b + 3 * g)]))
    for name in ("tokens_T", "positions_T", "lengths_R", "prompt_lengths_R", "segments_B"):
        assert torch.equal(getattr(chosen, name), getattr(some, name)), name
    most = some.segment_ends_BM.shape[1]
    assert torch.equal(chosen.segment_ends_BM[:, :most], some.segment_ends_BM)
    assert not whole.select(torch.tensor([b])).has_rationale


@given(LENGTHS, st.integers(1, 60))
def test_chunks_hold_every_row_once_and_none_is_empty(lengths, count):
    if count > len(lengths):
        with pytest.raises(ValueError, match="each needs at least one"):
            split_rows(lengths, count)
        return
    chunks = split_rows(lengths, count)
    assert len(chunks) == count and all(chunks)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    assert all(chunk == sorted(chunk) for chunk in chunks)


@given(LENGTHS, st.integers(1, 2000))
def test_no_chunk_exceeds_the_budget_and_more_chunks_keep_it(lengths, budget):
    if max(lengths) > budget:
        with pytest.raises(ValueError, match="tokens"):
            chunks_needed(lengths, budget)
        return
    count = chunks_needed(lengths, budget)
    assert sum(lengths) <= count * budget
    for more in range(count, len(lengths) + 1):  # another rank may need more than we do
        assert max(sum(lengths[row] for row in chunk) for chunk in split_rows(lengths, more)) <= budget
