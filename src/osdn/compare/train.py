"""One job: one model, one seed. A small loop of its own rather than a trainer, since every batch must be a function of
(seed, step), every model of a seed must start from the same values, and a resumed run must repeat the same bits."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osdn.compare.config import Experiment, parse_variant
from osdn.data import MQAR, ByteText, ar_hits
from osdn.data.mqar import IGNORE
from osdn.diagnostics.residual import residual_ratio
from osdn.models import OSDNConfig, OSDNForCausalLM
from osdn.models.configuration import MIXERS
from osdn.nn import PreconditionerOptions
from osdn.nn.decay import parameter_groups
from osdn.runs import RunError
from osdn.runs.provenance import provenance
from osdn.runs.store import previous, read_checkpoint, write_checkpoint, write_json

_RULE = {field.name for field in fields(PreconditionerOptions)}
_MIXER = {"allow_neg_eigval", "conv_size", "expand_v", "head_dim", "num_heads", "output_gate", "state_decay"}

Metrics = dict[str, Any]
Report = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """One model and one seed of an experiment; `stamp` is the fingerprint that its files carry."""

    experiment: Experiment
    model: str
    seed: int
    directory: Path
    stamp: str
    checkpoint_every: int

    @property
    def name(self) -> str:
        return f"{self.model}, seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.directory / "jobs" / f"{self.model}-seed{self.seed}.json"

    @property
    def checkpoint(self) -> Path:
        return self.result.with_suffix(".pt")


def model_config(experiment: Experiment, name: str) -> OSDNConfig:
    """The preset or variant `name` at the experiment's size, in the experiment's box unless it names its own d_max.

    Raises ValueError where there is no such preset or option.
    """
    preset, options = parse_variant(name)
    if preset not in MIXERS:
        raise ValueError(f"models: got {name!r}, takes names among {', '.join(MIXERS)}")
    if unknown := sorted(options.keys() - _RULE - _MIXER):
        raise ValueError(
            f"models: got {name!r} with unknown {', '.join(unknown)}, takes {', '.join(sorted(_RULE | _MIXER))}"
        )
    rule = {option: value for option, value in options.items() if option in _RULE}
    if MIXERS[preset]["preconditioner"] is None:
        if rule:
            raise ValueError(f"models: got {name!r}, takes no {', '.join(rule)}: {preset} has no preconditioner")
    elif experiment.d_max is not None:
        rule = {"d_max": experiment.d_max} | rule
    mixer = {option: value for option, value in options.items() if option in _MIXER}
    size = {
        "vocab_size": experiment.vocab_size,
        "hidden_size": experiment.hidden_size,
        "num_hidden_layers": experiment.num_layers,
        "num_heads": experiment.num_heads,
        "head_dim": experiment.head_dim,
        "intermediate_size": experiment.mlp_size,
    }
    try:
        return OSDNConfig.preset(f"{preset}-tiny", **size | mixer, **({"preconditioner": rule} if rule else {}))
    except ValueError as error:
        raise ValueError(f"models: got {name!r}: {' '.join(str(error).split())}") from None


def build(experiment: Experiment, name: str, seed: int) -> OSDNForCausalLM:
    """The model `name`. What a module draws depends on (seed, its name in the model) alone, so that parameters of the
    same name and shape start from the same values in every mixer, whichever others it has."""
    with torch.random.fork_rng(devices=[]):
        model = OSDNForCausalLM(model_config(experiment, name))
        for path, module in reversed(list(model.named_modules())):  # children first, as transformers does
            digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            model._init_weights(module)
    return model


def train(job: Job, report: Report, stop: Callable[[], bool]) -> bool:
    """Train, evaluate and write `job.result`; resume from `job.checkpoint` where there is one.

    report: called with ("step", step, loss) after every step and ("note", text). stop: asked after every step; when
    True, a checkpoint is written and train returns False.
    """
    experiment, steps = job.experiment, job.experiment.steps
    task = _Recall(experiment, job.seed) if experiment.task == "mqar" else _Text(experiment, job.seed)
    model = build(experiment, job.model, job.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, experiment.weight_decay))
    step, losses, history, seconds = 0, list[float](), list[Metrics](), 0.0
    origin: list[dict[str, Any]] = []

    if state := read_checkpoint(job.checkpoint, job.stamp, lambda text: report("note", text)):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, losses, history, seconds = (state[name] for name in ("step", "losses", "history", "seconds"))
        origin = state["origin"]
        report("step", step, losses[-1])
    if not origin or origin[-1] != {"from_step": origin[-1]["from_step"], **provenance()}:
        origin = [*origin, {"from_step": step, **provenance()}]

    def save() -> None:
        write_checkpoint(
            job.checkpoint,
            {
                "stamp": job.stamp,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "losses": losses,
                "history": history,
                "seconds": seconds,
                "origin": origin,
            },
        )

    while step < steps:
        if step % experiment.eval_every == 0:
            history.append({"step": step, **task.evaluate(model)})
        began = time.perf_counter()
        loss = _step(model, optimizer, task.batch(step), learning_rate(experiment, step), experiment.clip)
        seconds += time.perf_counter() - began
        step += 1
        losses.append(loss)
        if loss != loss:
            raise RunError(f"{job.name}: the loss is {loss} at step {step}; a smaller --lr may help")
        report("step", step, loss)
        if step < steps and stop():
            save()
            return False
        if step % job.checkpoint_every == 0 or step == steps:
            save()

    final = task.evaluate(model)
    content = {
        "stamp": job.stamp,
        "model": job.model,
        "seed": job.seed,
        "losses": losses,
        "history": [*history, {"step": steps, **final}],
        "final": final | task.details(model),
        "residual": residual_ratio(model, task.probe()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": model.config.state_bytes(),
        "tokens_per_second": steps * experiment.batch_size * experiment.seq_len / seconds,
        "training_seconds": seconds,
        "origin": origin,
    }
    write_json(job.result, content)
    previous(job.checkpoint).unlink(missing_ok=True)
    return True


def learning_rate(experiment: Experiment, step: int) -> float:
    """Linear to the peak in `warmup_steps`; linear to a tenth of it over the last fifth of the steps.

    Constant in between, since recall is learned at once after a plateau whose end no schedule knows beforehand.
    """
    rise = (step + 1) / max(1, experiment.warmup_steps)
    left = (experiment.steps - step) / experiment.steps
    return experiment.lr * min(1.0, rise, 0.1 + 0.9 * left / 0.2)


def token_losses(model: OSDNForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and correctness, `[M]` each, of the M labels that are not -100, row by row."""
    target = labels[:, 1:]
    answers = target != IGNORE
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden[answers]).float()
    target = target[answers]
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target


def _step(
    model: OSDNForCausalLM, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], lr: float, clip: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = token_losses(model.train(), *batch)[0].mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


class _Recall:
    """MQAR: trained at `num_pairs`, evaluated at `eval_pairs`."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self.experiment, self.seed = experiment, seed
        self.data = recall_task(experiment, experiment.num_pairs)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.data.batch(self.experiment.batch_size, seed=self.seed, step=step)

    def evaluate(self, model: OSDNForCausalLM) -> Metrics:
        return self._score(model, self.data)

    def details(self, model: OSDNForCausalLM) -> Metrics:
        e, T = self.experiment, self.experiment.seq_len
        by_pairs = {str(n): self._score(model, recall_task(e, n)) for n in e.eval_pairs}
        longer = {str(T * m): self._score(model, replace(self.data, seq_len=T * m), m) for m in e.eval_lengths}
        return {"by_pairs": by_pairs, "by_length": longer}

    def probe(self) -> Tensor:
        return self.data.batch(self.experiment.batch_size, seed=self.seed, split="test")[0]

    def _score(self, model: OSDNForCausalLM, data: MQAR, times: int = 1) -> Metrics:
        n = -(-self.experiment.eval_sequences // times)
        ids, labels = data.batch(n, seed=self.seed, split="test")
        loss, correct = _evaluate(model, ids, labels, self.experiment.batch_size)
        return {"loss": float(loss.mean()), "accuracy": float(correct.double().mean())}


class _Text:
    """Next byte of local files."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self.experiment, self.seed = experiment, seed
        self.data = ByteText.load(experiment.data, experiment.eval_data)
        self.held_out = self.data.blocks(experiment.eval_sequences, experiment.seq_len)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        ids = self.data.batch(self.experiment.batch_size, self.experiment.seq_len, seed=self.seed, step=step)
        return ids, ids

    def evaluate(self, model: OSDNForCausalLM) -> Metrics:
        return self._score(model, self.held_out)

    def details(self, model: OSDNForCausalLM) -> Metrics:
        e, T = self.experiment, self.experiment.seq_len
        blocks = {T * m: self.data.blocks(-(-e.eval_sequences // m), T * m) for m in e.eval_lengths}
        return {"by_length": {str(length): self._score(model, rows) for length, rows in blocks.items()}}

    def probe(self) -> Tensor:
        return self.held_out[: self.experiment.batch_size]

    def _score(self, model: OSDNForCausalLM, rows: Tensor) -> Metrics:
        loss, _ = _evaluate(model, rows, rows, self.experiment.batch_size)
        hit = ar_hits(rows)[:, 1:].flatten()
        hits = {"hit_loss": float(loss[hit].mean()), "rest_loss": float(loss[~hit].mean())}
        mean = float(loss.mean())
        return {"loss": mean, "bits": mean / math.log(2), **hits, "hit_fraction": float(hit.double().mean())}


def recall_task(experiment: Experiment, num_pairs: int) -> MQAR:
    return MQAR(num_pairs, experiment.seq_len, experiment.vocab_size, experiment.passes)


@torch.no_grad()
def _evaluate(model: OSDNForCausalLM, ids: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    model.eval()
    parts = [token_losses(model, *rows) for rows in zip(ids.split(size), labels.split(size), strict=True)]
    loss, correct = (torch.cat(part) for part in zip(*parts, strict=True))
    return loss.double(), correct
