"""Any number of ranks, ZeRO stage, checkpointing, LoRA or tying: the update of one process with the whole batch."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from laser_dist.config import ModelConfig, ObjectiveConfig, TextConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat
from laser_dist.distributed.engine import Engine, NonFiniteGradient, init_distributed
from laser_dist.distributed.grad_cache import GradCache
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.model.teacher import FrozenTeacher
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.objective.terms import STEP_TERMS, TERMS
from laser_dist.testing import assert_close_relative, run_distributed, tiny_model_folder

# Gradients here reach 20 and are good to 7e-5 in float32 (against float64): this rate moves weights by up to their own
# size, so that a term scaled by 2 is far outside the tolerance and rounding is inside.
QUERIES, PASSAGES_PER_QUERY, LEARNING_RATE = 4, 2, 0.01
# Sums over ranks and padded lengths come in another order; float32 rounding of that is near 1e-6.
TOLERANCE = 1e-5
# Chunks also add the gradients of rows in another order; the gradient itself is good to 7e-5 * 20 * LEARNING_RATE.
CHUNKED = 5e-5
WORDS = "heat makes steam float above metal while cold stone keeps the drop still and bright under water".split()
OBJECTIVE = ObjectiveConfig(temperature=0.1, distill_temperature=0.1, output_weight=2.0, trajectory_weight=0.5)
OF_STEPS = replace(OBJECTIVE, steps_weight=1.0, refinement_weight=1.0)
OFFLINE, FROZEN = replace(OBJECTIVE, explicit_weight=0.0, teacher="as the model began"), "with a frozen teacher"


def examples() -> list[Example]:
    """Queries, rationales and passages of odd lengths; two queries share a passage, so that masking is at work."""
    generator = torch.Generator().manual_seed(3)

    def text(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator))

    made = []
    for i in range(QUERIES):
        rationale = "\n\n".join(text(2, 7) for _ in range(1 + i % 4))
        passages = [Passage(f"p{i}-{j}", text(3, 12)) for j in range(PASSAGES_PER_QUERY)]
        made.append(Example(f"q{i}", text(3, 9), rationale, (passages[0],), tuple(passages[1:])))
    shared = Passage("p0-0", made[0].positives[0].text)
    made[3] = replace(made[3], negatives=(shared,))
    return made


def build(folder: Path, *, lora: bool, checkpointing: bool, dropout: float = 0.0) -> tuple[LaserRetriever, TextFormat]:
    config = ModelConfig(
        name=str(folder),
        dtype="float32",
        lora_rank=4 if lora else 0,
        lora_alpha=8,
        lora_dropout=dropout,
        lora_targets=("q_proj", "v_proj", "up_proj"),
        activation_checkpointing=checkpointing,
    )
    torch.manual_seed(0)
    lm = prepare_for_training(load_backbone(config), config)
    for name, parameter in lm.named_parameters():  # LoRA's B starts at zero, where A has no gradient to compare
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return LaserRetriever(lm, steps=3, passage_steps=True), TextFormat(load_tokenizer(config), TextConfig(), steps=3)


def loss_of(model, text: TextFormat, share: list[Example], term: str | None) -> Tensor:
    batch = text.batch(share, [(e.positives[0], *e.negatives) for e in share], with_rationale=True)
    if term == FROZEN:
        teacher = build(Path(text.tokenizer.name_or_path), lora=False, checkpointing=False)[0]
        objective = AlignmentObjective(OFFLINE, 0.1, FrozenTeacher(teacher, steps=3, convention="official"))
    else:
        objective = AlignmentObjective(OF_STEPS if term in STEP_TERMS else OBJECTIVE, 0.1)
    loss = objective(model(batch), batch, step=0)
    return loss.total if term in (None, FROZEN) else loss.terms[term]


def reference_update(folder: Path, *, lora: bool, term: str | None = None) -> dict[str, Tensor]:
    """One process, the whole batch, plain PyTorch."""
    model, text = build(folder, lora=lora, checkpointing=False)
    loss_of(model, text, examples(), term).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
    return {name: p.detach().clone() for name, p in model.lm.named_parameters() if p.requires_grad}


def engine_of(model: LaserRetriever, stage: int, accumulation: int = 1, *, reduce_once: bool = False) -> Engine:
    trained = [p for p in model.parameters() if p.requires_grad]
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return Engine(model, torch.optim.SGD(trained, lr=LEARNING_RATE), ds_config, reduce_once=reduce_once)


def updates_of_rank(rank: int, world_size: int, folders: dict[str, Path], cases: list[tuple]) -> list[dict]:
    """The updated parameters of each (tying, stage, checkpointing, lora, term)."""
    init_distributed()
    mine = QUERIES // world_size
    share = examples()[rank * mine : (rank + 1) * mine]
    updates = []
    for tying, stage, checkpointing, lora, term in cases:
        model, text = build(folders[tying], lora=lora, checkpointing=checkpointing)
        engine = engine_of(model, stage)
        engine.backward(loss_of(engine, text, share, term))
        engine.step()
        updates.append(engine.full_state_dict(only_trained=True))
    return updates


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny_model_folder(root / "tied", architecture="llama", tied=True),
        "untied": tiny_model_folder(root / "untied", architecture="qwen3", tied=False),
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.slow
def test_update_equals_one_process_with_the_whole_batch(world_size: int, folders: dict[str, Path]) -> None:
    """A term scaled by W, a gather without gradient, K/V lost to checkpointing, a partitioned embedding show here."""
    cases = list(itertools.product(folders, range(4), (False, True), (False, True), (None,)))
    if world_size == 2:
        cases += [(tying, 3, True, False, term) for tying in folders for term in (*TERMS, *STEP_TERMS, FROZEN)]
    actual = run_distributed(updates_of_rank, world_size, folders, cases, timeout=600)[0]
    references = {}
    for case, update in zip(cases, actual, strict=True):
        tying, _, _, lora, term = case
        if (tying, lora, term) not in references:
            references[tying, lora, term] = reference_update(folders[tying], lora=lora, term=term)
        expected = references[tying, lora, term]
        assert update.keys() == expected.keys()
        for name, value in expected.items():
            assert_close_relative(update[name], value, TOLERANCE, f"{name} in {case}, {world_size} ranks")


def accumulated_updates(rank: int, world_size: int, folder: Path) -> list[tuple[float, dict]]:
    init_distributed()
    made = []
    for stage in range(4):
        model, text = build(folder, lora=False, checkpointing=True)
        engine = engine_of(model, stage, accumulation=2)
        for first, last in ((0, False), (2, True)):
            engine.backward(loss_of(engine, text, examples()[first + rank : first + rank + 1], None), last=last)
        made.append((engine.step(), engine.full_state_dict()))
    return made


def test_accumulation_averages_the_gradients_of_its_micro_batches(folders: dict[str, Path]) -> None:
    """A boundary that DeepSpeed counts by itself, or a mean taken twice, shows here."""
    model, text = build(folders["tied"], lora=False, checkpointing=False)
    for half in (examples()[:2], examples()[2:]):
        (loss_of(model, text, half, None) / 2).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    for actual_norm, update in run_distributed(accumulated_updates, 2, folders["tied"])[0]:
        assert actual_norm == pytest.approx(norm, rel=1e-4)
        for name, value in model.lm.named_parameters():
            assert_close_relative(update[name], value, TOLERANCE, name)


def chunked_updates(rank: int, world_size: int, folders: dict[str, Path], cases: list[tuple]) -> list[tuple]:
    """Loss and updated parameters of each (tying, stage, checkpointing, lora, chunks, reduce_once, accumulation)."""
    init_distributed()
    made = []
    for tying, stage, checkpointing, lora, chunks, reduce_once, accumulation in cases:
        model, text = build(folders[tying], lora=lora, checkpointing=checkpointing)
        engine = engine_of(model, stage, accumulation, reduce_once=reduce_once)
        cache, losses = GradCache(engine), []
        with engine.reduction():
            for number in range(accumulation):
                each = QUERIES // accumulation
                mine = examples()[number * each : (number + 1) * each][rank * each // world_size :][
                    : each // world_size
                ]
                batch = text.batch(mine, [(e.positives[0], *e.negatives) for e in mine], with_rationale=True)
                loss = AlignmentObjective(OBJECTIVE, 0.1)(cache.forward(batch, chunks), batch, step=0).total
                cache.backward(loss, last=number == accumulation - 1)
                losses.append(float(loss))
        engine.step()
        made.append((losses, engine.full_state_dict(only_trained=True)))
    return made


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_chunks_change_nothing(world_size: int, folders: dict[str, Path]) -> None:
    """Chunks reduced as often as they are many, or not at all; test_grad_cache.py has the numerics."""
    cases: list[tuple] = [
        (("tied", "untied")[(stage + lora) % 2], stage, stage % 2 == 0, lora, 4, False, 1)
        for stage in range(4)
        for lora in (False, True)
    ]
    cases += [("tied", stage, True, lora, 3, True, 1) for stage in (2, 3) for lora in (False, True)]
    cases += [("untied", stage, False, False, 3, once, 2) for stage in range(4) for once in (False, stage >= 2)]
    done = run_distributed(chunked_updates, world_size, folders, cases, timeout=600)[0]
    for case, (losses, update) in zip(cases, done, strict=True):
        tying, _, _, lora, _, _, accumulation = case
        model, text = build(folders[tying], lora=lora, checkpointing=False)
        each = QUERIES // accumulation
        parts = [examples()[number * each : (number + 1) * each] for number in range(accumulation)]
        expected_losses = [loss_of(model, text, part, None) / accumulation for part in parts]
        sum(expected_losses).backward()
        if world_size == 1:
            assert losses == pytest.approx([float(x) * accumulation for x in expected_losses], rel=TOLERANCE)
        for name, parameter in model.lm.named_parameters():
            if parameter.requires_grad:
                expected = parameter.detach() - LEARNING_RATE * parameter.grad
                assert_close_relative(update[name], expected, CHUNKED, f"{name} in {case}, {world_size} ranks")


def replayed_vectors(rank: int, world_size: int, folder: Path, stage: int) -> tuple[bool, bool]:
    init_distributed()
    model, text = build(folder, lora=True, checkpointing=True, dropout=0.3)
    engine = engine_of(model, stage)
    batch = text.batch(examples(), [(e.positives[0], *e.negatives) for e in examples()], with_rationale=True)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _, __, views: seen.append(views.passage_PD.detach().clone()))
    torch.manual_seed(7 + rank)
    cache = GradCache(engine)
    loss = AlignmentObjective(OBJECTIVE, 0.1)(cache.forward(batch, 3), batch, step=0).total
    between = torch.rand(1)
    cache.backward(loss)
    again = all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    dropped = not torch.equal(torch.cat(seen[:3]), torch.cat([model(batch.select(c)).passage_PD for c in cache.chunks]))
    torch.manual_seed(7 + rank)
    cache.forward(batch, 3)
    return again and dropped, torch.equal(between, torch.rand(1))


@pytest.mark.parametrize("stage", [0, 3])
def test_dropout_is_the_same_in_both_passes_of_a_chunk(stage: int, folders: dict[str, Path]) -> None:
    """With other masks in the second pass the gradient belongs to vectors that the loss has never seen."""
    assert run_distributed(replayed_vectors, 1 if stage else 2, folders["tied"], stage) == [(True, True)] * (
        1 if stage else 2
    )


def refused_updates(rank: int, world_size: int, folder: Path) -> list[bool]:
    init_distributed()
    unchanged = []
    for stage in range(4):
        model, text = build(folder, lora=False, checkpointing=False)
        engine = engine_of(model, stage)
        before = engine.full_state_dict()
        poison = torch.inf if rank == 1 else 1.0
        engine.backward(loss_of(engine, text, examples()[2 * rank : 2 * rank + 2], None) * poison)
        with pytest.raises(NonFiniteGradient):
            engine.step()
        after = engine.full_state_dict()
        unchanged.append(all(torch.equal(before[name], after[name]) for name in before))
    return unchanged


def test_a_gradient_that_is_not_finite_on_one_rank_updates_nothing_on_any(folders: dict[str, Path]) -> None:
    assert run_distributed(refused_updates, 2, folders["tied"]) == [[True] * 4] * 2
