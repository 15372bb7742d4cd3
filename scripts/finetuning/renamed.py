"""Arguments that Transformers 5 renamed or dropped: what took their place."""

from collections.abc import Iterable

# Of every name the argument that took its place, or why there is none.
RENAMED = {
    "group_by_length": "give --train_sampling_strategy group_by_length",
    "overwrite_output_dir": "nothing is overwritten: give another --output_dir, or go on with "
    "--resume_from_checkpoint last",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "evaluation_strategy": "give --eval_strategy",
    "no_cuda": "give --use_cpu",
    "use_mps_device": "such a device is used where there is one; for the CPU give --use_cpu",
    "per_gpu_train_batch_size": "give --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "give --per_device_eval_batch_size",
    "warmup_ratio": "give --warmup_steps, which takes a share of all steps below 1 as well",
    "adafactor": "give --optim adafactor",
    "save_safetensors": "weights are always saved as safetensors: leave it out",
    "include_inputs_for_metrics": "give --include_for_metrics inputs",
    "include_tokens_per_second": "give --include_num_input_tokens_seen",
    "push_to_hub_model_id": "give --hub_model_id",
    "push_to_hub_organization": "give --hub_model_id ORGANISATION/NAME",
    "push_to_hub_token": "log in with `hf auth login`, or give --hub_token",
    "fp16_backend": "half precision is torch's own: leave it out, and give --fp16 or --bf16",
    "half_precision_backend": "half precision is torch's own: leave it out, and give --fp16 or --bf16",
    "fp16_opt_level": "it was apex's: leave it out, and give --fp16 or --bf16",
    "torchdynamo": "give --torch_compile_backend",
    "sharded_ddp": "give --fsdp",
    "fsdp_min_num_params": "give it in --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "give it in --fsdp_config",
    "dispatch_batches": "give it in --accelerator_config",
    "split_batches": "give it in --accelerator_config",
    "jit_mode_eval": "it has no successor: leave it out, or give --torch_compile",
    "use_ipex": "it has no successor: leave it out, or give --torch_compile",
    "past_index": "it has no successor: leave it out",
    "mp_parameters": "it has no successor: leave it out",
    "tpu_num_cores": "it has no successor: start the processes with `accelerate launch`",
    "use_legacy_prediction_loop": "it has no successor: leave it out",
}


def check_renamed(names: Iterable[str], known: Iterable[str]) -> None:
    """Check that no unknown argument is one that Transformers 5 renamed or dropped.

    Raises:
        ValueError: for the first of `RENAMED`, with what took its place.
    """
    known = set(known)
    for name in names:
        short = name.removeprefix("no_") if name not in RENAMED else name
        if short in RENAMED and name not in known:
            raise ValueError(f"--{name} is no argument of Transformers 5 any more: {RENAMED[short]}.")
