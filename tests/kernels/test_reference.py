"""The eager reference is the specification of every faster path; here it is held against the formulas, spelled out."""

import itertools
import math

import pytest
import torch
from laser_kernels import alignment_loss_reference
from torch import Tensor

from laser_dist.testing import assert_close_relative

B, K, D, N = 3, 2, 5, 7
TERMS = ("infonce_latent", "infonce_explicit", "kl_output", "kl_trajectory")
TEMPERATURES = {"temperature": 0.2, "distill_temperature": 0.3, "trajectory_temperature": 0.5}
LABELS_B = torch.tensor([0, 4, 2])


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1).to(dtype).requires_grad_()


def inputs(dtype: torch.dtype = torch.float64, *, d: int = D, n: int = N) -> list[Tensor]:
    """Student and teacher vectors, their steps, and passages."""
    shapes = [(B, d), (B, d), (B, K, d), (B, K, d), (n, d)]
    return [rows(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def loss(values: list[Tensor | None], **options: object) -> dict[str, Tensor]:
    options = {**TEMPERATURES, **options}
    return dict(zip(TERMS, alignment_loss_reference(*values, LABELS_B, **options), strict=True))


def softmax(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


def literal(
    values: list[Tensor], keep_BN: list[list[bool]] | None = None, *, tau: dict[str, float]
) -> dict[str, float]:
    """The four terms by loops over floats: rows, steps and kept columns."""
    student, teacher, student_steps, teacher_steps, passages = (x.tolist() for x in values)

    def distribution(vector: list[float], temperature: float, row: int) -> dict[int, float]:
        columns = [n for n in range(len(passages)) if keep_BN is None or keep_BN[row][n]]
        scores = [sum(x * y for x, y in zip(vector, passages[n], strict=True)) / temperature for n in columns]
        return dict(zip(columns, softmax(scores), strict=True))

    def kl(p: dict[int, float], q: dict[int, float]) -> float:
        return sum(p[n] * math.log(p[n] / q[n]) for n in p)

    total = dict.fromkeys(TERMS, 0.0)
    for i, label in enumerate(LABELS_B.tolist()):
        total["infonce_latent"] -= math.log(distribution(student[i], tau["temperature"], i)[label]) / B
        total["infonce_explicit"] -= math.log(distribution(teacher[i], tau["temperature"], i)[label]) / B
        p, q = (distribution(side[i], tau["distill_temperature"], i) for side in (teacher, student))
        total["kl_output"] += kl(p, q) / B
        for t, s in zip(teacher_steps[i], student_steps[i], strict=True):
            p, q = (distribution(side, tau["trajectory_temperature"], i) for side in (t, s))
            total["kl_trajectory"] += kl(p, q) / (B * len(student_steps[i]))
    return total


def assert_values(actual: dict[str, Tensor], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert actual[name].shape == () and actual[name].dtype == torch.float64
        assert actual[name].item() == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_values_are_the_formulas():
    assert_values(loss(inputs()), literal(inputs(), tau=TEMPERATURES))


@pytest.mark.parametrize("teacher, student_steps, teacher_steps", list(itertools.product([True, False], repeat=3)))
def test_terms_whose_inputs_are_absent_are_zero(teacher, student_steps, teacher_steps):
    values, full = inputs(), loss(inputs())
    given = [True, teacher, student_steps, teacher_steps, True]
    actual = loss([value if there else None for value, there in zip(values, given, strict=True)])
    present = {
        "infonce_latent": True,
        "infonce_explicit": teacher,
        "kl_output": teacher,
        "kl_trajectory": student_steps and teacher_steps,
    }
    for name, there in present.items():
        assert torch.equal(actual[name], full[name] if there else torch.zeros((), dtype=torch.float64)), name


def gradients(term: Tensor, values: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(term, values, allow_unused=True, retain_graph=True))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_closed_forms(masked):
    """d CE = (softmax - onehot) / tau and d KL = (q - p) / tau per score of the student; nothing else flows."""
    values = inputs()
    student, teacher, student_steps, teacher_steps, passages = (x.detach() for x in values)
    options = {"query_ids": torch.tensor([[10], [11], [12]]), "passage_ids": torch.tensor([10, 10, 12, 13, 11, 14, 11])}
    keep_BN = torch.ones(B, N, dtype=torch.bool)
    if masked:
        keep_BN[0, 1] = keep_BN[1, 6] = False
    terms = loss(values, **(options if masked else {}))

    def p(vectors: Tensor, name: str) -> Tensor:
        keep = keep_BN if vectors.dim() == 2 else keep_BN[:, None]
        return (vectors @ passages.T / TEMPERATURES[name]).masked_fill(~keep, -torch.inf).softmax(-1)

    def flow(to_scores: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the vectors and of the passages, from that of the scores."""
        return to_scores @ passages, to_scores.flatten(0, -2).T @ vectors.flatten(0, -2)

    onehot_BN = torch.nn.functional.one_hot(LABELS_B, N)
    to_latent = (p(student, "temperature") - onehot_BN) / TEMPERATURES["temperature"] / B
    to_explicit = (p(teacher, "temperature") - onehot_BN) / TEMPERATURES["temperature"] / B
    tau = TEMPERATURES["distill_temperature"]
    to_output = (p(student, "distill_temperature") - p(teacher, "distill_temperature")) / tau / B
    tau = TEMPERATURES["trajectory_temperature"]
    difference = p(student_steps, "trajectory_temperature") - p(teacher_steps, "trajectory_temperature")
    expected = {  # by index of the input; the others get none
        "infonce_latent": dict(zip((0, 4), flow(to_latent, student), strict=True)),
        "infonce_explicit": dict(zip((1, 4), flow(to_explicit, teacher), strict=True)),
        "kl_output": dict(zip((0, 4), flow(to_output, student), strict=True)),
        "kl_trajectory": dict(zip((2, 4), flow(difference / tau / (B * K), student_steps), strict=True)),
    }
    for name, term in terms.items():
        for i, gradient in enumerate(gradients(term, values)):
            if i in expected[name]:
                assert_close_relative(gradient, expected[name][i], 1e-12, f"{name}, input {i}")
            else:
                assert gradient is None or not gradient.any(), f"{name} reaches input {i}"


def test_gradcheck():
    student, teacher, student_steps, teacher_steps, passages = inputs()
    infonce = lambda s, t, p: loss([s, t, None, None, p])  # noqa: E731
    for name in ("infonce_latent", "infonce_explicit"):
        assert torch.autograd.gradcheck(lambda *x, n=name: infonce(*x)[n], (student, teacher, passages))
    # A KL's teacher side is constant by decree, which finite differences cannot know: vary the student alone.
    others = [x.detach() for x in (teacher, teacher_steps, passages)]
    kl = lambda s, steps: loss([s, others[0], steps, others[1], others[2]])  # noqa: E731
    for name in ("kl_output", "kl_trajectory"):
        assert torch.autograd.gradcheck(lambda *x, n=name: kl(*x)[n], (student, student_steps))


@pytest.mark.parametrize("several", [False, True], ids=["one id", "several ids"])
def test_columns_with_an_id_of_the_row_are_dropped(several):
    """For student and teacher alike, in every term; the row's own positive stays, though it has such an id."""
    passage_ids = torch.tensor([10, 11, 12, 10, 11, 13, 12])
    query_ids = torch.tensor([[10, 13], [11, 11], [12, 11]]) if several else torch.tensor([10, 11, 12])
    keep_BN = []
    for label, ids in zip(LABELS_B.tolist(), query_ids.tolist(), strict=True):
        own = ids if several else [ids]
        keep_BN.append([n == label or passage_ids[n].item() not in own for n in range(N)])
    assert sum(map(sum, keep_BN)) == N * B - (6 if several else 3)
    actual = loss(inputs(), query_ids=query_ids, passage_ids=passage_ids)
    assert_values(actual, literal(inputs(), keep_BN, tau=TEMPERATURES))


@pytest.mark.parametrize("with_ids", [False, True])
def test_margin_drops_what_the_latent_view_scores_far_above_the_positive(with_ids):
    values, margin = inputs(), 0.1
    scores_BN = (values[0] @ values[4].T).tolist()
    keep_BN = [
        [n == label or score <= scores[label] + margin for n, score in enumerate(scores)]
        for scores, label in zip(scores_BN, LABELS_B.tolist(), strict=True)
    ]
    assert 0 < sum(map(sum, keep_BN)) < N * B
    ids = {}
    if with_ids:
        ids = {"query_ids": torch.tensor([1, 2, 3]), "passage_ids": torch.tensor([1, 1, 3, 9, 2, 9, 9])}
        keep_BN[0][1] = False
    assert_values(loss(values, margin=margin, **ids), literal(values, keep_BN, tau=TEMPERATURES))


def test_nothing_left_but_the_positive():
    values = inputs()
    terms = loss(values, query_ids=torch.tensor([5, 5, 5]), passage_ids=torch.full((N,), 5))
    for name, term in terms.items():
        assert term == 0, name
    sum(terms.values()).backward()
    for value in values:
        assert value.grad is None or not value.grad.any()  # false for NaN too


def test_extreme_temperature_stays_finite():
    values = inputs(torch.float32)
    terms = loss(values, temperature=1e-3, distill_temperature=1e-3, trajectory_temperature=1e-3)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(value.grad.isfinite().all() for value in values if value is not values[3])  # teacher steps have none


def test_equal_views_have_no_divergence():
    values = inputs()
    terms = loss([values[0], values[0], values[2], values[2], values[4]])
    assert terms["kl_output"] == 0 and terms["kl_trajectory"] == 0
    assert torch.equal(terms["infonce_latent"], terms["infonce_explicit"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_are_float32(dtype):
    """Against float64 on the same (rounded) inputs, at the temperature that makes it hard.

    Each logit errs by at most e = (D + 2) u / tau, u = 2^-24, for unit rows. A log-probability then errs by 2e, and so
    does InfoNCE; sum p (log p - log q) by 2e (2 + E_p |log p - log q|), the last for the error of p itself. The sums of
    exponentials and over columns add a few u times the largest magnitude, below 1e-6 of the value here.
    """
    d, n, tau = 64, 40, 0.02
    values = inputs(dtype, d=d, n=n)
    exact = [value.detach().double() for value in values]
    options = dict.fromkeys(TEMPERATURES, tau)
    actual, expected = loss(values, **options), loss(exact, **options)
    e = (d + 2) * 2**-24 / tau
    spread = {"kl_output": mean_log_ratio(exact[1], exact[0], exact[4], tau)}
    spread["kl_trajectory"] = mean_log_ratio(exact[3], exact[2], exact[4], tau)
    for name, value in actual.items():
        bound = 2 * e * (2 + spread[name] if name in spread else 1) + 1e-6 * expected[name].item()
        assert value.dtype == torch.float32 and expected[name].dtype == torch.float64
        assert abs(value.double() - expected[name]).item() <= bound, name
        # The bound means something: bfloat16 scores, off by u = 2^-9 each, would be far outside it.
        assert bound < 0.02 * expected[name].item(), name


def mean_log_ratio(teacher: Tensor, student: Tensor, passages_ND: Tensor, tau: float) -> float:
    """E_p |log p - log q|, over all rows."""
    p, q = ((x @ passages_ND.T / tau).log_softmax(-1) for x in (teacher, student))
    return (p.exp() * (p - q).abs()).sum(-1).mean().item()
