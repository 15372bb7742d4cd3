"""Tiny models, their rows and short runs of `RDropTrainer`; no network, no pretrained weights."""

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    default_data_collator,
    set_seed,
)

from support.vision_language import collate_images

VOCAB = 40
HEADS = ("single", "multi", "regression", "token", "seq2seq")


def make_model(head: str, dropout: float = 0.1, **config):
    """A tiny randomly initialised model: sequence (single, multi, regression), token or seq2seq head."""
    set_seed(0)
    if head == "seq2seq":
        return MarianMTModel(
            MarianConfig(
                vocab_size=VOCAB,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=32,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
                decoder_start_token_id=0,
                forced_eos_token_id=1,
                dropout=dropout,
                attention_dropout=dropout,
                activation_dropout=dropout,
                init_std=0.3,
                **config,
            )
        )
    labels = {"single": 3, "multi": 4, "regression": 1, "token": 5}[head]
    if head in ("multi", "regression"):
        config["problem_type"] = {"multi": "multi_label_classification", "regression": "regression"}[head]
    bert = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        **config,
    )
    return (BertForTokenClassification if head == "token" else BertForSequenceClassification)(bert)


def make_rows(head: str, rows: int = 16, seed: int = 0):
    """Rows of unequal numbers of valid labels, padded to one length so that dividing them up changes nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    data = []
    for _ in range(rows):
        length = int(draw(3, 9))
        row = {
            "input_ids": [int(i) for i in draw(3, VOCAB, length)] + [0] * (8 - length),
            "attention_mask": [1] * length + [0] * (8 - length),
        }
        if head == "token":
            row["labels"] = [int(i) for i in draw(0, 5, length)] + [-100] * (8 - length)
        elif head == "seq2seq":
            target = int(draw(2, 7))
            row["labels"] = [int(i) for i in draw(3, VOCAB, target)] + [1] + [-100] * (7 - target)
        elif head == "multi":
            row["labels"] = [float(i) for i in draw(0, 2, 4)]
        elif head == "regression":
            row["labels"] = float(torch.randn((), generator=generator))
        else:
            row["labels"] = int(draw(0, 3))
        data.append(row)
    return data


def make_collator(head: str, model):
    """The usual collator; for sequence-to-sequence it adds the decoder inputs that label smoothing needs."""
    if head == "images":
        return collate_images
    if head != "seq2seq":
        return default_data_collator

    def collate(rows):
        batch = default_data_collator(rows)
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return batch

    return collate


class InOrder(torch.utils.data.IterableDataset):
    """Rows that are not shuffled."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def train(model, head="single", trainer_class=None, rows=None, trainer_kwargs=None, **args):
    """A short CPU run over `make_rows`, every step logged, nothing saved; returns the trainer."""
    from hf_rdrop import RDropSeq2SeqTrainingArguments, RDropTrainer, RDropTrainingArguments

    trainer_class = trainer_class or RDropTrainer
    seq2seq = issubclass(trainer_class, Seq2SeqTrainer)
    args_class = args.pop("args_class", RDropSeq2SeqTrainingArguments if seq2seq else RDropTrainingArguments)
    defaults = {
        "output_dir": tempfile.mkdtemp(prefix="hf_rdrop-test-"),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    trainer = trainer_class(
        model=model,
        args=args_class(**{**defaults, **args}),
        train_dataset=make_rows(head, 32) if rows is None else rows,
        eval_dataset=make_rows(head, 11, seed=1),
        data_collator=make_collator(head, model),
        **(trainer_kwargs or {}),
    )
    trainer.train()
    return trainer


def step_logs(trainer):
    """The log lines of optimizer steps (not of evaluation or of the end of training)."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
