"""Documents that the target wrote: filters, one compact file, and the batches of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from bench.training.parts import Batch

LENGTH_MULTIPLE = 64  # documents of one batch have about the same length, so little is padding
MIN_ANSWER = 8
NGRAM = 6
MAX_REPEATED = 0.3  # share of an answer's n-grams that stood there before
LOOP_WINDOW = 32  # n-grams; a loop begins where so many hold more repeated ones than that share

TRAIN, HELD_OUT = 0, 1


@dataclass
class Documents:
    """N documents, flat. `prompt` counts tokens before the answer; `looped` marks what the repetition filter found."""

    tokens: np.ndarray  # (sum of lengths,) uint16, uint32 for larger vocabularies
    lengths: np.ndarray  # (N,) int32
    prompts: np.ndarray  # (N,) int32
    temperatures: np.ndarray  # (N,) float32, of the answer
    split: np.ndarray  # (N,) uint8, TRAIN or HELD_OUT
    looped: np.ndarray  # (N,) bool
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @property
    def num_answer_tokens(self) -> int:
        return int((self.lengths - self.prompts).sum())

    def where(self, mask: np.ndarray) -> np.ndarray:
        return np.flatnonzero(mask)

    def save(self, path: Path) -> None:
        """Writes the whole file or nothing."""
        draft = path.with_name(path.name + ".part.npz")
        np.savez(
            draft, tokens=self.tokens, lengths=self.lengths, prompts=self.prompts, temperatures=self.temperatures,
            split=self.split, looped=self.looped,
        )  # fmt: skip
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Documents:
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        """All of them, without a prompt that an earlier one has too."""
        names = ("tokens", "lengths", "prompts", "temperatures", "split", "looped")
        whole = cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))
        seen: set[bytes] = set()
        kept = []
        for i in range(len(whole)):
            key = whole[i][: whole.prompts[i]].tobytes()
            if key not in seen:
                seen.add(key)
                kept.append(i)
        return whole.take(np.array(kept, dtype=np.int64))

    def take(self, indices: np.ndarray) -> Documents:
        flat = [self[int(i)] for i in indices]
        tokens = np.concatenate(flat) if flat else self.tokens[:0]
        return Documents(
            tokens, self.lengths[indices], self.prompts[indices], self.temperatures[indices], self.split[indices],
            self.looped[indices],
        )  # fmt: skip


def repeated(answer: np.ndarray) -> np.ndarray:
    """(number of n-grams,) bool: which of the answer's n-grams occurred in it before."""
    n = max(0, len(answer) - NGRAM + 1)
    keys = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(NGRAM):
            keys = keys * np.uint64(1_000_003) + answer[i : i + n].astype(np.uint64)
    found = np.ones(n, dtype=bool)
    found[np.unique(keys, return_index=True)[1]] = False
    return found


def repeated_share(answer: np.ndarray) -> float:
    """Share of the answer's n-grams that occurred in it before."""
    found = repeated(answer)
    return float(found.mean()) if len(found) > 1 else 0.0


def is_looped(answer: np.ndarray) -> bool:
    """Repeats itself over all, or in its last quarter (at least 48 tokens)."""
    tail = answer[-max(48, len(answer) // 4) :]
    return repeated_share(answer) > MAX_REPEATED or repeated_share(tail) > MAX_REPEATED


def before_loop(answer: np.ndarray) -> np.ndarray:
    """The answer up to the first n-gram of its first loop; whole where it has none."""
    found = repeated(answer)
    if not len(found):
        return answer
    recent = np.convolve(found, np.ones(LOOP_WINDOW, dtype=np.int64))[: len(found)]
    dense = np.flatnonzero(recent > MAX_REPEATED * LOOP_WINDOW)
    if not len(dense):
        return answer
    begin = max(0, int(dense[0]) + 1 - LOOP_WINDOW)
    return answer[: begin + int(np.argmax(found[begin:]))]


@dataclass
class Batches:
    """Endless batches over the training documents, the same for the same seed; `position` is where to go on.

    Args:
        tokens_per_step: padded tokens of a batch, about.
        anchors_per_token: A = this times the padded length.
        num_predictions: k.
    """

    documents: Documents
    tokens_per_step: int
    anchors_per_token: float
    num_predictions: int
    seed: int = 0
    max_length: int = 640
    position: int = 0

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """(batch, answer tokens in it)."""
        epoch, skipped = 0, self.position
        while True:
            plan = self._epoch(epoch)
            if not plan:
                raise ValueError("no training documents")
            if skipped >= len(plan):
                skipped -= len(plan)
                epoch += 1
                continue
            for index in range(skipped, len(plan)):
                self.position += 1
                rng = np.random.default_rng([self.seed, epoch, index])
                length, rows = plan[index]
                yield self._batch(rows, length, rng)
            skipped = 0
            epoch += 1

    @property
    def steps_per_epoch(self) -> int:
        return len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(padded length, documents) of each step, shuffled."""
        docs = self.documents
        rng = np.random.default_rng([self.seed, epoch])
        is_used = (docs.split == TRAIN) & ~docs.looped & (docs.lengths <= self.max_length)
        is_used &= docs.lengths - docs.prompts >= MIN_ANSWER
        padded = -(-docs.lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        plan: list[tuple[int, np.ndarray]] = []
        for length in np.unique(padded[is_used]):
            rows = rng.permutation(np.flatnonzero(is_used & (padded == length)))
            size = max(1, self.tokens_per_step // int(length))
            # Whole batches only, so that few shapes reach the device; the rest comes in another epoch's shuffle.
            whole = [rows[i : i + size] for i in range(0, len(rows), size)]
            plan += [(int(length), part) for part in whole if len(part) == size or len(rows) < size]
        order = rng.permutation(len(plan))
        return [plan[i] for i in order]

    def _batch(self, rows: np.ndarray, length: int, rng: np.random.Generator) -> tuple[Batch, int]:
        docs = self.documents
        num_anchors = max(1, round(self.anchors_per_token * length))
        tokens = np.zeros((len(rows), length), dtype=np.int32)
        anchors = np.ones((len(rows), num_anchors), dtype=np.int32)
        valid = np.zeros_like(anchors)
        num_answer = 0
        for b, index in enumerate(rows):
            document = docs[int(index)]
            n, first = len(document), int(docs.prompts[index])
            tokens[b, :n] = document
            num_answer += n - first
            choice = first + rng.permutation(n - 1 - first)[:num_anchors]  # the last token is no anchor
            anchors[b, : len(choice)] = np.sort(choice)
            valid[b, : len(choice)] = np.minimum(n - 1 - anchors[b, : len(choice)], self.num_predictions)
        return Batch(mx.array(tokens), mx.array(anchors), mx.array(valid)), num_answer
