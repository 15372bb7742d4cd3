"""Agreements, sources of sub-models and schedules through the Trainer: the objective is the one that was asked for."""

import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    set_seed,
)

from hf_rdrop import RDropSeq2SeqTrainer, RDropTrainer, RDropTrainingArguments
from hf_rdrop.agreements import OUTPUT_AGREEMENTS, hidden_state_agreement
from hf_rdrop.contrastive import info_nce_agreement, pool
from hf_rdrop.dropout import inspect_dropout
from hf_rdrop.objective.heads import find_logits, resolve_head
from support.training import HEADS, make_collator, make_model, make_rows, step_logs, train

TINY = 1e-9


def make_trainer(model, head, folder, **args):
    args = RDropTrainingArguments(str(folder), use_cpu=True, report_to=[], **args)
    trainer = RDropTrainer(model=model, args=args, train_dataset=make_rows(head))
    trainer.model.train()
    return trainer


def batch_of(head, model, rows=6):
    return make_collator(head, model)(make_rows(head, rows))


def split(value, passes=2):
    return value.unflatten(0, (passes, -1))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("agreement", [*OUTPUT_AGREEMENTS, "symmetric_kl + 0.3 * hidden_states", "2 * info_nce"])
def test_the_loss_is_ce_and_alpha_half_of_what_was_asked_for(head, agreement, tmp_path):
    model = make_model(head, 0.2)
    if head == "regression" and agreement in ("jensen_shannon", "squared_probabilities"):
        trainer = make_trainer(model, head, tmp_path, rdrop_agreement=agreement)
        with pytest.raises(ValueError, match=f"'{agreement}' compares probabilities"):
            trainer.compute_loss(model, batch_of(head, model))
        return
    trainer = make_trainer(model, head, tmp_path, rdrop_agreement=agreement, rdrop_alpha=3.0)
    inputs = batch_of(head, model)
    torch.manual_seed(1)
    loss = trainer.compute_loss(model, inputs)
    torch.manual_seed(1)
    repeated = trainer.rdrop_run.layout.repeat(inputs, 2)
    outputs = model(**repeated, output_hidden_states=True)
    logits = find_logits(outputs, 12)
    resolved = resolve_head(model.config, logits, inputs["labels"], 2)
    layers = {"encoder": outputs.get("hidden_states") or outputs.get("encoder_hidden_states")}
    masks = {"encoder": inputs["attention_mask"]}
    if head == "seq2seq":
        layers["decoder"], masks["decoder"] = outputs.decoder_hidden_states, inputs["labels"] != -100
    if agreement in OUTPUT_AGREEMENTS:
        expected = OUTPUT_AGREEMENTS[agreement](split(logits), resolved.mask, resolved.problem_type)
    elif "hidden" in agreement:
        values = [hidden_state_agreement(layers[name][1:], 2, masks[name]) for name in layers]
        expected = OUTPUT_AGREEMENTS["symmetric_kl"](split(logits), resolved.mask, resolved.problem_type)
        expected = expected + 0.3 * sum(values) / len(values)
    else:
        texts = [pool(half, masks["encoder"], "mean") for half in split(layers["encoder"][-1])]
        expected = 2 * info_nce_agreement(torch.stack(texts))
    assert expected > 1e-4
    assert loss.item() == pytest.approx((outputs.loss + 1.5 * expected).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("head", "args"), [("single", {"rdrop_shared_layers": 1}), ("seq2seq", {"rdrop_fused_head": "on"})]
)
def test_the_checks_of_the_first_batch_leave_every_weight_to_train_under_autocast(head, args, tmp_path):
    """The casts that autocast keeps of their forwards without gradient must not serve the one with gradient."""
    model = make_model(head, 0.2)
    trainer = make_trainer(model, head, tmp_path, **args)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trainer.compute_loss(model, batch_of(head, model))
    loss.backward()
    keys = ("key.bias", "k_proj.bias")  # which change no attention
    assert [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not name.endswith(keys) and (p.grad is None or p.grad.abs().sum() == 0)
    ] == []


SOURCES = [{"rdrop_layer_drop": 0.4}, {"rdrop_insert_dropout": 0.2}]


def make_llama():
    set_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            num_labels=3,
            initializer_range=0.3,
        )
    )


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_without_dropout_trains_with_each_source_and_is_stock_again(source, tmp_path):
    model = make_llama()
    names = [name for name, _ in model.named_modules()]
    seen = []

    class Watching(RDropTrainer):
        def training_step(self, *args, **kwargs):
            seen.append([name for name, _ in model.named_modules()] != names)
            return super().training_step(*args, **kwargs)

    trainer = train(
        model, trainer_class=Watching, save_strategy="steps", save_steps=1, output_dir=str(tmp_path), **source
    )
    assert all(entry["kl_loss"] > 1e-3 for entry in step_logs(trainer)) and all(seen)
    assert [name for name, _ in model.named_modules()] == names
    assert all(vars(module).get("forward") is None for module in model.modules())
    loaded, info = LlamaForSequenceClassification.from_pretrained(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not [found for found in inspect_dropout(loaded) if found.rate]
    with pytest.raises(ValueError, match="Nothing in this model is stochastic"):
        train(make_llama())


def test_plain_training_has_the_same_noise():
    """The control of such a comparison: alpha 0 with the source."""
    plain, noisy = (train(make_model("single", 0.0), rdrop_alpha=0.0, rdrop_layer_drop=p) for p in (0.0, 0.4))
    losses = [[entry["ce_loss"] for entry in step_logs(run)] for run in (plain, noisy)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert all(entry["kl_loss"] == 0 for entry in step_logs(noisy))


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_above_a_shared_trunk(source):
    trainer = train(make_llama(), rdrop_shared_layers=1, **source)
    assert all(entry["kl_loss"] > 1e-4 for entry in step_logs(trainer))


def test_an_impossible_place_is_an_error_before_the_first_step():
    model = make_model("single", 0.1)
    with pytest.raises(ValueError, match="insert_dropout: no attention or feed-forward block"):
        train(model, rdrop_insert_dropout=0.1, rdrop_alpha=0.0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 4), ("sigmoid", 1.0)])
def test_alpha_rises_and_the_log_lines_say_so(schedule, warmup, accumulation):
    trainer = train(
        make_model("token", 0.2),
        "token",
        max_steps=6,
        logging_steps=2,
        rdrop_alpha=2.0,
        rdrop_alpha_schedule=schedule,
        rdrop_alpha_warmup=warmup,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
    )
    logs = step_logs(trainer)
    for entry in logs:
        total = entry["ce_loss"] + entry["rdrop_alpha"] / 2 * entry["kl_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    alphas = [entry["rdrop_alpha"] for entry in logs]
    if schedule == "linear":  # means of 0.5 and 1, 1.5 and 2, 2 and 2, weighted by KL
        assert 0.5 < alphas[0] < 1 and 1.5 < alphas[1] < 2 and alphas[2] == pytest.approx(2, rel=1e-3)
    else:
        assert 2 * math.exp(-5) < alphas[0] < alphas[1] < alphas[2] < 2
    assert "rdrop_alpha" not in step_logs(train(make_model("token", 0.2), "token"))[0]


def test_hidden_states_that_a_model_does_not_return_are_an_error():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = make_model("single", 0.1)

        def forward(self, input_ids, labels=None, output_hidden_states=None):
            found = self.bert(input_ids, labels=labels)
            return {"loss": found.loss, "logits": found.logits}

    with pytest.raises(ValueError, match="returns no hidden states"):
        train(Bare(), rdrop_agreement="hidden_states")


def test_the_fused_head_gives_way(caplog):
    """It computes the symmetric KL alone."""
    with pytest.raises(ValueError, match="rdrop_agreement=jensen_shannon needs the logits"):
        train(
            make_model("seq2seq", 0.1),
            "seq2seq",
            RDropSeq2SeqTrainer,
            rdrop_fused_head="on",
            rdrop_agreement="jensen_shannon",
        )
