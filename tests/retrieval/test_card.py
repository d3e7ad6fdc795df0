"""The card survives a round trip, and a broken one is named, not guessed at."""

import json

import pytest

from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.errors import UserError
from laser_dist.retrieval.card import FILE, RetrieverCard

CARD = RetrieverCard(
    thinking=ThinkingConfig(steps=6, convention="paper"),
    text=TextConfig(instruction="Finde Antworten – präzise", query_template="{query} ({instruction})"),
    backbone="some/backbone",
    layers=4,
)


def test_round_trip(tmp_path):
    CARD.save(tmp_path)
    assert RetrieverCard.load(tmp_path) == CARD


def test_a_folder_without_card_has_the_published_settings(tmp_path):
    card = RetrieverCard.load(tmp_path)
    assert (card.thinking.steps, card.thinking.convention) == (3, "official")
    assert card.text.query_template == "Instruct: {instruction}\nQuery: {query}"
    assert (card.text.max_query_tokens, card.text.max_passage_tokens) == (512, 512)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format_version=99),
        lambda data: data.pop("format_version"),
        lambda data: data.pop("thinking"),
        lambda data: data.update(thinking={"steps": 0}),
        lambda data: data.update(thinking={"stepz": 3}),
        lambda data: data.update(text={"query_template": "no query in it"}),
        lambda data: data.update(thinking=3),
        lambda data: data.update(surprise=True),
    ],
)
def test_a_broken_card_is_refused_by_name(tmp_path, change):
    CARD.save(tmp_path)
    data = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    change(data)
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        RetrieverCard.load(tmp_path)
    assert str(tmp_path / FILE) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_what_is_no_card_at_all_is_refused_by_name(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=FILE):
        RetrieverCard.load(tmp_path)
