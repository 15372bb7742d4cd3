"""Configurations of init_model.py's models: sizes as it was asked for, token ids from the tokenizer."""

from transformers import BertConfig, GPT2Config, PegasusConfig, PreTrainedTokenizerFast

from from_scratch.arguments import InitModelArguments


def encoder_config(tokenizer: PreTrainedTokenizerFast, args: InitModelArguments) -> BertConfig:
    """BERT: post-norm, learned positions."""
    dropout = 0.1 if args.dropout is None else args.dropout
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        intermediate_size=args.intermediate_size or 4 * args.hidden_size,
        max_position_embeddings=args.max_length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=args.hidden_size**-0.5,
        pad_token_id=tokenizer.pad_token_id,
    )


def decoder_config(tokenizer: PreTrainedTokenizerFast, args: InitModelArguments) -> GPT2Config:
    """GPT-2: pre-norm, learned positions, embeddings tied to the head."""
    dropout = 0.1 if args.dropout is None else args.dropout
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=args.hidden_size,
        n_layer=args.num_layers,
        n_head=args.num_heads,
        n_inner=args.intermediate_size or 4 * args.hidden_size,
        n_positions=args.max_length,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=args.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encoder_decoder_config(tokenizer: PreTrainedTokenizerFast, args: InitModelArguments) -> PegasusConfig:
    """Pegasus: pre-norm, sinusoidal positions, one vocabulary for both sides; no dropout on attention weights."""
    width = args.intermediate_size or 4 * args.hidden_size
    return PegasusConfig(
        vocab_size=len(tokenizer),
        d_model=args.hidden_size,
        encoder_layers=args.num_layers,
        decoder_layers=args.num_layers,
        encoder_attention_heads=args.num_heads,
        decoder_attention_heads=args.num_heads,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        activation_function="relu",
        max_position_embeddings=args.max_length,
        dropout=0.3 if args.dropout is None else args.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        init_std=args.hidden_size**-0.5,
        scale_embedding=True,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
