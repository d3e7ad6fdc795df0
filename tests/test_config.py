"""config.py and recipe.py: what a recipe and flags may say, and what is answered where they err."""

import dataclasses
import json
from pathlib import Path

import pytest

from laser_dist.config import ObjectiveConfig, RunConfig
from laser_dist.errors import UserError
from laser_dist.recipe import load_config, read_recipe, to_toml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({}))
    return folder


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def complete(recipe, shards, tmp_path):
    """Arguments of a run that lacks nothing; more flags follow."""
    path = recipe(
        f'output = "{tmp_path}/run"\n[model]\nname = "some/model"\n[data]\ntrain = "{shards}"\n'
        "[objective]\ntemperature = 0.05\n"
    )
    return [str(path)]


@pytest.mark.parametrize(
    "text, told",
    [
        ("sead = 1", r'unknown key "sead". Did you mean "seed"'),
        ("[objectiv]\ntemperature = 1.0", r'unknown key "objectiv". Did you mean "objective"'),
        ("[objective]\ntemprature = 0.02", r'unknown key "objective.temprature". Did you mean "temperature"'),
        ("[train]\nlearning_rate = 1e-4", r'unknown key "train.learning_rate".*"optimizer.learning_rate"'),
        ("temperature = 0.02", r'unknown key "temperature".*"objective.temperature"'),
        ("model = 'Qwen/Qwen3-0.6B'", r"model is a section: write \[model\] above its keys"),
        ("seed = 'zero'", r"seed = 'zero': expected int, got str"),
        ("seed = 1.0", r"seed = 1.0: expected int, got float"),
        ("seed = true", r"seed = True: expected int, got bool"),
        ("resume = 1", r"resume = 1: expected bool, got int"),
        ("[optimizer]\nlearning_rate = '1e-4'", r"optimizer.learning_rate = '1e-4': expected float, got str"),
        ("[model]\nlora_targets = 'q_proj'", r"model.lora_targets = 'q_proj'"),
        ("[model]\nlora_targets = [1]", r"model.lora_targets = 1: expected str, got int"),
        ("[optimizer]\nbetas = [0.9]", r"optimizer.betas = \[0.9\]"),
        ("[model]\ndtype = 'float16'", r"model.dtype = 'float16': must be one of 'float32', 'bfloat16'"),
        ("seed = 1\nseed = 2", r"not valid TOML"),
        ("seed = ", r"not valid TOML"),
    ],
)
def test_recipe_mistakes_name_file_key_and_remedy(recipe, text, told):
    path = recipe(text)
    with pytest.raises(UserError, match=told) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("model", "layers", "0"),
        ("model", "lora_rank", "-1"),
        ("model", "lora_dropout", "1.0"),
        ("thinking", "steps", "0"),
        ("text", "query_template", "'no place for it'"),
        ("text", "passage_template", "'{title}'"),
        ("text", "passage_template", "'{text} {body}'"),
        ("text", "query_template", "'{query} {'"),
        ("text", "max_query_tokens", "7"),
        ("data", "negatives", "-1"),
        ("data", "shuffle_shards", "0"),
        ("data", "workers", "-1"),
        ("objective", "output_weight", "-0.5"),
        ("objective", "explicit_weight", "inf"),
        ("objective", "temperature", "0"),
        ("objective", "distill_temperature", "nan"),
        ("objective", "trajectory_temperature", "-0.1"),
        ("objective", "ramp_steps", "-1"),
        ("optimizer", "learning_rate", "0"),
        ("optimizer", "learning_rate", "nan"),
        ("optimizer", "weight_decay", "nan"),
        ("optimizer", "weight_decay", "inf"),
        ("optimizer", "betas", "[0.9, 1.0]"),
        ("optimizer", "eps", "0"),
        ("optimizer", "warmup", "1.5"),
        ("optimizer", "gradient_clipping", "-1"),
        ("optimizer", "gradient_clipping", "inf"),
        ("train", "queries_per_rank", "0"),
        ("train", "accumulation", "0"),
        ("train", "epochs", "0"),
        ("train", "epochs", "inf"),
        ("train", "max_steps", "0"),
        ("evaluation", "every", "-1"),
        ("checkpoint", "every", "-1"),
        ("checkpoint", "keep", "0"),
        ("logging", "every", "0"),
        ("logging", "term_gradient_norms_every", "-1"),
        ("guard", "row_norm", "1.5"),
        ("guard", "gradient_spike", "1"),
        ("guard", "checksums_every", "-1"),
    ],
)
def test_values_out_of_range(recipe, section, key, value):
    with pytest.raises(UserError, match=rf"^{section}\.{key} = .+: "):
        read_recipe(recipe(f"[{section}]\n{key} = {value}"))


def test_missing_recipe():
    with pytest.raises(UserError, match=r"recipe none.toml does not exist; .*launchers/recipes"):
        load_config(["none.toml"])


def test_integers_serve_as_floats_and_arrays_as_tuples(recipe):
    config = read_recipe(recipe("[objective]\ntemperature = 1\n[model]\nlora_targets = ['q_proj']"))
    assert type(config.objective.temperature) is float
    assert config.model.lora_targets == ("q_proj",)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(complete):
    config = load_config([*complete, "--optimizer.learning-rate", "5e-5", "--train.queries_per_rank", "2", "--resume"])
    assert config.optimizer.learning_rate == 5e-5
    assert config.train.queries_per_rank == 2
    assert config.resume
    assert config.objective.temperature == 0.05
    assert config.optimizer.warmup == RunConfig().optimizer.warmup


@pytest.mark.parametrize("flag", ["--objective.temp", "--temp", "--optimizer.learning"])
def test_prefixes_of_flags_are_refused(complete, capsys, flag):
    # argparse would take --temp for --temperature.
    with pytest.raises(SystemExit) as stop:
        load_config([*complete, flag, "0.1"])
    assert stop.value.code == 2
    assert flag in capsys.readouterr().err


def test_misspelt_flag_gets_a_suggestion(complete, capsys):
    with pytest.raises(SystemExit):
        load_config([*complete, "--objective.temprature", "0.1"])
    assert "--objective.temperature" in capsys.readouterr().err


def test_range_of_a_flag_is_a_user_error_too(complete):
    with pytest.raises(UserError, match=r"objective.temperature = -1.0"):
        load_config([*complete, "--objective.temperature", "-1"])


def test_help_shows_sections_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "--objective.temperature" in told and "deepspeed --num_gpus 8" in told


def test_round_trip(recipe, complete):
    config = load_config([*complete, "--model.layers", "4", "--text.instruction", 'Wörter "zitiert"\n\tund \\n'])
    assert read_recipe(recipe(to_toml(config))) == config
    assert read_recipe(recipe(to_toml(RunConfig()))) == RunConfig()


def test_round_trip_sets_every_field(recipe):
    """Each field of each section changed from its default comes back."""

    def changed(value):
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value / 2 if isinstance(value, float) else value + 1
        return value

    def change(section):
        fields = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        return dataclasses.replace(
            section, **{k: change(v) if dataclasses.is_dataclass(v) else changed(v) for k, v in fields.items()}
        )

    config = change(RunConfig())
    assert config != RunConfig()
    assert read_recipe(recipe(to_toml(config))) == config


@pytest.mark.parametrize("missing", ["output", "model.name", "data.train"])
def test_required_values(complete, missing):
    with pytest.raises(UserError, match=rf"^{missing} = '': give"):
        load_config([*complete, f"--{missing}", ""])


def test_missing_shards(complete, tmp_path):
    with pytest.raises(UserError, match=r"data.train = .*manifest.json does not exist; .*laser-dist prepare"):
        load_config([*complete, "--data.train", str(tmp_path / "elsewhere")])


def test_explicit_view_must_have_room_for_the_rationale(complete):
    with pytest.raises(UserError, match=r"text.max_explicit_tokens = 513: must exceed text.max_query_tokens = 512"):
        load_config([*complete, "--text.max-explicit-tokens", "513"])


def test_evaluation_needs_all_three_files(complete, tmp_path):
    files = {name: str(tmp_path / name) for name in ("corpus", "queries", "qrels")}
    flags = [part for name, path in files.items() for part in (f"--evaluation.{name}", path)]
    with pytest.raises(UserError, match=r"give corpus, queries and qrels together"):
        load_config([*complete, *flags[:4]])
    with pytest.raises(UserError, match=r"evaluation.corpus = .*does not exist"):
        load_config([*complete, *flags])
    with pytest.raises(UserError, match=r"evaluation.every = 5: needs corpus"):
        load_config([*complete, "--evaluation.every", "5"])
    for path in files.values():
        Path(path).touch()
    assert load_config([*complete, *flags, "--evaluation.every", "5"]).evaluation.corpus == files["corpus"]


def test_occupied_output(complete, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-10").mkdir(parents=True)
    with pytest.raises(UserError, match=r"already holds checkpoints: continue with --resume"):
        load_config(complete)
    assert load_config([*complete, "--resume"]).resume


def test_trajectory_temperature_follows_the_convention(recipe):
    assert RunConfig().trajectory_temperature == 0.05
    assert read_recipe(recipe("[thinking]\nconvention = 'paper'")).trajectory_temperature == 0.02
    assert read_recipe(recipe("[objective]\ntrajectory_temperature = 0.3")).trajectory_temperature == 0.3


@pytest.mark.parametrize("path", sorted((ROOT / "launchers" / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_ready_made_recipes_are_readable(path):
    config = read_recipe(path)
    assert read_recipe(path) == config


def test_later_recipes_replace_values_of_earlier_ones(complete, tmp_path):
    """A method over a base: what the method does not name stays."""
    method = tmp_path / "method.toml"
    method.write_text("[thinking]\nsteps = 5\n[objective]\ntemperature = 0.5\n")
    config = load_config([*complete, str(method), "--objective.temperature", "0.7"])
    assert (config.thinking.steps, config.objective.temperature) == (5, 0.7)
    assert config.model == load_config(complete).model
    method.write_text("[thinking]\nstep = 5\n")
    with pytest.raises(UserError, match=r'method.toml: unknown key "thinking.step"'):
        load_config([*complete, str(method)])


def test_steps_are_compared_where_there_are_several(complete):
    with pytest.raises(UserError, match="thinking.steps = 1: .*at least 2"):
        load_config([*complete, "--thinking.steps", "1", "--objective.steps-weight", "1"])


def test_a_frozen_teacher_does_not_learn(complete):
    with pytest.raises(UserError, match="objective.explicit_weight = 1.0: .*frozen"):
        load_config([*complete, "--objective.teacher", "runs/a"])
    with pytest.raises(UserError, match="nothing to teach"):
        ObjectiveConfig(teacher="runs/a", explicit_weight=0.0, output_weight=0.0, trajectory_weight=0.0)
