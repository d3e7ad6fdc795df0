"""FAISS indexes beside the vectors they were built from.

INDEX.index/ holds index.faiss and index.json: which vectors (the hash of their manifest) and which parameters. It is
built under another name and renamed, so a folder of that name is whole. Vectors have unit length, so inner products
rank as cosines do. What an index finds is scored again with the vectors themselves: scores are exact, whatever the
index rounds, and equal scores rank by index, as in exact search.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from laser_dist.errors import UserError, require
from laser_dist.files import sha256, sync_folder, write_json
from laser_dist.reading import read_object
from laser_dist.retrieval.search.origin import manifest_hash

Kind = Literal["flat", "hnsw", "ivfpq"]
_ROWS = 16384  # vectors in memory at a time as float32, beside the index
_OWNERS = dict.fromkeys(("hnsw_m", "ef_construction", "ef_search"), "hnsw")
_OWNERS |= dict.fromkeys(("nlist", "nprobe", "pq_m"), "ivfpq")
_CLASSES = {"flat": "IndexFlat", "hnsw": "IndexHNSWFlat", "ivfpq": "IndexIVFPQ"}
_LEAST_FOR_PQ = 256  # FAISS trains 2^8 centroids per code


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Parameters of the indexes; unset ones follow from the number of vectors N and their dimension D."""

    hnsw_m: int | None = None
    """hnsw: neighbours per vector; more finds more and takes 8 bytes each. Unset: 32."""
    ef_construction: int | None = None
    """hnsw: candidates looked at while building. Unset: 200."""
    ef_search: int | None = None
    """hnsw: candidates looked at per query, at least k. Unset: the larger of 128 and 2 k."""
    nlist: int | None = None
    """ivfpq: cells the vectors are divided into. Unset: 4 sqrt(N), but 39 vectors per cell or more."""
    nprobe: int | None = None
    """ivfpq: cells looked into per query. Unset: a sixteenth of them, but 8 or more."""
    pq_m: int | None = None
    """ivfpq: bytes per vector; must divide D. Unset: the largest divisor of D that is at most D / 4."""
    candidates: int | None = None
    """Passages per query taken from the index to be scored exactly. Unset: k, and for ivfpq 4 k."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None and value < 1:
                raise UserError(f"--{field.name.replace('_', '-')} {value}: must be at least 1")


def open_index(folder: Path, vectors: np.ndarray, kind: Kind, options: IndexOptions, *, rebuild: bool = False) -> Any:
    """The saved index of that kind in the folder of vectors, built if there is none or `rebuild`.

    Raises UserError for one of other vectors or parameters, and for parameters that do not fit the vectors.
    """
    _require_faiss(kind)
    path = folder / f"{kind}.index"
    built = _build_parameters(kind, options, *vectors.shape)
    if path.is_dir() and not rebuild:
        return _load(path, folder, vectors.shape, kind, built, options)
    index = _build(vectors, kind, built)
    _save(index, path, {"kind": kind, "vectors": manifest_hash(folder), "parameters": built})
    return index


def search_index(
    index: Any, queries: np.ndarray, vectors: np.ndarray, k: int, kind: Kind, options: IndexOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of what the index finds: (scores float32, indices int64), both [n, k'], as `exact.search` gives them.

    Where it finds fewer than k for a query, the row ends with score -inf and index -1. k' is min(k, N).
    """
    import faiss

    k = min(k, len(vectors))
    wanted = min(len(vectors), max(k, options.candidates or (4 * k if kind == "ivfpq" else k)))
    parameters: Any = None
    if kind == "hnsw":  # FAISS's stubs do not know what its SWIG classes take
        ef_search = max(options.ef_search or max(128, 2 * k), wanted)
        parameters = faiss.SearchParametersHNSW(efSearch=ef_search)  # type: ignore[attr-defined]
    elif kind == "ivfpq":
        nprobe = min(index.nlist, options.nprobe or max(8, index.nlist // 16))
        parameters = faiss.SearchParametersIVF(nprobe=nprobe)  # type: ignore[call-arg]
    _, found_NC = index.search(np.ascontiguousarray(queries, np.float32), wanted, params=parameters)
    return _scored_again(queries, found_NC, vectors, k)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact search's indices [n, k] that are among those found [n, k]."""
    return float(np.mean([len(set(f.tolist()) & set(e.tolist())) / len(e) for f, e in zip(found, exact, strict=True)]))


def check_tuning(kind: Kind | Literal["exact"], options: IndexOptions, rebuild: bool) -> None:
    """UserError for parameters that this kind does not have, and where FAISS is missing."""
    for field in dataclasses.fields(options):
        owner = _OWNERS.get(field.name, kind if kind != "exact" else "flat, hnsw or ivfpq")
        if getattr(options, field.name) is not None and kind != owner:
            raise UserError(f"--{field.name.replace('_', '-')}: goes with --index {owner}, not with {kind}")
    if kind == "exact" and rebuild:
        raise UserError("--rebuild-index: exact search has no index")
    if kind != "exact":
        _require_faiss(kind)


def _require_faiss(kind: str) -> None:
    require(f"--index {kind}", "faiss", extra="search", instead="--index exact")


def _build_parameters(kind: Kind, options: IndexOptions, passages: int, dim: int) -> dict[str, int]:
    """What the index is built with; the rest of the options concerns searching."""
    if kind == "flat":
        return {}
    if kind == "hnsw":
        return {"hnsw_m": options.hnsw_m or 32, "ef_construction": options.ef_construction or 200}
    if passages < _LEAST_FOR_PQ:
        raise UserError(
            f"--index ivfpq: needs at least {_LEAST_FOR_PQ} vectors, here are {passages}: use --index exact"
        )
    # 39 per cell is what FAISS asks for to place a cell's centre.
    nlist = options.nlist or max(1, min(round(4 * passages**0.5), passages // 39))
    pq_m = options.pq_m or max(m for m in range(1, max(1, dim // 4) + 1) if dim % m == 0)
    if dim % pq_m or nlist > passages:
        raise UserError(
            f"--pq-m {pq_m} must divide the dimension {dim}, and --nlist {nlist} be at most the {passages} vectors"
        )
    return {"nlist": nlist, "pq_m": pq_m}


def _build(vectors: np.ndarray, kind: Kind, built: dict[str, int]) -> Any:
    import faiss
    from rich.console import Console
    from rich.progress import track

    passages, dim = vectors.shape
    index: Any
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, built["hnsw_m"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = built["ef_construction"]
    else:
        index = faiss.IndexIVFPQ(
            faiss.IndexFlatIP(dim), dim, built["nlist"], built["pq_m"], 8, faiss.METRIC_INNER_PRODUCT
        )
        # FAISS itself looks at no more than 256 vectors per centroid.
        sample = np.random.default_rng(0).permutation(passages)[: 256 * max(256, built["nlist"])]
        index.train(np.asarray(vectors[np.sort(sample)], np.float32))
    blocks = range(0, passages, _ROWS)
    for first in track(blocks, description=f"building {kind}", console=Console(stderr=True), transient=True):
        index.add(np.array(vectors[first : first + _ROWS], np.float32))
    return index


def _save(index: Any, path: Path, identity: dict[str, Any]) -> None:
    import faiss

    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        faiss.write_index(index, str(partial / "index.faiss"))
        written = {"faiss": faiss.__version__, "sha256": sha256(partial / "index.faiss")}
        write_json(partial / "index.json", identity | written)
        sync_folder(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: the index cannot be written ({error}): make room, or use --index exact") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(
    path: Path, folder: Path, shape: tuple[int, ...], kind: Kind, built: dict[str, int], options: IndexOptions
) -> Any:
    """FAISS checks little of what it reads, so it gets to see only the very file that `_save` has written."""
    import faiss

    try:
        saved = read_object(path / "index.json")
        vectors, parameters = saved["vectors"], dict(saved["parameters"])
        if saved.get("sha256") != sha256(path / "index.faiss"):
            raise ValueError("index.faiss is not the file that index.json was written with")
        if saved["kind"] != kind or parameters.keys() != built.keys():
            raise ValueError(f"it is no {kind} index")
        # Mapped into memory: opening a large index takes no time and no memory of its own.
        index = faiss.read_index(str(path / "index.faiss"), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        if (index.ntotal, index.d) != shape or not isinstance(index, getattr(faiss, _CLASSES[kind])):
            raise ValueError("it does not fit these vectors")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}): build it again with --rebuild-index") from None
    if vectors != manifest_hash(folder):
        raise UserError(f"{path} was built from other vectors than {folder} holds now: build it with --rebuild-index")
    asked = {name: value for name, value in built.items() if getattr(options, name) is not None}
    if differing := [
        f"{name} {parameters[name]}, not {asked[name]}" for name in asked if parameters[name] != asked[name]
    ]:
        raise UserError(f"{path} was built with {', '.join(differing)}: build it again with --rebuild-index")
    return index


def _scored_again(queries: np.ndarray, found_NC: np.ndarray, vectors: np.ndarray, k: int) -> tuple[Any, Any]:
    scores = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.full((len(queries), k), -1, np.int64)
    for row, (query, found) in enumerate(_pairs(queries, found_NC)):
        found = found[found < len(vectors)]  # an index may hold any number as an id
        exact = np.asarray(vectors[found], np.float32) @ np.asarray(query, np.float32)
        best = np.lexsort((found, -exact))[:k]
        scores[row, : len(best)], indices[row, : len(best)] = exact[best], found[best]
    return scores, indices


def _pairs(queries: np.ndarray, found_NC: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for query, found in zip(queries, found_NC, strict=True):
        yield query, found[found >= 0]  # FAISS fills rows that stay short with -1
