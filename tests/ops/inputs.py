"""One factory of discriminating inputs, and the one way in which two implementations are compared.

Unit keys with d_0 = 1, lambda = 1 and beta_free feedback leave d at 1 for ever, so a test on them proves nothing.
Here keys are correlated and their lengths differ, so that d never comes to rest; d_0 is drawn from U[0.2, 2], beta
covers (0, 1), and `Case.tensors` asserts on the reference that d moved and, with a box, that clips fired at both ends
and were still firing in the second half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

import osdn
from osdn.ops import reference

BOX = (0.7, 1.2)


@dataclass(frozen=True)
class Case:
    T: int = 70
    H: int = 2
    HV: int | None = None
    K: int = 12
    V: int = 5
    B: int = 2
    lengths: tuple[int, ...] | None = None  # packed, overrides B and T
    decay: str | None = None
    feedback: str = "beta_free"
    forget: bool = False
    box: tuple[float, float] = (0.0, math.inf)
    normalize_step: bool = False
    eta: float = 4.0
    plain: bool = False  # no preconditioner: d == 1
    qk_l2norm: bool = False
    chunk_size: int = 64
    seed: int = 0

    @property
    def preconditioner(self) -> osdn.Preconditioner | None:
        if self.plain:
            return None
        return osdn.Preconditioner(self.eta, self.feedback, *self.box, normalize_step=self.normalize_step)

    @property
    def cu_seqlens(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()])

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        gen = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64)

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=gen, dtype=torch.float64)

        B, T = (self.B, self.T) if self.lengths is None else (1, sum(self.lengths))
        N = B if self.lengths is None else len(self.lengths)
        H, K, V = self.H, self.K, self.V
        HV = self.HV or H
        work = torch.float64 if dtype == torch.float64 else torch.float32
        x: dict[str, Tensor | None] = {
            "q": randn(B, T, H, K).to(dtype),
            "k": self._keys(randn(B, T, H, K) + 0.7 * randn(1, 1, H, K), rand(B, T, H, 1)).to(dtype),
            "v": randn(B, T, HV, V).to(dtype),
            "beta": rand(B, T, HV).to(work),
            "g": None,
            "forget": -(0.2 * rand(B, T, HV) ** 2).to(work) if self.forget else None,
            "S": randn(N, HV, K, V).to(work),
            "d": None if self.plain else (0.2 + 1.8 * rand(N, HV, K)).to(work),
        }
        if self.decay is not None:
            # Mostly mild, now and then a nearly complete wipe.
            shape = (B, T, HV) if self.decay == "scalar" else (B, T, HV, K)
            x["g"] = (-(rand(*shape) ** 4) - 20 * (rand(*shape) < 0.02)).to(work)
        self._assert_discriminating(x)
        return x

    def _keys(self, k: Tensor, length: Tensor) -> Tensor:
        return k if self.qk_l2norm else (0.7 + 0.6 * length) * torch.nn.functional.normalize(k, dim=-1)

    def _assert_discriminating(self, x: dict[str, Tensor | None]) -> None:
        T = max(self.lengths) if self.lengths else self.T
        if T < 12 or self.eta == 0 or self.plain:
            return
        k, beta = x["k"].double(), x["beta"].double()
        if self.qk_l2norm:
            k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        k = k.repeat_interleave(beta.shape[2] // self.H, 2)
        forget = None if x["forget"] is None else x["forget"].double()
        used, final = reference.precondition(k, beta, forget, x["d"].double(), self.cu_seqlens, self.preconditioner)
        assert (final - x["d"]).abs().mean() > 0.05, "d did not move"
        at = [used[:, 1:] == bound for bound in self.box if math.isfinite(bound) and bound != 0]
        if at:
            assert all(a.any() for a in at), "the box did not clip at each end"
            assert sum(a[:, used.shape[1] // 2 :].double().mean() for a in at) > 0.02, "the box hardly clips"


OUTPUTS = ("o", "S_T", "d_T")


def run(case: Case, x: dict[str, Tensor | None], backend: str, grads: bool = True) -> dict[str, Tensor]:
    """Outputs, final states and, for one fixed random cotangent of all three, every gradient."""
    leaves = {n: t.detach().clone().requires_grad_(grads) for n, t in x.items() if t is not None}
    o, state = osdn.online_scaled_delta_rule(
        *(leaves[n] for n in ("q", "k", "v", "beta")),
        g=leaves.get("g"),
        forget=leaves.get("forget"),
        preconditioner=case.preconditioner,
        initial_state=osdn.DeltaState(leaves["S"], leaves.get("d")),
        output_final_state=True,
        qk_l2norm=case.qk_l2norm,
        cu_seqlens=case.cu_seqlens,
        chunk_size=case.chunk_size,
        backend=backend,
    )
    out = {n: y for n, y in zip(OUTPUTS, (o, state.S, state.d)) if y is not None}
    if grads:
        gen = torch.Generator().manual_seed(1)
        loss = sum((y * torch.randn(y.shape, generator=gen, dtype=torch.float64).to(y)).sum() for y in out.values())
        out |= dict(zip([f"grad {n}" for n in leaves], torch.autograd.grad(loss, list(leaves.values()))))
    return {n: y.detach() for n, y in out.items()}


def errors(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, Tensor]:
    """Relative error ||got - want|| / ||want|| of each result, per sequence and head [N, H]."""

    def norms(name: str, y: Tensor) -> Tensor:
        per_token = name not in ("S_T", "d_T", "grad S", "grad d")
        if not per_token or case.lengths is None:
            parts = [y] if not per_token else [y.movedim(2, 1)]
        else:
            parts = [y[:, a:b].movedim(2, 1) for a, b in pairwise(case.cu_seqlens.tolist())]
        return torch.cat([p.double().flatten(2).norm(dim=-1) for p in parts])

    result = {}
    for name, y in want.items():
        diff, size = norms(name, got[name].double() - y.double()), norms(name, y)
        result[name] = torch.where(diff == 0, 0.0, diff / size)
    return result


def worst(errs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error (NaN counts as infinite) and whose it is."""
    return max((float(e.nan_to_num(nan=math.inf).max()), n) for n, e in errs.items())


def as_backend(monkeypatch, name: str, module: ModuleType) -> None:
    """Let `backend=name` run another module for the length of a test."""
    from osdn.ops import dispatch

    monkeypatch.setitem(dispatch._MODULES, name, module)
