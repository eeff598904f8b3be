"""Names of cached blocks: a hash over the block's tokens, chained over everything before it.

Two sequences share a block's name exactly if they agree in model, tenant, all tokens up to the block's end, and the
content of every image or audio segment up to there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Sequenced
from hashlib import blake2b

HASH_BYTES = 16

Mark = tuple[int, int, bytes]
"""A media segment: its first position, its number of positions, the hash of its content."""


def chain_seed(fingerprint: str, tenant: str, block_size: int) -> bytes:
    """What the first block's hash continues."""
    return blake2b(f"{fingerprint}\0{tenant}\0{block_size}".encode(), digest_size=HASH_BYTES).digest()


def extend_chain(
    hashes: list[bytes],
    seed: bytes,
    token_ids: Sequenced[int],
    num_blocks: int,
    block_size: int,
    marks: Sequenced[Mark] = (),
) -> None:
    """Append hashes until there are `num_blocks`.

    Args:
        marks: media segments. A block that a segment reaches into carries the segment's content hash and where the
            segment lies relative to it, so that everything before an image is shared whatever the image shows.
    """
    previous = hashes[-1] if hashes else seed
    for index in range(len(hashes), num_blocks):
        first, end = index * block_size, (index + 1) * block_size
        digest = blake2b(previous, digest_size=HASH_BYTES)
        digest.update(array("I", token_ids[first:end]).tobytes())
        for start, length, content in marks:
            if start < end and start + length > first:
                digest.update(b"%d,%d," % (start - first, length) + content)
        previous = digest.digest()
        hashes.append(previous)
