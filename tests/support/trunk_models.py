"""Tiny models of many architectures, and one of our own, for the tests of shared layers."""

import torch
import transformers as tf
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_rdrop.batch import repeat_batch
from hf_rdrop.dropout import set_dropout
from hf_rdrop.trunk import find_layer_stacks

VOCAB = 40
BERT_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
    "initializer_range": 0.3,
}
BART_LIKE = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "init_std": 0.3,
}
T5_LIKE = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
DISENTANGLED = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}

# Head, configuration class, configuration.
ARCHITECTURES = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, BERT_LIKE),
    "roberta": (tf.RobertaForTokenClassification, tf.RobertaConfig, BERT_LIKE),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig,
        {"vocab_size": VOCAB, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.3},
    ),
    "deberta-v2": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, {**BERT_LIKE, **DISENTANGLED}),
    "electra": (tf.ElectraForSequenceClassification, tf.ElectraConfig, {**BERT_LIKE, "embedding_size": 8}),
    "modernbert": (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig,
        {**BERT_LIKE, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, BERT_LIKE),
    "qwen2": (tf.Qwen2ForSequenceClassification, tf.Qwen2Config, {**BERT_LIKE, "num_key_value_heads": 1}),
    "gemma": (
        tf.GemmaForCausalLM,
        tf.GemmaConfig,
        {**BERT_LIKE, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {
            "vocab_size": VOCAB,
            "n_embd": 16,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
        },
    ),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, T5_LIKE),
    "marian": (tf.MarianMTModel, tf.MarianConfig, {**BART_LIKE, "forced_eos_token_id": 2}),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig, BART_LIKE),
    "mbart": (tf.MBartForConditionalGeneration, tf.MBartConfig, BART_LIKE),
    "pegasus": (tf.PegasusForConditionalGeneration, tf.PegasusConfig, {**BART_LIKE, "forced_eos_token_id": 2}),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig,
        {**{k: v for k, v in BERT_LIKE.items() if k not in ("vocab_size",)}, "image_size": 16, "patch_size": 8},
    ),
}
# What comes after the last layer and is random: the head's dropout, or the decoder's final one (T5).
DROPOUT_ABOVE_ALL = {"bert", "roberta", "distilbert", "deberta-v2", "electra", "modernbert", "t5"}


def make(name, dropout=0.2, **config):
    head, config_class, base = ARCHITECTURES[name]
    tf.set_seed(0)
    model = head(config_class(**{**base, **config})).train()
    set_dropout(model, dropout)
    return model


def make_batch(model, rows=3, length=7, seed=0):
    """A padded batch with labels for the model's head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    name = type(model).__name__
    if "Image" in name:
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator), "labels": draw(2, rows)}
    ids = draw(VOCAB, rows, length, low=3)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if "LM" in name:
        batch["labels"] = torch.where(mask == 1, ids, -100)
    elif "Sequence" in name:
        batch["labels"] = draw(2, rows)
    elif "Token" in name:
        batch["labels"] = torch.where(mask == 1, draw(2, rows, length), -100)
    else:
        batch["labels"] = draw(VOCAB, rows, 5, low=3)
    return batch


def all_layers(model):
    return [layer for stack in find_layer_stacks(model).values() for layer in stack]


def count_rows(model):
    """A list that the forwards to come fill with the rows of the layers' inputs; to be called after a trunk is on."""
    seen = []
    for layer in all_layers(model):
        layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


# ---- Models of our own: what arguments look like, and what cannot be shared ----


class Layer(GradientCheckpointingLayer):
    """Mixes the time steps `[B, T, D]` of each row, adds to the log it is handed, and drops elements."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.2)

    def forward(self, hidden_states, mask=None, position_embeddings=None, log=None):
        x = self.linear(hidden_states)
        if mask is not None:
            x = x * mask["rows"][0][..., None]
        if position_embeddings is not None:
            x = x + position_embeddings
        if log is not None:
            log[len(log)] = len(x)
        return hidden_states + self.dropout(torch.tanh(x + x.cumsum(1)))


class Toy(nn.Module):
    def __init__(self, layers=3, final_dropout=0.0):
        super().__init__()
        tf.set_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.final_dropout = final_dropout

    def forward(self, x, mask, labels=None):
        self.log = {}
        rotary = torch.linspace(0, 1, x.shape[1])[:, None].expand(-1, 4)  # [T, D]
        for i, layer in enumerate(self.layers):
            if i % 2:  # keywords in any order
                x = layer(position_embeddings=rotary, mask={"rows": (mask,)}, log=self.log, hidden_states=x)
            else:
                x = layer(x, {"rows": (mask,)}, rotary, log=self.log)
        return {"logits": x[:, -1]}


def toy_batch(rows=3, length=5):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(rows, length, generator=generator) > 0.3).float()
    x = torch.randn(rows, length, 4, generator=generator)
    return repeat_batch({"x": x, "mask": mask, "labels": torch.zeros(rows)}, 2)
