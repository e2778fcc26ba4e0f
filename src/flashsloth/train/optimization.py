"""Optimisers with a learning rate per part, and schedules that can follow the clock."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .freeze import part_of
from .recipe import StageRecipe

# Embeddings and heads are lookup tables, not maps between hidden spaces; Muon's update does not suit them.
_TABLE_NAMES = ("embed", "lm_head", "query_tokens")


def cosine(position: float, stage: StageRecipe) -> float:
    if position < stage.warmup:
        return position / stage.warmup
    share = (position - stage.warmup) / max(1 - stage.warmup, 1e-12)
    return stage.final_learning_rate + (1 - stage.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * share))


def warmup_stable_decay(position: float, stage: StageRecipe) -> float:
    if position < stage.warmup:
        return position / stage.warmup
    if position < 1 - stage.decay:
        return 1.0
    share = (1 - position) / max(stage.decay, 1e-12)
    return stage.final_learning_rate + (1 - stage.final_learning_rate) * share


def constant(position: float, stage: StageRecipe) -> float:
    return position / stage.warmup if position < stage.warmup else 1.0


SCHEDULES: dict[str, Callable[[float, StageRecipe], float]] = {
    "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
    "constant": constant,
}


def first_rank_value(value: float) -> float:
    """The value of the first process: clocks differ, but rates and decisions that follow them must not."""
    if PartialState._shared_state == {} or PartialState().num_processes == 1:
        return value
    return float(broadcast(torch.tensor(value, dtype=torch.float64, device=PartialState().device)))


class ProgressScheduler(LRScheduler):
    """Learning rate as a function of the share of the stage that is over.

    The share is that of the steps, or of the wall-clock budget when the stage has one, whichever is further. The time
    used is part of the state, so that a resumed stage spends only what is left.

    Args:
        total_steps: steps of the stage, None when only the clock ends it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stage: StageRecipe, total_steps: int | None) -> None:
        self.stage = stage
        self.total_steps = total_steps
        self.budget_seconds = None if stage.max_minutes is None else 60 * stage.max_minutes
        self.elapsed_seconds = 0.0
        self._clock = time.monotonic()
        super().__init__(optimizer)

    @property
    def progress(self) -> float:
        """Share of the stage that is over, 0 to 1."""
        shares = [0.0]
        if self.total_steps is not None:
            # neither the first nor the last step is taken at a rate of zero
            shares.append((self.last_epoch + 1) / (self.total_steps + 1))
        if self.budget_seconds is not None:
            shares.append(self.elapsed_seconds / self.budget_seconds)
        return min(1.0, max(shares))

    @property
    def is_over(self) -> bool:
        """Whether the wall-clock budget is used up."""
        return self.budget_seconds is not None and self.elapsed_seconds >= self.budget_seconds

    def get_lr(self) -> list[float]:
        now = time.monotonic()
        self.elapsed_seconds = first_rank_value(self.elapsed_seconds + now - self._clock)
        self._clock = now
        factor = SCHEDULES[self.stage.schedule](self.progress, self.stage)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_epoch": self.last_epoch,
            "elapsed_seconds": self.elapsed_seconds,
            "step_count": self._step_count,
            "last_lr": [float(rate) for rate in self._last_lr],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self.elapsed_seconds = state_dict["elapsed_seconds"]
        self._step_count = state_dict["step_count"]
        self._last_lr = state_dict["last_lr"]
        self._clock = time.monotonic()


# Coefficients of the quintic iteration that drives singular values towards 1 (Jordan et al., 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_NRC: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Replace each matrix by (about) the nearest one with orthonormal rows or columns.

    Args:
        matrices_NRC: (N, R, C) matrices of one shape, computed together.
        dtype: precision of the iteration. bfloat16 is enough, and slow where a processor has to emulate it.
    """
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = (matrices_NRC.mT if is_tall else matrices_NRC).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the matrices between hidden spaces.

    The update is scaled to the size of AdamW's, so that learning rates carry over (arXiv 2502.16982). Matrices of one
    shape are computed together.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, group, 0.2 * max(shape) ** 0.5)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any], scale: float) -> None:
        gradients = [parameter.grad for parameter in parameters]
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momenta.append(state["momentum"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalise(torch.stack(nesterov), dtype=self.dtype).unbind()
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates), alpha=-group["lr"] * scale)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices between hidden spaces, AdamW for everything else, as one optimiser."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._link()

    def _link(self) -> None:
        # the two hold the groups and states; this object only shows them, so that a scheduler finds every group
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.state.clear()
        self.state.update({**self.muon.state, **self.adamw.state})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._link()


def build_optimizer(
    model: nn.Module, stage: StageRecipe, decay_names: Iterable[str], muon_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimiser of a stage over the model's trainable parameters.

    Args:
        decay_names: parameters that weight decay applies to.
        muon_dtype: precision in which Muon orthogonalises.
    """
    decay_names = set(decay_names)
    groups: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = stage.optimizer == "muon" and parameter.ndim == 2 and not any(t in name for t in _TABLE_NAMES)
            groups.setdefault((is_matrix, part_of(name), name in decay_names), []).append(parameter)

    def options(is_matrix: bool) -> list[dict[str, Any]]:
        return [
            {
                "params": parameters,
                "lr": _learning_rate(stage, part, matrix),
                "weight_decay": stage.weight_decay if decays else 0.0,
                "part": part,
            }
            for (matrix, part, decays), parameters in groups.items()
            if matrix == is_matrix
        ]

    # fused is one pass over each tensor; its result is AdamW's
    betas = (0.9, stage.adam_beta2)
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(options(False), lr=stage.learning_rate, betas=betas, fused=True)
    if not options(True):
        raise ValueError(f"stage {stage.name!r}: optimizer: muon, but train lists no part with a matrix; use adamw")
    adamw = torch.optim.AdamW(options(False), lr=stage.learning_rate, betas=betas, fused=True)
    return MuonWithAdamW(Muon(options(True), lr=stage.learning_rate, dtype=muon_dtype), adamw)


def _learning_rate(stage: StageRecipe, part: str, is_matrix: bool) -> float:
    if part in stage.learning_rates:
        return stage.learning_rates[part]
    if is_matrix and stage.muon_learning_rate is not None:
        return stage.muon_learning_rate
    return stage.learning_rate
