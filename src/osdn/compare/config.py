"""What an experiment is. Imports neither torch nor transformers, so that `osdn compare --help` stays quick."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

DEMO = ("deltanet", "osdn", "osdn-apf")
CONTROLS = ("beta2", "static", "forget-only", "gdn")
# d_0 is 0 and 1 for every rule that moves d online, and 1 for the controls, whose d would wait for the optimizer at 0.
# d_0 is learned where the preset learns it, and where it is 1: fixed there, plain `osdn` would be DeltaNet.
GRID = (
    "deltanet",
    *CONTROLS,
    "osdn",
    "osdn[d_init=1,learn_d_init=true]",
    "osdn-apf-paper",
    "osdn-apf",
    "osdn[feedback=beta_aware]",
    "osdn[d_init=1,feedback=beta_aware,learn_d_init=true]",
    "osdn-apf-paper[feedback=beta_aware]",
    "osdn-apf[feedback=beta_aware]",
)
_DEFAULT_STEPS = {"mqar": 450, "text": 400}  # measured: the demo takes six minutes at most on two cores
_GRID_STEPS = 600  # some rules learn late; estimated: the grid takes an hour and a half on two idle cores
_FORMAT = 2  # to be raised when the training procedure changes: older run directories are then refused
_OPTIONS = {"mqar": ("num_pairs", "eval_pairs", "passes", "vocab_size"), "text": ("data", "eval_data")}
_PATHS = ("data", "eval_data")  # where the bytes lie does not matter; their digest does


@dataclass(frozen=True)
class Experiment:
    """Models that differ in the mixer alone, trained from the same seeds on the same data."""

    task: Literal["mqar", "text"] = "mqar"
    """mqar: synthetic recall; text: next byte of local files."""
    models: tuple[str, ...] = ()
    """Preset names without their size, each alone or with options of its mixer in brackets; alternatives make a grid:
    'osdn-apf[d_init=0|1,feedback=beta_free|beta_aware]'. None given: deltanet osdn osdn-apf. The controls are:
    static beta2 forget-only gdn."""
    seeds: int = 0
    """Runs per model; 0: 2. Seed i fixes initial values and data, the same for every model."""
    steps: int = 0
    """Training steps; 0: what takes at most six minutes on two cores."""
    batch_size: int = 0
    """Sequences a step; 0: 32 (mqar), 16 (text)."""
    seq_len: int = 0
    """Tokens a sequence; 0: 128 (mqar; with more passes, longer by the added listings), 256 (text)."""

    num_pairs: int = 24
    """mqar: key-value pairs in a training sequence."""
    eval_pairs: tuple[int, ...] = (4, 8, 16, 24, 32)
    """mqar: numbers of pairs to evaluate at; those that do not fit seq_len and vocab_size are left out."""
    eval_lengths: tuple[int, ...] = ()
    """Multiples of seq_len to evaluate at as well, on as many tokens: does it extrapolate?"""
    passes: int = 1
    """mqar: how often the pairs are listed before the queries."""
    vocab_size: int = 128
    """mqar: number of tokens. Text has 256."""
    data: tuple[Path, ...] = ()
    """text: files and directories to train on; by default Python's standard library."""
    eval_data: tuple[Path, ...] = ()
    """text: files and directories to evaluate on; by default a tenth of data."""

    hidden_size: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Blocks, each a mixer and an MLP."""
    num_heads: int = 1
    """Heads of the mixer."""
    head_dim: int = 32
    """Key and value size of a head."""
    mlp_size: int = 128
    """Width of the MLP."""
    d_max: float | None = 2.0
    """Upper end of the box for every preconditioned model; None keeps the preset's own."""

    lr: float = 3e-3
    """Learning rate of AdamW: linear warm-up, constant, linear to a tenth over the last fifth."""
    warmup_steps: int = 20
    """Steps of the warm-up."""
    weight_decay: float = 0.1
    """On matrices alone."""
    clip: float = 1.0
    """Largest gradient norm."""
    eval_every: int = 0
    """Steps between evaluations; 0: a tenth of steps."""
    eval_sequences: int = 256
    """Held-out sequences an evaluation takes."""

    def check(self) -> None:
        """Raises ValueError for a field out of range; not on construction, or the command line would frame the line."""
        for name in ("eval_lengths", "eval_pairs"):
            if min(values := getattr(self, name), default=1) < 1:
                raise ValueError(f"{name}: got {' '.join(map(str, values))}, takes ints >= 1")
        for name in ("eval_sequences", "hidden_size", "num_layers", "num_heads", "head_dim", "mlp_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: got {value}, takes an int >= 1")
        for name in ("seeds", "steps", "batch_size", "seq_len", "eval_every", "warmup_steps"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"{name}: got {value}, takes a number >= 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {self.weight_decay}, takes a finite number >= 0")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: got {self.lr}, takes a finite float > 0")
        if not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, takes a float > 0")

    def refuse_idle(self) -> None:
        """Raises ValueError for an option of the other task. Of a resolved experiment some are set, and nobody's."""
        for task, names in _OPTIONS.items():
            for name in names:
                if task != self.task and (value := getattr(self, name)) != getattr(Experiment, name):
                    got = " ".join(map(str, value)) if isinstance(value, tuple) else value
                    raise ValueError(f"{name}: got {got}, takes task {task} beside it")

    def full(self) -> Experiment:
        """The same experiment at the full length, 1,200 steps of 64 sequences; steps and batch_size must be 0."""
        self._left_to("full", "steps", "batch_size")
        return replace(self, steps=1200, batch_size=64)

    def grid(self) -> dict[str, Experiment]:
        """Every rule and every control on both settings of recall, pairs listed once at T = `seq_len` (128) and twice
        at half as many tokens again, with tests at 2, 4 and 8 times the length; 5 seeds and 600 steps, unless given.
        Needs mqar, and eval_lengths and passes at their defaults.
        """
        self._left_to("grid", "task", "eval_lengths", "passes")
        T = self.seq_len or 128
        models, seeds, steps = self.models or GRID, self.seeds or 5, self.steps or _GRID_STEPS
        both = replace(self, models=models, seeds=seeds, steps=steps, eval_lengths=(2, 4, 8))
        return {"1-pass": replace(both, seq_len=T), "2-passes": replace(both, seq_len=3 * T // 2, passes=2)}

    def _left_to(self, option: str, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) != getattr(Experiment, name):
                raise ValueError(f"{name}: got {value} beside {option}, takes one of the two")

    def resolved(self) -> Experiment:
        """The same experiment with the task's defaults in place of zeros and models written out.

        Raises ValueError for a field out of range, a model's name of another form, or one that stands twice.
        """
        self.check()
        models = variants(self.models) or DEMO
        if len(set(models)) < len(models):
            raise ValueError(f"models: got {' '.join(models)}, takes different names")
        text = self.task == "text"
        steps = self.steps or _DEFAULT_STEPS[self.task]
        # More listings lengthen the sequence, so that the region of the queries stays as long as with one pass.
        seq_len = self.seq_len or (256 if text else 128 + 2 * self.num_pairs * (self.passes - 1))
        vocab_size = 256 if text else self.vocab_size

        def fits(pairs: int) -> bool:
            return 2 * pairs * (self.passes + 1) <= seq_len and 2 * pairs + 2 <= vocab_size

        return replace(
            self,
            models=models,
            seeds=self.seeds or 2,
            steps=steps,
            batch_size=self.batch_size or (16 if text else 32),
            seq_len=seq_len,
            vocab_size=vocab_size,
            eval_pairs=tuple(sorted({p for p in self.eval_pairs if fits(p)})),
            eval_lengths=tuple(sorted(set(self.eval_lengths))),
            eval_every=self.eval_every or max(1, steps // 10),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = json.loads(json.dumps(asdict(self), default=str))
        assert isinstance(plain, dict)
        return plain

    def identity(self, data_digest: str | None) -> dict[str, Any]:
        """All that decides the results: the resolved fields, with the data's digest in place of its paths."""
        fields = {name: value for name, value in self.as_dict().items() if name not in _PATHS}
        return {"format": _FORMAT, **fields, "data_sha256": data_digest}


def parse_variant(name: str) -> tuple[str, dict[str, Any]]:
    """A preset's name and the options in brackets behind it, "osdn-apf[d_init=0,feedback=beta_aware]", values as in
    JSON, other words as text. Raises ValueError for another form.
    """
    preset, listed = _split(name)
    options = {}
    for option, values in listed:
        try:
            options[option] = json.loads(values[0].lower())
        except ValueError:
            options[option] = values[0]
    return preset, options


def variants(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names with every combination of alternatives, "osdn[d_init=0|1]", written out; options sorted by name."""
    out = []
    for name in names:
        preset, listed = _split(name)
        for values in itertools.product(*(alternatives for _, alternatives in listed)):
            options = ",".join(f"{option}={value}" for (option, _), value in zip(listed, values, strict=True))
            out.append(f"{preset}[{options}]" if options else preset)
    return tuple(out)


def _split(name: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """Preset, and by option its alternatives."""
    word = r"[\w.+-]+"
    option = rf"\w+={word}(?:\|{word})*"
    if not (match := re.fullmatch(rf"({word})(?:\[({option}(?:,{option})*)\])?", name)):
        raise ValueError(f"models: got {name!r}, takes a preset's name or 'name[option=value|value,option=value]'")
    listed = sorted(part.split("=") for part in match[2].split(",")) if match[2] else []
    if len({option for option, _ in listed}) < len(listed):
        raise ValueError(f"models: got {name!r}, takes every option once")
    return match[1], [(option, values.split("|")) for option, values in listed]
