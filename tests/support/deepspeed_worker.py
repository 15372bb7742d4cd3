"""Run by `accelerate launch` in test_deepspeed.py: ZeRO on two processes without a GPU; rank 0 saves what they gave.

DeepSpeed can run on a CPU (DS_ACCELERATOR=cpu), but Transformers and Accelerate start it on GPUs only. So they are
told here that this is a GPU, whose device is the CPU.
"""

import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from support.distributed_worker import ACCUMULATED, AT_ONCE, run
from support.settings import HEADS, TINY

UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
# (head, changes of the configuration, option, rows and micro-batches)
CASES = [
    *(("single", {}, option, AT_ONCE) for option in ("plain", "default")),
    ("token", {}, "shared layer", ACCUMULATED),
    *(("seq2seq", {}, option, ACCUMULATED) for option in ("default", "fused head", "fused head + shared layer")),
    *(("causal", config, "fused head + shared layer", ACCUMULATED) for config in (UNTIED, TIED)),
]


def whole_weights(model):
    from deepspeed.utils import safe_get_full_fp32_param

    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained}


if __name__ == "__main__":
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    found = []
    for case in CASES:
        head, config, option, split = case
        model = HEADS[head].model(TINY, **config)
        result = run(head, *split, model, use_cpu=False, option=option)
        found.append((case, {**result, "weights": whole_weights(model)}))
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.destroy_process_group()
