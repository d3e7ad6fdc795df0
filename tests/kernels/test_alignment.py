"""Every implementation against the float64 reference: the four terms, every gradient, what is counted beside them."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laser_kernels import Alignment, align, alignment, alignment_loss, alignment_loss_reference, pair_torch
from laser_kernels.pairs import STATISTICS, Pairs, Temperatures, score_gradients_of
from torch import Tensor

from laser_dist.testing import assert_close_relative

TERMS = ("infonce_latent", "infonce_explicit", "kl_output", "kl_trajectory")
INPUTS = ("student", "teacher", "student_steps", "teacher_steps", "passages")
PUBLISHED = {"temperature": 0.02, "distill_temperature": 0.02, "trajectory_temperature": 0.05}
DISTINCT = {"temperature": 0.05, "distill_temperature": 0.1, "trajectory_temperature": 0.2}
# Relative to the largest entry of each term and gradient. float32: a score errs by some 1e-7 and a logit by 1/tau times
# that. bfloat16: gradients are rounded twice, in the workspace and at the end, by 2^-9 each in the mean.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
KERNELS = ["triton", "chunked"]


def rows(*shape: int, seed: int, common: float = 0.0) -> Tensor:
    """Unit rows whose mean cosine is about common^2 / (1 + common^2); 1 makes it 0.5, as real encoders have it."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(shape[-1], generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return F.normalize(values + common * direction, dim=-1)


def inputs(b: int, k: int, d: int, n: int, common: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """Rows in float64, and labels: views near their own positive, the teacher nearer, so that no term is noise."""
    passages = rows(n, d, seed=4, common=common)
    labels = torch.arange(b) * n // b
    own = passages[labels]

    def near(target: Tensor, distance: float, seed: int) -> Tensor:
        return F.normalize(target + distance * rows(*target.shape, seed=seed), dim=-1)

    own_steps = own[:, None].expand(b, k, d)
    return [
        near(own, 4.0, 0), near(own, 3.0, 1), near(own_steps, 6.0, 2), near(own_steps, 5.0, 3), passages,
    ], labels  # fmt: skip


def outcome(
    values: list[Tensor | None], labels: Tensor, dtype: torch.dtype, device: str = "cpu", **options: Any
) -> tuple[Alignment, dict[str, Tensor | None]]:
    """The alignment of copies in `dtype`, and the gradient of its weighted sum with respect to each of them."""
    leaves = [None if x is None else x.to(device, dtype, copy=True).requires_grad_() for x in values]
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    found = align(*leaves, labels.to(device), **moved)
    sum(weight * term for weight, term in zip((1.0, 0.7, 3.0, 0.5), found.terms, strict=True)).backward()
    return found, {name: None if x is None else x.grad for name, x in zip(INPUTS, leaves, strict=True)}


def errors(
    values: list[Tensor | None], labels: Tensor, dtype: torch.dtype, kernel: str, device: str = "cpu", **options: Any
) -> dict[str, float]:
    """Relative errors of a kernel, the reference seeing the same rounded inputs; asserts what must be exact."""
    rounded = [None if x is None else x.to(dtype).double() for x in values]
    expected, expected_gradients = outcome(rounded, labels, torch.float64, kernel="reference", **options)
    actual, gradients = outcome(rounded, labels, dtype, device, kernel=kernel, **options)
    for name, wanted, found in zip(Alignment._fields[1:], expected[1:], actual[1:], strict=True):
        assert (wanted is None) == (found is None), name
        assert wanted is None or torch.equal(found.cpu().double(), wanted), name
    found_errors = {}
    for name, wanted, found in zip(TERMS, expected.terms, actual.terms, strict=True):
        if wanted == 0:
            assert found == 0, name
        else:
            found_errors[name] = ((found.cpu().double() - wanted).abs() / wanted).item()
    for name, wanted in expected_gradients.items():
        found = gradients[name]
        if wanted is None or not wanted.any():
            assert found is None or not found.any(), f"{name} has a gradient"
        else:
            assert found.dtype == dtype and found.isfinite().all(), name
            found_errors[f"gradient of {name}"] = relative(found, wanted)
    return found_errors


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


def check(values: list[Tensor | None], labels: Tensor, dtype: torch.dtype, *arguments: Any, **options: Any) -> None:
    found = errors(values, labels, dtype, *arguments, **options)
    assert max(found.values()) <= TOLERANCE[dtype], {name: f"{error:.1e}" for name, error in found.items()}


def ids(b: int, n: int, several: bool = False) -> dict[str, Tensor]:
    """Ids of which every row's own returns in a few other columns."""
    passage_ids = torch.arange(n) % max(n // 3, 2)
    query_ids = passage_ids[torch.arange(b) * n // b]
    return {
        "passage_ids": passage_ids,
        "query_ids": torch.stack([query_ids, query_ids, (query_ids + 1) % n], 1) if several else query_ids,
    }


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them ragged, at the sizes of tests."""
    monkeypatch.setattr(pair_torch, "CHUNK_SCORES", 1)
    monkeypatch.setattr(pair_torch, "SHORTEST_CHUNK", 37)
    monkeypatch.setattr(alignment, "LONGEST_CHUNK", 128)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "b, k, d, n",
    [(1, 1, 8, 2), (5, 3, 48, 131), (70, 2, 100, 300), (3, 6, 33, 65), (2, 4, 576, 130), (9, 5, 64, 1000)],
)
def test_odd_shapes(kernel, dtype, b, k, d, n, device, poisoned_memory, small_chunks):
    values, labels = inputs(b, k, d, n, common=1.0)
    check(values, labels, dtype, kernel, device, **DISTINCT, **ids(b, n))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tau", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("common", [0.0, 1.0, 8.0], ids=["isotropic", "mean cosine 0.5", "mean cosine 0.98"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperatures_and_anisotropy(kernel, dtype, tau, common, device, poisoned_memory):
    """At 0.01 the exponentials leave float32 unless they are shifted by a running maximum.

    Where passages share a direction, the gradient is what remains when that cancels: probabilities rounded to 16 bits
    would lose a per cent of it.
    """
    if (common, tau, dtype) == (8.0, 0.1, torch.float32):
        pytest.skip("there is next to no divergence; its gradient errs by 2e-5, that of the float32 reference by 3e-4")
    values, labels = inputs(24, 3, 256, 500, common)
    temperatures = {name: tau if name != "trajectory_temperature" else 2 * tau for name in PUBLISHED}
    check(values, labels, dtype, kernel, device, **temperatures)


@pytest.mark.parametrize("kernel", KERNELS)
def test_running_maximum_under_two_temperatures(kernel, device, poisoned_memory):
    """Passages that get nearer and nearer, over several tiles: each tile rescales what the ones before left."""
    values, labels = inputs(6, 2, 64, 300)
    target = values[0][:1] + values[1][:1]
    nearness = torch.linspace(-1, 1, 300, dtype=torch.float64)[:, None]
    values[4] = F.normalize(values[4] + 1.5 * nearness * target, dim=-1)
    check(
        values,
        labels,
        torch.float32,
        kernel,
        device,
        **{**PUBLISHED, "temperature": 0.03, "distill_temperature": 0.008},
    )


@pytest.mark.parametrize("tau", [0.0125, 0.0135, 0.014, 0.0145, 0.016, 0.02])
@pytest.mark.parametrize("own, others", [(-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_extreme_scores_stay_in_float32(tau, own, others, device):
    """Scores of 1 and -1, on both sides of the temperature below which a fixed shift would overflow."""
    direction = F.normalize(torch.ones(1, 16, dtype=torch.float64), dim=-1)
    passages = torch.cat([own * direction, others * direction.expand(400, 16)])
    teacher = F.normalize(-direction + 0.3 * rows(1, 16, seed=1), dim=-1)
    arguments = ([direction, teacher, None, None, passages], torch.zeros(1, dtype=torch.long))
    temperatures = dict.fromkeys(PUBLISHED, tau)
    expected, _ = outcome(*arguments, torch.float64, kernel="reference", **temperatures)
    found, gradients = outcome(*arguments, torch.float32, device, kernel="triton", **temperatures)
    logit_error = 4 * torch.finfo(torch.float32).eps / tau
    for name, actual, wanted in zip(TERMS, found.terms, expected.terms, strict=True):
        assert_close_relative(actual, wanted, 1e-5, name, noise=logit_error)
    assert all(x is None or x.isfinite().all() for x in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_more_exact_than_scores_in_bfloat16(dtype, device, capsys):
    """What the published recipe computes under autocast; printed side by side, since it is why the kernel exists."""
    values, labels = inputs(24, 3, 256, 500, common=1.0)
    rounded = [x.to(dtype).double() for x in values]
    _, expected = outcome(rounded, labels, torch.float64, kernel="reference", **PUBLISHED)
    leaves = [x.to(torch.bfloat16).requires_grad_() for x in rounded]
    student, teacher, steps, teacher_steps, passages = leaves

    def divergence(t: Tensor, s: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(s, -1), F.log_softmax(t.detach(), -1), log_target=True, reduction="none").sum(-1)

    scores = [x @ passages.T / 0.02 for x in (student, teacher)]
    terms = (
        F.cross_entropy(scores[0], labels),
        F.cross_entropy(scores[1], labels),
        divergence(scores[1], scores[0]).mean(),
        divergence(teacher_steps @ passages.T / 0.05, steps @ passages.T / 0.05).mean(),
    )
    sum(weight * term for weight, term in zip((1.0, 0.7, 3.0, 0.5), terms, strict=True)).backward()
    eager = {
        f"gradient of {n}": relative(x.grad, expected[n])
        for n, x in zip(INPUTS, leaves, strict=True)
        if n[-7:] != "r_steps"
    }  # noqa: E501
    kernel = errors(values, labels, dtype, "triton", device, **PUBLISHED)
    with capsys.disabled():
        for name, error in eager.items():
            print(f"\n  {name}: eager bfloat16 {error:.1e}, kernel on {dtype} rows {kernel[name]:.1e}", end="")
    for name, error in eager.items():
        assert kernel[name] < error / 4, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("teacher, steps, segments", list(itertools.product([True, False], repeat=3)))
def test_absent_inputs(kernel, teacher, steps, segments, device, poisoned_memory):
    """Without steps, without a teacher, and plain InfoNCE: terms are 0, and no gradient comes where none is due."""
    values, labels = inputs(6, 2, 40, 90)
    there = (True, teacher, steps, segments, True)
    kept = [value if present else None for value, present in zip(values, there, strict=True)]
    check(kept, labels, torch.float32, kernel, device, **PUBLISHED, **ids(6, 90))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("margin", [None, 0.0, 0.05])
@pytest.mark.parametrize("several", [None, False, True], ids=["no ids", "one id", "several ids"])
def test_false_negatives_are_dropped(kernel, margin, several, device, poisoned_memory, small_chunks):
    """For student and teacher alike, in outputs and steps; the step's rows are judged by their query's scores."""
    values, labels = inputs(20, 3, 64, 150)
    mask = {} if several is None else ids(20, 150, several)
    check(values, labels, torch.float32, kernel, device, **PUBLISHED, margin=margin, **mask)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tau", [0.01, 0.05])
def test_nothing_left_but_the_positive(kernel, tau, device, poisoned_memory):
    values, labels = inputs(4, 2, 16, 30)
    temperatures = dict.fromkeys(PUBLISHED, tau)
    mask = {"query_ids": torch.full((4,), 5), "passage_ids": torch.full((30,), 5)}
    found, gradients = outcome(values, labels, torch.float32, device, kernel=kernel, **temperatures, **mask)
    assert all(term == 0 for term in found.terms)
    assert all(x is None or not x.any() for x in gradients.values())  # false for NaN too
    assert (found.dropped_B == 29).all() and not found.rivals_above_B.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_loss_near_zero_keeps_its_digits(kernel, device):
    """log L - positive's logit cancels: of a loss of 1e-9 nothing would be left in float32."""
    passages = F.normalize(torch.eye(64, dtype=torch.float64) + 0.1, dim=-1)
    values = [F.normalize(passages[:8] + 0.01 * rows(8, 64, seed=i), dim=-1) for i in (0, 1)] + [None, None, passages]
    options = {**PUBLISHED, "temperature": 0.025, "distill_temperature": 0.025}
    found = errors(values, torch.arange(8), torch.float32, kernel, device, **options)
    reference, _ = outcome(values, torch.arange(8), torch.float64, kernel="reference", **options)
    assert 0 < reference.terms.infonce_latent < 1e-7
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("kernel", KERNELS)
def test_ids_that_no_column_has_drop_nothing(kernel, device):
    """In a ring that is the rule: between two ids that are there, before all, and after all."""
    values, labels = inputs(6, 2, 40, 90)
    mask = {"passage_ids": 10 * torch.arange(90), "query_ids": 10 * labels[:, None] + torch.tensor([5, -7, 2**62])}
    check(values, labels, torch.float32, kernel, device, **PUBLISHED, **mask)
    found, _ = outcome(values, labels, torch.float32, device, kernel=kernel, **PUBLISHED, **mask)
    assert not found.dropped_B.any()


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_margin_spares_copies_of_the_positive(kernel, dtype, device):
    """Their scores differ by rounding only: dropping some of them would be a draw of lots, by machine."""
    passages = rows(40, 96, seed=0)
    values = [F.normalize(passages + rows(40, 96, seed=1), dim=-1), None, None, None, passages.repeat(2, 1)]
    device = "cpu" if dtype == torch.float64 else device
    kernel = "chunked" if dtype == torch.float64 and kernel == "triton" else kernel
    found, _ = outcome(values, torch.arange(40), dtype, device, kernel=kernel, **PUBLISHED, margin=0.0)
    assert not found.dropped_B.any()


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
def test_nan_shows_in_the_loss(kernel, device):
    """A passage that is not a number compares as false with everything, and must not pass for a false negative."""
    values, labels = inputs(6, 2, 40, 90)
    values[4][50] = torch.nan
    found, _ = outcome(values, labels, torch.float32, device, kernel=kernel, **PUBLISHED, margin=0.1)
    assert found.terms.infonce_latent.isnan()


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_has_no_say(kernel, device):
    """bfloat16 scores are what this is written to avoid."""
    values, labels = inputs(24, 3, 128, 200)
    plain, _ = outcome(values, labels, torch.float32, device, kernel=kernel, **PUBLISHED)
    with torch.autocast(device, torch.bfloat16):
        cast, gradients = outcome(values, labels, torch.float32, device, kernel=kernel, **PUBLISHED)
    assert all(torch.equal(a, b) for a, b in zip(plain.terms, cast.terms, strict=True))
    assert gradients["student"].dtype == torch.float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_passages_of_any_layout(kernel, device):
    values, labels = inputs(6, 2, 40, 90)
    strided = values[4].float().to(device).T.contiguous().T
    assert strided.stride(-1) != 1
    small = [x.float().to(device) for x in values[:4]]
    found = alignment_loss(*small, strided, labels.to(device), kernel=kernel, **PUBLISHED)
    expected = alignment_loss(*small, strided.contiguous(), labels.to(device), kernel=kernel, **PUBLISHED)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_of_scores_use_the_range_of_float16():
    """In absolute terms the probabilities of 10^6 passages would be below float16's smallest number."""
    pairs = Pairs(
        torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(2, 2), queries=2, steps=0, columns=10**6,
        temperatures=Temperatures(0.02, 0.02, 0.05), margin=None,
    )  # fmt: skip
    statistics = torch.ones(STATISTICS, 2)
    gradients = score_gradients_of([torch.tensor(x) for x in (1.0, 1.0, 10.0, 0.0)], statistics, pairs)
    assert gradients.coefficients_4P.abs().max().item() == pytest.approx(4096)


@pytest.mark.parametrize("kernel", KERNELS)
def test_copies_of_the_positive_are_not_above_it(kernel, device):
    """Their scores differ from the positive's by rounding only, and a mean rank must not depend on that."""
    values, labels = inputs(8, 1, 96, 64)
    values[4] = values[4][:1].expand(64, 96).clone()
    found, _ = outcome(values, labels, torch.float32, device, kernel=kernel, **PUBLISHED)
    assert not found.rivals_above_B.any() and not found.explicit_rivals_above_B.any()


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_change_nothing(chunk, monkeypatch):
    monkeypatch.setattr(pair_torch, "CHUNK_SCORES", 1)
    monkeypatch.setattr(pair_torch, "SHORTEST_CHUNK", chunk)
    monkeypatch.setattr(alignment, "LONGEST_CHUNK", chunk)
    values, labels = inputs(7, 3, 24, 200)
    check(values, labels, torch.float64, "chunked", **DISTINCT, margin=0.1, **ids(7, 200, several=True))


def test_results_repeat_bit_for_bit(device):
    """No atomics: the order of every sum is fixed."""
    values, labels = inputs(40, 3, 64, 700)
    first, again = (outcome(values, labels, torch.float32, device, kernel="triton", **PUBLISHED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0].terms, again[0].terms, strict=True))
    for name, gradient in first[1].items():
        assert gradient is None or torch.equal(gradient, again[1][name]), name


def test_addresses_beyond_two_gibi_elements(device):
    """Row 4 of these passages begins 2^32 elements in: int32 arithmetic would read another row."""
    stride = 2**30
    values, labels = inputs(3, 2, 32, 5)
    memory = torch.empty(4 * stride + 32, dtype=torch.bfloat16, device=device)  # never touched, never committed
    passages = memory.as_strided((5, 32), (stride, 1))
    passages.copy_(values[4])
    small = [x.to(device, torch.bfloat16) for x in values[:4]]
    spread = alignment_loss(*small, passages, labels.to(device), kernel="triton", **PUBLISHED)
    together = alignment_loss(*small, passages.contiguous(), labels.to(device), kernel="triton", **PUBLISHED)
    assert all(torch.equal(a, b) for a, b in zip(spread, together, strict=True))


@pytest.mark.parametrize("needed", INPUTS[:3] + INPUTS[4:])
def test_only_the_gradient_asked_for(needed, device):
    values, labels = inputs(6, 2, 16, 30)
    leaves = {name: x.float().to(device) for name, x in zip(INPUTS, values, strict=True)}
    leaves[needed].requires_grad_()
    sum(alignment_loss(*leaves.values(), labels.to(device), kernel="triton", **PUBLISHED)).backward()
    alone = {name: x.requires_grad_(name == needed) for name, x in zip(INPUTS, values, strict=True)}
    sum(alignment_loss_reference(*alone.values(), labels, **PUBLISHED)).backward()
    assert relative(leaves[needed].grad, alone[needed].grad) < 1e-5


def test_dtypes_are_brought_together():
    values, labels = inputs(4, 2, 16, 30)
    mixed = [x.to(dtype) for x, dtype in zip(values, [torch.float32, torch.bfloat16] * 3, strict=False)]
    terms = alignment_loss(*mixed, labels, kernel="chunked", **PUBLISHED)
    expected = alignment_loss_reference(*(x.double() for x in mixed), labels, **PUBLISHED)
    for name, found, wanted in zip(TERMS, terms, expected, strict=True):
        assert found.dtype == torch.float32
        assert_close_relative(found, wanted, 1e-5, name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels_B": torch.zeros(3, dtype=torch.long)}, r"labels_B has shape \(3,\), expected \(4,\)"),
        ({"teacher_BD": torch.zeros(4, 8)}, r"teacher_BD has shape \(4, 8\), expected \(4, 16\)"),
        ({"teacher_steps_BKD": torch.zeros(4, 3, 16)}, r"teacher_steps_BKD has shape \(4, 3, 16\), expected \(4, 2"),
        ({"passages_ND": torch.zeros(0, 16)}, "0 passages"),
        ({"query_ids": torch.zeros(5), "passage_ids": torch.zeros(30)}, r"query_ids has shape \(5,\), expected \(4,\)"),
        ({"passage_ids": torch.zeros(29)}, r"passage_ids has shape \(29,\), expected \(30,\)"),
        ({"labels_B": torch.zeros(4, dtype=torch.int32)}, "labels_B is torch.int32, expected torch.int64"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(change, message):
    """A kernel would read past the end instead, and train on what lies there."""
    values, labels = inputs(4, 2, 16, 30)
    names = ("student_BD", "teacher_BD", "student_steps_BKD", "teacher_steps_BKD", "passages_ND", "labels_B")
    arguments = dict(zip(names, [*(x.float() for x in values), labels], strict=True)) | change
    ordered = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        alignment_loss(*ordered, kernel="chunked", **PUBLISHED, **arguments)


@pytest.mark.parametrize("label", [-1, 30])
def test_labels_out_of_range_are_refused(label):
    """-1 would take the last passage for the positive, and leave it among its own rivals."""
    values, _ = inputs(1, 2, 16, 30)
    with pytest.raises(RuntimeError, match="labels_B holds a column that there is not"):
        alignment_loss(*values, torch.tensor([label]), kernel="chunked", **PUBLISHED)
