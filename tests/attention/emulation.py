"""Stand-ins for libraries that run on GPUs only, in torch and fp64 on the CPU. Each has its library's
signature and contract: cumulative lengths, causal at the bottom right, nothing past the last
segment read or written, and a deterministic backward where that must be asked for."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StandIn:
    """A library that is there, on any device."""

    function: Any

    def load(self):
        return self.function

    def obstacle(self, device):
        return None


def varlen(q, k, v, q_starts, k_starts, causal, scale):
    """softmax over each segment's visible keys; a row that sees none is zero."""
    group, pieces = q.shape[1] // k.shape[1], []
    q_starts, k_starts = q_starts.tolist(), k_starts.tolist()
    assert len(q_starts) == len(k_starts) and q_starts[0] == k_starts[0] == 0
    for a, b, c, d in zip(q_starts, q_starts[1:], k_starts, k_starts[1:]):
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], keys) * scale
        if causal:
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1 + (d - c) - (b - a))
            scores = scores.masked_fill(hidden, float("-inf"))
        pieces.append(torch.einsum("hij,jhd->ihd", scores.softmax(2).nan_to_num(), values))
    out = torch.cat(pieces)
    rest = out.new_full((len(q) - len(out), *q.shape[1:]), float("nan"))
    return torch.cat((out, rest))


def asked_rightly(deterministic):
    return deterministic == torch.are_deterministic_algorithms_enabled()


def longest(starts):
    return int(starts.diff().max())


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash_attn.flash_attn_varlen_func, flash-attn 2.8."""
    assert q.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert asked_rightly(deterministic)
    assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_interface.flash_attn_varlen_func, commit 01afd16d of flash-attention."""
    assert asked_rightly(deterministic)
    assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)


def flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """flash_attn.cute.flash_attn_varlen_func, flash-attn-4 4.0.0b36: output and log-sum-exp."""
    assert asked_rightly(deterministic)
    assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale), None


def cudnn_sdpa(
    query,
    key,
    value,
    *,
    scale=None,
    is_causal=False,
    causal_bottom_right=False,
    window_left=-1,
    window_right=-1,
    sinks=None,
    seq_len_q=None,
    seq_len_kv=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_seqlen_q=0,
    max_seqlen_kv=0,
    return_lse=False,
):
    """cudnn.sdpa_torch, nvidia-cudnn-frontend 1.32; differentiable only with return_lse."""
    assert return_lse and is_causal == causal_bottom_right
    assert max_seqlen_q >= longest(cu_seqlens_q) and max_seqlen_kv >= longest(cu_seqlens_kv)
    assert (cu_seqlens_q.diff() > 0).all() and (cu_seqlens_kv.diff() > 0).all()  # before cuDNN 9.25
    return varlen(query, key, value, cu_seqlens_q, cu_seqlens_kv, is_causal, scale), None


def torch_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch.nn.attention.varlen.varlen_attn, torch 2.13; torch refuses groups without enable_gqa."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    causal = {(-1, -1): False, (-1, 0): True}[window_size]
    return varlen(query, key, value, cu_seq_q, cu_seq_k, causal, scale)


def torch_varlen_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """torch 2.11's signature, which takes groups without being told."""
    options = {"scale": scale, "window_size": window_size, "enable_gqa": True}
    return torch_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)


def cudnn_mask_plan(
    mask_func,
    q,
    k,
    v,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    pack_gqa=None,
    build_backward=None,
    _fwd_variant=None,
):
    """cudnn.flex_attention.create_mask_plan, nvidia-cudnn-frontend 1.32: bool [B, 1, Sq, Sk] here."""
    assert build_backward and mask_func.dtype == torch.int32 and mask_func.is_contiguous()
    assert mask_func.shape == (1, 3, q.shape[0] * q.shape[1])
    assert (mask_func.diff(dim=1) >= 0).all()
    f0, f1, f2 = mask_func[0].view(3, q.shape[0], 1, q.shape[1], 1)
    keys = torch.arange(k.shape[1])
    return (keys < f0) | ((keys >= f1) & (keys < f2))


def cudnn_flex(
    q,
    k,
    v,
    *,
    mask_plan,
    softmax_scale=None,
    deterministic=False,
    return_lse=False,
    return_max_logit=False,
):
    """cudnn.flex_attention.flex_attn_func of the same. A row that sees no key is zero."""
    assert asked_rightly(deterministic)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    weights = scores.masked_fill(~mask_plan, float("-inf")).softmax(3).nan_to_num()
    return torch.einsum("bhij,bjhd->bihd", weights, v)
