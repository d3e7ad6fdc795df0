"""What a study file says.

Tables: [base] is a recipe; [datasets.NAME]; [methods.NAME], each a method's recipe and what else it changes;
[grid], dotted keys with the values to choose from on the dev queries; [tests.NAME], ways to ask a trained model;
[rewriting], how rationales are generated for them.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from laser_dist.config import RunConfig
from laser_dist.errors import UserError, suggest
from laser_dist.recipe import merged, read_table, recipe_of

METHODS = Path(__file__).parents[1] / "recipes" / "methods"
Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows to train on and a collection to measure with; paths are relative to --data."""

    name: str
    folder: str = ""
    """corpus.jsonl, queries and judgements of both splits; "@sample" is the embedded set. Unset: the dataset's name."""
    train: str = ""
    """JSONL or shards; unset: FOLDER/train.jsonl."""
    prepare: list[str] = field(default_factory=list)
    """Flags of `laser-dist prepare` for rows that are no shards yet."""
    dev: str = "dev"
    test: str = "test"
    licence: str = ""
    """Said in the report."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train: a recipe of recipes/methods/ and more values in its place."""

    name: str
    recipe: str = ""
    """A name in recipes/methods/, or a file beside the study; unset: the method's own name, where that is one."""
    title: str = ""
    """In tables and charts; unset: the name."""
    ablation: bool = False
    """Listed in the ablation table, not among the methods."""
    point_of: str = ""
    """Take the values that another method was given on dev, instead of choosing."""
    teacher: str = ""
    """The method whose run with the same seed is objective.teacher."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Instead of the study's; every method that chooses gets as many points."""
    overrides: Table = field(default_factory=dict)
    """Sections of a recipe, as written in the method's table."""

    @property
    def label(self) -> str:
        return self.title or self.name

    @property
    def needs(self) -> tuple[str, ...]:
        """Methods that come first."""
        return tuple(dict.fromkeys(name for name in (self.teacher, self.point_of) if name))


@dataclass(frozen=True, kw_only=True)
class Test:
    """One way to ask a trained model."""

    name: str
    title: str = ""
    """In the table of methods, as if it were one; unset: with other ways of asking."""
    steps: int | None = None
    """Latent steps of the queries; unset: as in training."""
    reindex: bool = False
    """Passages think so many steps as well; otherwise as many as in training."""
    rationale: Literal["none", "oracle", "generated"] = "none"
    """What a query brings: nothing, the one in the queries file, or one that the backbone wrote."""
    view: Literal["latent", "explicit"] = "latent"
    """A rationale is appended to the query's text, or read as in training: [query ; rationale ; EOS]."""
    methods: list[str] = field(default_factory=list)
    """Only these; unset: all."""


OWN = Test(name="own")
"""As trained: what methods are compared by."""


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """How the backbone writes rationales: greedily, kept on disk."""

    model: str = ""
    """Unset: base.model.name, with all its layers."""
    tokens: int = 128
    """At most; a rationale may end before."""
    batch: int = 8
    """Queries at once."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study file."""

    name: str
    datasets: dict[str, Dataset]
    methods: dict[str, Method]
    base: Table
    file: Path
    tests: dict[str, Test] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    rewriting: Rewriting = field(default_factory=Rewriting)
    title: str = ""
    """Heading of the report."""
    notes: str = ""
    """Text below it: what was cut, and why."""
    seeds: list[int] = field(default_factory=lambda: [0])
    ablation_seeds: list[int] = field(default_factory=list)
    """Those of them that ablations are trained with, the first among them; unset: all."""
    metric: str = "ndcg@10"
    """Chosen by on dev, compared by on test."""
    baseline: str = ""
    """Method that the others are tested against; unset: the first."""
    reference: str = ""
    """Method that ablations are compared with; unset: the baseline."""
    keep: Literal["none", "best"] = "none"
    """Checkpoints after a cell is measured: none, or those of the chosen points."""
    processes: int = 1
    """Training processes of one cell; more than one go through the deepspeed launcher."""
    encode_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Precision of the models that are measured; unset: float32 on a CPU, bfloat16 on a GPU."""
    curve_passages: int = 0
    """Learning curves: evaluate on dev while training, among the judged passages and so many others. 0: no curves."""

    def points(self, method: Method) -> list[Table]:
        """All combinations of a method's grid, each as nested tables; [{}] where nothing is chosen."""
        grid = {} if method.point_of else flat(method.grid or self.grid)
        return [nested(dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]

    def seeds_of(self, method: Method) -> list[int]:
        """The seeds that a method is trained with."""
        return self.ablation_seeds if method.ablation and self.ablation_seeds else self.seeds

    def config(self, method: Method, point: Table) -> RunConfig:
        """A cell's recipe, without paths and seed. UserError names the method whose values are wrong."""
        source = f"{self.file}: [methods.{method.name}]"
        recipe = _recipe(method, self.file)
        # A choice made for another method must not undo what this one is about.
        tables = (point, recipe, method.overrides) if method.point_of else (recipe, method.overrides, point)
        table = merged(self.base, *tables)
        if method.teacher:
            table = merged(table, {"objective": {"teacher": method.teacher}})
        try:
            return recipe_of(table, source)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None

    def tests_of(self, method: Method) -> list[Test]:
        """The ways this method's models are asked, as trained first."""
        return [OWN, *(test for test in self.tests.values() if not test.methods or method.name in test.methods)]

    def ordered(self) -> list[Method]:
        """Methods with what they need before them, otherwise as written. UserError for a circle."""
        done: dict[str, Method] = {}
        while len(done) < len(self.methods):
            ready = [m for m in self.methods.values() if m.name not in done and set(m.needs) <= done.keys()]
            if not ready:
                left = ", ".join(self.methods.keys() - done.keys())
                raise UserError(f"{self.file}: methods wait for each other (point_of, teacher): {left}")
            done[ready[0].name] = ready[0]
        return list(done.values())


def nested(flat: dict[str, Any]) -> Table:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    table: Table = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        table = merged(table, value)
    return table


def flat(table: Table, prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _recipe(method: Method, file: Path) -> Table:
    name = method.recipe or method.name
    for path in (file.parent / name, METHODS / f"{name}.toml"):
        if path.suffix == ".toml" and path.is_file():
            return read_table(path)
    if not method.recipe and (method.overrides or method.grid):
        return {}
    # Also a method without values of its own: under a misspelt name it would be the base, and nobody would notice.
    ready = sorted(path.stem for path in METHODS.glob("*.toml"))
    raise UserError(
        f"{file}: [methods.{method.name}] recipe = {name!r}: neither a file beside the study nor one of "
        f"{', '.join(ready) or f'those that should be in {METHODS}'}.{suggest(name, ready)}"
    )
