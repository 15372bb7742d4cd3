"""The check of shared layers on real rows: what it accepts, what it refuses, and that it leaves no trace."""

import pytest
import torch
import transformers as tf
from torch import nn

from hf_rdrop.batch import repeat_batch
from hf_rdrop.dropout import set_dropout
from hf_rdrop.trunk import SharedTrunk
from hf_rdrop.trunk.check import check_shared_trunk
from support.trunk_models import (
    ARCHITECTURES,
    BERT_LIKE,
    DROPOUT_ABOVE_ALL,
    Layer,
    Toy,
    all_layers,
    count_rows,
    make,
    make_batch,
    toy_batch,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_accepts_what_leaves_something_random(name):
    model = make(name)
    layers = len(all_layers(model))
    repeated = repeat_batch(make_batch(model), 2)
    for k in range(1, layers + 1):
        trunk = SharedTrunk(model, k)
        if k < layers or name in DROPOUT_ABOVE_ALL:
            check_shared_trunk(trunk, model, repeated, 2)
        else:
            with pytest.raises(ValueError, match=rf"after its {k} shared layers is random"):
                check_shared_trunk(trunk, model, repeated, 2)
        trunk.remove()


# ---- Models that cannot share ----


class Again(Toy):
    def forward(self, x, mask, labels=None):
        x = self.layers[0](x)
        return super().forward(self.layers[0](x), mask)


class TimeFirst(Toy):  # its layers sum over the second dimension, which holds the rows here
    def forward(self, x, mask, labels=None):
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return {"logits": x.transpose(0, 1)[:, -1]}


class RightTimeFirst(TimeFirst):
    class Layer(Layer):
        def forward(self, hidden_states, mask=None, position_embeddings=None, log=None):
            return super().forward(hidden_states.transpose(0, 1)).transpose(0, 1)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))


class Sums(Toy):
    def forward(self, x, mask, labels=None):
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return {"logits": sum(states)[:, -1]}


@pytest.mark.parametrize(
    ("model", "k", "reason"),
    (
        (Again(), 1, r"calls its first 1 layers in the order \[1, 1, 1\]"),
        (Again(), 2, r"in the order \[1, 1, 1, 2\]"),
        (TimeFirst(), 2, "batch dimension is not the first|does not run"),
        (Sums(), 2, r"does not run with its first 2 layers shared.*\(RuntimeError: The size of tensor"),
    ),
)
@pytest.mark.parametrize("length", (4, 5))
def test_check_refuses(model, k, reason, length):
    trunk = SharedTrunk(model, k)
    trunk.start(2)  # whatever was before
    with pytest.raises(ValueError, match=reason) as error:
        check_shared_trunk(trunk, model, toy_batch(length=length), 2)
    assert "Set rdrop_shared_layers to" in str(error.value)


@pytest.mark.parametrize("length", (4, 5, 6))  # 6 rows
def test_check_learns_that_the_rows_are_not_the_first_dimension(length):
    model, batch = RightTimeFirst(), toy_batch(length=length)
    trunk = SharedTrunk(model, 2)
    check_shared_trunk(trunk, model, batch, 2)
    model.eval()
    plain = model(**batch)["logits"]
    shapes = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    trunk.start(2)
    torch.testing.assert_close(model(**batch)["logits"], plain)
    assert shapes == [(length, 3, 4), (length, 3, 4), (length, 6, 4)]


def test_check_allows_for_what_rounding_does_when_the_number_of_rows_changes():
    class Rounding(Layer):
        def forward(self, hidden_states, mask, position_embeddings, log=None):
            exact = super().forward(hidden_states, mask, position_embeddings)
            return exact + 0.1 * len(hidden_states)

    model = Toy()
    model.layers = nn.ModuleList(Rounding() for _ in range(3))
    check_shared_trunk(SharedTrunk(model, 2), model, toy_batch(), 2)


def test_check_accepts_layers_whose_states_are_used_outside_where_all_rows_are_there():
    model = Sums()
    check_shared_trunk(SharedTrunk(model, 1), model, toy_batch(), 2)


def test_deberta_with_a_convolution_shares_one_layer_at_most():
    model = make("deberta-v2", conv_kernel_size=3, conv_act="tanh")
    repeated = repeat_batch(make_batch(model), 2)
    trunk = SharedTrunk(model, 1)
    check_shared_trunk(trunk, model, repeated, 2)
    trunk.remove()
    with pytest.raises(ValueError, match="does not run with its first 2 layers shared"):
        check_shared_trunk(SharedTrunk(model, 2), model, repeated, 2)


# ---- What has to stay random ----


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
def test_what_counts_as_random_above_the_shared_layers(implementation):
    def check(k, **config):
        tf.set_seed(0)
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config}
        model = tf.BertForSequenceClassification(
            tf.BertConfig(**{**BERT_LIKE, **rates}, attn_implementation=implementation)
        )
        check_shared_trunk(SharedTrunk(model, k), model, repeat_batch(make_batch(model), 2), 2)

    check(3, classifier_dropout=0.1)
    check(2, attention_probs_dropout_prob=0.1, classifier_dropout=0.0)
    for k, config in (
        (3, {"hidden_dropout_prob": 0.1, "classifier_dropout": 0.0}),
        (3, {"attention_probs_dropout_prob": 0.1}),
        (1, {}),
    ):
        with pytest.raises(ValueError, match=rf"after its {k} shared layers is random.*Share fewer layers"):
            check(k, **config)


def test_dropout_of_the_shared_layers_alone_is_refused():
    model = make("bert", 0.0)
    for layer in model.bert.encoder.layer[:2]:
        set_dropout(layer, 0.5)
    set_dropout(model.bert.embeddings, 0.5)
    repeated = repeat_batch(make_batch(model), 2)
    trunk = SharedTrunk(model, 1)
    check_shared_trunk(trunk, model, repeated, 2)  # layer 2 is above
    trunk.remove()
    with pytest.raises(ValueError, match="after its 2 shared layers is random"):
        check_shared_trunk(SharedTrunk(model, 2), model, repeated, 2)


# ---- The check leaves no trace ----


@pytest.mark.parametrize("k", (2, 3))
def test_check_leaves_no_trace(k):
    model = make("llama")
    model.lm_head.eval()  # a part that the user has put into evaluation mode
    flags = {name: module.training for name, module in model.named_modules()}
    batch = repeat_batch(make_batch(model), 2)
    copies = {name: value.clone() for name, value in batch.items()}
    trunk = SharedTrunk(model, k)
    model.model.register_forward_pre_hook(
        lambda module, args: torch.rand(1) and None
    )  # some models draw in evaluation
    state = torch.get_rng_state()
    trunk.start(2)
    try:
        check_shared_trunk(trunk, model, batch, 2)
    except ValueError:
        assert k == 3
    else:
        assert k == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert batch.keys() == copies.keys() and all(torch.equal(batch[name], copies[name]) for name in batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == k + 1  # the trunk's and ours
    rows = count_rows(model)
    model(**batch)
    assert rows == [6, 6, 6]  # the trunk is stopped


def test_check_takes_few_rows():
    model = make("bert")
    rows = count_rows(model)
    batch = make_batch(model, rows=8)
    check_shared_trunk(SharedTrunk(model, 1), model, repeat_batch(batch, 3), 3)
    assert max(rows) == 2 * 3


def test_check_picks_the_same_rows_of_everything():
    model = make("bert")
    seen = []

    def take(module, args, kwargs):
        seen.append((kwargs.pop("cache_position"), kwargs.pop("names"), kwargs["input_ids"]))

    model.register_forward_pre_hook(take, with_kwargs=True)
    batch = {**make_batch(model, rows=4), "names": list("abcd"), "cache_position": torch.arange(8)}
    ids = batch["input_ids"]
    repeated = repeat_batch(batch, 2, batch_size=4)
    check_shared_trunk(SharedTrunk(model, 1), model, repeated, 2, batch_size=4)
    for positions, names, rows in seen:
        passes = len(rows) // 2
        assert len(positions) == 8 and names == list("ab") * passes  # positions: by name, not per example
        assert torch.equal(rows, torch.cat([ids[:2]] * passes))
    assert [len(names) for _, names, _ in seen] == [4, 2, 4]
