"""Tiny models and rows of heads beside those of `support.training.HEADS`."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from support.training import make_rows

TOKENS = {"vocab_size": 40, "initializer_range": 0.3}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ANSWERS = ("question", "question-roberta", "question-distilbert")


def rates(p):
    return {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}


class Plain(nn.Module):
    """No Transformers model: returns a tuple with more than loss and logits, or a dict."""

    def __init__(self, p, form):
        super().__init__()
        self.embed, self.dropout, self.out, self.form = nn.Embedding(40, 16), nn.Dropout(p), nn.Linear(16, 5), form

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embed(input_ids)
        logits = self.out(self.dropout(hidden))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.form == "tuple":
            return (loss, logits, hidden, hidden.mean(1))
        return {"hidden": hidden, "pooled": hidden.mean(1), "loss": loss, "logits": logits}


def build(head, p=0.3, **config):
    """A model with dropout p; more configuration for question answering."""
    set_seed(0)
    match head:
        case "question":
            return BertForQuestionAnswering(BertConfig(**TOKENS, **SIZES, **rates(p), **config))
        case "question-roberta":
            return RobertaForQuestionAnswering(
                RobertaConfig(**TOKENS, **SIZES, **rates(p), pad_token_id=0, max_position_embeddings=32, **config)
            )
        case "question-distilbert":
            return DistilBertForQuestionAnswering(
                DistilBertConfig(
                    **{**TOKENS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
                    **{"dropout": p, "attention_dropout": p, "qa_dropout": p},
                )
            )
        case "choice":
            return BertForMultipleChoice(BertConfig(**TOKENS, **SIZES, **rates(p)))
        case "masked":
            return BertForMaskedLM(BertConfig(**TOKENS, **SIZES, **rates(p)))
        case "causal":
            small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
            return GPT2LMHeadModel(GPT2Config(**TOKENS, **small, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p))
        case "image":
            square = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3, "initializer_range": 0.3}
            return ViTForImageClassification(ViTConfig(**SIZES, **square, **rates(p)))
        case "audio":
            square = {"num_mel_bins": 8, "max_length": 8, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}
            return ASTForAudioClassification(ASTConfig(**SIZES, **square, **rates(p), num_labels=3))
    return Plain(p, head)


def rows_of(head, rows=16, seed=0):
    """Rows of unequal numbers of items that count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    found = []
    for row in make_rows("token", rows, seed):
        ids = row["input_ids"]
        if head in ANSWERS:
            start, end = sorted(draw(8, 2).tolist())
            if draw(4) == 0:
                start = end = 8 + int(draw(3))  # cut off with the end of its text
            found.append({**row, "start_positions": start, "end_positions": end})
            del found[-1]["labels"]
        elif head == "choice":
            texts, label = [draw(40, 8).tolist() for _ in range(3)], int(draw(3))
            found.append({"input_ids": texts, "attention_mask": [[1] * 8] * 3, "labels": label})
        elif head == "masked":
            found.append({**row, "labels": [i if i and draw(3) == 0 else -100 for i in ids]})
        elif head == "causal":
            found.append({**row, "labels": [i or -100 for i in ids]})
        elif head == "image":
            found.append({"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": int(draw(3))})
        elif head == "audio":
            found.append({"input_values": torch.randn(8, 8, generator=generator), "labels": int(draw(3))})
        else:
            found.append(row)
    return found
