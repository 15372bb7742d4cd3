"""Which positions a language model's loss scores: measured on its own loss, whatever its class is called."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from hf_rdrop.objective.scored import measure_shift
from support.settings import causal_rows, make_llama
from support.short_runs import refuse
from support.training import step_logs, train

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIR = {
    **{"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32},
    **{"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.3},
}
PROPHET = {
    **{"vocab_size": 40, "hidden_size": 16, "encoder_ffn_dim": 32, "num_encoder_layers": 1},
    **{"num_encoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_decoder_layers": 1},
    **{"num_decoder_attention_heads": 2, "dropout": 0.3},
}


def make_qwen2_audio():
    """A decoder-only language model whose class is not in the causal mapping."""
    text = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio["model_type"] = "qwen2_audio_encoder"
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=39)
    )


def make_voxtral():
    text = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8}
    audio = {"model_type": "voxtral_encoder", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio["intermediate_size"] = 64
    return tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(text_config=text, audio_config=audio, audio_token_id=39)
    )


class SameLabels(tf.LlamaForCausalLM):
    """A causal class of one's own whose loss does not shift."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        output["loss"] = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


class TiedByWeight(tf.LlamaForCausalLM):
    """A causal class whose logits are made of the weight of its input embeddings, which is no head to be called."""

    def get_output_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = F.linear(hidden, self.model.embed_tokens.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def make_fsmt():
    vocabularies = {"langs": ["en", "de"], "src_vocab_size": 40, "tgt_vocab_size": 40}
    sizes = {name: value for name, value in PAIR.items() if name != "vocab_size"}
    torch.manual_seed(0)
    return tf.FSMTForConditionalGeneration(tf.FSMTConfig(**vocabularies, **sizes))


def pair_rows():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (8, 6), generator=draw)
    labels = ids.masked_fill(torch.arange(6) > torch.arange(8)[:, None] % 4 + 2, -100)
    rows = {"input_ids": ids, "decoder_input_ids": ids.roll(1, 1), "labels": labels}
    return [{name: value[i] for name, value in rows.items()} for i in range(8)]


@pytest.mark.parametrize(
    "make, rows, shifts",
    [(make_fsmt, pair_rows, 0), (lambda: TiedByWeight(make_llama(0.3).config), causal_rows, 1)],
)
def test_logits_made_of_the_weight_of_the_input_embeddings(make, rows, shifts):
    """Right values, where what `get_output_embeddings` returns puts out no logits."""
    model, kept = make(), []
    arguments = {"rdrop_alpha": 4.0, "rdrop_fused_head": "off", "max_steps": 1, "learning_rate": 0.0}
    model.register_forward_hook(lambda m, a, k, output: kept.append((k["labels"], output)), with_kwargs=True)
    log = step_logs(train(model, rows=rows(), **arguments))[0]
    labels, output = kept[-1]
    half = len(labels) // 2
    labels, logits = labels[:half, shifts:], output["logits"].detach().double()[:, : labels.shape[1] - shifts]
    p, q = logits[:half].log_softmax(-1)[labels != -100], logits[half:].log_softmax(-1)[labels != -100]
    kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    ce = (F.nll_loss(p, labels[labels != -100]) + F.nll_loss(q, labels[labels != -100])) / 2
    assert log["kl_loss"] == pytest.approx(float(kl), rel=1e-4) and kl > 1e-4
    assert log["ce_loss"] == pytest.approx(float(ce), rel=1e-4)


def same_labels():
    return SameLabels(make_llama(0.3).config)


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", lora_dropout=0.1))


def checkpointed():
    model = make_llama(0.3)
    model.gradient_checkpointing_enable()
    return model


MODELS = {
    "llama": (make_llama, True),
    "gradient checkpointing": (checkpointed, True),
    "bfloat16": (lambda: make_llama().bfloat16(), True),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)), True),
    "router loss": (
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=32, output_router_logits=True)
        ),
        True,
    ),
    "speech": (make_qwen2_audio, True),
    "speech of another kind": (make_voxtral, True),
    "a decoder of its own": (lambda: tf.BartForCausalLM(tf.BartConfig(**PAIR)), False),
    "trocr": (
        lambda: tf.TrOCRForCausalLM(
            tf.TrOCRConfig(vocab_size=40, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
        ),
        False,
    ),
    "xlnet": (
        lambda: tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16)),
        False,
    ),
    "a class of one's own": (same_labels, False),
    "masked": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, intermediate_size=32)), False),
    "seq2seq": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**PAIR)), False),
}


def batch_of(labels=None, rows=4, length=6):
    ids = torch.randint(3, 38, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone() if labels is None else labels(ids.clone())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def without_first_rows(ids):
    ids[:3] = -100
    return ids


def padded_left(ids):
    ids[:, :3] = -100
    return ids


BATCHES = {
    "full": batch_of(),
    "padded on the left": batch_of(padded_left),
    "the first rows have no label": batch_of(without_first_rows),
    "one row": batch_of(rows=1),
    "one label in all": batch_of(lambda ids: torch.full_like(ids, 7)),
    "the last label alone": batch_of(lambda ids: ids.index_fill(1, torch.arange(5), -100)),
    "one token": batch_of(length=1),
}


def snapshot(model):
    return (
        [torch.random.get_rng_state(), *(buffer.clone() for buffer in model.buffers())],
        [module.training for module in model.modules()],
        [(parameter.grad, parameter.requires_grad) for parameter in model.parameters()],
        len(model._forward_hooks) + len(model.get_output_embeddings()._forward_hooks),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("case", MODELS)
def test_every_family_by_its_own_loss_and_nothing_is_left_behind(case):
    make, expected = MODELS[case]
    torch.manual_seed(0)
    model = make().train()
    tensors, *rest = snapshot(model)
    assert measure_shift(model, model, batch_of(), batch_of()["labels"]) == (expected, False)
    after, *others = snapshot(model)
    assert all(map(torch.equal, tensors, after)) and rest == others


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", ["llama", "a decoder of its own", "speech"])
def test_every_batch(case, batch):
    make, expected = MODELS[case]
    torch.manual_seed(0)
    model = make()
    assert measure_shift(model, model, BATCHES[batch], BATCHES[batch]["labels"]) == (expected, False)


def test_a_batch_without_labels_leaves_it_to_the_next():
    model, batch = make_llama(), batch_of(lambda ids: torch.full_like(ids, -100))
    assert measure_shift(model, model, batch, batch["labels"]) == (None, True)


@pytest.mark.parametrize("wrap", [lora, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model(wrap):
    for make, expected in (MODELS["llama"], MODELS["a decoder of its own"]):
        model = make()
        assert measure_shift(model, wrap(model), batch_of(), batch_of()["labels"]) == (expected, False)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        model = make_qwen2_audio()
        assert measure_shift(model, model, batch_of(), batch_of()["labels"]) == (True, False)


def test_a_model_that_fails_on_two_rows_is_given_all():
    model = make_qwen2_audio()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: 1 / 0 if len(kwargs["input_ids"]) < 4 else None, with_kwargs=True
    )
    assert measure_shift(model, model, batch_of(), batch_of()["labels"]) == (True, False)
    assert measure_shift(model, model, batch_of(rows=3), batch_of(rows=3)["labels"]) == (None, False)
    assert torch.is_grad_enabled()


class TwoAhead(SameLabels):
    """Scores each position against the label after the next."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, F.pad(labels[:, 2:], (0, 2), value=-100))


NEITHER = {
    "two ahead": lambda: TwoAhead(make_llama(0.3).config),
    "n-grams": lambda: tf.ProphetNetForCausalLM(
        tf.ProphetNetConfig(**PROPHET, is_decoder=True, is_encoder_decoder=False)
    ),
}


@pytest.mark.parametrize("case", NEITHER)
def test_neither_reading(case):
    rows = causal_rows()
    refuse(NEITHER[case](), "scores its predictions neither.*logits_for_agreement", rows=rows)
    train(NEITHER[case](), rows=rows, rdrop_alpha=0.0)

    def own(outputs, inputs):
        return outputs["logits"], inputs["labels"] != -100

    assert step_logs(train(NEITHER[case](), rows=rows, trainer_kwargs={"logits_for_agreement": own}))[0]["kl_loss"] > 0


# ---- in training ----


def naive(model, rows, expected, seen):
    """Mean cross-entropy and divergence over the scored positions, from the logits of both passes in float64."""
    labels = torch.tensor([row["labels"] for row in rows])
    ce, kl, count = 0.0, 0.0, 0
    for i, row in enumerate(labels.tolist()):
        for t in range(len(row)):
            target = row[t + 1] if expected and t + 1 < len(row) else -100 if expected else row[t]
            if target == -100:
                continue
            p, q = (logits[i, t].double().log_softmax(-1) for logits in seen.chunk(2))
            ce -= (p[target] + q[target]).item() / 2
            kl += 0.5 * ((p.exp() - q.exp()) * (p - q)).sum().item()
            count += 1
    return ce / count, kl / count


@pytest.mark.parametrize("case", ["a decoder of its own", "a class of one's own", "speech", "speech of another kind"])
def test_the_divergence_is_taken_where_the_loss_is(case):
    make, expected = MODELS[case]
    torch.manual_seed(0)
    model, seen, rows = make(), [], causal_rows()
    nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits) if module.training else None)
    args = {"max_steps": 1, "rdrop_fused_head": "off", "rdrop_alpha": 2.0, "train_sampling_strategy": "sequential"}
    found = step_logs(train(model, rows=rows, rdrop_dropout=0.3, **args))[0]
    ce, kl = naive(model, rows, expected, seen[0].detach())
    assert kl > 1e-4
    assert found["kl_loss"] == pytest.approx(kl, rel=1e-4) and found["ce_loss"] == pytest.approx(ce, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])  # as from_pretrained leaves a model
@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("case", ["a decoder of its own", "a class of one's own", "speech"])
def test_items_are_counted_where_the_loss_is_from_the_first_step(case, alpha, training):
    torch.manual_seed(0)
    model = MODELS[case][0]().train(training)
    found = []
    for size, steps in ((16, 1), (2, 8)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "rdrop_alpha": alpha}
        trainer = train(copy.deepcopy(model), rows=causal_rows(), max_steps=1, rdrop_dropout=1e-9, **args)
        found.append(step_logs(trainer)[0])
    for key in ("loss", "grad_norm"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4)


@pytest.mark.parametrize("case", ["a decoder of its own", "speech"])
def test_trainers_label_smoothing_goes_by_the_class(case):
    args = {"rows": causal_rows(), "rdrop_dropout": 0.1, "label_smoothing_factor": 0.1}
    refuse(MODELS[case][0](), "goes by the class's name", **args)


def test_the_measurement_changes_no_trajectory(monkeypatch):
    """A model whose class is right trains bit for bit as without it, at alpha 0 and with the passes."""
    for alpha in (0.0, 2.0):
        runs = []
        for measured in (True, False):
            with monkeypatch.context() as patch:
                if not measured:
                    patch.setattr("hf_rdrop.training.run.measure_shift", lambda *args: (None, False))
                runs.append(step_logs(train(make_llama(0.3), rows=causal_rows(), rdrop_alpha=alpha)))
        for first, second in zip(*runs, strict=True):
            assert (first["loss"], first["grad_norm"]) == (second["loss"], second["grad_norm"])
