"""InfoNCE and pooling against naive float64 loops: values, gradients, precision, edges, bad input."""

import math

import pytest
import torch
from torch import nn

from hf_rdrop.contrastive import POOLINGS, info_nce, info_nce_agreement, pool


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_info_nce(a, b, temperature):
    """-1/B sum_i log(exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t)) of lists of lists, with plain floats."""

    def cosine(x, y):
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))

    total = 0.0
    for i, row in enumerate(a):
        scores = [cosine(row, other) / temperature for other in b]
        total -= scores[i] - math.log(sum(math.exp(score) for score in scores))
    return total / len(a)


def loop_info_nce(a, b, temperature):
    """The same of tensors, for autograd: item by item, without matrices."""
    total = 0.0
    for i in range(len(a)):
        scores = [(a[i] * row).sum() / (a[i] ** 2).sum().sqrt() / (row**2).sum().sqrt() / temperature for row in b]
        total = total - (scores[i] - sum(score.exp() for score in scores).log())
    return total / len(a)


# ---- InfoNCE ----


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(2, 3), (5, 4), (3, 1)])
def test_it_equals_the_loop(shape, temperature):
    a, b = draw(*shape, seed=1), draw(*shape, seed=2)
    expected = naive_info_nce(a.tolist(), b.tolist(), temperature)
    assert info_nce(a, b, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_both_passes_equal_the_loops_and_pass_gradcheck():
    a, b = draw(4, 3, seed=1).requires_grad_(), draw(4, 3, seed=2).requires_grad_()
    ours = torch.autograd.grad(info_nce(a, b, 0.3), (a, b))
    theirs = torch.autograd.grad(loop_info_nce(a, b, 0.3), (a, b))
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().max() > 0.01 for gradient in ours)
    assert torch.autograd.gradcheck(lambda x, y: info_nce(x, y, 0.3), (a, b))


def test_it_is_simcses_direction():
    """Rows of a among rows of b: the other direction is another number, and swapping the passes gives it."""
    a, b = draw(5, 4, seed=1), draw(5, 4, seed=2)
    cosines = nn.functional.cosine_similarity(a[:, None], b[None], dim=-1) / 0.05
    rows, columns = (nn.functional.cross_entropy(scores, torch.arange(5)) for scores in (cosines, cosines.T))
    torch.testing.assert_close(info_nce(a, b), rows)
    torch.testing.assert_close(info_nce(b, a), columns)
    assert abs(rows - columns) > 0.1


def test_lengths_and_the_order_of_the_rows_do_not_matter():
    a, b, order = draw(5, 4, seed=1), draw(5, 4, seed=2), torch.tensor([3, 0, 4, 1, 2])
    lengths = torch.tensor([[1e-6], [0.5], [1.0], [7.0], [1e6]], dtype=torch.float64)
    torch.testing.assert_close(info_nce(a * lengths, b / lengths), info_nce(a, b))
    torch.testing.assert_close(info_nce(a[order], b[order]), info_nce(a, b))
    assert abs(info_nce(a, b[order]) - info_nce(a, b)) > 0.1


def test_known_values():
    eye = torch.eye(3)
    assert info_nce(eye, eye, 1.0).item() == pytest.approx(math.log(1 + 2 * math.exp(-1)))
    same = torch.ones(7, 3)
    assert info_nce(same, same).item() == pytest.approx(math.log(7))  # nothing tells the rows apart
    assert info_nce(eye, eye).item() < 1e-8


@pytest.mark.parametrize("zeros", ["one row", "all of one pass", "everything"])
def test_zero_vectors_are_finite_with_finite_gradients(zeros):
    a, b = draw(4, 3, seed=1, dtype=torch.float32), draw(4, 3, seed=2, dtype=torch.float32)
    a[0 if zeros == "one row" else slice(None)] = 0
    if zeros == "everything":
        b.zero_()
    a.requires_grad_(), b.requires_grad_()
    loss = info_nce(a, b)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all() and b.grad.isfinite().all()
    assert a.grad.abs().max() < 100 and b.grad.abs().max() < 100
    if zeros != "one row":
        assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    a, b = (draw(16, 32, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    value = info_nce(a, b)
    value.backward()
    expected = info_nce(a.double(), b.double())
    assert value.dtype == torch.float32 and a.grad.dtype == b.grad.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    half = nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T / 0.05
    rounded = nn.functional.cross_entropy(half, torch.arange(16))
    assert abs(rounded.double() - expected) > 100 * abs(value.double() - expected)  # so the test could fail


def test_autocast_does_not_round_the_similarities():
    a, b = draw(16, 32, seed=1, dtype=torch.float32), draw(16, 32, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b.T).dtype == torch.bfloat16
        value = info_nce(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, info_nce(a, b), rtol=0, atol=0)


def test_training_on_it_separates_the_rows():
    weights = draw(6, 4, seed=1, dtype=torch.float32).requires_grad_()
    optimizer, noise = torch.optim.Adam([weights], lr=0.05), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        a, b = (weights + 0.1 * torch.randn(6, 4, generator=noise) for _ in range(2))
        losses.append(info_nce(a, b, 0.5))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_the_agreement_is_the_mean_over_pairs_of_passes(passes):
    embeddings = draw(passes, 4, 3, seed=1).requires_grad_()
    pairs = [(i, j) for i in range(passes) for j in range(i + 1, passes)]
    expected = sum(loop_info_nce(embeddings[i], embeddings[j], 0.2) for i, j in pairs) / len(pairs)
    value = info_nce_agreement(embeddings, 0.2)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, embeddings)[0] for x in (value, expected)))
    assert torch.autograd.gradcheck(lambda x: info_nce_agreement(x, 0.2), embeddings)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((1, 4), (1, 4), r"1 row\(s\).*would be 0.*at least 2 rows"),
        ((0, 4), (0, 4), r"0 row\(s\)"),
        ((3, 4), (2, 4), r"\(3, 4\) and \(2, 4\)"),
        ((3, 4), (3, 5), r"\(3, 4\) and \(3, 5\)"),
        ((3,), (3,), r"both \[B, D\]"),
        ((3, 2, 4), (3, 2, 4), r"both \[B, D\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        info_nce(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 4), (2, 1, 4)])
def test_the_agreement_refuses_too_few_passes_and_rows(shape):
    with pytest.raises(ValueError, match=r"two passes|1 row\(s\)"):
        info_nce_agreement(torch.zeros(shape))


@pytest.mark.parametrize("temperature", [0, -0.1, math.nan, math.inf, True, "0.05", None])
def test_a_temperature_that_is_none_is_refused(temperature):
    for call in (
        lambda: info_nce(draw(2, 3), draw(2, 3), temperature),
        lambda: info_nce_agreement(draw(2, 2, 3), temperature),
    ):
        with pytest.raises(ValueError, match="temperature must be a finite number > 0"):
            call()


# ---- Pooling ----

MASKS = {
    "none": None,
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]],
}


def naive_pool(hidden, mask, how):
    result = []
    for row, flags in zip(hidden.tolist(), mask or [[1] * 5] * 3, strict=True):
        tokens = [token for token, flag in zip(row, flags, strict=True) if flag]
        mean = [sum(values) / len(tokens) for values in zip(*tokens, strict=True)]
        result.append({"cls": tokens[0], "mean": mean, "last": tokens[-1]}[how])
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("how", POOLINGS)
@pytest.mark.parametrize("padding", list(MASKS))
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_pooling_equals_the_loop_wherever_the_padding_is(how, padding, dtype):
    hidden, rows = draw(3, 5, 4).requires_grad_(), MASKS[padding]
    mask = None if rows is None else torch.tensor(rows).to(dtype)
    torch.testing.assert_close(pool(hidden, mask, how), naive_pool(hidden, rows, how))
    assert torch.autograd.gradcheck(lambda x: pool(x, mask, how), hidden)


@pytest.mark.parametrize("how", POOLINGS)
def test_what_stands_at_padding_never_counts(how):
    mask = torch.tensor(MASKS["left"])
    hidden = draw(3, 5, 4)
    spoiled = hidden.masked_fill(mask[..., None] == 0, math.nan).requires_grad_()
    pooled = pool(spoiled, mask, how)
    torch.testing.assert_close(pooled, pool(hidden, mask, how))
    pooled.sum().backward()
    assert spoiled.grad.isfinite().all() and (spoiled.grad[mask == 0] == 0).all()


@pytest.mark.parametrize("how", POOLINGS)
def test_a_row_of_padding_alone_is_zero(how):
    hidden = draw(2, 5, 4).fill_(math.nan)
    hidden[1] = 1.0
    hidden.requires_grad_()
    pooled = pool(hidden, torch.tensor([[0] * 5, [1] * 5]), how)
    assert pooled.tolist() == [[0.0] * 4, [1.0] * 4]
    pooled.sum().backward()
    assert (hidden.grad[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_is_summed_up_in_float32_and_keeps_the_type(dtype):
    hidden = torch.full((1, 3000, 1), 100.0, dtype=dtype)  # the sum, 300,000, is beyond float16
    pooled = pool(hidden, None, "mean")
    assert pooled.dtype == dtype and pooled.item() == 100.0
    assert pool(hidden).dtype == pool(hidden, None, "last").dtype == dtype


def test_pooling_and_loss_agree_with_a_padded_and_an_unpadded_batch():
    hidden = draw(4, 3, 6)
    padded = torch.cat((torch.full((4, 2, 6), 9.0, dtype=torch.float64), hidden), 1)
    mask = torch.tensor([[0, 0, 1, 1, 1]] * 4)
    for how in POOLINGS:
        a, b = pool(hidden, None, how), pool(padded, mask, how)
        torch.testing.assert_close(info_nce(a, a), info_nce(b, b))


@pytest.mark.parametrize(
    ("shape", "mask", "how", "words"),
    [
        ((2, 3, 4), None, "max", "Unknown pooling 'max'.*cls, mean, last"),
        ((2, 3), None, "cls", r"must be \[B, T, D\], got \(2, 3\)"),
        ((2, 3, 4), (2, 4), "cls", r"\(2, 4\).*\(2, 3\)"),
        ((2, 3, 4), (2, 1, 1, 3), "mean", r"\(2, 1, 1, 3\)"),
    ],
)
def test_pooling_refuses_what_does_not_fit(shape, mask, how, words):
    with pytest.raises(ValueError, match=words):
        pool(torch.zeros(shape), None if mask is None else torch.ones(mask), how)
