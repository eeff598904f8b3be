"""Hidden rows from the target to the drafter: what to capture, the direct channel, and what travels on it.

Rows travel in the drafter's own input form (fused), as raw bytes beside a typed header. A full or absent drafter never
holds up the target: rows are dropped and counted, and the drafter starts a new context after the gap.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import zmq

from shared.config import Settings
from shared.errors import BadMessage, BadModel
from shared.messages import FeatureRows, Features, TensorSpec
from shared.sockets import secure
from shared.wire import Decoder, check_tensor_frames, encode

log = logging.getLogger(__name__)

QUEUE = 4096  # messages on their way to a slow drafter

_HOST_TYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}

Bits = np.ndarray[Any, np.dtype[Any]]
"""Feature rows on the host: float32, or the bits of 16-bit floats as uint16, which NumPy lacks them as."""


class TapLayer:
    """Stands in for one block of the model and keeps what it put out (B, L, H)."""

    def __init__(self, layer: Any, sink: dict[int, mx.array], index: int) -> None:  # noqa: ANN401 - any mlx-lm block
        self._layer = layer
        self._sink = sink
        self._index = index

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - passed through
        out = self._layer(*arguments, **keywords)
        self._sink[self._index] = out[0] if isinstance(out, tuple) else out
        return out

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - models look at attributes of their blocks
        return getattr(self._layer, name)


def install_taps(model: Any, taps: Sequence[int]) -> dict[int, mx.array]:  # noqa: ANN401 - any architecture
    """Wrap the blocks `taps` (zero-based); each forward fills the returned dict.

    Raises:
        BadModel: the model's blocks are not where mlx-lm's convention has them, or there are too few.
    """
    layers = block_list(model)
    if layers is None:
        raise BadModel(f"cannot capture hidden states of {type(model).__module__}: it has no list of layers")
    if max(taps) >= len(layers):
        raise BadModel(f"the drafter taps block {max(taps)}, the target has {len(layers)}")
    sink: dict[int, mx.array] = {}
    for tap in taps:
        layers[tap] = TapLayer(layers[tap], sink, tap)
    return sink


def block_list(model: Any) -> list[Any] | None:  # noqa: ANN401 - any architecture
    """The list that the forward walks through: an attribute of the model or of the modules inside it."""
    owner = model
    while owner is not None:
        layers = owner.get("layers") if isinstance(owner, dict) else None  # a module is a dict of what it owns
        if isinstance(layers, list):
            return layers
        owner = getattr(owner, "model", None)
    return None


class FeatureSender:
    """The target's end: PUSH."""

    def __init__(self, settings: Settings) -> None:
        self.num_dropped = 0
        self.num_bytes = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, QUEUE)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.IMMEDIATE, 1)
        secure(self._socket, settings, settings.features_endpoint, is_server=False)
        self._socket.connect(settings.features_endpoint)

    def send(self, epoch: int, rows: Sequence[FeatureRows], tensor: np.ndarray[Any, Any], dtype: str) -> None:
        """Args:
        epoch: the target's.
        tensor: (sum of num_rows, H), C-contiguous, 16-bit floats as uint16.
        """
        header = Features(epoch=epoch, rows=list(rows), tensor=TensorSpec(dtype=dtype, shape=list(tensor.shape)))
        try:
            self._socket.send_multipart([encode(header), tensor.data], zmq.NOBLOCK, copy=False)
            self.num_bytes += tensor.nbytes
        except zmq.Again:
            self.num_dropped += 1

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class FeatureReceiver:
    """The drafter's end: PULL."""

    def __init__(self, settings: Settings) -> None:
        self.num_dropped = 0
        self._decoder = Decoder(Features)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, QUEUE)
        self._socket.set(zmq.LINGER, 0)
        secure(self._socket, settings, settings.features_endpoint, is_server=True)
        self._socket.bind(settings.features_endpoint)

    def receive(self, timeout_s: float) -> Iterator[tuple[int, FeatureRows, Bits]]:
        """(epoch, whose, rows (num_rows, H)) of all messages that have come; waits for the first up to `timeout_s`."""
        timeout = int(timeout_s * 1000)
        while self._socket.poll(timeout):
            timeout = 0
            frames = self._socket.recv_multipart()
            try:
                yield from self._split(frames)
            except BadMessage as error:
                self.num_dropped += 1
                log.warning("dropped features: %s", str(error)[:200])

    def _split(self, frames: list[bytes]) -> Iterator[tuple[int, FeatureRows, Bits]]:
        if len(frames) != 2:
            raise BadMessage(f"{len(frames)} frames instead of 2")
        message: Features = self._decoder.decode(frames[0])
        spec = message.tensor
        check_tensor_frames([(spec.dtype, spec.shape)], frames[1:])
        if spec.dtype not in _HOST_TYPES or len(spec.shape) != 2:
            raise BadMessage(f"features of {spec.dtype}{spec.shape}")
        if (
            any(r.num_rows < 1 or r.start < 0 for r in message.rows)
            or sum(r.num_rows for r in message.rows) != spec.shape[0]
        ):
            raise BadMessage("feature rows do not add up")
        array = np.frombuffer(frames[1], _HOST_TYPES[spec.dtype]).reshape(spec.shape)
        at = 0
        for rows in message.rows:
            yield message.epoch, rows, array[at : at + rows.num_rows]
            at += rows.num_rows

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def as_bits(rows: mx.array) -> mx.array:
    """The form in which rows are read on the host."""
    return rows if rows.dtype == mx.float32 else rows.view(mx.uint16)


def from_bits(rows: Bits, dtype: mx.Dtype) -> mx.array:
    """What was read on the host, on the device again."""
    array = mx.array(rows)
    return array if array.dtype == mx.float32 else array.view(dtype)
