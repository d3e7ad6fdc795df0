import torch
from laser_kernels import alignment_loss_reference

from laser_dist.config import ModelConfig, ObjectiveConfig, TextConfig
from laser_dist.data.schema import Example, Passage
from laser_dist.data.text import TextFormat
from laser_dist.model.backbone import load_backbone, load_tokenizer
from laser_dist.model.retriever import LaserRetriever, unit
from laser_dist.model.teacher import FrozenTeacher, beside
from laser_dist.objective.alignment import AlignmentObjective
from laser_dist.testing import assert_close_relative, tiny_model_folder

OFFLINE = ObjectiveConfig(
    temperature=0.2, distill_temperature=0.3, explicit_weight=0.0, output_weight=2.0, trajectory_weight=0.5,
    mask_false_negatives=False, teacher="elsewhere",
)  # fmt: skip


def model(folder, seed: int, *, steps: int) -> LaserRetriever:
    name = str(tiny_model_folder(folder / f"model-{seed}", seed=seed))
    return LaserRetriever(load_backbone(ModelConfig(name=name, dtype="float32")).double().eval(), steps=steps)


def batch_of(folder, steps: int):
    text = TextFormat(load_tokenizer(ModelConfig(name=str(folder / "model-0"))), TextConfig(), steps=steps)
    words = "heat makes steam float above metal while cold stone keeps the drop still".split()
    examples, passages = [], []
    for i in range(3):
        rationale = "\n\n".join(" ".join(words[i + j : 2 * i + j + 2]) for j in range(1 + i))
        passages.append([Passage(f"p{i}{j}", " ".join(words[i + j : 3 + 2 * i + j])) for j in range(2)])
        examples.append(Example(f"q{i}", " ".join(words[2 * i : 9 - i]), rationale, (passages[-1][0],)))
    return text.batch(examples, passages, with_rationale=True)


def test_frozen_teacher_scores_its_own_passages_and_gets_no_gradient(tmp_path):
    """Its query vectors lie in its own space: against the student's passages they would rank at random."""
    student, other = model(tmp_path, 0, steps=3), model(tmp_path, 1, steps=1)
    batch = batch_of(tmp_path, 3)
    views = student(batch)
    teacher = FrozenTeacher(other, steps=3, convention="official")
    loss = AlignmentObjective(OFFLINE, 0.4, teacher)(views, batch, 0)

    other.steps = 3  # for three segments; K = 1 gives the vectors
    segments_BKD = other(batch).segments_BKD
    other.steps = 1
    theirs = other(batch)
    ours = alignment_loss_reference(
        views.query_BD, None, None, None, views.passage_PD, batch.labels_B, temperature=0.2, distill_temperature=0.3,
        trajectory_temperature=0.4,
    )  # fmt: skip
    assert_close_relative(loss.terms["infonce_latent"], ours.infonce_latent, 1e-12, "infonce_latent")
    log_s = torch.log_softmax(views.query_BD @ views.passage_PD.T / 0.3, -1)
    log_t = torch.log_softmax(theirs.teacher_BD @ theirs.passage_PD.T / 0.3, -1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert_close_relative(loss.terms["kl_output"], kl, 1e-9, "kl_output")
    log_s = torch.log_softmax(unit(views.query_steps_BKD) @ views.passage_PD.T / 0.4, -1)
    log_t = torch.log_softmax(unit(segments_BKD) @ theirs.passage_PD.T / 0.4, -1)
    middle = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert_close_relative(loss.terms["kl_trajectory"], middle, 1e-9, "kl_trajectory")

    wanted = torch.autograd.grad(
        ours.infonce_latent + 2.0 * kl + 0.5 * middle, list(student.parameters()),
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    loss.total.backward()
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert_close_relative(parameter.grad, gradient, 1e-9, "gradient")
    assert all(p.grad is None and not p.requires_grad for p in other.parameters())


def test_teacher_in_chunks_reads_what_it_reads_at_once(tmp_path):
    other = model(tmp_path, 0, steps=2)
    batch = batch_of(tmp_path, 3)
    whole = FrozenTeacher(other, steps=3, convention="official")(batch)
    longest = int(batch.lengths_R.max())
    parts = FrozenTeacher(other, steps=3, convention="official", chunk_tokens=longest)(batch)
    for name in ("teacher_BD", "segments_BKD", "passage_PD"):
        assert_close_relative(getattr(parts, name), getattr(whole, name), 1e-9, name)


def test_rows_beside_each_other_keep_their_scores(tmp_path):
    student, other = model(tmp_path, 0, steps=2), model(tmp_path, 1, steps=2)
    batch = batch_of(tmp_path, 2)
    views, taught = student(batch), FrozenTeacher(other, steps=2, convention="official")(batch)
    wide = beside(views, taught)
    assert_close_relative(wide.query_BD @ wide.passage_PD.T, views.query_BD @ views.passage_PD.T, 1e-12, "student")
    assert_close_relative(
        wide.teacher_BD @ wide.passage_PD.T, taught.teacher_BD @ taught.passage_PD.T, 1e-12, "teacher"
    )
