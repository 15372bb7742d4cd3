"""The fused head in the Trainer: loss and gradients of the plain path in every family's own forward, or a reason."""

import copy
import logging

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from benchmarking.measure import peak_bytes
from hf_rdrop import (
    RDropMixin,
    RDropSeq2SeqTrainer,
    RDropSeq2SeqTrainingArguments,
    RDropTrainer,
    RDropTrainingArguments,
)
from support.training import make_model, make_rows, step_logs, train

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CAUSAL = {
    "llama": {"attention_dropout": 0.2},
    "qwen2": {"num_key_value_heads": 2, "attention_dropout": 0.2, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
}
MASKED = {
    "bert": {},
    "roberta": {"max_position_embeddings": 70},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "electra": {"embedding_size": 16},
    "deberta-v2": {},
    "modernbert": {"embedding_dropout": 0.2, "mlp_dropout": 0.2, "global_attn_every_n_layers": 2},
}
SEQ2SEQ_SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 1,
}
T5_SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
SEQ2SEQ = ("t5", "marian", "bart", "mbart", "pegasus")
CASES = [
    *(("causal", name) for name in CAUSAL),
    *(("masked", name) for name in MASKED),
    *(("seq2seq", name) for name in SEQ2SEQ),
]


def make_lm(kind, name, **config):
    """A tiny language model of one family, with every output bias filled so that forgetting it shows."""
    transformers.set_seed(0)
    sizes, auto = {
        "causal": ({**SIZES, **CAUSAL.get(name, {})}, AutoModelForCausalLM),
        "masked": ({**SIZES, **MASKED.get(name, {})}, AutoModelForMaskedLM),
        "seq2seq": (T5_SIZES if name == "t5" else SEQ2SEQ_SIZES, AutoModelForSeq2SeqLM),
    }[kind]
    model = auto.from_config(AutoConfig.for_model(name, **{**sizes, **config}))
    with torch.no_grad():
        for tensor in (
            getattr(model, "final_logits_bias", None),
            getattr(model.get_output_embeddings(), "bias", None),
        ):
            if tensor is not None:
                tensor.normal_()
    return model


def make_batch(kind, rows=4):
    if kind == "seq2seq":
        return {
            k: torch.tensor([row[k] for row in make_rows("seq2seq", rows)])
            for k in ("input_ids", "attention_mask", "labels")
        }
    data = make_rows("token", rows)
    ids = torch.tensor([row["input_ids"] for row in data])
    mask = torch.tensor([row["attention_mask"] for row in data])
    labels = ids.masked_fill(mask == 0, -100)
    if kind == "masked":
        labels[:, ::2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_trainer(model, kind="causal", trainer_class=None, trainer_kwargs=None, **args):
    args_class = RDropSeq2SeqTrainingArguments if kind == "seq2seq" else RDropTrainingArguments
    trainer_class = trainer_class or (RDropSeq2SeqTrainer if kind == "seq2seq" else RDropTrainer)
    defaults = {"output_dir": "unused", "use_cpu": True, "report_to": [], "rdrop_alpha": 3.0}
    trainer = trainer_class(model=model, args=args_class(**{**defaults, **args}), **(trainer_kwargs or {}))
    trainer.check_setup()
    return trainer


def loss_and_gradients(trainer, batch):
    """One training loss with dropout on, from the same random numbers."""
    model = trainer.model.train()
    model.zero_grad()
    torch.manual_seed(1)
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(fused, plain, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=1e-6)
    assert fused[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(
            fused[1][name], gradient, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_family_trains_alike(kind, name, smoothing):
    if kind == "seq2seq" and smoothing:
        batch = make_batch(kind)
        batch["decoder_input_ids"] = make_lm(kind, name).prepare_decoder_input_ids_from_labels(batch["labels"])
    else:
        batch = make_batch(kind)
    model = make_lm(kind, name)
    outcomes = []
    for mode in ("off", "on"):
        trainer = make_trainer(
            copy.deepcopy(model), kind, rdrop_fused_head=mode, label_smoothing_factor=smoothing, rdrop_passes=2
        )
        outcomes.append(loss_and_gradients(trainer, batch))
        assert (trainer.rdrop_run.fused_head is not None) == (mode == "on")
    plain, fused = outcomes
    assert plain[0] > 0.1
    assert_same(fused, plain)


def test_the_test_above_can_fail():
    batch = make_batch("seq2seq")
    plain, wrong = make_lm("seq2seq", "marian"), make_lm("seq2seq", "marian")
    with torch.no_grad():
        wrong.final_logits_bias.zero_()
    plain = loss_and_gradients(make_trainer(plain, "seq2seq", rdrop_fused_head="off"), batch)
    with pytest.raises(AssertionError):
        assert_same(loss_and_gradients(make_trainer(wrong, "seq2seq", rdrop_fused_head="on"), batch), plain)


@pytest.mark.parametrize(
    "args",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"rdrop_passes": 3},
        {"rdrop_interval": 2},
        {"rdrop_interval": 2, "label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.1, "average_tokens_across_devices": False},
    ],
    ids=lambda args: ",".join(args),
)
def test_whole_runs_are_alike(args):
    """Losses, CE, KL, gradient norms and final weights over several steps of real training."""
    runs = [
        train(
            make_model("seq2seq", 0.2),
            "seq2seq",
            RDropSeq2SeqTrainer,
            max_steps=4,
            rdrop_alpha=3.0,
            rdrop_fused_head=mode,
            learning_rate=1e-2,
            optim="sgd",
            **args,
        )
        for mode in ("off", "on")
    ]
    for plain, fused in zip(*map(step_logs, runs), strict=True):
        for key in ("loss", "ce_loss", "kl_loss", "grad_norm"):
            assert fused[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6), key
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_as_close_to_float32_as_the_plain_path():
    batch, model = make_batch("seq2seq"), make_lm("seq2seq", "marian")
    exact = loss_and_gradients(make_trainer(copy.deepcopy(model), "seq2seq", rdrop_fused_head="off"), batch)
    errors = {}
    for mode in ("off", "on"):
        trainer = make_trainer(copy.deepcopy(model), "seq2seq", rdrop_fused_head=mode)
        with torch.autocast("cpu", torch.bfloat16):
            loss, grads = loss_and_gradients(trainer, batch)
        errors[mode] = [abs(loss - exact[0]) / exact[0]] + [
            (grads[name].float() - grad).norm() / grad.norm() for name, grad in exact[1].items() if grad.norm() > 1e-3
        ]
    for off, on in zip(errors["off"], errors["on"], strict=True):
        assert on <= 1.2 * off + 2e-3


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts_get_no_gradient(frozen):
    batch, outcomes = make_batch("causal"), []
    for mode in ("off", "on"):
        model = make_lm("causal", "llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(("lm_head" in name) == (frozen == "body"))
        outcomes.append(loss_and_gradients(make_trainer(model, rdrop_fused_head=mode), batch))
    assert_same(outcomes[1], outcomes[0])
    assert any("lm_head" in name for name in outcomes[1][1]) == (frozen == "body")


def test_lora_on_the_body_is_fine():
    batch, outcomes = make_batch("causal"), []
    for mode in ("off", "on"):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.2, init_lora_weights=False)
        torch.manual_seed(0)
        model = peft.get_peft_model(make_lm("causal", "llama"), config)
        outcomes.append(loss_and_gradients(make_trainer(model, rdrop_fused_head=mode), batch))
    assert_same(outcomes[1], outcomes[0])


class Reweighted(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def lora_on_the_head():
    return peft.get_peft_model(make_lm("causal", "llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))


MIXTRAL = {"num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True, "attention_dropout": 0.2}
REFUSED = {
    "soft-capping": (
        lambda: make_lm("causal", "gemma2", head_dim=8, num_key_value_heads=2, attention_dropout=0.2),
        "soft-capping",
    ),
    "scaling": (lambda: make_lm("causal", "cohere", logit_scale=0.5, attention_dropout=0.2), "soft-capping, scaling"),
    "router loss": (lambda: make_lm("causal", "mixtral", router_aux_loss_coef=5.0, **MIXTRAL), "mean cross-entropy"),
    "LoRA": (lora_on_the_head, "no plain torch.nn.Linear"),
    "head not called": (
        lambda: make_lm("masked", "mobilebert", embedding_size=8, intra_bottleneck_size=16),
        "applies it to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_impossible_falls_back_with_the_reason(case, caplog, monkeypatch):
    """`auto` trains on the full logits and says why, `on` stops before the first step."""
    make, reason = REFUSED[case]
    kind = "masked" if case == "head not called" else "causal"
    batch = make_batch(kind)
    monkeypatch.setattr("hf_rdrop.fused.head.MIN_VOCAB_SIZE", 1)
    torch.manual_seed(0)
    model = make()
    plain = loss_and_gradients(make_trainer(copy.deepcopy(model), kind, rdrop_fused_head="off"), batch)
    with caplog.at_level(logging.WARNING, "hf_rdrop"):
        auto = loss_and_gradients(make_trainer(copy.deepcopy(model), kind, rdrop_fused_head="auto"), batch)
    assert_same(auto, plain, rtol=0, atol=0)
    assert caplog.text.count("keeps the full logits") == 1 and reason in caplog.text
    with pytest.raises(ValueError, match=f"(?s)rdrop_fused_head='on'.*{reason}"):
        loss_and_gradients(make_trainer(model, kind, rdrop_fused_head="on"), batch)


def test_a_loss_in_bfloat16_is_no_loss_of_its_own():
    """Marian averages in the type of its logits; that of a bfloat16 model is off by up to a percent."""
    trainer = train(make_model("seq2seq").bfloat16(), "seq2seq", rdrop_alpha=2.0, rdrop_fused_head="on")
    assert trainer.rdrop_run.fused_head is not None
    assert all(0 < entry["kl_loss"] < entry["ce_loss"] for entry in step_logs(trainer))


def test_a_model_that_fails_when_tried_out_trains_on_its_logits(caplog, monkeypatch):
    monkeypatch.setattr("hf_rdrop.fused.head.MIN_VOCAB_SIZE", 1)
    model = make_lm("causal", "llama")
    forward = model.forward

    def picky(*args, **kwargs):
        if len(kwargs["input_ids"]) < 4:
            raise IndexError("too few rows")
        return forward(*args, **kwargs)

    model.forward = picky
    trainer = make_trainer(model)
    assert loss_and_gradients(trainer, make_batch("causal"))[0] > 0
    assert trainer.rdrop_run.fused_head is None and "IndexError: too few rows" in caplog.text


def test_a_loss_of_ones_own_needs_the_logits():
    class Ours(RDropMixin, Reweighted):
        pass

    model = make_lm("causal", "llama")
    with pytest.raises(ValueError, match=r"Reweighted\.compute_loss gets"):
        loss_and_gradients(make_trainer(model, trainer_class=Ours, rdrop_fused_head="on"), make_batch("causal"))
    with pytest.raises(ValueError, match="compute_loss_func"):
        kwargs = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()}
        loss_and_gradients(make_trainer(model, rdrop_fused_head="on", trainer_kwargs=kwargs), make_batch("causal"))


@pytest.mark.parametrize("head", ["single", "token"])
def test_heads_without_a_vocabulary_are_left_alone(head, caplog):
    assert train(make_model(head), head).rdrop_run.fused_head is None
    assert "logits" not in caplog.text
    with pytest.raises(ValueError, match="no language-model head"):
        train(make_model(head), head, rdrop_fused_head="on")


def test_auto_looks_at_the_vocabulary():
    for vocabulary, used in ((40, False), (5000, True)):
        trainer = make_trainer(make_lm("causal", "llama", vocab_size=vocabulary))
        loss_and_gradients(trainer, make_batch("causal"))
        assert (trainer.rdrop_run.fused_head is not None) is used


def test_plain_training_is_never_touched():
    """alpha 0 is the plain Trainer bit for bit, whatever the vocabulary."""
    trainer = make_trainer(make_lm("causal", "llama", vocab_size=5000), rdrop_alpha=0.0, rdrop_fused_head="on")
    loss_and_gradients(trainer, make_batch("causal"))
    assert trainer.rdrop_run.fused_head is None


def test_who_asks_for_the_outputs_gets_the_logits():
    trainer, batch = make_trainer(make_lm("causal", "llama"), rdrop_fused_head="on"), make_batch("causal")
    fused = loss_and_gradients(trainer, batch)[0]
    torch.manual_seed(1)
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    torch.testing.assert_close(loss.detach(), fused)
    assert outputs.logits.shape == (4, 8, 40)


def test_evaluation_and_the_model_are_left_as_they_were():
    trainer = train(
        make_model("seq2seq"),
        "seq2seq",
        RDropSeq2SeqTrainer,
        rdrop_fused_head="on",
        eval_strategy="steps",
        eval_steps=1,
    )
    assert trainer.rdrop_run.fused_head is not None
    plain = train(
        make_model("seq2seq"),
        "seq2seq",
        RDropSeq2SeqTrainer,
        rdrop_fused_head="off",
        eval_strategy="steps",
        eval_steps=1,
    )
    evals = [
        [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry] for run in (trainer, plain)
    ]
    assert len(evals[0]) == 2 and evals[0] == pytest.approx(evals[1], rel=1e-5)
    head = trainer.model.get_output_embeddings()
    assert "forward" not in vars(head) and trainer.model.final_logits_bias.shape == (1, 40)
    assert trainer.model.training or not any(m.training for m in trainer.model.modules())


def test_an_error_in_the_forward_leaves_the_model_whole():
    trainer, batch = (
        make_trainer(make_lm("seq2seq", "marian"), "seq2seq", rdrop_fused_head="on"),
        make_batch("seq2seq"),
    )
    loss_and_gradients(trainer, batch)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        trainer.compute_loss(trainer.model, {**batch, "labels": batch["labels"].clamp(min=0) + 1000})
    assert "forward" not in vars(trainer.model.lm_head) and trainer.model.final_logits_bias.shape == (1, 40)


def test_the_check_draws_no_random_number_and_keeps_training_flags():
    trainer, batch = make_trainer(make_lm("causal", "llama"), rdrop_fused_head="on"), make_batch("causal")
    trainer.model.train()
    frozen = trainer.model.model.layers[0].eval()
    before = torch.get_rng_state()
    trainer.rdrop_run.try_out(trainer.model, batch, batch["labels"])
    assert torch.equal(before, torch.get_rng_state())
    assert trainer.model.training and not frozen.training and trainer.rdrop_run.fused_head is not None


def test_a_compiled_model_is_not_compiled_again_for_every_step():
    counts = []
    for steps in (2, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(
            make_model("seq2seq"),
            "seq2seq",
            RDropSeq2SeqTrainer,
            rdrop_fused_head="on",
            max_steps=steps,
            torch_compile=True,
            torch_compile_backend="eager",
        )
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0


def test_a_training_step_never_holds_the_full_logits():
    """2 x 16 x 64 x 8,000 float32 logits are 65 MB; the plain path keeps several of that size."""
    config = {"vocab_size": 8000, "max_position_embeddings": 64}
    torch.manual_seed(0)
    ids = torch.randint(3, 8000, (16, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    peaks = {}
    for mode in ("off", "on"):
        trainer = make_trainer(make_lm("causal", "llama", **config), rdrop_fused_head=mode)
        loss_and_gradients(trainer, batch)  # the checks of the first batch are done
        peaks[mode] = peak_bytes(lambda trainer=trainer: loss_and_gradients(trainer, batch), torch.device("cpu"))
    assert peaks["on"] < 4 * 2 * 16 * 64 * 8000 < peaks["off"] / 2


# ---- what a try-out must see ----


class BiasOutside(transformers.BertForMaskedLM):
    """Adds a bias of its own, zero at first, to what its head puts out."""

    def __init__(self, config):
        super().__init__(config)
        self.get_output_embeddings().bias = None
        self.extra = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        output["logits"] = output.logits + self.extra
        if labels is not None:
            output["loss"] = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


def make_esm():
    return make_lm("masked", "esm", hidden_dropout_prob=0.3, mask_token_id=3, position_embedding_type="absolute")


def make_bias_outside():
    transformers.set_seed(0)
    return BiasOutside(transformers.BertConfig(**SIZES))


@pytest.mark.parametrize("make", [make_esm, make_bias_outside])
def test_a_bias_outside_the_head_is_seen_though_it_is_zero(make, caplog, monkeypatch):
    """Loss and gradients are those of the full logits, and the bias is zero again after the try-out."""
    monkeypatch.setattr("hf_rdrop.fused.head.MIN_VOCAB_SIZE", 1)
    model, batch = make(), make_batch("masked")
    before = {name: value.clone() for name, value in model.named_parameters()}
    plain = loss_and_gradients(make_trainer(copy.deepcopy(model), rdrop_fused_head="off"), batch)
    with caplog.at_level(logging.WARNING, "hf_rdrop"):
        auto = loss_and_gradients(make_trainer(model, rdrop_fused_head="auto"), batch)
    assert_same(auto, plain, rtol=0, atol=0)
    assert "changes what comes out of it" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


AUXILIARY = {
    "mixtral": lambda: make_lm("causal", "mixtral", router_aux_loss_coef=1e-6, **MIXTRAL),
    "qwen2-moe": lambda: make_lm(
        "causal",
        "qwen2_moe",
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2},
        **{"shared_expert_intermediate_size": 8, "output_router_logits": True, "attention_dropout": 0.2},
        **{"router_aux_loss_coef": 1e-6, "decoder_sparse_step": 1},
    ),
}


@pytest.mark.parametrize("case", AUXILIARY)
def test_an_auxiliary_loss_is_kept_however_small(case, caplog, monkeypatch):
    monkeypatch.setattr("hf_rdrop.fused.head.MIN_VOCAB_SIZE", 1)
    model, batch = AUXILIARY[case](), make_batch("causal")
    plain = loss_and_gradients(make_trainer(copy.deepcopy(model), rdrop_fused_head="off"), batch)
    with caplog.at_level(logging.WARNING, "hf_rdrop"):
        trainer = make_trainer(model, rdrop_fused_head="auto")
        assert_same(loss_and_gradients(trainer, batch), plain, rtol=0, atol=0)
    assert trainer.rdrop_run.fused_head is None and "an auxiliary loss" in caplog.text


WHISPER = {**SEQ2SEQ_SIZES, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 16}
FLORENCE_EYE = {name: [1] * 4 for name in ("depths", "num_heads", "num_groups")}
FLORENCE_EYE |= {"embed_dim": [8] * 4, "projection_dim": SEQ2SEQ_SIZES["d_model"]}
OWN_DECODER_INPUTS = {
    "m2m_100": lambda: make_lm("seq2seq", "m2m_100"),
    "blenderbot": lambda: make_lm("seq2seq", "blenderbot"),
    "blenderbot-small": lambda: make_lm("seq2seq", "blenderbot-small"),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**WHISPER, dropout=0.1)
    ),
    "florence2": lambda: transformers.Florence2ForConditionalGeneration(  # its text has the padding token
        transformers.Florence2Config(text_config={"model_type": "bart", **SEQ2SEQ_SIZES}, vision_config=FLORENCE_EYE)
    ),
}


def batch_for(case):
    batch = make_batch("seq2seq")
    if case == "whisper":
        batch = {"input_features": torch.randn(4, 4, 16, generator=torch.manual_seed(0)), "labels": batch["labels"]}
    return batch


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", OWN_DECODER_INPUTS)
def test_models_that_make_their_decoder_inputs_in_their_forward(case, given):
    """Given in the batch, or made of the labels as the model does it."""
    torch.manual_seed(0)
    model, batch = OWN_DECODER_INPUTS[case](), batch_for(case)
    if given:
        labels = batch["labels"].masked_fill(batch["labels"] == -100, 0)
        batch["decoder_input_ids"] = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=2)
    outcomes = []
    for mode in ("off", "on"):
        trainer = make_trainer(copy.deepcopy(model), "seq2seq", rdrop_fused_head=mode)
        outcomes.append(loss_and_gradients(trainer, batch))
        assert (trainer.rdrop_run.fused_head is not None) == (mode == "on")
    assert_same(outcomes[1], outcomes[0])
