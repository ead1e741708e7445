"""Builds the semantic history pool from users' texts: choose prototypes, compute their KV shard by shard, write.

Choosing needs no model, only embeddings; computing can be killed at any time and goes on with the next shard. Knows
nothing of the command line. Invariant: the file depends on texts, options, model and instruction alone, not on how
often the build was interrupted.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rcllm.core.ranking import BoolArray, Layout, TokenIds
from rcllm.durable import check_writable, remove, renamed, writing
from rcllm.durable import write as write_file
from rcllm.errors import ConfigError, DataError
from rcllm.fields import check
from rcllm.model.decoder import Decoder, Keep
from rcllm.prompt.blocks import Prompter
from rcllm.prompt.keys import token_bytes
from rcllm.prototypes.config import PrototypeConfig
from rcllm.prototypes.lookup import Matcher, PrototypeIndex, always_fresh
from rcllm.prototypes.lsh import Canonical, Ints, Lsh, Words, choose
from rcllm.prototypes.pool import DTYPES, VERSION, PrototypeHeader, embedding_rows, is_pool, namespace_digest, write
from rcllm.reuse.assemble import assemble_blocks

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OURS = re.compile(r"shard-\d+\.safetensors|\..*\.partial")  # in a work folder, beside the recipe
_HELD_OUT, _MAX_HELD_OUT = 0.05, 500  # share of the texts, and number, that tell how much of new text is found


@dataclass(frozen=True, slots=True)
class BuildProgress:
    done_shards: int
    num_shards: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of texts that the pool was not made from it stands for."""

    num_texts: int
    num_tokens: int
    reused_share: float  # of all tokens
    language_share: float  # of the tokens that are not always fresh
    mean_cosine: float  # to the nearest prototype found, of the tokens that are not always fresh


@dataclass(frozen=True, slots=True)
class BuildReport:
    header: PrototypeHeader
    file_bytes: int
    bytes_per_layer: int  # of K and V
    covered_share: float  # tokens of the texts, of those not always fresh, that a prototype was chosen to stand for
    held_out: Coverage | None  # None: too few texts to hold any out


@dataclass(frozen=True, slots=True)
class _Members:
    """Which tokens of the texts become prototypes; ordered by text, then place."""

    prototype: Ints  # [n]
    text: Ints  # [n]
    offset: Ints  # [n], place within its text
    shared_by: Ints  # [n], how many members its prototype is the mean of

    def part(self, start: int, stop: int) -> _Members:
        return _Members(*(values[start:stop] for values in (self.prototype, self.text, self.offset, self.shared_by)))


class PrototypeBuilder:
    """One build. The work folder beside the output holds finished shards until the file is written."""

    def __init__(
        self,
        decoder: Decoder,
        prompter: Prompter,
        config: PrototypeConfig,
        out: Path,
        *,
        model_id: str,
        kv_dtype: torch.dtype = torch.float16,
        layout: Layout = "history_first",
        pass_tokens: int = 2048,
    ) -> None:
        """`layout`: whose instruction stands before the texts; `pass_tokens`: most tokens in one forward pass.

        `kv_dtype`: fp16 for int8, since a prototype is a sum of rows, which have no common scale.
        """
        check(config)
        kv_dtype = torch.float16 if kv_dtype == torch.int8 else kv_dtype
        self.decoder, self.prompter, self.config, self.out = decoder, prompter, config, out
        self.model_id, self.kv_dtype, self.pass_tokens = model_id, kv_dtype, pass_tokens
        self.instruction = prompter.instructions[layout]
        self.work = out.with_name(out.name + ".work")
        self._rows = embedding_rows(decoder.embed)

    def run(
        self,
        texts: Sequence[TokenIds],
        source: str,
        on_progress: Callable[[BuildProgress], None] | None = None,
    ) -> BuildReport:
        """texts: what users did, each a run of tokens after the instruction; `source` says in words what they are.

        Raises DataError where there is nothing to make prototypes from, ConfigError where the work folder holds
        another build.
        """
        check_out(self.out)
        start = time.perf_counter()
        built_from, held_out = self._split([text for text in texts if text])
        fresh = always_fresh(self.prompter.tokenizer, self.prompter.template, self.config.fresh_pattern)
        lsh = Lsh.of(self.decoder.spec.hidden_size, self.config.tables, self.config.bits, self.config.seed)
        tokens = _Tokens.of(built_from, fresh, self.config.bucket_width)
        codes, counts = np.unique(tokens.words.codes, return_counts=True)
        if not len(codes):
            raise DataError(f"{source}: no token of {len(built_from):,} texts may be taken from a pool; give more text")
        config = self.config
        canonical = choose(self._rows, Words.of_codes(codes), counts, lsh, config.threshold, config.prototypes)
        members = tokens.members(canonical, config.members)
        shards = list(_shards(members, config.texts_per_shard))
        self._open_work(built_from, canonical)
        for number, shard in enumerate(shards):
            if not _is_whole(self._shard_path(number), shard):
                self._compute(built_from, shard, self._shard_path(number))
            if on_progress:
                on_progress(BuildProgress(number + 1, len(shards), time.perf_counter() - start))
        header = self._header(canonical, source, built_from)
        index = PrototypeIndex(canonical.words, canonical.covered, lsh, self._rows)
        with writing(self.out):
            write(self.out, header, canonical, index, fresh, (self._load(n) for n in range(len(shards))))
            self._remove_work()
        return BuildReport(
            header,
            self.out.stat().st_size,
            header.kv_bytes // header.layers,
            float(canonical.covered.sum() / counts.sum()),
            coverage(Matcher(index, fresh, config.bucket_width, config.threshold), held_out) if held_out else None,
        )

    def _split(self, texts: list[TokenIds]) -> tuple[list[TokenIds], list[TokenIds]]:
        """The texts in a drawn order, and some held out; the order decides which occurrence is a prototype's member."""
        limit = self.decoder.max_positions - len(self.instruction)
        order = np.random.default_rng(self.config.seed).permutation(len(texts))
        shuffled = [texts[i][:limit] for i in order]
        count = min(int(len(texts) * _HELD_OUT), _MAX_HELD_OUT)
        return shuffled[count:], shuffled[:count]

    def _header(self, canonical: Canonical, source: str, texts: Sequence[TokenIds]) -> PrototypeHeader:
        spec, config = self.decoder.spec, self.config
        return PrototypeHeader(
            version=VERSION,
            model=self.model_id,
            namespace=namespace_digest(self.prompter.namespace),
            layers=spec.num_layers,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=_DTYPE_NAMES[self.kv_dtype],
            prototypes=len(canonical.words),
            tables=config.tables,
            bits=config.bits,
            seed=config.seed,
            bucket_width=config.bucket_width,
            threshold=config.threshold,
            member_context=config.member_context,
            members=config.members,
            source=source,
            num_texts=len(texts),
            num_tokens=sum(map(len, texts)),
        )

    # ---- shards ----

    def _open_work(self, texts: Sequence[TokenIds], canonical: Canonical) -> None:
        """Makes the work folder, or checks that what it holds belongs to this build."""
        state = blake3(json.dumps(asdict(self.config)).encode() + self.prompter.namespace)
        state.update(str(self.kv_dtype).encode() + token_bytes(self.instruction) + canonical.words.codes.tobytes())
        for text in texts:
            state.update(blake3(token_bytes(text)).digest())
        recipe, digest = self.work / "recipe", state.hexdigest().encode()
        with writing(self.out):
            if not recipe.exists():  # then nothing says which build the shards belong to
                _check_ours(self.work)
                self._remove_work()
            elif recipe.read_bytes() != digest:
                raise ConfigError(
                    f"{self.work} holds an unfinished build with other texts, options or model: repeat it as it was, "
                    "or remove the folder to begin anew"
                )
            write_file(recipe, digest)

    def _remove_work(self) -> None:
        """At once out of sight: half of it would be taken for a build."""
        aside = self.work.with_name(f".{self.work.name}.partial")
        remove(aside)
        if self.work.exists():
            self.work.replace(aside)
        remove(aside)

    def _shard_path(self, number: int) -> Path:
        return self.work / f"shard-{number:06}.safetensors"

    def _compute(self, texts: Sequence[TokenIds], shard: _Members, path: Path) -> None:
        """Runs the shard's texts, each up to its last member, after the instruction, and keeps the members' KV."""
        rows = [self._pass(texts, part) for part in self._passes(shard)]
        tensors = {
            "prototype": torch.from_numpy(shard.prototype),
            "weight": 1.0 / torch.from_numpy(shard.shared_by).float(),
            "kv": torch.cat(rows),
        }
        with writing(path), renamed(path) as partial:
            save_file(tensors, partial)

    def _passes(self, shard: _Members) -> Iterator[_Members]:
        """Runs of whole texts of at most `pass_tokens` tokens together, or of one text."""
        ends = np.append(np.flatnonzero(np.diff(shard.text)) + 1, len(shard.text))  # one past each text's last member
        start = size = last = 0
        for end in ends.tolist():
            length = int(shard.offset[end - 1]) + 1
            if last > start and size + length > self.pass_tokens:
                yield shard.part(start, last)
                start, size = last, 0
            size, last = size + length, end
        yield shard.part(start, last)

    def _pass(self, texts: Sequence[TokenIds], part: _Members) -> torch.Tensor:
        """KV of the members, [n, layers, 2, kv_heads, head_dim] in the pool's dtype on the CPU, K at position 0."""
        distinct, place = np.unique(part.text, return_inverse=True)
        lengths = np.zeros(len(distinct), np.int64)
        np.maximum.at(lengths, place, part.offset + 1)
        begins = np.cumsum(lengths) - lengths
        runs = [texts[text][:length] for text, length in zip(distinct.tolist(), lengths.tolist(), strict=True)]
        num_before = len(self.instruction)
        work = assemble_blocks(runs, self._instruction_kv, num_before, self.decoder.device)
        keep = [
            Keep(row, row + 1, num_before + offset)
            for row, offset in zip((begins[place] + part.offset).tolist(), part.offset.tolist(), strict=True)
        ]
        kept = self.decoder.forward(replace(work, keep=keep)).kept
        return torch.cat(kept, dim=3).permute(3, 0, 1, 2, 4).to("cpu", self.kv_dtype).contiguous()

    @functools.cached_property
    def _instruction_kv(self) -> torch.Tensor:
        work = assemble_blocks([self.instruction], None, 0, self.decoder.device)
        return self.decoder.forward(work).kept[0].contiguous()

    def _load(self, number: int) -> tuple[Ints, torch.Tensor, torch.Tensor]:
        path = self._shard_path(number)
        try:
            tensors = load_file(path)
            return tensors["prototype"].numpy(), tensors["weight"], tensors["kv"]
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{path} is not a whole part of this build ({error}); remove it and build again") from error


def check_out(out: Path) -> None:
    """Whether a pool can be written to `out`; it replaces an earlier pool and nothing else.

    Raises ConfigError, DataError.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: expected the name of a file, such as {out / 'history.pool'}")
    check_writable(out)
    if out.exists() and not is_pool(out):
        raise ConfigError(f"{out} exists and is no pool of `rcllm pool build`: name another file, or remove it")


def _check_ours(work: Path) -> None:
    """A work folder without its recipe may be removed if it holds shards and nothing else. Raises ConfigError."""
    if not work.exists():
        return
    others = [work] if work.is_file() else [path for path in work.iterdir() if not _OURS.fullmatch(path.name)]
    if others:
        raise ConfigError(f"{others[0]} is not of `rcllm pool build`, which would work there: move it, or name another")


def _is_whole(path: Path, shard: _Members) -> bool:
    """Whether a shard of an earlier run can be used; of one that was damaged, everything is computed again."""
    try:
        with safe_open(path, framework="np") as file:
            return bool(np.array_equal(file.get_tensor("prototype"), shard.prototype))
    except (SafetensorError, OSError):
        return False


def coverage(matcher: Matcher, texts: Sequence[TokenIds]) -> Coverage:
    """What a pool stands for in texts that it was not made from."""
    matches = [matcher.match(text, 0) for text in texts]
    language = [~matcher.fresh[np.array(text, dtype=np.int64)] for text in texts]
    reused = np.concatenate([found.reused for found in matches])
    cosine = np.concatenate([found.cosine for found in matches])
    asked = np.concatenate(language)
    share, near = (float(values[asked].mean()) if asked.any() else 0.0 for values in (reused, cosine))
    return Coverage(len(texts), len(reused), float(reused.mean()), share, near)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """All tokens of all texts that may be taken from a pool, in the texts' order."""

    words: Words
    text: Ints  # [n]
    offset: Ints  # [n]

    @classmethod
    def of(cls, texts: Sequence[TokenIds], fresh: BoolArray, bucket_width: int) -> _Tokens:
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        flat = np.fromiter((token for text in texts for token in text), np.int64, int(lengths.sum()))
        text = np.repeat(np.arange(len(texts)), lengths)
        offset = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        usable = ~fresh[flat]
        return cls(Words(flat[usable], offset[usable] // bucket_width), text[usable], offset[usable])

    def members(self, canonical: Canonical, most: int) -> _Members:
        """The first `most` occurrences of each prototype's word."""
        codes, wanted = self.words.codes, canonical.words.codes
        place = np.minimum(np.searchsorted(wanted, codes), len(wanted) - 1)
        seen = np.flatnonzero(wanted[place] == codes)
        by_prototype = seen[np.argsort(place[seen], kind="stable")]
        prototype = place[by_prototype]
        count = np.bincount(prototype, minlength=len(wanted))
        rank = np.arange(len(prototype)) - np.repeat(np.cumsum(count) - count, count)
        chosen = np.sort(by_prototype[rank < most])
        return _Members(place[chosen], self.text[chosen], self.offset[chosen], np.minimum(count, most)[place[chosen]])


def _shards(members: _Members, texts_per_shard: int) -> Iterator[_Members]:
    """The members of so many texts each; texts without members are passed over."""
    firsts = np.unique(members.text, return_index=True)[1][::texts_per_shard]
    bounds = [*firsts.tolist(), len(members.text)]
    for start, stop in itertools.pairwise(bounds):
        yield members.part(start, stop)
