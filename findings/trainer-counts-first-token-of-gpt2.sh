#!/usr/bin/env bash
# transformers 5.23.0: the plain Trainer's loss of GPT-2 is too small by the first token of each row, without accumulation.
#
# Expected: a causal language model's loss is the mean over the T - 1 tokens that it predicts, in the Trainer as in
#   model(**batch).loss, and alike for GPT-2 and Llama.
# Seen: Trainer counts labels[..., 1:] only where the model's `loss_type` is found in its table of losses. That type is
#   read off the class's name: GPT2LMHeadModel and BertLMHeadModel have none, and still use the loss that shifts its
#   labels. Trainer then counts all T labels, and loss and gradients are (T - 1) / T of the mean. LlamaForCausalLM is
#   right. With rows of 4 tokens a quarter is missing.
# Output seen, with transformers 5.23.0, torch 2.13.0 (CPU), accelerate 1.15.0:
#   GPT2LMHeadModel: loss_type None, Trainer's loss over the model's mean 0.750
#   BertLMHeadModel: loss_type None, Trainer's loss over the model's mean 0.750
#   LlamaForCausalLM: loss_type ForCausalLM, Trainer's loss over the model's mean 1.000
# Exits with 1 when that changes. hf_rdrop counts what the model's own loss scores (objective/scored.py), so that its
# rdrop_alpha=0 differs from the plain Trainer here.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" - <<'P'
import sys

import transformers as tf

BERT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
QUIET = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "is_decoder": True}
MODELS = (
    tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    tf.BertLMHeadModel(tf.BertConfig(**BERT, **QUIET)),
    tf.LlamaForCausalLM(tf.LlamaConfig(**BERT)),
)
rows = [{"input_ids": [5, 6 + n, 7, 8], "labels": [5, 6 + n, 7, 8]} for n in range(4)]
ratios = []
for model in MODELS:
    args = tf.TrainingArguments(
        "out", use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, logging_steps=1, learning_rate=0.0,
        per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    trainer = tf.Trainer(model=model, args=args, train_dataset=rows)
    batch = trainer.data_collator(rows)
    mean = model(**batch).loss.item()
    trainer.train()
    ratios.append(trainer.state.log_history[0]["loss"] / mean)
    told = f"{type(model).__name__}: loss_type {model.loss_type}"
    print(f"{told}, Trainer's loss over the model's mean {ratios[-1]:.3f}")
sys.exit(0 if [round(ratio, 3) for ratio in ratios] == [0.75, 0.75, 1.0] else 1)
P
