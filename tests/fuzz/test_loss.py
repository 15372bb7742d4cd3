"""Agreements, RDropLoss and the fused loss on drawn shapes, dtypes, masks and extreme scores.

The reference is a float64 loop over the pairs of passes, with autograd for the gradients.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rdrop.functional import AGREEMENTS, bernoulli_agreement, softmax_agreement, squared_agreement, symmetric_kl
from hf_rdrop.fused import linear_rdrop_loss
from hf_rdrop.loss import RDropLoss
from support.fuzzing import DTYPES, ITEMS, cases, normal, subset

SOFTMAX, BERNOULLI, SQUARED = AGREEMENTS
SCALES = [1e-4, 1.0, 30.0, 1e4]


def reference(kind, logits, mask=None):
    """The mean over pairs and valid items, in float64, with -inf - -inf counted as agreement."""
    logits = logits.double()
    pairs, values = list(itertools.combinations(range(len(logits)), 2)), 0.0
    for i, j in pairs:
        a, b = logits[i], logits[j]
        if kind == SOFTMAX:
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            gone = (p == -math.inf) & (q == -math.inf)
            p, q = p.masked_fill(gone, 0), q.masked_fill(gone, 0)
            values = values + 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1)
        elif kind == BERNOULLI:
            values = values + 0.5 * (a.sigmoid() - b.sigmoid()) * (a - b)
        else:
            values = values + (a - b).square()
    values = values / len(pairs)
    kept = values if mask is None else values[mask.bool()]
    return kept.sum() / max(kept.numel(), 1)


@st.composite
def scores(draw, kind=None, scales=SCALES, least_items=0, equal=False):
    """(kind, logits of m passes, mask): the mask may be missing, and is of any type that holds 0 and 1."""
    kind = kind or draw(st.sampled_from([SOFTMAX, BERNOULLI, SQUARED]))
    items = draw(st.sampled_from([shape for shape in ITEMS if math.prod(shape) >= least_items]))
    shape = (*items, draw(st.integers(1, 6)))
    m, dtype, scale = draw(st.integers(2, 4)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(scales))
    common = normal(draw, *shape, scale=scale)
    apart = 0.0 if equal else draw(st.sampled_from([0.0, 1e-3, 1.0]))
    logits = (common + apart * normal(draw, m, *shape, scale=scale)).to(dtype)
    if kind == SOFTMAX and shape[-1] > 1 and draw(st.booleans()):
        logits[..., draw(st.integers(0, shape[-1] - 1))] = -math.inf  # a class that no pass may choose
    mask = None
    if draw(st.booleans()):
        mask = subset(draw, *(items if kind == SOFTMAX else shape))
        mask = mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))
    return kind, logits, mask


def value_and_gradient(function, logits, *more):
    logits = logits.clone().requires_grad_()
    value = function(logits, *more)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def magnitude(tensor):
    finite = tensor.double()[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_near(actual, expected, size, dtype, precise, power=1):
    """Within the rounding of the computation (`precise`) for scores of this size, and that of the result's type."""
    eps = torch.finfo(precise).eps
    unit = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny if dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=2 * unit + 64 * eps, atol=64 * eps * (1 + size) ** power + smallest
    )


@cases(120)
@given(scores())
def test_agreements_equal_the_float64_loop(drawn):
    kind, logits, mask = drawn
    kept, kept_mask = logits.clone(), None if mask is None else mask.clone()
    value, gradient = value_and_gradient(AGREEMENTS[kind], logits, mask)
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert value.dtype == precise and gradient.dtype == logits.dtype
    assert value.isfinite() and gradient.isfinite().all()
    # Never negative, but for the rounding of three passes or more.
    assert value >= (0 if len(logits) == 2 else -1e-6 * (1 + magnitude(logits)))
    expected = value_and_gradient(lambda x: reference(kind, x, mask), logits.double())
    power = 2 if kind == SQUARED else 1
    assert_near(value, expected[0], magnitude(logits), precise, precise, power)
    assert_near(gradient, expected[1], magnitude(logits), logits.dtype, precise)
    assert torch.equal(logits, kept) and (mask is None or torch.equal(mask, kept_mask))
    if kind == SOFTMAX and len(logits) == 2:
        torch.testing.assert_close(symmetric_kl(*logits, mask), value)


@cases(80)
@given(scores(scales=[1.0, 30.0]), st.randoms(use_true_random=False))
def test_order_and_shift_of_the_scores_do_not_matter(drawn, random):
    kind, logits, mask = drawn
    value = AGREEMENTS[kind](logits.double(), mask)
    order = random.sample(range(len(logits)), len(logits))
    torch.testing.assert_close(AGREEMENTS[kind](logits.double()[order], mask), value)
    if logits.dim() > 2:
        rows = random.sample(range(logits.shape[1]), logits.shape[1])
        permuted = AGREEMENTS[kind](logits.double()[:, rows], None if mask is None else mask[rows])
        torch.testing.assert_close(permuted, value)
    if kind == SOFTMAX:
        shifts = torch.tensor([random.uniform(-9, 9) for _ in range(len(logits))], dtype=torch.float64)
        shifted = logits.double() + shifts.view(-1, *[1] * (logits.dim() - 1))
        torch.testing.assert_close(softmax_agreement(shifted, mask), value, atol=1e-10, rtol=1e-8)


@cases(40)
@given(scores(equal=True))
def test_equal_passes_agree_exactly(drawn):
    kind, logits, mask = drawn
    if len(logits) == 3:
        return  # a mean of three equal numbers may be rounded
    value, gradient = value_and_gradient(AGREEMENTS[kind], logits, mask)
    assert value == 0 and not gradient.any()


@cases(80)
@given(scores(least_items=1), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]), st.data())
def test_masked_items_have_no_influence(drawn, filling, data):
    kind, logits, _ = drawn
    mask = subset(data.draw, *(logits.shape[1:-1] if kind == SOFTMAX else logits.shape[1:]))
    changed = logits.clone()
    where = ~(mask[..., None] if kind == SOFTMAX else mask).expand(logits.shape[1:])
    changed[data.draw(st.integers(0, len(logits) - 1))][where] = torch.tensor(filling).to(logits.dtype)
    before = value_and_gradient(AGREEMENTS[kind], logits, mask)
    after = value_and_gradient(AGREEMENTS[kind], changed, mask)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not after[1][:, where].any()


@cases(60)
@given(scores(least_items=1), st.data())
def test_what_is_not_finite_shows(drawn, data):
    """nan comes out as nan, and a class that one pass alone rules out is infinite."""
    kind, logits, _ = drawn
    place = tuple(data.draw(st.integers(0, size - 1)) for size in logits.shape)
    logits = logits.masked_fill(logits.isinf(), 0)
    broken = logits.clone()
    broken[place] = math.nan
    value, gradient = value_and_gradient(AGREEMENTS[kind], broken)
    assert value.isnan() and gradient[place].isnan()
    if kind == BERNOULLI or (kind == SOFTMAX and logits.shape[-1] > 1):
        broken = logits.float().clamp(-9, 9)
        broken[place] = -math.inf
        value = AGREEMENTS[kind](broken)
        assert value == math.inf if kind == SOFTMAX and len(logits) == 2 else not value.isfinite()


shapes = st.lists(st.integers(0, 4), max_size=4)


@cases(80)
@given(shapes, shapes, shapes, st.sampled_from([softmax_agreement, bernoulli_agreement, squared_agreement, None]))
def test_any_shapes_are_computed_or_refused(a, b, mask, function):
    """`None`: symmetric_kl of two passes."""
    mask = torch.ones(mask)
    arguments = (torch.zeros(a), mask) if function else (torch.zeros(a), torch.zeros(b), mask)
    try:
        value = (function or symmetric_kl)(*arguments)
    except ValueError as error:
        assert len(str(error)) > 40 and "shape" in str(error)
        return
    assert value == 0 and value.shape == ()
    assert list(mask.shape) == (a[:-1] if function is None else a[1:-1] if function is softmax_agreement else a[1:])


# ---- Loss and fused loss ----


def head_reference(logits, labels, alpha, smoothing):
    """Loss of `[m, N, C]` float64 scores by loops; labels [N]."""
    kept = logits[:, labels != -100]
    if kept.shape[1] == 0:
        return (logits * 0).sum()
    logs = kept.log_softmax(-1)
    target = labels[labels != -100].long()
    picked = torch.stack([pass_logs[range(len(target)), target] for pass_logs in logs])
    ce = -(1 - smoothing) * picked.mean() - smoothing * logs.mean()
    return ce + alpha / 2 * (reference(SOFTMAX, kept) if len(kept) > 1 else 0)


@st.composite
def labelled(draw, least_passes=2):
    """Passes, item shape, number of classes, labels (any integer type), alpha and smoothing."""
    items = draw(st.sampled_from([shape for shape in ITEMS if shape]))
    classes = draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    labels = torch.randint(0, classes, items, generator=generator)
    labels = labels.masked_fill(~subset(draw, *items), -100).to(draw(st.sampled_from([torch.int64, torch.int32])))
    alpha, smoothing = draw(st.sampled_from([0.0, 0.5, 5.0, 1000.0])), draw(st.sampled_from([0.0, 0.1, 0.9]))
    return draw(st.integers(least_passes, 4)), items, classes, labels, alpha, smoothing


@cases(80)
@given(labelled(), st.sampled_from(DTYPES), st.sampled_from(SCALES), st.data())
def test_the_loss_equals_the_float64_loop(drawn, dtype, scale, data):
    m, items, classes, labels, alpha, smoothing = drawn
    logits = normal(data.draw, m, *items, classes, scale=scale, dtype=dtype)
    loss_function = RDropLoss(alpha, label_smoothing=smoothing)

    def loss(x):
        return loss_function(x[0], x[1], labels, *x[2:]).loss

    value, gradient = value_and_gradient(loss, logits)
    expected = value_and_gradient(
        lambda x: head_reference(x.flatten(1, -2), labels.flatten(), alpha, smoothing), logits.double()
    )
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.isfinite() and gradient.isfinite().all()
    assert_near(value, expected[0], (1 + alpha) * magnitude(logits), precise, precise)
    assert_near(gradient, expected[1], (1 + alpha) * magnitude(logits), dtype, precise)
    spoilt = logits.masked_fill((labels == -100)[..., None], math.nan)
    again, gradient_again = value_and_gradient(loss, spoilt)
    assert torch.equal(value, again) and torch.equal(gradient, gradient_again)


@cases(40)
@given(st.sampled_from([BERNOULLI, SQUARED]), st.sampled_from(ITEMS), st.integers(1, 4), st.data())
def test_the_loss_of_the_other_heads(kind, items, classes, data):
    logits = normal(data.draw, 2, *items, classes, scale=data.draw(st.sampled_from(SCALES)), dtype=torch.float64)
    labels = normal(data.draw, *items, classes).sigmoid().round()
    loss, ce, kl = RDropLoss(2.0, kind)(*logits, labels)
    assert loss.isfinite() and loss >= 0
    if not labels.numel():
        assert loss == 0
        return
    p = logits if kind == SQUARED else None
    expected = (p - labels).square() if kind == SQUARED else torch.logaddexp(logits * 0, logits) - labels * logits
    torch.testing.assert_close(ce, expected.mean())
    torch.testing.assert_close(kl, reference(kind, logits))
    torch.testing.assert_close(loss, ce + kl)


@cases(120)
@given(labelled(least_passes=1), st.sampled_from(DTYPES), st.sampled_from([1e-3, 1.0, 30.0]), st.data())
def test_the_fused_loss_equals_the_float64_loop(drawn, dtype, scale, data):
    m, items, vocabulary, labels, alpha, smoothing = drawn
    width = data.draw(st.integers(1, 5))
    hidden = normal(data.draw, m * items[0], *items[1:], width, scale=scale, dtype=dtype)
    weight = normal(data.draw, vocabulary, width, dtype=dtype)
    bias = normal(data.draw, vocabulary, dtype=dtype) if data.draw(st.booleans()) else None
    chunk_bytes = data.draw(st.sampled_from([None, 1, 64, 4096]))
    kept = hidden.clone(), weight.clone(), labels.clone()
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]

    def fused(hidden, weight, bias=None):
        return linear_rdrop_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            alpha=alpha,
            label_smoothing=smoothing,
            passes=m,
            chunk_bytes=chunk_bytes,
        )

    def plain(hidden, weight, bias=None):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        return head_reference(logits.view(m, -1, vocabulary), labels.flatten(), alpha, smoothing)

    loss, ce, kl = fused(*leaves)
    gradients = torch.autograd.grad(loss, leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = plain(*exact)
    expected_gradients = torch.autograd.grad(expected, exact)
    assert all(x.isfinite().all() for x in (loss, ce, kl, *gradients))
    # The logits are rounded to the type of the product, as in a plain head.
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    size = (hidden.double().abs() @ weight.double().abs().T).max().item() if hidden.numel() else 0.0
    error = 16 * torch.finfo(dtype).eps * (1 + size) * (1 + alpha)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=16 * torch.finfo(precise).eps, atol=error)
    for actual, wanted, other in zip(gradients, expected_gradients, (weight, hidden, hidden), strict=False):
        step = error * (1 + size) * (1 + magnitude(other))
        torch.testing.assert_close(actual.double(), wanted, rtol=16 * torch.finfo(dtype).eps, atol=step)
    assert all(torch.equal(a, b) for a, b in zip(kept, (hidden, weight, labels), strict=True))
    flat = hidden.reshape(m, -1, width).clone()
    flat[:, labels.flatten() == -100] = math.nan
    again = fused(flat.view_as(hidden), weight, bias)
    assert torch.equal(again.loss, loss.detach())


@cases(80)
@given(shapes, shapes, shapes, st.none() | shapes, st.integers(-1, 4), st.sampled_from([0, 9, -1, -100]))
def test_any_shapes_of_the_fused_loss_are_computed_or_refused(hidden, weight, labels, bias, passes, label):
    tensors = torch.zeros(hidden), torch.zeros(weight), torch.full(labels, label)
    bias = None if bias is None else torch.zeros(bias)
    try:
        loss = linear_rdrop_loss(*tensors, bias=bias, alpha=1.0, passes=passes).loss
    except ValueError as error:
        assert len(str(error)) > 40
        return
    assert hidden == [passes * labels[0], *labels[1:], weight[1]] and (bias is None or len(bias) == weight[0])
    counted = label == 0 and math.prod(labels) > 0
    assert loss.item() == pytest.approx(math.log(weight[0]) if counted else 0)


@cases(60)
@given(shapes, shapes, st.sampled_from(list(AGREEMENTS)), st.sampled_from([0, 0.5, 9, -1, -100]))
def test_any_shapes_of_the_loss_are_computed_or_refused(logits, labels, kind, label):
    try:
        loss = RDropLoss(1.0, kind)(torch.zeros(logits), torch.zeros(logits), torch.full(labels, label)).loss
    except ValueError as error:
        assert len(str(error)) > 40
        return
    assert loss.isfinite() and labels in (logits, logits[:-1])
    if kind == SOFTMAX:
        assert label in (0, -100) or 0 in labels


@cases(40)
@given(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1.0, "much", None, True]))
def test_alpha_and_smoothing_out_of_range(value):
    for arguments in ({"alpha": value}, {"label_smoothing": value}):
        if value in (None, "much") and "label_smoothing" in arguments:
            continue
        good = arguments == {"alpha": 1.0} and value is not True
        head = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0])
        for call in (lambda a: RDropLoss(**a), lambda a, head=head: linear_rdrop_loss(*head, **{"alpha": 1.0, **a})):
            if good:
                call(arguments)
            else:
                with pytest.raises(ValueError, match="must be"):
                    call(arguments)
