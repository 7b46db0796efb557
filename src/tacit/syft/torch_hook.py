"""`TorchHook`: the vocabulary as methods of PyTorch's own tensors, modules, optimizers and datasets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from tacit.errors import InputError
from tacit.remote import PointerParameter, PointerTensor, VirtualWorker, cloned, local_worker, run
from tacit.remote_data import federate
from tacit.syft import encrypted


def send(value: Tensor, *workers: VirtualWorker, **_: Any) -> PointerTensor:
    """A copy of the tensor at a worker, and the pointer to it."""
    if len(workers) != 1:
        raise InputError(f"{len(workers)} workers: a tensor goes to one; send a .copy() to each other one")
    return PointerTensor(workers[0], workers[0].hold(cloned(value)))


def get(value: Tensor, **_: Any) -> Tensor:
    """Refuse: there is nothing to get."""
    raise InputError("this tensor is local already: .get() is for pointers and shared tensors")


def tag(value: Any, *tags: str) -> Any:
    """Give an object names to search it by."""
    value.tags = getattr(value, "tags", set()) | set(tags)
    return value


def describe(value: Any, description: str) -> Any:
    """Give an object a description, which a search also looks through."""
    value.description = description
    return value


def private_tensor(value: Tensor, allowed_users: Iterable[str]) -> Tensor:
    """Let only these users `.get()` the tensor and what is computed from it."""
    value.allowed_users = frozenset(allowed_users)  # type: ignore[attr-defined]
    return value


def send_module(module: nn.Module, worker: VirtualWorker) -> nn.Module:
    """Move a module's parameters, gradients and buffers to a worker; the module itself now runs there."""
    worker.check()

    def go(value: Tensor) -> Tensor:
        if isinstance(value, PointerTensor):
            raise InputError(f"the module is at {value.location.id} already: .get() it first, or .move({worker.id})")
        if not isinstance(value, nn.Parameter):
            return send(value, worker)
        PointerParameter.depart(value, worker)
        return value

    _each(module, go).location = worker  # type: ignore[assignment]
    return module


def get_module(module: nn.Module, **_: Any) -> nn.Module:
    """Take the parameters, gradients and buffers back; private ones are put together."""
    remote = (PointerTensor, encrypted.SharedTensor)
    vars(module).pop("location", None)
    return _each(module, lambda value: _plain(value.get()) if isinstance(value, remote) else value)


def move_module(module: nn.Module, worker: VirtualWorker) -> nn.Module:
    """Send the parameters from their worker straight to another one."""
    module.location = worker  # type: ignore[assignment]
    return _each(module, lambda value: value.move(worker) if isinstance(value, PointerTensor) else value)


def share_module(module: nn.Module, *workers: VirtualWorker, **options: Any) -> nn.Module:
    """Share a module's parameters in place, from where they are; see `tacit.syft.encrypted.share_in_place`."""
    if not getattr(module, "_is_fixed_precision", False):
        raise InputError("floats cannot be shared as they are: write model.fix_precision().share(…)")
    if not options.get("requires_grad"):
        _fold(module)
    if not any(isinstance(value, PointerTensor) for value in module.parameters()):
        return encrypted.share_in_place(module, *workers, **options)

    def there(value: Tensor) -> Tensor:
        holder = nn.Module()
        holder.value = nn.Parameter(value, False) if value.is_floating_point() else value
        return encrypted.share_in_place(holder, *workers, **options).value  # type: ignore[return-value]

    return _each(module, lambda value: run(there, (value,)))


def _fold(module: nn.Module) -> None:
    """Put the running statistics of batch norms into their weights, where these are: no root is taken in secret."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and norm.running_var is not None:
            if norm.training or "running_var" not in norm._buffers:
                continue
            with torch.no_grad():
                norm.weight.mul_((norm.running_var + norm.eps).rsqrt())
                norm.bias.sub_(norm.weight * cast(Tensor, norm.running_mean))
            for name, value in (("running_mean", 0.0), ("running_var", 1 - norm.eps)):
                del norm._buffers[name]
                vars(norm)[name] = torch.full((norm.num_features,), value)


def fix_module(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    """Let the module be shared: its parameters are then held to 2^-24, whatever precision is asked for."""
    module._is_fixed_precision = True  # type: ignore[assignment]
    return module


def encrypt_module(
    module: nn.Module, protocol: str = "mpc", workers: Iterable[VirtualWorker] = (), **options: Any
) -> nn.Module:
    """`fix_precision` and `share` in one."""
    return share_module(fix_module(module), *workers, protocol=protocol, **options)


def itself(value: Any, *_: Any, **__: Any) -> Any:
    """The object as it is: there is nothing to do."""
    return value


def _each(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Change every parameter and buffer, a shared one once."""
    changed: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (cast(dict[str, Any], part._parameters), cast(dict[str, Any], part._buffers)):
            for name, value in table.items():
                if value is not None and id(value) not in changed:
                    trained, new = value.requires_grad, change(value)
                    local = not isinstance(new, (PointerTensor, nn.Parameter)) and table is part._parameters
                    changed[id(value)] = nn.Parameter(new, trained) if local else new
                table[name] = changed.get(id(value), value)
    return module


def _plain(value: Any) -> Any:
    return value.float_precision() if isinstance(value, encrypted.FixedTensor) else value


class TorchHook:
    """Installs the vocabulary on PyTorch; `unhook` takes it away again.

    Args:
        torch: the module; there is one.

    Installing twice changes nothing more. Names that PyTorch has are never replaced.
    """

    METHODS: ClassVar[dict[type, dict[str, Any]]] = {
        Tensor: {
            "send": send,
            "get": get,
            "copy": cloned,
            "tag": tag,
            "describe": describe,
            "private_tensor": private_tensor,
            "share": encrypted.share,
            "encrypt": encrypted.encrypt,
            "decrypt": encrypted.float_precision,
            **dict.fromkeys(("fix_precision", "fix_prec"), encrypted.fix_precision),
            **dict.fromkeys(("float_precision", "float_prec"), encrypted.float_precision),
        },
        nn.Module: {
            "send": send_module,
            "get": get_module,
            "move": move_module,
            "copy": copy.deepcopy,
            "share": share_module,
            "encrypt": encrypt_module,
            "decrypt": get_module,
            **dict.fromkeys(("fix_precision", "fix_prec"), fix_module),
            **dict.fromkeys(("float_precision", "float_prec"), itself),
        },
        Optimizer: dict.fromkeys(("fix_precision", "fix_prec"), itself),
        Dataset: {"federate": federate},
    }

    installed: ClassVar[Any] = None
    """The hook made last."""

    def __init__(self, torch: Any = torch, is_client: bool = True, verbose: bool = True, **_: Any) -> None:
        self.torch, self.local_worker = torch, local_worker
        TorchHook.installed = self
        for kind, name, method in self._methods():
            if not hasattr(kind, name):
                setattr(kind, name, method)

    def unhook(self) -> None:
        """Leave PyTorch as it was found."""
        for kind, name, method in self._methods():
            if vars(kind).get(name) is method:
                delattr(kind, name)

    def _methods(self) -> Iterator[tuple[type, str, Any]]:
        for kind, methods in self.METHODS.items():
            for name, method in methods.items():
                yield kind, name, method
