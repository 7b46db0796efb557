"""Products of a few rows with a large matrix, and what stands between them; compiled, see `tacit.ring.kernels`.

A step of local training multiplies a batch of ten or so rows with weight matrices that fit the second-level cache. Each
loop here reads the matrix once: a *tile* of 5 rows and 4 vectors of sums stays in 20 vector registers while it passes.
Tiles are written as vectors in LLVM's language, since a plain loop would spill them; on processors with shorter vectors
they become several instructions each. Matrices are float32, row-major and contiguous, and given by their addresses.

The plain forms that they equal to rounding are torch's own operators, which run where numba is missing. A loop does not
look where memory ends: its caller, `tacit.federated.local.step_program`, knows the shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]

from tacit.ring.kernels import compiled, written_in_llvm

ROWS = 5
VECTORS = 4
LANES = 16
COLUMNS = LANES * VECTORS
HALF = 8
BYTES = 4
IGNORED = -100
"""The target that torch's cross-entropy leaves out."""

_INDEX = ir.IntType(64)
_FLOAT = ir.FloatType()
_FAST = ("contract", "reassoc", "nsz")


def _float_at(builder: Any, address: Any, number: Any) -> Any:
    return builder.gep(builder.inttoptr(address, _FLOAT.as_pointer()), [number])


def _vector_at(builder: Any, address: Any, number: Any, lanes: int) -> Any:
    return builder.bitcast(_float_at(builder, address, number), ir.VectorType(_FLOAT, lanes).as_pointer())


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FAST), c, flags=_FAST)


def _outer(vectors: int, lanes: int) -> Any:
    """A tile of a sum of outer products, for `_outer_products`."""

    def tile(
        typing: Any, depth: Any, scale: Any, left: Any, r0: Any, r1: Any, r2: Any, r3: Any, r4: Any, left_step: Any,
        right: Any, right_step: Any, c0: Any, c1: Any, c2: Any, c3: Any, c4: Any, add: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            depth, scale, left, *rest = args
            columns, (left_step, right, right_step), targets, add = rest[:5], rest[5:8], rest[8:13], rest[13]
            zero, one = ir.Constant(_INDEX, 0), ir.Constant(_INDEX, 1)
            vector = ir.VectorType(_FLOAT, lanes)
            places = [ir.Constant(_INDEX, lanes * v) for v in range(vectors)]
            lane_zero = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            before = builder.block
            loop, after = builder.append_basic_block("depth"), builder.append_basic_block("store")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(_INDEX)
            k.add_incoming(zero, before)
            sums = [[builder.phi(vector) for _ in places] for _ in targets]
            rows = builder.add(right, builder.mul(k, right_step))
            loaded = [builder.load(_vector_at(builder, rows, place, lanes), align=BYTES) for place in places]
            factors = builder.add(left, builder.mul(k, left_step))
            for row, column in zip(sums, columns, strict=True):
                factor = builder.load(_float_at(builder, factors, column))
                one_lane = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), factor, ir.Constant(ir.IntType(32), 0)
                )
                spread = builder.shuffle_vector(one_lane, ir.Constant(vector, ir.Undefined), lane_zero)
                for v, total in enumerate(row):
                    total.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
                    row[v] = _fma(builder, spread, loaded[v], total)
                    total.add_incoming(row[v], loop)
            following = builder.add(k, one)
            k.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            builder.position_at_end(after)
            one_lane = builder.insert_element(ir.Constant(vector, ir.Undefined), scale, ir.Constant(ir.IntType(32), 0))
            spread = builder.shuffle_vector(one_lane, ir.Constant(vector, ir.Undefined), lane_zero)
            plain, adding, done = (builder.append_basic_block(name) for name in ("plain", "adding", "done"))
            builder.cbranch(builder.icmp_signed("!=", add, zero), adding, plain)
            builder.position_at_end(plain)
            for row, target in zip(sums, targets, strict=True):
                for total, place in zip(row, places, strict=True):
                    builder.store(total, _vector_at(builder, target, place, lanes), align=BYTES)
            builder.branch(done)
            builder.position_at_end(adding)
            for row, target in zip(sums, targets, strict=True):
                pointers = [_vector_at(builder, target, place, lanes) for place in places]
                values = [builder.load(pointer, align=BYTES) for pointer in pointers]
                for total, value, pointer in zip(row, values, pointers, strict=True):
                    builder.store(_fma(builder, spread, total, value), pointer, align=BYTES)
            builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        numbers = [types.intp] * 6 + [types.intp] * 3 + [types.intp] * 6
        return types.void(types.intp, types.float32, *numbers), generate

    return written_in_llvm(tile)


@written_in_llvm
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


_outer_block, _outer_vector, _outer_half, _outer_one = (
    _outer(VECTORS, LANES),
    _outer(1, LANES),
    _outer(1, HALF),
    _outer(1, 1),
)


@compiled
def _outer_products(
    left: int, left_row: int, left_step: int, right: int, out: int, height: int, depth: int, width: int, scale: float,
    add: bool,
) -> None:  # fmt: skip
    """``out`` (height, width) = [out + scale ·] Σ_k left[r, k] right[k, :]; ``left``'s rows lie ``left_row`` floats and
    its columns ``left_step`` floats apart."""
    factor, adding, row, last = np.float32(scale), int(add), BYTES * width, height - 1
    spare = np.zeros(COLUMNS, np.float32)
    nowhere = spare.ctypes.data
    for first in range(0, height, ROWS):
        # Rows beyond the last are the last again, and go nowhere.
        r1, r2, r3, r4 = min(first + 1, last), min(first + 2, last), min(first + 3, last), min(first + 4, last)
        column = 0
        while column < width:
            at = out + BYTES * column + row * first
            source = right + BYTES * column
            args = (
                depth, factor, left, first * left_row, r1 * left_row, r2 * left_row, r3 * left_row, r4 * left_row,
                BYTES * left_step, source, row, at,
                at + row if first + 1 <= last else nowhere,
                at + 2 * row if first + 2 <= last else nowhere,
                at + 3 * row if first + 3 <= last else nowhere,
                at + 4 * row if first + 4 <= last else nowhere,
                adding,
            )  # fmt: skip
            if column + COLUMNS <= width:
                _outer_block(*args)
                column += COLUMNS
            elif column + LANES <= width:
                _outer_vector(*args)
                column += LANES
            elif column + HALF <= width:
                _outer_half(*args)
                column += HALF
            else:
                _outer_one(*args)
                column += 1


def _inner(lanes: int) -> Any:
    """A tile of inner products: 5 rows of the left with 4 rows of the right matrix, added to the 20 sums."""

    def tile(
        typing: Any, vectors: Any, l0: Any, l1: Any, l2: Any, l3: Any, l4: Any, r0: Any, r1: Any, r2: Any, r3: Any,
        sums: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vectors, lefts, rights, target = args[0], args[1:6], args[6:10], args[10]
            zero, one = ir.Constant(_INDEX, 0), ir.Constant(_INDEX, 1)
            vector = ir.VectorType(_FLOAT, lanes)
            before = builder.block
            loop, after = builder.append_basic_block("depth"), builder.append_basic_block("store")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(_INDEX)
            k.add_incoming(zero, before)
            sums = [[builder.phi(vector) for _ in rights] for _ in lefts]
            place = builder.mul(k, ir.Constant(_INDEX, lanes))
            right = [builder.load(_vector_at(builder, address, place, lanes), align=BYTES) for address in rights]
            for row, address in zip(sums, lefts, strict=True):
                left = builder.load(_vector_at(builder, address, place, lanes), align=BYTES)
                for n, total in enumerate(row):
                    total.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
                    row[n] = _fma(builder, left, right[n], total)
                    total.add_incoming(row[n], loop)
            following = builder.add(k, one)
            k.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, vectors), loop, after)
            builder.position_at_end(after)
            for number, total in enumerate(total for row in sums for total in row):
                pointer = _float_at(builder, target, ir.Constant(_INDEX, number))
                builder.store(builder.fadd(builder.load(pointer), _across(builder, total, lanes)), pointer)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), generate

    return written_in_llvm(tile)


def _across(builder: Any, total: Any, lanes: int) -> Any:
    """The sum of a vector's lanes."""
    while lanes > 1:
        lanes //= 2
        nothing = ir.Constant(total.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(total, nothing, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(part)))
            for part in (range(lanes), range(lanes, 2 * lanes))
        ]
        total = builder.fadd(*halves, flags=_FAST)
    return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))


_inner_vectors, _inner_halves, _inner_ones = _inner(LANES), _inner(HALF), _inner(1)


@compiled
def _sums(x: int, weight: int, sums: int, row: int, m: int, rows: int, n: int, width: int, depth: int) -> None:
    """The 20 inner products of rows from ``m`` of ``x`` with rows from ``n`` of ``weight``, all of ``row`` bytes. Rows
    beyond the last are the last again."""
    x0, x1, x2 = x + row * m, x + row * min(m + 1, rows - 1), x + row * min(m + 2, rows - 1)
    x3, x4 = x + row * min(m + 3, rows - 1), x + row * min(m + 4, rows - 1)
    w0, w1 = weight + row * n, weight + row * min(n + 1, width - 1)
    w2, w3 = weight + row * min(n + 2, width - 1), weight + row * min(n + 3, width - 1)
    if depth >= LANES:
        _inner_vectors(depth // LANES, x0, x1, x2, x3, x4, w0, w1, w2, w3, sums)
    done = BYTES * (depth - depth % LANES)
    if depth % LANES >= HALF:
        _inner_halves(
            1, x0 + done, x1 + done, x2 + done, x3 + done, x4 + done, w0 + done, w1 + done, w2 + done, w3 + done, sums
        )
        done += BYTES * HALF
    if depth % HALF:
        _inner_ones(
            depth % HALF, x0 + done, x1 + done, x2 + done, x3 + done, x4 + done, w0 + done, w1 + done, w2 + done,
            w3 + done, sums,
        )  # fmt: skip


@compiled
def linear(x: int, weight: int, bias: int, out: int, rows: int, depth: int, width: int, relu: bool) -> None:
    """``out = x @ weight.T + bias``, and ReLU of it: ``x`` (rows, depth), ``weight`` (width, depth); no bias at 0."""
    sums = np.empty(ROWS * VECTORS, np.float32)
    result = carray(_pointer(out), (rows, width), np.float32)
    for n in range(0, width, VECTORS):
        for m in range(0, rows, ROWS):
            sums[:] = 0
            _sums(x, weight, sums.ctypes.data, BYTES * depth, m, rows, n, width, depth)
            for i in range(min(ROWS, rows - m)):
                for j in range(min(VECTORS, width - n)):
                    result[m + i, n + j] = sums[VECTORS * i + j]
    if bias:
        biases = carray(_pointer(bias), width, np.float32)
        for m in range(rows):
            for n in range(width):
                result[m, n] += biases[n]
    if relu:
        for m in range(rows):
            for n in range(width):
                # Not max(): what is not a number has to stay so.
                result[m, n] = np.float32(0) if result[m, n] < 0 else result[m, n]


@compiled
def update(gradient: int, x: int, weight: int, rows: int, width: int, depth: int, rate: float) -> None:
    """``weight -= rate · gradient.T @ x``: ``gradient`` (rows, width), ``x`` (rows, depth), ``weight`` (width,
    depth)."""
    _outer_products(gradient, 1, width, x, weight, width, rows, depth, -rate, True)


@compiled
def update_bias(gradient: int, bias: int, rows: int, width: int, rate: float) -> None:
    """``bias -= rate · gradient.sum(0)``: ``gradient`` (rows, width), ``bias`` (width,)."""
    gradients, biases = carray(_pointer(gradient), (rows, width), np.float32), carray(_pointer(bias), width, np.float32)
    factor = np.float32(rate)
    sums = np.zeros(width, np.float32)
    for m in range(rows):
        for n in range(width):
            sums[n] += gradients[m, n]
    for n in range(width):
        biases[n] -= factor * sums[n]


@compiled
def multiply(left: int, right: int, out: int, rows: int, depth: int, width: int) -> None:
    """``out = left @ right``: ``left`` (rows, depth), ``right`` (depth, width)."""
    _outer_products(left, depth, 1, right, out, rows, depth, width, 1.0, False)


@compiled
def relu_gradient(gradient: int, value: int, out: int, count: int) -> None:
    """``out = gradient`` where ``value``, ReLU's result, is above 0, and 0 elsewhere; ``count`` numbers each."""
    gradients, values = carray(_pointer(gradient), count, np.float32), carray(_pointer(value), count, np.float32)
    result = carray(_pointer(out), count, np.float32)
    for i in range(count):
        result[i] = np.float32(0) if values[i] <= 0 else gradients[i]


@compiled
def cross_entropy(logits: int, targets: int, loss: int, gradient: int, rows: int, classes: int) -> bool:
    """The mean over rows of -log softmax(logits)[target], and its gradient by the logits.

    ``logits`` and ``gradient`` (rows, classes), ``targets`` int64 (rows,); a row of target -100 counts for nothing.
    Answers whether a target is neither a class nor -100, and then writes nothing.
    """
    values = carray(_pointer(logits), (rows, classes), np.float32)
    result = carray(_pointer(gradient), (rows, classes), np.float32)
    labels, mean = carray(_pointer(targets), rows, np.int64), carray(_pointer(loss), 1, np.float32)
    counted = 0
    for m in range(rows):
        if labels[m] != IGNORED:
            counted += 1
            if not 0 <= labels[m] < classes:
                return True
    total = 0.0
    for m in range(rows):
        if labels[m] == IGNORED:
            result[m] = 0
            continue
        largest = values[m, 0]
        for c in range(1, classes):
            largest = max(largest, values[m, c])
        exponentials = np.float32(0)
        for c in range(classes):
            result[m, c] = np.exp(values[m, c] - largest)
            exponentials += result[m, c]
        for c in range(classes):
            result[m, c] /= exponentials * np.float32(counted)
        result[m, labels[m]] -= np.float32(1) / np.float32(counted)
        total += np.log(exponentials) - (values[m, labels[m]] - largest)
    mean[0] = np.float32(total / counted)
    return False
