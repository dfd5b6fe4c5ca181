"""What the layers of a trained model write with, measured in one pass over streams of tokens.

Letters: n sequences, T tokens each, P bins of relative position, HV value heads, K key dim. Tokens go through the model
in chunks, its cache in between, and only sums and histograms stay: memory does not grow with T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osdn.diagnostics.residual import evaluating, observed, ratio, reach
from osdn.models.configuration import cache_name
from osdn.nn import Writes

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
ABLATIONS = ("ratio_d_one", "ratio_d_mean", "ratio_d_permuted")
BINS = 32
_CHUNK = 256
Progress = Callable[[], None]


def diagnose(
    model: nn.Module,
    tasks: Mapping[str, Tensor],
    *,
    chunk_size: int = _CHUNK,
    batch_size: int = 4,
    progress: Progress = lambda: None,
) -> dict[str, Any]:
    """Measure every `osdn.nn.DeltaMixer` layer of `model` on each task.

    tasks: name -> `[n, T]` token ids. chunk_size: tokens that the model sees at once; batch_size: sequences at once.
    model: takes `input_ids`, `use_cache` and a cache, and returns the cache, as all of transformers' do (by the name
        `past_key_values`, from 5.24 on `cache`). progress: called after each chunk.

    Returns plain JSON: {"levels", "tasks": {name: {"sequences", "tokens", "layers": [layer, ..]}}}, where a layer is
    {"name", "rule", "all": means, "heads": [means, ..], "positions": [means | {"quantiles": {..}}, ..]} and means are

        ratio, geometric    (1 - beta_t x_t)^2, x_t = <d_t, k_t^2>: arithmetic and geometric mean over tokens
        ratio_d_one         the same with d = 1 in place of d_t; ratio_d_mean: with the mean of d_t over K;
        ratio_d_permuted    with d_t under one fixed permutation of K
        x, step, overshoot  x_t; beta_t x_t; share of tokens with beta_t x_t > 1
        d, at_min, at_max   d_t; shares of features at the bounds of the box
        lambda              exp(forget_t)

    Without a preconditioner d is 1 and what concerns d and the ablations is left out, as lambda is without forgetting.
    quantiles: of d, x, step and lambda at `levels`, from histograms, to within 1%.

    Raises ValueError for a model without such a layer and for tasks that the model cannot take.
    """
    if chunk_size < 1 or batch_size < 1:
        raise ValueError(f"chunk_size, batch_size: got {chunk_size}, {batch_size}, takes ints >= 1")
    _check(model, tasks)
    with observed(model, lambda *_: None) as names:
        pass
    if not names:
        raise ValueError(
            f"model: got {type(model).__name__}, takes a model with osdn.OnlineScaledDeltaNet or preconditioned layers"
        )
    out: dict[str, Any] = {"levels": list(LEVELS), "tasks": {}}
    for task, ids in tasks.items():
        layers = [_Layer(name, min(BINS, ids.shape[1])) for name in names]
        for rows in ids.split(batch_size):
            _stream(model, rows, chunk_size, layers, progress)
        n, T = ids.shape
        out["tasks"][task] = {"sequences": n, "tokens": T, "layers": [layer.summary() for layer in layers]}
    return out


def _check(model: nn.Module, tasks: Mapping[str, Tensor]) -> None:
    size = model.get_input_embeddings().num_embeddings if isinstance(model, PreTrainedModel) else None
    for name, ids in tasks.items():
        if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise ValueError(f"tasks: got {name!r} of {ids.dtype} {tuple(ids.shape)}, takes integers [n, T], not empty")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (size is not None and high >= size):
            raise ValueError(f"tasks: got {name!r} with tokens {low} to {high}, takes those of a vocabulary of {size}")


@torch.no_grad()
def _stream(model: nn.Module, rows: Tensor, size: int, layers: list[_Layer], progress: Progress) -> None:
    T, backbone = rows.shape[1], getattr(model, "base_model", model)  # no logits are needed
    device = next(model.parameters()).device
    name, cache, start = cache_name(backbone), None, 0

    def record(i: int, writes: Writes) -> None:
        C = writes.k.shape[1]
        layers[i].add(writes, (start + torch.arange(C, device=device)) * layers[i].P // T)

    with evaluating(model), observed(model, record):
        for chunk in rows.to(device).split(size, dim=1):
            cache = getattr(backbone(input_ids=chunk, use_cache=True, **{name: cache}), name)
            start += chunk.shape[1]
            progress()


class _Layer:
    """Sums of one layer on one task: means by position and head, histograms by position."""

    def __init__(self, name: str, P: int) -> None:
        self.name, self.P = name, P
        self.rule = "no preconditioner"
        self.sums: dict[str, Tensor] = {}  # [P, HV]
        self.count = torch.zeros(P, dtype=torch.float64)  # tokens a head
        self.histograms: dict[str, _Histogram] = {}

    def add(self, writes: Writes, bins: Tensor) -> None:
        """bins: `[C]`, the position bin of each of the chunk's tokens."""
        B = len(writes.k)
        self.count += B * torch.bincount(bins, minlength=self.P).cpu()
        x = reach(writes, writes.d)
        step = writes.beta * x
        q = ratio(writes, writes.d)
        self._mean(bins, ratio=q, log_ratio=q.log(), x=x, step=step, overshoot=step > 1)
        self._quantiles(bins, x=x, step=step)
        if (d := writes.d) is not None and writes.rule is not None:
            self.rule = str(writes.rule)
            K = d.shape[-1]
            order = torch.randperm(K, generator=torch.Generator().manual_seed(0)).to(d.device)
            with_one, with_mean, permuted = (
                ratio(writes, other) for other in (None, d.mean(-1, keepdim=True), d[..., order])
            )
            self._mean(bins, ratio_d_one=with_one, ratio_d_mean=with_mean, ratio_d_permuted=permuted)
            at_min, at_max = ((y.double()).mean(-1) for y in (d <= writes.rule.d_min, d >= writes.rule.d_max))
            self._mean(bins, d=d.mean(-1), at_min=at_min, at_max=at_max)
            self._quantiles(bins, d=d)
        if writes.forget is not None:
            self._mean(bins, **{"lambda": writes.forget.exp()})
            self._quantiles(bins, forgotten=-torch.expm1(writes.forget))

    def _mean(self, bins: Tensor, **measures: Tensor) -> None:
        for name, y in measures.items():
            y = y.double().sum(0)
            total = torch.zeros(self.P, y.shape[1], dtype=torch.float64, device=y.device).index_add_(0, bins, y)
            self.sums[name] = self.sums.get(name, 0) + total.cpu()

    def _quantiles(self, bins: Tensor, **measures: Tensor) -> None:
        for name, y in measures.items():
            self.histograms.setdefault(name, _Histogram(self.P, 1e-6 if name == "forgotten" else 1e-3)).add(y, bins)

    def summary(self) -> dict[str, Any]:
        whole, by_head = self.count.sum(), [sums.sum(0) for sums in self.sums.values()]
        heads = range(len(by_head[0]))
        positions = []
        for p in range(self.P):
            quantiles = {name: histogram.quantiles(p) for name, histogram in self.histograms.items()}
            if "forgotten" in quantiles:
                quantiles["lambda"] = [1 - y for y in reversed(quantiles.pop("forgotten"))]
            positions.append(self._means([sums[p].mean() / self.count[p] for sums in self.sums.values()]))
            positions[-1]["quantiles"] = quantiles
        return {
            "name": self.name,
            "rule": self.rule,
            "all": self._means([sums.mean() / whole for sums in by_head]),
            "heads": [self._means([sums[h] / whole for sums in by_head]) for h in heads],
            "positions": positions,
        }

    def _means(self, values: list[Tensor]) -> dict[str, Any]:
        means: dict[str, Any] = {name: float(y) for name, y in zip(self.sums, values, strict=True)}
        means["geometric"] = math.exp(means.pop("log_ratio"))
        return means


class _Histogram:
    """Counts of a quantity in P position bins, in cells of equal width in asinh(y / unit): 2% wide far above `unit`."""

    WIDTH, CELLS = 0.02, 2001  # up to 2e8 units on either side

    def __init__(self, P: int, unit: float) -> None:
        self.unit = unit
        self.counts = torch.zeros(P, self.CELLS, dtype=torch.int64)
        self.low, self.high = math.inf, -math.inf

    def add(self, y: Tensor, bins: Tensor) -> None:
        """y: `[B, C, ...]`; bins: `[C]`."""
        self.low, self.high = min(self.low, float(y.min())), max(self.high, float(y.max()))
        half = self.CELLS // 2
        cell = ((y.double() / self.unit).asinh() / self.WIDTH).round().clamp(-half, half).long() + half
        cell = cell + (bins * self.CELLS).view(-1, *[1] * (y.ndim - 2))
        self.counts += torch.bincount(cell.flatten(), minlength=self.counts.numel()).view_as(self.counts).cpu()

    def quantiles(self, p: int) -> list[float]:
        below = self.counts[p].cumsum(0).double()
        cells = torch.searchsorted(below, torch.tensor(LEVELS, dtype=torch.float64) * below[-1])
        values = self.unit * torch.sinh((cells - self.CELLS // 2) * self.WIDTH)
        return [min(max(float(v), self.low), self.high) for v in values]
