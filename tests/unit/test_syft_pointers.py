"""PySyft's vocabulary: workers, pointers, modules that travel, datasets, plans, and what is refused."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

import tacit.syft as sy
from tacit.errors import InputError, PeerError
from tacit.syft.federated.floptimizer import Optims

X = torch.tensor([[1.0, -2.0], [3.0, 0.5]])


@pytest.fixture(autouse=True)
def hook() -> Iterator[sy.TorchHook]:
    hook = sy.TorchHook(torch)
    yield hook
    hook.unhook()


@pytest.fixture
def bob() -> sy.VirtualWorker:
    return sy.VirtualWorker(None, id="bob")


@pytest.fixture
def alice() -> sy.VirtualWorker:
    return sy.VirtualWorker(None, id="alice")


class TestHook:
    classes = (Tensor, nn.Parameter, nn.Module, Optimizer, Dataset)

    def snapshot(self) -> list[dict[str, object]]:
        return [dict(vars(kind)) for kind in self.classes] + [dict(vars(torch)), dict(vars(functional))]

    def test_unhooking_leaves_torch_as_it_was_found(self, hook: sy.TorchHook) -> None:
        hook.unhook()
        before = self.snapshot()
        assert not hasattr(Tensor, "send")
        again = [sy.TorchHook(torch), sy.TorchHook(torch)]
        assert hasattr(Tensor, "send")
        assert hasattr(nn.Module, "send")
        assert sy.hook is again[1]
        again[0].unhook()
        assert self.snapshot() == before
        again[1].unhook()
        assert self.snapshot() == before

    def test_names_that_are_taken_stay(self, hook: sy.TorchHook) -> None:
        hook.unhook()
        Tensor.tag = taken = lambda self: None
        try:
            sy.TorchHook(torch).unhook()
            assert Tensor.tag is taken
        finally:
            del Tensor.tag


class TestPointers:
    def test_sent_and_taken_back(self, bob: sy.VirtualWorker) -> None:
        pointer = X.send(bob)
        assert isinstance(pointer, Tensor)
        assert (pointer.location, pointer.owner) == (bob, sy.local_worker)
        assert list(bob._objects) == [pointer.id_at_location]
        assert (pointer.shape, pointer.dtype, len(pointer), pointer.dim()) == (X.shape, X.dtype, 2, 2)
        assert torch.equal(pointer.get(), X)
        assert bob._objects == {}

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x + x * 2 - 1,
            lambda x: 3 / (1 + x.abs()) @ x,
            lambda x: torch.cat([x, -x]).relu().sum(0),
            lambda x: functional.log_softmax(x.view(-1), 0),
            lambda x: x.max(dim=1)[0] + x.T[0],
            lambda x: torch.stack(list(x)).clone().mul_(2),
            lambda x: nn.Sequential(nn.Flatten(0), nn.Softmax(0))(x),
        ],
    )
    def test_functions_run_where_the_data_is(self, function: Callable[[Tensor], Tensor], bob: sy.VirtualWorker) -> None:
        result = function(X.send(bob))
        assert isinstance(result, sy.PointerTensor)
        assert result.location is bob
        torch.testing.assert_close(result.get(), function(X))

    def test_autograd_runs_there(self, bob: sy.VirtualWorker) -> None:
        x, y = (value.clone().requires_grad_().send(bob) for value in (X, X + 1))
        (x * y).sum().backward()
        assert isinstance(x.grad, sy.PointerTensor)
        taken = x.get()
        assert taken.requires_grad
        assert torch.equal(taken.grad, X + 1)

    def test_what_is_changed_in_place_is_changed_there(self, bob: sy.VirtualWorker) -> None:
        pointer = X.clone().send(bob)
        same = pointer
        pointer *= 2
        pointer.add_(1)
        assert pointer is same
        assert len(bob._objects) == 1
        assert torch.equal(pointer.get(), X * 2 + 1)

    def test_what_is_sent_is_a_copy(self, bob: sy.VirtualWorker) -> None:
        local = X.clone()
        pointer = local.send(bob)
        local.zero_()
        assert torch.equal(pointer.copy().get(), X)
        assert torch.equal(pointer.get(), X)

    def test_the_worker_forgets_what_nobody_points_to(self, bob: sy.VirtualWorker) -> None:
        pointer = X.send(bob)
        for _ in range(3):
            pointer = pointer + 1
        assert len(bob._objects) == 1

    def test_straight_from_one_worker_to_another(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        pointer = X.send(bob).move(alice)
        assert (bob._objects, list(alice._objects)) == ({}, [pointer.id_at_location])
        assert torch.equal(pointer.get(), X)

    def test_pointers_to_pointers(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        far = X.send(bob).send(alice)
        double = far + far
        assert double.location is alice
        near = double.get()
        assert near.location is bob
        assert torch.equal(near.get(), 2 * X)
        assert torch.equal(far.get().get(), X)
        assert (bob._objects, alice._objects) == ({}, {})

    def test_searched_by_tag_and_description(self, bob: sy.VirtualWorker) -> None:
        tensors = X.clone().tag("#x", "#even").describe("the inputs"), X.clone().tag("#y")
        worker = sy.VirtualWorker(None, id="carol", data=tensors)
        assert [len(worker.search(*query)) for query in (("#x",), ("#x", "#y"), (["#x", "#even"],), ("inputs",))] == [
            1, 0, 1, 1,
        ]  # fmt: skip
        [found] = sy.local_worker.request_search(["#y"], location=worker)
        assert "#y" in repr(found)
        assert torch.equal(found.get(), X)
        (X.clone().tag("#sent")).send(bob)

    def test_it_prints_where_the_data_is_and_never_the_data(self, bob: sy.VirtualWorker) -> None:
        pointer = torch.tensor([123456.0]).send(bob)
        for text in (repr(pointer), str(pointer), f"{pointer}", str([pointer]), repr(pointer.send(bob))):
            assert "-> bob:" in text
            assert "123456" not in text.replace(str(pointer.id_at_location), "").replace(str(pointer.id), "")


class TestRefusals:
    @pytest.mark.parametrize(
        "call",
        [
            lambda x: x.tolist(),
            lambda x: x.sum().item(),
            lambda x: bool(x.sum() > 0),
            lambda x: float(x.sum()),
            lambda x: x.numpy(),
            lambda x: torch.equal(x, x),
            lambda x: x.data_ptr(),
        ],
    )
    def test_values_come_back_by_get_alone(self, call: Callable[[Tensor], object], bob: sy.VirtualWorker) -> None:
        with pytest.raises(InputError, match=r"\.get\(\) it"):
            call(X.send(bob))

    def test_a_pointer_does_not_travel_by_pickle(self, bob: sy.VirtualWorker) -> None:
        with pytest.raises(InputError, match="pickled"):
            X.send(bob).__reduce_ex__(2)

    def test_tensors_of_different_workers(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        with pytest.raises(InputError, match=r"one tensor is at bob and another at alice.*\.move\(bob\)"):
            _ = X.send(bob) + X.send(alice)

    def test_a_local_tensor_and_a_remote_one(self, bob: sy.VirtualWorker) -> None:
        with pytest.raises(InputError, match=r"another at me.*\.send\(bob\)"):
            _ = X.send(bob) + X

    def test_taken_twice(self, bob: sy.VirtualWorker) -> None:
        pointer = X.send(bob)
        pointer.get()
        for again in (pointer.get, pointer.copy, lambda: pointer + 1):
            with pytest.raises(InputError, match=r"not at bob any more.*\.copy\(\)"):
                again()

    def test_local_already(self) -> None:
        with pytest.raises(InputError, match="local already"):
            X.get()

    def test_a_worker_that_is_gone(self, bob: sy.VirtualWorker) -> None:
        pointer = X.send(bob)
        bob.close()
        for use in (pointer.get, lambda: pointer + 1, lambda: X.send(bob), lambda: nn.Linear(1, 1).send(bob)):
            with pytest.raises(PeerError, match="bob is gone"):
                use()

    def test_the_owner_s_list_of_users(self, bob: sy.VirtualWorker) -> None:
        pointer = X.clone().private_tensor(allowed_users=["carol"]).send(bob)
        for one in (pointer, pointer.copy(), pointer.sum() * 2, pointer.T):
            for user in (None, "mallory"):
                with pytest.raises(sy.GetNotPermittedError, match="bob does not hand"):
                    one.get(user=user)
        with pytest.raises(sy.GetNotPermittedError):
            pointer.move(sy.VirtualWorker(None, id="mallory"))
        assert torch.equal(pointer.get(user="carol"), X)

    def test_what_a_guarded_value_is_written_to_is_guarded(self, bob: sy.VirtualWorker) -> None:
        for write in (
            lambda to, value: to.copy_(value),
            lambda to, value: to.__iadd__(value),
            lambda to, value: to.__setitem__(0, value[0]),
            lambda to, value: setattr(to, "data", value),
            lambda to, value: torch.add(value, 1, out=to),
        ):
            guarded, target = X.clone().private_tensor(["carol"]).send(bob), torch.zeros(2, 2).send(bob)
            write(target, guarded)
            with pytest.raises(sy.GetNotPermittedError):
                target.get()
        free = torch.zeros(2, 2).send(bob)
        _ = free + guarded
        assert free.get().sum() == 0

    def test_the_worker_s_policy(self) -> None:
        means_only = sy.VirtualWorker(None, id="bank", policy=lambda value, user: value.dim() == 0)
        pointer = X.send(means_only)
        with pytest.raises(sy.GetNotPermittedError, match="bank"):
            pointer.get()
        assert pointer.mean().get().item() == X.mean().item()


class TestModules:
    def test_training_there_is_training_here(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        torch.manual_seed(0)
        here = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
        there, kinds = copy.deepcopy(here), [type(value) for value in here.parameters()]
        inputs, targets = torch.randn(6, 2), torch.randn(6, 1)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (here, there)]
        before = list(there.parameters())
        for worker in (bob, alice, bob):
            there.send(worker)
            assert there.location is worker
            for model, data, wanted, optimizer in (
                (here, inputs, targets, optimizers[0]),
                (there, inputs.send(worker), targets.send(worker), optimizers[1]),
            ):
                optimizer.zero_grad()
                ((model(data) - wanted) ** 2).mean().backward()
                optimizer.step()
            there.get()
        assert all(one is other for one, other in zip(before, there.parameters(), strict=True))
        assert [type(value) for value in there.parameters()] == kinds
        torch.testing.assert_close(there.state_dict(), here.state_dict())
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)

    def test_adam_keeps_a_state_for_each_worker(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        torch.manual_seed(0)
        travels = nn.Linear(2, 1)
        start = copy.deepcopy(travels.state_dict())
        optims = Optims(["bob", "alice"], optim=torch.optim.Adam(travels.parameters(), lr=0.1))
        assert optims.count() == 2
        data = {worker: (X + i).send(worker) for i, worker in enumerate((bob, alice))}
        for _ in range(3):
            for worker, inputs in data.items():
                travels.send(worker)
                optimizer = optims.get_optim(worker.id)
                optimizer.zero_grad()
                travels(inputs).pow(2).sum().backward()
                optimizer.step()
                travels.get()
        here = nn.Linear(2, 1)
        here.load_state_dict(start)
        plain = [torch.optim.Adam(here.parameters(), lr=0.1) for _ in data]
        for _ in range(3):
            for i, optimizer in enumerate(plain):
                optimizer.zero_grad()
                here(X + i).pow(2).sum().backward()
                optimizer.step()
        torch.testing.assert_close(travels.state_dict(), here.state_dict())
        with pytest.raises(InputError, match="no optimizer for 'carol'"):
            optims.get_optim("carol")

    def test_copies_and_moves(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        model = nn.Linear(2, 1)
        sent = model.copy().send(bob)
        twin = sent.copy()
        assert twin.location is bob
        with torch.no_grad():
            sent.weight.mul_(2)
        sent.move(alice)
        assert (sent.weight.location, twin.weight.location, sent.location) == (alice, bob, alice)
        assert torch.equal(sent.get().weight, 2 * model.weight)
        assert torch.equal(twin.get().weight, model.weight)
        assert (bob._objects, alice._objects) == ({}, {})

    def test_shared_weights_stay_shared(self, bob: sy.VirtualWorker) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        model.send(bob)
        assert len(bob._objects) == 3
        assert model.get()[1].weight is model[0].weight

    def test_sent_twice(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        model = nn.Linear(2, 1).send(bob)
        with pytest.raises(InputError, match=r"at bob already.*\.move\(alice\)"):
            model.send(alice)


class TestData:
    def test_a_dataset_goes_to_its_workers_and_comes_in_batches(
        self, bob: sy.VirtualWorker, alice: sy.VirtualWorker
    ) -> None:
        dataset = TensorDataset(torch.arange(10.0).view(10, 1), torch.arange(10))
        federated = dataset.federate((bob, alice))
        assert (federated.workers, len(federated), len(federated["bob"])) == (["bob", "alice"], 10, 5)
        for shuffle in (False, True):
            loader = sy.FederatedDataLoader(federated, batch_size=2, shuffle=shuffle)
            batches = list(loader)
            assert len(loader) == len(batches) == 6
            assert [data.location.id for data, _ in batches] == ["bob"] * 3 + ["alice"] * 3
            taken = [(data.get().flatten(), target.get()) for data, target in batches]
            assert all(torch.equal(data, target.float()) for data, target in taken)
            assert sorted(torch.cat([target for _, target in taken]).tolist()) == list(range(10))

    def test_datasets_that_are_there_already(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        parts = [sy.BaseDataset(X + i, torch.tensor([i, i])).send(worker) for i, worker in enumerate((bob, alice))]
        federated = sy.FederatedDataset(parts)
        assert len(sy.FederatedDataLoader(federated, batch_size=1, drop_last=True)) == 4
        assert "alice: 2 items" in repr(federated)
        assert torch.equal(federated["alice"].get().data, X + 1)
        assert torch.equal(parts[1][0][0], X[0] + 1)

    def test_data_that_is_still_here(self) -> None:
        with pytest.raises(InputError, match="still here"):
            sy.FederatedDataset([sy.BaseDataset(X, X)])
        with pytest.raises(InputError, match="2 inputs and 1 targets"):
            sy.BaseDataset(X, X[:1])


class TestPlans:
    def test_a_function_is_built_sent_and_run(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        @sy.func2plan()
        def plan(x: Tensor) -> Tensor:
            return torch.abs(x + x)

        assert not plan.is_built
        with pytest.raises(RuntimeError, match=r"\.build\(example\)"):
            plan.send(bob)
        plan.build(X)
        assert "aten.abs.default" in plan.code
        pointer = plan.send(bob)
        assert torch.equal(plan(X), (2 * X).abs())
        assert torch.equal(plan(X.send(bob)).get(), (2 * X).abs())
        assert torch.equal(pointer(X[:1].send(bob)).get(), (2 * X[:1]).abs())
        with pytest.raises(RuntimeError, match=r"not at alice: \.send\(alice\)"):
            plan(X.send(alice))

    def test_state_goes_along(self, bob: sy.VirtualWorker) -> None:
        @sy.func2plan(args_shape=[(-1,)], state={"bias": torch.tensor([1])})
        def plan(x: Tensor, state: object) -> Tensor:
            return x.abs() + state.read("bias")

        @sy.func2plan(args_shape=[(1,)], state=(torch.tensor([1.0]), torch.tensor([2.0])))
        def several(x: Tensor, state: object) -> tuple[Tensor, Tensor]:
            one, two = state.read()
            return x + one, x * two

        plan.send(bob)
        assert plan(torch.tensor([-1, 0]).send(bob)).get().tolist() == [2, 1]
        pointers = several.send(bob)(X[0].send(bob))
        assert [pointer.get().tolist() for pointer in pointers] == [[2.0, -1.0], [2.0, -4.0]]

    def test_a_module_is_a_plan_and_learns_where_it_is(self, bob: sy.VirtualWorker, alice: sy.VirtualWorker) -> None:
        class Net(sy.Plan):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(2, 3)
                self.add_to_state("fc")

            def forward(self, x: Tensor) -> Tensor:
                return functional.log_softmax(self.fc(x), dim=1)

        net = Net()
        expected = net.forward(X)
        net.build(torch.zeros(2, 2))
        assert str(net.state) == "State: fc"
        net.send(bob)
        torch.testing.assert_close(net(X.send(bob)).get(), expected)
        net.get().send(alice)
        torch.testing.assert_close(net(X.send(alice)).get(), expected)
        assert "location:alice built" in repr(net)

    def test_a_protocol_passes_results_from_worker_to_worker(
        self, bob: sy.VirtualWorker, alice: sy.VirtualWorker
    ) -> None:
        @sy.func2plan(args_shape=[(1,)])
        def double(x: Tensor) -> Tensor:
            return x * 2

        protocol = sy.Protocol([("first", double), ("second", double), ("first", double)]).tag("#thrice")
        with pytest.raises(RuntimeError, match=r"\.deploy\(alice"):
            protocol.run(X[0])
        with pytest.raises(InputError, match="1 workers for the names first, second"):
            protocol.deploy(bob)
        james = sy.VirtualWorker(None, id="james")
        protocol.send(james)
        [found] = james.search("#thrice")
        back = found.get().deploy(bob, alice)
        result = back.run(X[0])
        assert result.location is bob
        assert torch.equal(result.get(), 8 * X[0])
        with pytest.raises(RuntimeError, match=r"\.send\(james\)"):
            back.run(X[0].send(james))
        back.send(james)
        assert torch.equal(back.run(X[0].send(james)).get().get(), 8 * X[0])
