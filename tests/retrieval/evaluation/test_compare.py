"""Comparing result files: the tests against their definitions, and files that cannot be compared."""

import itertools
import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from laser_dist.cli import main
from laser_dist.retrieval.evaluation.significance import compare

VALUES = {"q1": 0.0, "q2": 0.5, "q3": 0.25, "q4": 1.0, "q5": 0.3, "q6": 0.1}
BETTER = {"q1": 0.4, "q2": 0.5, "q3": 0.5, "q4": 0.9, "q5": 0.8, "q6": 0.35}


def test_p_values_are_those_of_all_swaps_and_of_the_t_test():
    found = compare(VALUES, BETTER)
    difference = np.array([BETTER[q] - VALUES[q] for q in VALUES])
    swapped = [abs(np.mean(difference * signs)) for signs in itertools.product((1, -1), repeat=6)]
    assert found.p_randomisation == np.mean(np.array(swapped) >= abs(difference.mean()) - 1e-12)
    assert found.p_t_test == pytest.approx(ttest_rel(list(BETTER.values()), list(VALUES.values())).pvalue)
    assert found.difference == pytest.approx(difference.mean()) and found.system == pytest.approx(3.45 / 6)
    assert (found.wins, found.ties, found.losses) == (4, 1, 1)
    assert found.interval[0] < found.difference < found.interval[1]


def test_the_order_of_the_queries_does_not_matter():
    """Files list queries in their own order; pairing by position would compare different queries."""
    assert compare(VALUES, dict(reversed(BETTER.items()))) == compare(VALUES, BETTER)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(20):
        sample = dict(enumerate(rng.normal(0.1, 0.2, 80)))
        found = compare(dict.fromkeys(sample, 0.0), sample)
        covered += found.interval[0] <= 0.1 <= found.interval[1]
    assert covered >= 16  # 19 expected


def test_equal_systems_and_constant_differences():
    same = compare(VALUES, VALUES)
    assert (same.p_randomisation, same.p_t_test, same.interval, same.ties) == (1.0, 1.0, (0.0, 0.0), 6)
    shifted = compare(dict.fromkeys(VALUES, 0.25), dict.fromkeys(VALUES, 0.5))
    assert shifted.p_randomisation == pytest.approx(2 / 64) and shifted.interval == (0.25, 0.25)


def test_other_queries_are_refused():
    with pytest.raises(ValueError, match="same queries"):
        compare(VALUES, {"q1": 1.0, "q9": 0.0})


def results(values, **more):
    per_query = {query: {"ndcg@10": value, "mrr@10": value / 2} for query, value in values.items()}
    return {"ndcg@10": 0, "per_query": per_query, **more}


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        (tmp_path / name).write_text(json.dumps(content) if not isinstance(content, str) else content)
        return str(tmp_path / name)

    return write_file


def test_the_command_prints_writes_and_draws(write, tmp_path, capsys):
    a, b = write("a.json", results(VALUES)), write("b.json", results(BETTER))
    out, plot = tmp_path / "c.json", tmp_path / "c.png"
    assert main(["compare", a, b, "--out", str(out), "--plot", str(plot)]) == 0
    report = json.loads(out.read_text())
    expected = compare(VALUES, BETTER)
    assert report["baseline"] == "a" and report["queries"] == 6
    assert report["systems"]["b"]["ndcg@10"]["p_randomisation"] == expected.p_randomisation
    assert report["systems"]["b"]["mrr@10"]["difference"] == pytest.approx(expected.difference / 2)
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "b against a" in shown and f"{expected.difference:+.4f}" in shown and "6 queries" in shown


def test_bm25_and_files_of_one_name(write, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    a, b = (
        write("r.json", results(BETTER, bm25_per_query=results(VALUES)["per_query"])),
        write("x/r.json", results(VALUES)),
    )
    assert main(["compare", a, b, "--bm25", "--out", str(tmp_path / "c.json")]) == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["baseline"] == "BM25" and set(report["systems"]) == {a.removesuffix(".json"), b.removesuffix(".json")}
    assert "not adjusted for 2 comparisons" in capsys.readouterr().out
    assert main(["compare", b, "--bm25"]) == 2
    assert "no values of BM25 per query" in capsys.readouterr().err


def test_what_cannot_be_compared_is_named(write, capsys):
    a = write("a.json", results(VALUES, data={"qrels": {"sha256": "1"}}))
    fewer = write("b.json", results({query: value for query, value in VALUES.items() if query != "q3"}))
    other = write("c.json", results(VALUES, data={"qrels": {"sha256": "2"}}))
    for arguments, told in (
        ([a], "at least two result files"),
        ([a, fewer], "1 queries are in one of them only ('q3')"),
        ([a, other], "are results on different qrels files"),
        ([a, a], "given twice"),
        ([a, write("d.json", {"loss": 1})], "not a result file of `laser-dist evaluate`"),
        ([a, write("e.json", "{broken")], "not a result file of `laser-dist evaluate`"),
        ([a, "nowhere.json"], "nowhere.json: cannot be read"),
        ([a, write("f.json", results(BETTER)), "--metric", "map"], "--metric map: the files have ndcg@10, mrr@10"),
    ):
        assert main(["compare", *arguments]) == 2, told
        assert told in capsys.readouterr().err
