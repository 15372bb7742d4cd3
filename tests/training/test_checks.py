"""What cannot work is refused before the first step, with what, why and what to change."""

import types

import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification, BertConfig, BertModel, BertPreTrainedModel

from hf_rdrop import RDropTrainer, RDropTrainingArguments
from hf_rdrop.objective.heads import resolve_head
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
