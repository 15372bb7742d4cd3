"""RDropLoss against naive float64 loops."""

import copy

import pytest
import torch
from torch import nn

from hf_rdrop import RDropLoss
from hf_rdrop.agreements import OUTPUT_AGREEMENTS
from hf_rdrop.batch import repeat_batch, split_passes
from support.reference import naive_cross_entropy, naive_symmetric_kl, torch_reference


def draw(*shape, seed=0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).to(dtype)


LABELS = {
    "single_label_classification": torch.tensor([0, 2, -100, 1]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]),
    "regression": torch.tensor([[0.5, 1.0, -2.0]] * 4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("problem_type", list(LABELS))
@pytest.mark.parametrize("alpha", [0.0, 0.7, 5.0])
def test_loss_and_gradients_equal_the_loop(problem_type, m, alpha, dtype):
    labels = LABELS[problem_type]
    logits = draw(m, 4, 3, seed=m).to(dtype)
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    out = RDropLoss(alpha, problem_type)(logits[0], logits[1], labels, *logits[2:])
    expected = torch_reference(exact, labels, alpha, problem_type)
    out.loss.backward()
    expected[0].backward()
    exactness = 1e-12 if dtype == torch.float64 else 1e-5  # low precision logits are taken as they are, to float32
    assert [value.item() for value in out] == pytest.approx([value.item() for value in expected], rel=exactness)
    rounding = 4e-3 if dtype == torch.bfloat16 else exactness  # the gradient has the logits' dtype
    assert (logits.grad.double() - exact.grad).norm() <= rounding * exact.grad.norm()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_equals_the_loop(smoothing):
    a, b, labels = draw(5, 4, seed=1), draw(5, 4, seed=2), torch.tensor([3, -100, 0, 1, -100])
    out = RDropLoss(2.0, label_smoothing=smoothing)(a, b, labels)
    rows = [i for i in range(5) if labels[i] != -100]
    ce = [naive_cross_entropy(z[i].tolist(), labels[i].item(), smoothing) for z in (a, b) for i in rows]
    kl = [naive_symmetric_kl(a[i].tolist(), b[i].tolist()) for i in rows]
    assert out.ce.item() == pytest.approx(sum(ce) / 6)
    assert out.kl.item() == pytest.approx(sum(kl) / 3)
    assert out.loss.item() == pytest.approx(sum(ce) / 6 + 2.0 / 2 * sum(kl) / 3)


def test_two_passes_give_the_papers_formula_halved():
    a, b, labels = draw(3, 4, seed=1), draw(3, 4, seed=2), torch.tensor([0, 1, 2])
    alpha = 5.0
    ce = [sum(naive_cross_entropy(z[i].tolist(), i) for i in range(3)) / 3 for z in (a, b)]
    skl = sum(naive_symmetric_kl(a[i].tolist(), b[i].tolist()) for i in range(3)) / 3
    assert RDropLoss(alpha)(a, b, labels).loss.item() == pytest.approx((ce[0] + ce[1] + alpha * skl) / 2)


def test_token_shaped_labels_and_swapping_the_passes():
    a, b, labels = draw(2, 3, 5, seed=1), draw(2, 3, 5, seed=2), torch.tensor([[0, 4, -100], [1, -100, -100]])
    loss = RDropLoss(1.5)
    torch.testing.assert_close(loss(a, b, labels).loss, loss(b, a, labels).loss)
    flat = torch_reference(torch.stack((a, b)).flatten(1, 2), labels.flatten(), 1.5)
    torch.testing.assert_close(loss(a, b, labels).loss, flat[0])


def test_no_valid_item_is_zero_with_zero_gradient():
    a = draw(2, 3).requires_grad_()
    out = RDropLoss(1.0)(a, draw(2, 3, seed=1), torch.tensor([-100, -100]))
    out.loss.backward()
    assert [v.item() for v in out] == [0, 0, 0] and torch.all(a.grad == 0)


def test_regression_takes_predictions_with_and_without_a_last_dimension():
    a, b, y = draw(4, 1, seed=1), draw(4, 1, seed=2), draw(4, seed=3)
    loss = RDropLoss(1.0, "regression")
    torch.testing.assert_close(loss(a, b, y).loss, loss(a[:, 0], b[:, 0], y).loss)
    expected = ((a[:, 0] - y) ** 2 + (b[:, 0] - y) ** 2).mean() / 2 + 0.5 * ((a - b) ** 2).mean()
    torch.testing.assert_close(loss(a, b, y).loss, expected)


def test_in_a_plain_training_loop_it_makes_the_passes_agree():
    """The docstring's loop: one forward over [x; x]; a large alpha brings the KL down, alpha 0 does not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    batch = {"x": torch.randn(64, 6), "labels": torch.randint(0, 3, (64,))}
    last = {}
    for alpha in (0.0, 20.0):
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(60):
            logits = model(repeat_batch(batch)["x"])
            loss, _, kl = RDropLoss(alpha)(*split_passes(logits), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last[alpha] = kl.item()
    assert last[20.0] < last[0.0] / 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": -1}, "rdrop_alpha must be a finite number >= 0"),
        ({"alpha": float("nan")}, "got nan"),
        ({"alpha": float("inf")}, "got inf"),
        ({"alpha": "1"}, "got '1'"),
        ({"problem_type": "ranking"}, "choose one of single_label_classification"),
        ({"label_smoothing": 1.0}, r"in \[0, 1\)"),
        ({"label_smoothing": 0.1, "problem_type": "regression"}, "no meaning for regression"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RDropLoss(**kwargs)


def test_bad_shapes():
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="one shape"):
        RDropLoss()(z, z[:2], torch.zeros(4).long())
    with pytest.raises(ValueError, match="one class index per item"):
        RDropLoss()(z, z, torch.zeros(4, 3).long())
    with pytest.raises(ValueError, match="one target per score"):
        RDropLoss(problem_type="multi_label_classification")(z, z, torch.zeros(4))


def test_ignored_items_that_are_not_finite_leave_loss_and_gradient_alone():
    logits, labels = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, -100, 3])
    clean, spoilt = logits.clone().requires_grad_(), logits.clone()
    spoilt[:, 1] = float("nan")
    spoilt.requires_grad_()
    losses = [RDropLoss(2.0)(*x, labels).loss for x in (clean, spoilt)]
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (clean, spoilt), strict=True)]
    assert torch.equal(*losses) and torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_no_rows_give_no_loss(problem_type):
    assert RDropLoss(1.0, problem_type)(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3)) == (0, 0, 0)


def test_labels_that_are_no_class_indices():
    logits = torch.zeros(2, 3)
    for labels, words in (
        (torch.tensor([0, 3]), "0, 3.*-100, got 3 to 3"),
        (torch.tensor([-1, 0]), "got -1 to -1"),
        (torch.tensor([0.0, 1.0]), "class indices, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            RDropLoss()(logits, logits, labels)
    assert RDropLoss()(logits, logits, torch.tensor([0, 2], dtype=torch.int32)).ce == pytest.approx(1.0986, rel=1e-4)
    with pytest.raises(ValueError, match="one class index per item"):
        RDropLoss()(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0))


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_another_agreement(problem_type):
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 6, 4)
    labels = torch.tensor([0, 1, -100, 3, 2, 1]) if problem_type.startswith("single") else torch.ones(6, 4)
    mask = labels != -100 if problem_type.startswith("single") else None
    loss, ce, kl = RDropLoss(3.0, problem_type, agreement="jensen_shannon + 0.5 * squared_logits")(a, b, labels, c)
    logits = torch.stack((a, b, c))
    parts = (OUTPUT_AGREEMENTS[name](logits, mask, problem_type) for name in ("jensen_shannon", "squared_logits"))
    expected = sum(factor * part for factor, part in zip((1, 0.5), parts, strict=True))
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(loss, ce + 1.5 * expected)
    assert ce == RDropLoss(3.0, problem_type)(a, b, labels, c).ce


def test_an_agreement_of_hidden_states_is_not_for_logits():
    with pytest.raises(ValueError, match="hidden_states compares hidden states"):
        RDropLoss(agreement="hidden_states")
    with pytest.raises(ValueError, match="jensen_shannon"):
        RDropLoss(agreement="jensen")
