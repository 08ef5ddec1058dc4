"""One table: checkpoint name → GGUF name, for decoder, vision tower and resampler.

Decoder names are gguf-py's for `qwen3`; mmproj names are those of llama.cpp's MiniCPM-V script, quirk included:
**fc1 is written as `ffn_down` and fc2 as `ffn_up`**, and every loader (ours too) tells by the row lengths and swaps
them back.
"""

from __future__ import annotations

DECODER = {
    "llm.model.embed_tokens.weight": "token_embd.weight",
    "llm.model.norm.weight": "output_norm.weight",
    "llm.lm_head.weight": "output.weight",
}

DECODER_LAYER = {  # llm.model.layers.N. → blk.N.
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}

VISION = {
    "vpm.embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "vpm.embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "vpm.embeddings.position_embedding.weight": "v.position_embd.weight",
    "vpm.post_layernorm.weight": "v.post_ln.weight",
    "vpm.post_layernorm.bias": "v.post_ln.bias",
}

VISION_LAYER = {  # vpm.encoder.layers.N. → v.blk.N., weight and bias each
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}

RESAMPLER = {
    "resampler.query": "resampler.query",
    "resampler.kv_proj.weight": "resampler.kv.weight",
    "resampler.attn.out_proj.weight": "resampler.attn.out.weight",
    "resampler.attn.out_proj.bias": "resampler.attn.out.bias",
    **{f"resampler.ln_{n}.{p}": f"resampler.ln_{n}.{p}" for n in ("q", "kv", "post") for p in ("weight", "bias")},
}
RESAMPLER_PROJ = ("resampler.proj", "resampler.proj.weight")  # written transposed
RESAMPLER_IN_PROJ = (
    "resampler.attn.in_proj_weight",
    "resampler.attn.in_proj_bias",
)  # cut into q, k, v by rows
RESAMPLER_POSITIONS = "resampler.pos_embed_k"  # computed; llama.cpp loads it, we compute positions at run time

# GGUF name of a 4-bit matrix, without the layer → the checkpoint's name of the layer norm whose output it multiplies.
_NORM_BEFORE = {
    "attn_q": "layer_norm1",
    "attn_k": "layer_norm1",
    "attn_v": "layer_norm1",
    "ffn_down": "layer_norm2",
    "resampler.attn.q": "resampler.ln_q",
    "resampler.attn.k": "resampler.ln_kv",
}

# Buffers that some exporters store although they are computed from the configuration.
IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "embeddings.position_ids",
    "resampler.pos_embed",
    "resampler.temporal_pos_embed",
)


def decoder_names(n_layers: int, tied: bool) -> dict[str, str]:
    """All decoder tensors of a model with `n_layers`, checkpoint name to GGUF name, in file order."""
    names = {k: v for k, v in DECODER.items() if not (tied and v == "output.weight")}
    for n in range(n_layers):
        names |= {f"llm.model.layers.{n}.{k}": f"blk.{n}.{v}" for k, v in DECODER_LAYER.items()}
    return names


def vision_names(n_layers: int) -> dict[str, str]:
    """All vision tower tensors, checkpoint name to GGUF name, in file order."""
    names = dict(VISION)
    for n in range(n_layers):
        for source, target in VISION_LAYER.items():
            for part in ("weight", "bias"):
                names[f"vpm.encoder.layers.{n}.{source}.{part}"] = f"v.blk.{n}.{target}.{part}"
    return names


def norm_before(name: str) -> str | None:
    """Checkpoint name of the layer norm whose output the matrix `name` multiplies, or None."""
    matrix = name.removesuffix(".weight")
    if not matrix.startswith("v.blk."):
        return _NORM_BEFORE.get(matrix)
    _, _, layer, part = matrix.split(".")
    norm = _NORM_BEFORE.get(part)
    return f"vpm.encoder.layers.{layer}.{norm}" if norm else None
