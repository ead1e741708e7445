"""The GPU kernels of attention over keys that were laid side by side first: what `triton_laid.py` launches.

    lay_kernel     grid: (tile of keys, KV head)      keys turned to their positions, values as they are
    laid_kernel    grid: (task, KV head)              a task: the queries of a few rows, over some keys of their group

Knows nothing of when they are used. Invariant: softmax and sums are in fp32; operands of products are in the dtype of
the rows. Source: FlashAttention-2 (arXiv 2307.08691), for keys that all rows of a tile see, and for those that some do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rcllm.model.attend.triton_kernels import product, read

FRESH: tl.constexpr = tl.constexpr(4)  # beside the dtypes of cached KV: rows of this pass


@triton.jit(do_not_specialize=["layer"])
def lay_kernel(
    qkv,  # [rows, (H + 2·KV)·D]
    keys,
    values,  # [KV, keys, D], in the dtype of the rows
    anchor,  # any memory: what tiles count their bytes from
    tiles,  # int64 [tiles, 6]: where it begins, tokens of its block, its own, base, where it goes, dtype
    cos,
    sin,  # [positions, D / 2]
    layer,
    num_keys,
    qkv_pitch,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    HALF_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    KINDS: tl.constexpr,  # bits: which dtypes of cached KV there are
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * HALF
    tile, kv_head = tiles + tl.program_id(0) * 6, tl.program_id(1)
    begin, block_len, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    base, to, kind = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    if count == 0:  # a table may be longer than a pass needs
        return
    tokens, columns = tl.arange(0, TOKENS), tl.arange(0, HALF_PADDED)
    keep = tokens < count
    here = keep[:, None] & (columns < HALF)[None, :]
    out = ((kv_head.to(tl.int64) * num_keys + to) + tokens)[:, None] * WIDTH + columns[None, :]
    if kind == FRESH:
        row = (begin + tokens)[:, None]
        at = qkv + row * qkv_pitch + (H + kv_head) * WIDTH + columns[None, :]
        tl.store(keys + out, tl.load(at, mask=here, other=0.0), mask=here)
        tl.store(keys + out + HALF, tl.load(at + HALF, mask=here, other=0.0), mask=here)
        tl.store(values + out, tl.load(at + KV * WIDTH, mask=here, other=0.0), mask=here)
        tl.store(values + out + HALF, tl.load(at + KV * WIDTH + HALF, mask=here, other=0.0), mask=here)
    for each in tl.static_range(4):
        if (KINDS >> each) & 1:  # noqa: SIM102 (this is known when it is compiled, the kind when it runs)
            if kind == each:
                BYTES: tl.constexpr = 4 if each == 0 else (1 if each == 3 else 2)
                PITCH: tl.constexpr = WIDTH + 2 * ((WIDTH + GROUP - 1) // GROUP) if each == 3 else WIDTH
                head_bytes = block_len * (PITCH * BYTES)
                k_at = begin + (layer * (2 * KV) + kv_head) * head_bytes
                v_at = k_at + KV * head_bytes
                low = read(anchor, k_at, tokens, keep, 0, each, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
                high = read(anchor, k_at, tokens, keep, HALF, each, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
                low, high = low.to(tl.float32), high.to(tl.float32)
                c = tl.load(cos + base * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
                s = tl.load(sin + base * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
                tl.store(keys + out, (low * c - high * s).to(keys.dtype.element_ty), mask=here)
                tl.store(keys + out + HALF, (high * c + low * s).to(keys.dtype.element_ty), mask=here)
                low = read(anchor, v_at, tokens, keep, 0, each, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
                high = read(anchor, v_at, tokens, keep, HALF, each, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
                tl.store(values + out, low.to(values.dtype.element_ty), mask=here)
                tl.store(values + out + HALF, high.to(values.dtype.element_ty), mask=here)


@triton.jit
def _absorb(
    q,
    k,
    v,
    seen,
    scale,
    top,
    total,
    found,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,  # whether `seen` tells which keys count; else all do
    DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One step of online softmax over a tile of keys; scores are in base 2."""
    scores = product(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32), EMULATE) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    from_zero = new_top
    if MASKED:
        from_zero = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - from_zero[:, None])
    shrunk = tl.exp2(top - from_zero)
    total = total * shrunk + tl.sum(weights, 1)
    found = product(weights.to(DTYPE), v, found * shrunk[:, None], EMULATE)
    return new_top, total, found


@triton.jit
def laid_kernel(
    qkv,  # [rows, (H + 2·KV)·D]
    output,  # [rows, H·D]
    lse,  # [rows, H]
    part_output,  # [slots, rows of a tile, H, D] fp32: of tasks that share their rows with others
    part_lse,  # [slots, rows of a tile, H] fp32, base 2
    keys,
    values,  # [KV, keys, D]
    tasks,  # int32 [tasks, 16]
    visits,  # int32: first keys of the tiles that some rows of a task see, and some do not
    rows_table,  # int32 [rows, 4]: block, offset, one past the last key that it sees
    keys_table,  # int32 [keys, 2]: block, offset
    bits,  # uint8: per group which block sees which
    num_keys,
    scale,
    qkv_pitch,
    H: tl.constexpr,
    KV: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    WIDTH_PADDED: tl.constexpr,
    SHARE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # queries of a tile: rows times padded heads of a KV head
    KEYS: tl.constexpr,
    TOLD: tl.constexpr,  # whether blocks say who sees whom; else every row sees all keys before its own
    DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    SHARE: tl.constexpr = H // KV
    task, kv_head = tasks + tl.program_id(0) * 16, tl.program_id(1)
    first_row, num_rows = tl.load(task), tl.load(task + 1)
    if num_rows == 0:  # a table may be longer than a pass needs
        return
    whole_first, whole_last = tl.load(task + 2), tl.load(task + 3)
    visits_first, visits_last, limit = tl.load(task + 4), tl.load(task + 5), tl.load(task + 6)
    sees_at, num_blocks, slot = tl.load(task + 7), tl.load(task + 8), tl.load(task + 9)

    query = tl.arange(0, ROWS)
    local_row, head = query // SHARE_PADDED, kv_head * SHARE + query % SHARE_PADDED
    live = (local_row < num_rows) & (query % SHARE_PADDED < SHARE)
    row = first_row + local_row
    columns, tokens = tl.arange(0, WIDTH_PADDED), tl.arange(0, KEYS)
    in_width = columns < WIDTH
    here = live[:, None] & in_width[None, :]
    q = tl.load(
        qkv + row[:, None].to(tl.int64) * qkv_pitch + head[:, None] * WIDTH + columns[None, :], mask=here, other=0.0
    )
    of_head = kv_head.to(tl.int64) * num_keys * WIDTH
    within = tokens[:, None] * WIDTH + columns[None, :]

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, WIDTH_PADDED], tl.float32)

    for start in range(whole_first, whole_last, KEYS):  # keys that all rows see
        at = of_head + start * WIDTH + within
        if WIDTH == WIDTH_PADDED:
            k, v = tl.load(keys + at), tl.load(values + at)
        else:
            k = tl.load(keys + at, mask=in_width[None, :], other=0.0)
            v = tl.load(values + at, mask=in_width[None, :], other=0.0)
        top, total, found = _absorb(q, k, v, True, scale, top, total, found, ROWS, KEYS, False, DTYPE, EMULATE)

    block = tl.load(rows_table + row * 4, mask=live, other=0)
    offset = tl.load(rows_table + row * 4 + 1, mask=live, other=-1)
    last = tl.load(rows_table + row * 4 + 2, mask=live, other=0)
    for visit in range(visits_first, visits_last):
        start = tl.load(visits + visit)
        key = start + tokens
        keep = (key < limit)[:, None] & in_width[None, :]
        at = of_head + start * WIDTH + within
        k, v = tl.load(keys + at, mask=keep, other=0.0), tl.load(values + at, mask=keep, other=0.0)
        seen = key[None, :] < last[:, None]
        if TOLD:
            key_block = tl.load(keys_table + key * 2, mask=key < limit, other=0)
            key_offset = tl.load(keys_table + key * 2 + 1, mask=key < limit, other=0)
            own = (key_block[None, :] == block[:, None]) & (key_offset[None, :] <= offset[:, None])
            sees = tl.load(bits + sees_at + block[:, None] * num_blocks + key_block[None, :], mask=seen, other=0) != 0
            seen = seen & (own | sees)
        top, total, found = _absorb(q, k, v, seen, scale, top, total, found, ROWS, KEYS, True, DTYPE, EMULATE)

    norm = tl.where(total > 0.0, total, 1.0)
    found = found / norm[:, None]
    logarithm = tl.where(total > 0.0, top + tl.log2(norm), float("-inf"))
    if slot < 0:
        out = output + (row[:, None].to(tl.int64) * H + head[:, None]) * WIDTH + columns[None, :]
        tl.store(out, found.to(output.dtype.element_ty), mask=here)
        tl.store(lse + row * H + head, logarithm * 0.6931471805599453, mask=live)
    else:
        part = (slot.to(tl.int64) * (ROWS // SHARE_PADDED) + local_row) * H + head
        tl.store(part_output + part[:, None] * WIDTH + columns[None, :], found, mask=here)
        tl.store(part_lse + part, logarithm, mask=live)
