"""Matrix products and convolutions modulo 2^64, blocked for registers and caches; compiled, see `tacit.ring.kernels`.

Both are one loop. A *panel* is a block of at most 1,024 rows and 32 columns of the right operand (for a convolution, of
the matrix whose columns are the input's windows), copied together so that a row of it is four vectors of 8 words. The
*tile* of 5 rows of the left operand times one panel stays in 20 vector registers for the whole sum; it is written as
vectors in LLVM's language, since nothing in a plain loop would keep it there.

Source: Goto and van de Geijn, Anatomy of high-performance matrix multiplication, ACM TOMS 34(3), 2008.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from tacit.ring.kernels import compiled, written_in_llvm

LANES = 8
ROWS = 5
VECTORS = 4
COLUMNS = LANES * VECTORS
DEPTH = 1024

Words = NDArray[np.int64]
_WORD = ir.IntType(64)
_VECTOR = ir.VectorType(_WORD, LANES)


def _vector_at(builder: Any, address: Any, words: Any) -> Any:
    pointer = builder.inttoptr(address, _WORD.as_pointer())
    return builder.bitcast(builder.gep(pointer, [words]), _VECTOR.as_pointer())


@written_in_llvm
def _copy_vector(typing: Any, target: Any, source: Any) -> Any:
    """Copy 8 words from address to address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(_WORD, 0)
        builder.store(builder.load(_vector_at(builder, args[1], zero), align=8), _vector_at(builder, args[0], zero), 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@written_in_llvm
def _tile(typing: Any, depth: Any, a0: Any, a1: Any, a2: Any, a3: Any, a4: Any, panel: Any, tile: Any) -> Any:
    """The products of 5 rows, given by their addresses, with a panel of ``depth`` > 0 rows, stored at ``tile``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        depth, *rows, panel, tile = args
        zero, one = ir.Constant(_WORD, 0), ir.Constant(_WORD, 1)
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        before = builder.block
        loop, after = builder.append_basic_block("depth"), builder.append_basic_block("store")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_WORD)
        k.add_incoming(zero, before)
        sums = [[builder.phi(_VECTOR) for _ in range(VECTORS)] for _ in range(ROWS)]
        offset = builder.mul(k, ir.Constant(_WORD, COLUMNS))
        right = [
            builder.load(_vector_at(builder, panel, builder.add(offset, ir.Constant(_WORD, LANES * v))), align=8)
            for v in range(VECTORS)
        ]
        for row, address in zip(sums, rows, strict=True):
            word = builder.load(builder.gep(builder.inttoptr(address, _WORD.as_pointer()), [k]))
            lane = builder.insert_element(undefined, word, ir.Constant(ir.IntType(32), 0))
            left = builder.shuffle_vector(lane, undefined, first_lane)
            for v, total in enumerate(row):
                total.add_incoming(ir.Constant(_VECTOR, [0] * LANES), before)
                row[v] = builder.add(total, builder.mul(left, right[v]))
                total.add_incoming(row[v], loop)
        following = builder.add(k, one)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for r, row in enumerate(sums):
            for v, total in enumerate(row):
                builder.store(total, _vector_at(builder, tile, ir.Constant(_WORD, COLUMNS * r + LANES * v)), 8)
        return context.get_dummy_value()

    return types.void(*[types.intp] * (ROWS + 3)), generate


@compiled
def _copy(target: int, source: int, words: int) -> None:
    """Copy ``words`` words, a multiple of 8, from address to address."""
    for start in range(0, 8 * words, 8 * LANES):
        _copy_vector(target + start, source + start)


@compiled
def _rows(left: int, height: int, width: int, first: int, depth: int, panel: Words, tile: Words) -> None:
    """``tile`` = rows ``first`` to ``first + 4`` of the matrix at address ``left``, ``depth`` columns of it, times the
    panel. Rows beyond the last are the last again, and their products are not used."""
    last, row = height - 1, 8 * width
    _tile(
        depth,
        left + row * first,
        left + row * min(first + 1, last),
        left + row * min(first + 2, last),
        left + row * min(first + 3, last),
        left + row * min(first + 4, last),
        panel.ctypes.data,
        tile.ctypes.data,
    )


@compiled
def _store(tile: Words, rows: int, begin: int, count: int, out: Words, place: int, row: int, add: bool) -> None:
    """``count`` columns of the tile from ``begin`` on go to the words ``out[place:]``, a row of which is ``row``."""
    vectors = 0 if add else count // LANES * LANES
    for r in range(rows):
        target, source = place + r * row, r * COLUMNS + begin
        _copy(out.ctypes.data + 8 * target, tile.ctypes.data + 8 * source, vectors)
        if add:
            for c in range(count):
                out[target + c] += tile[source + c]
        else:
            for c in range(vectors, count):
                out[target + c] = tile[source + c]


@compiled
def _pack(right: Words, transposed: bool, place: int, row: int, depth: int, columns: int, panel: Words) -> None:
    """``depth`` rows and ``columns`` columns of a matrix in ``right[place:]``, of which a row (if transposed, a column)
    is ``row`` words, become the panel."""
    if transposed:
        for start in range(0, depth, COLUMNS):
            for c in range(columns):
                source = place + c * row
                for k in range(start, min(depth, start + COLUMNS)):
                    panel[k * COLUMNS + c] = right[source + k]
        return
    vectors = columns // LANES * LANES
    for k in range(depth):
        target, source = k * COLUMNS, place + k * row
        _copy(panel.ctypes.data + 8 * target, right.ctypes.data + 8 * source, vectors)
        for c in range(vectors, columns):
            panel[target + c] = right[source + c]


@compiled
def matmul(left: Words, right: Words, out: Words, sizes: tuple[int, int, int, int], transposed: bool) -> None:
    """``out = left @ right`` for ``sizes`` (b, m, k, n), the three as flat words, k > 0; ``right`` holds (b, k, n), or
    (b, n, k) if transposed."""
    batch, height, depth, width = sizes
    panel = np.zeros(min(depth, DEPTH) * COLUMNS, np.int64)
    tile = np.empty(ROWS * COLUMNS, np.int64)
    for b in range(batch):
        for column in range(0, width, COLUMNS):
            columns = min(COLUMNS, width - column)
            for start in range(0, depth, DEPTH):
                count = min(DEPTH, depth - start)
                if transposed:
                    _pack(right, True, (b * width + column) * depth + start, depth, count, columns, panel)
                else:
                    _pack(right, False, (b * depth + start) * width + column, width, count, columns, panel)
                address = left.ctypes.data + 8 * (b * height * depth + start)
                for first in range(0, height, ROWS):
                    _rows(address, height, depth, first, count, panel, tile)
                    place = (b * height + first) * width + column
                    _store(tile, min(ROWS, height - first), 0, columns, out, place, width, start > 0)


@compiled
def few_rows(left: Words, right: Words, out: Words, transposed: bool) -> None:
    """``out = left @ right`` for a few rows of ``left``, reading ``right``, which is (k, n), or (n, k) if transposed,
    once a row; all contiguous."""
    for m in range(left.shape[0]):
        row, result = left[m], out[m]
        if transposed:
            for n in range(result.size):
                source, total = right[n], np.int64(0)
                for k in range(row.size):
                    total += row[k] * source[k]
                result[n] = total
        else:
            result[:] = 0
            for k in range(row.size):
                factor, source = row[k], right[k]
                for n in range(result.size):
                    result[n] += factor * source[n]


@compiled
def _offsets(channels: int, size: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]) -> Words:
    """Where the words of a window lie in an image, from its first one."""
    result = np.empty(channels * kernel[0] * kernel[1], np.int64)
    k = 0
    for channel in range(channels):
        for y in range(kernel[0]):
            for x in range(kernel[1]):
                result[k] = (channel * size[0] + y * dilation[0]) * size[1] + x * dilation[1]
                k += 1
    return result


@compiled
def conv2d(
    images: Words, weight: Words, out: Words, shape: tuple[int, int, int, int], result: tuple[int, int, int],
    groups: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    """Convolve padded images of ``shape`` (n, c, h, w) with a weight to an ``out`` of (n, *``result``), all three as
    flat words."""
    count, channels = shape[0], shape[1] // groups
    height, width = result[0] // groups, result[2]
    area = result[1] * width
    offsets = _offsets(channels, shape[2:], kernel, dilation)
    depth = offsets.size
    panel = np.zeros(min(depth, DEPTH) * COLUMNS, np.int64)
    tile = np.empty(ROWS * COLUMNS, np.int64)
    for g in range(groups):
        for column in range(0, count * area, COLUMNS):
            columns = min(COLUMNS, count * area - column)
            for start in range(0, depth, DEPTH):
                rows = min(DEPTH, depth - start)
                done = 0
                while done < columns:
                    # The windows of one line of one image lie side by side.
                    n, place = divmod(column + done, area)
                    line, begin = divmod(place, width)
                    run = min(columns - done, width - begin)
                    corner = (n * shape[1] + g * channels) * shape[2] * shape[3]
                    corner += line * stride[0] * shape[3] + begin * stride[1]
                    vectors = run // LANES * LANES if stride[1] == 1 else 0
                    for k in range(rows):
                        target, source = k * COLUMNS + done, corner + offsets[start + k]
                        _copy(panel.ctypes.data + 8 * target, images.ctypes.data + 8 * source, vectors)
                        for c in range(vectors, run):
                            panel[target + c] = images[source + c * stride[1]]
                    done += run
                address = weight.ctypes.data + 8 * (g * height * depth + start)
                for first in range(0, height, ROWS):
                    _rows(address, height, depth, first, rows, panel, tile)
                    done = 0
                    while done < columns:
                        n, place = divmod(column + done, area)
                        run = min(columns - done, area - place)
                        place += (n * result[0] + g * height + first) * area
                        _store(tile, min(ROWS, height - first), done, run, out, place, area, start > 0)
                        done += run
