"""The GPU kernels of attention that reads segments where they lie, in Triton: what `triton_in_place.py` launches.

    grid: (task, KV head)        a task: the queries of a few rows of one group, over some of the keys that they see

Knows nothing of when they are used. Cached keys are read where they lie; the few queries are turned back
by a segment's base in their place, <R(p) q, R(o + j) k> = <R(p - o) q, R(j) k>. A head is handled as its two halves,
which is how RoPE pairs its dimensions. Invariant: softmax and sums are in fp32; operands of products are in the dtype
of the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, EMULATE: tl.constexpr):
    """total + a · b, in fp32 inside. EMULATE: where the interpreter knows no products in 16 bits."""
    if EMULATE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _read_levels(
    levels,
    scales,
    rows,
    keep,
    FIRST: tl.constexpr,
    PITCH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Half of the columns of int8 rows, widened to fp32. Whole groups are read as such, so that levels are vectors."""
    if HALF % GROUP == 0:
        groups, members = tl.arange(0, HALF_PADDED // GROUP), tl.arange(0, GROUP)
        columns = groups[:, None] * GROUP + members[None, :]
        here = keep[:, None, None] & (columns < HALF)[None, :, :]
        values = tl.load(levels + rows[:, None, None] * PITCH + (FIRST + columns)[None, :, :], mask=here, other=0)
        at = rows[:, None] * (PITCH // 2) + (FIRST // GROUP + groups)[None, :]
        factors = tl.load(scales + at, mask=keep[:, None] & (groups * GROUP < HALF)[None, :], other=0.0)
        wide = values.to(tl.float32) * factors.to(tl.float32)[:, :, None]
        found = tl.reshape(wide, [rows.shape[0], HALF_PADDED])
    else:
        columns = FIRST + tl.arange(0, HALF_PADDED)
        here = keep[:, None] & (columns < FIRST + HALF)[None, :]
        found = tl.load(levels + rows[:, None] * PITCH + columns[None, :], mask=here, other=0).to(tl.float32)
        at = rows[:, None] * (PITCH // 2) + columns[None, :] // GROUP
        found *= tl.load(scales + at, mask=here, other=0.0).to(tl.float32)
    return found


@triton.jit
def read(
    anchor,
    at,
    rows,
    keep,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    PITCH: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[keys, half of the columns, from FIRST on] of a cached block, `at` bytes from the anchor, in its dtype.

    An offset that is a known multiple is read in whole vectors; a pointer out of a table would not be.
    """
    columns = tl.arange(0, HALF_PADDED)
    here = keep[:, None] & (columns < HALF)[None, :]
    within = rows[:, None] * PITCH + FIRST + columns[None, :]
    if KIND == 3:
        levels = anchor.to(tl.pointer_type(tl.int8), bitcast=True) + at // ALIGNED * ALIGNED
        scales = anchor.to(tl.pointer_type(tl.bfloat16), bitcast=True) + (at + 2 * HALF) // 2
        found = _read_levels(levels, scales, rows, keep, FIRST, PITCH, HALF, HALF_PADDED, GROUP)
    elif KIND == 0:
        wide = anchor.to(tl.pointer_type(tl.float32), bitcast=True) + tl.multiple_of(at // 4, 4)
        found = tl.load(wide + within, mask=here, other=0.0)
    elif KIND == 1:
        half = anchor.to(tl.pointer_type(tl.float16), bitcast=True) + tl.multiple_of(at // 2, 8)
        found = tl.load(half + within, mask=here, other=0.0)
    else:
        brain = anchor.to(tl.pointer_type(tl.bfloat16), bitcast=True) + tl.multiple_of(at // 2, 8)
        found = tl.load(brain + within, mask=here, other=0.0)
    return found


@triton.jit
def _absorb(
    q_low,
    q_high,
    k_low,
    k_high,
    v_low,
    v_high,
    seen,
    scale,
    top,
    total,
    low,
    high,
    DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One step of online softmax over a tile of keys; scores are in base 2."""
    scores = product(q_low.to(DTYPE), tl.trans(k_low.to(DTYPE)), tl.zeros(seen.shape, tl.float32), EMULATE)
    scores = product(q_high.to(DTYPE), tl.trans(k_high.to(DTYPE)), scores, EMULATE) * scale
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    from_zero = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - from_zero[:, None])
    shrunk = tl.exp2(top - from_zero)
    total = total * shrunk + tl.sum(weights, 1)
    low = product(weights.to(DTYPE), v_low.to(DTYPE), low * shrunk[:, None], EMULATE)
    high = product(weights.to(DTYPE), v_high.to(DTYPE), high * shrunk[:, None], EMULATE)
    return new_top, total, low, high


@triton.jit
def _over_cached(
    q_low,
    q_high,
    top,
    total,
    low,
    high,
    anchor,
    tiles,
    first,
    last,
    sees_segment,  # [queries], where the bits of each query's row begin
    live,
    cos,
    sin,
    layer,
    kv_head,
    scale,
    KIND: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Online softmax over the tiles of visits `first` to `last`, all of one dtype."""
    WIDTH: tl.constexpr = 2 * HALF
    BYTES: tl.constexpr = 4 if KIND == 0 else (1 if KIND == 3 else 2)
    PITCH: tl.constexpr = WIDTH + 2 * ((WIDTH + GROUP - 1) // GROUP) if KIND == 3 else WIDTH
    columns, keys = tl.arange(0, HALF_PADDED), tl.arange(0, KEYS)
    in_half = columns < HALF
    for visit in range(first, last):
        tile = tiles + visit * 5
        begin, block_len, num_keys = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        base, segment = tl.load(tile + 3), tl.load(tile + 4)
        head_bytes = block_len * (PITCH * BYTES)
        k_at = begin + (layer * (2 * KV) + kv_head) * head_bytes
        v_at = k_at + KV * head_bytes
        keep = keys < num_keys
        k_low = read(anchor, k_at, keys, keep, 0, KIND, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
        k_high = read(anchor, k_at, keys, keep, HALF, KIND, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
        v_low = read(anchor, v_at, keys, keep, 0, KIND, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
        v_high = read(anchor, v_at, keys, keep, HALF, KIND, PITCH, HALF, HALF_PADDED, GROUP, ALIGNED)
        c = tl.load(cos + base * HALF + columns, mask=in_half, other=0.0)[None, :]
        s = tl.load(sin + base * HALF + columns, mask=in_half, other=0.0)[None, :]
        from_low, from_high = q_low.to(tl.float32), q_high.to(tl.float32)
        back_low, back_high = from_low * c + from_high * s, from_high * c - from_low * s
        seen = (tl.load(sees_segment + segment, mask=live, other=0) != 0)[:, None] & keep[None, :]
        top, total, low, high = _absorb(
            *(back_low, back_high, k_low, k_high, v_low, v_high, seen, scale), *(top, total, low, high), DTYPE, EMULATE
        )
    return top, total, low, high


@triton.jit(do_not_specialize=["layer"])
def attend_kernel(
    qkv,  # [rows, (H + 2·KV)·D]
    output,  # [rows, H·D]
    lse,  # [rows, H]
    part_output,  # [slots, rows of a tile, H, D] fp32: of tasks that share their rows with others
    part_lse,  # [slots, rows of a tile, H] fp32, base 2
    anchor,  # any memory: what tiles count their bytes from
    tiles,  # int64 [tiles, 5]: bytes to layer 0 and head 0 at the first key, tokens of the block, keys, base, segment
    tasks,  # int32 [tasks, 16]; the tiles that each reads are consecutive, by dtype
    rows_table,  # int32 [rows, 4]: block, offset, first and last of the rows that it sees
    bits,  # uint8: per group who sees which segment, and which block sees which
    cos,
    sin,  # [positions, D / 2]
    layer,
    scale,
    qkv_pitch,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    HALF_PADDED: tl.constexpr,
    SHARE_PADDED: tl.constexpr,
    ROWS: tl.constexpr,  # queries of a tile: rows times padded heads of a KV head
    KEYS: tl.constexpr,
    KINDS: tl.constexpr,  # bits: which dtypes of cached KV there are
    GROUP: tl.constexpr,  # values in int8 that share a scale
    ALIGNED: tl.constexpr,  # bytes, what rows in int8 begin at multiples of
    DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 * HALF
    SHARE: tl.constexpr = H // KV
    task = tasks + tl.program_id(0) * 16
    kv_head = tl.program_id(1)
    first_row, num_rows = tl.load(task), tl.load(task + 1)
    if num_rows == 0:  # a table may be longer than a pass needs
        return
    fresh_first, fresh_last, is_dense = tl.load(task + 7), tl.load(task + 8), tl.load(task + 9)
    group_row, segments_at, num_segments = tl.load(task + 10), tl.load(task + 11), tl.load(task + 12)
    sees_at, num_blocks, slot = tl.load(task + 13), tl.load(task + 14), tl.load(task + 15)

    query = tl.arange(0, ROWS)
    local_row, head = query // SHARE_PADDED, kv_head * SHARE + query % SHARE_PADDED
    live = (local_row < num_rows) & (query % SHARE_PADDED < SHARE)
    row = first_row + local_row
    columns, keys = tl.arange(0, HALF_PADDED), tl.arange(0, KEYS)
    in_half = columns < HALF
    here = live[:, None] & in_half[None, :]
    at = qkv + row[:, None].to(tl.int64) * qkv_pitch + head[:, None] * WIDTH + columns[None, :]
    q_low, q_high = tl.load(at, mask=here, other=0.0), tl.load(at + HALF, mask=here, other=0.0)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low = tl.zeros([ROWS, HALF_PADDED], tl.float32)
    high = tl.zeros([ROWS, HALF_PADDED], tl.float32)

    # cached keys, one loop for each dtype that there is
    for kind in tl.static_range(4):
        if (KINDS >> kind) & 1:
            top, total, low, high = _over_cached(
                *(q_low, q_high, top, total, low, high),
                *(anchor, tiles, tl.load(task + 2 + kind), tl.load(task + 3 + kind)),
                *(bits + segments_at + (row - group_row) * num_segments, live, cos, sin, layer, kv_head, scale),
                *(kind, KV, HALF, HALF_PADDED, KEYS, GROUP, ALIGNED, DTYPE, EMULATE),
            )

    # fresh keys of the group
    block = tl.load(rows_table + row * 4, mask=live, other=0)
    offset = tl.load(rows_table + row * 4 + 1, mask=live, other=-1)
    first = tl.load(rows_table + row * 4 + 2, mask=live, other=0)
    last = tl.load(rows_table + row * 4 + 3, mask=live, other=0)
    for start in range(fresh_first, fresh_last, KEYS):
        key = start + keys
        keep = (key < fresh_last)[:, None] & in_half[None, :]
        k_at = qkv + key[:, None].to(tl.int64) * qkv_pitch + (H + kv_head) * WIDTH + columns[None, :]
        v_at = k_at + KV * WIDTH
        k_low, k_high = tl.load(k_at, mask=keep, other=0.0), tl.load(k_at + HALF, mask=keep, other=0.0)
        v_low, v_high = tl.load(v_at, mask=keep, other=0.0), tl.load(v_at + HALF, mask=keep, other=0.0)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]) & (key < fresh_last)[None, :]
        if is_dense == 0:
            key_block = tl.load(rows_table + key * 4, mask=key < fresh_last, other=0)
            key_offset = tl.load(rows_table + key * 4 + 1, mask=key < fresh_last, other=0)
            own = (key_block[None, :] == block[:, None]) & (key_offset[None, :] <= offset[:, None])
            sees = tl.load(bits + sees_at + block[:, None] * num_blocks + key_block[None, :], mask=seen, other=0) != 0
            seen = seen & (own | sees)
        top, total, low, high = _absorb(
            *(q_low, q_high, k_low, k_high, v_low, v_high, seen, scale), *(top, total, low, high), DTYPE, EMULATE
        )

    norm = tl.where(total > 0.0, total, 1.0)
    low, high = low / norm[:, None], high / norm[:, None]
    logarithm = tl.where(total > 0.0, top + tl.log2(norm), float("-inf"))
    if slot < 0:
        out = output + (row[:, None].to(tl.int64) * H + head[:, None]) * WIDTH + columns[None, :]
        tl.store(out, low.to(output.dtype.element_ty), mask=here)
        tl.store(out + HALF, high.to(output.dtype.element_ty), mask=here)
        tl.store(lse + row * H + head, logarithm * 0.6931471805599453, mask=live)
    else:
        part = (slot.to(tl.int64) * (ROWS // SHARE_PADDED) + local_row) * H + head
        part_out = part_output + part[:, None] * WIDTH + columns[None, :]
        tl.store(part_out, low, mask=here)
        tl.store(part_out + HALF, high, mask=here)
        tl.store(part_lse + part, logarithm, mask=live)


@triton.jit
def merge_kernel(
    part_output,
    part_lse,
    output,
    lse,
    merges,  # int32 [row tiles that were split, 4]: first row, rows, first slot, slots
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Joins the parts of one row and head; grid: (split row tiles, rows of a tile, H)."""
    merge = merges + tl.program_id(0) * 4
    local_row, head = tl.program_id(1), tl.program_id(2)
    first_row, num_rows, slot, num_slots = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.load(merge + 3)
    if local_row < num_rows:
        columns = tl.arange(0, WIDTH_PADDED)
        here = columns < WIDTH
        top = float("-inf")
        total = 0.0
        joined = tl.zeros([WIDTH_PADDED], tl.float32)
        start = (slot.to(tl.int64) * TILE_ROWS + local_row) * H + head
        for each in range(0, num_slots):
            part = start + each * (TILE_ROWS * H)
            logarithm = tl.load(part_lse + part)
            values = tl.load(part_output + part * WIDTH + columns, mask=here, other=0.0)
            new_top = tl.maximum(top, logarithm)
            from_zero = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight, shrunk = tl.exp2(logarithm - from_zero), tl.exp2(top - from_zero)
            joined = joined * shrunk + values * weight
            total = total * shrunk + weight
            top = new_top
        at = (first_row + local_row).to(tl.int64) * H + head
        tl.store(output + at * WIDTH + columns, (joined / total).to(output.dtype.element_ty), mask=here)
        tl.store(lse + at, (top + tl.log2(total)) * 0.6931471805599453)
