"""Every rule fires on a row that shows its sign, and on no other."""

from dataclasses import replace

import pytest

from laser_dist.data.inspection.suspicion import rules
from laser_dist.data.schema import Example, Passage

QUERY = "Why does ice float on a lake in winter?"
SOUND = Example(
    "q1",
    QUERY,
    "The essential problem is density, which depends on the crystal.\n\nA page on hydrogen bonds would help.",
    (Passage("p1", "Ice holds its molecules further apart than water does, so it weighs less.", "Density"),),
    (Passage("n1", "Lakes are deepest where glaciers dug for the longest time."),),
)
POSITIVE = SOUND.positives[0]


def signs(example: Example) -> set[str]:
    return {rule.name for rule in rules(["<|im_end|>", "</s>"]) if rule.holds(example)}


def positive(text: str) -> Example:
    return replace(SOUND, positives=(replace(POSITIVE, text=text),))


def test_a_sound_row_shows_nothing() -> None:
    assert signs(SOUND) == set()


@pytest.mark.parametrize(
    ("sign", "example"),
    [
        ("no rationale", replace(SOUND, rationale="")),
        ("short rationale", replace(SOUND, rationale="Density, and hydrogen bonds.")),
        ("rationale is the query", replace(SOUND, rationale=f"  {QUERY.upper()}\n")),
        ("leak", replace(SOUND, rationale=f"{SOUND.rationale}\n\nSurely: {POSITIVE.text.lower()}")),
        ("query in a positive", positive(f"Somebody asked: {QUERY} Nobody knew, although it is a matter of density.")),
        ("almost empty", positive("?! a")),
        ("very long", positive("Ice is light, and water is not; so much for the lake. " * 1000)),
        ("repetition", replace(SOUND, rationale="So the answer must be density. " * 40)),
        ("other script", replace(SOUND, rationale="湖泊结冰的根本问题在于密度，而密度取决于晶体的结构。" * 2)),
        ("replacement character", positive("Ice holds its molecules apart\ufffd so it weighs less than water.")),
        ("mojibake", positive("Ice isnâ€™t dense: it weighs less than water, as cafÃ© owners know.")),
        ("HTML", positive("<p class='x'>Ice weighs less than water,</p> so it stays on top.")),
        ("HTML", positive("Ice weighs less than water&nbsp;&amp; stays on top of the lake.")),
        ("control token", positive("Ice weighs less than water.<|im_end|> So it stays on top.")),
        ("control token", replace(SOUND, negatives=(Passage("n", "All the lakes </s> are deep.", ""),))),
    ],
)
def test_each_sign_is_seen_alone(sign: str, example: Example) -> None:
    assert signs(example) == {sign}


@pytest.mark.parametrize(
    "text",
    [
        "If a < b and b > c, then a & b are not apart; R&D costs 5 > 3.",  # no tag, no entity
        "Ã is a letter, and so is Â in “Âge”; naïve café, 5 €.",  # correct UTF-8
        "数学における密度とは、体積あたりの質量である。",  # another script in a passage is no sign
    ],
)
def test_harmless_texts_show_nothing(text: str) -> None:
    assert signs(positive(f"{text} And this makes it a text of some length.")) == set()


def test_query_and_rationale_in_one_script_that_is_not_latin_show_nothing() -> None:
    example = replace(
        SOUND, query="为什么冰会浮在湖面上？", rationale="根本问题在于密度，而密度取决于晶体的结构，因此冰更轻。"
    )
    assert signs(example) == set()


def test_without_special_tokens_there_is_no_control_token() -> None:
    example = positive("Ice weighs less than water.<|im_end|> So it stays on top.")
    assert not any(rule.holds(example) for rule in rules())
