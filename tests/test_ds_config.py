import json
from dataclasses import replace
from pathlib import Path

import pytest

from laser_dist.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from laser_dist.ds_config import FOLDER, KNOWN, KNOWN_WITHIN, REFUSED, find_ds_config, resolve
from laser_dist.errors import UserError
from laser_dist.testing import assert_close_relative, run_distributed

CONFIG = RunConfig(
    model=ModelConfig(dtype="float32"),
    train=TrainConfig(queries_per_rank=3, accumulation=5),
    optimizer=OptimizerConfig(gradient_clipping=0.7),
)
READY = sorted(path.name for path in FOLDER.glob("*.json"))


@pytest.fixture
def write(tmp_path):
    def write(content: dict | str) -> str:
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def test_ready_made_names():
    zero3 = [
        f"zero3-{name}.json" for name in ("hpz", "lean", "nvme", "offload-optimizer", "offload", "quantized", "test")
    ]
    assert READY == ["zero0.json", "zero1.json", "zero2.json", *zero3, "zero3.json"]
    assert find_ds_config("zero3.json") == find_ds_config("zero3")
    assert find_ds_config(RunConfig().train.deepspeed).is_file()


def test_a_path_comes_before_a_name(write, monkeypatch):
    path = Path(write({}))
    assert find_ds_config(str(path)) == path
    monkeypatch.chdir(path.parent)
    path.rename("zero3.json")
    assert find_ds_config("zero3.json") == Path("zero3.json")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r'zero0.json, .* Did you mean "zero3.json"'):
        find_ds_config("zero4.json")


@pytest.mark.parametrize("name", READY)
def test_ready_made_files_are_filled_and_deepspeed_accepts_them(name, monkeypatch):
    monkeypatch.setattr("laser_dist.ds_config._check_machine", lambda *_: None)  # the disk is another machine's
    table = resolve(name, CONFIG)
    assert table["train_micro_batch_size_per_gpu"] == 3
    assert table["gradient_accumulation_steps"] == 5
    assert table["gradient_clipping"] == 0.7
    assert table["bf16"] == {"enabled": False, "check_grad_overflow": False}
    assert table["zero_optimization"]["stage"] == int(name[4])

    from deepspeed.runtime.config import DeepSpeedConfig

    theirs = DeepSpeedConfig(table)
    assert theirs.gradient_clipping == 0.7 and not theirs.bfloat16_config.enabled
    assert theirs.zero_config.gather_16bit_weights_on_model_save is False


def test_tiny_models_are_partitioned_only_by_the_test_file():
    threshold = "stage3_param_persistence_threshold"
    test, real = (resolve(name, CONFIG)["zero_optimization"] for name in ("zero3-test", "zero3"))
    assert test.pop(threshold) == 0 and real.pop(threshold) > 0
    assert test == real


def test_derived_files_differ_in_what_their_name_says():
    """Copies drift: a limit mended in one of them is easily forgotten in the others."""
    lean = json.loads(find_ds_config("zero3-lean").read_text())["zero_optimization"]
    plain = json.loads(find_ds_config("zero3").read_text())["zero_optimization"]
    limits = {"stage3_max_live_parameters", "stage3_max_reuse_distance"}
    assert {key for key in plain if plain[key] != lean[key]} == limits and lean.keys() == plain.keys()
    added = {
        "hpz": {"zero_hpz_partition_size"},
        "quantized": {"zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"},
        "offload-optimizer": {"offload_optimizer"},
        "offload": {"offload_optimizer", "offload_param"},
        "nvme": {"offload_optimizer", "offload_param"},
    }
    for name, keys in added.items():
        table = json.loads(find_ds_config(f"zero3-{name}").read_text())["zero_optimization"]
        assert table.keys() - lean.keys() == keys, name
        assert all(table[key] == value for key, value in lean.items()), name


def test_every_key_is_explained():
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in READY:
        table = json.loads((FOLDER / name).read_text())
        missing = [key for key in table | table["zero_optimization"] if key not in told and key != "zero_optimization"]
        assert not missing and f"`{name}`" in told, (name, missing)


def test_a_disk_that_is_not_there_is_refused(tmp_path, write):
    with pytest.raises(UserError, match=r'offload_optimizer.nvme_path" = "/local_nvme": this folder does not exist'):
        resolve("zero3-nvme", CONFIG)
    text = find_ds_config("zero3-nvme").read_text().replace("/local_nvme", str(tmp_path))
    assert resolve(write(text), CONFIG)["zero_optimization"]["offload_param"]["nvme_path"] == str(tmp_path)


@pytest.mark.parametrize("ranks, refused", [("1", False), ("4", False), ("8", False), ("12", True), ("64", False)])
def test_hpz_groups_divide_the_ranks(monkeypatch, ranks, refused):
    """DeepSpeed asserts it in every rank, after all of them have loaded the model."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    if refused:
        with pytest.raises(UserError, match=r"= 8: does not divide 12 ranks"):
            resolve("zero3-hpz", CONFIG)
    else:
        resolve("zero3-hpz", CONFIG)


def trained(rank: int, world_size: int, names: list[str]) -> list[dict]:
    """Parameters after two steps with each config, limits in proportion to a tiny model."""
    from laser_dist.bench.scaling import case_of, job_of
    from laser_dist.distributed.engine import init_distributed
    from laser_dist.planning.measure import prepared

    init_distributed()
    found = []
    for name in names:
        engine, forward_backward = prepared(case_of(job_of(name, world_size, 0, True, "float32")), rank)
        for _ in range(2):
            forward_backward()
            engine.step()
        found.append(engine.full_state_dict())
    return found


@pytest.mark.slow
def test_what_runs_on_a_cpu_trains_like_plain_zero3():
    """Offload and hpZ move weights elsewhere; the numbers must stay."""
    names = ["zero3", "zero3-lean", "zero3-hpz", "zero3-offload-optimizer", "zero3-offload"]
    plain, *others = run_distributed(trained, 2, names)[0]
    for name, state in zip(names[1:], others, strict=True):
        for key, value in plain.items():
            assert_close_relative(state[key], value, 1e-6, f"{key} with {name}")


def test_bfloat16_follows_the_model(write):
    bfloat16 = replace(CONFIG, model=ModelConfig(dtype="bfloat16"))
    assert resolve("zero2", bfloat16)["bf16"] == {"enabled": True, "check_grad_overflow": True}
    mine = write({"bf16": {"enabled": "auto", "check_grad_overflow": False}})
    assert resolve(mine, bfloat16)["bf16"] == {"enabled": True, "check_grad_overflow": False}


def test_missing_keys_are_filled_too(write):
    # DeepSpeed clips at 1.0 when nothing is said.
    table = resolve(
        write({"train_batch_size": "auto"}), replace(CONFIG, optimizer=OptimizerConfig(gradient_clipping=0))
    )
    assert table["gradient_clipping"] == 0 and table["train_micro_batch_size_per_gpu"] == 3
    assert "train_batch_size" not in table


@pytest.mark.parametrize(
    "content, told",
    [
        (
            {"gradient_clipping": 2.0},
            r'"gradient_clipping" = 2.0.*optimizer.gradient_clipping \(here 0.7\): write "auto"',
        ),
        ({"gradient_accumulation_steps": 5}, r"= 5.*train.accumulation \(here 5\)"),
        ({"train_micro_batch_size_per_gpu": 1}, r"train.queries_per_rank \(here 3\)"),
        ({"train_batch_size": 64}, r'"train_batch_size" = 64.*times ranks'),
        ({"bf16": {"enabled": True}}, r'"bf16.enabled" = true.*model.dtype \(here false\)'),
        ({"bf16": True}, r'"bf16" = true: write'),
        ({"gradient_cliping": "auto"}, r'unknown key "gradient_cliping". Did you mean "gradient_clipping"'),
        ({"zero_optimisation": {}}, r'Did you mean "zero_optimization"'),
        ({"optimizer": {"type": "AdamW"}}, r'"optimizer" does not belong here: .*\[optimizer\] in the recipe'),
        ({"scheduler": {}}, r"optimizer.schedule"),
        ({"fp16": {"enabled": True}}, r"model.dtype"),
        ({"gradient_allreduce_op": "sum"}, r"exact averages"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            r'"zero_optimization.reduce_bucket_size" = "auto": nothing',
        ),
        ({"comms_logger": {"prof_ops": ["auto"]}}, r'"comms_logger.prof_ops.0"'),
        ('{"dump_state": true, "dump_state": false}', r"'dump_state' appears twice"),
        ({"zero_optimization": {"overlap_com": True}}, r'Did you mean "zero_optimization.overlap_comm"'),
        ({"aio": {"queue_dept": 8}}, r'unknown key "aio.queue_dept". Did you mean "aio.queue_depth"'),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, r'"zero_optimization.offload_param.device"'),
        ('{"zero_optimization": NaN}', r"NaN is no number"),
        ("[" * 100_000, r"nested too deeply"),
        ("{", r"not valid JSON"),
        ("[]", r"expected a JSON object, got list"),
    ],
)
def test_refused(write, content, told):
    with pytest.raises(UserError, match=told) as error:
        resolve(write(content), CONFIG)
    assert "mine.json" in str(error.value)


def test_deepspeeds_own_auto_is_kept(write):
    table = resolve(write({"data_types": {"keep_in_fp32_modules": "auto"}}), CONFIG)
    assert table["data_types"] == {"keep_in_fp32_modules": "auto"}


def test_known_keys_are_those_that_deepspeed_reads():
    from deepspeed.runtime.config import DeepSpeedConfig

    class Recorder(dict):
        read: set[str] = set()

        def get(self, key, default=None):
            self.read.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            self.read.add(key)
            return super().__contains__(key)

    DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1))
    dropped = {"eigenvalue", "graph_harvesting", "progressive_layer_drop", "quantize_training", "sparse_attention"}
    unknown = Recorder.read - KNOWN - REFUSED.keys() - dropped
    assert not unknown, f"this version of DeepSpeed also reads {sorted(unknown)}: add them to KNOWN or REFUSED"


def test_known_keys_of_sections_are_those_of_deepspeeds_classes():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    classes = {
        "bf16": DeepSpeedBF16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    }
    theirs = {
        section: {name for field, info in kind.model_fields.items() for name in (field, info.alias) if name}
        for section, kind in classes.items()
    }
    assert theirs | {"aio": set(AIO_DEFAULT_DICT)} == KNOWN_WITHIN
