"""What the passes are asked to agree on: values and gradients against naive float64 loops, edges, and how the
agreements compare with each other."""

import math

import pytest
import torch

from hf_rdrop.agreements import (
    OUTPUT_AGREEMENTS,
    TERMS,
    Term,
    hidden_state_agreement,
    jensen_shannon,
    one_sided_kl,
    parse_agreement,
    squared_logits,
    squared_probabilities,
)
from hf_rdrop.functional import AGREEMENTS
from support.reference import naive_agreement, pairs

SINGLE, MULTI, REGRESSION = AGREEMENTS
symmetric_kl = OUTPUT_AGREEMENTS["symmetric_kl"]
NO_REGRESSION = (jensen_shannon, squared_probabilities)
CASES = [
    pytest.param(function, kind, id=f"{name}-{kind}")
    for name, function in OUTPUT_AGREEMENTS.items()
    for kind in AGREEMENTS
    if kind != REGRESSION or function not in NO_REGRESSION
]
DISTRIBUTIONS = [case for case in CASES if case.values[1] != REGRESSION and case.values[0] is not squared_logits]


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def name_of(function):
    return next(name for name, value in OUTPUT_AGREEMENTS.items() if value is function)


def mask_for(kind, items, classes):
    mask = torch.arange(items) % 3 != 1
    return mask if kind == SINGLE else mask[:, None] & (torch.arange(classes) % 4 != 2)


def gradient(function, logits, mask, kind):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, mask, kind), leaf)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize(("function", "kind"), CASES)
def test_the_value_is_that_of_the_loop_over_pairs_and_valid_items(function, kind, m, masked):
    logits = draw(m, 7, 5, seed=m)
    mask = mask_for(kind, 7, 5) if masked else None
    expected = naive_agreement(name_of(function), kind, logits.tolist(), mask)
    assert expected > 0.01
    assert function(logits, mask, kind).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("function", "kind"), CASES)
def test_items_may_have_any_shape(function, kind):
    logits, mask = draw(2, 6, 5), mask_for(kind, 6, 5)
    folded = function(logits.view(2, 2, 3, 5), mask.view(2, 3, *mask.shape[1:]), kind)
    torch.testing.assert_close(folded, function(logits, mask, kind))
    torch.testing.assert_close(function(logits, mask.int(), kind), function(logits, mask, kind))


def test_regression_predictions_may_have_no_last_dimension():
    a, b = draw(4, seed=1), draw(4, seed=2)
    for function in (symmetric_kl, one_sided_kl, squared_logits):
        value = function(torch.stack((a, b)), torch.tensor([1, 0, 1, 1]), REGRESSION)
        torch.testing.assert_close(value, (a - b)[[0, 2, 3]].square().mean())


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize(("function", "kind"), [case for case in CASES if case.values[0] is not one_sided_kl])
def test_gradcheck(function, kind, m):
    logits, mask = draw(m, 4, 5, seed=4).requires_grad_(), mask_for(kind, 4, 5)
    assert torch.autograd.gradcheck(lambda z: function(z, mask, kind), (logits,))
    assert torch.autograd.gradcheck(lambda z: 3 * function(z * 2, mask, kind) ** 2, (logits,))


def test_one_sided_gradient_moves_the_later_passes_towards_the_earlier():
    logits = draw(3, 4, 5, seed=1)
    p = logits.softmax(-1)
    later = torch.stack((torch.zeros_like(p[0]), p[1] - p[0], (p[2] - p[0]) + (p[2] - p[1])))  # d KL(P||Q) = q - p
    torch.testing.assert_close(gradient(one_sided_kl, logits, None, SINGLE), later / (3 * 4))
    p = logits.sigmoid()
    later = torch.stack((torch.zeros_like(p[0]), p[1] - p[0], (p[2] - p[0]) + (p[2] - p[1])))
    torch.testing.assert_close(gradient(one_sided_kl, logits, None, MULTI), later / (3 * 4 * 5))
    z = logits
    later = 2 * torch.stack((torch.zeros_like(z[0]), z[1] - z[0], (z[2] - z[0]) + (z[2] - z[1])))
    torch.testing.assert_close(gradient(one_sided_kl, logits, None, REGRESSION), later / (3 * 4 * 5))


@pytest.mark.parametrize(("function", "kind"), CASES)
def test_exchanging_passes_changes_only_the_one_sided(function, kind):
    logits = draw(3, 6, 5, seed=1)
    value, other = function(logits, None, kind), function(logits.flip(0), None, kind)
    if function is one_sided_kl and kind != REGRESSION:
        assert abs(value - other) > 1e-3
    else:
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("function", "kind"), CASES)
def test_zero_for_equal_passes_and_only_for_them(function, kind, dtype):
    one = draw(6, 5, seed=1, dtype=dtype)
    logits = one.expand(2, 6, 5).clone()
    # (The last few of a row of numbers may be rounded in another way than the others.)
    assert abs(function(logits, None, kind).item()) < 1e-13
    assert gradient(function, logits, None, kind).abs().max() < 1e-7
    logits[1, 3, 1] += 0.125
    assert function(logits, None, kind).item() > 1e-6


@pytest.mark.parametrize(("function", "kind"), DISTRIBUTIONS)
def test_a_common_shift_of_a_pass_does_not_matter_to_its_distribution(function, kind):
    logits = draw(2, 6, 5, seed=1)
    shifted = function(logits + torch.tensor([3.0, -2.0])[:, None, None], None, kind)
    if kind == SINGLE:
        torch.testing.assert_close(shifted, function(logits, None, kind))
    else:
        assert abs(shifted - function(logits, None, kind)) > 1e-3


def test_what_is_summed_over_the_classes_and_what_is_averaged():
    a, b = draw(1, 3, seed=1), draw(1, 3, seed=2)
    unlikely = torch.full((1, 3), -1e4, dtype=torch.float64)  # three more classes without probability
    few, more = torch.stack((a, b)), torch.stack((torch.cat((a, unlikely), 1), torch.cat((b, unlikely), 1)))
    for name, function in OUTPUT_AGREEMENTS.items():
        factor = 1 / 2 if name == "squared_logits" else 1
        torch.testing.assert_close(function(more, None, SINGLE), factor * function(few, None, SINGLE))


# Edges


@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("function", "kind"), CASES)
def test_masked_items_do_not_count_whatever_they_hold(function, kind, filling):
    logits, mask = draw(3, 6, 5, seed=1), mask_for(kind, 6, 5)
    spoilt = logits.clone()
    spoilt[:, ~mask] = filling
    spoilt[0, ~mask] = 1.0
    assert torch.equal(function(spoilt, mask, kind), function(logits, mask, kind))
    grad = gradient(function, spoilt, mask, kind)
    assert torch.equal(grad, gradient(function, logits, mask, kind)) and not grad[:, ~mask].any()


@pytest.mark.parametrize(("function", "kind"), CASES)
def test_no_valid_item_gives_zero_and_zero_gradient(function, kind):
    logits, mask = draw(2, 6, 5), torch.zeros_like(mask_for(kind, 6, 5))
    assert function(logits, mask, kind).item() == 0
    assert torch.all(gradient(function, logits, mask, kind) == 0)
    assert function(torch.zeros(2, 0, 5), None, kind).item() == 0


@pytest.mark.parametrize("function", OUTPUT_AGREEMENTS.values(), ids=OUTPUT_AGREEMENTS)
def test_minus_infinity_in_all_passes_is_a_class_without_probability(function):
    logits = draw(3, 6, 5, seed=1)
    factor = 4 / 5 if function is squared_logits else 1  # it counts in the mean over the classes
    expected = function(logits[..., :4], None, SINGLE) * factor
    logits[..., 4] = -math.inf
    torch.testing.assert_close(function(logits, None, SINGLE), expected)
    grad = gradient(function, logits, None, SINGLE)
    assert grad.isfinite().all() and torch.all(grad[..., 4] == 0)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("function", OUTPUT_AGREEMENTS.values(), ids=OUTPUT_AGREEMENTS)
def test_infinite_scores_in_all_passes_of_a_multi_label_head_agree(function, infinity):
    logits = draw(3, 6, 5, seed=1)
    mask = torch.arange(30).view(6, 5) != 7
    expected = function(logits, mask, MULTI) * 29 / 30
    logits[:, 1, 2] = infinity
    torch.testing.assert_close(function(logits, None, MULTI), expected)
    grad = gradient(function, logits, None, MULTI)
    assert grad.isfinite().all() and torch.all(grad[:, 1, 2] == 0)


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_minus_infinity_in_one_pass_only(kind):
    """A class that one pass excludes: infinitely far by its logarithm, at a finite distance by its probability."""
    logits = draw(2, 3, 4, seed=1)
    later, earlier = logits.clone(), logits.clone()
    later[1, 0, 0] = earlier[0, 0, 0] = -math.inf
    for excluded in (later, earlier):
        assert squared_logits(excluded, None, kind) == math.inf
        assert not symmetric_kl(excluded, None, kind).isfinite()
        for function in NO_REGRESSION:
            near = function(excluded.clamp(min=-1e4), None, kind)  # the limit
            torch.testing.assert_close(function(excluded, None, kind), near)
            assert near < 2 and gradient(function, excluded, None, kind).isfinite().all()
    assert one_sided_kl(later, None, kind) == math.inf
    near = one_sided_kl(earlier.clamp(min=-1e4), None, kind)
    torch.testing.assert_close(one_sided_kl(earlier, None, kind), near)
    assert near < 10 and gradient(one_sided_kl, earlier, None, kind).isfinite().all()


@pytest.mark.parametrize(("function", "kind"), CASES)
def test_nan_in_a_valid_item_is_not_hidden(function, kind):
    logits = draw(2, 3, 4)
    logits[1, 2, 0] = math.nan
    assert function(logits, None, kind).isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("function", "kind"), DISTRIBUTIONS)
def test_huge_logits_give_finite_values_and_gradients(function, kind, dtype):
    logits = draw(2, 8, 5, seed=1, scale=1.5e4, dtype=dtype)
    value, grad = function(logits, None, kind), gradient(function, logits, None, kind)
    assert value.isfinite() and grad.isfinite().all()
    expected = function(logits.double(), None, kind)
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-4, atol=0)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("function", "kind"), CASES)
def test_low_precision_logits_are_compared_in_float32(function, kind, dtype):
    logits = draw(3, 64, 50, seed=1, dtype=dtype)
    value = function(logits, None, kind)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(function(logits.double(), None, kind).item(), rel=1e-5)
    grad, exact = gradient(function, logits, None, kind), gradient(function, logits.double(), None, kind)
    assert grad.dtype == dtype
    assert (grad - exact).norm() / exact.norm() < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[
        dtype
    ]


def almost_equal_passes(classes):
    """bfloat16 logits half of which differ by the least there is: KL around 1e-6."""
    a = draw(16, classes, seed=1, scale=0.4, dtype=torch.bfloat16)
    return torch.stack((a, torch.where(draw(16, classes, seed=2) > 0, a * (1 + 2**-7), a)))


@pytest.mark.parametrize("classes", [2, 50, 4000])
@pytest.mark.parametrize(("function", "kind"), DISTRIBUTIONS)
def test_small_disagreements_keep_their_digits(function, kind, classes):
    logits = almost_equal_passes(classes)
    exact = function(logits.double(), None, kind).item()
    assert 1e-10 < exact < 3e-6
    assert function(logits, None, kind).item() == pytest.approx(exact, rel=1e-4)
    grad, exact_grad = (gradient(function, x, None, kind) for x in (logits.float(), logits.double()))
    assert (grad - exact_grad).norm() / exact_grad.norm() < 2e-3


def test_small_disagreements_are_hard():
    """The definitions as they stand, in float32, miss the values of the test above by far more than it allows.

    By item: in a mean over items the errors may cancel, which depends on the processor.
    """

    def by_definition(logits):
        log_p, log_q = logits.log_softmax(-1)
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return kl, (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2

    logits = almost_equal_passes(50)
    rough, exact = by_definition(logits.float()), by_definition(logits.double())
    for values, wanted, function in zip(rough, exact, (one_sided_kl, jensen_shannon), strict=True):
        assert function(logits.double(), None, SINGLE).item() == pytest.approx(wanted.mean().item(), rel=1e-6)
        assert (values - wanted).norm() > 1e-3 * wanted.norm()


@pytest.mark.parametrize(("function", "kind"), CASES)
def test_float16_gradients_survive_a_loss_scale(function, kind):
    logits = draw(2, 4096, 8, seed=1, scale=0.05, dtype=torch.float16)

    def scaled(z, mask, kind):
        return function(z, mask, kind) * 2.0**16

    grad, exact = gradient(scaled, logits, None, kind), gradient(scaled, logits.double(), None, kind)
    assert (grad.double() - exact).norm() / exact.norm() < 2e-3


# How the agreements compare (the conversion table of the README)


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_nearby_distributions_one_sided_is_symmetric_and_jensen_shannon_a_quarter(kind):
    a = draw(20, 5, seed=1)
    for size, tolerance in ((0.1, 0.05), (0.001, 5e-4)):
        logits = torch.stack((a, a + draw(20, 5, seed=2, scale=size)))
        kl = symmetric_kl(logits, None, kind).item()
        assert one_sided_kl(logits, None, kind).item() == pytest.approx(kl, rel=tolerance)
        assert 4 * jensen_shannon(logits, None, kind).item() == pytest.approx(kl, rel=tolerance)
    # The same value, but one of two gradients: the later pass gets what it gets from symmetric KL, the earlier none.
    both, one = (gradient(function, logits, None, kind) for function in (symmetric_kl, one_sided_kl))
    assert (one[1] - both[1]).norm() / both[1].norm() < 2e-3 and torch.all(one[0] == 0)
    assert (both[0] + both[1]).norm() / both[1].norm() < 2e-3


def test_squared_distances_of_evenly_spread_distributions():
    change = draw(50, 4, seed=1, scale=1e-3)
    change -= change.mean(-1, keepdim=True)
    logits = torch.stack((torch.zeros_like(change), change))
    kl = symmetric_kl(logits, None, SINGLE).item()
    assert squared_logits(logits, None, SINGLE).item() == pytest.approx(2 * kl, rel=1e-2)
    assert squared_probabilities(logits, None, SINGLE).item() == pytest.approx(2 * kl / 4, rel=1e-2)
    kl = symmetric_kl(logits, None, MULTI).item()
    assert squared_logits(logits, None, MULTI).item() == pytest.approx(8 * kl, rel=1e-2)
    assert squared_probabilities(logits, None, MULTI).item() == pytest.approx(kl / 2, rel=1e-2)


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_bounds_between_the_agreements(scale):
    for seed in range(30):
        logits = draw(2, 1, 4, seed=seed, scale=scale)
        kl, js, squared_z, squared_p = (
            function(logits, None, SINGLE).item()
            for function in (symmetric_kl, jensen_shannon, squared_logits, squared_probabilities)
        )
        assert js <= min(kl / 4, math.log(2)) * (1 + 1e-9)
        assert squared_p <= min(kl, 2) * (1 + 1e-9)
        assert squared_z >= 4 * kl / 4 * (1 - 1e-9)  # 4 sKL / C
        kl, js, squared_z, squared_p = (
            function(logits, None, MULTI).item()
            for function in (symmetric_kl, jensen_shannon, squared_logits, squared_probabilities)
        )
        assert js <= min(kl / 4, math.log(2)) * (1 + 1e-9)
        assert squared_p <= min(kl / 2, 1) * (1 + 1e-9)
        assert squared_z >= 8 * kl * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jensen_shannon_reaches_its_bound_where_the_passes_share_no_class(dtype):
    logits = torch.tensor([[[1e4, 0, -1e4]], [[0, 1e4, -1e4]]], dtype=dtype)
    assert jensen_shannon(logits, None, SINGLE).item() == pytest.approx(math.log(2), rel=1e-6)
    assert squared_probabilities(logits, None, SINGLE).item() == 2


# Hidden states


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("m", [2, 3])
def test_hidden_states_are_compared_layer_by_layer(m, masked):
    layers = [draw(m * 4, 5, 6, seed=seed) for seed in range(3)]
    mask = (torch.arange(20).view(4, 5) % 3 != 1).int() if masked else None
    expected = []
    for layer in layers:
        by_pass = layer.view(m, 4, 5, 6)
        for i, j in pairs(m):
            for row in range(4):
                for token in range(5):
                    if mask is None or mask[row, token]:
                        expected += (by_pass[i, row, token] - by_pass[j, row, token]).square().tolist()
    value = hidden_state_agreement(layers, m, mask)
    assert value.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    inputs = [layer.requires_grad_() for layer in layers]
    assert torch.autograd.gradcheck(lambda *layers: hidden_state_agreement(layers, m, mask), inputs)


def test_hidden_states_of_padding_do_not_count_whatever_they_hold():
    layers = [draw(4, 3, 6, seed=seed) for seed in (1, 2)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = hidden_state_agreement(layers, 2, mask)
    for layer in layers:
        layer.view(2, 2, 3, 6)[0, mask == 0] = math.nan
        layer.requires_grad_()
    value = hidden_state_agreement(layers, 2, mask)
    assert torch.equal(value, expected)
    value.backward()
    assert all(layer.grad.isfinite().all() and layer.grad.abs().sum() > 0 for layer in layers)
    assert hidden_state_agreement(layers, 2, torch.zeros_like(mask)).item() == 0


def test_hidden_states_may_differ_in_shape_and_precision():
    layers = [draw(4, 2, 2, 6, dtype=torch.bfloat16), draw(4, 1, 1, 12, seed=1, dtype=torch.bfloat16)]
    value = hidden_state_agreement(layers, 2)
    expected = [(layer.double()[:2] - layer.double()[2:]).square().mean() for layer in layers]
    assert value.dtype == torch.float32 and value.item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)


def test_hidden_states_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        hidden_state_agreement([], 2)
    with pytest.raises(ValueError, match=r"2 and 4 rows.*Leave out the layers that the passes share"):
        hidden_state_agreement([torch.zeros(2, 3, 6), torch.zeros(4, 3, 6)], 2)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 3\).*before it was repeated"):
        hidden_state_agreement([torch.zeros(4, 3, 6)], 2, torch.ones(4, 3))
    with pytest.raises(ValueError, match="at least two passes"):
        hidden_state_agreement([torch.zeros(4, 3, 6)], 1)
    with pytest.raises(ValueError, match="5 rows for a batch repeated 2 times"):
        hidden_state_agreement([torch.zeros(5, 3, 6)], 2)


# Errors, and the text of an agreement


@pytest.mark.parametrize("function", NO_REGRESSION)
def test_predictions_without_probabilities_are_refused(function):
    with pytest.raises(ValueError, match=f"'{name_of(function)}'.*Use 'symmetric_kl' or 'squared_logits'"):
        function(torch.zeros(2, 3), None, REGRESSION)


@pytest.mark.parametrize(("function", "kind"), CASES)
def test_shapes_that_do_not_fit_are_refused(function, kind):
    with pytest.raises(ValueError, match="at least two passes"):
        function(torch.zeros(1, 4, 3), None, kind)
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        function(torch.zeros(2, 4, 3), torch.ones(3), kind)
    with pytest.raises(ValueError, match=r"Unknown problem type 'ranking'.*single_label_classification"):
        function(torch.zeros(2, 4, 3), None, "ranking")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("symmetric_kl", [("symmetric_kl", 1.0)]),
        ("symmetric_kl + 0.1 * hidden_states", [("symmetric_kl", 1.0), ("hidden_states", 0.1)]),
        (" 2*info_nce+.5*one_sided_kl ", [("info_nce", 2.0), ("one_sided_kl", 0.5)]),
        ("1e+3 * squared_probabilities + 1E-2*info_nce", [("squared_probabilities", 1000.0), ("info_nce", 0.01)]),
        ("info_nce+1.e+1*jensen_shannon", [("info_nce", 1.0), ("jensen_shannon", 10.0)]),
    ],
)
def test_an_agreement_is_read(text, expected):
    assert parse_agreement(text) == tuple(Term(*pair) for pair in expected)


def test_every_name_is_read_alone_and_all_together():
    for name in TERMS:
        assert parse_agreement(name) == (Term(name, 1.0),)
    assert [term.name for term in parse_agreement("+".join(TERMS))] == list(TERMS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is no agreement"),
        ("symmetric_kl +", "'' is no agreement"),
        ("simmetric_kl", "'simmetric_kl' is no agreement .did you mean 'symmetric_kl'"),
        ("symmetric-kl", "did you mean 'symmetric_kl'"),
        ("0.1 * hidden_state", "did you mean 'hidden_states'"),
        ("infonce", "did you mean 'info_nce'"),
        ("banana", "'banana' is no agreement. Write names"),
        ("symmetric_kl hidden_states", "is no agreement"),
        ("symmetric_kl - 0.1 * hidden_states", "factor 'symmetric_kl - 0.1'"),
        ("hidden_states * 0.1", "'0.1' is no agreement"),
        ("0 * symmetric_kl", "factor '0' of 'symmetric_kl' is no finite number above 0"),
        ("-1 * symmetric_kl", "factor '-1'"),
        ("nan * symmetric_kl", "factor 'nan'"),
        ("inf * symmetric_kl", "factor 'inf'"),
        ("ten * symmetric_kl", "factor 'ten'"),
        ("* symmetric_kl", "factor ''"),
        ("2 * 3 * symmetric_kl", r"factor '2 \* 3'"),
        ("symmetric_kl + 2 * symmetric_kl", "'symmetric_kl' comes twice"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_names_there_are(text, complaint):
    with pytest.raises(ValueError, match=f"cannot be read: .*{complaint}") as error:
        parse_agreement(text)
    assert all(name in str(error.value) for name in TERMS) and "0.1 * hidden_states" in str(error.value)
