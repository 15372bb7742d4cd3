#!/usr/bin/env bash
# transformers 5.23.0: a Trainer that resumes a ViT from its own checkpoint trains on with fresh encoder layers.
#
# Expected: resume_from_checkpoint (and load_best_model_at_end) load the weights of the checkpoint, as they do for BERT.
# Seen: save_pretrained writes the layers under names of earlier releases (vit.encoder.layer.N...), the model calls them
#   vit.layers.N..., and Trainer loads the file's names as they are. Each encoder weight keeps its random start. Trainer
#   logs "missing keys" and "unexpected keys" as warnings and goes on; from_pretrained on the same folder loads all of it.
#   AST (audio) does the same.
# Output seen, with transformers 5.23.0, torch 2.13.0 (CPU), accelerate 1.15.0:
#   layers in the checkpoint: vit.encoder.layer, in the model: vit.layers
#   from_pretrained restores the layers: True
#   Trainer restores the layers: False
# Exits with 1 when that changes. hf_rdrop loads such a checkpoint through from_pretrained (checkpoints/resuming.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" - <<'P'
import sys

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
noise = torch.Generator().manual_seed(0)
rows = [{"pixel_values": torch.randn(3, 8, 8, generator=noise), "labels": i % 2} for i in range(16)]


def model(seed):
    set_seed(seed)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **SIZES))


def trainer(seed, learning_rate):
    args = TrainingArguments(
        "out", use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_steps=2, learning_rate=learning_rate
    )
    return Trainer(model=model(seed), args=args, train_dataset=rows)


trained = trainer(0, 1e-2)
trained.train()
whole = trained.model.state_dict()
saved = load_file("out/checkpoint-2/model.safetensors")
right = ViTForImageClassification.from_pretrained("out/checkpoint-2").state_dict()
resumed = trainer(1, 1e-2)  # other random weights: what the model has then is what was loaded, or these
resumed._load_from_checkpoint("out/checkpoint-2")
names = [name for name in right if ".layers." in name and name.endswith("weight")]
by_hand, by_trainer = (
    all(torch.equal(found[name], whole[name]) for name in names) for found in (right, resumed.model.state_dict())
)
old = any(name.startswith("vit.encoder.layer.") for name in saved)
print(f"layers in the checkpoint: {'vit.encoder.layer' if old else 'other names'}, in the model: vit.layers")
print("from_pretrained restores the layers:", by_hand)
print("Trainer restores the layers:", by_trainer)
sys.exit(0 if old and names and by_hand and not by_trainer else 1)
P
