"""Short passes in a few fixed shapes, which a GPU replays as graphs: launching their steps may take longer than they.

A pass is padded to the next number of rows and to tables of the next sizes, and copied into the buffers of its shape.
One that reads what is still to come is replayed in parts, each of which waits for its own layers. Knows nothing of
what rows mean. Invariant: rows of a pass get what they would get without padding, to rounding, for a row depends on its
own keys alone; what is given out is copied from the buffers, which the next pass overwrites.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from rcllm.late import Late
from rcllm.model.attend.on_triton import HostTables, PassShape, TritonAttend
from rcllm.model.rope import Rope

if TYPE_CHECKING:
    from rcllm.model.decoder import Aside, Course, Decoder, Keep, Pass, Passed, Stream

_DECODER = Late("rcllm.model.decoder")  # which makes these passes, and whose nouns they speak
_ROWS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
_LONGER = tuple(range(640, 2049, 128))  # where no KV is kept; closer, for the device would compute what is padded
_LONGER_RUNS = 2  # of a longer shape before it is captured: launching it takes a smaller part of its time
_SHAPES = 32  # that are kept; each holds its KV
STATIC_ROWS = _SHAPES * _ROWS[-1]  # at most, whose KV and activations are held
_SEEN = 1024  # shapes that are remembered
Run = Callable[[], Any]  # some layers over fixed buffers; what it returns lies in them, too


@dataclass(frozen=True, slots=True)
class _Shape:
    rows: int
    attention: PassShape
    keeps: bool
    asides: tuple[tuple[int, int, Hashable], ...]  # rows, and the state of their keys
    starts: tuple[int, ...]  # layers before which it waits for what is still to come


class StaticPasses:
    """Of one decoder, on Triton's kernels. Not thread-safe, as the decoder is."""

    def __init__(self, decoder: Decoder, replayed: Callable[[Run], Run]) -> None:
        """replayed: makes of layers over fixed buffers what does the same at once; `Graphs`, on a GPU."""
        self._decoder, self._replayed = decoder, replayed
        self._made = OrderedDict[_Shape, _StaticPass]()
        self._seen = OrderedDict[_Shape, int]()  # how often

    def forward(self, work: Pass) -> Passed | None:
        """None: not for this pass, which is long, or the first of its shape."""
        lengths = _ROWS if work.keep else _ROWS + _LONGER
        decoder = self._decoder
        if len(work.token_ids) > lengths[-1]:
            return None
        host = HostTables(decoder.spec, work.groups, decoder.dtype, decoder.device)
        rows = next(length for length in lengths if length >= len(work.token_ids))
        asides = tuple((aside.start, aside.stop, aside.keys.state) for aside in work.asides)
        starts = tuple(sorted({layer for arrivals in work.arrivals for layer in arrivals.starts} - {0}))
        shape = _Shape(rows, host.shape.rounded(rows), bool(work.keep), asides, starts)
        if shape not in self._made:
            self._seen[shape] = self._seen.pop(shape, 0) + 1
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            if self._seen[shape] <= (1 if rows <= _ROWS[-1] else _LONGER_RUNS):  # capturing takes as long as some runs
                return None
            self._made[shape] = _StaticPass(decoder, shape, work.asides, self._replayed)
            if len(self._made) > _SHAPES:
                self._made.popitem(last=False)
        self._made.move_to_end(shape)
        return self._made[shape].forward(work, host)


class _StaticPass:
    """The buffers of one shape, and its replays, which are made with the first pass."""

    def __init__(
        self, decoder: Decoder, shape: _Shape, asides: Sequence[Aside], replayed: Callable[[Run], Run]
    ) -> None:
        """asides: whose keys stay where they are, and alive."""
        device, rows = decoder.device, shape.rows
        self._decoder, self._replayed = decoder, replayed
        output = torch.zeros(rows, decoder.spec.q_size, dtype=decoder.dtype, device=device)  # also of padded rows
        self._attend = TritonAttend(decoder.spec, decoder.rope, shape.attention, output)
        keep = (_DECODER.Keep(0, rows, 0),) if shape.keeps else ()
        numbers, zeros = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        self._work: Pass = _DECODER.Pass(zeros, zeros.clone(), (), numbers, keep, tuple(asides))
        self._kept = decoder.keeping(self._work)
        self._course: Course = _DECODER.Course(self._work, self._attend, self._kept)
        self._parts = [range(*ends) for ends in pairwise((0, *shape.starts, decoder.spec.num_layers))]
        self._streams: list[Stream] = []  # behind each part but the last
        self._runs = list[Run]()

    def forward(self, work: Pass, host: HostTables) -> Passed:
        count = len(work.token_ids)
        self._work.token_ids[:count].copy_(work.token_ids, non_blocking=True)
        self._work.positions[:count].copy_(work.positions, non_blocking=True)
        self._attend.send(host)
        if not self._runs:
            work.wait(self._parts[-1][-1])  # in a capture nothing may be waited for
            self._runs = [self._replayed(partial(self._through, number)) for number in range(len(self._parts))]
        for layers, run in zip(self._parts, self._runs, strict=True):
            work.wait(layers[-1])
            hidden = run()
        hidden = hidden[work.wanted]
        [kv] = self._kept.blocks() if self._kept is not None else [None]
        kept = [] if kv is None else [_block(kv, keep, self._decoder.rope) for keep in work.keep]
        passed: Passed = _DECODER.Passed(hidden, kept, TritonAttend.name, 0, count)
        return passed

    def _through(self, number: int) -> torch.Tensor | None:
        """A part; the hidden states of all rows behind the last one, [rows, d]."""
        decoder, layers = self._decoder, self._parts[number]
        stream = self._streams[number - 1] if number else decoder.begin(self._work)
        if number == len(self._parts) - 1:
            return decoder.end(decoder.through(layers[:-1], stream, self._course), self._course)
        self._streams[number:] = [decoder.through(layers, stream, self._course)]  # those of an earlier run are over
        return None


def _block(kv: torch.Tensor, keep: Keep, rope: Rope) -> torch.Tensor:
    """A copy of some rows of kv [layers, 2, KV, rows, D], keys shifted back to block-local positions."""
    block = kv[:, :, :, keep.start : keep.stop].clone()
    if keep.base:
        keys = block[:, 0].flatten(0, 1).transpose(0, 1)  # [len, layers · KV, D]
        back = torch.full((len(keys),), -keep.base, device=kv.device)
        block[:, 0] = rope.shift(keys, back).transpose(0, 1).unflatten(0, (len(kv), -1))
    return block


class Graphs:
    """Makes CUDA graphs of passes. They share the memory of their activations, for only one of them runs at a time.

    What one graph leaves for the next must be held between their captures, so that no other graph is given its memory.
    """

    def __init__(self) -> None:
        self._memory: Any = None  # made with the first graph

    def __call__(self, run: Run) -> Run:
        """`run` as a graph. It is run before, so that what is compiled or allocated at first is."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):  # others may copy meanwhile
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay
