"""The file that a self-contained export brings along: it needs nothing of ours, and gives our vectors."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from laser_dist import LaserEncoder
from laser_dist.config import TextConfig, ThinkingConfig
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.export import export
from laser_dist.retrieval.exporting import modeling_laser
from laser_dist.retrieval.exporting.modeling_laser import LaserModel
from laser_dist.testing import tiny_model_folder

TEXTS = ["why does ice float on water?", "ice", "Air scatters short waves more than long ones; " * 5, "  so  "]
CARDS = {
    "chat": RetrieverCard(),
    "behind": RetrieverCard(
        thinking=ThinkingConfig(steps=2, convention="paper"),
        text=TextConfig(
            query_template="{{Q}} {query} ({instruction})\n",
            passage_template="[{title}] {text}!",
            max_query_tokens=40,
            max_passage_tokens=24,
        ),
    ),
    "minimal": RetrieverCard(
        thinking=ThinkingConfig(steps=1),
        text=TextConfig(query_template="{query}", passage_template="{text}", chat_template="never"),
    ),
}

ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("laser_dist", "laser_kernels"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Blocked())
import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM
work, names, texts = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
for name in names:
    folder, saved = f"{work}/{name}/export", f"{work}/{name}/saved"
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save(saved)
    again = SentenceTransformer(saved, trust_remote_code=True, device="cpu")
    np.savez(
        f"{work}/{name}/vectors.npz",
        st=np.concatenate([model.encode_query(texts), model.encode_document(texts)]),
        auto=np.concatenate([auto.encode_queries(texts), auto.encode_passages(texts)]),
        saved=np.concatenate([again.encode_query(texts), again.encode_document(texts)]),
    )
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__module__.startswith("transformers.models.")
    assert type(AutoModel.from_pretrained(folder)).__module__.startswith("transformers.models.")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """ROOT/NAME/export of every card."""
    root = tmp_path_factory.mktemp("exports")
    for name, card in CARDS.items():
        kind = {"architecture": "qwen3", "chat_template": True} if name == "chat" else {"bos": True}
        card.save(tiny_model_folder(root / name / "source", **kind))
        export(root / name / "source", out=root / name / "export", self_contained=True)
    return root


@pytest.fixture(params=CARDS)
def exported(root, request):
    return root / request.param / "export"


@pytest.fixture
def encoder(exported):
    return LaserEncoder.from_pretrained(exported)


def test_it_works_where_laser_dist_is_not_installed(root):
    """In a process that cannot import it: as SentenceTransformer, saved and loaded again, and as AutoModel."""
    pytest.importorskip("sentence_transformers")
    command = [sys.executable, "-c", ALONE, root, " ".join(CARDS), *TEXTS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in CARDS:
        encoder = LaserEncoder.from_pretrained(root / name / "export")
        expected = np.concatenate([encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)])
        for way, found in np.load(root / name / "vectors.npz").items():
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{name}, {way}")
        assert (root / name / "saved" / "modeling_laser.py").is_file()


def test_it_imports_nothing_of_ours():
    tree = ast.parse(Path(modeling_laser.__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    allowed = {"json", "pathlib", "torch", "transformers", "sentence_transformers"}
    assert {module.partition(".")[0] for module in modules} == allowed


def test_instructions_titles_and_steps(exported, encoder):
    model = LaserModel.from_pretrained(exported, steps=4)
    encoder.retriever.steps = 4
    instructions = ["Find the cause", None, "{braces}", "x"]
    np.testing.assert_allclose(
        model.encode_queries(TEXTS, instructions=instructions, batch_size=3),
        encoder.encode_queries(TEXTS, instructions=instructions),
        atol=1e-5,
    )
    titles = ["Ice", "", "{title}", "x"]
    found, expected = model.encode_passages(TEXTS, titles=titles), encoder.encode_passages(TEXTS, titles=titles)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sentence_transformers_options_mean_what_they_mean_with_laser_dist(exported):
    """One contract, two modules: the shipped one and the installed one, told apart by nothing but where they lie."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from laser_dist.retrieval.sentence_transformers_module import load_sentence_transformer

    options = {"config_kwargs": {"steps": 2}, "model_kwargs": {"dtype": "float32"}, "device": "cpu"}
    shipped = sentence_transformers.SentenceTransformer(str(exported), trust_remote_code=True, **options)
    installed = load_sentence_transformer(exported, steps=2, device="cpu")
    assert shipped.prompts == installed.prompts and shipped.get_embedding_dimension() == 48
    for longest in (None, 24):
        if longest:
            shipped.max_seq_length = installed.max_seq_length = longest
        assert shipped.max_seq_length == installed.max_seq_length
        for arguments in (
            {"prompt_name": "query"},
            {"prompt_name": "document"},
            {},
            {"prompt": "Instruct: {braces}\nQuery: "},
        ):
            found, expected = shipped.encode(TEXTS, **arguments), installed.encode(TEXTS, **arguments)
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(arguments))
        found = shipped.encode_document(TEXTS, prompt=" passage: ")
        np.testing.assert_allclose(found, installed.encode_document(TEXTS, prompt=" passage: "), atol=1e-5)


def test_a_limit_that_leaves_no_room_is_refused(root):
    """Cutting to less than the chat template takes would cut the template, from the wrong end."""
    model = LaserModel.from_pretrained(root / "chat" / "export")
    model.card["text"]["max_query_tokens"] = len(model.head) + len(model.tail)
    with pytest.raises(ValueError, match="chat template alone"):
        model.encode_queries(TEXTS)


def test_bfloat16_weights_are_computed_in_float32_on_a_cpu(tmp_path):
    """As by LaserEncoder; bfloat16 arithmetic would be off by a hundredth."""
    folder = export(
        tiny_model_folder(tmp_path / "source", dtype=torch.bfloat16), out=tmp_path / "x", self_contained=True
    )
    model, encoder = (
        LaserModel.from_pretrained(folder.folder),
        LaserEncoder.from_pretrained(folder.folder, device="cpu"),
    )
    if torch.cuda.is_available():
        model.lm.float()
    np.testing.assert_allclose(model.encode_queries(TEXTS), encoder.encode_queries(TEXTS), atol=1e-5)


def test_texts_beyond_a_sliding_window_are_refused(tmp_path):
    source = tiny_model_folder(tmp_path / "source")
    model = LaserModel.from_pretrained(export(source, out=tmp_path / "out", self_contained=True).folder)
    model.config.sliding_window = 12
    with pytest.raises(ValueError, match="sliding window of 12"):
        model.encode_passages(TEXTS)
    model.encode_passages(TEXTS[1:2])


def test_the_export_says_what_it_brings(exported):
    modules = json.loads((exported / "modules.json").read_text())
    assert [module["type"] for module in modules] == ["modeling_laser.LaserModule"]
    assert (exported / "modeling_laser.py").read_bytes() == Path(modeling_laser.__file__).read_bytes()
    assert "laser-dist" not in (exported / "config_sentence_transformers.json").read_text()
    readme = (exported / "README.md").read_text()
    assert "Needs `laser-dist` installed" not in readme and "modeling_laser.py" in readme
