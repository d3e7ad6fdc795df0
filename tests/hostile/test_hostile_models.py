"""Hostile model folders, adapters, vectors, indexes and checkpoints: as tests/hostile/test_hostile_data.py has it."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from laser_dist.testing.hostile import Cases, command, run_cases

MODELS, VECTORS, CHECKPOINTS = Cases(), Cases(), Cases()
GIB = 2**30
_CODE = "import os\nos.system('touch {canary}')\nclass Evil: pass\n"


def model(folder: Path, **options) -> Path:
    """A small model folder that works; made once for all cases."""
    from laser_dist.testing.tiny import tiny_model_folder

    made = folder.parent / f"intact{'-chat' if options.get('chat_template') else ''}"
    if not made.is_dir():
        tiny_model_folder(made, **options)
    return Path(shutil.copytree(made, folder / "model"))


def edit(path: Path, **changes) -> None:
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({name: value for name, value in (table | changes).items() if value is not None}))


def encoder(folder: Path, **options) -> None:
    from laser_dist.retrieval.encoder import LaserEncoder

    LaserEncoder.from_pretrained(folder, device="cpu", **options).encode_queries(["a query"])


def trained(folder: Path) -> None:
    """Loaded as training loads its backbone."""
    from laser_dist.config import ModelConfig, TextConfig
    from laser_dist.data.text import TextFormat
    from laser_dist.model.backbone import load_backbone, load_tokenizer

    config = ModelConfig(name=str(folder), dtype="float32")
    TextFormat(load_tokenizer(config), TextConfig())
    load_backbone(config)


@MODELS.case("an intact model: the cases below fail for what they change", "")
def _(folder, bomb):
    encoder(model(folder))
    trained(folder / "model")


for load in (encoder, trained):

    def code_for_config(folder, bomb, load=load):
        made = model(folder)
        (made / "evil.py").write_text(_CODE.format(canary=folder / "canary"))
        edit(made / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
        edit(made / "config.json", model_type="evil", architectures=["Evil"])
        load(made)

    MODELS.add(f"a config of its own code ({load.__name__})", "trust_remote_code|cannot load", code_for_config)

    def code_for_tokenizer(folder, bomb, load=load):
        made = model(folder)
        (made / "evil.py").write_text(_CODE.format(canary=folder / "canary"))
        edit(made / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
        edit(made / "tokenizer_config.json", tokenizer_class="Evil")
        load(made)

    MODELS.add(f"a tokenizer of its own code ({load.__name__})", "trust_remote_code|cannot load", code_for_tokenizer)

    def code_for_known_model(folder, bomb, load=load):
        made = model(folder)
        (made / "evil.py").write_text(_CODE.format(canary=folder / "canary"))
        edit(made / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
        load(made)

    MODELS.add(f"code beside a known model is not run ({load.__name__})", "", code_for_known_model)


@MODELS.case("weights that are a pickle", "weights in other formats .* are not read")
def _(folder, bomb):
    made = model(folder)
    (made / "model.safetensors").unlink()
    (made / "pytorch_model.bin").write_bytes(bomb)
    trained(made)


@MODELS.case("an index that names a pickle", "is no safetensors file")
def _(folder, bomb):
    made = model(folder)
    (made / "model.safetensors").unlink()
    (made / "evil.bin").write_bytes(bomb)
    edit(made / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": "evil.bin"})
    trained(made)


for name in ("../outside.safetensors", "/etc/passwd", "..", 5):

    def index_outside(folder, bomb, name=name):
        made = model(folder)
        shutil.move(made / "model.safetensors", folder / "outside.safetensors")
        edit(made / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": name})
        trained(made)

    MODELS.add(f"an index that names {name!r}", "does not lie in the folder", index_outside)


@MODELS.case("an index nested deeply", "nested too deeply")
def _(folder, bomb):
    made = model(folder)
    (made / "model.safetensors").unlink()
    (made / "model.safetensors.index.json").write_text("[" * 1_000_000)
    trained(made)


def header(change) -> bytes:
    """A safetensors file of one tensor whose header was changed."""
    table = {"lm_head.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    raw = json.dumps(change(table) or table).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(16)


LIES = {
    "a header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "a header of 100 MB that is not there": struct.pack("<Q", 99_000_000) + b"{}",
    "offsets beyond the file": header(lambda t: t["lm_head.weight"].update(data_offsets=[0, 2**40])),
    "offsets that run backwards": header(lambda t: t["lm_head.weight"].update(data_offsets=[16, 0])),
    "a shape beyond its bytes": header(lambda t: t["lm_head.weight"].update(shape=[2**30, 2**30])),
    "a shape that overflows": header(lambda t: t["lm_head.weight"].update(shape=[2**63, 2**63])),
    "a dtype that there is not": header(lambda t: t["lm_head.weight"].update(dtype="OBJECT")),
    "tensors that overlap": header(lambda t: t.update(other=dict(t["lm_head.weight"]))),
    "a header nested deeply": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "no header": b"",
}
for name, content in LIES.items():

    def safetensors_lie(folder, bomb, content=content):
        made = model(folder)
        (made / "model.safetensors").write_bytes(content)
        trained(made)

    MODELS.add(f"safetensors with {name}", "is no safetensors file", safetensors_lie)

CONFIG_LIES = {
    "vocab_size": 10**9,
    "hidden_size": 10**7,
    "intermediate_size": 10**10,
    "num_hidden_layers": 10**6,
}
for name, value in CONFIG_LIES.items():

    def config_lie(folder, bomb, name=name, value=value):
        made = model(folder)
        edit(made / "config.json", **{name: value})
        trained(made)

    MODELS.add(f"a config with {name} = {value:,}", "another model's|cannot load", config_lie)


@MODELS.case("a config with words for numbers", "cannot load|must be a whole number")
def _(folder, bomb):
    made = model(folder)
    edit(made / "config.json", hidden_size="many", vocab_size=[1])
    trained(made)


for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):

    def deep_file(folder, bomb, file=file):
        made = model(folder)
        (made / file).write_text("[" * 1_000_000)
        encoder(made)

    MODELS.add(f"{file} nested deeply", "cannot load|nested too deeply|damaged", deep_file)

TEMPLATES = {
    "that reads attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "that reaches for os": "{{ cycler.__init__.__globals__.os.system('touch {canary}') }}",
    "that calls on a filter": "{{ messages|map(attribute='__class__')|list }}",
    "that never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "that fills the memory": "{{ 'x' * 40000000000 }}",
    "that doubles forty times": "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}{{ n.s }}",
    "that recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "that raises": "{{ raise_exception('no') }}",
    "that repeats the content": "{{ messages[0].content }}{{ messages[0].content }}",
}
for name, template in TEMPLATES.items():

    def with_template(folder, bomb, template=template):
        made = model(folder, chat_template=True)
        (made / "chat_template.jinja").write_text(template.replace("{canary}", str(folder / "canary")))
        encoder(made)

    MODELS.add(f"a chat template {name}", "the chat template", with_template)

CARDS = {
    "with a template of a gigabyte": ("without : or !", {"text": {"passage_template": "{text:>999999999}"}}),
    "with a template that reads attributes": ("filled in", {"text": {"query_template": "{query.__class__}{query}"}}),
    "with a billion steps": ("from 1 to 1024", {"thinking": {"steps": 10**9}}),
    "with values of other kinds": ("expected int|got str", {"thinking": {"steps": "3"}}),
    "with unknown values": ("unknown key", {"text": {"exec": "os.system"}}),
    "that is a list": ("expected an object", None),
}
for name, (expected, changes) in CARDS.items():

    def with_card(folder, bomb, changes=changes):
        made = model(folder)
        table = {"format_version": 1, "thinking": {}, "text": {}} | (changes or {})
        (made / "laser_dist.json").write_text(json.dumps(table if changes else []))
        encoder(made)

    MODELS.add(f"a card {name}", expected, with_card)


def adapters(folder: Path, **changes) -> Path:
    """Intact LoRA adapters of an intact model, their settings changed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    backbone, made = model(folder), folder / "adapters"
    lm = get_peft_model(
        AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    lm.save_pretrained(made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(backbone / name, made / name)
    card = {"format_version": 1, "thinking": {}, "text": {}, "backbone": str(backbone)}
    (made / "laser_dist.json").write_text(json.dumps(card))
    edit(made / "adapter_config.json", **changes)
    return made


ADAPTERS = {
    "intact": ("", {}),
    "with a pattern that never ends": ("no patterns", {"target_modules": "(.*.*.*.*.*)*x"}),
    "of a rank that fills the memory": ("the weights have the ranks", {"r": 10**9}),
    "of a kind that imports": ("only LoRA", {"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "evil"}),
    "with ranks by pattern": ("several ranks", {"rank_pattern": {"(.*)*x": 10**9}}),
    "with code": ("", {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}}),
}
for name, (expected, changes) in ADAPTERS.items():
    MODELS.add(f"adapters {name}", expected, lambda folder, bomb, changes=changes: encoder(adapters(folder, **changes)))


@MODELS.case("adapters that are a pickle", "adapter_model.safetensors is missing")
def _(folder, bomb):
    made = adapters(folder)
    (made / "adapter_model.safetensors").unlink()
    (made / "adapter_model.bin").write_bytes(bomb)
    encoder(made)


for kind in ("os.system", "evil.Evil", "sentence_transformers.models.WordEmbeddings", "subprocess.Popen"):

    def named_module(folder, bomb, kind=kind):
        from laser_dist.data.mining.scorers import encoder_folder, load_encoder

        made = model(folder)
        (made / "evil.py").write_text(_CODE.format(canary=folder / "canary"))
        (made / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
        load_encoder(encoder_folder(str(made)), "auto", steps=None, device="cpu")

    MODELS.add(f"modules.json that names {kind}", "names .*only Transformer", named_module)


# --- vectors, indexes, results ---------------------------------------------------------------------------------------


def vectors(folder: Path, rows: int = 3, dim: int = 8) -> Path:
    """A finished folder of vectors."""
    made = folder / "vectors"
    made.mkdir()
    np.save(made / "vectors.npy", np.eye(rows, dim, dtype=np.float32))
    lines = [json.dumps(f"p{row}").encode() + b"\n" for row in range(rows)]
    (made / "ids.jsonl").write_bytes(b"".join(lines))
    (made / "ids.offsets").write_bytes(np.cumsum([0, *map(len, lines)]).astype("<u8").tobytes())
    edit(made / "manifest.json", format=2, rows=rows, dim=dim, dtype="float32", what="passages")
    return made


def load(folder: Path) -> None:
    from laser_dist.retrieval.vectors import load_vectors

    ids, _ = load_vectors(folder)
    assert ids[0] == "p0" and list(ids) == [ids[row] for row in range(len(ids))]


@VECTORS.case("intact vectors", "")
def _(folder, bomb):
    load(vectors(folder))


@VECTORS.case("vectors of pickled objects", "is damaged")
def _(folder, bomb):
    made = vectors(folder)

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'canary'}",)

    np.save(made / "vectors.npy", np.array([Bomb()] * 3, dtype=object), allow_pickle=True)
    load(made)


def npy(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


NPY = {
    "of a terabyte that is not there": npy("(1000000000, 1000)"),
    "of a shape that overflows": npy("(4611686018427387904, 4611686018427387904)"),
    "of a negative shape": npy("(-3, 8)"),
    "of a header that is code": npy("__import__('os').system('touch canary')"),
    "of a header nested deeply": npy("(" * 30_000),
    "of a pickle": pickle.dumps(1),
    "of nothing": b"",
}
for name, content in NPY.items():

    def with_npy(folder, bomb, content=content):
        made = vectors(folder)
        (made / "vectors.npy").write_bytes(content)
        load(made)

    VECTORS.add(f"vectors {name}", "is damaged", with_npy)

MANIFESTS = {
    "that is a list": "[]",
    "nested deeply": "[" * 1_000_000,
    "of more rows": json.dumps({"format": 2, "rows": 10**12, "dim": 8, "dtype": "float32"}),
    "of words": json.dumps({"format": 2, "rows": "many", "dim": [], "dtype": {}}),
}
for name, text in MANIFESTS.items():

    def with_manifest(folder, bomb, text=text):
        made = vectors(folder)
        (made / "manifest.json").write_text(text)
        load(made)

    VECTORS.add(f"vectors with a manifest {name}", "is damaged", with_manifest)

OFFSETS = {
    "beyond the file": np.array([0, 2**63, 2**63, 15], "<u8"),
    "backwards": np.array([0, 15, 5, 15], "<u8"),
    "of no id": np.array([0, 1, 2, 15], "<u8"),
}
for name, offsets in OFFSETS.items():

    def with_offsets(folder, bomb, offsets=offsets):
        made = vectors(folder)
        (made / "ids.offsets").write_bytes(offsets.tobytes())
        load(made)

    VECTORS.add(f"ids that lie {name}", "is no id|is damaged", with_offsets)


@VECTORS.case("ids in one line of 10 GB", "is damaged|longer than 8 MiB")
def _(folder, bomb):
    made = vectors(folder)
    os.truncate(made / "ids.jsonl", 10 * GIB)
    (made / "ids.offsets").write_bytes(np.array([0, 5, 10, 10 * GIB], "<u8").tobytes())
    load(made)


INDEXES = {"of noise": b"IxFI" + b"\xff" * 4096, "of a pickle": pickle.dumps(1), "of nothing": b""}
for name, content in INDEXES.items():

    def with_index(folder, bomb, content=content):
        from laser_dist.retrieval.search.faiss_index import IndexOptions, open_index

        pytest.importorskip("faiss")
        made = vectors(folder)
        array = np.load(made / "vectors.npy", mmap_mode="r")
        open_index(made, array, "flat", IndexOptions())
        open_index(made, array, "flat", IndexOptions())
        (made / "flat.index" / "index.faiss").write_bytes(content)
        open_index(made, array, "flat", IndexOptions())

    VECTORS.add(f"a FAISS index {name}", "is damaged.*--rebuild-index", with_index)


@VECTORS.case("a FAISS index of more dimensions, its hash right", "does not fit these vectors")
def _(folder, bomb):
    import faiss

    from laser_dist.retrieval.search.faiss_index import IndexOptions, open_index, sha256

    made = vectors(folder)
    array = np.load(made / "vectors.npy", mmap_mode="r")
    open_index(made, array, "flat", IndexOptions())
    other = faiss.IndexFlatIP(1024)
    faiss.write_index(other, str(made / "flat.index" / "index.faiss"))
    edit(made / "flat.index" / "index.json", sha256=sha256(made / "flat.index" / "index.faiss"))
    open_index(made, array, "flat", IndexOptions())


for name, text in {"nested deeply": "[" * 1_000_000, "a list": "[]", "of NaN": '{"per_query": NaN}'}.items():

    def with_results(folder, bomb, text=text):
        (folder / "a.json").write_text(text)
        (folder / "b.json").write_text("{}")
        command("compare", folder / "a.json", folder / "b.json")

    VECTORS.add(f"results {name}", "not a result file", with_results)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def archive(pickled: bytes = pickle.dumps({}, 2)) -> bytes:
    """A file as torch.save lays it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as made:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            made.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def load_shard(folder: Path, content: bytes) -> None:
    from laser_dist.distributed.pickles import safe_load

    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(content)
    safe_load(str(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"), map_location="cpu")


@CHECKPOINTS.case("an intact shard", "")
def _(folder, bomb):
    load_shard(folder, archive())


@CHECKPOINTS.case("a poisoned DeepSpeed shard", "is refused: it holds more than data")
def _(folder, bomb):
    load_shard(folder, archive(pickled=bomb))


@CHECKPOINTS.case("a bare pickle", "is not what torch.save writes")
def _(folder, bomb):
    load_shard(folder, bomb)


@CHECKPOINTS.case("a pickle of torch's old format", "is not what torch.save writes")
def _(folder, bomb):
    import torch

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    load_shard(folder, buffer.getvalue() + bomb)


for name in ("builtins.eval", "builtins.exec", "os.system", "torch.load", "functools.partial", "builtins.getattr"):

    def global_of(folder, bomb, name=name):
        module, _, attribute = name.rpartition(".")
        code = f'c{module}\n{attribute}\n(S\'open("{folder / "canary"}", "w")\'\ntR.'.encode()
        load_shard(folder, archive(pickled=code))

    CHECKPOINTS.add(f"a pickle that calls {name}", "is refused", global_of)


@CHECKPOINTS.case("a pickle that asks for 100 GB", "is refused")
def _(folder, bomb):
    load_shard(folder, archive(pickled=b"cbuiltins\nbytearray\n(I100000000000\ntR."))


@CHECKPOINTS.case("a compressed shard of 2 GB", "are compressed or overlap")
def _(folder, bomb):
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        made.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with made.open("archive/data/0", "w", force_zip64=True) as file:
            for _ in range(256):
                file.write(bytes(2**20))
    load_shard(folder, (folder / "bomb.pt").read_bytes())


@CHECKPOINTS.case("parameters whose names lead out of the folder", "is no parameter's name")
def _(folder, bomb):
    import torch

    from laser_dist.distributed.universal import _convert

    (folder / "deepspeed").mkdir()
    state = {"param_shapes": [{"../../../escaped": torch.Size([2])}], "optimizer_state_dict": {}}
    torch.save(state, folder / "deepspeed" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    _convert(folder / "deepspeed", folder / "converted" / "deepspeed", 2)


def verify(folder: Path, files: object) -> None:
    from laser_dist.distributed.manifest import verify
    from laser_dist.errors import UserError

    (folder / "manifest.json").write_text(files if isinstance(files, str) else json.dumps({"files": files}))
    if defect := verify(folder):
        raise UserError(defect)


CHECKPOINT_MANIFESTS = {
    "that names a file outside": {"../../etc/passwd": {"bytes": 1, "sha256": ""}},
    "that names /etc/passwd": {"/etc/passwd": {"bytes": 1, "sha256": ""}},
    "with NUL in a name": {"a\0b": {"bytes": 1, "sha256": ""}},
    "of words": {"a": {"bytes": "many", "sha256": 5}},
    "of lists": {"a": []},
    "nested deeply": "[" * 1_000_000,
    "that is a list": "[]",
}
for name, files in CHECKPOINT_MANIFESTS.items():
    CHECKPOINTS.add(
        f"a checkpoint's manifest {name}",
        "manifest.json (is missing or broken|names .*, which is not in the checkpoint)",
        lambda folder, bomb, files=files: verify(folder, files),
    )

for name in ("../../elsewhere", "/tmp", "step-1/../..", "", "x" * 100_000, "step-\u202e1"):

    def pointing(folder, bomb, name=name):
        from laser_dist.retrieval.folders import model_folder

        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text(name)
        model_folder(folder)

    CHECKPOINTS.add(f"`latest` that names {name[:20]!r}", "no checkpoint|cannot be read", pointing)

STATES = {
    "of words": '{"step": "1", "world_size": 1, "stage": 3, "fingerprint": ""}',
    "with a negative step": '{"step": -1, "world_size": 1, "stage": 3, "fingerprint": ""}',
    "of infinite steps": '{"step": Infinity, "world_size": 1, "stage": 3, "fingerprint": ""}',
    "nested deeply": "[" * 1_000_000,
    "with more than it has": '{"step": 1, "world_size": 1, "stage": 3, "fingerprint": "", "__class__": 1}',
}
for name, text in STATES.items():

    def with_state(folder, bomb, text=text):
        from laser_dist.distributed.checkpoint import read_state

        (folder / "trainer.json").write_text(text)
        read_state(folder)

    CHECKPOINTS.add(f"trainer.json {name}", "trainer.json", with_state)


@CHECKPOINTS.case("a generator's state that is none", "no generator's state")
def _(folder, bomb):
    import torch

    from laser_dist.distributed.rng import restore_rng

    for content in (b"", *LIES.values()):
        (folder / "rng.safetensors").write_bytes(content)
        try:
            restore_rng(folder / "rng.safetensors", torch.device("cpu"), (0, 0, 0))
        except Exception as error:
            assert "no generator's state" in str(error), error
        else:
            raise AssertionError(content)
    restore_rng(folder / "rng.safetensors", torch.device("cpu"), (0, 0, 0))


@CHECKPOINTS.case("an export of a model that is none of the checkpoint's", "is not what training saved")
def _(folder, bomb):
    step = folder / "run" / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    model(step)
    (step.parent / "latest").write_text("step-000001\n")
    name = "model/model.safetensors"
    (step / "manifest.json").write_text(json.dumps({"files": {name: {"bytes": 1, "sha256": "0" * 64}}}))
    command("export", folder / "run", "--out", folder / "exported")


GROUPS = {"models": MODELS, "vectors": VECTORS, "checkpoints": CHECKPOINTS}


def run_groups(rank: int, world_size: int, folder: str) -> list[str]:
    import laser_dist.distributed.checkpoint  # noqa: F401  # its size, and torch's, are no case's

    return [problem for group, cases in GROUPS.items() for problem in run_cases(cases, Path(folder) / group)]


def test_every_case_ends_in_a_refusal(tmp_path):
    from laser_dist.testing import run_distributed

    [problems] = run_distributed(run_groups, 1, str(tmp_path), timeout=540)
    assert not problems, "\n".join(problems)
