"""Tokens per second of a whole training step, beside the same model around a peer's operator.

The peer is transformers' chunked gated delta rule in place of ours in a Gated DeltaNet: projections, convolutions,
loss, backward and AdamW are the same code. Before any clock runs, both have to give the same loss and gradients.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from osdn.bench.cases import RedGateError, qwen3_next
from osdn.bench.measure import interleaved, wall_clock
from osdn.bench.report import row
from osdn.models import OSDNConfig, OSDNForCausalLM
from osdn.nn import parameter_groups
from osdn.runs.provenance import provenance

PEER = "gdn, transformers' operator"
CONTESTANTS = {"gdn": "gdn-tiny", "os-gdn": "os-gdn-tiny", PEER: "gdn-tiny"}
SHAPES = {"512": (8, 512), "2048": (2, 2048)}
QUICK = {"64": (2, 64)}
TOLERANCE = 1e-4
"""Relative, of each gradient: float32 rounding through the layers stays well below it, a wrong term does not."""


@dataclass
class Step:
    """A model and what a training step of it needs. peer: with transformers' operator in place of ours."""

    name: str
    tokens: Tensor
    model: OSDNForCausalLM = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = OSDNConfig.preset(CONTESTANTS[self.name], hidden_size=256, num_heads=4, head_dim=64)
        self.model = OSDNForCausalLM(config)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=1e-4)

    def gradients(self) -> dict[str, Tensor]:
        """Of the loss, which is one of them."""
        self.optimizer.zero_grad()
        with _operator(self.name == PEER):
            loss = self.model(self.tokens, labels=self.tokens).loss
            loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    def __call__(self) -> None:
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


@contextmanager
def _operator(peer: bool) -> Iterator[None]:
    if not peer:
        yield
        return

    def rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, g: Tensor, **rest: Any) -> tuple[Tensor, None]:
        asked = {name for name in ("preconditioner", "forget", "cu_seqlens") if rest[name] is not None}
        assert not asked
        return qwen3_next()(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0], None

    with patch("osdn.nn.layer.online_scaled_delta_rule", rule):
        yield


def gate(ours: Step, peer: Step) -> float:
    """The largest relative difference among loss and gradients; RedGateError above the tolerance."""
    a, b = ours.gradients(), peer.gradients()
    off = {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in b}
    worst = max(off, key=lambda name: off[name])
    if a.keys() != b.keys() or not off[worst] <= TOLERANCE:
        raise RedGateError(f"{ours.name} and {peer.name}: {worst} differs by {off[worst]:.1e}, above {TOLERANCE}")
    return off[worst]


def run(*, repeats: int, quick: bool, threads: int | None, seed: int) -> dict[str, Any]:
    """Seconds of each step, taking turns; RedGateError, before any clock runs, where the gate is red."""
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    gen = torch.Generator().manual_seed(seed)
    measured, differs = [], {}
    for length, (B, T) in (QUICK if quick else SHAPES).items():
        tokens = torch.randint(0, 512, (B, T), generator=gen)
        steps = {name: Step(name, tokens) for name in CONTESTANTS}
        differs[length] = gate(steps["gdn"], steps[PEER])
        for name, samples in interleaved(steps, repeats, wall_clock).items():
            measured.append({"case": name, "B": B, "T": T, "tokens_per_second": B * T / median(samples), "s": samples})
    return {
        **provenance(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "config": {"suite": "step", "quick": quick, "repeats": repeats, "threads": threads, "seed": seed},
        "model": {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "presets": CONTESTANTS},
        "gate": differs,
        "measured": measured,
    }


def markdown(result: dict[str, Any]) -> str:
    """Tokens per second, and over the peer's."""
    rate = {(x["case"], x["B"], x["T"]): x["tokens_per_second"] for x in result["measured"]}
    lines = [f"# {result['device']}, {result['threads']} threads, {result['date'][:10]}", ""]
    lines += ["Tokens per second of a whole training step (over that around the peer's operator):", ""]
    lines += [row("B", "T", *CONTESTANTS), "|---:" * (2 + len(CONTESTANTS)) + "|"]
    for B, T in dict.fromkeys((x["B"], x["T"]) for x in result["measured"]):
        cells = (f"{rate[name, B, T]:,.0f} ({rate[name, B, T] / rate[PEER, B, T]:.2f})" for name in CONTESTANTS)
        lines.append(row(B, T, *cells))
    differs = f"Loss and gradients of gdn differ from the peer's by at most {max(result['gate'].values()):.0e}."
    load = f"Load average before the run, which counts other work: {result['load_before']}."
    return "\n".join([*lines, "", differs, load, f"{result['versions']}; commit {result['commit']}.", ""])
