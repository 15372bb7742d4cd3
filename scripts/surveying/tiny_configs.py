"""Make the configuration of any family of Transformers tiny: by the names of its sizes, and a few exceptions."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 256
FIRST_SPECIAL = 200  # token ids from here on are placeholders of images and sounds, and other special tokens
WIDTH, HEADS, HEAD_WIDTH, LAYERS, IMAGE, PATCH = 32, 2, 16, 2, 32, 8

# Sizes by name; of several patterns that fit a whole name the first counts. Only whole numbers are replaced, and only
# by smaller ones.
SIZES: dict[str, int] = {
    r"(.*_)?(vocab_size|vocab_size_per_layer_input)|vocabulary_size": VOCABULARY,
    r"hidden_size_per_layer_input|laurel_rank": 8,
    r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim)": WIDTH,
    r"(.*_)?(proj_dim|projection_dim)": WIDTH,
    r"(.*_)?(hidden_size_.*|out_dim|output_dim|output_size|d_inner_hid|proj_size|emb_dim|model_dim|dim)": WIDTH,
    r"(.*_)?head_dim|dim_head|d_kv|kv_channels|attention_head_size|(mamba_)?d_head|mamba_headdim": HEAD_WIDTH,
    r"v_head_dim|qk_(rope|nope)_head_dim": HEAD_WIDTH,
    r"qk_head_dim": 2 * HEAD_WIDTH,
    r"(.*_)?(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|d_inner|n_inner)": 2 * WIDTH,
    r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|num_key_value_heads|num_kv_heads|nhead)": HEADS,
    r"linear_num_(key|value)_heads|mamba_(num|n)_heads|multi_query_group_num|num_query_groups": HEADS,
    r"(num_)?(hidden_layers|layers|blocks)|n_layers?|depth": LAYERS,
    r"(.*_)?(num_hidden_layers|num_layers|encoder_layers|decoder_layers|adapter_layers|n_layers|depth)": LAYERS,
    r"max_window_layers|num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers": 0,
    r"num_dense_layers|first_k_dense_replace|.*_sparse_step|cross_attention_frequency|no_rope_layer_interval": 1,
    r"(num|n)_(routed_|local_)?experts|moe_num_experts|num_moe_experts": 4,
    r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts|moe_top_k)": 2,
    r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups": 1,
    r"(q|kv|o)_lora_rank|hc_lowrank|time_step_rank|mamba_dt_rank": 8,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|max_length|max_target_positions)": 128,
    r"(.*_)?max_(source_positions|pos_emb|position_embeddings)": 128,
    r"(.*_)?(sliding_window|sliding_window_size|attention_chunk_size|local_attention|attention_window)": 8,
    r"(state_size|ssm_state_size|mamba_d_state|d_state|mamba_chunk_size|chunk_size|index_topk)": 16,
    r"index_n_heads": HEADS,
    r"index_head_dim": HEAD_WIDTH,
    r"(image_size|input_size|crop_size)": IMAGE,
    r"(query_pre_attn_scalar)": HEAD_WIDTH,
    r"(num_mel_bins|num_mel_bin)": 16,
    r"num_query_tokens|resampler_n_latents|latent_query_num|num_latents": 4,
    r"resampler_depth": 1,
    r"mm_tokens_per_image": 4,
    r"ngram_vocab_size_base": 512,
    r"num_conv_pos_embeddings": 16,
    r"num_conv_pos_embedding_groups": 2,
    r"mask_time_length|mask_feature_length": 2,
    r"codebook_size|num_embeddings": 64,
    r"conv_depthwise_kernel_size": 7,
    r"(rotary_dim)": 8,
}
_SIZES = [(re.compile(pattern), value) for pattern, value in SIZES.items()]
_TOKEN = re.compile(r".*(token_id|token_index|_index|_token|_id|_start|_end)s?")
_LAYER_NUMBERS = re.compile(r".*(idx|idxs|indexes|indices|layer_ids|only_layers|moe_layers|layers_to_transform)")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "layers", "num_blocks")

# What the names do not say, by model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esmc": {"num_attention_heads": 2, "head_dim": HEAD_WIDTH, "hidden_size": WIDTH},
    "gptj": {"rotary_dim": HEAD_WIDTH},
    "helium": {
        "num_key_value_heads": HEADS,
        "num_attention_heads": HEADS,
        "hidden_size": WIDTH,
        "head_dim": HEAD_WIDTH,
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": IMAGE, "patch_size": PATCH},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "mistral4": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 16, "qk_head_dim": 16},
    "mobilebert": {"hidden_size": 64, "embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "levit": {"image_size": 224, "patch_size": 16},
    "bros": {"hidden_size": 128, "num_attention_heads": 4},
    "swin": {"embed_dim": 24, "image_size": 64, "window_size": 2},
    "swinv2": {"embed_dim": 24, "image_size": 64, "window_size": 2},
    "donut-swin": {"image_size": 64, "window_size": 2, "embed_dim": 24},
    "nllb-moe": {"expert_capacity": 512},
    "switch_transformers": {"expert_capacity": 512},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "codegen": {"n_head": 4, "n_embd": 64, "rotary_dim": 8},
    "longcat_flash": {"qk_head_dim": 2 * HEAD_WIDTH, "head_dim": HEAD_WIDTH},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "attention_head_dim": 32, "attention_hidden_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "dinat": {"dilations": [[1], [1], [1], [1]]},
    "zamba": {
        "attention_head_dim": 32,
        "attention_hidden_size": 64,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "granite_speech": {"context_size": 8},
    "granite_speech_encoder": {"context_size": 8},
    "granite_speech_plus_encoder": {"context_size": 8},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_vl_text": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "ministral": {"head_dim": HEAD_WIDTH},
    "nemotron": {"num_key_value_heads": HEADS, "head_dim": HEAD_WIDTH},
    "reformer": {"axial_pos_embds": False},
    "perceiver": {
        "max_position_embeddings": 16,
        "d_latents": WIDTH,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "qk_channels": WIDTH,
    },
}


def tiny_config(model_type: str, **given: Any) -> PreTrainedConfig:
    """Make the tiny configuration of a family; `given` is set whatever the rules say."""
    return _shrink(CONFIG_MAPPING[model_type], _Tokens(), given)


class _Tokens(dict[int, int]):
    """New ids of tokens beyond the tiny vocabulary: the same old id becomes the same new one."""

    def __missing__(self, old: int) -> int:
        self[old] = FIRST_SPECIAL + len(self) % (VOCABULARY - FIRST_SPECIAL)
        return self[old]


def _shrink(kind: type[PreTrainedConfig], tokens: _Tokens, given: dict[str, Any]) -> PreTrainedConfig:
    exceptions = {**EXCEPTIONS.get(kind.model_type, {}), **given}
    try:
        default = kind()
    except Exception:
        default = kind(**exceptions)
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    kept, lists = _kept_layers(values)
    hierarchical = isinstance(values.get("depths"), (list, tuple))  # its widths grow from stage to stage: left alone
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            inner = exceptions.pop(name, {})
            found[name] = _shrink(type(value), tokens, inner) if isinstance(inner, dict) else inner
        elif name in lists:
            found[name] = [value[i] for i in kept]
        elif name in _LAYER_COUNTS and lists and value == len(values[lists[0]]):
            found[name] = len(kept)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            if (new := _smaller(name, value, tokens, hierarchical)) != value:
                found[name] = new
        elif isinstance(value, (list, tuple)) and _LAYER_NUMBERS.fullmatch(name):
            depth = len(kept) if lists else LAYERS
            found[name] = [i for i in value if i < depth] or ([depth - 1] if value else [])
        elif isinstance(value, (list, tuple)) and name == "depths":
            found[name] = type(value)([1] * len(value))
    found = {**found, **exceptions}
    rope = found.get("rope_parameters", values.get("rope_parameters"))
    if isinstance(rope, dict) and "mrope_section" in (*rope, *str(rope).split("'"), *_modeling_code(kind)):
        found["rope_parameters"] = _with_sections(rope, found, values)
    return kind(**found)


def _kept_layers(values: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Choose layers so that each kind of layer stays; and name the lists that have an entry for each layer."""
    counts = {values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int)}
    lists = [
        name
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) in counts
        and len(value) > 2
        and name != "depths"
        and all(isinstance(entry, (str, int, float)) for entry in value)
        and not _LAYER_NUMBERS.fullmatch(name)
    ]
    kept: set[int] = set()
    for name in lists:
        kept |= {list(values[name]).index(kind) for kind in dict.fromkeys(values[name])}
    for i in range(LAYERS):
        if len(kept) < LAYERS:
            kept.add(i)
    return sorted(kept)[:6], lists


def _smaller(name: str, value: int, tokens: _Tokens, hierarchical: bool = False) -> int:
    if _TOKEN.fullmatch(name) and not name.startswith("num_"):
        return tokens[value] if value >= FIRST_SPECIAL else value
    if name == "patch_size" or (name == "encoder_stride" and not hierarchical):
        return min(value, PATCH)
    for pattern, size in _SIZES:
        if hierarchical and size == WIDTH and name != "image_size":
            continue
        if pattern.fullmatch(name):
            return min(value, size) if value > 0 else value
    return value


def _with_sections(rope: dict[str, Any], found: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Set the sections of rotary embeddings in time, height and width, of each kind of layer."""
    kinds = {name: _with_sections(inner, found, values) for name, inner in rope.items() if isinstance(inner, dict)}
    return {**rope, **kinds} if kinds else {**rope, "mrope_section": _sections(found, values, rope)}


def _sections(found: dict[str, Any], values: dict[str, Any], rope: dict[str, Any]) -> list[int]:
    """Divide the rotated half of a head's width over time, height and width."""
    width = found.get("head_dim", values.get("head_dim")) or HEAD_WIDTH
    half = int(width * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


@cache
def _modeling_code(kind: type[PreTrainedConfig]) -> list[str]:
    spec = importlib.util.find_spec(kind.__module__.replace(".configuration_", ".modeling_"))
    return re.findall(r"\w+", Path(spec.origin).read_text("utf-8")) if spec is not None and spec.origin else []
