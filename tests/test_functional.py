"""Agreement terms against naive float64 loops: values, gradients, masks, precision, edges."""

import pytest
import torch

from hf_rdrop.functional import AGREEMENTS, bernoulli_agreement, softmax_agreement, squared_agreement, symmetric_kl
from support.reference import naive_bernoulli_kl, naive_symmetric_kl, pairs, torch_reference


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("shape", [(1, 2), (7, 3), (2, 5, 11), (3, 1000)])
def test_symmetric_kl_equals_the_loop(shape):
    a, b = draw(*shape, seed=1), draw(*shape, seed=2)
    rows = zip(a.flatten(0, -2).tolist(), b.flatten(0, -2).tolist(), strict=True)
    values = [naive_symmetric_kl(x, y) for x, y in rows]
    assert symmetric_kl(a, b).item() == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_symmetric_kl_equals_torch_distributions():
    a, b = draw(6, 9, seed=1), draw(6, 9, seed=2)
    p, q = torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    expected = (torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).mean() / 2
    torch.testing.assert_close(symmetric_kl(a, b), expected)


def test_it_is_symmetric_shift_invariant_and_zero_for_equal_passes():
    a, b = draw(5, 4, seed=1), draw(5, 4, seed=2)
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(b, a))
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(a + 3.0, b - 2.0))
    assert symmetric_kl(a, a).item() == 0.0
    assert symmetric_kl(a, b).item() > 0.1  # so the equalities above are not those of zeros


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("problem_type", list(AGREEMENTS))
def test_values_and_gradients_of_m_passes_equal_the_mean_over_pairs(m, problem_type):
    labels = torch.tensor([0, 1, -100, 2, 1])
    mask = labels != -100 if problem_type == "single_label_classification" else None
    targets = labels if mask is not None else draw(5, 3, seed=9).sigmoid().round()
    logits = draw(m, 5, 3, seed=3).requires_grad_()
    value = AGREEMENTS[problem_type](logits, mask)
    expected = torch_reference(logits, targets, alpha=1.0, problem_type=problem_type)[2]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (value, expected)))


def test_bernoulli_equals_the_loop_and_masks_labels():
    a, b = draw(4, 3, seed=1), draw(4, 3, seed=2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]]).bool()
    values = [naive_bernoulli_kl(x.item(), y.item()) for x, y in zip(a[mask], b[mask], strict=True)]
    assert bernoulli_agreement(torch.stack((a, b)), mask).item() == pytest.approx(sum(values) / len(values))


def test_squared_difference():
    value = squared_agreement(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert value.item() == pytest.approx((4 + 0) / 2)
    three = torch.tensor([[1.0], [2.0], [4.0]])
    assert squared_agreement(three).item() == pytest.approx(
        sum((three[i] - three[j]).item() ** 2 for i, j in pairs(3)) / 3
    )


def test_it_is_summed_over_classes_and_averaged_over_items():
    """Averaging over classes or summing over the batch, both found in the wild, would change these ratios."""
    a, b = draw(1, 3, seed=1), draw(1, 3, seed=2)
    value = symmetric_kl(a, b)
    torch.testing.assert_close(symmetric_kl(a.expand(8, 3), b.expand(8, 3)), value)
    padding = torch.full((1, 3), -1e4, dtype=torch.float64)  # three more classes without probability
    torch.testing.assert_close(symmetric_kl(torch.cat((a, padding), 1), torch.cat((b, padding), 1)), value)


@pytest.mark.parametrize("agreement", [softmax_agreement, bernoulli_agreement, squared_agreement])
def test_gradcheck(agreement):
    logits = draw(3, 4, 5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(agreement, (logits,))
    assert torch.autograd.gradcheck(
        lambda z: 3 * agreement(z * 2) ** 2, (logits,)
    )  # an upstream gradient other than 1


def test_gradient_flows_into_both_passes_and_can_be_taken_twice():
    a, b = draw(4, 5, seed=1).requires_grad_(), draw(4, 5, seed=2).requires_grad_()
    value = symmetric_kl(a, b)
    value.backward(retain_graph=True)
    once = a.grad.clone()
    assert once.abs().max() > 1e-3 and b.grad.abs().max() > 1e-3
    value.backward()
    torch.testing.assert_close(a.grad, 2 * once)


def test_masked_rows_do_not_count_whatever_they_hold():
    a, b = draw(6, 4, seed=1), draw(6, 4, seed=2)
    mask = torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    expected = symmetric_kl(a[mask], b[mask])
    a[2], b[4], a[5] = torch.inf, torch.nan, -torch.inf
    a.requires_grad_()
    value = symmetric_kl(a, b, mask)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert torch.all(a.grad[~mask] == 0) and a.grad.isfinite().all()


def test_no_valid_item_gives_zero_and_zero_gradient():
    logits = draw(2, 3, 4).requires_grad_()
    value = softmax_agreement(logits, torch.zeros(3).bool())
    value.backward()
    assert value.item() == 0.0 and torch.all(logits.grad == 0)
    empty = torch.zeros(2, 0, 4, requires_grad=True)
    assert softmax_agreement(empty).item() == 0.0
    assert bernoulli_agreement(empty).item() == squared_agreement(empty).item() == 0.0


def test_minus_infinity_in_both_passes_is_a_class_without_probability():
    a, b = draw(3, 5, seed=1), draw(3, 5, seed=2)
    expected = symmetric_kl(a[:, :4], b[:, :4])
    a[:, 4] = b[:, 4] = -torch.inf
    a.requires_grad_()
    value = symmetric_kl(a, b)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert a.grad.isfinite().all() and torch.all(a.grad[:, 4] == 0)


def test_minus_infinity_in_one_pass_only_is_infinite_disagreement_and_nan_is_not_hidden():
    a, b = draw(3, 5, seed=1), draw(3, 5, seed=2)
    a[0, 0] = -torch.inf
    assert symmetric_kl(a, b).item() == torch.inf
    a[0, 0] = torch.nan
    assert symmetric_kl(a, b).isnan()


def test_infinite_scores_in_both_passes_of_a_multi_label_head():
    logits = draw(2, 3, 4)
    logits[:, 0, 0], logits[:, 1, 1] = torch.inf, -torch.inf
    logits.requires_grad_()
    value = bernoulli_agreement(logits)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_compared_in_float32(dtype):
    a, b = draw(64, 50, seed=1).to(dtype), draw(64, 50, seed=2).to(dtype)
    exact_a, exact_b = a.double().requires_grad_(), b.double().requires_grad_()
    exact = symmetric_kl(exact_a, exact_b)
    exact.backward()
    a.requires_grad_()
    value = symmetric_kl(a, b)
    value.backward()
    assert value.dtype == torch.float32 and a.grad.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    error = (a.grad.double() - exact_a.grad).norm() / exact_a.grad.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[dtype]


def test_float16_gradients_survive_a_loss_scale():
    """1 / (many tokens) underflows in float16 unless the upstream scale is applied before rounding."""
    a = draw(4096, 8, seed=1, scale=0.01).half().requires_grad_()
    b = draw(4096, 8, seed=2, scale=0.01).half()
    (symmetric_kl(a, b) * 2.0**16).backward()
    exact = a.detach().double().requires_grad_()
    (symmetric_kl(exact, b.double()) * 2.0**16).backward()
    assert (a.grad.double() - exact.grad).norm() / exact.grad.norm() < 2e-3


def test_long_inputs_are_cut_into_blocks_without_changing_the_result(monkeypatch):
    logits = draw(2, 37, 11, seed=5).requires_grad_()
    mask = torch.arange(37) % 3 > 0
    whole = softmax_agreement(logits, mask)
    grad = torch.autograd.grad(whole, logits)[0]
    monkeypatch.setattr("hf_rdrop.functional.BLOCK_ELEMENTS_PER_CORE", 100)
    parts = softmax_agreement(logits, mask)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_rows_in_half_precision(dtype):
    """Ignored rows get no gradient, the others that of the rows alone, whatever the ignored ones hold."""
    logits, mask = draw(2, 6, 5, seed=3).to(dtype), torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    alone = logits[:, mask].requires_grad_()
    logits[:, 1] = torch.nan
    logits.requires_grad_()
    found, expected = softmax_agreement(logits, mask), softmax_agreement(alone)
    found.backward()
    expected.backward()
    assert torch.equal(found, expected) and torch.equal(logits.grad[:, mask], alone.grad)
    assert not logits.grad[:, ~mask].any()


def test_without_gradient_nothing_is_kept():
    with torch.no_grad():
        value = softmax_agreement(draw(2, 3, 4).requires_grad_())
    assert not value.requires_grad and value.item() > 0


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="same shape"):
        symmetric_kl(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="mask has shape"):
        symmetric_kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))
    for agreement in AGREEMENTS.values():
        with pytest.raises(ValueError, match="at least two passes"):
            agreement(torch.zeros(1, 2, 3), None)


@pytest.mark.parametrize("function", [bernoulli_agreement, squared_agreement])
@pytest.mark.parametrize("filling", [float("nan"), float("inf"), float("-inf")])
def test_masked_scores_that_are_not_finite_leave_the_gradient_alone(function, filling):
    logits, mask = draw(2, 3, 2, seed=1), torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    clean = logits.clone().requires_grad_()
    spoilt = logits.masked_fill(~mask, filling).requires_grad_()
    values = [function(x, mask) for x in (clean, spoilt)]
    gradients = [torch.autograd.grad(value, x)[0] for value, x in zip(values, (clean, spoilt), strict=True)]
    assert torch.equal(*values) and torch.equal(*gradients) and not gradients[0][:, ~mask].any()


def test_masks_of_other_shapes_are_refused_and_no_classes_are_no_disagreement():
    for function in (bernoulli_agreement, squared_agreement):
        with pytest.raises(ValueError, match=r"mask has shape \(3,\).*\(4, 3\)"):
            function(torch.zeros(2, 4, 3), torch.ones(3))  # would have been spread over the rows
    assert softmax_agreement(torch.zeros(2, 4, 0)) == 0


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).min / 2, -1e30])
@pytest.mark.parametrize("passes", [2, 3])
def test_masking_by_a_very_low_score_is_as_by_minus_infinity(low, passes):
    """As Splinter masks positions; the mean of two such scores is out of the range of float32."""
    logits = draw(passes, 3, 5, dtype=torch.float32)
    kept = logits[..., :4].double().requires_grad_()
    expected = torch_reference(kept, torch.tensor([0, 1, 2]), 1.0, "single_label_classification")[2]
    expected.backward()
    logits[..., 4] = low
    logits.requires_grad_()
    value = softmax_agreement(logits)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad[..., :4].double(), kept.grad, rtol=1e-4, atol=1e-6)
    assert torch.all(logits.grad[..., 4] == 0)
