"""Plans: functions and modules that are traced once, and run at a worker as one call.

What runs there is a `tacit.trace.Graph`: names of operators, and no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tacit.errors import InputError
from tacit.remote import PointerTensor, VirtualWorker, cloned, local_worker, new_id, run
from tacit.trace import Graph, operator_of, substitute, trace_function


class PlanError(InputError, RuntimeError):
    """A plan is used before it is built, or where it was not sent."""


class State:
    """The tensors that a plan takes along."""

    def __init__(self, plan: Plan, values: Mapping[str, Any] | Sequence[Tensor]) -> None:
        named = values if isinstance(values, Mapping) else {str(i): value for i, value in enumerate(values)}
        self._plan, self.names = plan, list(named)
        for name, value in named.items():
            plan.register_buffer(f"state_{name}", value)

    def read(self, name: str | None = None) -> Any:
        """One of the tensors, or all in their order."""
        values = [getattr(self._plan, f"state_{one}") for one in ([name] if name is not None else self.names)]
        return values[0] if name is not None else tuple(values)

    def __iadd__(self, names: Iterable[str]) -> State:
        self.names += names
        return self

    def __repr__(self) -> str:
        return f"State: {', '.join(self.names)}"


class PointerPlan:
    """A plan at a worker; calling it runs the plan there.

    Args:
        location: the worker.
        id_at_location: its number there.
    """

    tags: set[str]

    def __init__(self, location: VirtualWorker, id_at_location: int, owned: bool = True) -> None:
        self.location, self.id_at_location, self.id = location, id_at_location, new_id()

    def __call__(self, *args: Any) -> Any:
        """Run the plan on pointers to objects of its worker."""
        return self.location.at(self.id_at_location).there(self.location, args)

    def get(self, **_: Any) -> Any:
        """Take it back."""
        return self.location.give(self.id_at_location).get()

    def __repr__(self) -> str:
        return f"[{type(self).__name__} | {local_worker.id}:{self.id} -> {self.location.id}:{self.id_at_location}]"


class Plan(nn.Module):
    """A sequence of operators, from a subclass's `forward` or from a function (`func2plan`).

    Branches and loops are followed once, when the plan is built: tracing does not keep them.

    Args:
        name: its name; the class's if not given.
        function: what it does, instead of `forward`.
        state: tensors that the function gets as its last argument.
    """

    pointer = PointerPlan

    def __init__(self, name: str | None = None, function: Callable[..., Any] | None = None, state: Any = ()) -> None:
        super().__init__()
        self.name, self.id, self.tags = name or type(self).__name__, new_id(), set[str]()
        self._function, self._graphs, self._sent = function, dict[Any, Graph](), dict[VirtualWorker, int]()
        self.state = State(self, state)

    @property
    def is_built(self) -> bool:
        """Whether it has been traced."""
        return bool(self._graphs)

    @property
    def code(self) -> str:
        """The operators, one a line."""
        graph = next(iter(self._graphs.values()), Graph((), (), (), ()))
        return "\n".join(f"{node.name} = {node.operator}({', '.join(node.refs)})" for node in graph.nodes)

    def add_to_state(self, *names: str) -> None:
        """Name submodules that belong to the state; all do."""
        self.state += names

    def forward(self, *args: Any) -> Any:
        """What the plan does."""
        if self._function is None:
            raise PlanError(f"plan {self.name} does nothing: write its forward method")
        return self._function(*args, self.state) if self.state.names else self._function(*args)

    def build(self, *args: Tensor) -> Plan:
        """Trace the plan on tensors of the shapes and kinds that it will be run on; their values do not matter.

        Raises:
            InputError: it cannot be traced.
        """
        self._graph(args)
        return self

    def _graph(self, args: Sequence[Tensor]) -> Graph:
        form = tuple((tuple(one.shape), one.dtype) for one in args)
        if form not in self._graphs:
            state = dict(self._state())

            def function(*values: Tensor) -> Sequence[Tensor]:
                result = functional_call(
                    _Forward(self), dict(zip(state, values[len(form) :], strict=True)), values[: len(form)]
                )
                return result if isinstance(result, tuple) else (result,)

            examples = [torch.zeros(shape, dtype=dtype) for shape, dtype in form]
            with torch.no_grad():
                self._graphs[form] = trace_function(function, [*examples, *(one.detach() for one in state.values())])
        return self._graphs[form]

    def _state(self) -> Iterable[tuple[str, Tensor]]:
        return [(f"plan.{name}", value) for name, value in (*self.named_parameters(), *self.named_buffers())]

    def send(self, *workers: VirtualWorker, force: bool = False) -> Any:
        """Send the plan with its state; returns the pointer to it (or a list of them).

        Raises:
            PlanError: it is not built.
        """
        if not self.is_built and not force:
            raise PlanError(f"plan {self.name} is not built: .build(example) it before it is sent to a worker")
        for worker in workers:
            self._sent[worker] = worker.hold(_Sent(self, [cloned(value) for _, value in self._state()]))
        pointers = [PointerPlan(worker, self._sent[worker]) for worker in workers]
        return pointers[0] if len(pointers) == 1 else pointers

    def get(self) -> Plan:
        """Take the plan back from all workers, with the state that it had at the last one."""
        for worker, number in self._sent.items():
            for (_, own), held in zip(self._state(), worker.give(number).state, strict=True):
                own.data = held.detach()
        self._sent.clear()
        return self

    def __call__(self, *args: Any) -> Any:
        """Run it: at the worker that the arguments are at, or here."""
        where = next((one.location for one in args if isinstance(one, PointerTensor)), None)
        if where is None:
            return (
                _result(_execute(self._graph(args), [*args, *(value for _, value in self._state())]))
                if self.is_built
                else self.forward(*args)
            )
        if where not in self._sent:
            raise PlanError(f"plan {self.name} is not at {where.id}: .send({where.id}) it first")
        return where.at(self._sent[where]).there(where, args)

    def __repr__(self) -> str:
        places = "".join(f" location:{worker.id}" for worker in self._sent)
        return f"<Plan {self.name} id:{self.id} owner:{local_worker.id}{places}{' built' if self.is_built else ''}>"


class _Forward(nn.Module):
    """A plan's forward as a module of its own: calling the plan would run what is being traced."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, *args: Any) -> Any:
        return self.plan.forward(*args)


class _Sent:
    """A plan as a worker holds it."""

    pointer = PointerPlan

    def __init__(self, plan: Plan, state: list[Any]) -> None:
        self.plan, self.state, self.tags = plan, state, plan.tags

    def there(self, location: VirtualWorker, args: Sequence[Any]) -> Any:
        graph = self.plan._graph(args)
        return run(lambda *values: _result(_execute(graph, [*values, *self.state])), args)

    def get(self) -> Plan:
        return self.plan


def _execute(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    values = dict(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        args, kwargs = substitute(node.args, values.__getitem__), substitute(node.kwargs, values.__getitem__)
        values[node.name] = operator_of(node.operator)(*args, **kwargs)
    return [values[name] for name in graph.outputs]


def _result(outputs: list[Any]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def func2plan(
    args_shape: Sequence[Sequence[int]] | None = None, state: Any = (), **_: Any
) -> Callable[[Callable[..., Any]], Plan]:
    """A decorator that turns a function of tensors into a plan.

    Args:
        args_shape: shapes of its arguments, -1 for any size: the plan is built at once. Else call `Plan.build`.
        state: tensors by name, or in order, that the function reads from its last argument.
    """

    def decorate(function: Callable[..., Any]) -> Plan:
        plan = Plan(function.__name__, function, state)
        if args_shape:
            plan.build(*(torch.zeros([1 if size < 0 else size for size in shape]) for shape in args_shape))
        return plan

    return decorate


class Protocol:
    """Plans that run one after the other, each at its worker.

    Args:
        plans: pairs of a worker, or a name that stands for one until `deploy`, and a plan.
    """

    pointer = PointerPlan

    def __init__(self, plans: Sequence[tuple[Any, Plan]]) -> None:
        self.plans, self.id, self.tags = list(plans), new_id(), set[str]()
        self._at: VirtualWorker | None = None

    def deploy(self, *workers: VirtualWorker) -> Protocol:
        """Put workers in the place of the names, in their order, and send each its plan."""
        names = list(dict.fromkeys(place for place, _ in self.plans if not isinstance(place, VirtualWorker)))
        if len(names) != len(workers):
            raise InputError(f"{len(workers)} workers for the names {', '.join(names) or '(none)'}: give one for each")
        placed = dict(zip(names, workers, strict=True))
        self.plans = [(placed.get(place, place), plan) for place, plan in self.plans]
        for worker, plan in self.plans:
            plan.send(worker)
        return self

    def run(self, *args: Any) -> Any:
        """Run the plans in turn; each result moves straight to the next worker.

        Returns:
            A pointer to the result at the last worker; where the protocol was sent to a worker that also holds the
            arguments, a pointer to that pointer.

        Raises:
            PlanError: it is not deployed.
        """
        if not all(isinstance(worker, VirtualWorker) for worker, _ in self.plans):
            raise PlanError("the protocol is not deployed: .deploy(alice, bob, …) it first")
        origin = next((one.location for one in args if isinstance(one, PointerTensor)), None)
        if origin is not None and origin is not self._at:
            raise PlanError(f"the protocol is not at {origin.id}: .send({origin.id}) it first")
        values = [one.get() if isinstance(one, PointerTensor) else one for one in args]
        results: Any = [PointerTensor(self.plans[0][0], self.plans[0][0].hold(cloned(one))) for one in values]
        for worker, plan in self.plans:
            moved = [one if one.location is worker else one.move(worker) for one in results]
            results = plan(*moved)
            results = list(results) if isinstance(results, tuple) else [results]
        return _result([one if origin is None else one.send(origin) for one in results])

    def send(self, worker: VirtualWorker) -> PointerPlan:
        """Put the protocol at a worker, to be run or found there."""
        self._at = worker
        return PointerPlan(worker, worker.hold(self))

    def get(self) -> Protocol:
        """The protocol itself, back from its worker."""
        self._at = None
        return self

    def tag(self, *tags: str) -> Protocol:
        """Give it names to search it by."""
        self.tags |= set(tags)
        return self

    def __repr__(self) -> str:
        lines = (f"\n - {getattr(worker, 'id', worker)}: {plan!r}" for worker, plan in self.plans)
        return f"<Protocol id:{self.id} owner:{local_worker.id}>" + "".join(lines)
