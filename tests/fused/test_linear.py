"""The loss from hidden states and head weight: against the naive float64 reference, never with the full logits."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarking.measure import peak_bytes
from hf_rdrop import RDropLoss
from hf_rdrop.functional import softmax_agreement
from hf_rdrop.fused import blocks as fused_blocks
from hf_rdrop.fused import linear as fused_linear
from hf_rdrop.fused import linear_rdrop_loss
from support.reference import torch_reference


def make_case(passes=2, items=7, width=5, vocabulary=11, dtype=torch.float64, bias=True, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    labels = torch.randint(0, vocabulary, (items,), generator=generator)
    labels[torch.rand(items, generator=generator) < ignored] = -100
    return draw(passes * items, width), draw(vocabulary, width, scale=0.5), draw(vocabulary) if bias else None, labels


def copies(*tensors):
    """The same values as leaves of their own, in float64."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def reference(hidden, weight, bias, labels, alpha, smoothing=0.0, passes=2):
    """Loss, CE, KL and gradients in float64 by naive loops over the full logits."""
    leaves = copies(hidden, weight, bias)
    logits = F.linear(*leaves).view(passes, len(labels), -1)
    if passes == 1:
        ce = torch_reference(torch.cat((logits, logits)), labels, 0.0, smoothing=smoothing)[1]
        values = (ce, ce, torch.zeros_like(ce))
    else:
        values = torch_reference(logits, labels, alpha, smoothing=smoothing)
    return values, torch.autograd.grad(values[0], [leaf for leaf in leaves if leaf is not None])


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def values_and_gradients(hidden, weight, bias, labels, **args):
    ours = linear_rdrop_loss(hidden, weight, labels, bias=bias, **args)
    return (*ours, *gradients(ours.loss, hidden, weight, bias))


def relative_error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("chunk_bytes", [None, 1, 400])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_value_and_gradients_are_the_reference(passes, smoothing, chunk_bytes):
    """Whole, one item a chunk, and chunks that do not divide the items."""
    hidden, weight, bias, labels = make_case(passes)
    args = {"alpha": 3.0, "label_smoothing": smoothing, "passes": passes, "chunk_bytes": chunk_bytes}
    found = values_and_gradients(hidden, weight, bias, labels, **args)
    values, grads = reference(hidden, weight, bias, labels, 3.0, smoothing, passes)
    for a, b in zip(found, (*values, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gradcheck_with_chunks_and_ignored_items():
    hidden, weight, bias, labels = make_case(items=4, width=3, vocabulary=5)
    labels[1] = -100

    def loss(hidden, weight, bias):
        return linear_rdrop_loss(
            hidden, weight, labels, bias=bias, alpha=2.0, label_smoothing=0.1, chunk_bytes=100
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("seed", range(30))
def test_fuzzed_shapes_masks_and_smoothing(seed):
    """Any shape, also one class, no item, everything ignored, positions of a sequence."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    passes, rows, length, width, vocabulary = draw(1, 4), draw(1, 5), draw(1, 6), draw(1, 9), draw(1, 40)
    smoothing, alpha = (0.0, 0.2)[draw(0, 2)], float(draw(0, 6))
    ignored = (0.0, 0.5, 1.0)[draw(0, 3)]
    hidden, weight, bias, labels = make_case(
        passes, rows * length, width, vocabulary, bias=bool(draw(0, 2)), ignored=ignored, seed=seed
    )
    ours = linear_rdrop_loss(
        hidden.view(passes * rows, length, width),
        weight,
        labels.view(rows, length),
        bias=bias,
        alpha=alpha,
        label_smoothing=smoothing,
        passes=passes,
        chunk_bytes=draw(1, 4000),
    )
    values, grads = reference(hidden, weight, bias, labels, alpha, smoothing, passes)
    for a, b in zip((*ours, *gradients(ours.loss, hidden, weight, bias)), (*values, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["float32", "bfloat16", "float16", "autocast bfloat16", "autocast float16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_less_exact_than_the_plain_path(how, smoothing):
    """Beside float64, the errors of loss and gradients are no larger than those of RDropLoss on the full logits."""
    dtype = torch.float32 if how.startswith("autocast") else getattr(torch, how)
    autocast = torch.autocast("cpu", getattr(torch, how.split()[-1]), enabled=how.startswith("autocast"))
    hidden, weight, bias, labels = make_case(2, 96, 32, 500, dtype)
    with torch.no_grad():
        hidden[96:] = hidden[:96] + 0.3 * hidden[96:]
    values, grads = reference(hidden, weight, bias, labels, 5.0, smoothing)

    with autocast:
        ours = linear_rdrop_loss(
            hidden, weight, labels, bias=bias, alpha=5.0, label_smoothing=smoothing, chunk_bytes=2**16
        )
        logits = F.linear(hidden, weight, bias).view(2, 96, -1)
    plain = RDropLoss(5.0, label_smoothing=smoothing)(*logits, labels)
    floor = 1e-6 if how == "float32" else 1e-4  # of rounding the loss itself
    for name, a, b, exact in zip(("loss", "ce", "kl"), ours, plain, values, strict=True):
        assert relative_error(a, exact) <= 1.5 * relative_error(b, exact) + floor, name
    scale = 2.0**10  # as a gradient scaler does for float16
    our_grads = [grad / scale for grad in gradients(ours.loss * scale, hidden, weight, bias)]
    plain_grads = [grad / scale for grad in gradients(plain.loss * scale, hidden, weight, bias)]
    for name, a, b, exact in zip(("hidden", "weight", "bias"), our_grads, plain_grads, grads, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, exact) <= 1.2 * relative_error(b, exact) + floor, name


def test_the_sum_over_chunks_is_in_float32():
    """In bfloat16 a running sum stops growing after some 256 equal steps."""
    items = 2048
    hidden = torch.ones(2 * items, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_rdrop_loss(hidden, weight, torch.zeros(items, dtype=torch.long), alpha=1.0, chunk_bytes=1).loss
    (grad,) = gradients(loss, weight)
    assert grad.flatten().tolist() == pytest.approx([-0.5, 0.5], rel=0.01)


class MatrixProducts(TorchDispatchMode):
    """Counts matrix products; FlopCounterMode misses those that add to their output in place."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trainable", "products"), [("hidden", 2), ("weight", 2), ("bias", 1), ("nothing", 1)])
def test_no_gradient_is_computed_that_nobody_needs(trainable, products):
    hidden, weight, bias, labels = make_case(items=64, width=16, vocabulary=300, dtype=torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trainable)
    with MatrixProducts() as counter:
        loss = linear_rdrop_loss(hidden, weight, labels, bias=bias, alpha=1.0).loss
        if trainable != "nothing":
            loss.backward()
    assert counter.count == products
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [trainable] * (trainable != "nothing")


def test_the_full_logits_never_exist():
    """2 x 512 x 20,000 float32 logits are 82 MB; ours peaks at the gradients and one chunk of 16 MiB, and blocks."""
    hidden, weight, bias, labels = make_case(2, 512, 8, 20_000, torch.float32, ignored=0)
    peak = peak_bytes(
        lambda: linear_rdrop_loss(hidden, weight, labels, bias=bias, alpha=1.0).loss.backward(), hidden.device
    )
    assert 2**24 < peak < 4 * 512 * 20_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_class_that_is_forbidden_in_both_passes_changes_nothing(dtype):
    hidden, weight, bias, labels = make_case(dtype=dtype, ignored=0)
    labels.clamp_(max=9)
    with torch.no_grad():
        bias[10] = -torch.inf
    ours = linear_rdrop_loss(hidden, weight, labels, bias=bias, alpha=2.0)
    without = linear_rdrop_loss(hidden, weight[:10], labels, bias=bias[:10], alpha=2.0)
    torch.testing.assert_close(ours.loss, without.loss)
    for a, b in zip(gradients(ours.loss, hidden, weight), gradients(without.loss, hidden, weight), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_in_half_precision_is_rounded_once_by_its_factor(dtype):
    grad, factor = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor(0.0123457)
    assert torch.equal(fused_linear._scaled(grad, factor, dtype), (grad.float() * factor).to(dtype))


def test_as_the_passes_agree_the_gradient_stays_exact():
    """The agreement's own gradient (alpha large, CE subtracted) within 0.2% of float64 down to a KL of 1e-6."""
    for noise in (1.0, 0.1, 1e-2, 1e-3):
        hidden, weight, _, labels = make_case(2, 32, 16, 1000, torch.float32, bias=False, ignored=0)
        with torch.no_grad():
            hidden[32:] = hidden[:32] + noise * hidden[32:]
        leaf, exact_leaf = hidden, hidden.detach().double().requires_grad_()
        exact = softmax_agreement(F.linear(exact_leaf, weight.detach().double()).view(2, 32, -1))
        big = linear_rdrop_loss(leaf, weight, labels, alpha=2e4)
        none = linear_rdrop_loss(leaf, weight, labels, alpha=0.0)
        assert relative_error(big.kl, exact) < 2e-3
        grad = (gradients(big.loss, leaf)[0] - gradients(none.loss, leaf)[0]) / 1e4
        assert relative_error(grad, gradients(exact, exact_leaf)[0]) < 2e-3


def test_backward_twice_with_a_kept_graph():
    hidden, weight, bias, labels = make_case()
    loss = linear_rdrop_loss(hidden, weight, labels, bias=bias, alpha=1.0).loss
    once = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss * 3, hidden)[0], 3 * once)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_compiled_block_gives_the_same(smoothing):
    """What accelerators run: compiled, whole chunks, ignored items masked and not taken out."""
    hidden, weight, bias, labels = make_case(2, 24, 8, 130, torch.float32)
    valid, outcomes = labels != -100, []
    for function in (fused_blocks.block_to_gradient, fused_blocks.compiled_block()):
        logits = F.linear(hidden, weight, bias).detach().view(2, 24, -1).clone()
        logits[:, ~valid] = torch.nan  # nothing of an ignored item may count
        outcomes.append((function(logits, labels, valid, 1.5, smoothing, 1.0), logits))
    _, ce, kl = (value.item() for value in reference(hidden, weight, bias, labels, 3.0, smoothing)[0])
    for sums, gradient in outcomes:
        assert (sums / valid.sum()).tolist() == pytest.approx([2 * ce, kl], rel=1e-5)
        assert gradient[:, ~valid].abs().max() == 0
        torch.testing.assert_close(gradient, outcomes[0][1])


def test_where_compiling_fails_the_plain_operations_go_on(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(fused_blocks, "_can_compile", True)
    monkeypatch.setattr(fused_blocks, "compiled_block", lambda: broken)
    hidden, weight, bias, labels = make_case(ignored=0)
    logits = F.linear(hidden, weight, bias).detach().view(2, 7, -1)
    rest = (labels, None, 0.5, 0.0, 1.0)
    expected = fused_blocks.block_to_gradient(logits.clone(), *rest)
    for _ in range(2):
        found = fused_blocks._on_accelerator(logits.clone(), *rest)
        torch.testing.assert_close(found, expected)
    assert caplog.text.count("no Triton here") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1.0}, "alpha must be"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"passes": 3}, "passes=3"),
        ({"labels": torch.tensor([0, 1, 11, 0, 0, 0, 0])}, r"class indices in \[0, 11\)"),
        ({"labels": torch.tensor([0, 1, -1, 0, 0, 0, 0])}, r"class indices in \[0, 11\)"),
        ({"weight": torch.zeros(11, 4)}, "do not fit"),
        ({"bias": torch.zeros(3)}, "do not fit"),
    ],
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, bias, labels = make_case()
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "alpha": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        linear_rdrop_loss(**arguments)


def test_shapes_and_labels_that_would_be_misread():
    hidden, weight, labels = torch.zeros(4, 3), torch.zeros(2, 3), torch.tensor([0, 1])
    for arguments, words in (
        ((hidden, weight, labels, torch.zeros(2, 1)), "do not fit"),  # would be spread over two rows
        ((hidden, weight[:0], labels - 100, None), "do not fit"),
        ((hidden, weight, torch.tensor(0), None), "one row per pass"),
        ((hidden, weight, labels.float(), None), "class indices"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_rdrop_loss(*arguments[:3], bias=arguments[3], alpha=1.0)
    assert linear_rdrop_loss(hidden, weight, labels.int(), alpha=1.0).ce == pytest.approx(0.6931, rel=1e-3)
