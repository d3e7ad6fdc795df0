import pytest

from laser_dist.config import DataConfig, RunConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.shards import write_shards
from laser_dist.data.streaming.sets import open_data
from laser_dist.errors import UserError
from laser_dist.recipe import load_config, read_recipe, to_toml


@pytest.fixture
def folder(tmp_path):
    rows = (Example(f"q{i}", "query", "", (Passage(f"p{i}", "x"),)) for i in range(12))
    write_shards(rows, tmp_path / "shards", source="test", shard_examples=5)
    return tmp_path / "shards"


def test_a_mixture_is_written_in_a_recipe_or_in_flags(tmp_path):
    (tmp_path / "recipe.toml").write_text('[data]\nmix = {"shards/a" = 2, "s3://bucket/b c" = 0.5}\n')
    config = read_recipe(tmp_path / "recipe.toml")
    assert config.data.sources == {"shards/a": 2.0, "s3://bucket/b c": 0.5}
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert read_recipe(tmp_path / "again.toml") == config
    flags = ["--output", "x", "--model.name", "m", "--data.mix", "s3://a/b", "2", "https://h/c", "1"]
    assert load_config(flags).data.mix == {"s3://a/b": 2.0, "https://h/c": 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mix": {"a": 0.0}}, "data.mix = 0.0: weights are finite and positive"),
        ({"mix": {"a": float("nan")}}, "data.mix = nan"),
        ({"max_skipped": 1.0}, "data.max_skipped = 1.0"),
        ({"attempts": 0}, "data.attempts = 0"),
        ({"timeout": 0.0}, "data.timeout = 0.0"),
        ({"cache_gib": float("inf")}, "data.cache_gib = inf"),
        ({"homogeneous": -1}, "data.homogeneous = -1"),
    ],
)
def test_values_out_of_range_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        DataConfig(**change)


def test_exactly_one_of_train_and_mix_is_given(folder):
    for data in (DataConfig(), DataConfig(train=str(folder), mix={str(folder): 1.0})):
        with pytest.raises(UserError, match="data.train = ''|data.mix = .*either train or mix"):
            RunConfig(output="x", model=RunConfig().model.__class__(name="m"), data=data).validate()
    with pytest.raises(UserError, match="data.mix = 'elsewhere': .*laser-dist prepare"):
        DataConfig(mix={str(folder): 1.0, "elsewhere": 1.0}).validate()


def test_a_shard_that_is_missing_at_the_start_is_damage_only_if_damage_may_be_skipped(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="shard-000001.tar is missing"):
        open_data(DataConfig(train=str(folder)))
    assert open_data(DataConfig(train=str(folder), on_error="skip")).examples == 12


def test_the_fingerprint_is_of_contents_and_weights_and_not_of_places(folder, tmp_path):
    def fingerprint(place, weight=1.0):
        return open_data(DataConfig(mix={str(place): weight})).fingerprint()

    moved = folder.rename(tmp_path / "moved")
    first = fingerprint(moved)
    assert fingerprint(moved.rename(folder)) == first != fingerprint(folder, 2.0)
