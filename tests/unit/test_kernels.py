"""The compiled loops against their definitions in torch: equal word for word, for every form they take."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import Recorder, prg, seeds, shared, trio, words
from tacit.errors import InputError
from tacit.mpc import pairs, phases
from tacit.mpc.all_pairs import PairwiseMask, largest, winner
from tacit.mpc.correlation import Correlation, Provider
from tacit.mpc.lockstep import both
from tacit.mpc.sign import Mask, Window, combiner, maximum, nonnegative, relu, truncate
from tacit.ring import kernels
from tacit.ring.kernels import products

SHAPES = [(), (1,), (7,), (511,), (513,), (3, 7, 50), (0,), (4, 0)]
DROPS = [1, 7, 8, 9, 16, 17, 32, 33, 61, 62]


def absent(name: str) -> None:
    """What `load` says where numba is missing."""


def in_torch(function: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "load", absent)
        patch.setattr(products, "load", absent)
        return function()


def agree(function: Callable[[], Any]) -> Any:
    """Check that both forms of a function give the same, and give it."""
    compiled, plain = function(), in_torch(function)
    left, right = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (compiled, plain))
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert torch.equal(x, y)
    return compiled


def narrow(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    dtype = Mask((1,), bits).fields["mu"].dtype
    return words(seed, shape).to(dtype)


def test_the_loops_are_there_to_be_tested() -> None:
    assert kernels.load("tacit.mpc.kernels") is not None
    assert kernels.load("tacit.ring.kernels.gemm") is not None


class TestPhases:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("alice", [True, False])
    def test_masking(self, shape: tuple[int, ...], alice: bool) -> None:
        agree(partial(phases.mask, words(1, shape), words(2, shape), alice))

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("alice", [True, False])
    def test_comparing(self, shape: tuple[int, ...], chunks: int, alice: bool) -> None:
        opened, m, levels = words(1, shape), words(2, shape), words(3, (chunks, *shape))
        for lowest in (0, 16, 62 - 6 * chunks):
            agree(partial(phases.compare, opened, levels, m, lowest, chunks, alice))

    @pytest.mark.parametrize("chunks", [2, 3, 4, 5])
    @pytest.mark.parametrize("alice", [True, False])
    def test_resolving_every_byte(self, chunks: int, alice: bool) -> None:
        tables = combiner(chunks)
        byte = torch.arange(1 << tables.width, dtype=torch.uint8).repeat(5)
        m, rest = words(1, tuple(byte.shape)), prg().bits(tuple(byte.shape))
        agree(partial(phases.resolve, byte, rest, m, tables.coefficients, tables.constant, alice))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_hiding_under_the_selector(self, shape: tuple[int, ...]) -> None:
        d = agree(partial(phases.under_selector, prg().bits(shape), words(1, shape)))
        assert d.dtype == torch.bool

    @pytest.mark.parametrize("drop", DROPS)
    @pytest.mark.parametrize("alice", [True, False])
    def test_truncating_and_selecting(self, drop: int, alice: bool) -> None:
        shape = (3, 171)
        opened, rho, s, s_rho = (words(seed, shape) for seed in range(4))
        mu, s_mu = narrow(drop, shape, 5), narrow(drop, shape, 6)
        d = prg().bits(shape).bool()
        agree(partial(phases.truncated, opened, rho, mu, drop, alice))
        agree(partial(phases.selected, d, opened, (rho, mu, s, s_rho, s_mu), drop, alice))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_selecting_whole(self, shape: tuple[int, ...]) -> None:
        opened, value, s, s_rho = (words(seed, shape) for seed in range(4))
        agree(partial(phases.selected_whole, prg().bits(shape).bool(), opened, value, (s, s_rho)))
        mu = narrow(16, shape, 5)
        agree(partial(phases.selected, prg().bits(shape).bool(), opened, (value, mu, s, s_rho, mu), 16, True))

    def test_views_that_are_not_contiguous(self) -> None:
        opened, m, r, value = (words(seed, (30, 41)).T[::2] for seed in range(4))
        levels, mu = words(5, (41, 30, 5)).permute(2, 0, 1)[:, ::2], narrow(16, (30, 41), 6).T[::2]
        bits = prg().bits((30, 41)).T[::2]
        assert not any(view.is_contiguous() for view in (opened, levels, mu, bits))
        agree(partial(phases.mask, value, r, True))
        byte, rest = agree(partial(phases.compare, opened, levels, m, 16, 5, True))
        tables = combiner(5)
        agree(partial(phases.resolve, byte, bits, m, tables.coefficients, tables.constant, True))
        agree(partial(phases.under_selector, bits, m))
        agree(partial(phases.truncated, opened, r, mu, 16, True))
        agree(partial(phases.selected, bits.bool(), opened, (value, mu, m, r, mu), 16, False))
        agree(partial(phases.selected_whole, bits.bool(), opened, value, (m, r)))
        assert rest.is_contiguous()

    def test_shapes_that_differ_are_refused_and_not_read_past(self) -> None:
        long, short = words(0, (2, 600)), words(1, (2, 300))
        with pytest.raises(InputError, match="differ in shape"):
            phases.mask(long, short, True)
        with pytest.raises(InputError, match="differ in shape"):
            phases.compare(long, words(2, (5, 2, 300)), long, 0, 5, True)
        with pytest.raises(InputError, match="5 chunks"):
            phases.compare(long, words(2, (4, 2, 600)), long, 0, 5, True)


class TestDealing:
    def corrections(self, mask: Correlation, seed: int) -> list[Tensor]:
        _, dealt = Provider(prg(seed), prg(seed + 1), prg(seed + 2)).deal(mask)
        names = [name for name, field in mask.fields.items() if field.dealt]
        assert dealt.keys() == set(names)
        return [dealt[name] for name in names]

    @pytest.mark.parametrize("drop", [0, *DROPS])
    @pytest.mark.parametrize("chunks", [0, 1, 2, 3, 4, 5])
    def test_of_masks(self, drop: int, chunks: int) -> None:
        window = Window(62 - 6 * chunks if drop > 32 else drop // 2, chunks) if chunks else None
        for select in (False, True) if window else (False,):
            agree(partial(self.corrections, Mask((37, 29), drop, window, select), drop))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_every_shape(self, shape: tuple[int, ...]) -> None:
        agree(partial(self.corrections, Mask(shape, 16, Window(16), select=True), 3))
        agree(partial(self.corrections, Mask(shape, 0, Window(0), select=True), 4))

    @pytest.mark.parametrize("drop", [0, 16])
    @pytest.mark.parametrize("shape", [(2, 7), (3, 5, 200), (4, 0)])
    @pytest.mark.parametrize("rectify", [True, False])
    def test_of_pairs(self, drop: int, shape: tuple[int, ...], rectify: bool) -> None:
        for chunks in (1, 5):
            agree(partial(self.corrections, PairwiseMask(shape, drop, drop, chunks, rectify), 5))


class TestPairs:
    @pytest.mark.parametrize("count", [2, 3, 4])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rectify", [True, False])
    def test_comparing(self, count: int, shape: tuple[int, ...], rectify: bool) -> None:
        opened, m = words(1, (count, *shape)), words(2, (len(pairs.pairs_of(count, rectify)), *shape))
        for chunks, lowest, alice in ((1, 0, True), (5, 16, True), (5, 32, False)):
            levels = words(3, (chunks, *m.shape))
            agree(partial(pairs.compare_pairs, opened, levels, m, rectify, lowest, chunks, alice))

    @pytest.mark.parametrize(("count", "rectify"), [(2, False), (3, True), (4, False), (4, True)])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_winning(self, count: int, rectify: bool, shape: tuple[int, ...]) -> None:
        tables, h = winner(count, rectify), words(1, shape)
        bits = prg().bits((len(pairs.pairs_of(count, rectify)), *shape))
        seen = agree(partial(pairs.under_masks, bits, h, 0))
        assert seen.dtype == torch.bool
        for alice in (True, False):
            won = agree(partial(pairs.winners, seen, h, tables.coefficients, tables.constant, alice))
            agree(partial(pairs.under_masks, won, h, 63 - count))

    def test_shapes_that_do_not_fit_are_refused_and_not_read_past(self) -> None:
        opened, h, tables = words(0, (4, 600)), words(1, (600,)), winner(4, True)
        with pytest.raises(InputError, match="10 pairs"):
            pairs.compare_pairs(opened, words(2, (5, 10, 600)), words(3, (6, 600)), True, 0, 5, True)
        with pytest.raises(InputError, match="10 pairs"):
            pairs.compare_pairs(opened, words(2, (4, 10, 600)), words(3, (10, 600)), True, 0, 5, True)
        with pytest.raises(InputError, match="do not have masks"):
            pairs.under_masks(prg().bits((10, 300)), h, 0)
        with pytest.raises(InputError, match="do not have masks"):
            pairs.winners(prg().bits((10, 300)).bool(), h, tables.coefficients, tables.constant, True)
        with pytest.raises(InputError, match="6 pairs"):
            pairs.winners(prg().bits((6, 600)).bool(), h, tables.coefficients, tables.constant, True)


class TestProtocols:
    @pytest.mark.parametrize(
        ("protocol", "options"), [(relu, {}), (relu, {"scale": 24, "chunks": 3}), (nonnegative, {}), (truncate, {})]
    )
    def test_the_same_messages_and_results(self, protocol: Any, options: dict[str, int]) -> None:
        def transcript() -> list[Tensor]:
            tap = Recorder()
            results = both(trio(7, tap), protocol, shared(words(8, (9, 113), 2**44), 32), **options)
            sent = [value for messages in tap.sent.values() for message in messages for value in message]
            return [*sent, *(result.words for result in results)]

        agree(transcript)

    def test_the_same_maximum(self) -> None:
        def transcript() -> list[Tensor]:
            pairs = (shared(words(seed, (600,), 2**28), 16, seed) for seed in range(2))
            return [result.words for result in both(trio(7), maximum, *pairs)]

        agree(transcript)

    @pytest.mark.parametrize("rectify", [True, False])
    def test_the_same_largest(self, rectify: bool) -> None:
        def transcript() -> list[Tensor]:
            tap = Recorder()
            values = shared(words(8, (4, 2, 113), 2**44), 32)
            results = both(trio(7, tap), largest, values, rectify=rectify, scale=16)
            sent = [value for messages in tap.sent.values() for message in messages for value in message]
            return [*sent, *(result.words for result in results)]

        agree(transcript)

    def test_a_selection_without_a_comparison_is_refused(self) -> None:
        with pytest.raises(InputError, match="needs a comparison window"):
            Mask((3,), 16, select=True)


class TestMatMul:
    @pytest.mark.parametrize(
        ("left", "right"),
        [
            ((1, 1), (1, 1)),
            ((1, 800), (800, 33)),
            ((4, 31), (31, 7)),
            ((5, 31), (31, 32)),
            ((6, 2100), (2100, 65)),
            ((128, 30), (30, 10)),
            ((2, 3, 9, 5), (5, 8)),
            ((2, 3, 9, 5), (3, 5, 40)),
            ((9, 5), (2, 3, 5, 4)),
            ((2, 1, 2, 5), (3, 5, 4)),
            ((3, 0), (0, 4)),
            ((0, 3), (3, 4)),
            ((7,), (7,)),
            ((7,), (7, 3)),
            ((9, 7), (7,)),
        ],
    )
    def test_shapes(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        a, b = words(1, left), words(2, right)
        assert torch.equal(products.matmul(a, b), torch.matmul(a, b))

    @given(seeds, st.integers(1, 12), st.integers(1, 70), st.integers(1, 70), st.data())
    def test_strides(self, seed: int, m: int, k: int, n: int, data: st.DataObject) -> None:
        a, b = words(seed, (3, m, 2 * k)), words(seed + 1, (3, 2 * k, n))
        if data.draw(st.booleans()):
            a = a.mT.contiguous().mT
        if data.draw(st.booleans()):
            b = b.mT.contiguous().mT
        if data.draw(st.booleans()):
            a, b = a[..., ::2], b[:, ::2]
        if data.draw(st.booleans()):
            a, b = a[1], b[2]
        assert torch.equal(products.matmul(a, b), torch.matmul(a, b))

    def test_sizes_that_do_not_fit_are_refused_as_torch_does(self) -> None:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            products.matmul(words(0, (3, 4)), words(1, (5, 2)))
        with pytest.raises((RuntimeError, ValueError), match="broadcast"):
            products.matmul(words(0, (2, 3, 4)), words(1, (3, 4, 2)))


class TestConvolution:
    def check(self, images: Tensor, weight: Tensor, *geometry: Any) -> None:
        stride, padding, dilation, groups = geometry
        rank = len(stride)
        expected = torch.convolution(images, weight, None, stride, padding, dilation, False, [0] * rank, groups)
        got = products.convolve(images, weight, *geometry)
        assert got.shape == expected.shape
        assert torch.equal(got, expected)

    @settings(max_examples=150)
    @given(seeds, st.data())
    def test_geometries(self, seed: int, data: st.DataObject) -> None:
        def draw(low: int, high: int) -> int:
            return data.draw(st.integers(low, high))

        rank, groups, count = draw(1, 3), draw(1, 3), draw(1, 4)
        inputs, outputs = groups * draw(1, 4), groups * draw(1, 7)
        kernel, stride, dilation = ([draw(1, 3) for _ in range(rank)] for _ in range(3))
        padding = [draw(0, 2) for _ in range(rank)]
        sizes = [draw(max(1, d * (k - 1) + 1 - 2 * p), 12) for k, p, d in zip(kernel, padding, dilation, strict=True)]
        images, weight = words(seed, (count, inputs, *sizes)), words(seed + 1, (outputs, inputs // groups, *kernel))
        if data.draw(st.booleans()):
            images = images.mT.contiguous().mT if rank > 1 else images
        self.check(images, weight, stride, padding, dilation, groups)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_sum_longer_than_a_panel(self, groups: int) -> None:
        images, weight = words(1, (2, 120 * groups, 7, 9)), words(2, (12, 120, 3, 3))
        self.check(images, weight, (1, 1), (1, 1), (1, 1), groups)

    def test_depth_wise(self) -> None:
        self.check(words(1, (2, 6, 9, 9)), words(2, (6, 1, 3, 3)), (2, 2), (1, 1), (1, 1), 6)

    def test_an_empty_batch(self) -> None:
        self.check(words(1, (0, 2, 9, 9)), words(2, (6, 2, 3, 3)), (1, 1), (0, 0), (1, 1), 1)

    def test_channels_that_do_not_fit_are_refused_as_torch_does(self) -> None:
        with pytest.raises(RuntimeError, match="channels"):
            products.convolve(words(1, (2, 3, 9, 9)), words(2, (6, 2, 3, 3)), (1, 1), (0, 0), (1, 1), 1)
        with pytest.raises(RuntimeError, match="size"):
            products.convolve(words(1, (2, 2, 2, 2)), words(2, (6, 2, 3, 3)), (1, 1), (0, 0), (1, 1), 1)


class TestLoading:
    def test_without_numba_there_are_no_loops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "numba", None)
        assert kernels.load.__wrapped__("tacit.mpc.kernels") is None

    def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
        assert kernels.compiled(lambda x: x + 1)(2) == 3

    def test_importing_tacit_neither_imports_numba_nor_compiles(self) -> None:
        code = "import sys, tacit, tacit.mpc.sign, tacit.mpc.linear; sys.exit('numba' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.parametrize("rank", [1, 2])
    def test_shapes_alone_need_none_of_it(self, rank: int) -> None:
        def blank(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int64, device="meta")

        ones = (1,) * rank
        assert products.matmul(blank(2, 3), blank(3, 4)).shape == (2, 4)
        images, weight = blank(2, 3, *(9,) * rank), blank(4, 3, *(3,) * rank)
        assert products.convolve(images, weight, ones, ones, ones, 1).shape == (2, 4, *(9,) * rank)
        assert phases.mask(blank(3), blank(3), True).is_meta
