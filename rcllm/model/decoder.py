"""One decoder-only transformer for all families: a forward pass over fresh rows that attend to cached segments.

Knows nothing of caches, prompts or servers: it gets rows, their positions and their groups, and returns the hidden
states that were asked for and the KV of the rows to keep. `advance` stops inside a layer, and `forward` can go on from
there with fewer rows. Invariant: with no segments and a causal mask it is the model, equal to `transformers`
(fp32, ≤ 1e-4 in the logits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice

import torch

from rcllm.model.arrivals import Arrivals
from rcllm.model.attend.choose import check_kept, native_fits, prepare, resolved
from rcllm.model.attend.compiled import NativeSegmented
from rcllm.model.attend.contract import Attend, Attended, Beside
from rcllm.model.attend.native import kernels
from rcllm.model.attend.segments import Group
from rcllm.model.layers import CompiledLayer, Copied, Layer, LayerParts, Linear
from rcllm.model.ops import NativeOps, Ops, TorchOps, TritonOps
from rcllm.model.quantised import Matrix, Quantised, quantise, wide
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec
from rcllm.model.static_passes import Graphs, StaticPasses
from rcllm.model.weights import LayerWeights, Weights

Observe = Callable[[int, torch.Tensor], None]  # told of each layer's number and qkv [rows, (H + 2·KV)·D], turned
Between = Callable[[int], None]  # called before each layer with the rows of the pass; it may run other passes


@dataclass(frozen=True, slots=True)
class Keep:
    """Rows `start` to `stop` of a pass form a block at position `base`, whose KV is wanted."""

    start: int
    stop: int
    base: int


@dataclass(frozen=True, slots=True)
class Aside:
    """Rows `start` to `stop` of a pass, whole groups, that attend to more keys than those of their groups."""

    start: int
    stop: int
    keys: Beside  # merged by their logsumexp


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass."""

    token_ids: torch.Tensor  # [rows], int64, on the model's device
    positions: torch.Tensor  # [rows], int64
    groups: Sequence[Group]  # in row order, covering all rows
    wanted: torch.Tensor  # [wanted], int64: rows whose final hidden state is read
    keep: Sequence[Keep] = ()
    asides: Sequence[Aside] = ()
    arrivals: Sequence[Arrivals] = ()  # of its segments

    def wait(self, layer: int) -> None:
        """What the device is given from here on may read the segments up to a layer."""
        for arrivals in self.arrivals:
            arrivals.wait(layer)


@dataclass(frozen=True, slots=True)
class Carried:
    """Rows on their way: `num_layers` layers are done, but for what follows the attention of the last of them."""

    residual: torch.Tensor  # [rows, d], the residual stream
    attended: torch.Tensor  # [rows, H·D], what attention gave
    kept: list[torch.Tensor]  # per Keep: [num_layers, 2, kv_heads, len, D], K turned to block-local positions
    num_layers: int

    def of_rows(self, rows: torch.Tensor) -> Carried:
        """Copies of some rows; what was kept is kept."""
        return replace(self, residual=self.residual[rows], attended=self.attended[rows])


@dataclass(frozen=True, slots=True)
class Course:
    """A pass and what it takes along through its layers."""

    work: Pass
    attend: Attend
    kept: Kept | None  # takes the KV of rows to keep
    observe: Observe | None = None
    between: Between | None = None

    def reach(self, layer: int) -> None:
        """Before a layer: others may run, and then what it reads is there."""
        if self.between is not None:
            self.between(len(self.work.token_ids))
        self.work.wait(layer)


@dataclass(frozen=True, slots=True)
class Stream:
    """All rows of a pass between two layers."""

    residual: torch.Tensor  # [rows, d], which layers change in place
    delta: torch.Tensor | None  # [rows, d], what the last layer adds to it; None: no layer is done


@dataclass(frozen=True, slots=True)
class Passed:
    hidden: torch.Tensor  # [wanted, d], after the final norm
    kept: list[torch.Tensor]  # per Keep: [layers, 2, kv_heads, len, D], K turned to block-local positions
    backend: str
    bytes_copied: int  # of published KV
    num_rows: int  # of the whole forward pass


def joined(passes: Sequence[Pass]) -> Pass:
    """Several passes as one, whose rows share the reading of the weights and nothing else."""
    if len(passes) == 1:
        return passes[0]
    starts = list(accumulate((len(work.token_ids) for work in passes[:-1]), initial=0))
    placed = list(zip(passes, starts, strict=True))
    return Pass(
        torch.cat([work.token_ids for work in passes]),
        torch.cat([work.positions for work in passes]),
        [group for work in passes for group in work.groups],
        torch.cat([work.wanted + at for work, at in placed]),
        [replace(each, start=each.start + at, stop=each.stop + at) for work, at in placed for each in work.keep],
        [replace(each, start=each.start + at, stop=each.stop + at) for work, at in placed for each in work.asides],
        [each for work in passes for each in work.arrivals],
    )


def parted(passed: Passed, passes: Sequence[Pass]) -> list[Passed]:
    """What each of the passes that were `joined` would have given alone."""
    kept = iter(passed.kept)
    hidden = passed.hidden.split([len(work.wanted) for work in passes])
    return [
        replace(passed, hidden=rows, kept=list(islice(kept, len(work.keep))))
        for work, rows in zip(passes, hidden, strict=True)
    ]


class Decoder:
    """The model on one device. Not thread-safe: one pass at a time, or one between the layers of another."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: str = "auto",
        max_positions: int | None = None,
        products: str = "fp32",
        kept: str = "full",
        dtype: torch.dtype | None = None,
    ) -> None:
        """products: bf16 rounds matrices, and what they and attention multiply; all else is in fp32 on the CPU.

        int8 rounds inputs of matrices to levels of 8 bits, and attention as bf16 does; matrices are kept in levels.
        kept: int8 keeps matrices in levels of at most 8 bits, those of the weights where these have any. dtype: of
        hidden states and fresh KV; None for that of the weights, which those in levels need not share. Layers are read
        one after the other, once: where they come from files, none is held beside what is made of it.
        Raises ConfigError for a backend that cannot run here.
        """
        assert products != "int8" or kept == "int8", "levels are multiplied by levels"
        self.spec, self.products, self.kept = spec, products, kept
        self.device, self.dtype = weights.embed.device, dtype or weights.final_norm.dtype
        self.backend = resolved(backend, spec, self.device)
        check_kept(kept, self.backend, self.device)
        self.max_positions = min(spec.max_positions, max_positions or spec.max_positions)
        self.rope = Rope.of(spec, self.max_positions, self.device)
        on_triton = self.backend == "triton"
        self.kernels = kernels() if native_fits(spec, self.dtype, self.device) and not on_triton else None
        self._ops: Ops = (TritonOps if on_triton else TorchOps)(spec, self.rope, products)
        if self.kernels:
            self._ops = NativeOps(spec, self.rope, self.kernels, products)
        self.matrix_bytes = self.num_rounded = 0  # of all matrices but the packed head; those that int8 changed
        self.embed, self.final_norm = self._table(weights.embed), weights.final_norm.to(self.dtype)
        self.lm_head = self.embed if weights.lm_head is weights.embed else self._table(weights.lm_head)
        self._layers = [self._layer(w) for w in weights.layers]
        self.static: StaticPasses | None = None
        if on_triton and self.device.type == "cuda":
            self.static = StaticPasses(self, Graphs())

    @property
    def emulates(self) -> bool:
        """Whether products are asked for that this processor, or torch alone, only imitates."""
        return self.products not in (self.kernels.products if self.kernels else ("fp32",))

    @property
    def rounds(self) -> bool:
        """Whether operands are rounded while rows are in fp32."""
        return self.products != "fp32"

    @property
    def sequence_dtype(self) -> torch.dtype:
        """Of KV that is read again and again: that which attention would round it to anyway, as it reads it."""
        return torch.bfloat16 if self.rounds and self.kernels else self.dtype

    def _table(self, weight: Matrix) -> Matrix:
        """Of a row for each token."""
        return self._as_kept(wide(weight).bfloat16() if self.rounds and self.kept == "full" else weight)

    @property
    def _narrows(self) -> bool:
        """Whether matrices take 2 bytes a value, whatever they were."""
        return self.rounds and self.kernels is not None

    def _as_kept(self, weight: Matrix) -> Matrix:
        """As it is, or in levels; counted."""
        if self.kept == "full":
            weight = wide(weight)
            self.matrix_bytes += weight.numel() * (2 if self._narrows else weight.itemsize)
            return weight
        matrix = weight if isinstance(weight, Quantised) else quantise(weight)
        self.matrix_bytes += matrix.nbytes
        self.num_rounded += not matrix.is_exact
        return matrix

    def _layer(self, w: LayerWeights) -> Layer:
        def rounded(vector: torch.Tensor | None) -> torch.Tensor | None:
            return None if vector is None else vector.to(self.dtype)

        def linear(weight: Matrix, bias: torch.Tensor | None) -> Linear:
            return self._ops.linear(self._as_kept(weight), rounded(bias))

        matrices = linear(w.qkv, w.qkv_bias), linear(w.o, w.o_bias), linear(w.gate_up, None), linear(w.down, None)
        norms = w.input_norm.to(self.dtype), w.post_norm.to(self.dtype), rounded(w.q_norm), rounded(w.k_norm)
        return self._ops.layer(LayerParts(*norms, *matrices))

    @torch.inference_mode()
    def forward(
        self,
        work: Pass,
        carried: Carried | None = None,
        observe: Observe | None = None,
        between: Between | None = None,
    ) -> Passed:
        """Runs the layers over the rows of `work`. After the last layer's attention only the wanted rows go on.

        `carried`: where these rows stand, in place of the embedding of their tokens; at least one layer is left to run,
        and the residual stream is changed in place. `between`: may run whole passes of its own, which change nothing;
        short passes on a GPU do not call it.
        """
        layers = range(carried.num_layers if carried else 0, self.spec.num_layers)
        assert layers, "nothing is left to run"
        if self.static is not None and carried is None and observe is None:
            passed = self.static.forward(work)
            if passed is not None:
                return passed
        course = Course(work, self._attend(work), self.keeping(work, layers), observe, between)
        hidden = self.end(self.through(layers[:-1], self.begin(work, carried), course), course)
        blocks = course.kept.blocks() if course.kept else []
        if carried:
            blocks = [torch.cat(parts) for parts in zip(carried.kept, blocks, strict=True)]
        return Passed(hidden, blocks, course.attend.name, course.attend.bytes_copied, len(work.token_ids))

    def begin(self, work: Pass, carried: Carried | None = None) -> Stream:
        """Rows before their first layer, or before the one that follows where `carried` stands."""
        if carried is None:
            return Stream(self._embedded(work), None)
        delta = self._layers[carried.num_layers - 1].feed(carried.residual, carried.attended)
        return Stream(carried.residual, delta)

    def through(self, layers: range, stream: Stream, course: Course) -> Stream:
        """Some layers, of which the last one of the model is none."""
        for i in layers:
            course.reach(i)
            stream = Stream(stream.residual, self._run(i, stream, course))
        return stream

    def end(self, stream: Stream, course: Course) -> torch.Tensor:
        """The last layer, and the final norm of the wanted rows, [wanted, d]."""
        wanted, last = course.work.wanted, self.spec.num_layers - 1
        course.reach(last)
        attended = self._mix(last, stream, course)
        residual = stream.residual[wanted]
        delta = self._layers[-1].feed(residual, attended[wanted])
        return self._ops.add_norm(residual, delta, self.final_norm)

    @torch.inference_mode()
    def advance(self, work: Pass, num_layers: int, observe: Observe | None = None) -> Carried:
        """Runs the first `num_layers` layers, the last of them up to its attention, over every row of `work`."""
        assert 0 < num_layers < self.spec.num_layers
        course = Course(work, self._attend(work), self.keeping(work, range(num_layers)), observe)
        stream = self.through(range(num_layers - 1), self.begin(work), course)
        course.reach(num_layers - 1)
        attended = self._mix(num_layers - 1, stream, course)
        return Carried(stream.residual, attended, course.kept.blocks() if course.kept else [], num_layers)

    def _run(self, number: int, stream: Stream, course: Course) -> torch.Tensor:
        """A layer: residual += delta, and += the projection of its attention; the delta of the MLP [rows, d].

        In one call where the kernels have all of it, else in steps, to the same bits.
        """
        layer, work, attend, kept = self._layers[number], course.work, course.attend, course.kept
        is_plain = course.observe is None and not work.asides and (kept is None or kept.back is None)
        if is_plain and isinstance(layer, CompiledLayer) and type(attend) is NativeSegmented:
            copied = None if kept is None else kept.of_layer(number)
            return layer.run(stream.residual, stream.delta, work.positions, number, attend.reads, copied)
        return layer.feed(stream.residual, self._mix(number, stream, course))

    def _mix(self, number: int, stream: Stream, course: Course) -> torch.Tensor:
        """The first half of a layer: residual += delta, and what attention over it gives; [rows, H·D]."""
        work = course.work
        qkv = self._layers[number].project(stream.residual, stream.delta, work.positions)
        if course.kept is not None:
            course.kept.take(number, qkv)
        if course.observe is not None:
            course.observe(number, qkv)
        attended = course.attend(number, qkv)
        for aside in work.asides:
            rows = slice(aside.start, aside.stop)
            aside.keys.join(number, qkv[rows], Attended(attended.output[rows], attended.lse[rows]))
        return attended.output

    def _embedded(self, work: Pass) -> torch.Tensor:
        return self.embed[work.token_ids].to(self.dtype)  # a copy, which the layers change in place

    def _attend(self, work: Pass) -> Attend:
        if self.device.type == "cpu":  # elsewhere the host would wait for all that was launched
            assert int(work.positions.max()) < self.max_positions, "planning refuses prompts beyond the context"
        ends = accumulate(group.num_rows for group in work.groups)
        merged = [any(aside.start < end <= aside.stop for aside in work.asides) for end in ends]
        return prepare(self.backend, self.spec, self.rope, work.groups, self.kernels, merged, self.products, self.dtype)

    def keeping(self, work: Pass, layers: range | None = None) -> Kept | None:
        """Where KV of the rows to keep goes; None: of none. layers: of the pass; by default, all."""
        return Kept(self, work.keep, layers or range(self.spec.num_layers)) if work.keep else None

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """[n, d] -> fp32 [n, vocab], or the columns of `token_ids` alone."""
        logits = self._head(hidden) if token_ids is None else hidden @ self.lm_head[token_ids].to(self.dtype).T
        return logits.float()

    @cached_property
    def _head(self) -> Linear:
        """Made when whole rows of logits are first asked for, which rankings never do."""
        return self._ops.linear(self.lm_head, None)

    @torch.inference_mode()
    def full_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of every position of one plain causal sequence; [n, vocab], fp32."""
        n = len(token_ids)
        rows = torch.arange(n, device=self.device)
        tokens = torch.tensor(token_ids, device=self.device)
        return self.logits(self.forward(Pass(tokens, rows, (Group.causal(n),), wanted=rows)).hidden)


class Kept:
    """Collects K and V of the rows to keep, layer by layer, K shifted back to block-local positions.

    `back`: None where they stand there already.
    """

    def __init__(self, decoder: Decoder, keep: Sequence[Keep], layers: range) -> None:
        spec, device = decoder.spec, decoder.device
        self._ops, self.keep, self.layers = decoder._ops, keep, layers
        self.rows = torch.cat([torch.arange(k.start, k.stop, device=device) for k in keep])
        back = torch.cat([torch.full((k.stop - k.start,), k.base, device=device) for k in keep])
        self.back = back if any(k.base for k in keep) else None
        shape = (len(layers), 2, spec.num_kv_heads, len(self.rows), spec.head_dim)
        self.kv = torch.empty(shape, dtype=decoder.dtype, device=device)

    def take(self, layer: int, qkv: torch.Tensor) -> None:
        self._ops.keep(qkv, self.rows, self.back, self.of_layer(layer).to)

    def of_layer(self, layer: int) -> Copied:
        return Copied(self.rows, self.kv[layer - self.layers.start])

    def blocks(self) -> list[torch.Tensor]:
        """Views into the buffer; whoever publishes one copies it."""
        return list(self.kv.split([k.stop - k.start for k in self.keep], dim=3))
