"""RunConfig: everything that defines a run; recipe.py reads it from TOML and flags.

One owner per value: ds_configs/*.json own ZeRO's mechanics; batch sizes, precision and clipping are owned here and
handed to DeepSpeed. Every value is checked before a process group starts; every error names key, value and remedy.
"""

import dataclasses
import math
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_type_hints

from laser_dist.errors import UserError
from laser_dist.redaction import check_address, find_secret

MOST_STEPS = 1024
"""Latent steps: each costs a sweep of the model, and folders of others may ask for any number."""


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{key} = {value!r}: {remedy}")


def _check_template(key: str, template: str, required: str, optional: str) -> None:
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{key} = {template!r}: {error}; write {{{{ and }}}} for braces of the text itself") from None
    names = [name for _, name, _, _ in fields]
    _require(required in names, key, template, f"must contain {{{required}}}")
    # A width would pad a text to any length, and a conversion would quote it.
    plain = not any(spec or conversion for _, _, spec, conversion in fields)
    _require(plain, key, template, f"write {{{required}}} alone, without : or ! behind the name")
    for name in names:
        remedy = f"only {{{required}}} and {{{optional}}} are filled in; write {{{{ and }}}} for other braces"
        _require(name in (required, optional), key, template, remedy)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and what of it is trained."""

    name: str = ""
    """Hub id or folder of a causal LM, e.g. Qwen/Qwen3-0.6B."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    layers: int | None = None
    """Keep only the first n decoder layers (a depth-truncated backbone); unset keeps all."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations; losses and their statistics are float32 either way."""
    lora_rank: int = 0
    """Rank of the LoRA adapters; 0 trains every weight."""
    lora_alpha: int = 32
    """LoRA scale is alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout inside the adapters."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""
    activation_checkpointing: bool = True
    """Recompute each layer in backward; the latent K/V survive it, so the prefix runs once, not K times."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """flash: flash-attn 4, 3 or 2; varlen: torch's own; sdpa: padded, anywhere. auto: the first that can run."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories you trust."""

    def __post_init__(self) -> None:
        _require(self.layers is None or self.layers > 0, "model.layers", self.layers, "must be at least 1, or unset")
        _require(self.lora_rank >= 0, "model.lora_rank", self.lora_rank, "0 for full fine-tuning, or a positive rank")
        _require(0 <= self.lora_dropout < 1, "model.lora_dropout", self.lora_dropout, "must be in [0, 1)")
        if self.lora_rank:
            _require(bool(self.lora_targets), "model.lora_targets", self.lora_targets, "name at least one linear layer")


@dataclass(frozen=True, kw_only=True)
class ThinkingConfig:
    """Latent thinking (spec: "The views")."""

    steps: int = 3
    """K, the number of latent states averaged into the vector."""
    convention: Literal["official", "paper"] = "official"
    """official: the first state is the last prompt token's, so K-1 soft tokens; paper: K soft tokens."""

    def __post_init__(self) -> None:
        _require(1 <= self.steps <= MOST_STEPS, "thinking.steps", self.steps, f"must be from 1 to {MOST_STEPS}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How text becomes tokens, in training and in serving alike (saved in every checkpoint)."""

    instruction: str = "Given a query, retrieve passages that help answer it"
    """Instruction used for a query that brings none."""
    query_template: str = "Instruct: {instruction}\nQuery: {query}"
    """Template of a query; {query} is required, {instruction} optional."""
    passage_template: str = "{title}\n{text}"
    """Template of a passage; surrounding blank space is stripped, so a missing title leaves no empty line."""
    chat_template: Literal["auto", "never"] = "auto"
    """auto: wrap texts as the tokenizer's chat template does, with an empty think block where it has one."""
    max_query_tokens: int = 512
    """Longest query, template included; the content is cut, never the template's tail."""
    max_passage_tokens: int = 512
    """Longest passage, template included."""
    max_explicit_tokens: int = 1024
    """Longest [query ; rationale ; EOS]; the rationale is cut."""

    def __post_init__(self) -> None:
        _check_template("text.query_template", self.query_template, "query", "instruction")
        _check_template("text.passage_template", self.passage_template, "text", "title")
        for name in ("max_query_tokens", "max_passage_tokens"):
            _require(getattr(self, name) >= 8, f"text.{name}", getattr(self, name), "must be at least 8")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training shards and how they are read."""

    train: str = ""
    """Folder written by `laser-dist prepare` (shards and manifest.json), or its address: https://... or s3://..."""
    mix: dict[str, float] = field(default_factory=dict)
    """Instead of train: several folders or addresses, each with its weight, e.g. {"shards/a" = 2, "s3://b/c" = 1}."""
    homogeneous: int = 0
    """With mix: so many consecutive queries come from one set; queries_per_rank x ranks, or a multiple. 0: no."""
    negatives: int = 1
    """Hard negatives per query (G = 1 + negatives); queries with fewer reuse theirs, and the share is logged."""
    shuffle: bool = True
    """Shuffle each epoch from the seed; false keeps the file order."""
    shuffle_shards: int = 16
    """Shards shuffled together: bounds the memory of the shuffle."""
    workers: int = 1
    """Loader processes per rank; 0 loads in the training process."""
    on_error: Literal["stop", "skip"] = "stop"
    """A damaged shard or row: stop, or report it in OUTPUT/quarantine.jsonl and put another row in its place."""
    max_skipped: float = 0.01
    """With skip: stop when more than this share of all examples is damaged."""
    cache: str = ""
    """Folder for the shards of addresses; unset: ~/.cache/laser_dist/shards. Share it between runs on one machine."""
    cache_gib: float = 50.0
    """Size of the cache; the least recently used shards go first."""
    timeout: float = 30.0
    """Seconds without an answer or a byte after which a server is asked again."""
    attempts: int = 5
    """Attempts to fetch a shard, with growing pauses, before it counts as damaged."""
    skip_steps: tuple[int, ...] = ()
    """Optimizer steps, from 1, whose examples are passed over without being read; see `laser-dist launch
    --skip-poisoned-step`."""

    @property
    def sources(self) -> dict[str, float]:
        """Folder or address -> weight."""
        return self.mix or {self.train: 1.0}

    def __post_init__(self) -> None:
        _require(self.negatives >= 0, "data.negatives", self.negatives, "must be 0 or more")
        _require(self.shuffle_shards >= 1, "data.shuffle_shards", self.shuffle_shards, "must be at least 1")
        _require(self.workers >= 0, "data.workers", self.workers, "must be 0 or more")
        _require(self.homogeneous >= 0, "data.homogeneous", self.homogeneous, "must be 0 or more")
        _require(0 <= self.max_skipped < 1, "data.max_skipped", self.max_skipped, "must be in [0, 1)")
        _require(self.attempts >= 1, "data.attempts", self.attempts, "must be at least 1")
        _require(all(step >= 1 for step in self.skip_steps), "data.skip_steps", self.skip_steps, "steps count from 1")
        for name in ("cache_gib", "timeout"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"data.{name}", value, "must be finite and positive")
        for weight in self.mix.values():  # without their places, which may hold secrets until they are checked
            _require(math.isfinite(weight) and weight > 0, "data.mix", weight, "weights are finite and positive")

    def validate(self) -> None:
        """UserError unless there are sources, each an address or a folder with a manifest."""
        _require(bool(self.train or self.mix), "data.train", "", "give the folder that `laser-dist prepare` wrote")
        _require(not (self.train and self.mix), "data.mix", list(self.mix.values()), "give either train or mix")
        key = "data.mix" if self.mix else "data.train"
        for place in self.sources:
            if "://" in place:
                check_address(place)
            manifest = Path(place) / "manifest.json"
            remedy = f"{manifest} does not exist; write it with `laser-dist prepare --source FILE --out {place}`"
            _require(
                "://" in place or manifest.is_file(), key, place, remedy
            )  # addresses are asked when they are opened


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L = InfoNCE_L + explicit * InfoNCE_E + output * KL_out + trajectory * KL_mid; a weight of 0 costs nothing."""

    explicit_weight: float = 1.0
    """Lambda 1: contrastive loss of the explicit view (the one that reads the rationale)."""
    output_weight: float = 10.0
    """Lambda 2: distillation of the explicit view's ranking into the latent view."""
    trajectory_weight: float = 0.1
    """Lambda 3: distillation of rationale segments into latent steps."""
    steps_weight: float = 0.0
    """InfoNCE of the vectors after 1 .. K-1 latent steps, of queries and passages alike, summed. With 1 here and in
    refinement_weight the loss is K times GIRCSE's (arXiv 2509.24291)."""
    refinement_weight: float = 0.0
    """K times the mean over steps of how far log InfoNCE rises from one step to the next: GIRCSE's penalty."""
    teacher: str | None = None
    """A trained model whose explicit view, frozen, teaches instead of the run's own; needs explicit_weight = 0."""
    ramp_steps: int = 0
    """Lambda 2 and 3 rise linearly from 0 over this many optimizer steps; 0 starts at full weight."""
    temperature: float = 0.02
    """Tau of both InfoNCE terms."""
    distill_temperature: float = 0.02
    """Tau of the output distillation."""
    trajectory_temperature: float | None = None
    """Tau of the trajectory distillation; unset: 0.05 (official) or 0.02 (paper)."""
    mask_false_negatives: bool = True
    """Drop columns that are another copy of one of the row's own positives, whatever its id: same title and text."""
    false_negative_margin: float | None = None
    """Drop columns that the latent view scores above its positive by more than this cosine; unset: none."""
    kernel: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """Implementation of the loss; auto: Triton on a GPU, chunked PyTorch elsewhere. LASER_KERNELS overrides it."""
    score_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What vectors are rounded to before they are compared; auto: the model's dtype on a GPU, else float32."""
    passages: Literal["gather", "ring"] = "gather"
    """All ranks' passages on every rank, or passing by in a ring where they do not fit (N x D x 6 bytes)."""

    def __post_init__(self) -> None:
        names = ("explicit_weight", "output_weight", "trajectory_weight", "steps_weight", "refinement_weight")
        for name in names:
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"objective.{name}", value, "must be finite and 0 or more")
        for name in ("temperature", "distill_temperature", "trajectory_temperature"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"objective.{name}", value, "must be finite and above 0")
        margin = self.false_negative_margin
        _require(
            margin is None or 0 <= margin <= 2,
            "objective.false_negative_margin",
            margin,
            "must be a cosine from 0 to 2",
        )
        if self.passages == "ring" and self.kernel == "reference":
            raise UserError('objective.passages = "ring" needs objective.kernel auto, triton or chunked')
        _require(self.ramp_steps >= 0, "objective.ramp_steps", self.ramp_steps, "must be 0 or more")

        if self.teacher:
            remedy = "must be 0 with objective.teacher, which is frozen and learns nothing"
            _require(self.explicit_weight == 0, "objective.explicit_weight", self.explicit_weight, remedy)
            remedy = "has nothing to teach: give output_weight or trajectory_weight, or leave it out"
            _require(self.output_weight + self.trajectory_weight > 0, "objective.teacher", self.teacher, remedy)

    @property
    def compares_steps(self) -> bool:
        """Whether passages are compared after each latent step, too."""
        return self.steps_weight > 0 or self.refinement_weight > 0

    @property
    def needs_rationale(self) -> bool:
        return self.explicit_weight > 0 or self.output_weight > 0 or self.trajectory_weight > 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay; norms and biases are exempt."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After warm-up: decay to 0, or stay."""
    warmup: float = 0.1
    """Share of all steps spent warming up."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < 1, "optimizer.learning_rate", self.learning_rate, "must be in (0, 1)")
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "must both be in [0, 1)")
        _require(0 < self.eps < 1, "optimizer.eps", self.eps, "must be in (0, 1)")
        _require(0 <= self.warmup <= 1, "optimizer.warmup", self.warmup, "is a share of all steps: between 0 and 1")
        for name in ("gradient_clipping", "weight_decay"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optimizer.{name}", value, "must be finite and 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch, length and distribution of the run."""

    queries_per_rank: int = 8
    """B: queries per rank and micro-batch. In-batch negatives come from all ranks of one micro-batch."""
    chunk_tokens: int = 0
    """GradCache: run a micro-batch in chunks of at most so many packed tokens, at the price of a second forward pass.
    Exact; thousands of queries in the memory of one chunk. 0 runs it at once."""
    reduce_gradients: Literal["auto", "once", "each_chunk"] = "auto"
    """ZeRO-2 and 3 with several chunks or micro-batches a step: reduce gradients after each, so that a rank holds only
    its part of them, or once a step, for less traffic and whole gradients on each rank. auto: once with LoRA."""
    accumulation: int = 1
    """Micro-batches per optimizer step. More of them average more queries; they do not add negatives."""
    epochs: float = 1.0
    """Passes over the data; fractions are allowed."""
    max_steps: int | None = None
    """Optimizer steps; when set it wins over epochs."""
    deepspeed: str = "zero3.json"
    """DeepSpeed config: a file, or a name in ds_configs/."""

    def __post_init__(self) -> None:
        _require(self.queries_per_rank >= 1, "train.queries_per_rank", self.queries_per_rank, "must be at least 1")
        _require(
            self.chunk_tokens >= 0, "train.chunk_tokens", self.chunk_tokens, "0 for no chunks, or a positive number"
        )
        _require(self.accumulation >= 1, "train.accumulation", self.accumulation, "must be at least 1")
        _require(0 < self.epochs < math.inf, "train.epochs", self.epochs, "must be finite and above 0")
        _require(
            self.max_steps is None or self.max_steps > 0, "train.max_steps", self.max_steps, "at least 1, or unset"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Retrieval on a dev set during training; off unless the three files are given."""

    corpus: str | None = None
    """corpus.jsonl with id and text."""
    queries: str | None = None
    """queries.jsonl with id and text."""
    qrels: str | None = None
    """qrels.tsv: query-id, corpus-id, score."""
    every: int = 0
    """Optimizer steps between evaluations; 0 evaluates at the end only."""
    metric: str = "ndcg@10"
    """Decides which checkpoint is the best."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "evaluation.every", self.every, "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept, and how often."""

    every: int = 500
    """Optimizer steps between checkpoints; one is always written at the end. 0: only then."""
    keep: int = 2
    """Newest checkpoints kept besides the best one; what is damaged does not count as one of them."""
    max_shard_gb: float = 5.0
    """Largest safetensors file of the model in GB, of which rank 0 holds one at a time while it saves."""
    asynchronous: bool = False
    """Train on while files are put on disk and hashed; a checkpoint then is there some steps after its own."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, "must be 0 or more")
        _require(self.keep >= 2, "checkpoint.keep", self.keep, "must be at least 2: the newest may be damaged one day")
        _require(self.max_shard_gb > 0, "checkpoint.max_shard_gb", self.max_shard_gb, "must be more than 0")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What all ranks check together before a step changes a parameter; each rule is in guard/rules.py with its reason.

    Terms and gradients that are not finite stop a run whatever is set here.
    """

    alarm: Literal["stop", "warn", "off"] = "stop"
    """stop before the update, with the batch in OUTPUT/alarms; or say it and train on; off: look for nothing else."""
    row_norm: float = 1e-3
    """Least length of a vector before it gets unit length, as a share of the median: a row's gradient grows by the
    inverse of its length, so that clipping, which sees the sum, would erase all other rows' from a step."""
    spread: float = 1e-6
    """Least variance of a rank's passage vectors (1 - length of their mean squared). At this one they are 0.0014 apart,
    their logits at tau = 0.02 by 0.07 at most, and the loss is log N; bfloat16's rounding alone makes 1e-6."""
    gradient_spike: float = 1000.0
    """Largest gradient norm, in medians of the last steps (or in optimizer.gradient_clipping where that is more). A
    clean run that nearly collapsed and recovered had 68; what this is for has millions."""
    rank_after: int = 500
    """Optimizer steps after which the positive's mean rank must be below chance."""
    checksums_every: int = 100
    """Steps between comparisons of what ranks hold in common, parameters that ranks train alone included; 0: never."""
    dump_weights: bool = False
    """Put the weights of the moment beside a dumped batch; else `replay` takes the newest checkpoint before it."""

    def __post_init__(self) -> None:
        _require(0 <= self.row_norm < 1, "guard.row_norm", self.row_norm, "a share of the median: 0 (off) to 1")
        _require(0 <= self.spread < 1, "guard.spread", self.spread, "a variance of unit vectors: 0 (off) to 1")
        spike = self.gradient_spike
        _require(1 < spike < math.inf, "guard.gradient_spike", spike, "must be finite and more than 1")
        _require(self.rank_after >= 0, "guard.rank_after", self.rank_after, "steps: must be 0 or more")
        _require(self.checksums_every >= 0, "guard.checksums_every", self.checksums_every, "steps, or 0 for never")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written to TensorBoard and metrics.jsonl."""

    every: int = 1
    """Optimizer steps between scalars."""
    term_gradient_norms_every: int = 0
    """Steps between per-term gradient norms (with respect to the vectors); 0: never."""
    peak_tflops: float | None = None
    """Peak of one rank's device, which speed/mfu is a share of. Unset: the data sheet's, where the device is known."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "logging.every", self.every, "must be at least 1")
        peak = self.peak_tflops
        _require(peak is None or 0 < peak < math.inf, "logging.peak_tflops", peak, "must be above 0, or unset")
        norms = self.term_gradient_norms_every
        _require(norms >= 0, "logging.term_gradient_norms_every", norms, "must be 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Traces of a few steps of every rank in profile/ of the output folder, and their summary in TensorBoard."""

    active: int = 0
    """Steps to trace in a cycle; 0: no profile. Traced steps are slower, and deep models make large files."""
    wait: int = 5
    """Steps before each cycle: the first ones of a run are not like the others."""
    warmup: int = 1
    """Steps after these that are traced and not kept, because starting to trace costs time."""
    repeat: int = 1
    """Cycles."""

    def __post_init__(self) -> None:
        for name, least in (("active", 0), ("wait", 0), ("warmup", 1), ("repeat", 1)):
            value = getattr(self, name)
            _require(value >= least, f"profile.{name}", value, f"must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How ranks come together; decides no number of the run."""

    preflight: bool = True
    """With several ranks, check before the first step that all hosts are alike, share the output and see the data."""
    timeout: float = 600.0
    """Seconds a rank waits for the others in one collective; a rank that saves or evaluates lets the others wait."""
    hang_steps: float = 3.0
    """A rank that stays in one phase of a step for so many median steps plus hang_seconds counts as hung, and the run
    is ended (data: data.timeout at least). Saving, evaluating and the first steps take what they take. 0: never."""
    hang_seconds: float = 5.0
    """See hang_steps. A rank whose process is stopped may be so for as long, in any phase."""

    def __post_init__(self) -> None:
        _require(10 <= self.timeout < math.inf, "launch.timeout", self.timeout, "must be finite and at least 10")
        steps, seconds = self.hang_steps, self.hang_seconds
        _require(steps == 0 or 1 <= steps < math.inf, "launch.hang_steps", steps, "0 (off), or at least 1")
        _require(1 <= seconds < math.inf, "launch.hang_seconds", seconds, "must be finite and at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Sections are TOML tables; each field is also a flag, `--section.field value`."""

    output: str = ""
    """Folder of the run: checkpoints, TensorBoard events, metrics.jsonl, the resolved config."""
    seed: int = 0
    """Seed of the data order, dropout and adapters."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the output folder, if there is one."""
    rehearse: Literal["auto", "on", "off"] = "auto"
    """After the first step save, load, evaluate on a slice and export, once, and size the disk for the whole run: what
    would fail at its end fails now. It changes no number. auto: if the run will take more than an hour."""
    model: ModelConfig = field(default_factory=ModelConfig)
    thinking: ThinkingConfig = field(default_factory=ThinkingConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def trajectory_temperature(self) -> float:
        """The temperature in force: the convention decides where the recipe does not (spec: two conventions)."""
        official = self.thinking.convention == "official"
        return self.objective.trajectory_temperature or (0.05 if official else 0.02)

    @property
    def reduce_once(self) -> bool:
        """Whether gradients are reduced once a step although there may be several backwards in it."""
        if not (self.train.chunk_tokens or self.train.accumulation > 1):
            return False
        mode = self.train.reduce_gradients
        return mode == "once" or (mode == "auto" and self.model.lora_rank > 0)

    def _refuse_secrets(self) -> None:
        """UserError for a value that config.toml, TensorBoard and model cards would show to others."""
        for name, section in {"": self, **{f"{s}.": getattr(self, s) for s in _SECTIONS}}.items():
            for key in get_type_hints(type(section)):
                value = getattr(section, key)
                told = [*value] if isinstance(value, dict) else [value]
                if name != "text." and (kind := next(filter(None, map(find_secret, filter(_is_text, told))), None)):
                    raise UserError(
                        f"{name}{key} holds {kind} (not shown), which the run's files and logs would show: leave it "
                        "out; credentials are read from the environment, ~/.netrc and the hub's login"
                    )

    def validate(self) -> None:
        """Check what no single section can: required values, combinations, files. Raises UserError."""
        _require(bool(self.output), "output", self.output, "give the folder of the run, e.g. --output runs/first")
        _require(
            bool(self.model.name), "model.name", self.model.name, "give a hub id or a folder, e.g. Qwen/Qwen3-0.6B"
        )
        self._refuse_secrets()
        self.data.validate()
        _require(
            self.text.max_explicit_tokens >= self.text.max_query_tokens + 2,
            "text.max_explicit_tokens",
            self.text.max_explicit_tokens,
            f"must exceed text.max_query_tokens = {self.text.max_query_tokens} by at least 2 (a rationale token, EOS)",
        )
        _require(
            self.thinking.steps > 1 or not self.objective.compares_steps,
            "thinking.steps",
            self.thinking.steps,
            "objective.steps_weight and refinement_weight compare the steps before the last: at least 2, or set them 0",
        )
        files = {name: getattr(self.evaluation, name) for name in ("corpus", "queries", "qrels")}
        given = [name for name, value in files.items() if value]
        _require(len(given) in (0, 3), "evaluation", given, "give corpus, queries and qrels together, or none of them")
        for name in given:
            _require(Path(files[name]).is_file(), f"evaluation.{name}", files[name], "this file does not exist")
        _require(
            self.evaluation.every == 0 or bool(given),
            "evaluation.every",
            self.evaluation.every,
            "needs corpus, queries and qrels",
        )
        output = Path(self.output)
        home = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        _require(home.is_dir(), "output", self.output, f"{home} is a file: choose another folder")
        occupied = any((output / "checkpoints").glob("step-*")) if output.is_dir() else False
        _require(
            self.resume or not occupied,
            "output",
            self.output,
            "already holds checkpoints: continue with --resume, or choose another folder",
        )


_SECTIONS = tuple(name for name, kind in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind))


def _is_text(value: object) -> bool:
    return isinstance(value, str)
