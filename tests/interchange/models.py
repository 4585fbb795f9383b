"""Small models of Hugging Face's own, one a family and variant."""

import torch
import transformers
from torch import nn

V = 150


def gpt2():
    c = transformers.GPT2Config(
        vocab_size=V, n_positions=20, n_embd=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-3
    )
    return transformers.GPT2LMHeadModel(c)


def llama(**options):
    small = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    c = transformers.LlamaConfig(
        vocab_size=V,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_theta": 100.0, "rope_type": "default"},
        **small | options,
    )
    return transformers.LlamaForCausalLM(c)


def bert():
    c = transformers.BertConfig(
        vocab_size=V,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        layer_norm_eps=1e-3,
    )
    return transformers.BertForMaskedLM(c)


def t5(tied: bool, activation: str):
    c = transformers.T5Config(
        vocab_size=V,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        layer_norm_epsilon=1e-3,
        feed_forward_proj=activation,
        tie_word_embeddings=tied,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(c)
    if not tied:  # as in the released v1.1 weights, whatever the library ties
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    return model


def bart():
    c = transformers.BartConfig(
        vocab_size=V,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=20,
    )
    model = transformers.BartForConditionalGeneration(c)
    model.final_logits_bias.normal_()
    return model


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied-biased": lambda: llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "bert": bert,
    "t5-v1.1": lambda: t5(False, "gated-gelu"),
    "t5-v1.0": lambda: t5(True, "relu"),
    "bart": bart,
}


def scattered(name):
    """The model of this name with every parameter drawn anew, so that none is trivial."""
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            norm = "norm" in parameter_name.lower() and "weight" in parameter_name
            p.normal_(mean=float(norm), std=0.3)
    return model
