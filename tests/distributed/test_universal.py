"""A checkpoint continues on another number of ranks and with another ZeRO stage, with the same numbers."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from laser_dist.batch import TokenSequence, pack
from laser_dist.config import CheckpointConfig, ModelConfig, OptimizerConfig, TextConfig
from laser_dist.data.schema import Passage
from laser_dist.data.text import TextFormat
from laser_dist.distributed.checkpoint import CheckpointStore, TrainerState
from laser_dist.distributed.engine import Engine, init_distributed
from laser_dist.distributed.pickles import safe_load, safe_pickles
from laser_dist.distributed.universal import _convert
from laser_dist.errors import UserError
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.optim import build_optimizer
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.testing import assert_close_relative, run_distributed, tiny_model_folder

# name, stage that saves, dtype, LoRA, model
SAVED = [
    ("zero1", 1, "float32", False, "tied"),
    ("zero2", 2, "float32", False, "untied"),
    ("zero3", 3, "float32", False, "tied"),
    ("zero0", 0, "float32", False, "tied"),
    ("zero1-bf16", 1, "bfloat16", False, "untied"),
    ("zero2-bf16", 2, "bfloat16", False, "tied"),
    ("zero3-bf16", 3, "bfloat16", False, "untied"),
    ("zero0-bf16", 0, "bfloat16", False, "tied"),
    ("zero2-lora", 2, "bfloat16", True, "tied"),
    ("zero3-lora", 3, "float32", True, "untied"),
]


def build(folder: Path, stage: int, dtype: str, lora: bool, seed: int) -> tuple[Engine, TextFormat]:
    """`seed` moves the weights away from the backbone's, so that a state that was not restored shows."""
    config = ModelConfig(name=str(folder), dtype=dtype, lora_rank=3 if lora else 0, lora_targets=("q_proj", "up_proj"))
    torch.manual_seed(seed)
    lm = prepare_for_training(load_backbone(config), config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model = LaserRetriever(lm, steps=2)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Several sub-groups, as a model beyond 1e9 parameters has them.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 20_000},
    }
    engine = Engine(model, build_optimizer(model, OptimizerConfig(learning_rate=1e-2, weight_decay=0.3)), ds_config)
    return engine, TextFormat(load_tokenizer(config), TextConfig(), steps=2)


def step(engine: Engine, text: TextFormat, number: int) -> None:
    """One update, the same on any number of ranks: every rank has the same texts."""
    texts = [f"heat makes steam {number}", "cold stone keeps the drop still and bright"]
    batch = pack([TokenSequence(text.passage(Passage("x", content))) for content in texts])
    engine.backward(engine(batch).passage_PD.float().pow(3).sum())
    engine.step()


def states(engine: Engine) -> dict[str, list[Tensor]]:
    """Of each trained parameter: the weights that a forward uses, float32 weights, exp_avg and exp_avg_sq, whole."""
    found = {}
    if engine.stage in (1, 2):  # DeepSpeed 0.19.8 links states after the first group's update, without the others
        engine.ds.optimizer._hp_optimizer_states_linked = False
        engine.ds.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.lm.named_parameters():
        if not parameter.requires_grad:
            continue
        with engine.gathered([parameter]):
            found[name] = [parameter.detach().clone()]
        if engine.stage:
            found[name] += [safe_get_full_fp32_param(parameter).clone()]
            found[name] += [safe_get_full_optimizer_state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")]
    if not engine.stage:  # whole on each rank, in the form of the optimizer
        for number, state in enumerate(engine.optimizer.state.values()):
            found[f"state {number}"] = [state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step")]
    return found


def settings(engine: Engine) -> list[tuple]:
    """Per parameter group: what the next update depends on besides the states."""
    wrapped = getattr(engine.ds.optimizer, "optimizer", engine.ds.optimizer)
    steps = {float(state["step"]) for state in wrapped.state.values() if "step" in state}
    groups = engine.ds.optimizer.param_groups
    return [(steps, group["lr"], group["weight_decay"], group["betas"], group["eps"]) for group in groups]


def store(root: Path, name: str) -> CheckpointStore:
    return CheckpointStore(root / name, CheckpointConfig())


def saved_states(rank: int, world_size: int, root: Path) -> list[tuple]:
    """For each case: states and settings when it was saved, and states one step later."""
    init_distributed()
    made = []
    for name, stage, dtype, lora, model in SAVED:
        engine, text = build(root / model, stage, dtype, lora, seed=1)
        for number in (1, 2):
            step(engine, text, number)
        torch.manual_seed(50 + rank)
        state = TrainerState(2, world_size, stage, "same")
        writer = store(root, name)
        writer.save(engine, state, text.tokenizer, RetrieverCard())
        writer.publish()
        then, groups = states(engine), settings(engine)
        step(engine, text, 3)
        made.append((then, groups, states(engine)))
    return made


def resumed_states(rank: int, world_size: int, root: Path, cases: list[tuple[str, int]]) -> list[tuple]:
    init_distributed()
    made = []
    for saved, stage in cases:
        name, _, dtype, lora, model = next(case for case in SAVED if case[0] == saved)
        engine, text = build(root / model, stage, dtype, lora, seed=2)
        checkpoint, _ = store(root, name).newest_complete()
        store(root, name).load(engine, checkpoint, "same", seed=7)
        drawn = torch.rand(3)
        then, groups = states(engine), settings(engine)
        step(engine, text, 3)
        made.append((then, groups, states(engine), drawn))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple]]:
    root = tmp_path_factory.mktemp("universal")
    tiny_model_folder(root / "tied", architecture="llama", tied=True)
    tiny_model_folder(root / "untied", architecture="qwen3", tied=False)
    made = run_distributed(saved_states, 2, root)[0]
    return root, {case[0]: result for case, result in zip(SAVED, made, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size, cases", [
    (1, [("zero1", 1), ("zero2", 1), ("zero3", 2), ("zero0", 0), ("zero1-bf16", 3), ("zero2-bf16", 2),
         ("zero3-bf16", 3), ("zero0-bf16", 0), ("zero2-lora", 3), ("zero3-lora", 1)]),
    (3, [("zero1", 2), ("zero2", 3), ("zero3", 3), ("zero0", 0), ("zero1-bf16", 1), ("zero2-bf16", 3),
         ("zero3-bf16", 2), ("zero2-lora", 2), ("zero3-lora", 3)]),
])  # fmt: skip
def test_states_are_the_same_on_other_ranks_and_stages(
    saved: tuple[Path, dict[str, tuple]], world_size: int, cases: list[tuple[str, int]]
) -> None:
    """DeepSpeed's ZeRO-3 loader gives norms the weight decay of matrices, and all groups one step that each counts."""
    root, expected = saved
    everyone = run_distributed(resumed_states, world_size, root, cases)
    for case, (then, groups, after, _) in zip(cases, everyone[0], strict=True):
        then_saved, groups_saved, after_saved = expected[case[0]]
        assert then.keys() == then_saved.keys() and groups == groups_saved, case
        for name, values in then.items():
            for value, value_saved in zip(values, then_saved[name], strict=True):
                assert torch.equal(value, value_saved), f"{case}, {world_size} ranks: {name}"
        # Every rank has the same gradient; its mean over ranks is rounded in the dtype of the weights, and stages sum
        # in other orders, which is near 1e-6 in float32.
        tolerance = 2**-5 if "bf16" in case[0] or case[0] == "zero2-lora" else 1e-5
        for name, values in after.items():
            for value, value_saved in zip(values, after_saved[name], strict=True):
                assert_close_relative(value, value_saved, tolerance, f"{name}, one step after {case}")
    drawn = [[case[-1] for case in rank] for rank in everyone]
    generators = [torch.Generator().manual_seed(50 + rank) for rank in range(2)]
    for rank, generator in enumerate(generators[:world_size]):  # as if nothing had happened
        assert all(torch.equal(numbers, torch.rand(3, generator=generator.manual_seed(50 + rank)))
                   for numbers in drawn[rank])  # fmt: skip
    for other in drawn[2:]:  # new, and alike each time
        assert all(torch.equal(numbers, other[0]) for numbers in other)
        assert not any(torch.equal(other[0], old[0]) for old in drawn[:2])
    assert not list(root.rglob(".*universal*"))


class Payload:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/laser-dist-must-not-exist-either"),))


@pytest.mark.slow
@pytest.mark.parametrize("name, pattern", [("zero2", "*optim*"), ("zero3", "*optim*"), ("zero3", "*model_states*"),
                                           ("zero2-bf16", "*model_states*")])  # fmt: skip
def test_conversion_runs_no_code_from_the_checkpoint(
    saved: tuple[Path, dict[str, tuple]], tmp_path: Path, name: str, pattern: str
) -> None:
    """DeepSpeed's converter passes weights_only=False to every torch.load."""
    source = tmp_path / "source"
    shutil.copytree(saved[0] / name / "step-000002/deepspeed", source)
    victim = sorted(source.glob(pattern))[-1]
    torch.save(safe_load(str(victim)) | {"client": Payload()}, victim)
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        _convert(source, tmp_path / "universal/deepspeed", 2)
    assert not Path("/tmp/laser-dist-must-not-exist-either").exists()


def test_forced_safety_ends_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to load anything while both of its variables are set."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save(Payload(), tmp_path / "evil.pt")
    with safe_pickles(), pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def refusals(rank: int, world_size: int, root: Path) -> list[str]:
    init_distributed()
    engine, _ = build(root / "tied", 2, "float32", False, seed=2)
    said = []
    for name in ("zero0", "zero3"):
        try:
            store(root, name).load(engine, root / name / "step-000002", "same", seed=7)
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_what_cannot_be_converted_is_named_on_every_rank(saved: tuple[Path, dict[str, tuple]], tmp_path: Path) -> None:
    """Ranks that wait for a conversion that failed would wait for ever."""
    for name in ("tied", "zero0", "zero3"):
        shutil.copytree(saved[0] / name, tmp_path / name)
    next((tmp_path / "zero3/step-000002/deepspeed").glob("*rank_1*optim*")).unlink()
    said = run_distributed(refusals, 2, tmp_path)
    assert said[0] == said[1] and len(said[0]) == 2
    assert "resume with ZeRO-0" in said[0][0] and "cannot be converted" in said[0][1]
    assert not list(tmp_path.rglob(".*universal*"))


@pytest.mark.parametrize("name", ["../../evil", "..", "", "/evil", "a\\b", "nul\0"])
@pytest.mark.parametrize("where", ["param_shapes", "module", "slice"])
def test_a_parameters_name_leads_nowhere_else(tmp_path: Path, where: str, name: str) -> None:
    """DeepSpeed writes a folder of each name: one from a hostile checkpoint could have lain anywhere."""
    source = tmp_path / "in"
    source.mkdir(parents=True)
    states = {
        "param_shapes": {"param_shapes": [{name: [1]}]},
        "module": {"module": {name: torch.ones(1)}},
        "slice": {"optimizer_state_dict": {"param_slice_mappings": [{name: None}]}},
    }
    torch.save(states[where], source / "some_states.pt")
    with pytest.raises(UserError, match="is no parameter's name"):
        _convert(source, tmp_path / "out" / "target", groups=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "some_states.pt"]
