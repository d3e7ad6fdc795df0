"""From a model's answer to a rationale, or to the reason why it is none. Stated rules, no judgement of the content.

- Reasoning in <think> tags is dropped, also where the opening tag was part of the prompt; a rationale is what follows.
- Truncated: the server says that the answer hit the token limit, or a <think> was never closed.
- Refused: the server says so (a refusal field, finish_reason "content_filter"), or the answer *opens* with the words of
  a refusal and is short. A long answer that begins with an apology is kept.
- Echo: the answer repeats the query and adds next to nothing. It would teach that thinking changes nothing.
"""

import re

from laser_dist.data.annotation.chat import Answer
from laser_dist.data.schema import Passage

REASONS = ("refused", "truncated", "empty", "echo")

_REFUSAL = re.compile(
    r"(i['’]?m|i am) (sorry|unable|not able)\b|sorry[,.]|as an ai\b|i apologi[sz]e\b|i must decline\b|"
    r"(unfortunately, )?i (can(['’]t|not| not)|won['’]t|will not)"
    r"( (help|assist|answer|provide|comply|do|discuss)\b|[.,])",
    re.IGNORECASE,
)
_LONGEST_REFUSAL = 400  # characters
_OWN_SHARE = 0.25  # of the query's letters: what an answer that repeats the query must add at least
_QUOTED_WORDS = 8


class NoRationale(Exception):
    """The answer is none; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def rationale_of(answer: Answer, query: str) -> str:
    """The rationale in an answer, stripped; raises NoRationale by the rules above."""
    if answer.refused:
        raise NoRationale("refused")
    if answer.finish_reason == "length":
        raise NoRationale("truncated")
    text = answer.text.rpartition("</think>")[2].strip()
    if text.startswith("<think>"):
        raise NoRationale("truncated")
    text = text.replace("\r\n", "\n")
    if not text:
        raise NoRationale("empty")
    if len(text) <= _LONGEST_REFUSAL and _REFUSAL.match(text):
        raise NoRationale("refused")
    # Letters and not words: not every script puts spaces between words.
    said, asked = "".join(_words(text)), "".join(_words(query))
    if said in asked or (asked in said and len(said) - len(asked) < _OWN_SHARE * len(asked)):
        raise NoRationale("echo")
    return text


def quotes(rationale: str, passages: tuple[Passage, ...]) -> bool:
    """Whether a whole passage of at least eight words stands in the rationale: the model knows it by heart."""
    said = f" {' '.join(_words(rationale))} "
    texts = [_words(passage.text) for passage in passages]
    return any(len(words) >= _QUOTED_WORDS and f" {' '.join(words)} " in said for words in texts)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
