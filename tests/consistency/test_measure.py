"""measure_consistency against a reference that keeps the logits of every pass and goes through them in loops."""

import gc
import json
import math
import statistics
import weakref

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_rdrop import measure_consistency
from hf_rdrop.consistency.pass_sums import PassSums
from hf_rdrop.objective.heads import Head
from support.reference import naive_bernoulli_kl, naive_cross_entropy, naive_softmax, naive_symmetric_kl, pairs
from support.training import HEADS, VOCAB, make_collator, make_model, make_rows


def load(head, model, rows=13, batch_size=5):
    """Batches of which the last is smaller."""
    return DataLoader(make_rows(head, rows), batch_size=batch_size, collate_fn=make_collator(head, model))


def language_model(kind, dropout=0.2):
    """A causal or masked language model, and batches whose labels have padding and rows without any label."""
    set_seed(0)
    if kind == "causal":
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, **rates))
    else:
        model = BertForMaskedLM(make_model("single", dropout).config)
    batches = []
    for seed, rows in enumerate((4, 3)):
        ids = torch.randint(3, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:, 5:] = labels[0] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return model, [*batches, {"input_ids": ids, "labels": torch.full_like(ids, -100)}]


def recorded(model, measure):
    """What `measure()` returns, and the logits of every forward meanwhile."""
    logits = []
    hook = model.register_forward_hook(lambda module, args, outputs: logits.append(outputs.logits.clone()))
    try:
        return measure(), logits
    finally:
        hook.remove()


# ---- The reference: items as plain lists of floats, one list per pass ----


def as_items(problem_type, logits, labels):
    """`[(scores, label)]` of the items that count; a label of a multi-label row is an item of one score."""
    if problem_type == "single":
        flat = zip(logits.reshape(-1, logits.shape[-1]).tolist(), labels.reshape(-1).tolist(), strict=True)
        return [(scores, label) for scores, label in flat if label != -100]
    return [([z], y) for z, y in zip(logits.reshape(-1).tolist(), labels.reshape(-1).tolist(), strict=True)]


def probabilities(problem_type, scores):
    if problem_type == "multi":
        p = 1 / (1 + math.exp(-scores[0]))
        return [1 - p, p]
    return naive_softmax(scores) if problem_type == "single" else scores


def loss_of(problem_type, p, label):
    if problem_type == "regression":
        return (p[0] - label) ** 2
    return -math.log(p[int(label)])


def distance(problem_type, p, q):
    if problem_type == "regression":
        return (p[0] - q[0]) ** 2
    return 0.5 * sum((a - b) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def reference(problem_type, passes):
    """All figures from `passes[k]`, the items of dropout off (k = 0) and of each sub-model over all of the data."""
    labels = [label for _, label in passes[0]]
    off, *subs = ([probabilities(problem_type, scores) for scores, _ in items] for items in passes)
    n, count = len(subs), len(labels)
    ensembles = [
        [[statistics.fmean(values) for values in zip(*each, strict=True)] for each in zip(*subs[:k], strict=True)]
        for k in range(1, n + 1)
    ]

    def loss(model):
        return sum(loss_of(problem_type, p, label) for p, label in zip(model, labels, strict=True)) / count

    def accuracy(model):
        return sum(max(range(len(p)), key=p.__getitem__) == y for p, y in zip(model, labels, strict=True)) / count

    def apart(a, b):
        return sum(distance(problem_type, p, q) for p, q in zip(a, b, strict=True)) / count

    return {
        "items": count,
        "loss": [loss(off), [loss(sub) for sub in subs], [loss(each) for each in ensembles]],
        "accuracy": [accuracy(off), [accuracy(sub) for sub in subs], [accuracy(each) for each in ensembles]],
        "between": statistics.fmean(apart(subs[i], subs[j]) for i, j in pairs(n)),
        "to_off": statistics.fmean(apart(sub, off) for sub in subs),
        "ensembles": [apart(each, off) for each in ensembles],
    }


def assert_agrees(found, expected, rel, with_accuracy=True):
    assert found.items == expected["items"]
    assert found.between_sub_models == pytest.approx(expected["between"], rel=rel)
    assert found.to_dropout_off == pytest.approx(expected["to_off"], rel=rel)
    assert found.ensembles_to_dropout_off == pytest.approx(expected["ensembles"], rel=rel)
    for name in ("loss", "accuracy") if with_accuracy else ("loss",):
        off, subs, ensembles = expected[name]
        score = found.scores[name]
        assert score.dropout_off == pytest.approx(off, rel=rel)
        assert score.sub_models == pytest.approx(subs, rel=rel)
        assert score.ensembles == pytest.approx(ensembles, rel=rel)
        assert score.mean == pytest.approx(statistics.fmean(subs), rel=rel)
        assert score.std == pytest.approx(statistics.stdev(subs), rel=max(rel, 1e-4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", [*HEADS, "causal", "masked"])
def test_equals_a_reference_that_keeps_all_logits(head, dtype):
    if head in HEADS:
        model = make_model(head, 0.2).to(dtype)
        batches = [
            {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
            for batch in load(head, model)
        ]
    else:
        model, batches = language_model(head)
        model.to(dtype)
    found, logits = recorded(model, lambda: measure_consistency(model, batches, 4))
    assert len(logits) == 5 * len(batches)
    kind = head if head in ("multi", "regression") else "single"
    passes = []
    for k in range(5):
        items = []
        for batch, number in zip(batches, range(len(batches)), strict=True):
            scores, labels = logits[5 * number + k].double(), batch["labels"].double()
            if head == "causal":
                scores, labels = scores[:, :-1], labels[:, 1:]
            items += as_items(kind, scores, labels)
        passes.append(items)
    expected = reference(kind, passes)
    assert expected["between"] > 1e-3 and expected["items"] > 10
    assert_agrees(found, expected, 1e-9 if dtype == torch.float64 else 2e-5, head != "regression")
    assert ("accuracy" in found.scores) == (head != "regression")


def test_distances_are_those_of_the_training_objective():
    """The same sKL as in tests/support/reference.py, and as R-Drop's own agreement between two passes."""
    a, b = [0.3, -1.0, 2.0], [1.1, 0.4, -0.2]
    p, q = naive_softmax(a), naive_softmax(b)
    assert distance("single", p, q) == pytest.approx(naive_symmetric_kl(a, b))
    assert distance("multi", probabilities("multi", [0.3]), probabilities("multi", [-1.0])) == pytest.approx(
        naive_bernoulli_kl(0.3, -1.0)
    )
    assert loss_of("single", p, 2) == pytest.approx(naive_cross_entropy(a, 2))
    labels = torch.tensor([0])
    sums = PassSums(Head("single_label_classification", labels != -100), labels, torch.zeros(1, 3).double())
    for scores in (a, b):
        sums.add(torch.tensor([scores]).double())
    assert sums.sums()[0].item() == pytest.approx(naive_symmetric_kl(a, b))


# ---- Numbers that are hard ----


def sums_of(passes, labels, dtype=torch.float32, problem_type="single_label_classification"):
    """Distances between, to dropout off, losses and ensembles' distances of `[n + 1, N, C]` logits, added up."""
    logits = torch.tensor(passes, dtype=dtype)
    labels = torch.tensor(labels)
    mask = labels != -100 if problem_type == "single_label_classification" else None
    sums = PassSums(Head(problem_type, mask), labels, logits[0])
    for each in logits[1:]:
        sums.add(each)
    values, n = sums.sums().tolist(), len(passes) - 1
    return values[0], values[1], values[2 : 2 * n + 3], values[-n:]


def test_sub_models_that_nearly_agree_do_not_cancel():
    """32,000 classes whose logits differ by 1e-3: sKL is about 1e-6, beside products p log p of about 10."""
    generator = torch.Generator().manual_seed(0)
    off = torch.randn(1, 2, 32_000, generator=generator)
    logits = torch.cat((off, off + 1e-3 * torch.randn(8, 2, 32_000, generator=generator)))
    between, to_off, *_ = sums_of(logits.tolist(), [5, 7])
    p = torch.softmax(logits[1:].double(), -1)
    exact = [0.5 * ((p[i] - p[j]) * (p[i].log() - p[j].log())).sum().item() for i, j in pairs(8)]
    assert between == pytest.approx(statistics.fmean(exact), rel=1e-3)
    assert 5e-7 < between / 2 < 2e-6 and to_off == pytest.approx(between / 2, rel=0.2)


def test_masked_classes_add_nothing():
    scores = [[0.3, -1.0, 2.0], [0.1, -0.4, 1.0], [1.0, 0.0, 0.5], [0.0, 0.5, 0.0]]
    plain = sums_of([[each] for each in scores], [2])
    masked = sums_of([[[*each, -math.inf]] for each in scores], [2])
    for a, b in zip(plain, masked, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_class_masked_in_some_passes_only_is_infinitely_far():
    between, to_off, losses, ensembles = sums_of([[[0.0, 1.0]], [[0.0, -math.inf]], [[0.0, 1.0]]], [0])
    assert (between, to_off) == (math.inf, math.inf) and all(map(math.isfinite, losses))
    assert ensembles[0] == math.inf and math.isfinite(ensembles[1])


def test_probabilities_below_the_smallest_float():
    """Wrong with certainty: e^-200 is 0 in float32, but the loss of passes and ensemble is 200 and not infinite."""
    scores = [[[0.0, -190.0]], [[0.0, -200.0]], [[0.0, -210.0]], [[0.0, -205.0]]]
    between, to_off, losses, ensembles = sums_of(scores, [1])
    assert losses[:4] == pytest.approx([190, 200, 210, 205])
    assert losses[4:] == pytest.approx(
        [200, 200 + math.log(2), 200 + math.log(3) - math.log1p(math.exp(-5))], rel=1e-6
    )
    assert between == to_off == 0 and ensembles == [0, 0, 0]


def test_soft_targets_of_labels():
    """BCE with targets between 0 and 1, as torch has it."""
    logits, labels = [[[0.5, -2.0]], [[1.0, 0.0]], [[0.0, 1.0]]], [[0.3, 1.0]]
    *_, losses, _ = sums_of(logits, labels, torch.float64, "multi_label_classification")
    y = torch.tensor(labels, dtype=torch.float64)
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = [bce(torch.tensor(each, dtype=torch.float64), y).item() * 2 for each in logits]
    assert losses[:3] == pytest.approx(expected)


# ---- What is drawn, and what is left behind ----


def test_sub_models_are_those_of_training():
    """Each forward gives what model.train() gives for the same random numbers."""
    model = make_model("single", 0.3).eval()
    (batch,) = load("single", model, 4)
    _, logits = recorded(model, lambda: measure_consistency(model, [batch], 3, seed=5))
    with torch.no_grad():
        assert torch.equal(logits[0], model(**batch).logits)
        model.train()
        torch.manual_seed(5)
        for found in logits[1:]:
            assert torch.equal(found, model(**batch).logits)


def test_rate_that_the_module_around_the_dropout_applies():
    """BERT's attention never calls its dropout module: it hands the rate on, if it is itself in training mode."""
    model = make_model("single", 0.0)
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    assert model.config._attn_implementation == "sdpa"
    assert measure_consistency(model, load("single", model), 2).between_sub_models > 1e-3


class WithState(nn.Module):
    """Batch norm, a buffer that every training forward changes, and a frozen dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.frozen = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Dropout(0.5)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x, labels=None):
        self.forwards += self.training
        return SequenceClassifierOutput(logits=self.linear(self.dropout(self.norm(x))))


def test_nothing_is_left_changed():
    torch.manual_seed(0)
    model = WithState().train()
    model.frozen.eval()
    data = [{"x": torch.randn(6, 4) + 3, "labels": torch.tensor([0, 1, 2, 0, 1, -100])} for _ in range(3)]
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    loader = DataLoader(data, batch_size=None, shuffle=True)  # draws a random order, and a seed for its workers
    found = measure_consistency(model, loader, 3)
    assert found.between_sub_models > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in model.modules()]
    assert gradients == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # and batch norm has not used the batch's own statistics, which would bring the inputs of mean 3 to mean 0
    means = []
    model.norm.register_forward_hook(lambda module, args, output: means.append(output.mean().item()))
    measure_consistency(model, data[:1], 2)
    assert means == pytest.approx([data[0]["x"].mean().item()] * 3, rel=1e-3)


def test_everything_is_restored_when_the_model_fails():
    model = WithState().train()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    batches = [{"x": torch.ones(6, width), "labels": torch.zeros(6, dtype=torch.long)} for width in (4, 5)]
    with pytest.raises(RuntimeError):  # at the second batch: there are four inputs
        measure_consistency(model, batches, 3)
    assert torch.equal(torch.get_rng_state(), random) and modes == [module.training for module in model.modules()]
    assert model.forwards == 0


def test_seed_decides(head):
    model = make_model(head, 0.2)
    first, again, other = (measure_consistency(model, load(head, model), 3, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.between_sub_models != other.between_sub_models
    assert first.scores["loss"].dropout_off == other.scores["loss"].dropout_off


def test_more_samples_go_on_from_fewer():
    """The curve over n is that of the first n sub-models, as long as all the data are one batch."""
    model = make_model("token", 0.2)
    few, many = (measure_consistency(model, load("token", model, 8, 8), n) for n in (3, 6))
    assert many.ensembles_to_dropout_off[:3] == few.ensembles_to_dropout_off
    assert many.scores["loss"].sub_models[:3] == few.scores["loss"].sub_models


def test_ensemble_of_many_comes_near_what_it_estimates():
    """The distance of an ensemble of n to dropout off falls, and stays below that of single sub-models."""
    model = make_model("single", 0.1)
    found = measure_consistency(model, load("single", model, 16, 16), 32)
    assert found.ensembles_to_dropout_off[-1] < found.ensembles_to_dropout_off[3] < found.to_dropout_off
    assert found.scores["loss"].ensembles[-1] < found.scores["loss"].mean  # Jensen's inequality


class LiveMemory(TorchDispatchMode):
    """Bytes of all tensors that operations have made and nobody has dropped yet: now, and at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._dropped, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _dropped(self, key, size):
        self.seen.discard(key)
        self.live -= size


class WideHead(nn.Module):
    """20,000 classes from an input that dropout changes."""

    def __init__(self):
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.3), nn.Linear(8, 20_000)

    def forward(self, x, labels):
        return SequenceClassifierOutput(logits=self.linear(self.dropout(x)))


def test_memory_does_not_grow_with_samples_or_batches():
    model = WideHead()

    def peak(samples, batches):
        data = ({"x": torch.randn(32, 8), "labels": torch.randint(20_000, (32,))} for _ in range(batches))
        gc.collect()
        with LiveMemory() as memory:
            measure_consistency(model, data, samples)
        return memory.peak / (32 * 20_000 * 4)  # in logits of one pass

    few, many, more_data = peak(2, 1), peak(12, 1), peak(2, 4)
    assert 3 < few < 11  # the meter counts
    assert many < few + 0.1 and more_data < few + 0.1


# ---- Metrics, precision, adapters ----


def test_compute_metrics_sees_every_form():
    model = make_model("token", 0.3)
    calls = []

    def compute(predictions, labels):
        calls.append((predictions, labels))
        return {"f1": f1_score(labels[labels != -100], predictions[labels != -100], average="macro")}

    rows = make_rows("token", 13)
    short = [{name: values[:6] for name, values in row.items()} for row in rows]
    loader = load("token", model)
    batches = [*loader, *DataLoader(short, batch_size=7, collate_fn=loader.collate_fn)]  # of two lengths
    found, logits = recorded(model, lambda: measure_consistency(model, batches, 3, compute_metrics=compute))
    assert len(calls) == 7 and all(labels.shape == predictions.shape == (26, 8) for predictions, labels in calls)
    labels = calls[0][1]
    assert (labels[13:, 6:] == -100).all()
    assert labels[:13].tolist() == [row["labels"] for row in rows]
    for k in range(4):  # dropout off and the three sub-models
        expected = torch.cat([nn.functional.pad(x, (0, 0, 0, 8 - x.shape[1])).argmax(-1) for x in logits[k::4]])
        assert (calls[k][0] == expected.numpy())[labels != -100].all()
    score = found.scores["f1"]
    assert [score.dropout_off, *score.sub_models, *score.ensembles] == [
        f1_score(y[y != -100], p[y != -100], average="macro") for p, y in calls
    ]
    right = [(p == y)[y != -100].mean() for p, y in calls]
    accuracy = found.scores["accuracy"]
    assert [accuracy.dropout_off, *accuracy.sub_models, *accuracy.ensembles] == pytest.approx(right)


@pytest.mark.parametrize(("head", "shape"), [("single", (13,)), ("multi", (13, 4)), ("regression", (13,))])
def test_compute_metrics_of_rows(head, shape):
    model, seen = make_model(head, 0.3), []
    measure_consistency(
        model, load(head, model), 2, compute_metrics=lambda p, y: seen.append((p, y)) or {"x": float(p.mean())}
    )
    assert all(p.shape == y.shape == shape for p, y in seen)
    assert (seen[0][0].dtype.kind == "f") == (head == "regression")


def test_figures_as_json_and_as_metrics():
    model = make_model("single", 0.2)
    found = measure_consistency(model, load("single", model), 3)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["between_sub_models"] == found.between_sub_models and plain["items"] == 13
    assert plain["scores"]["loss"]["mean"] == found.scores["loss"].mean
    metrics = found.metrics("x")
    assert metrics["x_kl_ensemble"] == found.ensembles_to_dropout_off[-1]
    assert metrics["x_accuracy_ensemble"] == found.scores["accuracy"].ensembles[-1]
    forms = {f"x_{score}_{form}" for score in ("loss", "accuracy") for form in ("off", "sub", "std", "ensemble")}
    assert metrics.keys() == forms | {"x_kl_between", "x_kl_to_off", "x_kl_ensemble"}


def test_under_autocast(head):
    model = make_model(head, 0.2)
    exact = measure_consistency(model, load(head, model), 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure_consistency(model, load(head, model), 3)
    assert found.between_sub_models != exact.between_sub_models
    assert found.between_sub_models == pytest.approx(exact.between_sub_models, rel=0.1)
    assert found.scores["loss"].dropout_off == pytest.approx(exact.scores["loss"].dropout_off, rel=0.05)


def test_causal_language_model_with_an_adapter():
    peft = pytest.importorskip("peft")
    model, batches = language_model("causal", 0.0)
    with pytest.raises(ValueError, match="has no dropout"):
        measure_consistency(model, batches, 2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_dropout=0.5, init_lora_weights=False, fan_in_fan_out=True
    )
    found = measure_consistency(peft.get_peft_model(model, config), batches, 2)
    assert found.between_sub_models > 0
    assert found.items == (3 + 2) * 4  # labels 1 to 4 of all but the first row: position 0 has nothing before it


# ---- Refusals ----


@pytest.mark.parametrize("samples", [1, 0, -2, 2.0, True, None])
def test_samples_that_cannot_be_compared(samples):
    model = make_model("single")
    with pytest.raises(ValueError, match="at least two sub-models"):
        measure_consistency(model, load("single", model), samples)


def test_model_without_dropout():
    model = make_model("single", 0.0)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has no dropout.*set_dropout"):
        measure_consistency(model, load("single", model), 2)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "gave no batch"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.long)}], "dict with `labels`.*got input_ids"),
        ([(torch.ones(2, 3), torch.ones(2))], "got a tuple"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.full((2, 3), -100)}],
            "None of the labels counts",
        ),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 5, 7)}],
            "cannot compare logits",
        ),
    ],
)
def test_data_that_cannot_be_measured_on(batches, message):
    model = make_model("token")
    model.forward = lambda input_ids, labels, forward=model.forward: forward(input_ids)  # no loss of its own
    with pytest.raises(ValueError, match=message):
        measure_consistency(model, batches, 2)
