"""Tokens per second of a whole training step, beside the same model around a peer's operator.

Peers are the two gated delta rules that transformers takes: its own in PyTorch and, where it is installed, that of
flash-linear-attention. They stand in place of ours in a Gated DeltaNet: projections, convolutions, loss, backward and
AdamW are the same code. Before any clock runs, all have to give the same loss and gradients.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from osdn.bench.cases import RedGateError, qwen3_next
from osdn.bench.device import Cuda, Device
from osdn.bench.measure import interleaved, wall_clock
from osdn.bench.report import row
from osdn.models import OSDNConfig, OSDNForCausalLM
from osdn.nn import parameter_groups
from osdn.ops.dispatch import choose
from osdn.runs.provenance import provenance, versions

Operator = Callable[..., tuple[Tensor, Tensor | None]]
PEER = "gdn, transformers' operator"
FLA = "gdn, flash-linear-attention's"
CONTESTANTS = {"gdn": "gdn", "os-gdn": "os-gdn", PEER: "gdn", FLA: "gdn"}


@dataclass(frozen=True)
class Setting:
    """What is measured on a kind of device. tolerance: relative, of what `gate` compares."""

    size: str
    fields: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    bf16: bool
    tolerance: float


SETTINGS = {
    # float32 rounding of each gradient stays well below 1e-4, a wrong term does not.
    "cpu": Setting(
        "tiny", {"hidden_size": 256, "num_heads": 4, "head_dim": 64}, {"512": (8, 512), "2048": (2, 2048)}, False, 1e-4
    ),
    # The 340M recipe's layers, fewer of them, for the sake of transformers' operator, which keeps all of float32. To
    # round an operand to bf16 costs 2e-3, and many are rounded one after another: 2e-2 in three layers on the CPU.
    "cuda": Setting("340m", {"num_hidden_layers": 6}, {"4096": (4, 4096)}, True, 1e-1),
}
QUICK = {"64": (2, 64)}


@dataclass
class Step:
    """A model and what a training step of it needs: float32 parameters, computing in bf16 where the setting says."""

    name: str
    tokens: Tensor
    setting: Setting
    model: OSDNForCausalLM = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        config = OSDNConfig.preset(f"{CONTESTANTS[self.name]}-{self.setting.size}", **self.setting.fields)
        self.model = OSDNForCausalLM(config).to(self.tokens.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=1e-4)

    def gradients(self, rows: int | None = None) -> dict[str, Tensor]:
        """Of the loss of the first `rows`, all by default; the loss is one of them."""
        self.optimizer.zero_grad()
        tokens = self.tokens[:rows]
        autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.setting.bf16)
        with _operator(self.name), autocast:
            loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    def __call__(self) -> None:
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _peer(name: str) -> Operator:
    if name == PEER:
        return qwen3_next()
    rule: Operator = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return rule


@contextmanager
def _operator(name: str) -> Iterator[None]:
    if name not in (PEER, FLA):
        yield
        return

    def rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, g: Tensor, **rest: Any) -> tuple[Tensor, None]:
        asked = {name for name in ("preconditioner", "forget", "cu_seqlens") if rest[name] is not None}
        assert not asked
        return _peer(name)(q, k, v, g=g, beta=beta.to(q.dtype), use_qk_l2norm_in_kernel=True)[0], None

    with patch("osdn.nn.layer.online_scaled_delta_rule", rule):
        yield


def gate(ours: Step, peer: Step) -> float:
    """The largest relative difference among loss and gradients of one row; RedGateError above the tolerance.

    In bf16 all gradients are compared as one vector: in those of a few numbers rounding is not averaged.
    """
    tolerance = ours.setting.tolerance
    a, b = ({name: x.clone() for name, x in step.gradients(rows=1).items()} for step in (ours, peer))
    if ours.setting.bf16:
        a, b = (
            {"loss": x["loss"], "the gradient": torch.cat([y.flatten() for n, y in x.items() if n != "loss"])}
            for x in (a, b)
        )
    off = {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in b}
    worst = max(off, key=lambda name: off[name])
    if a.keys() != b.keys() or not off[worst] <= tolerance:
        raise RedGateError(f"{ours.name} and {peer.name}: {worst} differs by {off[worst]:.1e}, above {tolerance}")
    return off[worst]


def run(*, repeats: int, quick: bool, threads: int | None, seed: int) -> dict[str, Any]:
    """Seconds of each step, taking turns, on a GPU where there is one; RedGateError, before any clock runs, where the
    gate is red.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device, setting = Cuda(kind) if kind == "cuda" else Device(kind), SETTINGS[kind]
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    gen = torch.Generator().manual_seed(seed)
    names = [n for n in CONTESTANTS if n != FLA or (kind == "cuda" and importlib.util.find_spec("fla") is not None)]
    measured, differs = [], {}
    for length, (B, T) in (QUICK if quick else setting.shapes).items():
        tokens = torch.randint(0, 512, (B, T), generator=gen).to(kind)
        steps = {name: Step(name, tokens, setting) for name in names}
        differs[length] = {name: gate(steps["gdn"], steps[name]) for name in names if name in (PEER, FLA)}
        peaks = {name: device.peak(step) for name, step in steps.items()}
        print(f"B {B}, T {T}: {differs[length]}, bytes {peaks}", file=sys.stderr, flush=True)
        calls = {name: partial(_to_the_end, step, device) for name, step in steps.items()}
        for name, samples in interleaved(calls, repeats, wall_clock).items():
            rate = B * T / median(samples)
            measured.append(
                {"case": name, "B": B, "T": T, "tokens_per_second": rate, "bytes": peaks[name], "s": samples}
            )
    config = steps["gdn"].model.config
    query = torch.empty(1, 2, config.num_heads, config.head_dim, device=kind)
    here = provenance()
    return {
        **here,
        "device": torch.cuda.get_device_name() if kind == "cuda" else here["device"],
        "versions": here["versions"] | versions("triton", "fla-core"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": load,
        "config": {"suite": "step", "quick": quick, "repeats": repeats, "threads": threads, "seed": seed},
        "model": {
            "presets": {name: f"{CONTESTANTS[name]}-{setting.size}" for name in names},
            **setting.fields,
            "parameters": sum(p.numel() for p in steps["gdn"].model.parameters()),
            "bf16": setting.bf16,
        },
        "operators": {
            name: f"{_peer(name).__module__}.{_peer(name).__qualname__}"
            if name in (PEER, FLA)
            else f"osdn, {choose(query, 'auto')}"
            for name in names
        },
        "gate": differs,
        "measured": measured,
    }


def _to_the_end(step: Step, device: Device) -> None:
    step()
    device.synchronize()


def markdown(result: dict[str, Any]) -> str:
    """Tokens per second, and over the peer's; memory where the device tells it."""
    found = {(x["case"], x["B"], x["T"]): x for x in result["measured"]}
    names = list(result["operators"])
    lines = [f"# {result['device']}, {result['threads']} threads, {result['date'][:10]}", ""]
    lines += ["Tokens per second of a whole training step (over that around transformers' operator):", ""]
    lines += [row("B", "T", *names), "|---:" * (2 + len(names)) + "|"]
    for B, T in dict.fromkeys((x["B"], x["T"]) for x in result["measured"]):
        rates = [found[name, B, T]["tokens_per_second"] for name in names]
        base = found[PEER, B, T]["tokens_per_second"]
        lines.append(row(B, T, *(f"{rate:,.0f} ({rate / base:.2f})" for rate in rates)))
        peaks = [found[name, B, T]["bytes"] for name in names]
        if None not in peaks:
            lines.append(row("", "GiB", *(f"{peak / 2**30:.1f}" for peak in peaks)))
    worst = max(off for differs in result["gate"].values() for off in differs.values())
    model = result["model"]
    about = f"{model['parameters']:,} parameters ({model['presets']['gdn']}), {'bf16' if model['bf16'] else 'float32'}."
    differs = f"Loss and gradients of gdn differ from the peers' by at most {worst:.0e}."
    ran = "; ".join(f"{name}: `{operator}`" for name, operator in result["operators"].items())
    load = f"Load average before the run, which counts other work: {result['load_before']}."
    return "\n".join(
        [*lines, "", about, differs, f"{ran}.", load, f"{result['versions']}; commit {result['commit']}.", ""]
    )
