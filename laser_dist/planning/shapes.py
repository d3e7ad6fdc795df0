"""Shapes of decoder models: what a plan needs to know of a model, none of it its weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser_dist.config import ModelConfig
from laser_dist.errors import UserError, suggest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of Llama's kind: grouped-query attention, a gated MLP, RMS norms."""

    name: str
    """Hub id or folder; what a recipe says."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    """Width of one head."""
    vocabulary: int
    tied: bool
    """The LM head is the embedding table."""
    head_norms: bool = False
    """Queries and keys are normalised per head (Qwen3)."""
    biases: int = 0
    """Parameters of a layer's biases."""
    interpolated: bool = False
    """Made up from a number of parameters."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of one decoder layer."""
        query, kv = self.heads * self.head, self.kv_heads * self.head
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer_vectors(self) -> int:
        """Parameters of one layer's norms and biases."""
        return 2 * self.hidden + self.biases + 2 * self.head * self.head_norms

    @property
    def table(self) -> int:
        """Parameters of the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        layers = self.layers * (self.layer_weights + self.layer_vectors)
        return layers + self.table * (1 if self.tied else 2) + self.hidden

    def adapters(self, rank: int, targets: tuple[str, ...] = ModelConfig.lora_targets) -> int:
        """Parameters of LoRA adapters of this rank on these linear layers."""
        return self.layers * rank * sum(sum(self.linears[name]) for name in targets)


def _qwen3(size: str, *numbers: int, tied: bool) -> Shape:
    return _shape(f"Qwen/Qwen3-{size}", *numbers, 128, 151936, tied=tied, head_norms=True)


def _shape(name: str, *numbers: int, tied: bool, head_norms: bool = False) -> Shape:
    layers, hidden, intermediate, heads, kv_heads, head, vocabulary = numbers
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        vocabulary=vocabulary,
        tied=tied,
        head_norms=head_norms,
    )


# From each model's config.json on the hub; a test compares the parameters with the totals that the hub states.
KNOWN = {
    shape.name.split("/")[1].lower(): shape
    for shape in (
        _qwen3("0.6B", 28, 1024, 3072, 16, 8, tied=True),
        _qwen3("1.7B", 28, 2048, 6144, 16, 8, tied=True),
        _qwen3("4B", 36, 2560, 9728, 32, 8, tied=True),
        _qwen3("8B", 36, 4096, 12288, 32, 8, tied=False),
        _qwen3("14B", 40, 5120, 17408, 40, 8, tied=False),
        _qwen3("32B", 64, 5120, 25600, 64, 8, tied=False),
        _shape("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        _shape("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        _shape("meta-llama/Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, tied=False),
        _shape("meta-llama/Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, tied=False),
        _shape("HuggingFaceTB/SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
        _shape("HuggingFaceTB/SmolLM2-360M", 32, 960, 2560, 15, 5, 64, 49152, tied=True),
        _shape("HuggingFaceTB/SmolLM2-1.7B", 24, 2048, 8192, 32, 32, 64, 49152, tied=True),
    )
}
_UNITS = {"m": 1e6, "b": 1e9}


def find_shape(model: str) -> Shape:
    """A known model's shape (no network), one between them for a size such as "4B", else that of its config.

    A folder or an unknown hub id is read with transformers' AutoConfig. Raises UserError where that fails.
    """
    if Path(model).expanduser().is_dir():
        return _from_config(model)
    if shape := KNOWN.get(model.lower().split("/")[-1]):
        return replace(shape, name=model if "/" in model else shape.name)
    if model and model[-1].lower() in _UNITS:
        try:
            return interpolate(float(model[:-1]) * _UNITS[model[-1].lower()])
        except ValueError:
            pass
    return _from_config(model)


def interpolate(parameters: float) -> Shape:
    """A shape of about this many parameters: the known model nearest in size, wider or narrower, at its own depth.

    UserError outside of 0.1 to 200 billion.
    """
    if not 1e8 <= parameters <= 2e11:
        raise UserError(f"--model: {parameters:.3g} parameters are outside of what is modelled, 0.1B to 200B")
    nearest = min(KNOWN.values(), key=lambda s: max(s.parameters / parameters, parameters / s.parameters))
    name = f"{parameters / 1e9:.3g}B"

    def widened(factor: float) -> Shape:
        heads = max(nearest.kv_heads, round(nearest.heads * factor / nearest.kv_heads) * nearest.kv_heads)
        hidden, inner = (max(64, round(x * factor / 64) * 64) for x in (nearest.hidden, nearest.intermediate))
        return replace(nearest, name=name, hidden=hidden, intermediate=inner, heads=heads, interpolated=True)

    factors = [0.5 + i / 1000 for i in range(1500)]
    return min(map(widened, factors), key=lambda s: abs(s.parameters - parameters))


def _from_config(model: str) -> Shape:
    from transformers import AutoConfig

    folder = Path(model).expanduser()
    try:
        config: Any = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else model)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"--model {model}: cannot read its config: {reason} (a hub id that is not in the table below needs network "
            f"access or a cached copy; a size looks like 4B).{suggest(model, KNOWN)} Known without either: "
            + ", ".join(shape.name for shape in KNOWN.values())
        ) from error
    kind = config.model_type
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(f"--model {model}: {kind} is a mixture of experts, which is not modelled; use a dense decoder")
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [name for name in needed if not isinstance(getattr(config, name, None), int)]:
        raise UserError(f"--model {model}: its config ({kind}) lacks {missing[0]}; plans know decoders of Llama's kind")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Qwen2 has biases on q, k and v without saying so; Llama and Qwen3 say it, and then also have o's.
    biases = (heads + 2 * kv_heads) * head if kind == "qwen2" else 0
    if getattr(config, "attention_bias", False):
        biases = (heads + 2 * kv_heads) * head + config.hidden_size
    return Shape(
        name=model,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head_norms=kind == "qwen3",
        biases=biases,
    )
