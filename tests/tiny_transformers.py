"""Small models of transformers, untrained."""

import transformers


def build(
    family: str, positions: int, start: int = 1, **given: int | None
) -> transformers.PreTrainedModel:
    """A model of "llama", "gpt2", "t5" or "bart". start: the decoder's start token. given: the size of
    the vocabulary and special tokens."""
    if family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            **given,
        )
        return transformers.LlamaForCausalLM(config)
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_positions=positions, n_embd=48, n_layer=2, n_head=3, **given
        )
        return transformers.GPT2LMHeadModel(config)
    if family == "t5":
        config = transformers.T5Config(
            d_model=48,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=start,
            **given,
        )
        return transformers.T5ForConditionalGeneration(config)
    config = transformers.BartConfig(
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=positions,
        decoder_start_token_id=start,
        forced_eos_token_id=None,
        **given,
    )
    return transformers.BartForConditionalGeneration(config)
