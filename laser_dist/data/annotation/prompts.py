"""The prompt that asks a model to reason about a query before anything is retrieved, and its placeholders."""

from pathlib import Path
from string import Formatter

from laser_dist.data.schema import Example
from laser_dist.errors import UserError, suggest
from laser_dist.reading import read_file

# LaSER's three parts in our own words. The paragraphs matter: a blank line ends a segment, and segments are what the
# latent steps are aligned with.
RATIONALE = """\
A search engine will look for passages that help with the query below. Before it searches, reason about the query:

1. Say what the essential problem is, behind the wording.
2. Think step by step about which facts, principles or examples would be relevant and helpful, and describe them in \
detail.
3. Draft an answer with every thought you have on it, even where you are not certain.

Write plain paragraphs separated by blank lines, one thought each. No headings, no lists, no remarks about this task.

Query: {query}
"""
PLACEHOLDERS = ("query", "instruction")


def load_prompt(path: Path | None) -> str:
    """The template in a file, or `RATIONALE`; UserError unless every placeholder in it is known and {query} is one."""
    if path is None:
        return RATIONALE
    try:
        template = read_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt {path}: cannot be read as UTF-8 text ({error})") from None
    check_prompt(template, f"--prompt {path}")
    return template


def check_prompt(template: str, where: str) -> None:
    """UserError where `template` is no template, names something unknown, or does not hold the query."""
    known = " and ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{where}: {error}: write {{{{ and }}}} for braces that are part of the text") from None
    for _, name, spec, conversion in fields:
        # Exact names only: "{query.__class__}" and "{query[0]}" would be read out of the Python object.
        if name not in PLACEHOLDERS or spec or conversion:
            raise UserError(
                f"{where}: unknown placeholder {{{name}}}: known are {known}; write {{{{ and }}}} for braces that are "
                f"part of the text.{suggest(name or '', PLACEHOLDERS)}"
            )
    if "query" not in [name for _, name, _, _ in fields]:
        raise UserError(f"{where}: {{query}} is missing: the model would never see the query")


def render_prompt(template: str, example: Example) -> str:
    """The text to send for one example. Passages never take part: a rationale that has read the answer leaks it."""
    return template.format(query=example.query, instruction=example.instruction or "").strip()
