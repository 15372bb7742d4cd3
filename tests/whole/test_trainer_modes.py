"""R-Drop in the Trainer's other modes: each cell a short real run that keeps what it must, or a refusal before it."""

import functools
import logging

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    EarlyStoppingCallback,
    MptConfig,
    MptForCausalLM,
    TrainerCallback,
)

from hf_rdrop import RDropTrainer, inspect_dropout, set_dropout
from support.short_runs import ALPHA, TINY, make_llama, refuse, run, values
from support.training import HEADS, VOCAB, InOrder, make_collator, make_model, make_rows, step_logs, train

# ---- memory and speed ----

ECONOMIES = {
    "plain": ("single", {}),
    "shared layers": ("single", {"rdrop_shared_layers": 1}),
    "fused head": ("seq2seq", {"rdrop_fused_head": "on"}),
    "both": ("seq2seq", {"rdrop_fused_head": "on", "rdrop_shared_layers": 1}),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("economy", ECONOMIES)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(economy, use_reentrant):
    head, args = ECONOMIES[economy]
    plain = run(make_model(head, 0.3), head, **args)
    kwargs = {"use_reentrant": use_reentrant}
    checkpointed = run(
        make_model(head, 0.3), head, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **args
    )
    assert values(checkpointed) == pytest.approx(values(plain), rel=1e-5)
    for a, b in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class GraphCounter(TrainerCallback):
    """How many graphs have been compiled by the end of each step."""

    def __init__(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.counts = []

    def on_step_end(self, *args, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("economy", ["plain", "shared layers", "both"])
def test_a_compiled_model_trains_alike_and_is_compiled_once(economy):
    head, args = ECONOMIES[economy]
    args, counter = {"max_steps": 4, **args}, GraphCounter()
    plain = run(make_model(head, 0.3), head, **args)
    compiled = run(
        make_model(head, 0.3),
        head,
        torch_compile=True,
        torch_compile_backend="eager",
        trainer_kwargs={"callbacks": [counter]},
        **args,
    )
    # The first step may take two: Transformers sets `config.problem_type` in it.
    assert counter.counts[1] == counter.counts[-1] > 0
    assert values(compiled) == pytest.approx(values(plain), rel=1e-4)


@pytest.mark.parametrize("economy", ["plain", pytest.param("shared layers", marks=pytest.mark.slow)])
def test_a_model_compiled_with_its_backward_pass(economy):
    """Its dropout draws other masks, so losses are compared where nothing is dropped."""
    head, args = ECONOMIES[economy]
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", **args}
    assert train_still(head, **compiled) == pytest.approx(train_still(head, **args), rel=1e-4, abs=1e-6)
    run(make_model(head, 0.3), head, **compiled)


def train_still(head, **args):
    """Loss and gradient where nothing is dropped, so that no random number matters."""
    trainer = train(make_model(head, TINY), head, rdrop_alpha=ALPHA, **args)
    return [entry[key] for entry in step_logs(trainer) for key in ("loss", "grad_norm")]


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_autocast(head):
    ours = run(make_model(head, 0.1), head, bf16=True)
    exact = run(make_model(head, 0.1), head)
    assert [e["ce_loss"] for e in step_logs(ours)] == pytest.approx([e["ce_loss"] for e in step_logs(exact)], rel=0.03)


def test_bfloat16_evaluation_between_the_steps_leaves_them_as_they_are():
    args = {"eval_strategy": "steps", "eval_steps": 1}
    half, full = (run(make_model("single", 0.3), bf16_full_eval=flag, **args) for flag in (True, False))
    assert values(half) == values(full)
    assert half.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=0.02)


@pytest.mark.parametrize("shared", [0, 1])
def test_a_batch_that_does_not_fit_at_the_first_step_is_made_smaller(shared):
    model = make_model("single", 0.3)
    layers, tried = model.bert.encoder.layer, []

    def full(module, args, kwargs):
        if module.training:
            tried.append(len(kwargs["input_ids"]))
            if tried[-1] > 30:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(full, with_kwargs=True)
    trainer = run(model, max_steps=3, auto_find_batch_size=True, rdrop_shared_layers=shared)
    size = trainer._train_batch_size
    assert size < 16 and tried[0] == 32 and tried[-3:-1] == [2 * size] * 2
    assert trainer.state.global_step == 3
    assert len(layers[0]._forward_pre_hooks) == shared  # those of the attempts before are gone


# ---- adapters ----


def adapt(model, **config):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], **config)
    )


def test_the_dropout_of_an_adapter_is_enough():
    trainer = train(adapt(make_model("single", 0.0), lora_dropout=0.3), max_steps=4, learning_rate=1e-2)
    # A new adapter adds 0 whatever it drops: the passes differ from the second step on.
    assert [entry["kl_loss"] > 0 for entry in step_logs(trainer)] == [False, True, True, True]
    refuse(adapt(make_model("single", 0.0)), "Nothing in this model is stochastic")
    assert {s.rate for s in inspect_dropout(trainer.model) if s.rate} == {0.3}


def test_modules_saved_with_an_adapter_are_trained_and_merge():
    model = adapt(make_model("single", 0.3), modules_to_save=["classifier"], lora_dropout=0.1)
    classifier = model.base_model.model.classifier
    start = classifier.modules_to_save["default"].weight.clone()
    trainer = run(model, max_steps=5, learning_rate=1e-2)
    assert not torch.equal(classifier.modules_to_save["default"].weight, start)
    assert torch.equal(classifier.original_module.weight, start)
    predictions = trainer.predict(make_rows("single", 11, seed=1)).predictions
    merged = train(model.merge_and_unload(), max_steps=1, learning_rate=0.0, rdrop_alpha=0.0)
    again = merged.predict(make_rows("single", 11, seed=1)).predictions
    torch.testing.assert_close(torch.tensor(again), torch.tensor(predictions), rtol=1e-4, atol=1e-5)


# ---- noise other than dropout ----


def test_neftune_alone_makes_the_passes_differ():
    model = make_model("single", 0.0)
    trainer = run(model, neftune_noise_alpha=5.0)
    assert not model.get_input_embeddings()._forward_hooks  # as the Trainer leaves it
    rows = make_collator("single", model)(make_rows("single", 4))
    with torch.no_grad():
        assert torch.equal(model.train()(**rows).logits, trainer.model.eval()(**rows).logits)


def test_neftune_below_shared_layers_is_not_enough():
    refuse(make_model("single", 0.0), "rdrop_shared_layers", neftune_noise_alpha=5.0, rdrop_shared_layers=1)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_neftune_on_embeddings_that_are_not_called_is_not_enough(kind):
    sizes = {
        "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0, "forced_eos_token_id": 1},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
    }
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0, **sizes[kind])
    model = AutoModelForSeq2SeqLM.from_config(config)
    refuse(model, "Nothing in this model is stochastic", "seq2seq", neftune_noise_alpha=5.0)
    train(model, "seq2seq", neftune_noise_alpha=5.0, rdrop_dropout=0.1, max_steps=1)


def test_neftune_and_the_fused_head():
    fused, plain = (
        run(make_model("seq2seq", 0.0), "seq2seq", neftune_noise_alpha=5.0, rdrop_fused_head=mode)
        for mode in ("on", "off")
    )
    assert values(fused) == pytest.approx(values(plain), rel=1e-4)


def test_mpt_whose_config_takes_no_rate(caplog):
    model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=2, max_seq_len=32, vocab_size=40))
    with caplog.at_level(logging.WARNING, "hf_rdrop"):
        set_dropout(model, 0.2)
    assert {source.rate for source in inspect_dropout(model)} == {0.2}
    assert model.config.emb_pdrop == 0.2 and "keeps attn_pdrop=0" in caplog.text
    ids = torch.randint(3, 40, (2, 8))
    halves = model.train()(torch.cat((ids, ids))).logits
    assert (halves[:2] - halves[2:]).abs().max() > 1e-4


# ---- options that change nothing ----

NO_EFFECT = {
    "tokens seen": {"include_num_input_tokens_seen": "non_padding"},
    "empty cache": {"torch_empty_cache_steps": 1},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "rank means": {"average_tokens_across_devices": False},
    "label names": {"label_names": ["labels"]},
    "unused columns": {"remove_unused_columns": False},
    "no nan filter": {"logging_nan_inf_filter": False},
}


@pytest.mark.parametrize("option", NO_EFFECT)
def test_options_without_an_effect_on_training(option):
    rows = InOrder(make_rows("token", 32))
    args = {"rows": rows, "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with_option = run(make_model("token", 0.3), "token", **args, **NO_EFFECT[option])
    without = run(make_model("token", 0.3), "token", **args)
    assert values(with_option) == values(without)
    if option == "tokens seen":  # each token once, though it goes through the model twice
        expected = sum(sum(row["attention_mask"]) for row in rows.rows[:24])
        assert with_option.state.num_input_tokens_seen == expected


def test_batches_dispatched_from_one_process():
    rows = InOrder(make_rows("token", 32))
    run(make_model("token", 0.3), "token", rows=rows, accelerator_config={"dispatch_batches": True})


def test_unclipped_gradients():
    clipped, free = (run(make_model("single", 0.3), max_grad_norm=norm, max_steps=1) for norm in (1e6, 0))
    assert step_logs(clipped)[0]["loss"] == step_logs(free)[0]["loss"]
    for a, b in zip(clipped.model.parameters(), free.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ---- callbacks and the best model ----

KEEP_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}


def test_the_best_model_by_the_plain_evaluation_loss_is_loaded():
    trainer = run(
        make_model("single", 0.3),
        max_steps=6,
        learning_rate=3e-2,
        **KEEP_BEST,
    )
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 6 and trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_early_stopping():
    trainer = run(
        make_model("single", 0.3),
        max_steps=20,
        learning_rate=0.0,  # no evaluation is better than the first
        **KEEP_BEST,
        trainer_kwargs={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
    )
    assert trainer.state.global_step == 3


class MovingAverage(TrainerCallback):
    """Evaluates an average of the weights so far, and puts the trained ones back."""

    def on_step_end(self, args, state, control, model, **kwargs):
        now = {name: value.clone() for name, value in model.state_dict().items()}
        old = getattr(self, "average", now)
        self.average = {name: 0.5 * old[name] + 0.5 * v if v.is_floating_point() else v for name, v in now.items()}
        self.trained = now
        model.load_state_dict(self.average)
        control.should_evaluate = True

    def on_evaluate(self, args, state, control, model, **kwargs):
        model.load_state_dict(self.trained)


def test_a_moving_average_of_the_weights():
    average = MovingAverage()
    args = {"max_steps": 4, "rdrop_shared_layers": 1}
    trainer = run(make_model("single", 0.3), trainer_kwargs={"callbacks": [average]}, **args)
    plain = run(make_model("single", 0.3), eval_strategy="steps", eval_steps=1, **args)
    assert values(trainer) == values(plain)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4


# ---- what is refused ----


def test_two_devices_in_one_process_are_refused_when_training_begins():
    class TwoDevices(RDropTrainer):
        def train(self):
            self.args._n_gpu = 2
            return super().train()

    refuse(make_model("single"), "accelerate launch", trainer_class=TwoDevices)


@pytest.mark.parametrize("head", ["causal", "single"])
def test_liger_kernels(head, monkeypatch):
    """Its fused loss leaves no logits while training; its other kernels change nothing here."""
    fused = []

    def apply(model, config=None):
        if head == "single" or (config or {}).get("fused_linear_cross_entropy") is False:
            return
        forward = model.forward

        @functools.wraps(forward)
        def without_logits(*args, **kwargs):
            outputs = forward(*args, **kwargs)
            if not model.training:
                return outputs
            fused.append(1)
            return type(outputs)(loss=outputs.loss)

        model.forward = without_logits

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in make_rows("single", 32)]
    if head == "single":
        run(make_model("single", 0.3), use_liger_kernel=True)
        return
    refuse(make_llama(), "liger_kernel_config.*fused_linear_cross_entropy", rows=rows, use_liger_kernel=True)
    assert fused
    kernels = {"liger_kernel_config": {"fused_linear_cross_entropy": False}, "use_liger_kernel": True}
    run(make_llama(), rows=rows, **kernels)
