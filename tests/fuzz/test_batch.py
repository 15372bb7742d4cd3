"""Batches of any nesting, heads of any shapes and shared trunks of drawn models."""

import collections
import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BatchEncoding,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_rdrop.batch import first_rows, get_batch_size, map_tensors, repeat_batch, stack_passes
from hf_rdrop.objective.heads import find_logits, resolve_head, valid_items
from hf_rdrop.trunk import SharedTrunk
from support.fuzzing import cases, normal, subset

Pair = collections.namedtuple("Pair", "key value")

# ---- Batches ----


def tensors(size):
    """Tensors with `size` rows, with as many columns, without dimensions, or with other first dimensions."""
    shapes = [(), (size,), (size, 2), (1, size), (size + 1,), (size + 1, size), (0,), (0, 3), (size, 0)]
    types = [torch.float32, torch.int64, torch.bool, torch.bfloat16]
    return st.builds(
        lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype),
        st.sampled_from(shapes),
        st.sampled_from(types),
    )


def values(size):
    """Anything that is found in batches, nested up to a few levels."""
    plain = st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=3)
    leaves = tensors(size) | plain | st.lists(plain, min_size=size, max_size=size)
    cache = tensors(size).flatmap(lambda t: st.integers(1, 3).map(lambda layers: ((t, t),) * layers))

    def nest(inner):
        keyed = st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
        return st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.builds(Pair, inner, inner),
            keyed,
            keyed.map(collections.UserDict),
            keyed.map(collections.OrderedDict),
            keyed.map(BatchEncoding),
        )

    return st.recursive(leaves | cache, nest, max_leaves=8)


@st.composite
def batches(draw):
    size = draw(st.integers(0, 4))
    names = st.sampled_from(["labels", "input_ids", "attention_mask", "past_key_values", "head_mask", "extra"])
    batch = draw(st.dictionaries(names, values(size), max_size=5))
    batch["input_ids"] = torch.arange(size * 2).view(size, 2)
    if isinstance(batch.get("labels"), Tensor):
        batch["labels"] = torch.arange(size)
    return size, draw(st.sampled_from([dict, BatchEncoding, collections.UserDict]))(batch)


def leaves_of(value, path=()):
    """(path, leaf) of everything nested; lists without tensors are leaves."""
    if hasattr(value, "items"):
        for key, item in value.items():
            yield from leaves_of(item, (*path, key))
    elif isinstance(value, (list, tuple)) and holds_tensor(value):
        for key, item in enumerate(value):
            yield from leaves_of(item, (*path, key))
    else:
        yield path, value


def holds_tensor(value):
    if isinstance(value, (list, tuple)):
        return any(map(holds_tensor, value))
    return isinstance(value, Tensor) or hasattr(value, "items")


def same(a, b):
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def assert_repeated(value, found, size, passes):
    is_list = isinstance(value, (list, tuple))
    if isinstance(value, Tensor):
        assert same(found, torch.cat([value] * passes) if value.dim() and len(value) == size else value)
    elif hasattr(value, "items"):
        assert list(found) == list(value)
        for key in value:
            assert_repeated(value[key], found[key], size, passes)
    elif is_list and len(value) == size and not holds_tensor(value):
        assert found == value * passes
    elif is_list:
        assert type(found) is type(value) and len(found) == len(value)
        for item, other in zip(value, found, strict=True):
            assert_repeated(item, other, size, passes)
    else:
        assert same(found, value)


@cases(150)
@given(batches(), st.integers(1, 4))
def test_each_leaf_of_a_batch_is_repeated_or_left(drawn, passes):
    size, batch = drawn
    before = copy.deepcopy(batch)
    repeated = repeat_batch(batch, passes)
    assert type(repeated) is dict and list(repeated) == list(batch)
    for name, value in batch.items():
        if name == "head_mask":
            assert repeated[name] is value
        else:
            assert_repeated(value, repeated[name], size, passes)
    assert all(same(a, b) for (_, a), (_, b) in zip(leaves_of(dict(before)), leaves_of(dict(batch)), strict=True))
    cut = first_rows(repeated["input_ids"], passes * size, size)
    assert torch.equal(cut, batch["input_ids"])


@cases(60)
@given(st.dictionaries(st.sampled_from(["labels", "input_ids", "x"]), values(2), max_size=3), st.integers(-1, 2))
def test_any_batch_is_repeated_or_refused(batch, passes):
    rows = [len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if rows and passes > 0:
        assert get_batch_size(batch) in rows
        repeat_batch(batch, passes)
    else:
        with pytest.raises(ValueError, match="no tensor with a batch dimension" if passes > 0 else "at least 1"):
            repeat_batch(batch, passes)


@cases(80)
@given(values(2))
def test_mapping_over_tensors_keeps_types_and_identity(value):
    assert map_tensors(lambda t: t, value) is value
    doubled = map_tensors(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t, value)
    assert type(doubled) is type(value)
    for (path, a), (other, b) in zip(leaves_of(value), leaves_of(doubled), strict=True):
        assert path == other
        assert same(torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() else a, b)


@cases(60)
@given(st.lists(st.integers(0, 6), max_size=3), st.integers(-1, 4))
def test_stacking_any_rows(shape, passes):
    logits = torch.zeros(shape)
    if shape and passes > 0 and shape[0] % passes == 0:
        assert stack_passes(logits, passes).shape == (passes, shape[0] // passes, *shape[1:])
    else:
        with pytest.raises(ValueError, match="rows"):
            stack_passes(logits, passes)


# ---- Heads ----


@cases(100)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.int64, torch.float32, torch.bool]),
    st.sampled_from([None, "regression", "single_label_classification", "multi_label_classification", "nonsense"]),
    st.booleans(),
)
def test_any_head_is_compared_or_refused(logits_shape, labels_shape, dtype, problem_type, shift):
    logits, labels = torch.zeros(logits_shape), torch.zeros(labels_shape).to(dtype)
    rows = 2 * labels_shape[0] if labels_shape else 0
    try:
        found = find_logits({"logits": logits}, rows)
        head = resolve_head(SimpleNamespace(problem_type=problem_type), found, labels, 2, shift)
        value = head.divergence(found, 2)
    except ValueError as error:
        assert "R-Drop" in str(error)
        return
    assert value == 0 and logits_shape[0] == 2 * labels_shape[0]
    if head.mask is not None:
        assert torch.equal(head.mask, valid_items(labels, shift))


@cases(60)
@given(values(2) | tensors(2), st.integers(0, 4))
def test_logits_are_found_in_any_output_or_refused(outputs, rows):
    try:
        logits = find_logits(outputs, rows)
    except ValueError as error:
        assert "R-Drop compares the logits" in str(error)
    else:
        assert isinstance(logits, Tensor) and len(logits) == rows


# ---- Shared trunk ----

SMALL = {"num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3}
CONFIGS = {
    "bert": BertConfig(vocab_size=20, max_position_embeddings=8, **SMALL),
    "distilbert": DistilBertConfig(
        vocab_size=20, max_position_embeddings=8, dim=8, hidden_dim=16, n_heads=2, n_layers=3
    ),
    "gpt2": GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2, pad_token_id=0),
    "t5": T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0, decoder_start_token_id=0
    ),
    "marian": MarianConfig(
        vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=8, pad_token_id=0,
        decoder_start_token_id=0,
    ),
}  # fmt: skip
HEADS = {"t5": T5ForConditionalGeneration, "marian": MarianMTModel}
MODELS = {}


def model_of(family):
    if family not in MODELS:
        set_seed(0)
        config = CONFIGS[family]
        model = HEADS[family](config) if family in HEADS else AutoModelForSequenceClassification.from_config(config)
        model(
            torch.ones(1, 2, dtype=torch.long),
            **({"labels": torch.ones(1, 2, dtype=torch.long)} if family in HEADS else {}),
        )
        MODELS[family] = model, hooks_of(model)  # Transformers leaves hooks of its own
    return MODELS[family][0]


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@st.composite
def inputs_of(draw, family):
    """Token ids, a mask with at least the first position, and labels; batch sizes that equal lengths included."""
    size, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batch = {"input_ids": torch.randint(1, 20, (size, length), generator=generator)}
    mask = subset(draw, size, length).long()
    mask[:, 0] = 1
    if draw(st.booleans()):
        batch["attention_mask"] = mask
    if family in HEADS:
        batch["labels"] = torch.randint(1, 20, (size, draw(st.integers(1, 6))), generator=generator)
    elif draw(st.booleans()):
        embeddings = model_of(family).get_input_embeddings()
        batch["inputs_embeds"] = embeddings(batch.pop("input_ids")).detach() if family != "gpt2" else None
        if batch["inputs_embeds"] is None or size != 1:
            batch["input_ids"] = torch.randint(1, 20, (size, length), generator=generator)
            del batch["inputs_embeds"]
    return batch


@cases(80)
@given(st.sampled_from(list(CONFIGS)), st.integers(2, 3), st.data())
def test_a_shared_trunk_changes_nothing_where_nothing_is_random(family, passes, data):
    model = model_of(family).eval()
    shared = data.draw(st.integers(1, 3) | st.sampled_from([0.01, 0.5, 0.99]))
    batch = data.draw(inputs_of(family))
    size = len(next(iter(batch.values())))
    repeated = repeat_batch(batch, passes, batch_size=size)
    with torch.no_grad():
        plain = model(**repeated).logits
        trunk = SharedTrunk(model, shared)
        try:
            trunk.start(passes)
            shared_logits = model(**repeated).logits
            trunk.stop()
            torch.testing.assert_close(shared_logits, plain, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(model(**batch).logits, plain[:size], atol=1e-5, rtol=1e-4)
        finally:
            trunk.remove()
    assert hooks_of(model) == MODELS[family][1]


@cases(40)
@given(st.sampled_from(list(CONFIGS)), st.data())
def test_a_trunk_is_taken_off_after_a_failure(family, data):
    """A layer that fails leaves a model that works as before."""
    model = model_of(family).eval()
    batch = data.draw(inputs_of(family))
    size = len(next(iter(batch.values())))
    trunk = SharedTrunk(model, data.draw(st.integers(1, 2)))
    layer = data.draw(st.sampled_from(trunk.layers))
    failing = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    trunk.start(2)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        model(**repeat_batch(batch, 2, batch_size=size))
    failing.remove()
    trunk.stop()
    with torch.no_grad():
        stopped = model(**batch).logits
        trunk.remove()
        assert hooks_of(model) == MODELS[family][1]
        assert torch.equal(model(**batch).logits, stopped)


@cases(60)
@given(
    st.sampled_from(list(CONFIGS)),
    st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=2) | st.sampled_from([4, 5, 3.0, -0.5]),
)
def test_any_number_of_shared_layers_fits_or_is_refused(family, shared):
    model = model_of(family)
    layers = 4 if family in HEADS else 3
    is_number = isinstance(shared, (int, float)) and not isinstance(shared, bool)
    if is_number and (0 < shared < 1 or (1 <= shared <= layers and shared == int(shared))):
        trunk = SharedTrunk(model, shared)
        assert 1 <= trunk.shared_layers <= layers
        trunk.remove()
    else:
        with pytest.raises(ValueError, match="rdrop_shared_layers"):
            SharedTrunk(model, shared)
    assert hooks_of(model) == MODELS[family][1]


@cases(30)
@given(st.sampled_from(list(CONFIGS)), st.data())
def test_gradients_through_a_shared_trunk_are_those_of_the_repeated_batch(family, data):
    model = model_of(family).eval()
    batch = data.draw(inputs_of(family))
    size = len(next(iter(batch.values())))
    trunk = SharedTrunk(model, data.draw(st.integers(1, 3)))
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        logits = model(**repeat_batch(batch, 2, batch_size=size)).logits
        chosen = normal(lambda _: 7, *logits.shape, dtype=logits.dtype)
        return torch.autograd.grad((logits * chosen).sum(), weights, allow_unused=True)

    try:
        plain = gradients()
        trunk.start(2)
        shared = gradients()
    finally:
        trunk.remove()
    for a, b in zip(plain, shared, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-3)
