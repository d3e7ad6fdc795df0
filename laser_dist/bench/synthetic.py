"""Examples as long as the paper's training data, made of the embedded sample's sentences."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from laser_dist.data import sample_folder
from laser_dist.data.schema import Example, Passage

SPREAD = 0.4  # standard deviation of the logarithm of a length; the paper gives means only
_PER_SEGMENT = 4  # sentences


@dataclass(frozen=True)
class MeanTokens:
    """Mean tokens of a text, template and truncation left aside."""

    query: float = 222.1  # the paper's table of its training data
    rationale: float = 984.8  # likewise
    passage: float = 400.0  # an assumption: the paper does not say


def paper_examples(
    count: int, negatives: int, tokenizer: PreTrainedTokenizerBase, mean: MeanTokens = MeanTokens(), seed: int = 0
) -> Iterator[Example]:
    """`count` examples with one positive and `negatives` negatives; the same for the same arguments."""
    lines = (sample_folder() / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = sorted({s.strip() + "." for line in lines for s in json.loads(line)["text"].split(".") if s.strip()})
    lengths = [len(ids) for ids in tokenizer([f" {s}" for s in sentences], add_special_tokens=False)["input_ids"]]
    rng = random.Random(seed)

    def write(tokens: float) -> list[str]:
        wanted = rng.lognormvariate(math.log(tokens) - SPREAD**2 / 2, SPREAD)
        return _sentences(wanted, sentences, lengths, rng)

    for number in range(count):
        rationale = write(mean.rationale)
        parts = [" ".join(rationale[i : i + _PER_SEGMENT]) for i in range(0, len(rationale), _PER_SEGMENT)]
        passages = [Passage(f"p{number}-{i}", " ".join(write(mean.passage))) for i in range(1 + negatives)]
        yield Example(
            f"q{number}", " ".join(write(mean.query)), "\n\n".join(parts), (passages[0],), tuple(passages[1:])
        )


def _sentences(wanted: float, sentences: Sequence[str], lengths: Sequence[int], rng: random.Random) -> list[str]:
    chosen: list[str] = []
    while True:
        number = rng.randrange(len(sentences))
        # Half of the last sentence too much or too little on average: the mean stays.
        if chosen and wanted < lengths[number] / 2:
            return chosen
        chosen.append(sentences[number])
        wanted -= lengths[number]
