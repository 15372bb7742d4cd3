"""What cannot work is refused before the first step, with what, why and what to change."""

import types

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from hf_rdrop import RDropMixin, RDropTrainer, RDropTrainingArguments, inspect_dropout
from hf_rdrop.objective.heads import resolve_head
from support.settings import causal_rows
from support.training import make_collator, make_model, make_rows, step_logs, train


def refuse(model, message, head="single", rows=None, **args):
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        train(model, head, rows=rows, **args)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_argument_that_is_gone_but_was_saved_is_not_passed_over(tmp_path):
    """As a `training_args.bin` of an older version has it; one at its old default asks for nothing."""
    args = RDropTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    args.rdrop_deterministic_target, args.rdrop_second_dropout = False, None
    trainer = RDropTrainer(model=make_model("single"), args=args, train_dataset=make_rows("single"))
    trainer.train()
    args.rdrop_deterministic_target = True
    with pytest.raises(ValueError, match=r"^rdrop_deterministic_target was removed: "):
        trainer.train()


def test_nothing_stochastic():
    refuse(make_model("single", 0.0), r"Nothing in this model is stochastic.*rdrop_dropout=0.1")
    train(make_model("single", 0.0), rdrop_alpha=0.0)  # plain fine-tuning does not need it
    train(make_model("single", 0.0), rdrop_dropout=0.1)
    train(make_model("single", 0.0), neftune_noise_alpha=5.0)  # embedding noise differs between the halves too


def test_layers_dropped_for_the_whole_batch_do_not_count():
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        classifier_dropout=0.0,
        encoder_layerdrop=0.5,
        num_labels=3,
        eos_token_id=1,
    )
    refuse(BartForSequenceClassification(config), r"layerdrop.*= 0.5")


class TwoLabels(BertPreTrainedModel):
    """A head that is trained on something else than `labels`."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)

    def forward(self, input_ids, order_labels=None, topic_labels=None):
        pooled = self.bert(input_ids).pooler_output
        return {"loss": pooled.mean() * topic_labels.float().mean(), "topic": pooled, "order": pooled}


def test_unsupported_head():
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    rows = [{"input_ids": row["input_ids"], "order_labels": 1, "topic_labels": 2} for row in make_rows("single")]
    refuse(TwoLabels(config), "does not support the head of TwoLabels", rows=rows)
    train(TwoLabels(config), rows=rows, rdrop_alpha=0.0)

    def topics(outputs, inputs):
        return outputs["topic"]

    own = train(TwoLabels(config), rows=rows, trainer_kwargs={"logits_for_agreement": topics})
    assert step_logs(own)[-1]["kl_loss"] > 0


def test_a_head_that_returns_no_logits():
    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = make_model("single", 0.1)

        def forward(self, input_ids, labels=None):
            return {"loss": self.bert(input_ids, labels=labels).loss}

    refuse(Silent(), "returned no logits for its 32 rows")


def test_batch_without_labels():
    class Teacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = make_model("single", 0.1)

        def forward(self, input_ids):
            logits = self.bert(input_ids).logits
            return {"loss": logits.square().mean(), "logits": logits}

    rows = [{"input_ids": row["input_ids"]} for row in make_rows("single")]
    refuse(Teacher(), "needs `labels` in the batch", rows=rows)


@pytest.mark.parametrize("kind", [lambda i: {"class": torch.tensor([i % 2])}, lambda i: [torch.tensor(i)]])
def test_labels_that_are_no_tensor(kind, tmp_path):
    """The objects of an image (object detection), and lists of another kind, are named and not called missing."""
    model = make_model("single", 0.1)
    arguments = RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    batch = {"input_ids": torch.ones(4, 6, dtype=torch.long), "labels": [kind(i) for i in range(4)]}
    trainer = RDropTrainer(model=model, args=arguments)
    with pytest.raises(ValueError, match=r"such `labels`: no tensor, but a list.*rdrop_alpha to 0"):
        trainer.compute_loss(model.train(), batch)


def test_packed_batches(tmp_path):
    model = make_model("token", 0.1)
    trainer = RDropTrainer(model=model, args=RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    batch = make_collator("token", model)(make_rows("token", 1))
    batch.pop("attention_mask")
    for extra in ({"position_ids": torch.arange(8)[None]}, {"cu_seq_lens_q": torch.tensor([0, 8])}):
        with pytest.raises(ValueError, match="cannot repeat packed"):
            trainer.compute_loss(model.train(), {**batch, **extra})


class NoDecoderInputs(RDropTrainer):
    """Batches as a collator without the model makes them."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_label_smoothing_where_it_means_nothing_or_breaks():
    refuse(make_model("regression", 0.1), "needs class indices", "regression", label_smoothing_factor=0.1)
    model = make_model("seq2seq", 0.1)
    with pytest.raises(ValueError, match="DataCollatorForSeq2Seq"):
        train(model, "seq2seq", NoDecoderInputs, label_smoothing_factor=0.1)


def test_several_gpus_in_one_process(tmp_path):
    trainer = RDropTrainer(
        model=make_model("single"),
        args=RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=make_rows("single"),
    )
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        trainer.check_setup()


def test_sequence_parallelism(tmp_path):
    trainer = RDropTrainer(
        model=make_model("single"), args=RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    )
    trainer.accelerator = types.SimpleNamespace(
        parallelism_config=types.SimpleNamespace(cp_enabled=True, sp_enabled=False), unwrap_model=lambda model: model
    )
    with pytest.raises(ValueError, match="sequence parallelism"):
        trainer.check_setup()


def test_alpha_set_behind_the_arguments_back(tmp_path):
    """A hyper-parameter search writes trial values onto the arguments, past their own check."""
    trainer = RDropTrainer(
        model=make_model("single"),
        args=RDropTrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=make_rows("single"),
    )
    trainer.args.rdrop_alpha = -1.0
    with pytest.raises(ValueError, match="rdrop_alpha must be"):
        trainer.train()


def config(**kwargs):
    return types.SimpleNamespace(**{"problem_type": None, **kwargs})


@pytest.mark.parametrize(
    ("logits", "labels", "problem_type", "expected"),
    [
        ((4, 3), torch.zeros(2).long(), None, "single_label_classification"),
        ((4, 3), torch.zeros(2, 3), None, "multi_label_classification"),
        ((4, 3), torch.zeros(2, 3), "regression", "regression"),
        ((4, 1), torch.zeros(2), None, "regression"),
        ((4, 1), torch.zeros(2).long(), None, "regression"),
        ((4, 1), torch.zeros(2, 1), None, "regression"),
        ((4, 1), torch.zeros(2, 1), "multi_label_classification", "multi_label_classification"),
        ((4, 1), torch.zeros(2).long(), "single_label_classification", "single_label_classification"),
        ((4, 7, 3), torch.zeros(2, 7).long(), None, "single_label_classification"),
        ((4,), torch.zeros(2), None, "regression"),
    ],
)
def test_how_passes_are_compared_follows_transformers_problem_type(logits, labels, problem_type, expected):
    head = resolve_head(config(problem_type=problem_type), torch.zeros(logits), labels, passes=2)
    assert head.problem_type == expected


@pytest.mark.parametrize("labels", [torch.zeros(2, 5).long(), torch.zeros(2), torch.zeros(3).long()])
def test_labels_that_fit_no_head(labels):
    with pytest.raises(ValueError, match="cannot compare logits of shape"):
        resolve_head(config(), torch.zeros(4, 3), labels, passes=2)


# ---- the first batch and the first step ----


class DividesAgain(Trainer):
    """As Trainers of the time before the item counts."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch) / self.args.gradient_accumulation_steps


class DividesBefore(Trainer):
    """Divides the loss that it goes backward on, in a step of its own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        return loss.detach() / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("parent", [DividesAgain, DividesBefore])
def test_a_step_that_divides_by_the_accumulation_once_more(parent, alpha):
    trainer_class = type("Ours", (RDropMixin, parent), {})
    args = {"trainer_class": trainer_class, "rdrop_alpha": alpha, "per_device_train_batch_size": 4}
    refuse(make_model("single"), "Ours divides the loss by its 4 accumulation", gradient_accumulation_steps=4, **args)
    train(make_model("single"), **args)  # one batch for each step


def test_a_step_that_scales_by_something_else_is_let_be():
    class Doubles(Trainer):
        def training_step(self, *args, **kwargs):
            return 2 * super().training_step(*args, **kwargs)

    trainer_class = type("Ours", (RDropMixin, Doubles), {})
    train(make_model("single"), trainer_class=trainer_class, gradient_accumulation_steps=4)


class TwoHeads(torch.nn.Module):
    def __init__(self, second):
        super().__init__()
        self.embed, self.drop = torch.nn.Embedding(40, 16), torch.nn.Dropout(0.3)
        self.a, self.b, self.second = torch.nn.Linear(16, 3), torch.nn.Linear(16, 2), second

    def forward(self, input_ids, attention_mask=None, labels=None, **others):
        hidden = self.drop(self.embed(input_ids).mean(1))
        a, b = self.a(hidden), self.b(hidden)
        return {"loss": F.cross_entropy(a, labels) + F.cross_entropy(b, others[self.second]), "logits": a, "b": b}


@pytest.mark.parametrize(("second", "names"), [("labels_b", ["labels", "labels_b"]), ("label_topic", None)])
def test_several_columns_of_labels(second, names):
    names = names or ["label_topic", "labels"]
    rows = [{**row, second: i % 2} for i, row in enumerate(make_rows("single", 16))]
    args = {"rows": rows, "label_names": names, "remove_unused_columns": False}
    refuse(TwoHeads(second), f"several columns of labels .*{second}.*logits_for_agreement", **args)
    train(TwoHeads(second), rdrop_alpha=0.0, **args)

    def both(outputs, inputs):
        return torch.cat((outputs["logits"], outputs["b"]), -1)

    own = train(TwoHeads(second), trainer_kwargs={"logits_for_agreement": both}, **args)
    assert step_logs(own)[0]["kl_loss"] > 0


class Unused(torch.nn.Module):
    """Declares dropout, and does not call it unless it is told to."""

    def __init__(self, used=False, p=0.3):
        super().__init__()
        self.embed, self.drop, self.out = torch.nn.Embedding(40, 16), torch.nn.Dropout(p), torch.nn.Linear(16, 3)
        self.gate, self.used = torch.nn.Parameter(torch.ones(16)), used

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embed(input_ids).mean(1)
        if self.used:
            hidden = hidden + self.gate * self.drop(hidden)
        logits = self.out(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_diffllama():
    """It has a rate of attention dropout, which it never applies."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
    return DiffLlamaForCausalLM(DiffLlamaConfig(**sizes))


def test_dropout_that_a_model_does_not_use():
    refuse(Unused(), "Unused does not use the dropout that it declares")
    train(Unused(), rdrop_alpha=0.0)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="earlier releases were not looked at, and may use it"
)
def declare_dropout(model):
    """Somebody's own way to set a rate, by the modules alone."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def test_dropout_that_a_model_of_transformers_does_not_use():
    """Its config could not be loaded again with a rate, and is as it was after the refusal."""
    model = make_diffllama()
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"DiffLlama of transformers {transformers.__version__} uses its dropout")
    before = model.config.to_dict()
    message = "DiffLlamaForCausalLM cannot have a dropout rate of 0.1.*rdrop_insert_dropout=0.1"
    refuse(model, message, rows=causal_rows(), rdrop_dropout=0.1)
    assert (model.config.to_dict() | {"use_cache": True}) == before and all(
        source.rate == 0 for source in inspect_dropout(model)
    )
    refuse(
        declare_dropout(model),
        "does not use the dropout.*Leave rdrop_dropout out.*rdrop_insert_dropout",
        rows=causal_rows(),
    )
    assert step_logs(train(make_diffllama(), rows=causal_rows(), rdrop_insert_dropout=0.1))[0]["kl_loss"] > 0


def zero_head():
    model = make_model("single", 0.3)
    torch.nn.init.zeros_(model.classifier.weight)
    return model


def zero_gate():
    model = Unused(used=True)
    torch.nn.init.zeros_(model.gate)
    return model


def zero_vectors():
    """VeRA multiplies its random matrices with a vector that is zero at first; the dropout is before them."""
    config = peft.VeraConfig(target_modules=["query", "value"], vera_dropout=0.5, d_initial=0.0, task_type="SEQ_CLS")
    return peft.get_peft_model(make_model("single", 0.0), config)


def lora(**kwargs):
    config = peft.LoraConfig(target_modules=["query", "value"], lora_dropout=0.5, task_type="SEQ_CLS", **kwargs)
    return peft.get_peft_model(make_model("single", 0.0), config)


def quiet_encoder():
    """Whoever freezes a part may put it into evaluation mode as well."""
    model = make_model("single", 0.3)
    model.bert.requires_grad_(False)
    model.dropout.p = 0.0
    model.bert.train = lambda mode=True: model.bert
    model.bert.apply(lambda module: setattr(module, "training", False))
    return model


BEGIN_EQUAL = {
    "head of zeros": zero_head,
    "gate of zeros": zero_gate,
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "VeRA": zero_vectors,
    "a part in evaluation mode": quiet_encoder,
    "a low rate": lambda: Unused(p=0.001),
}


@pytest.mark.parametrize("case", BEGIN_EQUAL)
def test_passes_that_may_be_equal_on_the_first_batch(case):
    assert step_logs(train(BEGIN_EQUAL[case](), learning_rate=1e-2))[0]["kl_loss"] == 0


def test_nothing_is_concluded_where_nothing_is_compared():
    """A function of one's own whose mask is empty at first, and layers of which none happened to be dropped."""

    def nothing(outputs, inputs):
        return outputs["logits"], torch.zeros_like(inputs["labels"], dtype=torch.bool)

    train(make_model("single", 0.3), trainer_kwargs={"logits_for_agreement": nothing})
    train(declare_dropout(make_diffllama()), rows=causal_rows(), rdrop_layer_drop=1e-6)


# ---- per-sample gradients ----


class Private(torch.optim.SGD):
    """An optimizer that adds noise to gradients clipped row by row, by the attribute that tells Opacus'."""

    noise_multiplier = 1.0


def private_optimizer(model):
    return {"optimizers": (Private(model.parameters(), lr=0.1), None)}


def test_an_optimizer_of_per_sample_gradients_is_refused():
    model = make_model("single")
    refuse(model, "per-sample gradients", trainer_kwargs=private_optimizer(model))
    model = make_model("single")
    assert train(model, rdrop_alpha=0.0, trainer_kwargs=private_optimizer(model)).state.global_step == 2


@pytest.mark.parametrize("place", ["module", "parameter"])
def test_a_model_that_collects_per_sample_gradients_is_refused(place):
    model = make_model("single")
    if place == "module":
        model.autograd_grad_sample_hooks = []
    else:
        next(model.parameters()).grad_sample = None
    refuse(model, "per-sample gradients")


# ---- quantised bases on a CPU ----


def quantised(vocab_size=2000):
    """A language model that counts its forwards in evaluation mode, after which weights of 4 bits take no gradient."""
    config = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2))
    model.is_quantized, model.evaluated = True, 0
    model.hf_quantizer = types.SimpleNamespace(is_trainable=True, is_qat_trainable=False)

    def count(module, args):
        module.evaluated += not module.training

    model.register_forward_pre_hook(count)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.3, init_lora_weights=False)
    )


@pytest.mark.parametrize("fused_head", ["off", "auto"])
def test_a_quantised_base_on_a_cpu_is_never_evaluated_before_it_trains(fused_head):
    model = quantised()
    trainer = train(model, rows=causal_rows(), rdrop_fused_head=fused_head)
    assert trainer.rdrop_run.fused_head is None and model.get_base_model().evaluated == 0
    assert all(line["kl_loss"] > 0 for line in step_logs(trainer))


@pytest.mark.parametrize("asked", [{"rdrop_fused_head": "on"}, {"rdrop_shared_layers": 1}])
def test_what_has_to_be_tried_out_in_evaluation_is_refused_for_a_quantised_base_on_a_cpu(asked):
    refuse(quantised(), f"{next(iter(asked))}.*quantised model on a CPU", rows=causal_rows(), **asked)
