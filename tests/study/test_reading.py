from pathlib import Path

import pytest

from laser_dist.errors import UserError
from laser_dist.study.definition import METHODS, flat, nested
from laser_dist.study.reading import read_study

STUDIES = sorted((Path(__file__).parents[2] / "launchers" / "studies").glob("*.toml"))
BASE = """
[base]
model = { name = "m" }
train = { max_steps = 3 }
[datasets.d]
"""


def study(tmp_path: Path, text: str, *, base: str = BASE, head: str = ""):
    (tmp_path / "s.toml").write_text(head + base + text)
    return read_study(tmp_path / "s.toml")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_ready_made_studies_are_complete(path):
    made = read_study(path)
    for method in made.methods.values():
        for point in made.points(method):
            made.config(method, point)


def test_ready_made_studies_are_there():
    assert {"tiny", "entailmentbank", "strategyqa", "sweeps"} <= {path.stem for path in STUDIES}


@pytest.mark.parametrize("path", sorted(METHODS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_method_is_a_recipe_over_any_other(path, tmp_path):
    from laser_dist.recipe import read_recipe

    (tmp_path / "base.toml").write_text('[model]\nname = "m"\n[thinking]\nsteps = 3\n')
    config = read_recipe(tmp_path / "base.toml", path)
    assert config.model.name == "m"
    if path.stem in ("contrastive", "gircse", "without-explicit"):
        assert not config.objective.needs_rationale
    if path.stem == "gircse":
        assert config.objective.compares_steps and config.thinking.steps == 3


@pytest.mark.parametrize("path", sorted((METHODS.parent / "paper").glob("*.toml")), ids=lambda path: path.stem)
def test_the_papers_recipes_can_train(path):
    from laser_dist.planning.recipe import check_recipe

    config = check_recipe(path)
    assert (config.model.lora_rank, config.model.lora_alpha, config.thinking.steps) == (64, 32, 3)


def test_later_tables_win_and_an_ablation_keeps_what_it_is_about(tmp_path):
    made = study(
        tmp_path,
        """
[methods.laser]
grid = { objective.output_weight = [1.0, 5.0] }
optimizer = { learning_rate = 3e-4 }
[methods.without-output]
point_of = "laser"
""",
    )
    laser, ablation = made.methods["laser"], made.methods["without-output"]
    point = made.points(laser)[1]
    assert flat(point) == {"objective.output_weight": 5.0} and nested(flat(point)) == point
    config = made.config(laser, point)
    assert (config.objective.output_weight, config.optimizer.learning_rate) == (5.0, 3e-4)
    assert made.config(ablation, point).objective.output_weight == 0.0


def test_what_is_needed_comes_first(tmp_path):
    made = study(tmp_path, '[methods.offline-teacher]\nteacher = "both-views"\n[methods.both-views]\n')
    assert [method.name for method in made.ordered()] == ["both-views", "offline-teacher"]


def test_extending_replaces_methods_as_a_whole(tmp_path):
    (tmp_path / "parent.toml").write_text(f"seeds = [1, 2]\n{BASE}\n[methods.laser]\n[tests.two]\nsteps = 2\n")
    (tmp_path / "child.toml").write_text(
        'extends = "parent.toml"\n[base]\ntrain = { queries_per_rank = 2 }\n[methods.gircse]\n'
    )
    made = read_study(tmp_path / "child.toml")
    assert (made.name, made.seeds, list(made.methods), list(made.tests)) == ("child", [1, 2], ["gircse"], ["two"])
    assert made.base["train"] == {"max_steps": 3, "queries_per_rank": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"has no \[methods.NAME\]"),
        ("[methods.laser]\nsteps = 3", r"\[methods.laser\]: unknown key 'steps'"),
        ("[methods.laser]\nthinking = { step = 3 }", r'unknown key "thinking.step". Did you mean "steps"'),
        ('[methods.laser]\nrecipe = "lasre"', r'neither a file beside the study .* Did you mean "laser"'),
        ("[methods.contrastve]", r'Did you mean "contrastive"'),
        ('[methods.laser]\npoint_of = "gircse"', "there is no such method"),
        ('[methods.a]\nteacher = "b"\n[methods.b]\npoint_of = "a"', "explicit_weight|wait for each other"),
        ("[methods.bm25]", "always there"),
        ("[methods.laser]\nablation = 1", "expected bool, got int"),
        ("[methods.laser]\n[tests.own]", "take another name"),
        ('[methods.laser]\n[tests.t]\nview = "explicit"', "reads a rationale"),
        ('[methods.laser]\n[tests.t]\nrationale = "orcale"', r'must be one of .* Did you mean "oracle"'),
        ('[methods.laser]\n[tests.t]\nmethods = ["lser"]', r'Did you mean "laser"'),
        ("[methods.laser]\n[grid]\noptimizer.learning_rate = 1e-4", "give a list"),
        ("[methods.laser]\n[grid]\noptimizer.learning_rate = [2.0]", r"optimizer.learning_rate = 2.0: must be in"),
        (
            "[methods.laser]\ngrid = { optimizer.learning_rate = [1e-4, 2e-4] }\n[methods.gircse]",
            "equally many points, for the same budget: laser 2, gircse 1",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        study(tmp_path, text)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("seeds = []\n", "at least one"),
        ("seeds = [1, 1]\n", "different"),
        ("seeds = [1, 2]\nablation_seeds = [2]\n", r"ablation_seeds = \[2\]: give some of seeds = \[1, 2\]"),
        ("seeds = [1, 2]\nablation_seeds = [1, 3]\n", "with the first"),
        ('metric = "ndcg"\n', "ndcg@10"),
        ('keep = "all"\n', "must be one of none, best"),
        ('seeds = ["a"]\n', r"expected list\[int\]"),
        ("methods = 3\n", r"write \[methods"),
        ("extends = 3\n", "name of another study"),
        ('extends = "none.toml"\n', "none.toml: this study does not exist"),
        ("sedes = [1]\n", r'unknown key .* Did you mean "seeds"'),
        ('baseline = "bert"\n', "no such method"),
    ],
)
def test_mistakes_in_the_head_are_named(tmp_path, head, said):
    with pytest.raises(UserError, match=said):
        study(tmp_path, "" if "methods" in head else "[methods.laser]\n", head=head)


def test_budget_is_said(tmp_path):
    with pytest.raises(UserError, match="max_steps"):
        study(tmp_path, "[methods.laser]\n", base='[base]\nmodel = { name = "m" }\n[datasets.d]\n')
