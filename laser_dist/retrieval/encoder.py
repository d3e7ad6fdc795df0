"""LaserEncoder: texts to unit vectors, with the latent or the explicit view, packed; the trainer's vectors exactly."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from laser_dist.batch import TokenSequence, pack
from laser_dist.config import RunConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat
from laser_dist.distributed.collectives import gather_objects, merge_rows, rank, world_size
from laser_dist.errors import UserError
from laser_dist.model.backbone import DTYPES, load_backbone, load_tokenizer
from laser_dist.model.retriever import LaserRetriever, unit
from laser_dist.retrieval.arguments import at_least_one, check_texts, per_text, slices
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.folders import model_folder
from laser_dist.retrieval.loading import find_device, load_trained_lm

if TYPE_CHECKING:
    from laser_dist.retrieval.workers import Workers

# A tokenizer's answer holds far more than ids; that of all texts at once would be the peak of memory.
_TOKENISED_AT_ONCE = 512


class LaserEncoder:
    """Encodes queries and passages; `from_pretrained` takes a training checkpoint, an export or a published folder.

    Rows are packed without padding, so the tokenizer's padding side is irrelevant and a text alone gives the vector
    it gives in a batch. Texts longer than text.max_*_tokens lose the end of their content, as in training.
    """

    def __init__(
        self,
        retriever: LaserRetriever,
        text: TextFormat,
        card: RetrieverCard,
        *,
        batch_tokens: int = 4096,
        dim: int | None = None,
        over_ranks: bool = False,
    ):
        """`over_ranks` shares the work among all ranks of the process group; then every rank must make every call."""
        if batch_tokens < 1:
            raise UserError(f"batch_tokens = {batch_tokens}: must be at least 1")
        self.retriever = retriever
        self.text = text
        self.card = card
        self.batch_tokens = batch_tokens
        self.over_ranks = over_ranks
        self.dim = self._check_dim(self.hidden_size if dim is None else dim)
        self._origin: dict[str, Any] | None = None
        self._workers: Workers | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        steps: int | None = None,
        dim: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        layers: int | None = None,
        batch_tokens: int = 4096,
    ) -> "LaserEncoder":
        """Load a folder (or a hub id). `steps` overrides K; `dim` cuts vectors, unless a call says otherwise.

        `dtype` is the model's precision: by default float32 on a CPU and bfloat16 on a GPU. Raises UserError for a
        folder that is no model, another model's tokenizer, and LoRA adapters whose backbone cannot be found.
        """
        device = find_device(device)
        dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
        folder = model_folder(folder)
        card = RetrieverCard.load(Path(folder))
        if steps is not None:
            card = dataclasses.replace(card, thinking=dataclasses.replace(card.thinking, steps=steps))
        lm, tokenizer = load_trained_lm(folder, card, dtype=dtype, layers=layers)
        retriever = LaserRetriever(lm, steps=card.thinking.steps, convention=card.thinking.convention)
        text = TextFormat(tokenizer, card.text)
        encoder = cls(retriever.to(device).eval(), text, card, batch_tokens=batch_tokens, dim=dim)
        encoder._origin = {"folder": folder, "dtype": dtype, "layers": layers}
        return encoder

    @classmethod
    def from_config(cls, config: RunConfig, **options: Any) -> "LaserEncoder":
        """The untrained backbone of a run, with the run's thinking and text settings."""
        card = RetrieverCard.of(config)
        lm, text = load_backbone(config.model), TextFormat(load_tokenizer(config.model), config.text)
        retriever = LaserRetriever(lm, steps=config.thinking.steps, convention=config.thinking.convention)
        return cls(retriever.eval(), text, card, **options)

    @property
    def hidden_size(self) -> int:
        return int(self.retriever.base.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.retriever.parameters()).device

    @property
    def dtype(self) -> str:
        """Precision of the model; vectors are float32 whatever it is."""
        return str(next(self.retriever.parameters()).dtype).removeprefix("torch.")

    def description(self) -> dict[str, Any]:
        """What made the vectors, for result files: thinking, text settings, size and precision of the model."""
        return {
            **dataclasses.asdict(self.card),
            "layers": self.retriever.base.config.num_hidden_layers,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.retriever.lm.parameters()),
            "dtype": self.dtype,
        }

    @contextmanager
    def pool(self, devices: Sequence[str]) -> Iterator["LaserEncoder"]:
        """This encoder with its batches computed by one process per device, e.g. `encoder.pool(["cuda:0", "cuda:1"])`.

        The processes load the folder that `from_pretrained` has loaded, and end with the block. Vectors are those of
        one process, in the order of the texts. Raises UserError for an encoder made otherwise, WorkerFailed when a
        process dies.
        """
        from laser_dist.retrieval.workers import Workers

        if self._origin is None:
            raise UserError("a pool loads the model's folder again: make the encoder with LaserEncoder.from_pretrained")
        with Workers(self._origin, devices) as workers:
            pooled = copy.copy(self)
            pooled._workers = workers
            yield pooled

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        instructions: str | Sequence[str | None] | None = None,
        rationales: Sequence[str] | None = None,
        steps: int | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Queries -> float32 [n, dim], rows of unit length; an instruction of None is the model's own default.

        With `rationales`, one for each text, the vectors are the explicit view's: the state at EOS behind the written
        rationale. `steps` is K of this call, `dim` how many components stay (renormalised).
        """
        check_texts("texts", texts)
        asked = [instructions] * len(texts) if isinstance(instructions, str) else instructions
        columns = [per_text("instructions", asked, texts), texts, per_text("rationales", rationales, texts)]
        if rationales is not None:
            check_texts("rationales", rationales)
            if steps is not None:
                raise UserError(
                    "steps: the explicit view, with rationales, takes no latent steps: leave one of them out"
                )
        examples = [
            Example("", query, rationale or "", (), (), how) for how, query, rationale in zip(*columns, strict=True)
        ]
        rows: list[TokenSequence] = []
        for some in slices(examples, _TOKENISED_AT_ONCE):
            whole = self.text.whole_queries(some, with_rationale=rationales is not None)
            rows += map(self.text.cut_query, whole)
        self._check_room(rows)
        return self.encode_rows(rows, steps=steps, dim=dim, progress="encoding queries" if progress else None)

    def encode_passages(
        self,
        texts: Sequence[str],
        *,
        titles: Sequence[str] | None = None,
        steps: int | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Passages -> float32 [n, dim], rows of unit length; `steps` and `dim` as for queries."""
        check_texts("texts", texts)
        columns = texts, per_text("titles", titles, texts)
        passages = [Passage("", text, title or "") for text, title in zip(*columns, strict=True)]
        rows: list[TokenSequence] = []
        for some in slices(passages, _TOKENISED_AT_ONCE):
            rows += [TokenSequence(self.text.cut_passage(whole)) for whole in self.text.whole_passages(some)]
        return self.encode_rows(rows, steps=steps, dim=dim, progress="encoding passages" if progress else None)

    def encode_rows(
        self,
        rows: Sequence[TokenSequence],
        *,
        steps: int | None = None,
        dim: int | None = None,
        progress: str | None = None,
    ) -> np.ndarray:
        """Rows of tokens -> vectors, longest first in batches of at most `batch_tokens` tokens (one longer row alone).

        Rows are prompts (the latent view), or all have a rationale (the explicit one). Raises UserError for vectors
        that are not finite.
        """
        steps = at_least_one("steps", self.retriever.steps if steps is None else steps)
        dim = self._check_dim(self.dim if dim is None else dim)
        vectors = np.zeros((len(rows), dim), np.float32)
        batches = list(self._batches(rows))
        if self.over_ranks:
            # ZeRO-3 gathers parameters in every forward, so each rank must run equally many: repeat one at the end.
            batches += batches[:1] * (-len(batches) % world_size())
            batches = batches[rank() :: world_size()]
        jobs = [[rows[i] for i in indexes] for indexes in batches]
        results: Iterable[np.ndarray] = (self.encode_batch(job, steps, dim) for job in jobs)
        if self._workers is not None:
            results = self._workers.map(jobs, steps, dim)
        if progress:
            results = track(results, description=progress, total=len(jobs), console=Console(stderr=True))
        broken: list[int] = []
        for indexes, result in zip(batches, results, strict=True):
            vectors[indexes] = result
            broken += [indexes[i] for i in np.flatnonzero(~np.isfinite(result).all(1))]
            if broken and not self.over_ranks:
                break
        self._check_finite(broken)
        return merge_rows(vectors) if self.over_ranks else vectors

    @torch.no_grad()
    def encode_batch(self, rows: Sequence[TokenSequence], steps: int, dim: int) -> np.ndarray:
        """One packed forward in this process: float32 [rows, dim]; values may be not finite."""
        explicit = rows[0].rationale is not None
        batch = pack(rows, self.text.eos if explicit else None, queries=len(rows) if explicit else 0)
        # The explicit view needs the prefix only, which one step computes (and one more under the paper's convention).
        with self._thinking(1 if explicit else steps):
            views = self.retriever(batch.to(self.device))
        vectors_RD = views.teacher_BD if explicit else views.passage_PD
        vectors_RD = vectors_RD if dim == vectors_RD.shape[1] else unit(vectors_RD[:, :dim])
        return vectors_RD.float().cpu().numpy()

    @contextmanager
    def _thinking(self, steps: int) -> Iterator[None]:
        """The retriever in evaluation mode, with K steps; afterwards as it was."""
        retriever, was_training, own_steps = self.retriever, self.retriever.training, self.retriever.steps
        retriever.steps = steps
        if was_training:
            retriever.eval()
        try:
            yield
        finally:
            retriever.steps = own_steps
            retriever.train(was_training)

    def _batches(self, rows: Sequence[TokenSequence]) -> Iterator[list[int]]:
        lengths = [len(row.prompt) + (0 if row.rationale is None else len(row.rationale) + 1) for row in rows]
        batch: list[int] = []
        tokens = 0
        for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
            if batch and tokens + lengths[i] > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += lengths[i]
        if batch:
            yield batch

    def _check_dim(self, dim: int) -> int:
        if not 1 <= dim <= self.hidden_size:
            raise UserError(f"dim = {dim}: must be from 1 to {self.hidden_size}, the model's hidden size")
        return dim

    def _check_room(self, rows: Sequence[TokenSequence]) -> None:
        for i, row in enumerate(rows):
            if row.rationale is not None and not row.segment_ends:
                raise UserError(
                    f"rationales[{i}]: its query takes {len(row.prompt)} tokens, and text.max_explicit_tokens = "
                    f"{self.text.config.max_explicit_tokens} leaves none for a rationale: raise it in laser_dist.json"
                )

    def _check_finite(self, broken: list[int]) -> None:
        """All ranks raise if one has a reason to: the others would wait for it."""
        if self.over_ranks:
            broken = sorted({i for others in gather_objects(broken) for i in others})
        if broken:
            wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(self.dtype)
            remedy = f"load the model with dtype {wider}" if wider else "its weights are damaged or have diverged"
            raise UserError(f"texts[{broken[0]}]: its vector is not finite in {self.dtype}: {remedy}")
