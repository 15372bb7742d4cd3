"""`RDropMixin` over the trainers of other libraries, where they are installed: right, or refused with a reason."""

import tempfile
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_rdrop import RDropArguments, RDropMixin
from support.training import make_rows, step_logs

ALPHA = 2.0
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(36))]
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.3,
    "initializer_range": 0.3,
}


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, eos_token="[SEP]", **names)


def texts(rows=16, seed=0):
    return [" ".join(WORDS[i] for i in row["input_ids"] if i) for row in make_rows("single", rows, seed)]


def common(**args):
    defaults = {"output_dir": tempfile.mkdtemp(prefix="hf_rdrop-test-"), "max_steps": 2, "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    defaults |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return {**defaults, **args}


def train_and_check(trainer):
    trainer.train()
    assert step_logs(trainer)
    for entry in step_logs(trainer):
        assert entry["kl_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + ALPHA / 2 * entry["kl_loss"], rel=1e-5)


def refuse(trainer, message):
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def record(module):
    """What a module returned while training."""
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(output) if m.training else None)
    return seen


# ---- sentence-transformers ----


def make_cross_encoder(num_labels=1, loss=None, problem_type="multi_label_classification", labels=None, **args):
    """A pair classifier with `RDropMixin`; by default on the trainer's default loss, binary cross-entropy."""
    pytest.importorskip("sentence_transformers", minversion="5.0")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments

    class RDropCrossEncoderTrainer(RDropMixin, CrossEncoderTrainer):
        pass

    @dataclass
    class Arguments(RDropArguments, CrossEncoderTrainingArguments):
        pass

    set_seed(0)
    folder = tempfile.mkdtemp(prefix="hf_rdrop-test-")
    BertForSequenceClassification(BertConfig(**BERT, num_labels=num_labels)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = CrossEncoder(folder, num_labels=num_labels, device="cpu")
    model.config.problem_type = problem_type
    labels = [i % max(2, num_labels) for i in range(16)] if labels is None else labels
    data = datasets.Dataset.from_dict({"a": texts(), "b": texts(seed=1), "label": labels})
    return RDropCrossEncoderTrainer(
        model=model,
        args=Arguments(**common(rdrop_alpha=ALPHA, **args)),
        train_dataset=data,
        eval_dataset=data,
        loss=None if loss is None else loss(model),
    )


@pytest.mark.parametrize("num_labels", [1, 3])
def test_cross_encoder(num_labels):
    trainer = make_cross_encoder(num_labels, problem_type=None if num_labels == 3 else "multi_label_classification")
    seen = record(trainer.model)
    train_and_check(trainer)
    p, q = seen[0]["scores"].double().chunk(2)  # the first batch, before any step
    assert p.shape == (8, num_labels)
    if num_labels == 1:
        kl = 0.5 * ((p.sigmoid() - q.sigmoid()) * (p - q)).mean()
    else:
        p, q = p.softmax(-1), q.softmax(-1)
        kl = 0.5 * ((p - q) * (p.log() - q.log())).sum(-1).mean()
    assert step_logs(trainer)[0]["kl_loss"] == pytest.approx(kl.item(), rel=1e-4)
    count = len(seen)
    assert trainer.evaluate()["eval_loss"] > 0 and len(seen) == count


def test_cross_encoder_whose_loss_is_not_known():
    refuse(make_cross_encoder(problem_type=None), "binary cross-entropy.*'multi_label_classification'")


def test_cross_encoder_accumulates_as_the_whole_batch():
    whole, parts = (
        make_cross_encoder(rdrop_dropout=1e-9, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        for size, steps in ((16, 1), (4, 4))
    )
    for trainer in (whole, parts):
        trainer.train()
    for a, b in zip(step_logs(whole), step_logs(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_cross_encoder_regression():
    pytest.importorskip("sentence_transformers", minversion="5.0")
    from sentence_transformers.cross_encoder.losses import MSELoss

    trainer = make_cross_encoder(loss=MSELoss, problem_type=None, labels=[0.1 * i for i in range(16)])
    seen = record(trainer.model)
    train_and_check(trainer)
    p, q = seen[0]["scores"].double().chunk(2)
    assert step_logs(trainer)[0]["kl_loss"] == pytest.approx(((p - q) ** 2).mean().item(), rel=1e-4)


def test_cross_encoder_with_a_model_init():
    trainer = make_cross_encoder(rdrop_dropout=0.2)
    again = type(trainer)(
        model_init=lambda: trainer.model, args=trainer.args, train_dataset=trainer.train_dataset, model=None
    )
    train_and_check(again)


def test_cross_encoder_losses_of_several_forwards_are_refused():
    pytest.importorskip("sentence_transformers", minversion="5.0")
    from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

    refuse(make_cross_encoder(loss=MultipleNegativesRankingLoss), r"returns no outputs and called the model \d times")


@pytest.mark.parametrize("with_labels", [True, False])
def test_embeddings_have_no_logits(with_labels):
    pytest.importorskip("sentence_transformers", minversion="5.0")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss

    class RDropSentenceTransformerTrainer(RDropMixin, SentenceTransformerTrainer):
        pass

    folder = tempfile.mkdtemp(prefix="hf_rdrop-test-")
    BertModel(BertConfig(**BERT)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = SentenceTransformer(folder, device="cpu")
    columns = {"a": texts(), "b": texts(seed=1)}
    if with_labels:
        columns["label"] = [0.05 * i for i in range(16)]
    trainer = RDropSentenceTransformerTrainer(
        model=model,
        args=Arguments(**common()),
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=(CosineSimilarityLoss if with_labels else MultipleNegativesRankingLoss)(model),
    )
    refuse(trainer, "called the model 2 times" if with_labels else "needs `labels`")


# ---- TRL ----


def make_sft(base=None, peft_config=None, **args):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class RDropSFTTrainer(RDropMixin, trl.SFTTrainer):
        """SFTTrainer's default loss is the model's own cross-entropy: R-Drop's fused head may compute it."""

        @property
        def user_of_outputs(self):
            return None if self.args.loss_type == "nll" else f"loss_type={self.args.loss_type!r}"

    class Plain(RDropMixin, trl.SFTTrainer):
        pass

    @dataclass
    class Arguments(RDropArguments, trl.SFTConfig):
        pass

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.3,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=3,
        )
    )
    data = datasets.Dataset.from_dict({"text": texts()})
    args = common(**{"rdrop_alpha": ALPHA, "rdrop_fused_head": "on", "bf16": False, **args})
    return (Plain if base == "plain" else RDropSFTTrainer)(
        model=model,
        args=Arguments(**args),
        train_dataset=data,
        eval_dataset=data,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def test_sft():
    trainer = make_sft(rdrop_dropout=0.3)
    hidden = []
    trainer.model.model.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state) if module.training else None
    )
    labels = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    train_and_check(trainer)
    set_seed(0)
    head = make_sft().model.lm_head  # the weights before the first step
    logits = head(hidden[0]).double()
    ids = labels[0][:8]
    valid = (ids[:, 1:] != 0).flatten()
    logs = logits[:, :-1].log_softmax(-1)
    p, q = (half.flatten(0, 1)[valid] for half in logs.chunk(2))
    ce = -torch.cat((p, q)).gather(1, ids[:, 1:].flatten()[valid].repeat(2)[:, None]).mean()
    kl = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    assert step_logs(trainer)[0]["ce_loss"] == pytest.approx(ce.item(), rel=1e-4)
    assert step_logs(trainer)[0]["kl_loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] > 0


def test_sft_without_dropout_is_sft():
    trl = pytest.importorskip("trl")
    ours = make_sft(rdrop_dropout=1e-9)
    theirs = trl.SFTTrainer(
        model=make_sft(rdrop_dropout=1e-9).model,
        args=trl.SFTConfig(**common(bf16=False)),
        train_dataset=make_sft().train_dataset,
        processing_class=make_tokenizer(),
    )
    ours.train()
    theirs.train()
    for a, b in zip(step_logs(ours), step_logs(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"packing": True, "max_length": 16}, "packed"),
        ({"padding_free": True, "max_length": None}, "packed"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"rdrop_dropout": 0.0}, "Nothing in this model is stochastic"),
    ],
)
def test_sft_refusals(args, message):
    refuse(make_sft(**args), message)


def test_sft_with_its_own_defaults_an_adapter_and_shared_layers():
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.3, init_lora_weights="gaussian")
    train_and_check(make_sft(peft_config=adapter, bf16=True, rdrop_shared_layers=1))


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # it says what it costs
def test_sft_as_it_is_either_trains_the_agreement_or_is_refused():
    """Recent versions compute their loss elsewhere than the logits that they return."""
    trainer = make_sft("plain", rdrop_fused_head="off")
    try:
        train_and_check(trainer)
    except ValueError as error:
        assert "carry no gradient" in str(error) and "user_of_outputs = None" in str(error)


# ---- setfit ----


def test_setfit_has_no_trainer_to_mix_into():
    setfit = pytest.importorskip("setfit")
    with pytest.raises(TypeError, match=r"is no transformers\.Trainer"):

        class Wrong(RDropMixin, setfit.Trainer):
            pass
