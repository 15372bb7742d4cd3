#!/usr/bin/env bash
# bitsandbytes 0.50.2 with peft 0.21.2: one evaluation ends all gradients of a LoRA on a 4-bit base on a CPU.
#
# Expected: evaluating a model before or between training steps changes nothing about how it trains.
# Seen: the first forward in evaluation mode on a CPU repacks the 4-bit weights for inference. The forward in training
#   mode still gives the loss, but the repacked layers have no gradient by their input: the adapters get none or
#   zeros from then on, without an error or a warning. Trainer's eval_on_start does it, and so does any evaluation.
# Output seen, with torch 2.13.0 (CPU), transformers 5.23.0, accelerate 1.15.0:
#   gradient of the adapters: above 0
#   after one forward in evaluation mode: 0.0
# Exits with 1 when that changes. hf_rdrop tries nothing out in evaluation mode there (training/first_batch.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
"$work/env/bin/pip" install -q --no-deps bitsandbytes==0.50.2
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" - 2>err.txt <<'P' || { tail -3 err.txt; exit 1; }
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, set_seed

set_seed(0)
sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained("llama")
four_bits = BitsAndBytesConfig(load_in_4bit=True)
base = AutoModelForCausalLM.from_pretrained("llama", quantization_config=four_bits, device_map="cpu")
model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
ids = torch.randint(100, (4, 8))


def gradient():
    model.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return float(sum(p.grad.norm().item() for p in model.parameters() if p.grad is not None))


before = gradient()
with torch.no_grad():
    model.eval()(input_ids=ids)
after = gradient()
print("gradient of the adapters:", "above 0" if before > 0 else before)
print("after one forward in evaluation mode:", after)
sys.exit(0 if before > 0 and after == 0 else 1)
P
