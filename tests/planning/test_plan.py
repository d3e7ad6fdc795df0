import json
from dataclasses import replace
from pathlib import Path

import pytest

from laser_dist.cli import main
from laser_dist.ds_config import resolve
from laser_dist.planning import catalogue
from laser_dist.planning.communication import transfers, weight_gathers
from laser_dist.planning.flops import step_flops
from laser_dist.planning.job import GIB, GPUS, STRATEGIES, Job
from laser_dist.planning.memory import memory
from laser_dist.planning.options import fastest, nearest, options_of
from laser_dist.planning.recipe import check_recipe, ds_config_of
from laser_dist.planning.scaling import best_at_each_size, sizes
from laser_dist.planning.shapes import KNOWN
from laser_dist.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"
JOB = Job(shape=KNOWN["qwen3-8b"], gpus=8)
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}


def with_(strategy: str, **changes: object) -> Job:
    return replace(JOB, strategy=BY_NAME[strategy], **changes)


def test_strategies_are_the_ready_made_configs():
    """A limit or bucket that is changed in ds_configs/ and not here would make every plan wrong."""
    for strategy in STRATEGIES:
        zero = ds_config_of(with_(strategy.name))["zero_optimization"]
        assert zero["stage"] == strategy.stage
        if strategy.stage:
            assert zero["reduce_bucket_size"] == strategy.bucket
        if strategy.stage == 3:
            assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == strategy.live
            assert zero["stage3_prefetch_bucket_size"] == strategy.prefetch
        assert ("zero_hpz_partition_size" in zero) == strategy.hpz
        for key, where in (("optimizer", strategy.offload_optimizer), ("param", strategy.offload_parameters)):
            assert zero.get(f"offload_{key}", {}).get("device", "") == where


def test_memory_falls_with_every_stage_and_with_recomputation():
    states = [memory(with_(name)).state for name in ("zero0", "zero1", "zero3", "zero3-offload")]
    assert states == sorted(states, reverse=True) and len(set(states)) == 4
    # 12 bytes of optimizer state per weight, an eighth of them on each of 8 GPUs.
    assert memory(with_("zero1")).optimizer == 12 * JOB.shape.parameters / 8
    peaks = [
        memory(with_("zero3", **change)).peak
        for change in ({}, {"checkpointing": True}, {"checkpointing": True, "chunk_tokens": 4096})
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_chunks_bound_memory_whatever_the_batch():
    """GradCache's point: thousands of queries in the memory of one chunk, and their vectors."""
    small = memory(with_("zero3", queries=64, chunk_tokens=8192)).activations
    large = memory(with_("zero3", queries=4096, chunk_tokens=8192)).activations
    assert large == pytest.approx(small, rel=0.1)
    chunked, whole = step_flops(with_("zero3", chunk_tokens=8192)), step_flops(with_("zero3"))
    assert 1.3 < chunked.total / whole.total < 1.4  # one more forward beside a forward and twice that backward


def test_lora_trains_adapters_only():
    lora = memory(with_("zero2", lora_rank=64))
    assert lora.optimizer == 12 * JOB.shape.adapters(64) / 8
    assert step_flops(with_("zero2", lora_rank=64)).total < 0.8 * step_flops(with_("zero2")).total


@pytest.mark.parametrize("lora_rank", [0, 64])
def test_training_reports_the_same_flops_as_the_plan(lora_rank):
    """observability/flops.py has the same formula for a model that is there; MFU and plan must not drift apart."""
    from laser_dist.observability.flops import ModelSize

    job, shape = replace(JOB, lora_rank=lora_rank), JOB.shape
    size = ModelSize(
        matrices=shape.layers * shape.layer_weights,
        adapters=shape.adapters(lora_rank),
        width=shape.layers * shape.heads * shape.head,
        table=shape.table,
        soft=job.soft,
        frozen=job.lora,
    )
    theirs = size.forward(
        tokens=job.tokens,
        squares=job.queries * (job.explicit_tokens**2 + job.passages * job.passage_tokens**2),
        prompts=job.queries * (job.query_tokens + job.passages * job.passage_tokens),
        rows=job.rows,
    )
    ours = step_flops(job)
    assert sum(theirs) == pytest.approx(ours.prefix + ours.causal + ours.latent + ours.head + ours.adapters, rel=1e-6)


def test_weights_are_gathered_once_or_in_every_sweep():
    assert weight_gathers(with_("zero3")) == (1, 0)
    assert weight_gathers(with_("zero3-lean")) == (3, 3)
    assert weight_gathers(with_("zero3", soft=5)) == (1, 0)
    assert weight_gathers(with_("zero3-lean", soft=5)) == (6, 6)


def test_only_hpz_keeps_backwards_gathers_inside_a_node():
    eight = {"gpus": 8, "nodes": 8}
    lean, hpz = ({t.what: t for t in transfers(with_(name, **eight))} for name in ("zero3-lean", "zero3-hpz"))
    moved = [sum(t.between_nodes(with_("zero3", **eight)) for t in found.values()) for found in (lean, hpz)]
    assert moved[1] < 0.5 * moved[0]
    assert hpz["weights, again"].inside and hpz["weights, again"].whole == 5 * hpz["weights, first time"].whole


def test_traffic_of_one_gpu_is_none():
    assert transfers(replace(with_("zero0"), gpus=1)) == []


def test_passages_grow_with_the_ranks_and_gradients_do_not():
    few, many = ({t.what: t.received(job) for t in transfers(job)} for job in sizes(with_("zero2"))[3:11:7])
    assert many["passages"] / few["passages"] == pytest.approx(128, rel=0.2)
    assert many["gradients"] / few["gradients"] == pytest.approx(1, rel=0.2)


def test_the_fastest_that_fits_is_chosen():
    options = options_of(replace(JOB, lora_rank=0))
    chosen = fastest(options)
    assert chosen is not None and chosen.fits
    assert chosen.time.middle <= 1.02 * min(o.time.middle for o in options if o.fits)


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    options = options_of(Job(shape=KNOWN["llama-3.1-70b"], hardware=GPUS["rtx4090"]))
    assert fastest(options) is None
    best = nearest(options)
    assert best.over <= 0 and "too much on the host" in best.verdict and "host memory per node" in best.remedy
    plain = next(o for o in options if o.job.strategy.name == "zero0")
    assert f"{plain.over / GIB:,.1f} GiB too much" == plain.verdict and plain.remedy.startswith("optimizer 788.5 GiB")


def test_plan_writes_what_training_takes(tmp_path, capsys):
    out = tmp_path / "plan"
    arguments = ["--model", "Qwen/Qwen3-14B", "--gpus", "8", "--nodes", "2", "--lora-rank", "0", "--out", str(out)]
    assert main(["plan", *arguments]) == 0
    told = capsys.readouterr().out
    assert "chosen" in told and "GiB" in told and "bottleneck" in told
    config = check_recipe(out / "recipe.toml")
    assert config.train.deepspeed == (out / "ds_config.json").as_posix() and config.model.name == "Qwen/Qwen3-14B"
    plan = json.loads((out / "plan.json").read_text())
    chosen = plan["options"][plan["chosen"]]
    assert chosen["activation_checkpointing"] == config.model.activation_checkpointing
    assert chosen["chunk_tokens"] == config.train.chunk_tokens
    assert resolve(config.train.deepspeed, config)["zero_optimization"]["stage"] == int(chosen["strategy"][4])


def test_json_has_every_option_and_its_parts_add_up(capsys):
    assert main(["plan", "--model", "4B", "--gpus", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["interpolated"] and {o["mode"] for o in plan["options"]} == {"LoRA 64", "full"}
    for option in plan["options"]:
        parts = dict(option["memory"])
        peak, usable, update = parts.pop("peak"), parts.pop("usable"), parts.pop("update")
        state = parts["parameters"] + parts["optimizer"]
        assert peak == pytest.approx(max(sum(parts.values()), state + parts["gradients"] + update))
        assert option["fits"] == (option["verdict"] == "fits") and (peak <= usable or not option["fits"])
        assert option["seconds"]["best"] <= option["seconds"]["worst"]


def test_nothing_fits(capsys, tmp_path):
    assert main(["plan", "--model", "Llama-3.1-70B", "--gpus", "1", "--gpu", "l4", "--out", str(tmp_path / "p")]) == 1
    assert "Nothing fits. Nearest is" in capsys.readouterr().out
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "--model = '': give a hub id"),
        (["--model", "8B", "--gpus", "0"], "--gpus = 0: must be at least 1"),
        (["--model", "8B", "--gpu-memory", "-1"], "--gpu-memory = -1.0: must be positive"),
        (["--model", "8B", "--lora-rank", "-1"], "--lora-rank = -1"),
        (["--model", "8B", "--scaling"], "--scaling: give a folder with --out"),
        (["--all"], "--all: give a folder with --out"),
        (["--model", "nowhere/at-all"], "cannot read its config"),
    ],
)
def test_mistakes(arguments, told, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "plan").write_text("")
    assert main(["plan", "--model", "8B", "--out", str(tmp_path / "plan")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_figures_of_other_hardware_are_taken(capsys):
    def seconds(*more: str) -> float:
        assert main(["plan", "--model", "8B", "--lora-rank", "64", "--json", *more]) == 0
        plan = json.loads(capsys.readouterr().out)
        return plan["options"][plan["chosen"]]["seconds"]["packed_sweep"]

    assert seconds("--tflops", "494.5") == pytest.approx(2 * seconds(), rel=1e-3)


def test_checked_in_recipes_are_what_the_plan_says_today():
    """Drift: mend with `laser-dist plan --all --out launchers/recipes`."""
    made = catalogue.checked_in()
    assert set(made) == {"README.md", *(f"{name}.toml" for name in catalogue.CHECKED_IN)}
    for name, text in made.items():
        assert (RECIPES / name).read_text(encoding="utf-8") == text, name


def test_every_recipe_is_one_that_training_takes():
    for path in RECIPES.glob("*.toml"):
        config = read_recipe(path)
        resolve(config.train.deepspeed, config)


def test_scaling_grows_to_1024_gpus(tmp_path, capsys):
    best = best_at_each_size(replace(JOB, lora_rank=64))
    assert [o.job.ranks for o in best] == [2**i for i in range(11)]
    loss = [o.time.flops.loss for o in best]
    assert loss == sorted(loss) and loss[-1] > 500 * loss[0]
    pytest.importorskip("matplotlib")
    assert main(["plan", "--model", "Qwen/Qwen3-0.6B", "--lora-rank", "0", "--scaling", "--out", str(tmp_path)]) == 0
    assert "| 1,024 | full |" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
    assert len((tmp_path / "scaling.csv").read_text().splitlines()) == 12
