"""Loading a model and its tokenizer for the scripts, with errors that say what to change."""

import logging
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.command_line import closest

logger = logging.getLogger(f"hf_rdrop.scripts.{__name__}")


@dataclass
class ModelArguments:
    """Model to train or evaluate."""

    model_name_or_path: str = field(metadata={"help": "Folder of a model, or its name on the Hub."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    token: str | None = field(
        default=None, metadata={"help": "Access token for the Hub; default: of `hf auth login`."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code that comes with a model on the Hub. Only if you have read it."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start a new head where the model's own has a different number of labels."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Implementation of attention, as transformers names it: eager, sdpa, flash_attention_2 and so on. "
            "Default: what transformers chooses. On a CPU and short texts eager can be faster."
        },
    )

    def hub_options(self) -> dict[str, Any]:
        """Return the options of every `from_pretrained`."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


def load_config(model_args: ModelArguments, **changes: Any) -> PreTrainedConfig:
    """Load the model's configuration, with `changes` made to it."""
    name = model_args.config_name or model_args.model_name_or_path
    argument = "config_name" if model_args.config_name else "model_name_or_path"
    return load_part(AutoConfig, name, argument, model_args, **changes)


def load_tokenizer(model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, which must be able to pad."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    argument = "tokenizer_name" if model_args.tokenizer_name else "model_name_or_path"
    tokenizer = load_part(AutoTokenizer, name, argument, model_args, config=config)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name} has no padding token, so texts of different lengths do not fit into one "
                "batch. Add one to it (tokenizer.add_special_tokens) and save it, or choose another --tokenizer_name."
            )
        logger.info(
            "The tokenizer has no padding token: padding with its end-of-sequence token %s.", tokenizer.eos_token
        )
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def load_word_tokenizer(model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load a tokenizer that takes lists of words and knows the word of each token."""
    tokenizer = load_tokenizer(model_args, config)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {model_args.tokenizer_name or model_args.model_name_or_path} does not tell which word "
            "a token belongs to. Choose a model with a fast tokenizer (a tokenizer.json)."
        )
    return tokenizer


def load_model(
    auto_class: Any,
    head: str,
    model_args: ModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Load the model with the head of `auto_class`, and an embedding for each token of its tokenizer.

    Raises:
        ValueError: the model cannot be loaded, has no such head, or has one for other labels.
    """
    name = model_args.model_name_or_path
    try:
        model = load_part(
            auto_class,
            name,
            "model_name_or_path",
            model_args,
            config=config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            attn_implementation=model_args.attn_implementation,
        )
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(
                f"{name} is a {config.model_type} model, and transformers has none of that type with a {head} head. "
                "Choose a --model_name_or_path of another type."
            ) from error
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                f"the weights of {name} do not fit its configuration with {config.num_labels} labels: its head was "
                "trained for others. Give --ignore_mismatched_sizes to start a new head."
            ) from error
        raise
    if tokenizer is not None and len(tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        logger.warning("The tokenizer has %d tokens, the model %d: adding new embeddings.", len(tokenizer), rows)
        model.resize_token_embeddings(len(tokenizer))
    return model


def set_languages(
    tokenizer: Any, model: Any, source_lang: str | None, target_lang: str | None, forced_bos_token: str | None
) -> None:
    """Tell multilingual tokenizers (mBART, M2M-100, NLLB, ...) the languages, and models how their output begins."""
    first_id = None
    if hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        known = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.get_vocab()
        for argument, language in (("source_lang", source_lang), ("target_lang", target_lang)):
            if language is None:
                raise ValueError(f"this model's tokenizer is multilingual: give --{argument}.")
            if language not in known:
                raise ValueError(
                    f"--{argument} {language} is no language of this tokenizer{closest(language, known)}."
                )
        tokenizer.src_lang, tokenizer.tgt_lang = source_lang, target_lang
        first_id = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)(target_lang)
        if model.config.decoder_start_token_id is None:
            model.config.decoder_start_token_id = first_id
    if forced_bos_token is not None:
        if forced_bos_token not in tokenizer.get_vocab():
            near = closest(forced_bos_token, tokenizer.get_vocab())
            raise ValueError(f"--forced_bos_token {forced_bos_token} is no token of this tokenizer{near}.")
        first_id = tokenizer.convert_tokens_to_ids(forced_bos_token)
    if first_id is not None:
        model.generation_config.forced_bos_token_id = first_id
    if model.config.decoder_start_token_id is None:
        raise ValueError(
            "the model's configuration has no decoder_start_token_id, so the decoder has no first token. Set it in "
            "the model's config.json."
        )


def hub_name(model_args: ModelArguments) -> str | None:
    """Return the model's name on the Hub for the card; None for a folder, which the Hub is not to be asked for."""
    name = model_args.model_name_or_path
    return None if Path(name).expanduser().exists() else name


def load_part(auto_class: Any, name: str, argument: str, model_args: ModelArguments, **options: Any) -> Any:
    """`auto_class.from_pretrained(name, ...)`, with errors that name the argument the name was given by."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--{argument}: the folder {name} holds no model: it has no config.json.")
        name = str(folder)
    elif folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"--{argument}: {name} {what}. Give the folder of a model, or a name on the Hub (owner/name)."
        )
    try:
        return auto_class.from_pretrained(name, **model_args.hub_options(), **options)
    except OSError as error:
        where = "is not complete" if folder.is_dir() else "is neither a folder here nor could be loaded from the Hub"
        raise ValueError(f"--{argument}: {name} {where} ({' '.join(str(error).split())}).") from error
    except Exception as error:  # of many kinds, when a file is damaged
        reason = " ".join(str(error).split())
        if "Unrecognized configuration class" in reason or "ignore_mismatched_sizes" in reason:
            raise  # `load_model` explains these
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"--{argument}: the weights of {name} are a pickle that is damaged or holds more than tensors, which "
                "could run code when it is loaded. Choose a model with weights in safetensors."
            ) from error
        if "trust_remote_code" in reason:
            raise ValueError(
                f"--{argument}: {name} brings code of its own, which is run only when you ask for it: read that code, "
                "then give --trust_remote_code, or choose another model."
            ) from error
        raise ValueError(
            f"--{argument}: {name} cannot be loaded ({type(error).__name__}: {reason:.300}). A file of it may be "
            "damaged, or from another version of transformers: fetch or save it again."
        ) from error


def fit_length(
    wanted: int | None, argument: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, default: int = 512
) -> int:
    """Return the longest input in tokens: the wanted length, or less where tokenizer or model take less."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    if "roberta" in config.model_type or config.model_type in ("camembert", "longformer", "mpnet"):
        positions -= 2  # they count positions from the padding token's id + 1
    limit = min(tokenizer.model_max_length, positions if positions > 0 else tokenizer.model_max_length)
    if wanted is not None and wanted > limit:
        logger.warning("--%s %d is more than the model can take: using %d.", argument, wanted, limit)
    return min(wanted or default, limit)
