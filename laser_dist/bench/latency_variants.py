"""Three ways from token ids to vectors with one set of weights, and the check that they agree where they should."""

import copy
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from laser_dist.batch import PackedBatch, TokenSequence, pack
from laser_dist.config import ModelConfig
from laser_dist.errors import UserError, suggest
from laser_dist.model.attention import NAME as PACKED_ATTENTION
from laser_dist.model.backbone import load_backbone
from laser_dist.model.retriever import LaserRetriever, unit
from laser_dist.testing.published import PublishedStep

if TYPE_CHECKING:
    from laser_dist.bench.latency import Settings

# Of a unit vector's elements, in float64: float32 rounds a sum over the vocabulary by 1e-5 for one text and by 4e-7 for
# eight, which 30 layers make 1e-4 of a vector, and a bug must not hide in that. Norms and rotary angles are float32
# whatever the model's precision, and each soft token passes on what they round, enlarged: 0 at K = 3, 6e-6 at K = 8.
TOLERANCE = 1e-5
_STEPS_AT_TOLERANCE = 3
_MORE_STEPS_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3  # of a logit: a greedy token may lose against its equal
_CHECKED_TOKENS = 48  # what holds for these lengths holds for others; the published step keeps all positions' logits

_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


class Variants:
    """`one_pass`, `laser` and `rewrite`: lists of token ids to unit vectors [n, D] on the CPU, at least float32."""

    def __init__(self, lm: Any):
        # The same parameters behind transformers' own attention: what serving without this package would run.
        self.plain: Any = copy.deepcopy(lm, {id(p): p for p in lm.parameters()})
        self.plain.set_attn_implementation("sdpa")
        self.retriever = LaserRetriever(lm, steps=1).eval()
        self.plain.eval()

    @property
    def device(self) -> torch.device:
        return next(self.retriever.parameters()).device

    def to(self, dtype: torch.dtype) -> None:
        """Change the precision of the shared weights."""
        self.retriever.to(dtype)
        self.plain.to(dtype)

    def rows(self, lengths: list[int]) -> list[list[int]]:
        """Token ids drawn at random, always the same ones: latency does not depend on what a text says."""
        draw = np.random.default_rng(0)
        return [draw.integers(0, self.plain.config.vocab_size, length).tolist() for length in lengths]

    @torch.no_grad()
    def one_pass(self, rows: list[list[int]]) -> np.ndarray:
        """An ordinary encoder: the last token's state. Rows are equally long, so nothing is padded."""
        states = self.plain.get_decoder()(input_ids=self._tensor(rows), use_cache=False).last_hidden_state
        return unit(states[:, -1]).cpu().numpy()

    @torch.no_grad()
    def laser(self, rows: list[list[int]], steps: int) -> np.ndarray:
        """LaserEncoder's path: packed, K = `steps` latent states, their mean."""
        self.retriever.steps = steps
        return self.retriever(self.packed(rows)).passage_PD.cpu().numpy()

    @torch.no_grad()
    def rewrite(self, rows: list[list[int]], tokens: int) -> np.ndarray:
        """Generate a rationale of `tokens` tokens, then encode query and rationale in one pass."""
        return self.one_pass(self.generate(rows, tokens).tolist())

    @torch.no_grad()
    def generate(self, rows: list[list[int]], tokens: int) -> Tensor:
        """Query and rationale (rows, length + tokens): greedy, with the key-value cache, never ending early."""
        ids = self._tensor(rows)
        config = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0
        )
        found = self.plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        if found.shape[1] != ids.shape[1] + tokens:
            raise RuntimeError(f"generated {found.shape[1] - ids.shape[1]} tokens instead of {tokens}")
        return found

    def packed(self, rows: list[list[int]], queries: int = 0) -> PackedBatch:
        return pack([TokenSequence(row) for row in rows], queries=queries).to(self.device)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)


def load_lm(settings: "Settings") -> nn.Module:
    """The causal LM in float32 on the CPU, with the weights of a model or with random ones."""
    if settings.random_weights is None:
        from laser_dist.model.embedded import CACHED_BACKBONE

        name = settings.model or str(CACHED_BACKBONE)
        return load_backbone(ModelConfig(name=name, layers=settings.layers, dtype="float32"))
    sizes = _sizes(settings.random_weights)
    if settings.layers is not None:
        sizes |= {"num_hidden_layers": settings.layers, "layer_types": None}
    try:
        config = AutoConfig.for_model(**sizes)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=torch.float32)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"--random-weights {settings.random_weights}: makes no causal LM: {error}") from error


def _sizes(name: str) -> dict[str, Any]:
    if name in SIZES:
        return dict(SIZES[name])
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(SIZES)
        raise UserError(f"--random-weights {name}: neither a file nor one of {known}.{suggest(name, SIZES)}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"--random-weights {path}: is no JSON object: {error}") from None


@torch.no_grad()
def check_agreement(variants: Variants, settings: "Settings") -> dict[str, float]:
    """What must agree before anything is timed, each with its largest difference. UserError beyond the tolerance.

    Leaves the variants in float64.
    """
    variants.to(torch.float64)
    rows, most = _checked_rows(variants, settings), max(settings.steps)
    variants.retriever.steps = most
    _, thoughts_RKD, _ = variants.retriever.think(variants.packed(rows))
    fewer = [np.abs(variants.laser(rows, k) - unit(thoughts_RKD[:, :k].mean(1)).cpu().numpy()) for k in settings.steps]
    one_pass = np.concatenate([variants.one_pass([row]) for row in rows])
    found = {
        "K = 1 and one encoder pass": np.abs(variants.laser(rows, 1) - one_pass).max(),
        "K steps and the first K of more": np.max(fewer),
    }
    for what, difference in found.items():
        _require(difference <= TOLERANCE, what, difference, TOLERANCE)
    for k in sorted({min(most, _STEPS_AT_TOLERANCE), most}):
        tolerance = TOLERANCE if k <= _STEPS_AT_TOLERANCE else _MORE_STEPS_TOLERANCE
        for what, difference in _differences(variants, rows, k).items():
            _require(difference <= tolerance, what, difference, tolerance)
            found[what] = difference
    if settings.rewrite_tokens and settings.rewrite_repeats:
        what, gap = "generated and most likely tokens (logit)", _greedy_gap(variants, rows[-1])
        _require(gap <= LOGIT_TOLERANCE, what, gap, LOGIT_TOLERANCE)
        found[what] = gap
    return {what: float(difference) for what, difference in found.items()}


def _differences(variants: Variants, rows: list[list[int]], k: int) -> dict[str, float]:
    """Batched vectors against those of each text alone, and against the published implementation's."""
    together = variants.laser(rows, k)
    alone = np.concatenate([variants.laser([row], k) for row in rows])
    views = PublishedStep(variants.plain, steps=k).views(variants.packed(rows, queries=4))
    published = torch.cat([views.query_BD, views.passage_PD]).cpu().numpy()
    return {
        f"K = {k}, one text alone and among {len(rows)}": np.abs(alone - together).max(),
        f"K = {k} and the published implementation": np.abs(published - together).max(),
    }


def rounding(variants: Variants, settings: "Settings") -> float:
    """How far a vector made alone is from the one made among others, in the precision that is timed; not judged."""
    rows, most = _checked_rows(variants, settings), max(settings.steps)
    alone = np.concatenate([variants.laser([row], most) for row in rows])
    return float(np.abs(variants.laser(rows, most) - alone).max())


def _checked_rows(variants: Variants, settings: "Settings") -> list[list[int]]:
    """Eight rows of different lengths, so that packing has something to get wrong."""
    longest = min(max(settings.lengths), _CHECKED_TOKENS)
    return variants.rows([max(1, longest * (i + 1) // 8) for i in range(8)])


def _greedy_gap(variants: Variants, row: list[int], tokens: int = 4) -> float:
    """How much a token generated with the cache falls short of the most likely one of a pass without it."""
    found = variants.generate([row], tokens)
    logits_TV = variants.plain(input_ids=found[:, :-1], use_cache=False).logits[0, -tokens:].float()
    return float((logits_TV.max(-1).values - logits_TV.gather(1, found[0, -tokens:, None])[:, 0]).max())


def _require(agrees: bool, what: str, difference: float, tolerance: float) -> None:
    if not agrees:  # NaN disagrees, too
        raise UserError(
            f"{what}: {float(difference):.3g} apart, more than {tolerance:g}. Ways of encoding that compute different "
            "things are not compared, and nothing is reported"
        )


@torch.no_grad()
def memory_traffic(variants: Variants) -> dict[str, float]:
    """Bytes of weights that one latent step reads, and how fast this device reads: together a floor for its time.

    A step runs one token per text through all layers, the LM head over the vocabulary and, for the soft token, the
    embedding table. For few texts that is far less arithmetic than reading.
    """
    lm = variants.plain
    layers = sum(p.numel() * p.element_size() for p in lm.get_decoder().layers.parameters())
    tables = [lm.get_output_embeddings().weight, lm.get_input_embeddings().weight]
    vocabulary = sum(table.numel() * table.element_size() for table in tables)
    per_second = _read_bytes_per_second(variants.device)
    return {
        "layer_bytes": layers,
        "vocabulary_bytes": vocabulary,
        "read_bytes_per_second": per_second,
        "floor_seconds": (layers + vocabulary) / per_second,
    }


def _read_bytes_per_second(device: torch.device) -> float:
    """The best of five sums over 512 MB, which no cache holds."""
    block = torch.ones(1 << 27, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return block.numel() * block.element_size() / min(seconds)
