"""One text, one vector: training, the published formula, serving and every form of an export agree to 1e-5."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from laser_dist import LaserEncoder
from laser_dist.batch import TokenSequence, pack
from laser_dist.config import CheckpointConfig, ModelConfig, TextConfig, ThinkingConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat
from laser_dist.distributed.checkpoint import CheckpointStore, TrainerState
from laser_dist.distributed.engine import Engine, init_distributed
from laser_dist.model.attention import NAME as PACKED_ATTENTION
from laser_dist.model.backbone import load_backbone, load_tokenizer, prepare_for_training
from laser_dist.model.retriever import LaserRetriever
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.export import export
from laser_dist.retrieval.exporting.modeling_laser import LaserModel, padded
from laser_dist.testing import run_distributed, tiny_model_folder
from laser_dist.testing.published import PublishedStep

TOLERANCE = 1e-5
GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3_tied_k3.json"
QUERIES = [
    "why does ice float on water?",
    "ice",
    "which waves of light does air scatter most, short or long ones? " * 4,
]
PASSAGES = ["Ice is less dense than water.", "Air scatters short waves; " * 9, "so", "  Blue light.\n", "a b", "x"]
EXAMPLES = [
    Example(f"q{i}", query, "Density decides.\n\nIce floats.\n\nWhy?", (Passage("", a),), (Passage("", b),))
    for i, (query, a, b) in enumerate(zip(QUERIES, PASSAGES[::2], PASSAGES[1::2], strict=True))
]
TEXT = TextConfig(max_query_tokens=48, max_passage_tokens=40)
# Of four choices each, every pair of two: half of all sixteen combinations.
CASES = [
    (architecture, tied, lora, "paper" if (architecture == "qwen3") ^ tied ^ lora else "official")
    for architecture in ("llama", "qwen3")
    for tied in (True, False)
    for lora in (False, True)
]


def model_in_training(backbone: Path, *, lora: bool, convention: str, steps: int = 3) -> LaserRetriever:
    config = ModelConfig(name=str(backbone), dtype="float32", lora_rank=4 * lora, activation_checkpointing=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        lm = prepare_for_training(load_backbone(config), config)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return LaserRetriever(lm, steps=steps, convention=convention)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request, tmp_path_factory):
    """A model in training, its saved checkpoint, and the self-contained export of that."""
    architecture, tied, lora, convention = request.param
    root = tmp_path_factory.mktemp("case")
    backbone = tiny_model_folder(
        root / "backbone",
        architecture=architecture,
        tied=tied,
        chat_template=architecture == "qwen3",
        bos=architecture == "llama",
    )
    calm(backbone)
    retriever = model_in_training(backbone, lora=lora, convention=convention)
    retriever.lm.save_pretrained(root / "model")
    load_tokenizer(ModelConfig(name=str(backbone))).save_pretrained(root / "model")
    thinking = ThinkingConfig(convention=convention)
    RetrieverCard(backbone=str(backbone), thinking=thinking, text=TEXT).save(root / "model")
    return retriever, root / "model", export(root / "model", out=root / "export", self_contained=True).folder


def calm(folder: Path) -> None:
    """Weights of 0.7 times their size: at full size these random models amplify float32 rounding tenfold a step.

    Against float64, K = 5 then errs by up to 2e-4 whoever computes it; like this by 3e-6, and K still moves vectors.
    """
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter *= 0.7
    lm.save_pretrained(folder)


def training_batch(folder: Path):
    text = TextFormat(load_tokenizer(ModelConfig(name=str(folder))), TEXT)
    pairs = [(example.positives[0], *example.negatives) for example in EXAMPLES]
    return text.batch(EXAMPLES, pairs, with_rationale=True)


@torch.no_grad()
def vectors(model, batch) -> np.ndarray:
    views = model(batch)
    return torch.cat([views.query_BD, views.passage_PD]).numpy()


def test_every_way_to_a_vector_is_the_trainer_s(case):
    """For K = 1 to 5: a training batch with rationales, the published formula, and what users load."""
    retriever, checkpoint, folder = case
    batch = training_batch(checkpoint)
    served = served_by(checkpoint, folder)
    published = PublishedStep(AutoModelForCausalLM.from_pretrained(folder), convention=retriever.convention)
    seen = []
    for steps in range(1, 6):
        retriever.steps = published.steps = steps
        expected = vectors(retriever, batch)
        np.testing.assert_allclose(vectors(published, batch), expected, atol=TOLERANCE, err_msg=f"published, {steps}")
        for name, (set_steps, queries, passages) in served.items():
            set_steps(steps)
            found = np.concatenate([queries(QUERIES), passages(PASSAGES)])
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=f"{name}, {steps} steps")
        seen.append(expected)
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(seen, seen[1:], strict=False))  # K decides


def served_by(checkpoint: Path, folder: Path) -> dict:
    """Name -> how to set K, to encode queries and to encode passages."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from laser_dist.retrieval.sentence_transformers_module import load_sentence_transformer

    installed = load_sentence_transformer(folder, device="cpu")
    shipped = sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert type(shipped[0]).__module__.startswith("transformers_modules.")
    auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
    encoders = {name: LaserEncoder.from_pretrained(path) for name, path in (("LoRA", checkpoint), ("export", folder))}
    served = {
        f"LaserEncoder of {name}": (steps_of(encoder.retriever), encoder.encode_queries, encoder.encode_passages)
        for name, encoder in encoders.items()
    }
    served["installed module"] = (steps_of(installed[0].retriever), installed.encode_query, installed.encode_document)
    served["shipped module"] = (steps_of_card(shipped[0].model), shipped.encode_query, shipped.encode_document)
    served["AutoModel"] = (steps_of_card(auto), auto.encode_queries, auto.encode_passages)
    return served


def steps_of(retriever: LaserRetriever):
    return lambda steps: setattr(retriever, "steps", steps)


def steps_of_card(model: LaserModel):
    return lambda steps: model.card["thinking"].update(steps=steps)


def test_neither_padding_nor_the_batch_matters(case):
    retriever, checkpoint, folder = case
    model, encoder = LaserModel.from_pretrained(folder), LaserEncoder.from_pretrained(folder)
    prompts = [model.query(text) for text in QUERIES]
    ids_RL, mask_RL = padded(prompts)
    left = [
        (torch.cat([ids[mask == 0], ids[mask == 1]]), mask.flip(0)) for ids, mask in zip(ids_RL, mask_RL, strict=True)
    ]
    with torch.no_grad():
        ways = {
            "right": model(ids_RL, mask_RL),
            "left": model(*map(torch.stack, zip(*left, strict=True))),
            "wider": model(torch.nn.functional.pad(ids_RL, (3, 4), value=5), torch.nn.functional.pad(mask_RL, (3, 4))),
            "alone": torch.cat([model(*padded([prompt])) for prompt in prompts]),
            "one by one": model.encode_queries(QUERIES, batch_size=1),
        }
    expected = encoder.encode_queries(QUERIES)
    for name, found in ways.items():
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=name)
    np.testing.assert_allclose(
        LaserEncoder.from_pretrained(folder, batch_tokens=1).encode_queries(QUERIES), expected, atol=TOLERANCE
    )


def test_the_published_vectors():
    """Golden numbers of the published implementation, through the packed path and through the shipped file."""
    case, golden = json.loads(GOLDEN.read_text()), load_file(GOLDEN.with_suffix(".safetensors"))
    weights = {name.removeprefix("weight."): x.float() for name, x in golden.items() if name.startswith("weight.")}
    expected = torch.cat([golden["out.query"], golden["out.passage"]]).numpy()
    lms = {}
    for attention in (PACKED_ATTENTION, "sdpa"):
        config = AutoConfig.for_model(**case["config"])
        lms[attention] = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        lms[attention].load_state_dict(weights, strict=False)
        lms[attention].tie_weights()
    prompts = case["queries"] + case["passages"]
    packed = LaserRetriever(lms[PACKED_ATTENTION], steps=case["K"])(pack([TokenSequence(ids) for ids in prompts]))
    np.testing.assert_allclose(packed.passage_PD.detach(), expected, atol=TOLERANCE)
    card = {"thinking": {"steps": case["K"], "convention": "official"}, "text": {"chat_template": "never"}}
    with torch.no_grad():
        shipped = LaserModel(lms["sdpa"], WithoutFrame, card)(*padded(prompts))
    np.testing.assert_allclose(shipped, expected, atol=TOLERANCE)


class WithoutFrame:
    """A tokenizer that puts nothing around a text: golden cases are ids already."""

    chat_template = bos_token_id = None


@pytest.mark.slow
def test_a_checkpoint_of_every_zero_stage_is_exported(tmp_path):
    """After a real update on two ranks; weights saved without gathering would be shards, or the untrained ones."""
    backbone = tiny_model_folder(tmp_path / "backbone", architecture="qwen3", tied=False)
    RetrieverCard(text=TEXT).save(backbone)
    trained, _ = run_distributed(train_and_save, 2, backbone, tmp_path)
    untrained = LaserEncoder.from_pretrained(backbone).encode_queries(QUERIES)
    for name, expected in trained.items():
        folder = export(tmp_path / name / "step-000001", out=tmp_path / "exports" / name).folder
        found = LaserEncoder.from_pretrained(folder).encode_queries(QUERIES)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=name)
        assert np.abs(found - untrained).max() > 1e-3
    assert len(trained) == 8


def train_and_save(rank: int, world_size: int, backbone: Path, root: Path) -> dict[str, np.ndarray]:
    """Name of the run -> its vectors after one step, gathered from sharded parameters."""
    init_distributed()
    text = TextFormat(load_tokenizer(ModelConfig(name=str(backbone))), TEXT)
    card = RetrieverCard(backbone=str(backbone), text=TEXT)
    made = {}
    for stage in range(4):
        for lora in (False, True):
            retriever = model_in_training(backbone, lora=lora, convention="official")
            optimizer = torch.optim.SGD([p for p in retriever.parameters() if p.requires_grad], lr=0.1)
            settings = {"stage": stage, "stage3_param_persistence_threshold": 0}
            ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings}
            engine = Engine(retriever, optimizer, {**ds_config, "zero_allow_untested_optimizer": True})
            views = engine(training_batch(backbone))
            engine.backward((views.query_BD @ views.passage_PD.T).square().mean())
            engine.step()
            name = f"zero{stage}-{'lora' if lora else 'full'}"
            state = TrainerState(1, world_size, stage, "", None, 3)
            store = CheckpointStore(root / name, CheckpointConfig())
            store.save(engine, state, text.tokenizer, card)
            store.publish()
            made[name] = LaserEncoder(retriever, text, card, over_ranks=True).encode_queries(QUERIES)
    return made
