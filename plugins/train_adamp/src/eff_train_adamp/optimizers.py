"""AdamP and SGDP as torch optimizers (Heo et al., ICLR 2021, arXiv:2006.08217).

AdamP, with gradient g, moments m and v, step t:

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    u = m / (sqrt(v) / sqrt(1 - b2^t) + eps)                    Nesterov: b1 m + (1 - b1) g instead of m
    (u, r) = projection of u (see eff_kernels.adamp_step.projection); r = wd_ratio where it applied, else 1
    w <- w (1 - lr weight_decay r) - lr / (1 - b1^t) u

SGDP, with momentum buffer b from zero:

    b <- momentum b + (1 - dampening) g
    u = b                                                       Nesterov: g + momentum b
    (u, r) = projection of u
    w <- w (1 - lr weight_decay r / (1 - momentum)) - lr u

Without Nesterov u *is* b, so the projection also acts on the stored momentum: that is what the reference code
(clovaai/AdamP, MIT) does, in place. Biases and other weights of one dimension are never projected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from eff.errors import RunError
from eff_kernels.adamp_step import adamp_step_
from eff_kernels.adamp_step.cpu import portions
from eff_kernels.adamp_step.projection import project_and_decay_, subtract_

_HALF = (torch.float16, torch.bfloat16)


class GradientError(RunError):
    """A gradient cannot be used; `parameter` is whose it is."""

    def __init__(self, parameter: Tensor, name: str, fault: str):
        super().__init__(f"the gradient of {name} {fault}")
        self.parameter = parameter
        self.fault = fault

    def of(self, name: str) -> GradientError:
        """Return the same with the parameter's name."""
        return GradientError(self.parameter, f"'{name}'", self.fault)


class _Projected(Optimizer):
    """What both share: checks, the closure, and the walk over groups."""

    check_finite: bool

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.check_finite and not torch.compiler.is_compiling():
            self._check_gradients()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _used(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the parameters that have a gradient."""
        used = [parameter for parameter in group["params"] if parameter.grad is not None and parameter.numel()]
        for parameter in used:
            if parameter.grad.is_sparse:
                raise GradientError(parameter, self._name(parameter), "is sparse; make the layer with sparse=False")
        return used

    def _check_gradients(self) -> None:
        """Raise before anything is changed where a gradient holds NaN or infinity."""
        gradients = [
            parameter.grad
            for group in self.param_groups
            for parameter in self._used(group)
            if parameter.grad is not None
        ]
        norms: dict[torch.device, list[Tensor]] = {}
        for norm in torch._foreach_norm(gradients) if gradients else ():
            norms.setdefault(norm.device, []).append(norm.float())
        if all(bool(torch.stack(of_device).isfinite().all()) for of_device in norms.values()):
            return
        for group in self.param_groups:
            for parameter in self._used(group):
                if parameter.grad is not None and not parameter.grad.isfinite().all():
                    raise GradientError(
                        parameter, self._name(parameter), "holds NaN or infinity; try a smaller --lr, or clip_norm"
                    )

    def _name(self, parameter: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is parameter:
                    names = group.get("param_names")
                    shape = tuple(parameter.shape)
                    return f"'{names[index]}'" if names else f"parameter {index} of group {number}, shape {shape},"
        raise AssertionError("not a parameter of this optimizer")


class AdamP(_Projected):
    """Adam with the projection.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor.
        betas: decay of the first and second moment, in [0, 1).
        eps: added to the root of the second moment; smallest norm in the projection.
        weight_decay: decoupled, >= 0.
        delta: a cosine below delta / sqrt(row length) counts as scale invariance.
        wd_ratio: share of the weight decay on scale-invariant weights, in [0, 1].
        nesterov: Nesterov momentum.
        check_finite: raise `GradientError` on NaN and infinity, which waits for the device once a step; not in a
            compiled step.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        check_finite: bool = True,
    ):
        _check_shared(lr, weight_decay, delta, wd_ratio, eps)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two values in [0, 1), got {betas}")
        self.check_finite = check_finite
        super().__init__(
            params,
            {
                "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "delta": delta,
                "wd_ratio": wd_ratio, "nesterov": nesterov,
            },
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take states of the reference code too, which counts steps in plain numbers."""
        super().__setstate__(state)
        for of_parameter in self.state.values():
            if "step" in of_parameter and not isinstance(of_parameter["step"], Tensor):
                of_parameter["step"] = torch.tensor(float(of_parameter["step"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what `closure` does, which runs with gradients enabled.

        Raises:
            GradientError: a gradient is sparse, or holds NaN or infinity; nothing was changed.
        """
        return self._step(closure)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> bool:
        """Fill the lists; the name and the form are those that torch.compile knows from torch's optimizers."""
        for parameter in self._used(group):
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            params.append(parameter)
            grads.append(parameter.grad)  # type: ignore[arg-type]
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])
        return False

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, steps)
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")}
        _apply(adamp, [params, grads, exp_avgs, exp_avg_sqs, steps], options)


class SGDP(_Projected):
    """SGD with momentum and the projection.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate.
        momentum: in [0, 1).
        dampening: share of the gradient that does not enter the momentum, also on the first step (unlike torch's
            SGD), in [0, 1].
        weight_decay: decoupled, divided by (1 - momentum); >= 0.
        nesterov: Nesterov momentum.
        eps: smallest norm in the projection.
        delta, wd_ratio, check_finite: as for `AdamP`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        check_finite: bool = True,
    ):
        _check_shared(lr, weight_decay, delta, wd_ratio, eps)
        if not 0 <= momentum < 1:  # the weight decay is divided by 1 - momentum
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 <= dampening <= 1:
            raise ValueError(f"dampening must be in [0, 1], got {dampening}")
        self.check_finite = check_finite
        super().__init__(
            params,
            {
                "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                "nesterov": nesterov, "eps": eps, "delta": delta, "wd_ratio": wd_ratio,
            },
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what `closure` does, which runs with gradients enabled.

        Raises:
            GradientError: a gradient is sparse, or holds NaN or infinity; nothing was changed.
        """
        return self._step(closure)

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
    ) -> bool:
        """Fill the lists; the name and the form are those that torch.compile knows from torch's optimizers."""
        for parameter in self._used(group):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            params.append(parameter)
            grads.append(parameter.grad)  # type: ignore[arg-type]
            buffers.append(state["momentum"])
        return False

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor] = []
        self._init_group(group, params, grads, buffers)
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "eps", "delta", "wd_ratio")
        _apply(sgdp, [params, grads, buffers], {key: group[key] for key in names})


def adamp(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
) -> None:
    """Do one step of AdamP on tensors of one device and dtype, in place."""
    lr = _rate(lr)
    torch._foreach_add_(steps, 1)
    # Compiled, the counts stay tensors: as numbers they would compile every step anew.
    counts: list[Any] = steps if torch.compiler.is_compiling() else [step.item() for step in steps]
    adamp_step_(
        params, grads, exp_avgs, exp_avg_sqs, counts, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, delta=delta,
        wd_ratio=wd_ratio, nesterov=nesterov,
    )  # fmt: skip


def sgdp(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    eps: float,
    delta: float,
    wd_ratio: float,
) -> None:
    """Do one step of SGDP on tensors of one device and dtype, in place; 16-bit tensors are computed with in float32."""
    lr = _rate(lr)
    for portion in portions(params):
        lists = [[tensors[index] for index in portion] for tensors in (params, grads, buffers)]
        is_half = params[0].dtype in _HALF
        w, g, b = [[tensor.float() for tensor in tensors] for tensors in lists] if is_half else lists
        torch._foreach_mul_(b, momentum)
        torch._foreach_add_(b, g, alpha=1 - dampening)
        # Without Nesterov the buffers themselves are projected, as in the reference code.
        updates = list(torch._foreach_add(g, b, alpha=momentum)) if nesterov else b
        project_and_decay_(updates, w, g, lr * weight_decay / (1 - momentum), delta, wd_ratio, eps)
        subtract_(w, updates, [lr] * len(w))
        if is_half:
            torch._foreach_copy_(lists[0], w)
            torch._foreach_copy_(lists[2], b)


def _rate(lr: float | Tensor) -> float | Tensor:
    """Return the rate as a number; compiled, as a tensor.

    A graph with the number itself is made anew for each rate, or, by inductor in torch 2.13, computes the decay of
    one-dimensional weights with a stale one.
    """
    if torch.compiler.is_compiling():
        return lr if isinstance(lr, Tensor) else lr * torch.ones((), dtype=torch.float64)
    return lr.item() if isinstance(lr, Tensor) else lr


def _apply(function: Callable[..., None], lists: list[list[Tensor]], options: dict[str, Any]) -> None:
    """Call `function` on what is alike in device and dtype.

    Args:
        function: changes its tensors in place, except the gradients, which are the second list.
        lists: parallel lists, the parameters first.
        options: further arguments.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, parameter in enumerate(lists[0]):
        kinds.setdefault((parameter.device, parameter.dtype), []).append(index)
    for indices in kinds.values():
        function(*([tensors[index] for index in indices] for tensors in lists), **options)


def _check_shared(lr: float | Tensor, weight_decay: float, delta: float, wd_ratio: float, eps: float) -> None:
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:  # so that NaN is refused too
            raise ValueError(f"{name} must be at least 0, got {value}")
    for name, value in (("delta", delta), ("eps", eps)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if not 0 <= wd_ratio <= 1:
        raise ValueError(f"wd_ratio must be in [0, 1], got {wd_ratio}")
