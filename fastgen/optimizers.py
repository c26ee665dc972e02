"""Optimizers by name, with what each takes, and their states as plain tensors.

A name stands for an algorithm in one library's form. What it has no use for, such as ``betas`` for plain gradient
descent, is an error rather than nothing; what it is not given are the library's own defaults.

Where torch has a kernel that does a whole update in one pass over the weights, it is that one; which optimizers have
one depends on the device and on torch (2.11 has none of Adagrad for CUDA). Elsewhere it is torch's choice: on CUDA one
kernel for many tensors, on a CPU one tensor after the other. Of the emoji teacher's U-Net (9.5 M parameters in 286
tensors, one thread) AdamW's step took 14 ms in one pass, 45 ms tensor by tensor and 50 ms by ``foreach``, and no other
optimizer was faster by ``foreach`` either.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import parallel
from .config import option, suggest

Make = Callable[[list[nn.Parameter], dict[str, Any]], torch.optim.Optimizer]
"""(parameters, settings) -> the optimizer; settings: lr and what its ``Kind`` takes."""


@dataclass(frozen=True)
class Kind:
    """What a name stands for.

    Attributes:
        make: makes one. Raises ImportError without its package, AttributeError in one that is too old for it.
        defaults: the options that it takes besides lr, and what they are if not given.
        needs: what to install, or else update.
        moments: of an optimizer that is not torch's own: how many numbers it keeps for each of a parameter's, and
            bytes of each; in four where the parameter has fewer than 4096. Scales of a block come on top.
    """

    make: Make
    defaults: Mapping[str, Any]
    needs: str
    moments: tuple[int, float] = (0, 0.0)

    @property
    def is_torch(self) -> bool:
        """Whether it is torch's own."""
        return not self.moments[0]


def _of(module: str, name: str, **fixed: Any) -> Make:
    """Of a library's class. fixed: what all are told."""

    def make(parameters: list[nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(parameters, **fixed, **settings)
        return made

    return make


def _one_pass(name: str) -> Make:
    """Of torch's own class, by its kernel for whole updates where there is one for the parameters' device."""

    def make(parameters: list[nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
        kind: Any = getattr(torch.optim, name)
        # not False, which would also keep torch from taking one kernel for many tensors
        made: torch.optim.Optimizer = kind(parameters, fused=_fuses(kind, parameters) or None, **settings)
        return made

    return make


def _fuses(kind: Any, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether torch has such a kernel: some optimizers say what they cannot when they are made, others in a step."""
    probe = nn.Parameter(torch.zeros(1, device=parameters[0].device, dtype=parameters[0].dtype))
    probe.grad = torch.zeros_like(probe)
    try:
        kind([probe], lr=0.1, fused=True).step()
    except RuntimeError:
        return False
    return True


class Muon(torch.optim.Optimizer):
    """torch's Muon for weights that are matrices, and AdamW for all others, which it does not take.

    Its update is scaled to be as large as AdamW's (Liu et al. 2025, arXiv 2502.16982), so one rate serves both.
    Embeddings and last layers are matrices, too; the paper leaves them to AdamW, which cannot be told by their shape.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: Mapping[str, Any]) -> None:
        """settings: lr, weight_decay and momentum. Raises AttributeError if torch has no Muon."""
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        shared = {name: settings[name] for name in ("lr", "weight_decay")}
        muon, momentum = torch.optim.Muon, settings["momentum"]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts += [muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **shared)]
        if others:
            self.parts += [_one_pass("AdamW")(others, shared)]
        super().__init__(parameters, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both."""
        for part in self.parts:
            part.step(closure)


_TORCH = "torch.optim"
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_DECOUPLED = {**_ADAM, "weight_decay": 0.01}
_LION = {"betas": (0.9, 0.99), "weight_decay": 0.0}
_BNB, _AO = "bitsandbytes.optim", "torchao.optim"
_GET_TORCH = "a newer torch: pip install -U torch"
_GET_BNB = "bitsandbytes; pip install 'fastgen-diffusion[8bit]'"
_GET_AO = "torchao; pip install torchao"

KINDS: Mapping[str, Kind] = {
    "adamw": Kind(_one_pass("AdamW"), _DECOUPLED, _GET_TORCH),
    "adam": Kind(_one_pass("Adam"), _ADAM, _GET_TORCH),
    "adamax": Kind(_of(_TORCH, "Adamax"), _ADAM, _GET_TORCH),
    "nadam": Kind(_of(_TORCH, "NAdam", decoupled_weight_decay=True), _ADAM, _GET_TORCH),
    "radam": Kind(_of(_TORCH, "RAdam", decoupled_weight_decay=True), _ADAM, _GET_TORCH),
    "adagrad": Kind(_one_pass("Adagrad"), {"eps": 1e-10, "weight_decay": 0.0}, _GET_TORCH),
    "adafactor": Kind(_of(_TORCH, "Adafactor"), {"weight_decay": 0.0}, _GET_TORCH),
    "rmsprop": Kind(_of(_TORCH, "RMSprop"), {"eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0}, _GET_TORCH),
    "sgd": Kind(_one_pass("SGD"), {"weight_decay": 0.0, "momentum": 0.0}, _GET_TORCH),
    "muon": Kind(Muon, {"weight_decay": 0.1, "momentum": 0.95}, _GET_TORCH),
    "adamw8bit": Kind(_of(_BNB, "AdamW8bit"), _DECOUPLED, _GET_BNB, (2, 1.0)),
    "paged_adamw": Kind(_of(_BNB, "PagedAdamW"), _DECOUPLED, _GET_BNB, (2, 4.0)),
    "paged_adamw8bit": Kind(_of(_BNB, "PagedAdamW8bit"), _DECOUPLED, _GET_BNB, (2, 1.0)),
    "lion": Kind(_of(_BNB, "Lion"), _LION, _GET_BNB, (1, 4.0)),
    "lion8bit": Kind(_of(_BNB, "Lion8bit"), _LION, _GET_BNB, (1, 1.0)),
    "paged_lion8bit": Kind(_of(_BNB, "PagedLion8bit"), _LION, _GET_BNB, (1, 1.0)),
    "torchao_adamw8bit": Kind(_of(_AO, "AdamW8bit"), _DECOUPLED, _GET_AO, (2, 1.0)),
    "torchao_adamw4bit": Kind(_of(_AO, "AdamW4bit"), _DECOUPLED, _GET_AO, (2, 0.5)),
    "torchao_adamwfp8": Kind(_of(_AO, "AdamWFp8"), _DECOUPLED, _GET_AO, (2, 1.0)),
}
"""Those of bitsandbytes and torchao hold their moments in fewer bits, or in memory that pages out to the host."""

OF_MATRICES = ("muon", "adafactor")
"""Those whose update of a number depends on the other numbers of its matrix."""

OPTIONS = ("betas", "weight_decay", "eps", "momentum")
"""Fields of ``Optim`` that some optimizers take and others do not."""


@dataclass(frozen=True)
class Optim:
    """The optimizer of one role. An own option of an optimizer that is not given is its default; None: it has none."""

    lr: float = option(1e-5, "learning rate after warm-up", above=0)
    name: str = option("adamw", "adamw, adam, sgd, muon ...; an unknown name is answered with all of them")
    betas: tuple[float, float] | None = option(
        None, "decay of the first and second moment; null: the optimizer's own", low=0, below=1
    )
    weight_decay: float | None = option(None, "null: the optimizer's own, of adamw 0.01", low=0)
    eps: float | None = option(None, "added to the denominator; null: the optimizer's own", above=0)
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "how lr goes on after warm-up")
    warmup: int = option(0, "steps over which lr rises from 0", low=0)
    clip: float = option(10.0, "largest gradient norm; 0 is off", low=0)
    momentum: float | None = option(None, "of sgd, rmsprop and muon; null: the optimizer's own", low=0, below=1)

    def __post_init__(self) -> None:
        """Take the optimizer's own defaults. Raises ValueError for an unknown one, or an option that it has not."""
        if self.name not in KINDS:
            raise ValueError(f"unknown optimizer {self.name!r}{suggest(self.name, KINDS)}")
        defaults = KINDS[self.name].defaults
        for name in OPTIONS:
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, defaults.get(name))
            elif name not in defaults:
                raise ValueError(
                    f"optimizer {self.name!r} has no {name}, got {value}; leave it out or set it null (it takes "
                    f"{', '.join(['lr', *defaults])})"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What the optimizer is told."""
        return {"lr": self.lr, **{name: getattr(self, name) for name in KINDS[self.name].defaults}}

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step number ``step`` (from 0) in a run of ``steps``."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        fall = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.lr * fall[self.schedule]


def make(config: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of these parameters. Raises ValueError if its package is missing, too old or not for this device.

    One that is not torch's own is tried on a small parameter first, since it says no sooner what it cannot do.
    """
    kind, parameters = KINDS[config.name], list(parameters)
    try:
        if not kind.is_torch:
            probe = nn.Parameter(torch.zeros(2, 4096, device=parameters[0].device))
            tried = kind.make([probe], config.settings)
            probe.grad = torch.zeros_like(probe)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Paged optimizers are not supported")
                tried.step()
            tensors(tried, {"probe": probe})
        return kind.make(parameters, config.settings)
    except (ImportError, AttributeError):
        raise ValueError(f"optimizer {config.name!r} needs {kind.needs}") from None
    except (RuntimeError, NotImplementedError, UserWarning) as error:
        reason = str(error).strip().split("\n")[0]
        device = parameters[0].device.type
        raise ValueError(f"optimizer {config.name!r} does not work on {device} ({reason}); use adamw") from None


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let its next step have this rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step for one, to be changed in place
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def divide(
    optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], divisor: Tensor, *, at_once: bool = False
) -> None:
    """Divide its gradients by a number: within its next step if that makes one pass of all, or else at once.

    at_once: in any case, since a scaler of losses has its own use for the number that a step divides by (torch 2.4's
    forgets any other).
    """
    if optimizer.defaults.get("fused") and not at_once and not any(map(parallel.is_sharded, gradients)):
        vars(optimizer)["grad_scale"] = divisor.float()  # what torch's kernels divide by; they read it as float32
    else:
        torch._foreach_div_([parallel.local(g) for g in gradients], divisor)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Drop its gradients, and the number that its last step divided them by."""
    optimizer.zero_grad(set_to_none=True)
    vars(optimizer).pop("grad_scale", None)


def tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Its states as plain tensors, "<parameter>:<state>", none sharing memory with another; names: of its parameters.

    A number becomes a tensor without dimensions. A quantised tensor becomes those that it consists of,
    "<parameter>:<state>.<part>". One that is sharded over processes stays as it is. Raises ValueError for a state
    that is none of these.
    """
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, p in names.items():
        for key, value in _parts(optimizer, p):
            if not isinstance(value, Tensor):
                found[f"{name}:{key}"] = torch.tensor(value)
            elif parallel.is_sharded(value):
                found[f"{name}:{key}"] = value
            else:
                storage = value.untyped_storage()._cdata
                found[f"{name}:{key}"] = value.clone() if storage in storages else value
                storages.add(storage)
    return found


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], found: Mapping[str, Tensor]) -> None:
    """Give it the states that ``tensors`` gave. Call it before the parameters themselves are restored.

    The optimizer makes states of its own kind in a step at rate 0 without gradient, which are then filled: so each is
    where the optimizer wants it and of the type that it wants. Gradients are dropped. Raises ValueError, before any is
    filled, if the states are another optimizer's.
    """
    stepped = {key.rpartition(":")[0] for key in found}
    rate = float(optimizer.param_groups[0]["lr"])
    for name, p in names.items():
        p.grad = torch.zeros_like(p) if name in stepped else None
    set_lr(optimizer, 0.0)
    optimizer.step()
    set_lr(optimizer, rate)
    for name, p in names.items():
        p.grad = None
        if name not in stepped:
            optimizer.state.pop(p, None)
    places = {f"{name}:{key}": (p, key, value) for name, p in names.items() for key, value in _parts(optimizer, p)}
    for key in sorted(found.keys() ^ places.keys()):
        wrong = "has no place" if key in found else "is missing"
        raise ValueError(f"the state {key!r} of {type(optimizer).__name__} {wrong}; it is of another optimizer")
    for name, (p, key, value) in places.items():
        if isinstance(value, Tensor):
            value.copy_(found[name])
        else:
            optimizer.state[p][key] = type(value)(found[name].item())


def _parts(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> Iterator[tuple[str, Any]]:
    """The states of a parameter, by name, as tensors and numbers. Raises ValueError for anything else."""
    for key, value in optimizer.state.get(p, {}).items():
        if isinstance(value, Tensor) and type(value) is not Tensor and not parallel.is_sharded(value):
            whole: Any = value
            for part in whole.__tensor_flatten__()[0]:
                yield f"{key}.{part}", getattr(value, part)
        elif isinstance(value, Tensor | int | float):
            yield key, value
        elif value is not None:
            raise ValueError(
                f"{type(optimizer).__name__} keeps a {type(value).__name__} as its state {key!r}, which no checkpoint "
                "holds; use adamw"
            )
