"""Numerical kernels of a vision transformer: arrays in, arrays out.

This package knows no model, no file and no configuration. Every operation exists twice under one name: in
`reference` as plain NumPy, which defines it (attention with rounded operands in `reference_attention`), and in the
module of its family as compiled code, which is what a program calls. Shape letters: P rows (patches), E width,
N outputs, K inputs, H heads, D head width, S sequences.

    linear.pack_weight    [N, K] weight → panels, once at load
    linear.linear         [M, K] → [M, N]: x @ weight.T + bias, then tanh-GELU and a residual where asked for
    norm.layer_norm       [M, E] → [M, E]: rows to mean 0 and variance 1, then gain and bias
    attention.attention   q [Mq, H·D], k, v [Mk, H·D] → [Mq, H·D]: full softmax attention per sequence
    patch_embed.patch_embed   [P, K] patches → [P, E]: linear plus the position rows of the patches
    linear_int8.pack_weight_int8       [N, K] weight → int8 per output, once at load
    rows_int8.quantize_rows            [M, K] → int8 with scale and offset per row, for one or more products
    rows_int8.layer_norm_quantized     the same after LayerNorm without gain and bias, in one pass
    linear_int8.linear_int8            `linear` with int8 products and int32 sums
    linear_int8.linear_int8_quantized  the same, its result quantised for the next product, in groups of columns
    attention_int16.attention_int16    `attention` with int16 products and int32 sums
    attention_bf16.attention_bf16      `attention` in bfloat16 with float32 sums, on AMX
    self_attention.pack_heads          weights of queries, keys and values, head by head, once at load
    self_attention.self_attention      quantised → attended rows: products and attention in one pass, on AMX
    reference.gelu_tanh   the activation by itself (compiled code has it inside `linear`)

Contracts shared by all of them:

- Arrays are float32 (others are converted), accumulation is float32 (of int8 products int32, exact), ids and
  offsets are int64. Inputs are never written to. Rows may lie apart in memory (a column slice of a wider
  matrix costs no copy); other layouts are copied once.
- A row of a result depends neither on the number of threads nor on the rows beside it, and is the same in
  every run on a machine.
- NaN and infinity propagate as in the reference; in the int8 family they make their whole row NaN. Arguments
  are not validated: that is done at the border, by the caller.
- Calls may come from any thread, but run one at a time (`compile.parallel_region` says why). The GIL is
  released.

`compile` is the only home of compiler flags, cache location, threads and the choice of the instruction set
(EDGE_RUNTIME_ISA forces one); `simd`, `simd_rows`, `simd_int8`, `simd_int16`, `simd_amx` and `simd_bf16` of vector
code and of the tables that say which instruction set gets which register tile. Importing this package imports neither
numba nor any of its modules.
"""
