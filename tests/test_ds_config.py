import json
from dataclasses import replace
from pathlib import Path

import pytest

from laser_dist.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from laser_dist.ds_config import FOLDER, KNOWN, REFUSED, find_ds_config, resolve
from laser_dist.errors import UserError

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
    assert READY == ["zero0.json", "zero1.json", "zero2.json", "zero3-test.json", "zero3.json"]
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
def test_ready_made_files_are_filled_and_deepspeed_accepts_them(name):
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
        ('{"dump_state": true, "dump_state": false}', r'"dump_state" appears twice'),
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
