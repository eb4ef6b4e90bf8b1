"""A GPU where there is none: tensors that say they are on `cuda:0`, computed on the CPU.

As on a GPU, these are errors: tensors of two devices in one call, a random generator of the other device, `numpy()` of what is
on the GPU. What is cast to bfloat16 there is cast here. Kernels and memory are not tested by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FREE = (Tensor.copy_, Tensor.data.__set__, torch._has_compatible_shallow_copy_type)  # may see both devices


class PretendedGenerator(torch._C.Generator):
    """Knows the device that it was made for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_gpu = torch.device(device).type == "cuda"
        return made


class PretendedAutocast(torch.autocast):
    """Multiplies in what the GPU would multiply in."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type.replace("cuda", "cpu"), *args, **kwargs)


class PretendedGPU(TorchFunctionMode):
    """Knows which storages are on the GPU, and sees every call of torch from Python."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, StorageWeakRef] = {}
        self._own = {
            Tensor.device.__get__: lambda t: GPU if self.on_gpu(t) else CPU,
            Tensor.is_cuda.__get__: self.on_gpu,
            Tensor.cpu: lambda t, *_, **__: self.moved(t, CPU),
            Tensor.cuda: lambda t, *_, **__: self.moved(t, GPU),
            Tensor.to: self.to,
            Tensor.numpy: self.numpy,
            Tensor.__array__: self.numpy,
            Tensor.pin_memory: lambda t, *_: t,
        }

    def on_gpu(self, t: Tensor) -> bool:
        held = self._held.get(t.untyped_storage()._cdata)
        return held is not None and not held.expired()

    def placed(self, t: Tensor, gpu: bool) -> Tensor:
        """The tensor, whose storage is said to be there."""
        storage = t.untyped_storage()
        if gpu:
            self._held[storage._cdata] = StorageWeakRef(storage)
        else:
            self._held.pop(storage._cdata, None)
        if len(self._held) > 50_000:
            self._held = {key: held for key, held in self._held.items() if not held.expired()}
        return t

    def moved(self, t: Tensor, device: torch.device) -> Tensor:
        gpu = device.type == "cuda"
        return t if self.on_gpu(t) == gpu else self.placed(t.clone(), gpu)

    def to(self, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        said = [*args, kwargs.get("device"), kwargs.get("dtype")]
        for other in filter(torch.is_tensor, args):
            said += [GPU if self.on_gpu(other) else CPU, other.dtype]
        devices = [part for part in said if isinstance(part, (str, torch.device))]
        dtypes = [part for part in said if isinstance(part, torch.dtype)]
        if devices and torch.device(devices[0]).type not in ("cpu", "cuda"):
            return t.to(*args, **kwargs)
        gpu, cast = self.on_gpu(t), t.to(dtypes[0] if dtypes else t.dtype, copy=kwargs.get("copy", False))
        cast = cast if cast is t else self.placed(cast, gpu)
        return self.moved(cast, torch.device(devices[0])) if devices else cast

    def numpy(self, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.on_gpu(t):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return t.numpy(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._own:
            return self._own[func](*args, **kwargs)
        named = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if named not in (None, "cpu", "cuda"):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        gpu = any(map(self.on_gpu, tensors)) if named is None else named == "cuda"
        self.check(func, args, tensors)
        if getattr(kwargs.get("generator"), "on_gpu", gpu) != gpu:
            raise RuntimeError(f"{func.__name__}: the generator is on another device")
        if named is not None:
            kwargs["device"] = "cpu"
        known = {t.untyped_storage()._cdata for t in tensors}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self.placed(leaf, gpu)
        return result

    def check(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Raises RuntimeError for tensors of two devices; scalars, copies, and indices into a GPU's tensor are free."""
        if func in FREE or not any(map(self.on_gpu, tensors)):
            return
        if func in (Tensor.__getitem__, Tensor.__setitem__) and self.on_gpu(args[0]):
            picks = any(map(torch.is_tensor, tree_leaves(args[1])))
            tensors = [t for t in args[2:] if picks and torch.is_tensor(t)]
        apart = [tuple(t.shape) for t in tensors if t.dim() and not self.on_gpu(t)]
        if apart:
            raise RuntimeError(f"{func.__name__}: expected all tensors on cuda:0, found {apart} on the CPU")


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Inside, torch finds one GPU."""
    state = torch.zeros(16, dtype=torch.uint8)
    found: dict[str, Any] = dict(is_available=True, is_initialized=True, device_count=1, current_device=0)
    found |= dict(is_bf16_supported=True, get_rng_state=state, get_rng_state_all=[state], get_device_capability=(8, 0))
    found["get_device_properties"] = SimpleNamespace(major=8, minor=0, total_memory=2**34, name="pretended")
    silent = "_lazy_init set_device empty_cache synchronize set_rng_state manual_seed manual_seed_all".split()
    fakes = {name: mock.Mock(return_value=found.get(name)) for name in (*found, *silent)}
    types = {"Generator": PretendedGenerator, "autocast": PretendedAutocast}
    with mock.patch.multiple(torch.cuda, **fakes), mock.patch.multiple(torch, **types), PretendedGPU() as mode:
        yield mode
