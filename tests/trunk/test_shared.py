"""Lower layers that the passes share: the same logits and gradients for every architecture, and fewer FLOPs."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from hf_rdrop.batch import repeat_batch
from hf_rdrop.dropout import inspect_dropout, set_dropout
from hf_rdrop.trunk import SharedTrunk, find_layer_stacks
from hf_rdrop.trunk.check import check_shared_trunk
from support.trunk_models import (
    ARCHITECTURES,
    BART_LIKE,
    BERT_LIKE,
    VOCAB,
    Layer,
    Toy,
    all_layers,
    count_rows,
    make,
    make_batch,
    toy_batch,
)


def record_outputs(model):
    seen = []
    for layer in all_layers(model):
        layer.register_forward_hook(lambda m, a, out: seen.append((out if torch.is_tensor(out) else out[0]).detach()))
    return seen


def gradients(model, batch, passes=2, trunk=None, forward=None):
    """Loss and gradients of one forward over the repeated batch."""
    model.zero_grad()
    torch.manual_seed(1)
    if trunk is not None:
        trunk.start(passes)
    loss = (model if forward is None else forward)(**repeat_batch(batch, passes)).loss
    loss.backward()
    if trunk is not None:
        trunk.stop()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, **tolerance):
    (loss_a, grads_a), (loss_b, grads_b) = a, b
    torch.testing.assert_close(loss_a, loss_b, **tolerance)
    assert grads_a.keys() == grads_b.keys() and grads_a
    for name, grad in grads_a.items():
        torch.testing.assert_close(grad, grads_b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- What sharing must and must not change, for each architecture ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_in_evaluation_are_equal_for_each_k(name):
    model = make(name).eval()
    layers, passes = len(all_layers(model)), 2 if name != "marian" else 3
    batch = make_batch(model)
    repeated = repeat_batch(batch, passes)
    with torch.no_grad():
        plain = model(**repeated).logits
        for k in range(1, layers + 1):
            trunk = SharedTrunk(model, k)
            rows = count_rows(model)
            trunk.start(passes)
            shared = model(**repeated).logits
            trunk.stop()
            assert rows == [3] * k + [3 * passes] * (layers - k)  # the lower layers ran once
            assert len(shared) == 3 * passes
            torch.testing.assert_close(shared, plain)
            trunk.remove()
            for layer in all_layers(model):
                layer._forward_pre_hooks.clear()
    assert plain.std(0).max() > 1e-2  # the rows differ, so a mistake in their order would be seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_halves_are_identical_up_to_layer_k_and_differ_above(name):
    model = make(name)
    k, layers = 2, len(all_layers(model))
    trunk = SharedTrunk(model, k)
    outputs = record_outputs(model)
    batch = repeat_batch(make_batch(model), 2)
    model(**batch)
    assert all(not torch.equal(*out.chunk(2)) for out in outputs)  # without sharing they differ everywhere
    outputs.clear()
    trunk.start(2)
    logits = model(**batch).logits
    trunk.stop()
    assert [len(out) for out in outputs] == [3] * (k - 1) + [6] * (layers - k + 1)
    assert torch.equal(*outputs[k - 1].chunk(2))
    assert all(not torch.equal(*out.chunk(2)) for out in outputs[k:])
    assert not torch.equal(*logits.chunk(2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_without_dropout_are_equal(name):
    model = make(name, dropout=0.0)
    batch = make_batch(model)
    plain = gradients(model, batch)
    for k in (1, len(all_layers(model))):
        trunk = SharedTrunk(model, k)
        assert_same(gradients(model, batch, trunk=trunk), plain, rtol=1e-3, atol=1e-5)
        trunk.remove()


# ---- Gradients with dropout, against references that need no hooks ----


@pytest.mark.parametrize("passes", (2, 3))
@pytest.mark.parametrize("k", (1, 2, 3))
def test_gradients_of_bert_equal_those_of_layers_run_by_hand(k, passes):
    model, reference = make("bert", 0.3), make("bert", 0.3)
    batch = make_batch(model)
    loss, grads = gradients(model, batch, passes, SharedTrunk(model, k))

    torch.manual_seed(1)
    bert, repeated = reference.bert, repeat_batch(batch, passes)
    mask = torch.where(batch["attention_mask"] == 1, 0.0, -torch.inf)[:, None, None, :]
    hidden = bert.embeddings(repeated["input_ids"])[:3]
    for layer in bert.encoder.layer[:k]:
        hidden = layer(hidden, mask)
    hidden = torch.cat([hidden] * passes)
    for layer in bert.encoder.layer[k:]:
        hidden = layer(hidden, torch.cat([mask] * passes))
    logits = reference.classifier(reference.dropout(bert.pooler(hidden)))
    expected = F.cross_entropy(logits, repeated["labels"])
    expected.backward()
    expected_grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_same((loss, grads), (expected.detach(), expected_grads), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ("marian", "t5"))
def test_a_shared_encoder_is_one_encoder_pass_whose_output_is_repeated(name):
    # Dropout in the decoder alone, so that both ways draw the same random numbers.
    model, reference = make(name), make(name)
    for one in (model, reference):
        set_dropout(one.get_encoder(), 0.0)
        assert any(s.rate > 0 for s in inspect_dropout(one))
    batch = make_batch(model)
    shared = gradients(model, batch, trunk=SharedTrunk(model, 2))

    torch.manual_seed(1)
    encoded = reference.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    repeated = repeat_batch(batch, 2)
    del repeated["input_ids"]
    loss = reference(encoder_outputs=(torch.cat([encoded, encoded]),), **repeated).loss
    loss.backward()
    grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert_same(shared, (loss.detach(), grads), rtol=1e-4, atol=1e-6)


def test_outside_start_and_stop_the_trunk_does_nothing():
    model, untouched = make("bert"), make("bert")
    batch = make_batch(model)
    trunk = SharedTrunk(model, 2)
    before = gradients(untouched, batch)
    assert_same(gradients(model, batch), before, rtol=0, atol=0)
    shared = gradients(model, batch, trunk=trunk)
    assert shared[0] != before[0]
    assert_same(gradients(model, batch), before, rtol=0, atol=0)
    trunk.remove()
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in all_layers(model))


# ---- Cost ----


@pytest.mark.parametrize(("k", "passes"), ((1, 2), (3, 2), (4, 2), (2, 3)))
def test_flops_of_the_layers(k, passes):
    model = make("bert", num_hidden_layers=4)
    trunk = SharedTrunk(model, k)
    batch = make_batch(model)

    def flops(backward, **inputs):
        with FlopCounterMode(display=False) as counter:
            loss = model(**inputs).loss
            if backward:
                loss.backward()
        counts = counter.get_flop_counts()
        key = "Global" if backward else "BertForSequenceClassification.bert.encoder"
        return sum(counts[key].values())

    plain = [flops(backward, **batch) for backward in (False, True)]
    trunk.start(passes)
    shared = [flops(backward, **repeat_batch(batch, passes)) for backward in (False, True)]
    ratio = (4 + (passes - 1) * (4 - k)) / 4
    assert shared[0] == plain[0] * ratio
    assert shared[1] == pytest.approx(plain[1] * ratio, rel=0.03)  # with backward, pooler and classifier


# ---- Together with everything else that touches layers ----


@pytest.mark.parametrize("name", ("bert", "llama", "t5"))
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(name, use_reentrant):
    model = make(name)
    batch = make_batch(model)
    trunk = SharedTrunk(model, 2)
    expected = gradients(model, batch, trunk=trunk)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    linear = next(module for module in all_layers(model)[0].modules() if isinstance(module, nn.Linear))
    rows = []
    linear.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert_same(gradients(model, batch, trunk=trunk), expected, rtol=1e-4, atol=1e-6)
    assert rows == [3, 3]  # forward, and once more in backward


def test_lora():
    base = make("bert")
    model = get_peft_model(base, LoraConfig(target_modules=["query", "value"], lora_dropout=0.2, r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # zero at first, which would hide everything
    trunk = SharedTrunk(model.get_base_model(), 2)
    batch = make_batch(base)
    rows = count_rows(base)
    check_shared_trunk(trunk, model, repeat_batch(batch, 2), 2)
    rows.clear()
    _, grads = gradients(model, batch, trunk=trunk)
    assert rows == [3, 3, 6]
    assert grads and all("lora_" in name and grad.abs().sum() > 0 for name, grad in grads.items())
    set_dropout(model, 0.0)
    assert_same(gradients(model, batch), gradients(model, batch, trunk=trunk), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), (("bert", "aot_eager"), ("t5", "eager")))
def test_compiled_model_is_not_compiled_again(name, backend):
    torch._dynamo.reset()
    model = make(name, dropout=0.0)
    trunk = SharedTrunk(model, 2)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=graphs)
    with pytest.raises(ValueError, match="is random"):
        check_shared_trunk(trunk, compiled, repeat_batch(make_batch(model), 2), 2)
    counts = [graphs.frame_count]
    for rows in (3, 3, 3, 4, 5, 6, 3):
        batch = make_batch(model, rows)
        grads = gradients(model, batch, trunk=trunk, forward=compiled)
        counts.append(graphs.frame_count)
        assert_same(grads, gradients(model, batch), rtol=1e-3, atol=1e-5)
    # The check compiles nothing; then one graph, without a break in it, and a second one for all other batch sizes.
    # (torch before 2.8 breaks T5 into four, in code of transformers.)
    graph = 4 if name == "t5" and torch.__version__ < "2.8" else 1
    assert counts == [graph * n for n in (0, 1, 1, 1, 2, 2, 2, 2)]


def test_a_new_trunk_on_a_compiled_model():
    # As when training starts again, with a smaller batch.
    torch._dynamo.reset()
    model = make("bert", 0.0)
    set_dropout(model.bert.encoder, 0.5)  # nothing else: the halves are identical if and only if all layers are shared
    compiled = torch.compile(model, backend="eager")
    batch = repeat_batch(make_batch(model), 2)
    for k in (3, 1):
        trunk = SharedTrunk(model, k)
        trunk.start(2)
        assert torch.equal(*compiled(**batch).logits.chunk(2)) == (k == 3)
        trunk.remove()
    assert not torch.equal(*compiled(**batch).logits.chunk(2))


@pytest.mark.parametrize("name", ("bert", "llama", "marian", "vit"))
def test_bfloat16(name):
    model = make(name)
    batch = make_batch(model)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    repeated = repeat_batch(batch, 2)
    trunk = SharedTrunk(model, 2)
    outputs = record_outputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_shared_trunk(trunk, model, repeated, 2)
        outputs.clear()
        loss, grads = gradients(model, batch, trunk=trunk)
    assert torch.equal(*outputs[1].chunk(2)) and not torch.equal(*outputs[2].chunk(2))
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    model.bfloat16()
    check_shared_trunk(trunk, model, repeated, 2)


# ---- First dimensions that equal the number of rows by chance ----


def assert_sharing_two_layers_changes_no_logit(model, batch):
    trunk = SharedTrunk(model, 2)
    with torch.no_grad():
        plain = model(**batch).logits
        trunk.start(2)
        torch.testing.assert_close(model(**batch).logits, plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "length"), ((3, 6), (1, 2), (1, 1), (4, 8), (2, 2)))
def test_sequence_as_long_as_the_batch(name, rows, length):
    # 4 rows and 2 passes are also as many as heads * head size, feed-forward size / 4, ...
    model = make(name).eval()
    batch = repeat_batch(make_batch(model, rows, length), 2)
    assert_sharing_two_layers_changes_no_logit(model, batch)


@pytest.mark.parametrize("rows", (2, 4, 8, 16))
def test_relative_position_embeddings_with_as_many_rows_as_the_batch(rows):
    model = make("deberta-v2", position_buckets=8).eval()
    assert len(model.deberta.encoder.rel_embeddings.weight) == 16
    batch = repeat_batch(make_batch(model, rows), 2)
    assert_sharing_two_layers_changes_no_logit(model, batch)


@pytest.mark.parametrize("rows", (1, 2, 3))
def test_alibi_with_as_many_heads_as_rows(rows):
    tf.set_seed(0)
    config = tf.MptConfig(vocab_size=VOCAB, d_model=16, n_layers=3, n_heads=4, max_seq_len=64, pad_token_id=0)
    model = tf.MptForSequenceClassification(config).eval()
    batch = repeat_batch(make_batch(model, rows), 2)
    assert_sharing_two_layers_changes_no_logit(model, batch)


def test_multiple_choice_has_a_row_for_each_choice():
    model = tf.BertForMultipleChoice(tf.BertConfig(**BERT_LIKE)).train()
    ids = torch.randint(3, VOCAB, (3, 4, 7), generator=torch.Generator().manual_seed(0))
    repeated = repeat_batch({"input_ids": ids, "labels": torch.tensor([0, 1, 2])}, 2)
    trunk = SharedTrunk(model, 2)
    check_shared_trunk(trunk, model, repeated, 2)
    rows = count_rows(model)
    trunk.start(2)
    model(**repeated)
    assert rows == [12, 12, 24]


# ---- A model of our own: what arguments look like ----


@pytest.mark.parametrize("length", (5, 6))  # 6 rows
def test_nested_arguments_and_keywords(length):
    model, batch = Toy(), toy_batch(length=length)
    trunk = SharedTrunk(model, 2)
    check_shared_trunk(trunk, model, batch, 2)
    model.eval()
    plain = model(**batch)["logits"]
    trunk.start(2)
    torch.testing.assert_close(model(**batch)["logits"], plain)
    assert list(model.log.values()) == [3, 3, 6]  # the layers wrote to the model's own dict


def test_names_that_are_never_cut():
    class Table(Layer):
        def forward(self, hidden_states, mask, position_embeddings, log=None, table=None):
            assert table is None or len(table) == 6
            return super().forward(hidden_states, mask, position_embeddings)

    class WithTable(Toy):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Table() for _ in range(3))

        def forward(self, x, mask, labels=None):
            table = torch.ones(6, 2)
            for layer in self.layers:
                x = layer(x, {"rows": (mask,)}, None, None, table)
            return {"logits": x[:, -1]}

    model = WithTable()
    trunk = SharedTrunk(model, 2, non_batch_inputs={"table"})
    trunk.start(2)
    model(**toy_batch())
    trunk.remove()
    SharedTrunk(model, 2).start(2)
    with pytest.raises(AssertionError):
        model(**toy_batch())


@pytest.mark.parametrize(
    ("model", "reason"),
    (
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "no list of transformer layers found in Sequential"),
        (nn.ModuleDict({"layers": nn.ModuleList()}), "no list of transformer layers found"),
        (tf.AlbertModel(tf.AlbertConfig(**{**BERT_LIKE, "embedding_size": 8})), "found in AlbertModel"),
        (tf.XLNetModel(tf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=8)), "XLNetModel"),
        (nn.ModuleList([Toy(3), Toy(2)]), r"2 lists of transformer layers \(0.layers \(3 layers\), 1.layers \(2"),
    ),
)
def test_models_without_one_list_of_layers_are_refused(model, reason):
    with pytest.raises(ValueError, match=reason) as error:
        SharedTrunk(model, 1)
    assert "Set rdrop_shared_layers to 0" in str(error.value)


def test_lists_inside_lists_of_layers_are_not_counted():
    model = Toy(4)
    for layer in model.layers:
        layer.parts = nn.ModuleList([Layer(), Layer()])
    assert {name: len(stack) for name, stack in find_layer_stacks(model).items()} == {"layers": 4}


# ---- How many layers ----


@pytest.mark.parametrize(
    ("asked", "k"),
    ((1, 1), (4, 4), (3.0, 3), (0.01, 1), (0.25, 1), (0.5, 2), (0.6, 2), (0.625, 3), (0.75, 3), (0.99, 4)),
)
def test_number_or_fraction_of_layers(asked, k):
    trunk = SharedTrunk(Toy(4), asked)
    assert (trunk.num_layers, trunk.shared_layers) == (4, k)


@pytest.mark.parametrize("asked", (0, -1, 5, 1.5, 5.0, math.nan, math.inf, -0.5, True, "2", None))
def test_numbers_that_do_not_fit_are_refused(asked):
    with pytest.raises(ValueError, match=r"rdrop_shared_layers=.* model of 4 layers.* from 1 to 4"):
        SharedTrunk(Toy(4), asked)


def test_numbers_for_an_encoder_decoder():
    model = make("marian", encoder_layers=4, decoder_layers=2)
    for asked, k in ((4, 4), (0.5, 2), (0.99, 4), (6, 6)):
        trunk = SharedTrunk(model, asked)
        assert (trunk.num_layers, trunk.shared_layers) == (4, k)
        trunk.remove()
    with pytest.raises(
        ValueError, match=r"=7 does not fit this model of 4 \+ 2 layers: .* 1 to 6, .* 4 encoder layers"
    ):
        SharedTrunk(model, 7)


def test_layerdrop_of_the_shared_layers_is_refused():
    config = {**BART_LIKE, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.1}
    model = tf.BartForConditionalGeneration(tf.BartConfig(**config))
    SharedTrunk(model, 2).remove()
    for k in (3, 4):
        with pytest.raises(ValueError, match=r"model.decoder.layerdrop = 0.1 skips whole layers of model.decoder"):
            SharedTrunk(model, k)
    model = tf.BartForConditionalGeneration(tf.BartConfig(**{**config, "encoder_layerdrop": 0.2}))
    with pytest.raises(ValueError, match=r"encoder.layerdrop = 0.2 .* Set the layerdrop to 0"):
        SharedTrunk(model, 1)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in all_layers(model))
