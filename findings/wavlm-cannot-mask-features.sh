#!/usr/bin/env bash
# transformers 5.23.0: WavLM cannot train with SpecAugment on features, an entry of its configuration is missing.
#
# Expected: mask_feature_prob masks features in training, as in Wav2Vec2, HuBERT and Data2Vec-audio, whose configurations
#   and forward are the same in this.
# Seen: the forward reads config.mask_feature_min_masks, which WavLMConfig does not have: AttributeError at the first
#   training step. In evaluation, and with time masks alone, nothing is noticed. Giving the entry by hand
#   (WavLMConfig(mask_feature_min_masks=0, ...)) is a way round.
# Output seen, with transformers 5.23.0, torch 2.13.0 (CPU):
#   Wav2Vec2: trains
#   Hubert: trains
#   WavLM: AttributeError: 'WavLMConfig' object has no attribute 'mask_feature_min_masks'
#   WavLM with mask_feature_min_masks=0: trains
# Exits with 1 when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/env/bin/python" - <<'P'
import sys

import torch
import transformers as tf

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "layerdrop": 0.0,
    "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_length": 2, "mask_feature_prob": 0.2, "mask_feature_length": 2,
}  # fmt: skip


def try_training(name, **more):
    model = getattr(tf, f"{name}Model")(getattr(tf, f"{name}Config")(**SIZES, **more)).train()
    try:
        model(torch.randn(2, 400))
    except AttributeError as error:
        return f"AttributeError: {str(error).splitlines()[0]}"
    return "trains"


found = [try_training(name) for name in ("Wav2Vec2", "Hubert", "WavLM")]
found.append(try_training("WavLM", mask_feature_min_masks=0))
for name, result in zip(("Wav2Vec2", "Hubert", "WavLM", "WavLM with mask_feature_min_masks=0"), found, strict=True):
    print(f"{name}: {result}")
sys.exit(0 if found[0] == found[1] == found[3] == "trains" and "mask_feature_min_masks" in found[2] else 1)
P
