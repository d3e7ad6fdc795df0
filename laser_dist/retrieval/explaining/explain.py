"""`laser-dist explain`: a look inside the thinking of a retriever, for a few queries."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from laser_dist.errors import UserError, require

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.explaining.passages import Passages

FILES = ("explanation.json", "explanation.md", "tensorboard")

HELP = """Show what a retriever thinks: the vocabulary behind each soft token, the passages that each latent state is
nearest to, and how the states compare with the segments of a written rationale.

Everything is taken from the model's own forward. With --out the same is written as JSON, Markdown and PNG, and with
--tensorboard for TensorBoard: text, images, and queries, thoughts and passages in its projector.

Examples:
  laser-dist explain --model runs/first --query "Why do drops skate on a very hot pan?"
  laser-dist explain --model mine --query "Why ...?" --vectors vectors --corpus corpus.jsonl --out explained
  laser-dist explain --model mine --query "Why ...?" --rationale "$(cat rationale.txt)" --tensorboard --out explained
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `laser-dist explain`."""

    model: str
    """Folder of the model: an export, a checkpoint, or a run (its newest checkpoint)."""
    query: tuple[str, ...] = ()
    """A query; repeat the flag for more."""
    rationale: tuple[str, ...] = ()
    """The written rationale of each query, in order, segments separated by blank lines; "" for a query without."""
    instruction: str | None = None
    """Instruction of the queries; unset: the model's own."""
    corpus: Path | None = None
    """corpus.jsonl, encoded now; with --vectors only the texts are read from it."""
    vectors: Path | None = None
    """Folder of the corpus as `laser-dist encode` wrote it, by this model."""
    show: tuple[Literal["tokens", "passages", "segments"], ...] = ()
    """What to show; unset: the soft tokens, and whatever else the other flags allow."""
    top: int = 8
    """Vocabulary tokens per soft token."""
    nearest: int = 5
    """Passages per latent state."""
    steps: int | None = None
    """Latent steps; unset: as many as in training."""
    out: Path | None = None
    """Folder to write: explanation.json, explanation.md, and a PNG per query."""
    png: bool = True
    """Draw PNGs (needs matplotlib)."""
    tensorboard: bool = False
    """Also write text, images and the projector's points for TensorBoard, below --out."""
    projector_passages: int = 1000
    """Passages in the projector besides those that are shown, spread evenly over the corpus."""
    overwrite: bool = False
    """Replace an explanation that is already in the folder."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the model; unset: the encoder's choice."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What is shown."""
        with_passages = self.corpus is not None or self.vectors is not None
        given = ("tokens", *["passages"] * with_passages, *["segments"] * any(self.rationales))
        return self.show or given

    @property
    def rationales(self) -> tuple[str, ...]:
        """One per query, "" where there is none."""
        return tuple(text if text.strip() else "" for text in self.rationale) or ("",) * len(self.query)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code. Raises UserError for wrong input, before the model is loaded."""
    import tyro

    options = (tyro.conf.UseAppendAction,)
    args = tyro.cli(Arguments, args=argv, prog="laser-dist explain", description=HELP, config=options)
    _check(args)

    from laser_dist.retrieval.collection import iter_passages
    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.explaining.passages import Passages
    from laser_dist.retrieval.folders import model_folder

    # Once: a run's newest checkpoint may be another one a moment later.
    model = model_folder(args.model)
    passages = None
    if args.vectors is not None:
        passages = Passages.open(args.vectors, args.corpus, model, args.steps)
    elif args.corpus is not None:
        for _ in iter_passages(args.corpus):  # a defect shows before the model is loaded
            pass
    encoder = LaserEncoder.from_pretrained(model, steps=args.steps, device=args.device, dtype=args.dtype)
    if "passages" in args.parts and passages is None and args.corpus is not None:
        passages = Passages.encode(encoder, args.corpus)
    _explain(args, encoder, passages)
    return 0


def _explain(args: Arguments, encoder: "LaserEncoder", passages: "Passages | None") -> None:
    from laser_dist.retrieval.explaining.report import explanation, print_explanation, write_report
    from laser_dist.retrieval.explaining.thoughts import think

    thoughts = [
        think(encoder, query, rationale, instruction=args.instruction)
        for query, rationale in zip(args.query, args.rationales, strict=True)
    ]
    found = passages if "passages" in args.parts else None
    explained = [
        explanation(thought, found, parts=args.parts, top=args.top, nearest=args.nearest) for thought in thoughts
    ]
    for one in explained:
        print_explanation(one)
    if args.out is None:
        return
    about = {"model": args.model, "encoder": encoder.description()}
    args.out.mkdir(parents=True, exist_ok=True)
    _discard(args.out)
    write_report(args.out, about, explained)
    figures = {}
    if args.png:
        from laser_dist.retrieval.explaining.figures import draw

        figures = {f"query-{number}": draw(one) for number, one in enumerate(explained, start=1)}
        for name, figure in figures.items():
            figure.savefig(args.out / f"{name}.png")
    if args.tensorboard:
        from laser_dist.retrieval.explaining.projector import write_tensorboard

        write_tensorboard(args.out / "tensorboard", thoughts, explained, figures, found, args.projector_passages)
    print(f"written to {args.out}")


def _check(args: Arguments) -> None:
    if not args.query:
        raise UserError('--query: give at least one: --query "TEXT"')
    for i, text in enumerate(args.query, start=1):
        if not text.strip():
            raise UserError(f"--query {i}: is empty: give the query's text")
    if args.rationale and len(args.rationale) != len(args.query):
        raise UserError(
            f"--rationale: {len(args.rationale)} for {len(args.query)} queries: give one per query, in the same order "
            '("" for a query without)'
        )
    if "segments" in args.show and not any(args.rationales):
        raise UserError("--show segments: compares with a written rationale: give --rationale, or leave it out")
    if "passages" in args.show and args.corpus is None and args.vectors is None:
        raise UserError("--show passages: give the passages: --corpus FILE or --vectors FOLDER")
    for name in ("top", "nearest"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1")
    if args.projector_passages < 0:
        raise UserError(f"--projector-passages {args.projector_passages}: must be 0 or more")
    if args.corpus is not None and not args.corpus.is_file():
        raise UserError(f"--corpus {args.corpus}: this file does not exist")
    _check_out(args)


def _check_out(args: Arguments) -> None:
    if args.out is None:
        if args.tensorboard:
            raise UserError("--tensorboard: name the folder to write: --out FOLDER")
        return
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file: choose another folder")
    if not args.overwrite and any((args.out / name).exists() for name in FILES):
        raise UserError(f"--out {args.out}: already holds an explanation: choose another folder, or give --overwrite")
    if args.png:
        require("--out draws PNGs, which", "matplotlib", extra="plots", instead="give --no-png")


def _discard(out: Path) -> None:
    """Delete an earlier explanation; other files in the folder stay."""
    import shutil

    for path in [*(out / name for name in FILES), *out.glob("query-*.png")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
