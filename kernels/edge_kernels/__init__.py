"""Numerical kernels of a vision transformer and of a decoder's prompts: arrays in, arrays out.

This package knows no model, no file and no configuration. Every operation exists twice: in `reference/` as plain
NumPy, which defines it, and in the module of its family as compiled code, which is what a program calls. Shape
letters: P rows (patches), E width, M rows, N outputs, K inputs, H heads, D head width, S sequences.

    linear/     products of rows with weights, [M, K] → [M, N]: x @ weight.T + bias, then tanh-GELU and a residual
      float32       pack_weight, linear: any machine
      bf16_split    pack_split, linear_split: as exact, out of three bfloat16 for each float32; AMX
      dispatch      pack_float_weight, linear_float: the one of these two that is faster here
      int8_rows     quantize_rows, layer_norm_quantized: rows → int8 with scale and offset, for one or more products
      int8_weights  pack_weight_int8: weights → int8 in panels, with one scale per output or rounded in fours
      int8          linear_int8; linear_int8_quantized, whose result is int8 rows again
      gguf_blocks   pack_rows, pack_gated, linear_blocks: weights that stay in ggml's blocks; AMX
      tasks         how all of these are split among workers
    attention/  q [Mq, H·D], k, v [Mk, H·D] → [Mq, H·D]
      float32       attention: full softmax attention within each of several sequences
      int16         attention_int16: the same with integer products
      bf16          attention_bf16: the same in bfloat16 with float32 sums; AMX
      qkv_fused     pack_heads, self_attention: projections and attention in one pass; AMX
      causal        attention_causal: of a prompt's new positions to a KV cache and themselves; AMX
      blocks        how queries and keys are cut into blocks
    rows/       operations on each row by itself
      norm          layer_norm
      patch_embed   patch_embed: a product plus the position rows of the patches
      decoder_rows  rms_norm, norm_and_rotate
    simd/       the inside of all their loops, as LLVM IR: loads, tiles, epilogues. Start at `simd.ir`
    reference/  operations, attention, decoder, gguf_blocks: the definitions

Contracts shared by all of them:

- Arrays are float32 (others are converted), accumulation is float32 (of int8 products int32, exact), ids and
  offsets are int64. Inputs are never written to. Rows may lie apart in memory (a column slice of a wider
  matrix costs no copy); other layouts are copied once.
- A row of a result depends neither on the number of threads nor on the rows beside it, and is the same in
  every run on a machine.
- NaN and infinity propagate as in the reference; in the int8 family they make their whole row NaN. Arguments
  are not validated: that is the caller's job.
- Calls may come from any thread, but run one at a time (`threads.parallel_region` says why). The GIL is released.

`machine` reports processor, instruction set (EDGE_RUNTIME_ISA forces one) and cores; `threads` how many threads run,
`waiting` how they wait; `compile` is the only home of compiler flags and of the cache of machine code; `ahead`
compiles for other machines, `shipped` loads what it has made, `targets` and `signatures` say for what; `arrays`
brings arguments into the form that kernels take. Tables say which instruction set gets which register tile:
`simd.ir.TILES` (float32), `simd.int8.DOT_TILES`, `simd.int16.PAIR_TILES`. Importing this package imports neither
numba nor any of its modules.
"""
