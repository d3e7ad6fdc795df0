"""Encoders are compared before they are timed, and the report says what was measured."""

import json

import numpy as np
import pytest

from laser_dist.bench import encode
from laser_dist.bench.encode import OURS, PACKED, PADDED, Settings, main, measure, mixed_texts
from laser_dist.errors import UserError
from laser_dist.testing import tiny_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"), architecture="qwen3", chat_template=True)


def test_result_and_table(model, tmp_path, capsys):
    out = tmp_path / "encode.json"
    flags = ["--model", str(model), "--texts", "12", "--words", "1", "20", "--rounds", "2", "--device", "cpu"]
    assert main([*flags, "--batch-size", "5", "--batch-tokens", "100", "--layers", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["encoders"]) == [OURS, PADDED, PACKED] and result["encoders"][OURS]["ratio"] == 1
    for row in result["encoders"].values():
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["cpu_s"] > 0
        assert row["texts_per_s"] == pytest.approx(12 / row["p50_s"])
    assert (result["model"]["layers"], result["settings"]["words"]) == (1, [1, 20]) and result["tokens"] > 12
    assert PADDED in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda v: v + 1e-4, lambda v: v[::-1], lambda v: v * np.nan])
def test_other_vectors_are_not_reported(model, wrong, monkeypatch):
    """A batch given back in sorted order is as fast, and wrong."""
    from laser_dist import LaserEncoder

    encoder = LaserEncoder.from_pretrained(model, device="cpu")
    monkeypatch.setattr(encode, "_timed", lambda *_: pytest.fail("was timed"))
    others = {OURS: (encoder.retriever, encoder.encode_passages)}
    others[PADDED] = (encoder.retriever, lambda texts: wrong(encoder.encode_passages(texts)))
    with pytest.raises(UserError, match="padded: its vectors are up to .* nothing is reported"):
        measure(Settings(texts=9, words=(1, 20)), encoder, others)


def test_texts_are_mixed_and_always_the_same():
    texts = mixed_texts(300, (4, 256))
    assert texts == mixed_texts(300, (4, 256))
    lengths = np.array([len(text.split()) for text in texts])
    assert lengths.min() >= 4 and lengths.max() <= 256
    assert 0.4 < (lengths < 32).mean() < 0.6  # half of them below the geometric mean


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--texts", "0"], "--texts 0"),
        (["--words", "9", "3"], "--words 9 3"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--dtype", "bfloat16", "--device", "cpu"], "--dtype bfloat16: needs a GPU"),
        (["--batch-tokens", "0"], "--batch-tokens 0"),
    ],
)
def test_wrong_settings_are_refused(model, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        main(["--model", str(model), *flags])
