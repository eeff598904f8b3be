"""Keys and values of one attention layer: a pool per capacity class, and the views that a forward attends through.

A pool is (rows, num_kv_heads, capacity, dim). Position p of a sequence lies at index p % capacity: a full-attention
pool has the class's capacity and never wraps; a sliding-window pool is a ring that holds the window and the widest
step, so that rolling back rejected tokens is only setting a number: what they overwrote had left every window already.
"""

from __future__ import annotations

import mlx.core as mx

from workers.cache import cpu_attention
from workers.cache.batch_shape import BatchShape, Spans, pieces, position_mask
from workers.cache.placement import Move, Run
from workers.cache.spec import AttentionSpec
from workers.kernels.base import MAX_ROWS, HeadNorms, PagedAttention, Variant
from workers.kernels.choice import AttentionChoice
from workers.kernels.pages import Pages, Pool
from workers.kernels.tiles import attend_in_tiles, attend_joined_in_tiles
from workers.models.rope import Rotate, Rotation, rotated

RING_SPARE = 32  # so many positions more stay intact behind the widest step: a block that it completes is stored whole
GROW_TOKENS = 8192  # pools grow by so many positions, or by half: a user who is alone reserves one row
MAX_GROW_ROWS = 8


class KVLayer:
    """One layer's pools, by class. Arrays are rebound on each write, so that MLX writes in place."""

    def __init__(self, spec: AttentionSpec, capacities: list[int], max_width: int, slack: int, dtype: mx.Dtype) -> None:
        self.spec = spec
        self.dtype = dtype
        ring = None if spec.window is None else -(-(spec.window + max_width + RING_SPARE) // 32) * 32
        self.capacities = [c + slack if ring is None else min(c + slack, ring) for c in capacities]
        self.keys: list[mx.array | None] = [None] * len(capacities)
        self.values: list[mx.array | None] = [None] * len(capacities)
        self.attention: AttentionChoice | None = None
        self._pools: list[Pool | None] = [None] * len(capacities)
        self._variant: Variant | None = None

    def joined_variant(
        self, scale: float, window: int | None, rotation: Rotation | None, norms: HeadNorms | None
    ) -> Variant:
        """The same object in every forward; a kernel takes a rotation's frequencies, and positions from its pages."""
        held = self._variant
        if (
            held is None
            or held.scale != scale
            or held.window != window
            or held.norms is not norms
            or (None if held.rotation is None else held.rotation.inv_freq)
            is not (None if rotation is None else rotation.inv_freq)
        ):
            held = self._variant = Variant(scale, window, rotation=rotation, norms=norms)
        return held

    def pool(self, capacity_class: int) -> Pool:
        """A class's arrays as kernels take them."""
        keys, values, pool = self.keys[capacity_class], self.values[capacity_class], self._pools[capacity_class]
        assert keys is not None and values is not None, "view of a pool that was never reserved"
        if pool is None or pool.keys is not keys or pool.values is not values:
            pool = self._pools[capacity_class] = Pool(keys, values)
        return pool

    def adopt(self, capacity_class: int, pool: Pool) -> None:
        """Keep what an implementation that does not write in place has rebound."""
        self.keys[capacity_class], self.values[capacity_class] = pool.keys, pool.values

    def settle(self, capacity_class: int) -> None:
        """Call before a stock operation touches a class's arrays: kernels may have written them in this step."""
        pool = self._pools[capacity_class]
        if pool is not None:
            pool.settle()

    def writes(self) -> list[mx.array]:
        """What to evaluate so that every write of a kernel is queued."""
        return [pool.last for pool in self._pools if pool is not None and pool.last is not None]

    def pending(self) -> list[mx.array]:
        """What to evaluate so that every write is queued. Where a kernel wrote last, its output stands for the arrays:
        while a step holds these, the next stock write copies them.
        """
        found: list[mx.array] = []
        for keys, values, pool in zip(self.keys, self.values, self._pools, strict=True):
            if pool is not None and pool.last is not None:
                found.append(pool.last)
            else:
                found += [array for array in (keys, values) if array is not None]
        return found

    def reserve(self, capacity_class: int, num_rows: int) -> None:
        """Have at least `num_rows` rows in a class."""
        capacity = self.capacities[capacity_class]
        for pools, dim in ((self.keys, self.spec.key_dim), (self.values, self.spec.value_dim)):
            pool = pools[capacity_class]
            have = 0 if pool is None else pool.shape[0]
            if num_rows <= have:
                continue
            self.settle(capacity_class)
            more = min(max(GROW_TOKENS // capacity, 1), MAX_GROW_ROWS)
            rows = max(num_rows, have + more, have + have // 2) if have else num_rows
            fresh = mx.zeros((rows, self.spec.num_kv_heads, capacity, dim), self.dtype)
            if pool is not None:
                fresh[:have] = pool  # on a CPU half the time of joining two arrays: less fresh memory is touched
            pools[capacity_class] = fresh

    def trim(self, capacity_class: int, num_rows: int) -> None:
        """Keep the first `num_rows` rows of a class and give back the others' memory."""
        self.settle(capacity_class)
        for pools in (self.keys, self.values):
            pool = pools[capacity_class]
            if pool is None or pool.shape[0] <= num_rows:
                continue
            if num_rows:
                pools[capacity_class] = pool = mx.contiguous(pool[:num_rows])
                mx.eval(pool)  # one layer at a time: both copies of all would be the opposite of what is wanted
            else:
                pools[capacity_class] = None
        self._pools[capacity_class] = None

    def move(self, move: Move, length: int) -> None:
        """Carry a row's content over; `length` is the number of positions in use by the longer row."""
        self.settle(move.from_class)
        self.settle(move.to_class)
        for pools in (self.keys, self.values):
            source, target = pools[move.from_class], pools[move.to_class]
            assert source is not None and target is not None, "move between pools that do not exist"
            used = min(length, self.capacities[move.from_class])
            if move.from_class != move.to_class and used < length:
                # A ring that grows: its indices change with the capacity, so place each position anew.
                capacity = self.capacities[move.to_class]
                positions = mx.arange(length - used, length)
                rows = source[move.from_row][:, positions % used]
                target[move.to_row, :, positions % capacity] = rows
            elif move.is_swap:
                # Arrays are values: both rows are read from the pool as it is now.
                a = mx.contiguous(source[move.from_row, :, :used])
                b = mx.contiguous(target[move.to_row, :, :used])
                target[move.to_row, :, :used] = a
                target[move.from_row, :, :used] = b
            else:
                target[move.to_row, :, :used] = source[move.from_row, :, :used]
            pools[move.to_class] = target

    def scatter(self, capacity_class: int, rows: mx.array, indices: mx.array, k: mx.array, v: mx.array) -> None:
        """Write single positions: k and v (N, num_kv_heads, dim) to pool rows (N,) at indices (N,)."""
        self.settle(capacity_class)
        heads = mx.arange(self.spec.num_kv_heads)[None]
        for pools, new in ((self.keys, k), (self.values, v)):
            pool = pools[capacity_class]
            assert pool is not None, "write to a pool that was never reserved"
            pool[rows[:, None], heads, indices[:, None]] = new
            pools[capacity_class] = pool

    def rows(self, capacity_class: int, row: int, length: int) -> tuple[mx.array, mx.array]:
        """Keys and values of one pool row's first indices, each (num_kv_heads, length, dim)."""
        self.settle(capacity_class)
        keys, values = self.keys[capacity_class], self.values[capacity_class]
        assert keys is not None and values is not None, "a pool that was never reserved"
        return keys[row, :, :length], values[row, :, :length]

    def clear(self, capacity_class: int, row: int) -> None:
        """Zero a row: a masked NaN would still reach the next owner's output, as 0 * NaN."""
        self.settle(capacity_class)
        for pools in (self.keys, self.values):
            pool = pools[capacity_class]
            if pool is not None:
                pool[row] = mx.zeros(pool.shape[1:], pool.dtype)
                pools[capacity_class] = pool

    @property
    def row_bytes(self) -> int:
        """Of one position."""
        return self.spec.row_elements() * self.dtype.size

    def nbytes(self) -> int:
        return sum(p.nbytes for pools in (self.keys, self.values) for p in pools if p is not None)


class KVView:
    """One attention layer as the rows of one forward see it. Speaks our seam (`attend`) and mlx-lm's cache protocol."""

    def __init__(self, layer: KVLayer, shape: BatchShape) -> None:
        self._layer = layer
        self._shape = shape
        self.keys: mx.array | None = None  # what `update_and_fetch` returned; models may rebind it, the pools stay
        self.values: mx.array | None = None
        self.offset = shape.offset

    def attend(
        self,
        q: mx.array,
        k: mx.array | None,
        v: mx.array | None,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        rotation: Rotate | None = None,
        sees_spans: bool = False,
    ) -> mx.array:
        """Write k and v at the rows' positions and attend causally.

        Args:
            q: (B, num_heads, L, key_dim).
            k, v: (B, num_kv_heads, L, key_dim or value_dim); None: another layer wrote this layer's rows.
            window: the last `window` positions only; the layer's own by default.
            sinks: (num_heads,) attention sink logits.
            rotation: applied to q and k first; None where they are rotated already.
            sees_spans: the tokens of each of the batch's `spans` see each other.
        Returns:
            (B, num_heads, L, value_dim)
        """
        shape, layer = self._shape, self._layer
        window = window if window is not None else layer.spec.window
        spans = shape.spans if sees_spans else None
        if k is None or v is None:
            return self._attend_shared(q, scale, window, sinks, rotation, spans)
        use = None
        if layer.attention is not None and spans is None:  # kernels know no spans
            use = layer.attention.use(layer.spec, q, v, shape.width)
        is_fused = use is not None and use.is_decode and self._is_plain(rotation)
        if rotation is not None and not is_fused:
            q, k = rotated(q, rotation), rotated(k, rotation)
        if use is not None and use.is_decode:
            fused = rotation if is_fused and isinstance(rotation, Rotation) else None
            return self._attend_pages(use.attention, q, (k, v), Variant(scale, window, None, sinks, fused))
        if layer.attention is not None and spans is None and not shape.is_round:
            attention = layer.attention.tiles(layer.spec, q, v, shape.width)
            if attention is not None:
                return self._attend_tiles(attention, q, k, v, Variant(scale, window, None, sinks))
        if use is not None and shape.is_aligned:
            return self._attend_chunk(use.attention, q, k, v, scale, window, sinks)
        return self._attend_stock(q, (k, v), scale, window, sinks, spans)

    def attend_joined(
        self,
        qkv: mx.array,
        num_heads: int,
        scale: float,
        window: int | None = None,
        rotation: Rotate | None = None,
        norms: HeadNorms | None = None,
    ) -> mx.array | None:
        """`attend` for the rows of one product, where a kernel takes them as they lie; None, with nothing done, where
        none does. Prefill chunks of lengths that come again and again are better off with MLX's own operation.

        Args:
            qkv: (B, L, (num_heads + 2 * num_kv_heads) * dim).
            norms: of queries and keys, before they are rotated.
        Returns:
            (B, L, num_heads * dim)
        """
        shape, layer = self._shape, self._layer
        if layer.attention is None or not (rotation is None or self._is_plain(rotation)):
            return None
        in_tiles = shape.width > MAX_ROWS
        if in_tiles and shape.is_round:
            return None
        attention = layer.attention.joined(layer.spec, num_heads, qkv.dtype, shape.width, norms is not None)
        if attention is None:
            return None
        window = window if window is not None else layer.spec.window
        rotates = rotation if isinstance(rotation, Rotation) else None
        variant = layer.joined_variant(scale, window, rotates, norms)
        outputs = []
        for run in shape.runs:
            pool = layer.pool(run.capacity_class)
            rows = qkv if run.size == qkv.shape[0] else qkv[run.first : run.first + run.size]
            pages = self._pages(run)
            if in_tiles:
                tiles = self._tiles(run)
                outputs.append(attend_joined_in_tiles(attention, rows, num_heads, pool, pages, tiles, variant))
            else:
                outputs.append(attention.attend_joined(rows, num_heads, pool, pages, variant))
            layer.adopt(run.capacity_class, pool)
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _attend_shared(
        self,
        q: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
        rotation: Rotate | None,
        spans: Spans | None,
    ) -> mx.array:
        """To rows that another layer wrote in this forward."""
        shape, layer = self._shape, self._layer
        attention = None
        if layer.attention is not None and spans is None:  # kernels know no spans
            attention = layer.attention.shared(layer.spec, q, shape.width)
        is_fused = attention is not None and self._is_plain(rotation)
        if rotation is not None and not is_fused:
            q = rotated(q, rotation)
        if attention is None:
            return self._attend_stock(q, None, scale, window, sinks, spans)
        fused = rotation if is_fused and isinstance(rotation, Rotation) else None
        return self._attend_pages(attention, q, None, Variant(scale, window, None, sinks, fused))

    def _attend_stock(
        self,
        q: mx.array,
        new: tuple[mx.array, mx.array] | None,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
        spans: Spans | None,
    ) -> mx.array:
        """By MLX's own operation; `new` keys and values are written first."""
        shape = self._shape
        outputs = []
        for run in shape.runs:
            if new is not None:
                self._write(run, *new)
            else:
                self._layer.settle(run.capacity_class)
            keys, values = self._pools(run)
            queries = q if run.size == q.shape[0] else q[run.first : run.first + run.size]
            for row, size in pieces(run, shape):
                outputs.append(self._attend_rows(run, row, size, queries, keys, values, scale, window, sinks, spans))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _is_plain(self, rotation: Rotate | None) -> bool:
        """May a kernel do it, which rotates by the positions in the cache?"""
        if rotation is None:
            return True
        if not isinstance(rotation, Rotation) or not rotation.is_plain:
            return False
        offset, other = self._shape.offset, rotation.offset
        # Two arrays are not compared: reading them would wait for the device, in every layer.
        return other is offset or (isinstance(offset, int) and isinstance(other, int) and other == offset)

    def _attend_pages(
        self, attention: PagedAttention, q: mx.array, new: tuple[mx.array, mx.array] | None, variant: Variant
    ) -> mx.array:
        """Decode or verify rows through a kernel, a launch for each run; `new` keys and values are written first."""
        outputs = []
        for run in self._shape.runs:
            pool = self._layer.pool(run.capacity_class)
            rows = slice(run.first, run.first + run.size)
            queries = q if run.size == q.shape[0] else q[rows]
            if new is None:
                outputs.append(attention.attend_written(queries, pool, self._pages(run), variant))
                continue
            k, v = new if run.size == q.shape[0] else (new[0][rows], new[1][rows])
            outputs.append(attention.attend(queries, k, v, pool, self._pages(run), variant))
            self._layer.adopt(run.capacity_class, pool)
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _attend_tiles(
        self, attention: PagedAttention, q: mx.array, k: mx.array, v: mx.array, variant: Variant
    ) -> mx.array:
        """Prefill rows at any positions."""
        outputs = []
        for run in self._shape.runs:
            pool = self._layer.pool(run.capacity_class)
            rows = slice(run.first, run.first + run.size)
            of_run = (q, k, v) if run.size == q.shape[0] else (q[rows], k[rows], v[rows])
            outputs.append(attend_in_tiles(attention, of_run, pool, self._pages(run), self._tiles(run), variant))
            self._layer.adopt(run.capacity_class, pool)
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _attend_chunk(
        self,
        attention: PagedAttention,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Prefill chunks from one position: a kernel writes them and gathers what is before, a stock one attends."""
        run, start, width = self._shape.runs[0], self._shape.starts[0], self._shape.width
        old = start if window is None else min(start, window - 1)
        pool = self._layer.pool(run.capacity_class)
        keys, values = attention.append(k, v, pool, self._pages(run), old)
        self._layer.adopt(run.capacity_class, pool)
        mask: mx.array | str = "causal"
        if window is not None and old + width > window:
            mask = self._shape.chunk_mask(old, window, q.dtype)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)

    def write(self, k: mx.array, v: mx.array) -> None:
        """Only write the rows: k and v (B, num_kv_heads, L, dim)."""
        for run in self._shape.runs:
            self._write(run, k, v)

    def _attend_rows(
        self,
        run: Run,
        row: int,
        size: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
        spans: Spans | None,
    ) -> mx.array:
        """Attention of `size` rows from `row` (counted within the run)."""
        piece = Run(run.capacity_class, run.row + row, run.first + row, size)
        capacity = self._layer.capacities[run.capacity_class]
        length = self._shape.key_length(piece, capacity)
        rows = slice(piece.row, piece.row + size)
        q, k, v = (
            queries if size == run.size else queries[row : row + size],
            keys[rows, :, :length],
            values[rows, :, :length],
        )
        if self._shape.is_exact and cpu_attention.is_suited(q, k, v):
            bias = self._bias(piece, length, capacity, window, spans)
            return cpu_attention.attend(q, k, v, scale, bias, sinks)
        mask = self._mask(piece, length, capacity, window, spans)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    def _bias(self, run: Run, length: int, capacity: int, window: int | None, spans: Spans | None) -> mx.array | None:
        """The mask as a number that is added to the scores; None where all is seen."""
        if self._shape.width == 1 and self._mask(run, length, capacity, window, spans) is None:
            return None
        key = (run.first, run.size, length, capacity, window, spans is None)
        biases = self._shape.biases
        if key not in biases:
            mask = position_mask(self._shape, run, length, capacity, window, spans)
            biases[key] = mx.where(mask, 0.0, cpu_attention.MASKED)
        return biases[key]

    def _pages(self, run: Run) -> Pages:
        return self._shape.pages(run)

    def _tiles(self, run: Run) -> Pages:
        return self._shape.tiles(run)

    def _pools(self, run: Run) -> tuple[mx.array, mx.array]:
        keys, values = self._layer.keys[run.capacity_class], self._layer.values[run.capacity_class]
        assert keys is not None and values is not None, "view of a pool that was never reserved"
        return keys, values

    def _write(self, run: Run, k: mx.array, v: mx.array) -> None:
        shape, layer = self._shape, self._layer
        layer.settle(run.capacity_class)
        c, capacity = run.capacity_class, layer.capacities[run.capacity_class]
        starts = shape.starts[run.first : run.first + run.size]
        lo, hi = starts[0] % capacity, starts[0] % capacity + shape.width
        if min(starts) == max(starts) and hi <= capacity:
            rows = slice(run.row, run.row + run.size)
            for pools, new in ((layer.keys, k), (layer.values, v)):
                pool = pools[c]
                assert pool is not None, "write to a pool that was never reserved"
                pool[rows, :, lo:hi] = new if run.size == new.shape[0] else new[run.first : run.first + run.size]
                pools[c] = pool
            return
        if (c, capacity) not in shape.indices:
            positions = mx.array(starts)[:, None, None] + mx.arange(shape.width)
            heads = mx.arange(layer.spec.num_kv_heads)[None, :, None]
            rows_index = mx.arange(run.row, run.row + run.size)[:, None, None]
            shape.indices[c, capacity] = (rows_index, heads, positions % capacity)
        rows_index, heads, indices = shape.indices[c, capacity]
        if heads.shape[1] != layer.spec.num_kv_heads:
            heads = mx.arange(layer.spec.num_kv_heads)[None, :, None]
        for pools, new in ((layer.keys, k), (layer.values, v)):
            pool = pools[c]
            assert pool is not None, "write to a pool that was never reserved"
            pool[rows_index, heads, indices] = (
                new if run.size == new.shape[0] else new[run.first : run.first + run.size]
            )
            pools[c] = pool

    def _mask(
        self, run: Run, length: int, capacity: int, window: int | None, spans: Spans | None = None
    ) -> mx.array | str | None:
        """Which of the pool's first `length` indices each query sees; None: all of them, "causal": as MLX does."""
        shape = self._shape
        has_spans = spans is not None and any(spans[run.first : run.first + run.size])
        ends = shape.ends(run)
        is_windowed = window is not None and max(ends) > window
        if not is_windowed and not has_spans and min(ends) == max(ends) == length:
            return None if shape.width == 1 else "causal"
        key = (run.first, run.size, (length * 2**32 + capacity) * 2 + has_spans, window if is_windowed else None)
        if key not in shape.masks:
            mask = position_mask(
                shape, run, length, capacity, window if is_windowed else None, spans if has_spans else None
            )
            if not shape.is_exact:  # a GPU adds a mask faster than it selects by one (H100, 8 rows: 58 against 78 us)
                mask = mx.where(mask, mx.array(0.0, self._layer.dtype), mx.array(-mx.inf, self._layer.dtype))
            shape.masks[key] = mask
        return shape.masks[key]

    # ------------------------------------------------ mlx-lm's cache protocol

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Write k and v; return keys and values of all rows, (B, num_kv_heads, n, dim), padded to the longest row."""
        length = self._fetch_length()
        parts_k, parts_v = [], []
        for run in self._shape.runs:
            self._write(run, k, v)
            keys, values = self._pools(run)
            rows, n = slice(run.row, run.row + run.size), min(length, keys.shape[2])
            pad = [(0, 0), (0, 0), (0, length - n), (0, 0)]
            parts_k.append(keys[rows, :, :n] if n == length else mx.pad(keys[rows, :, :n], pad))
            parts_v.append(values[rows, :, :n] if n == length else mx.pad(values[rows, :, :n], pad))
        fetched_k = parts_k[0] if len(parts_k) == 1 else mx.concatenate(parts_k)
        fetched_v = parts_v[0] if len(parts_v) == 1 else mx.concatenate(parts_v)
        self.keys, self.values = fetched_k, fetched_v
        return fetched_k, fetched_v

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What this forward's `update_and_fetch` returned: layers that share another layer's keys read them here."""
        assert self.keys is not None, "shared keys were not written in this forward"
        assert self.values is not None, "keys without values"
        return self.keys, self.values

    def _fetch_length(self) -> int:
        shape = self._shape
        return max(shape.key_length(run, self._layer.capacities[run.capacity_class]) for run in shape.runs)

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """The mask for what `update_and_fetch` will return: boolean (B, 1, n, keys), "causal" or None."""
        shape, layer = self._shape, self._layer
        assert n == shape.width, f"mask for {n} tokens in a step of width {shape.width}"
        window = window_size if window_size is not None else layer.spec.window
        length = self._fetch_length()
        if len(shape.runs) == 1 and not return_array:
            return self._mask(shape.runs[0], length, layer.capacities[shape.runs[0].capacity_class], window)
        parts = [position_mask(shape, run, length, layer.capacities[run.capacity_class], window) for run in shape.runs]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)
