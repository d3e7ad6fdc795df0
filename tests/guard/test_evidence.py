"""What the guard reads off a step: lengths before they are lost, in chunks as at once, and gradients row by row."""

from pathlib import Path

import pytest
import torch

from laser_dist.batch import TokenSequence, Views, pack
from laser_dist.config import ModelConfig
from laser_dist.distributed.grad_cache import GradCache
from laser_dist.guard.again import _Alone
from laser_dist.guard.evidence import MicroBatch, of_views, watch_gradients
from laser_dist.model.backbone import load_backbone, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.testing import tiny_model_folder


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> LaserRetriever:
    folder: Path = tiny_model_folder(tmp_path_factory.mktemp("model"))
    config = ModelConfig(name=str(folder), dtype="float32", activation_checkpointing=False)
    return LaserRetriever(prepare_for_training(load_backbone(config), config))


def batch():
    queries = [TokenSequence([5 + i, 6, 7], [8, 9, 10 + i], [1, 2]) for i in range(3)]
    passages = [TokenSequence([20 + i] * (2 + i)) for i in range(6)]
    return pack([*queries, *passages], eos=0, queries=3, labels_B=torch.arange(3) * 2)


def test_lengths_are_those_before_unit_length_and_the_shortest_of_a_row(retriever) -> None:
    made = batch()
    hidden_TD, thoughts_RKD, _ = retriever.think(made)
    found = retriever(made).row_norms_R
    assert not found.requires_grad
    means = thoughts_RKD.mean(1).norm(dim=1)
    eos = hidden_TD[made.lengths_R.cumsum(0)[:3] - 1].norm(dim=1)
    shortest = torch.stack([means[:3], eos, *thoughts_RKD[:3].norm(dim=2).T]).amin(0)
    torch.testing.assert_close(found, torch.cat([shortest, means[3:]]))


def test_chunks_give_the_same_lengths_in_the_batchs_order(retriever) -> None:
    alone = _Alone(retriever, torch.device("cpu"))
    whole = GradCache(alone).forward(batch(), 1)
    chunked = GradCache(alone).forward(batch(), 4)
    torch.testing.assert_close(chunked.row_norms_R, whole.row_norms_R)
    assert not chunked.row_norms_R.requires_grad and chunked.query_BD.requires_grad


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_of_rows_are_noted_on_the_way_back(retriever, chunks) -> None:
    """In chunks the vectors are leaves, and backward goes through autograd.grad."""
    cache = GradCache(_Alone(retriever, torch.device("cpu")))
    views = cache.forward(batch(), chunks)
    micro = MicroBatch(batch(), chunks, [])
    watch_gradients(views, micro)
    cache.backward(3 * views.query_BD[1].sum() + 100 * views.passage_PD[4].sum())
    found = micro.row_gradients()
    width = views.query_BD.shape[1] ** 0.5
    assert found.argmax() == 3 + 4 and found[0] == 0
    assert found[1] == pytest.approx(3 * width / float(views.row_norms_R[1]), rel=1e-5)


def test_one_passage_alone_is_no_collapse() -> None:
    views = Views(
        torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 2, 4), None, None, torch.zeros(()), row_norms_R=torch.ones(2)
    )
    assert float(of_views(views)["spread"]) == 1
    two = views._replace(passage_PD=torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]))
    assert float(of_views(two)["spread"]) == 0.5
