"""RcLLM's semantic history pool: token prototypes with K and V of every layer, shared by all users.

The pool is one read-only file in safetensors' layout, made by `rcllm.prototypes.build`, that every node opens by memory
map. Knows nothing of engines. Invariant: what comes from it is approximate, lives for one request, and is never
published. The KV of a token is that of a prototype in *its* context, right in layer 0 at best. Prototypes are made of
users' texts: to erase a user, build the pool again without that user (`rcllm pool build --exclude-users`).
Source: RcLLM (arXiv 2605.07443, §III-B, its M2).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from rcllm.core.ranking import BoolArray, Borrowed, ContentKey, Matches, Prompt, TokenIds
from rcllm.core.receipts import BlockKind
from rcllm.durable import renamed
from rcllm.errors import ConfigError, ModelError
from rcllm.fields import parse
from rcllm.model.decoder import Decoder
from rcllm.model.quantised import Matrix, in_host_memory
from rcllm.model.rope import Rope
from rcllm.prototypes.lookup import Matcher, PrototypeIndex
from rcllm.prototypes.lsh import Canonical, Floats, Ints, Lsh, Rows, Words

VERSION = 1
_META = "rcllm_semantic_pool"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8"}


@dataclass(frozen=True, slots=True)
class PrototypeHeader:
    """What a pool was made for and how; stored in its file."""

    version: int
    model: str  # first 12 hex digits of the model fingerprint
    namespace: str  # hex blake3 of the prompter's namespace: model, tokenizer, template, chat format, dtypes
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str  # of K and V
    prototypes: int
    tables: int
    bits: int
    seed: int
    bucket_width: int  # positions that count as one place
    threshold: float  # least cosine at which a prototype stands for a token
    member_context: str  # what stood before a member: the user's earlier history, or the instruction alone
    members: int  # the KV is the mean over up to so many occurrences
    source: str  # in words
    num_texts: int
    num_tokens: int

    @property
    def kv_bytes(self) -> int:
        per_layer = 2 * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize
        return self.prototypes * self.layers * per_layer


class PrototypePool:
    """An open pool. Safe to share between threads: it is never written."""

    def __init__(self, header: PrototypeHeader, matcher: Matcher, kv: torch.Tensor, rope: Rope) -> None:
        """kv: [prototypes, layers, 2, kv_heads, head_dim], K at position 0; may be a memory map. Use `open`."""
        self.header, self.matcher = header, matcher
        self._kv, self._rope = kv, rope
        state = blake3(json.dumps(asdict(header)).encode() + matcher.index.words.codes.tobytes())
        self.identity = state.hexdigest()[:12]  # what answers depend on; for records and receipts

    @classmethod
    def open(cls, path: Path, decoder: Decoder, namespace: bytes) -> PrototypePool:
        """Maps the file. Raises ConfigError where it is not there or not for this prompter, ModelError where broken."""
        header, tensors = _read(path)
        if header.namespace != namespace_digest(namespace):
            raise ConfigError(
                f"{path} was built for model {header.model} with another model, adapter, tokenizer, template, chat "
                "format or dtype than this engine's; build it again with the same options (rcllm pool build)"
            )
        spec = decoder.spec
        expected = (header.prototypes, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
        planes = tensors["planes"].numpy()
        if tuple(tensors["kv"].shape) != expected or planes.shape != (spec.hidden_size, header.tables, header.bits):
            raise ModelError(f"{path}: K and V are {tuple(tensors['kv'].shape)}, expected {expected}; build it again")
        words = Words.of_codes(tensors["codes"].numpy())
        rows = embedding_rows(decoder.embed)
        index = PrototypeIndex(words, tensors["covered"].numpy(), Lsh(planes), rows, tensors["signatures"].numpy())
        fresh = tensors["fresh"].numpy().astype(bool)
        matcher = Matcher(index, fresh, header.bucket_width, header.threshold)
        return cls(header, matcher, tensors["kv"], decoder.rope)

    def match(self, token_ids: TokenIds, start_position: int) -> Matches:
        """Which tokens of a run are read from the pool; `start_position`: of the first, from the history's start."""
        return self.matcher.match(token_ids, start_position)

    def borrow(self, prompt: Prompt) -> dict[int, Borrowed]:
        """What of a prompt's history is read from the pool, by the index of the block."""
        history = [(i, block) for i, block in enumerate(prompt.blocks) if block.kind is BlockKind.HISTORY]
        first = history[0][1].base if history else 0
        alone = self.header.member_context == "instruction"  # then every text began at the same place
        matched = {i: self.match(block.token_ids, 0 if alone else block.base - first) for i, block in history}
        return {i: Borrowed(_key(found), found) for i, found in matched.items() if found.reused.any()}

    def block(self, matches: Matches) -> torch.Tensor:
        """[layers, 2, kv_heads, len, head_dim]: the matched tokens' KV, K turned to block-local positions.

        Like every KV block, so that a segment can read its matched pieces; zeros where a token is not matched. On the
        device of the model; in the pool's dtype.
        """
        device = self._rope.cos.device
        place = torch.from_numpy(np.flatnonzero(matches.reused))
        found = self._kv[torch.from_numpy(matches.prototype)[place]].to(device)  # [n, layers, 2, kv_heads, head_dim]
        k, v = found.unbind(2)
        k = self._rope.shift(k.flatten(1, 2), place.to(device)).unflatten(1, k.shape[1:3])
        layers, kv_heads, head_dim = v.shape[1:]
        out = torch.zeros(layers, 2, kv_heads, len(matches), head_dim, dtype=found.dtype, device=device)
        out[:, :, :, place.to(device)] = torch.stack((k, v), dim=2).permute(1, 2, 3, 0, 4)
        return out


def _key(matches: Matches) -> ContentKey:
    """Equal for equal KV: of each token, its prototype or none."""
    return ContentKey(blake3(b"semantic" + np.where(matches.reused, matches.prototype, -1).tobytes()).digest())


def embedding_rows(embed: Matrix) -> Rows:
    """Reads rows of the embedding matrix [vocab, d] as fp32; keeps a copy of a matrix that is on a GPU."""
    here = in_host_memory(embed)

    def rows(token_ids: Ints) -> Floats:
        found: Floats = here[torch.from_numpy(token_ids)].float().numpy()
        return found

    return rows


def namespace_digest(namespace: bytes) -> str:
    return blake3(namespace).hexdigest()


# ---- the file -------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    header: PrototypeHeader,
    canonical: Canonical,
    index: PrototypeIndex,
    fresh: BoolArray,
    parts: Iterable[tuple[Ints, torch.Tensor, torch.Tensor]],
) -> None:
    """Writes a pool, whole or not at all, without ever holding its KV in memory.

    parts: (prototypes [n], weights [n] fp32, KV [n, layers, 2, kv_heads, head_dim], K at position 0); a prototype's KV
    is the weighted sum of its rows.
    """
    small = {
        "codes": canonical.words.codes,
        "covered": canonical.covered,
        "signatures": index.signatures,
        "planes": index.lsh.planes,
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in small.items()}
    shape = (header.prototypes, header.layers, 2, header.kv_heads, header.head_dim)
    last = torch.from_numpy(fresh.astype(np.uint8))
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    described |= {"kv": (DTYPES[header.dtype], shape), "fresh": (last.dtype, tuple(last.shape))}
    head, offsets = _layout(header, described)
    with renamed(path) as partial:
        with partial.open("wb") as file:
            file.write(head)
            for tensor in tensors.values():
                file.write(tensor.numpy().tobytes())
            file.truncate(offsets["fresh"])
            file.seek(offsets["fresh"])
            file.write(last.numpy().tobytes())
        mapped = np.memmap(partial, np.uint8, "r+", offsets["kv"], (header.kv_bytes,))
        kv = torch.from_numpy(mapped).view(DTYPES[header.dtype]).view(shape)  # zeros so far
        for prototypes, weights, rows in parts:
            kv.index_add_(0, torch.from_numpy(prototypes), (rows.float() * weights.view(-1, 1, 1, 1, 1)).to(kv.dtype))
        mapped.flush()


def _layout(
    header: PrototypeHeader, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, int]]:
    """safetensors' header, and where each tensor begins in the file. The library's writer wants all in memory."""
    described: dict[str, object] = {"__metadata__": {_META: json.dumps(asdict(header))}}
    begins, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = end, end + int(np.prod(shape)) * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (begins[name], end)}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + begin for name, begin in begins.items()}


def is_pool(path: Path) -> bool:
    """Whether `path` is a file that `write` made, of any version."""
    try:
        with safe_open(path, framework="pt") as handle:
            return _META in (handle.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read(path: Path) -> tuple[PrototypeHeader, dict[str, torch.Tensor]]:
    """Maps every tensor of the file into memory and reads none of them. Raises ConfigError, ModelError."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no semantic pool; make one with `rcllm pool build --out {path}`")
    try:
        with safe_open(path, framework="pt") as handle:
            meta = (handle.metadata() or {}).get(_META)
            names = ("codes", "covered", "signatures", "planes", "kv", "fresh")
            tensors = {name: handle.get_tensor(name) for name in names} if meta else {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole semantic pool ({error}); copy or build it again") from error
    if meta is None:
        raise ModelError(f"{path} is a safetensors file, but no semantic pool; give what `rcllm pool build` wrote")
    try:
        values = json.loads(meta)
    except ValueError as error:
        raise ModelError(f"{path}: its header is not whole ({error}); copy or build it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object as its header, got {meta[:60]!r}; copy or build it again")
    if values.get("version") != VERSION:
        raise ModelError(f"{path} has format {values.get('version')}, this version reads {VERSION}; build it again")
    return parse(PrototypeHeader, values, str(path), error=ModelError), tensors
