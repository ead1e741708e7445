"""The GPU kernel of what beams keep of their own steps, in Triton: what `StepBuffer` launches.

Knows nothing of beams. Invariant: sums are in fp32, and what is joined is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer", "num_steps", "most_rows", "most_steps"])
def join_steps_kernel(
    qkv,  # [rows, (H + 2·KV)·D]
    output,  # [rows, H·D], of other keys
    lse,  # [rows, H], natural
    kv,  # [layers, 2, most rows, most steps, KV, D]
    layer,
    num_steps,
    most_rows,
    most_steps,
    scale,
    qkv_pitch,
    H: tl.constexpr,
    KV: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    WIDTH_PADDED: tl.constexpr,
    SHARE_PADDED: tl.constexpr,
):
    """output, lse: joined by the attention of each row to its own steps. Grid: (rows, KV heads)."""
    SHARE: tl.constexpr = H // KV
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, columns = tl.arange(0, SHARE_PADDED), tl.arange(0, WIDTH_PADDED)
    head, in_width = kv_head * SHARE + member, columns < WIDTH
    here = (member < SHARE)[:, None] & in_width[None, :]
    q = tl.load(qkv + row * qkv_pitch + head[:, None] * WIDTH + columns[None, :], mask=here, other=0.0).to(tl.float32)
    out = output + (row * H + head)[:, None] * WIDTH + columns[None, :]
    top = tl.load(lse + row * H + head, mask=member < SHARE, other=0.0)
    total = tl.full([SHARE_PADDED], 1.0, tl.float32)
    found = tl.load(out, mask=here, other=0.0).to(tl.float32)
    of_row = ((layer * 2).to(tl.int64) * most_rows + row) * most_steps
    to_values = most_rows.to(tl.int64) * most_steps * (KV * WIDTH)
    for step in range(0, num_steps):
        at = kv + ((of_row + step) * KV + kv_head) * WIDTH + columns
        key = tl.load(at, mask=in_width, other=0.0).to(tl.float32)
        value = tl.load(at + to_values, mask=in_width, other=0.0).to(tl.float32)
        score = tl.sum(q * key[None, :], 1) * scale
        new_top = tl.maximum(top, score)
        weight, shrunk = tl.exp(score - new_top), tl.exp(top - new_top)
        found = found * shrunk[:, None] + value[None, :] * weight[:, None]
        total = total * shrunk + weight
        top = new_top
    tl.store(out, (found / total[:, None]).to(output.dtype.element_ty), mask=here)
    tl.store(lse + row * H + head, top + tl.log(total), mask=member < SHARE)
