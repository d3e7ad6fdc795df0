import pytest
import torch

from laser_dist.config import ModelConfig
from laser_dist.model.backbone import load_backbone, load_tokenizer
from laser_dist.study.rewriting import Rewriter
from laser_dist.testing import tiny_model_folder

QUERIES = ["why does ice float", "x", "a drop on a hot pan skates about and does not boil away at once"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model_folder(tmp_path_factory.mktemp("model"), chat_template=True))


def test_what_is_written_is_greedy_and_alike_alone_and_in_a_batch(folder, tmp_path):
    """Left padding must not be read: a query's rationale would depend on its neighbours."""
    written = Rewriter(folder, tmp_path, tokens=5, batch=3)(QUERIES)
    lm = load_backbone(ModelConfig(name=folder, dtype="float32"))
    lm.set_attn_implementation("sdpa")
    tokenizer = load_tokenizer(ModelConfig(name=folder))
    writer = Rewriter(folder, tmp_path / "other", tokens=5, batch=1)
    writer._tokenizer = tokenizer
    for query in QUERIES:
        ids = tokenizer(writer._prompt(query), return_tensors="pt", add_special_tokens=False)["input_ids"]
        prompt = ids.shape[1]
        with torch.no_grad():
            for _ in range(5):
                best = lm(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                ids = torch.cat([ids, best[None, None]], 1)
                if best == tokenizer.eos_token_id:
                    break
        expected = tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip()
        assert written.by_query[query] == (expected or query)
    assert written.seconds > 0


def test_what_was_written_is_kept_and_a_cut_line_is_written_again(folder, tmp_path, monkeypatch):
    first = Rewriter(folder, tmp_path, tokens=3, batch=2)
    whole = first(QUERIES)
    first.file.write_text(first.file.read_text()[:-10])  # killed while it wrote the last of the times
    asked = []
    generate = Rewriter._generate
    monkeypatch.setattr(Rewriter, "_generate", lambda self, some: asked.append(list(some)) or generate(self, some))
    again = Rewriter(folder, tmp_path, tokens=3, batch=2)(QUERIES)
    assert again.by_query == whole.by_query and asked == [[QUERIES[0]]]
    asked.clear()
    Rewriter(folder, tmp_path, tokens=3, batch=2)(QUERIES[:2])
    assert asked == []
    other = Rewriter(folder, tmp_path, tokens=4, batch=2)
    assert other.file != first.file
