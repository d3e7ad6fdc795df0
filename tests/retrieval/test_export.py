"""An export is a plain folder with the checkpoint's vectors in three libraries, or it does not exist."""

import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from laser_dist import LaserEncoder, cli
from laser_dist.batch import TokenSequence, pack
from laser_dist.config import ModelConfig, TextConfig, ThinkingConfig
from laser_dist.errors import UserError
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.retrieval import export as command
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.export import TOLERANCE, export
from laser_dist.retrieval.exporting import formats, target, weights
from laser_dist.testing.tiny import tiny_model_folder

TEXTS = ["why does ice float on water?", "ice", "Air scatters short waves more than long ones; " * 5, "  so  "]
MINIMAL = TextConfig(query_template="{query}", passage_template="{text}", max_query_tokens=8, max_passage_tokens=9)
CARDS = {
    "qwen3-tied-chat": RetrieverCard(backbone="Some/Backbone"),
    "qwen3-untied-paper": RetrieverCard(thinking=ThinkingConfig(steps=2, convention="paper")),
    "llama-tied-k1": RetrieverCard(thinking=ThinkingConfig(steps=1)),
    "llama-untied-bos-chat": RetrieverCard(
        text=TextConfig(query_template="{{Q}} {query} ({instruction})\n", max_query_tokens=64, max_passage_tokens=48)
    ),
    "llama-tied-minimal": RetrieverCard(thinking=ThinkingConfig(steps=5), text=MINIMAL),
}


def make_model(folder, name):
    tiny_model_folder(
        folder,
        architecture=name.split("-")[0],
        tied="-tied" in name,
        chat_template="chat" in name,
        bos="bos" in name,
    )
    CARDS[name].save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (source, export) of every kind."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for name in CARDS:
        source = make_model(root / "source" / name, name)
        made[name] = (source, export(source, out=root / name).folder)
    return made


@pytest.fixture
def source(tmp_path):
    return make_model(tmp_path / "source", "qwen3-tied-chat")


def encoder_of(folder, **options):
    return LaserEncoder.from_pretrained(folder, device="cpu", **options)


def vectors_of(encoder):
    return np.concatenate([encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)])


@torch.no_grad()
def vectors_in_training(lm, encoder):
    """Vectors of a model as it is being trained, adapters and all."""
    retriever = LaserRetriever(lm.eval(), steps=encoder.card.thinking.steps)
    rows = [TokenSequence(encoder.text.query(text)) for text in TEXTS]
    return retriever(pack(rows)).passage_PD.numpy()


def adapters(folder, backbone, layers=None):
    """A LoRA model folder as training saves it, and the model itself."""
    config = ModelConfig(name=str(backbone), dtype="float32", layers=layers, lora_rank=4)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        lm = prepare_for_training(load_backbone(config), config)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    lm.save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)
    RetrieverCard(backbone=str(backbone), layers=layers).save(folder)
    return lm


@pytest.mark.parametrize("name", CARDS)
def test_the_export_has_the_source_s_vectors(exported, name):
    source, folder = exported[name]
    np.testing.assert_allclose(vectors_of(encoder_of(folder)), vectors_of(encoder_of(source)), atol=1e-5)
    assert RetrieverCard.load(folder) == CARDS[name]
    assert (folder / "chat_template.jinja").is_file() == ("chat" in name)


def test_others_can_read_all_of_it(exported):
    """safetensors makes files of mode 600: on shared storage an export was its owner's alone."""
    _, folder = exported["llama-tied-k1"]
    (new := folder.parent / "new").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {new.stat().st_mode}


@pytest.mark.parametrize("name", CARDS)
def test_config_and_tokenizer_are_plain(exported, name):
    _, folder = exported[name]
    config = json.loads((folder / "config.json").read_text())
    expected = "Qwen3ForCausalLM" if "qwen3" in name else "LlamaForCausalLM"
    assert (config["architectures"], config["num_hidden_layers"], config["dtype"]) == ([expected], 2, "float32")
    assert not [path.name for path in folder.iterdir() if b"laser_packed" in path.read_bytes()]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["padding_side"] == "left" and tokenizer["pad_token"]


def test_a_tokenizer_without_padding_token_gets_one(source, tmp_path):
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": None}))
    folder = export(source, out=tmp_path / "out").folder
    assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["ice", "why does ice float on water?"], padding=True, return_tensors="pt")
    assert lm.config._attn_implementation == "sdpa" and tokenizer.padding_side == "left"
    with torch.no_grad():
        output = lm(**batch, output_hidden_states=True)
    torch.save((batch["input_ids"], batch["attention_mask"], output.hidden_states[-1], output.logits), out)
assert not [name for name in sys.modules if name.startswith("laser_dist")]
"""


def test_transformers_alone_loads_it(exported, tmp_path):
    names = ("qwen3-tied-chat", "llama-untied-bos-chat")
    files = [path for name in names for path in (exported[name][1], tmp_path / name)]
    done = subprocess.run([sys.executable, "-c", PLAIN, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr and "MISSING" not in done.stderr
    for name in names:
        ids, mask, states, logits = torch.load(tmp_path / name)
        retriever = encoder_of(exported[name][0], steps=1).retriever
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        with torch.no_grad():
            packed, _, _ = retriever.think(pack([TokenSequence(row) for row in rows]))
            greedy = retriever.base.get_output_embeddings()(packed).argmax(-1)
        torch.testing.assert_close(states[mask.bool()], packed, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits[mask.bool()].argmax(-1), greedy)


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("backbone", ["qwen3-tied-chat", "llama-untied-bos-chat"])
def test_adapters_are_merged(tmp_path, backbone, layers):
    backbone = make_model(tmp_path / "backbone", backbone)
    lm = adapters(tmp_path / "run" / "model", backbone, layers)
    folder = export(tmp_path / "run", out=tmp_path / "out").folder
    shutil.rmtree(backbone)  # the export stands alone
    encoder = encoder_of(folder)
    trained = vectors_in_training(lm, encoder)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), trained, atol=1e-5)
    with lm.disable_adapter():
        assert np.abs(vectors_in_training(lm, encoder) - trained).max() > 1e-2
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == (layers or 2)
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name or "base_layer" in name]
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_truncated_backbone_stays_truncated(tmp_path, architecture):
    backbone = tiny_model_folder(tmp_path / "backbone", architecture=architecture, layers=3)
    config = ModelConfig(name=str(backbone), dtype="float32", layers=2)
    lm = load_backbone(config)
    lm.save_pretrained(tmp_path / "model")
    load_tokenizer(config).save_pretrained(tmp_path / "model")
    RetrieverCard(backbone=str(backbone), layers=2).save(tmp_path / "model")
    folder = export(tmp_path / "model", out=tmp_path / "out").folder
    written = json.loads((folder / "config.json").read_text())
    assert written["num_hidden_layers"] == 2 and len(written.get("layer_types") or [0, 0]) == 2
    expected = encoder_of(backbone, layers=2)
    np.testing.assert_allclose(vectors_of(encoder_of(folder)), vectors_of(expected), atol=1e-5)
    assert "the first 2 layers" in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "keep"])
def test_dtype(tmp_path, dtype):
    source = tiny_model_folder(tmp_path / "source", dtype=torch.bfloat16)
    done = export(source, out=tmp_path / "out", dtype=dtype)
    expected = "bfloat16" if dtype == "keep" else dtype
    assert {str(tensor.dtype) for tensor in load_file(done.folder / "model.safetensors").values()} == {
        f"torch.{expected}"
    }
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == done.dtype == expected
    # All of them hold the values that bfloat16 has between 2^-14 and 2^15.
    assert done.rounding < TOLERANCE
    np.testing.assert_allclose(vectors_of(encoder_of(done.folder)), vectors_of(encoder_of(source)), atol=1e-4)


def test_rounding_is_told(source, tmp_path):
    assert 0 < export(source, out=tmp_path / "half", dtype="float16").rounding < 0.02
    assert export(source, out=tmp_path / "same").rounding == 0


def test_merged_adapters_keep_the_backbone_s_precision(tmp_path):
    backbone = tiny_model_folder(tmp_path / "backbone", dtype=torch.bfloat16)
    adapters(tmp_path / "model", backbone)
    assert export(tmp_path / "model", out=tmp_path / "out").dtype == "bfloat16"


def test_a_precision_that_overflows_is_refused(source, tmp_path):
    with torch.no_grad():
        lm = load_backbone(ModelConfig(name=str(source), dtype="float32"))
        lm.get_decoder().norm.weight.fill_(1e6)
        lm.save_pretrained(source)
    with pytest.raises(UserError, match="float16"):
        export(source, out=tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_float64_cannot_be_kept(tmp_path):
    source = tiny_model_folder(tmp_path / "source", dtype=torch.float64)
    with pytest.raises(UserError, match="--dtype"):
        export(source, out=tmp_path / "out")


def test_the_target_must_be_free(source, tmp_path, exported):
    out = tmp_path / "out"
    out.mkdir()
    export(source, out=out)  # an empty folder is free
    with pytest.raises(UserError, match="--overwrite"):
        export(source, out=out)
    RetrieverCard(thinking=ThinkingConfig(steps=7)).save(source)
    export(source, out=out, overwrite=True)
    assert encoder_of(out).card.thinking.steps == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(source, out=file)


def test_overwrite_never_deletes_what_is_not_an_export(source, tmp_path):
    out = export(source, out=tmp_path / "out").folder
    (out / ".git").mkdir()
    for folder in (source, tmp_path, out):
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match="does not delete"):
            export(source, out=folder, overwrite=True)
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "module, place", [(formats, "write_sentence_transformers"), (command, "write_model_card"), (target, "rename_over")]
)
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_export_leaves_nothing(source, tmp_path, monkeypatch, module, place, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(module, place, fail)
    expected = KeyboardInterrupt if failure is KeyboardInterrupt else UserError
    with pytest.raises(expected):
        export(source, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_a_killed_export_left_is_no_hindrance(source, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").write_text("")
    assert not (export(source, out=tmp_path / "out").folder / "rest").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_export_with_other_vectors_is_refused(source, tmp_path, monkeypatch):
    def save_another_model(lm, *arguments, **options):
        with torch.no_grad():
            lm.get_decoder().norm.weight[0] += 0.1
        real(lm, *arguments, **options)
        with torch.no_grad():
            lm.get_decoder().norm.weight[0] -= 0.1

    real = weights.save_folder
    monkeypatch.setattr(weights, "save_folder", save_another_model)
    with pytest.raises(UserError, match="other vectors"):
        export(source, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_sources_that_are_no_checkpoint_are_refused_by_name(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="missing/model.*does not exist"):
        export(tmp_path / "missing" / "model", out=out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path / 'empty'} holds no model"):
        export(tmp_path / "empty", out=out)
    (source / "laser_dist.json").write_text("{}")
    with pytest.raises(UserError, match=str(source / "laser_dist.json")):
        export(source, out=out)
    (source / "laser_dist.json").unlink()
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match=str(source)):
        export(source, out=out)
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=str(source)):
        export(source, out=out)
    assert not out.exists()


def test_adapters_need_their_backbone(source, tmp_path):
    adapters(tmp_path / "model", source)
    shutil.rmtree(source)
    with pytest.raises(UserError) as error:
        export(tmp_path / "model", out=tmp_path / "out")
    assert str(tmp_path / "model") in str(error.value) and str(source) in str(error.value)


def test_adapters_that_do_not_fit_are_refused(source, tmp_path):
    adapters(tmp_path / "model", source)
    path = tmp_path / "model" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    with pytest.raises(UserError, match=f"{tmp_path / 'model'}.*r = 8, but the weights have"):
        export(tmp_path / "model", out=tmp_path / "out")


@pytest.mark.parametrize("trained, other", [(2, 1), (1, 2)])
def test_adapters_of_another_backbone_are_refused(tmp_path, trained, other):
    backbones = {layers: tiny_model_folder(tmp_path / f"of{layers}", layers=layers) for layers in (1, 2)}
    adapters(tmp_path / "model", backbones[trained])
    RetrieverCard(backbone=str(backbones[other])).save(tmp_path / "model")
    with pytest.raises(UserError, match=f"{tmp_path / 'model'}.*do not fit"):
        export(tmp_path / "model", out=tmp_path / "out")
    (tmp_path / "model" / "laser_dist.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'model'}.*names their backbone"):
        export(tmp_path / "model", out=tmp_path / "out")


@pytest.mark.parametrize("prefix, kept", [("encoder.", lambda key: True), ("", lambda key: "layers.1" not in key)])
def test_weights_that_are_missing_are_not_made_up(source, tmp_path, prefix, kept):
    weights = load_file(source / "model.safetensors")
    renamed = {prefix + key: value for key, value in weights.items() if kept(key)}
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{source}.*weights lack"):
        export(source, out=tmp_path / "out")


@pytest.mark.parametrize("layers", [None, 1])
def test_adapters_alone(tmp_path, layers):
    """As the card's own code loads them, with PEFT, with LaserEncoder and in sentence-transformers."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    backbone = make_model(tmp_path / "backbone", "qwen3-tied-chat")
    lm = adapters(tmp_path / "run" / "model", backbone, layers)
    folder = export(tmp_path / "run", out=tmp_path / "out", adapter=True).folder
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert list(sizes) == ["adapter_model.safetensors"] and not (folder / "config.json").exists()
    encoder = encoder_of(folder)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), vectors_in_training(lm, encoder), atol=1e-5)
    model = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(model.encode_query(TEXTS), encoder.encode_queries(TEXTS), atol=1e-5)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    block = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "PeftModel" in code)
    names = {}
    exec(block.replace('"DIR"', repr(str(folder))).replace('"BACKBONE"', repr(str(backbone))), names)
    expected = encoder.encode_queries(["why is the sky blue?"])
    np.testing.assert_allclose(names["queries"], expected, atol=1e-5)
    again = export(folder, out=tmp_path / "merged").folder  # and whole weights can still be made of them
    np.testing.assert_allclose(vectors_of(encoder_of(again)), vectors_of(encoder), atol=1e-5)
    export(backbone, out=folder, overwrite=True)  # an export of adapters is one that may go
    assert not (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--adapter"], "--adapter: .*holds full weights"),
        (["--max-shard-size", "5"], "--max-shard-size 5: write a number"),
        (["--max-shard-size", "0GB"], "--max-shard-size 0GB"),
    ],
)
def test_flags_that_ask_for_what_there_is_not(source, tmp_path, capsys, flags, message):
    assert cli.main(["export", str(source), "--out", str(tmp_path / "out"), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_adapters_are_exported_as_they_are_or_not_at_all(source, tmp_path):
    adapters(tmp_path / "model", source)
    for options, message in (({"dtype": "bfloat16"}, "--dtype bfloat16"), ({"self_contained": True}, "--self-cont")):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "model", out=tmp_path / "out", adapter=True, **options)


def test_large_models_come_in_shards(source, tmp_path):
    folder = export(source, out=tmp_path / "out", max_shard_size="100KB").folder
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    np.testing.assert_allclose(vectors_of(encoder_of(folder)), vectors_of(encoder_of(source)), atol=1e-5)
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]  # safetensors only


def checkpoint_of(source, folder):
    """The model folder in a checkpoint, with a manifest as training writes it."""
    model = shutil.copytree(source, folder / "model")
    files = {
        f"model/{path.name}": {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in model.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": {**files, "deepspeed/x": {"bytes": 1, "sha256": ""}}}))
    return model


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_checkpoint_that_was_altered_is_refused(source, tmp_path, name):
    """A flipped bit and another model's tokenizer both load without complaint, and give other vectors."""
    model = checkpoint_of(source, tmp_path / "step")
    export(tmp_path / "step", out=tmp_path / "whole")
    content = bytearray((model / name).read_bytes())
    content[-2] ^= 1
    (model / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: is not what training saved"):
        export(tmp_path / "step", out=tmp_path / "out")
    (model / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is not what|no model: expected {name}"):
        export(tmp_path / "step", out=tmp_path / "out")


def test_a_checkpoint_whose_manifest_is_damaged_is_refused(source, tmp_path):
    checkpoint_of(source, tmp_path / "step")
    for content in ("{", "[]", '{"files": {"model/config.json": 1}}'):
        (tmp_path / "step" / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json is damaged"):
            export(tmp_path / "step", out=tmp_path / "out")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(source, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(name=str(source)))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source)
    CARDS["qwen3-tied-chat"].save(source)
    with pytest.raises(UserError, match=f"{source}.*tokenizer"):
        export(source, out=tmp_path / "out")


def test_a_disk_that_is_too_small_is_found_before_writing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="0.00 GB are free"):
        export(source, out=tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path):
    """The kernel refuses to let a file grow, as on a full disk; safetensors reports that with an error of its own."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=f"cannot write {out}"):
            export(source, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_command(source, tmp_path, capsys):
    assert cli.main(["export", str(source), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "out") in said and "bfloat16" in said
    assert cli.main(["export", str(source), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --out")


@pytest.mark.parametrize("name", CARDS)
def test_the_model_card_s_code_gives_the_encoder_s_vectors(exported, name):
    source, folder = exported[name]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    results = {}
    for block in blocks:
        if "sentence_transformers" in block:
            pytest.importorskip("sentence_transformers")
        names = {}
        exec(block.replace('"DIR"', repr(str(folder))), names)
        library = re.search(r"^from (\w+)", block, re.MULTILINE)[1]
        results[library] = np.concatenate([names["queries"], names["passages"]])
    assert sorted(results) == ["laser_dist", "sentence_transformers", "transformers"]
    np.testing.assert_allclose(results["sentence_transformers"], results["laser_dist"], atol=1e-5)
    if "{{Q}}" not in CARDS[name].text.query_template:  # plain code shows what comes before a query, not behind it
        np.testing.assert_allclose(results["transformers"], results["laser_dist"], atol=1e-5)
    assert str(source.parent) not in readme


def test_the_model_card_names_the_base_model_only_if_it_is_public(exported):
    cards = {name: (folder / "README.md").read_text() for name, (_, folder) in exported.items()}
    assert "base_model: Some/Backbone\n" in cards["qwen3-tied-chat"]
    assert "base_model" not in cards["llama-tied-k1"]
    assert "| latent steps K | 2 |\n| convention | paper (2 soft tokens) |" in cards["qwen3-untied-paper"]


@pytest.mark.parametrize("name", CARDS)
def test_sentence_transformers_gives_the_encoder_s_vectors(exported, name):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    _, folder = exported[name]
    encoder = encoder_of(folder)
    queries, passages = encoder.encode_queries(TEXTS), encoder.encode_passages(TEXTS)
    model = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    for found, expected in (
        (model.encode(TEXTS, prompt_name="query"), queries),
        (model.encode_query(TEXTS), queries),
        (model.encode_query(TEXTS, batch_size=1), queries),
        (model.encode_query(TEXTS[0]), queries[0]),
        (model.encode_document(TEXTS), passages),
        (model.encode(TEXTS, prompt_name="document"), passages),
        (model.encode(TEXTS), passages),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.get_embedding_dimension() == encoder.dim


def test_sentence_transformers_options(exported, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from laser_dist.retrieval.sentence_transformers_module import load_sentence_transformer

    _, folder = exported["qwen3-tied-chat"]
    encoder = encoder_of(folder, steps=6)
    expected = vectors_of(encoder)
    options = {"trust_remote_code": True, "device": "cpu"}
    model = sentence_transformers.SentenceTransformer(str(folder), config_kwargs={"steps": 6}, **options)
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), **options)
    direct = load_sentence_transformer(folder, steps=6, device="cpu")
    for loaded in (model, again, direct):
        found = np.concatenate([loaded.encode_query(TEXTS), loaded.encode_document(TEXTS)])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    own = model.encode_query(TEXTS, prompt="Instruct: {braces}\nQuery: ")
    instructed = encoder.encode_queries(TEXTS, instructions=["{braces}"] * len(TEXTS))
    np.testing.assert_allclose(own, instructed, atol=1e-5)
    prefixed = encoder.encode_passages(["passage: " + text.strip() for text in TEXTS])
    np.testing.assert_allclose(
        model.encode_document([t.strip() for t in TEXTS], prompt="passage: "), prefixed, atol=1e-5
    )
    model.max_seq_length = 24
    cut = model.encode_document([TEXTS[2], TEXTS[2] + "more"])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-5)


def test_sentence_transformers_asks_for_trust_and_says_so(exported):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        sentence_transformers.SentenceTransformer(str(exported["llama-tied-k1"][1]))


def test_exporting_needs_no_sentence_transformers(source, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sentence_transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # importing it now fails
    folder = export(source, out=tmp_path / "out", self_contained=True).folder
    assert (folder / "modules.json").is_file() and (folder / "modeling_laser.py").is_file()
