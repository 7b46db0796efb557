"""Calibration: windows as small as samples allow, what they save, how they are kept, and how an audit judges them."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tacit
from engine import prg
from tacit.cluster import PrivateModel
from tacit.data.digits import load_digits
from tacit.errors import DataError, InputError, RangeError
from tacit.federated.models import lenet
from tacit.party.programs import Program, decode_program, encode_program
from tacit.program.audit import window_bound
from tacit.program.calibrate import Calibration, Range, fingerprint, load_model, save_model
from tacit.program.lowering import Context
from tacit.program.rewrite import Model, simplify
from tacit.trace import trace

IMAGES = (3, 1, 28, 28)


def encrypted(model: nn.Module, example: Tensor, context: Context | None = None) -> PrivateModel:
    return tacit.cluster(prg(1)).encrypt(model.eval(), example, context=context)


def chunks_of(model: nn.Module, samples: Tensor, **options) -> list[int]:
    return [one.chunks for one in encrypted(model, samples).calibrate(samples, **options).ranges]


def scaled(factor: float) -> nn.Linear:
    """x·factor, element by element."""
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4) * factor)
    return linear


class Compared(nn.Module):
    """One comparison, given by a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.linear, self.function = scaled(1.0), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class TestChoice:
    @pytest.mark.parametrize(
        ("largest", "chunks"), [(2.0**-13, 1), (0.01, 2), (0.015, 2), (0.0157, 3), (0.9, 3), (1.1, 4), (63, 4), (65, 5)]
    )
    def test_the_smallest_window_with_the_margin(self, largest: float, chunks: int) -> None:
        samples = torch.linspace(-largest, largest / 2, 12).view(3, 4)
        assert chunks_of(nn.Sequential(scaled(1.0), nn.ReLU()), samples) == [chunks]

    @pytest.mark.parametrize(("margin", "chunks"), [(1.0, 3), (3.9, 3), (4.1, 4), (1e9, 5)])
    def test_the_margin_is_a_choice(self, margin: float, chunks: int) -> None:
        assert chunks_of(nn.ReLU(), torch.ones(1, 4), margin=margin) == [chunks]

    @pytest.mark.parametrize("margin", [0.99, 0, -4, float("nan"), float("inf")])
    def test_a_margin_below_one_is_refused(self, margin: float) -> None:
        with pytest.raises(InputError, match="margin"):
            chunks_of(nn.ReLU(), torch.ones(1, 4), margin=margin)

    @pytest.mark.parametrize(
        ("largest", "extra"),
        [(0.9, 0), (0.51, 0), (0.49, 1), (0.26, 1), (0.2, 2), (0.017, 5), (2.0**-13, 0), (4e-6, 5)],
    )
    def test_what_room_is_left_goes_to_the_scale(self, largest: float, extra: int) -> None:
        model = nn.Sequential(scaled(1.0), nn.ReLU())
        samples = torch.linspace(-largest, largest, 12).view(3, 4)
        (found,) = encrypted(model, samples).calibrate(samples).ranges
        assert found.extra == extra
        assert 4 * largest <= found.bound + 2.0**-10 * found.bound
        context = encrypted(model, samples).calibrate(samples).context(model)
        got = encrypted(model, samples, context)(samples)
        # The input's own rounding, and a unit in the last place.
        assert (got - model(samples)).abs().max().item() <= 2.0**-17 + 1.01 * 2.0 ** -(16 + extra)
        far = torch.full((1, 4), found.bound * 0.99)
        assert (encrypted(model, samples, context)(far) - far).abs().max().item() <= 2.0**-15

    @pytest.mark.parametrize("function", [nn.ReLU(), nn.MaxPool1d(2), nn.Sequential(nn.MaxPool1d(2), nn.ReLU())])
    def test_values_too_large_for_the_largest_window_have_a_coarser_scale(self, function: nn.Module) -> None:
        x = torch.tensor([[60.0, -50.0, 30.0, 1.0]]).view(1, 1, 4)
        model = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), function)
        nn.init.constant_(model[0].weight, 2000.0)
        context = encrypted(model, x).calibrate(x).context(model)
        assert set(context.finer.values()) <= {-5, -6}
        assert context.finer
        # Half a unit of the input's, 2000 times as large, and one of the result's.
        assert (encrypted(model, x, context)(x) - model(x)).abs().max().item() < 2000 * 2.0**-17 + 2.0**-10
        assert encrypted(model, x, context).audit(x).within
        assert not encrypted(model, x).audit(x).within

    def test_samples_beyond_the_largest_window_are_refused(self) -> None:
        model = nn.Sequential(scaled(300.0), Compared(lambda x: (x > 0).float()))
        with pytest.raises(RangeError, match=r"aten.gt.Scalar.* compares larger values"):
            chunks_of(model, torch.full((1, 4), 60.0))
        wide = nn.Sequential(nn.Linear(4000, 1, bias=False), nn.ReLU())
        nn.init.constant_(wide[0].weight, 10.0)
        with pytest.raises(RangeError, match=r"relu .*aten.relu.default.* compares larger values"):
            chunks_of(wide, torch.full((1, 4000), 60.0))

    def test_only_zeros_say_nothing(self) -> None:
        assert chunks_of(nn.ReLU(), torch.zeros(2, 4)) == [5]

    @pytest.mark.parametrize(
        ("function", "largest"),
        [
            (lambda x: x.relu(), 2.0),
            (lambda x: x.abs(), 2.0),
            (lambda x: torch.sign(x), 2.0),
            (lambda x: nn.functional.leaky_relu(x), 2.0),
            (lambda x: (x >= 1.5).float(), 3.5),
            (lambda x: (x == 0.5).float(), 2.5),
            (lambda x: torch.maximum(x, -x), 4.0),
            (lambda x: x.clamp(-1, 7), 9.0),
            (lambda x: x.clamp(min=3), 5.0),
            (lambda x: nn.functional.hardtanh(x), 3.0),
            (lambda x: nn.functional.relu6(x), 8.0),
            (lambda x: x.amax(1), 3.0),
            (lambda x: x.argmax(1), 3.0),
            (lambda x: x.topk(2, 1)[0], 3.0),
            (lambda x: nn.functional.max_pool2d(x.view(-1, 1, 2, 2), 2), 3.0),
            (lambda x: nn.functional.max_pool2d(x.view(-1, 1, 2, 2), 2, padding=1), 4099.0),
            (lambda x: nn.functional.max_pool2d(x.view(-1, 1, 2, 2), 2, ceil_mode=True), 4099.0),
        ],
    )
    def test_what_a_window_holds(self, function, largest: float) -> None:
        samples = torch.tensor([[-2.0, 1.0, 0.5, 0.25]])
        (found,) = encrypted(Compared(function), samples).calibrate(samples).ranges
        assert found.largest == largest
        assert found.bound >= min(4 * largest, window_bound(5))

    @pytest.mark.parametrize("padding", [0, 1])
    @pytest.mark.parametrize("rectify", [False, True])
    def test_small_windows_still_give_the_maximum(self, padding: int, rectify: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.MaxPool2d(2, padding=padding), nn.ReLU() if rectify else nn.Identity())
        x = torch.rand(2, 1, 6, 6) - 0.5
        context = encrypted(model, x).calibrate(x).context(model)
        assert set(context.windows.values()) == {5 if padding else 3}
        torch.testing.assert_close(encrypted(model, x, context)(x), model(x), atol=2.0**-15, rtol=0)


@pytest.fixture
def trained() -> nn.Module:
    """A small LeNet after a few steps on the digits."""
    torch.manual_seed(0)
    sizes = (nn.Conv2d(1, 6, 5, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*sizes, nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    images, labels = load_digits().train.inputs, load_digits().train.targets
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in torch.randperm(len(images)).split(32) * 3:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


class TestModel:
    def test_the_same_accuracy_for_less(self, trained: nn.Module) -> None:
        data = load_digits()
        private = encrypted(trained, data.train.inputs[:2])
        context = private.calibrate(data.train.inputs[:300]).context(trained)
        assert set(context.windows.values()) <= {3, 4}
        calibrated = encrypted(trained, data.train.inputs[:2], context)
        images, labels = data.test.inputs[:120], data.test.targets[:120]
        clear = trained(images).argmax(1)
        assert float((clear == labels).float().mean()) > 0.8
        before, after = private(images), calibrated(images)
        assert torch.equal(after.argmax(1), clear)
        assert torch.equal(before.argmax(1), clear)
        assert float((after - before).abs().max()) < 2.0**-8
        assert calibrated.audit(images).within
        shape = tuple(images.shape)
        assert calibrated.cost(shape) == calibrated.counted()
        assert calibrated.cost(shape).bytes_dealt < private.cost(shape).bytes_dealt
        assert calibrated.cost(shape).bytes_online == private.cost(shape).bytes_online
        assert calibrated.cost(shape).rounds == private.cost(shape).rounds

    def test_lenet_is_dealt_less(self) -> None:
        torch.manual_seed(0)
        model, samples = lenet(), load_digits().train.inputs[:8]
        private = encrypted(model, samples[:1])
        context = private.calibrate(samples).context(model)
        windows = context.windows.values()
        assert set(windows) <= {3, 4}
        shape = (1, *IMAGES[1:])
        saved = private.cost(shape).bytes_dealt - encrypted(model, samples[:1], context).cost(shape).bytes_dealt
        # Comparisons an image: pooling 24² and 8² takes 3 a window and a ReLU each; then 500 ReLUs. 8 bytes a chunk.
        comparisons = [20 * 12 * 12 * 4, 50 * 4 * 4 * 4, 500]
        chunks_saved = sum(8 * (5 - chunks) * count for chunks, count in zip(windows, comparisons, strict=True))
        # The last ReLU drops the bits that finer values before it have more: 17 and up take 4 bytes, not 2, twice.
        assert saved == chunks_saved - 4 * 500

    def test_names_do_not_change_with_the_batch_or_the_trace(self) -> None:
        torch.manual_seed(0)
        x = torch.rand(5, 1, 28, 28)
        names = [[one.name for one in encrypted(lenet(), x[:n]).calibrate(x[:n]).ranges] for n in (1, 2, 5)]
        assert names[0] == names[1] == names[2]
        assert len(set(names[0])) == 3

    def test_it_goes_with_exact_mode(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(30, 6)
        exact = Context(exact=True)
        context = encrypted(model, x).calibrate(x).context(model, exact)
        assert context.exact
        assert context.finer
        expected = model(x).detach()
        errors = [(encrypted(model, x, one)(x) - expected).abs().max().item() for one in (exact, context)]
        assert errors[1] < errors[0] < 2.0**-13
        windows_alone = replace(context, finer={})
        assert torch.equal(encrypted(model, x, exact)(x), encrypted(model, x, windows_alone)(x))

    def test_the_settings_reach_the_parties(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
        simple = simplify(Model(*trace(model, (torch.zeros(2, 4),))))
        state = {name: tuple(value.shape) for name, value in simple.state.items()}
        program = Program(simple.graph, state, ((2, 4),), Context(exact=True, windows={"relu": 3}, finer={"relu": 2}))
        received = decode_program(encode_program(program))
        assert received.context == program.context
        assert received.cost().correlations == program.cost().correlations

    def test_another_model_is_refused(self) -> None:
        x = torch.ones(1, 4)
        context = encrypted(nn.ReLU(), x).calibrate(x).context(nn.ReLU())
        with pytest.raises(InputError, match="no operator relu: its windows were calibrated for another model"):
            encrypted(nn.Linear(4, 4), x, context)

    def test_other_weights_are_refused(self) -> None:
        x, model = torch.ones(1, 4), nn.Sequential(scaled(1.0), nn.ReLU())
        calibration = encrypted(model, x).calibrate(x)
        calibration.context(copy.deepcopy(model))
        with torch.no_grad():
            model[0].weight[0, 0] += 2.0**-20
        with pytest.raises(InputError, match="other weights than this Sequential has: calibrate it again"):
            calibration.context(model)

    def test_fingerprints_tell_names_dtypes_shapes_and_values_apart(self) -> None:
        base = nn.Linear(2, 2)
        half, flat, named = copy.deepcopy(base).half(), nn.Linear(4, 1), nn.Sequential(copy.deepcopy(base))
        found = {fingerprint(model) for model in (base, half, flat, named, nn.Linear(2, 2))}
        assert len(found) == 5
        assert fingerprint(copy.deepcopy(base)) == fingerprint(base.eval()) in found

    def test_training_has_no_windows(self) -> None:
        with pytest.raises(InputError, match="no calibrated windows"):
            tacit.cluster(prg()).trainer(nn.Linear(2, 2), lr=0.1, context=Context(windows={"relu": 3}))


class TestOutside:
    """What happens to a value outside its window: online a wrong bit, in an audit a finding."""

    @pytest.fixture
    def private(self) -> PrivateModel:
        x = torch.ones(1, 4)
        model = nn.Sequential(nn.ReLU(), scaled(1.0), nn.ReLU())
        context = Context(windows={"relu": 3, "relu_1": 5})
        return encrypted(model, x, context)

    def test_online_nobody_is_told(self, private: PrivateModel) -> None:
        x = torch.tensor([[3.9, 4.1, -4.1, -3.9]])
        assert private(x).sub(torch.tensor([[3.9, 0.0, 0.0, 0.0]])).abs().max() < 2.0**-14

    def test_an_audit_finds_it_at_its_own_operator(self, private: PrivateModel) -> None:
        assert private.audit(torch.tensor([[3.9, 0, 0, -3.9]])).within
        audit = private.audit(torch.tensor([[3.9, 4.1, 0, 0]]))
        assert [layer.name for layer in audit.layers if not layer.within] == ["relu"]
        bounds = {layer.name: layer.bound for layer in audit.layers}
        assert (bounds["relu"], bounds["relu_1"]) == (window_bound(3), window_bound(5))
        assert "OUT OF RANGE" in str(audit)

    def test_the_bound_holds_at_both_ends(self) -> None:
        unit = 2.0**-16
        assert [window_bound(chunks) + unit for chunks in range(1, 6)] == [2.0**-10, 2.0**-4, 4, 256, 16384]


class TestFile:
    @pytest.fixture
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
        model[3].weight = model[0].weight
        return model

    def test_a_model_and_its_calibration_come_back(self, model: nn.Module, tmp_path: Path) -> None:
        x, path = torch.randn(5, 4), tmp_path / "model.safetensors"
        calibration = encrypted(model, x).calibrate(x)
        save_model(path, model, calibration)
        other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
        assert load_model(path, other) == calibration
        assert fingerprint(other) == fingerprint(model)
        assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]
        context = calibration.context(other)
        assert context.windows
        assert (encrypted(other, x, context)(x) - model(x)).abs().max() < 2.0**-13

    def test_what_does_not_belong_together_is_refused(self, model: nn.Module, tmp_path: Path) -> None:
        x, path = torch.randn(5, 4), tmp_path / "model.safetensors"
        calibration = encrypted(model, x).calibrate(x)
        trained = copy.deepcopy(model)
        nn.init.zeros_(trained[0].bias)
        with pytest.raises(InputError, match="calibrate it again"):
            save_model(path, trained, calibration)
        assert not path.exists()
        state = {name: value.clone() for name, value in trained.state_dict().items()}
        save_file(state, path, {"tacit calibration": calibration.to_json()})
        before = fingerprint(trained)
        with pytest.raises(DataError, match="calibration of other weights"):
            load_model(path, trained)
        with pytest.raises(DataError, match="does not hold the weights of this Linear"):
            load_model(path, nn.Linear(4, 4))
        save_file(state, path)
        with pytest.raises(DataError, match="no calibration"):
            load_model(path, trained)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match="not a readable model"):
            load_model(path, trained)
        with pytest.raises(DataError, match="not a readable model"):
            load_model(tmp_path / "none", trained)
        assert fingerprint(trained) == before


class TestJson:
    CALIBRATION = Calibration(
        4.0, (Range("relu", "aten.relu.default", 0.7, 3, 1), Range("ge", "aten.ge.Scalar", 9.5, 4)), "0a" * 32
    )

    def test_round_trip(self) -> None:
        assert Calibration.from_json(self.CALIBRATION.to_json()) == self.CALIBRATION

    def test_as_it_is_shown(self) -> None:
        lines = str(self.CALIBRATION).splitlines()
        assert len(lines) == 3
        assert "relu (aten.relu.default)" in lines[1]

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 1},
            {"version": True},
            {"version": 2.0},
            {"weights": "0A" * 32},
            {"weights": "0a" * 31},
            {"weights": None},
            {"extra": 9},
            {"extra": -7},
            {"extra": 1.0},
            {"margin": 0.5},
            {"margin": "4"},
            {"margin": True},
            {"margin": 10**400},
            {"ranges": {}},
            {"ranges": [1]},
            {"more": 1},
            {"chunks": 0},
            {"chunks": 6},
            {"chunks": 3.0},
            {"chunks": True},
            {"largest": -1.0},
            {"largest": "0"},
            {"largest": None},
            {"name": ""},
            {"name": 7},
            {"operator": None},
            {"more_of_a_range": 1},
        ],
    )
    def test_anything_else_is_refused(self, change: dict) -> None:
        content = json.loads(self.CALIBRATION.to_json())
        inside = {"chunks", "extra", "largest", "name", "operator", "more_of_a_range"}
        (content["ranges"][0] if change.keys() <= inside else content).update(change)
        with pytest.raises(DataError):
            Calibration.from_json(json.dumps(content))

    @pytest.mark.parametrize("text", ["", "[]", "1", "null", "{}", "{" * 5, '{"version": 2}', "\x00", "[" * 100_000])
    def test_what_is_not_a_calibration_is_refused(self, text: str) -> None:
        with pytest.raises(DataError):
            Calibration.from_json(text)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"margin": 4.0', '"margin": NaN'),
            ('"margin": 4.0', '"margin": Infinity'),
            ('"margin": 4.0', '"margin": 4.0, "margin": 5.0'),
            ('"largest": 0.7', '"largest": 1e999'),
            ('"name": "ge"', '"name": "relu"'),
            ('"operator": "aten.ge.Scalar",', ""),
        ],
    )
    def test_numbers_that_are_none_and_keys_given_twice_are_refused(self, old: str, new: str) -> None:
        text = self.CALIBRATION.to_json()
        assert old in text
        with pytest.raises(DataError):
            Calibration.from_json(text.replace(old, new))
