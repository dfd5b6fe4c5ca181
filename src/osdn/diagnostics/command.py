"""The work behind `osdn diagnose`: checkpoint, data, measurement, files."""

from __future__ import annotations

import csv
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from osdn.compare.config import Experiment
from osdn.compare.train import build
from osdn.data import MQAR
from osdn.data.text import VOCAB_SIZE, read_bytes, spread_blocks
from osdn.data.tokenizer import checkpoint_tokenizer, encoder, has_tokenizer
from osdn.diagnostics.config import Diagnose
from osdn.diagnostics.measure import diagnose
from osdn.diagnostics.page import page
from osdn.models.checkpoint import load_model
from osdn.ops.options import refuse
from osdn.runs import RunError, first_line
from osdn.runs.provenance import provenance
from osdn.runs.store import write_atomic, write_json

Encode = Callable[[bytes], Tensor]
_MOST_BYTES = 1 << 26  # of one task; all of it is read, and only some blocks are used


def run(config: Diagnose) -> None:
    """See `Diagnose`."""
    for name in ("seq_len", "sequences", "chunk_size", "batch_size"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name}: got {value}, takes an int >= 1")
    _check_writable(config.out)
    model = load_any(config.checkpoint)
    tasks = load_tasks(config, model)
    steps = sum(-(-len(ids) // config.batch_size) for ids in tasks.values()) * -(-config.seq_len // config.chunk_size)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=steps)
        measured = diagnose(
            model,
            tasks,
            chunk_size=config.chunk_size,
            batch_size=config.batch_size,
            progress=lambda: bar.advance(task),
        )
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": str(config.checkpoint),
        "data": list(config.data),
        **provenance(),
        **measured,
    }
    contents = {"heads.csv": heads_csv(result), "positions.csv": positions_csv(result), "index.html": page(result)}
    write_json(config.out / "diagnosis.json", result)
    for name, text in contents.items():
        write_atomic(config.out / name, text.encode())
    for name, content in result["tasks"].items():
        ratios = [layer["all"]["ratio"] for layer in content["layers"]]
        print(f"{name}: residual ratio by layer {' '.join(f'{q:.3f}' for q in ratios)}")
    if not any("d" in layer["all"] for content in result["tasks"].values() for layer in content["layers"]):
        print("the checkpoint has no preconditioner (d = 1): there is a residual ratio, and no d to show")
    print(f"wrote {', '.join(contents)} and diagnosis.json in {config.out}")


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(f"out: got {out}, which cannot be written to ({error.strerror}); takes a directory") from None


def load_any(path: Path) -> nn.Module:
    """A model saved by transformers, or the checkpoint of a job of `osdn compare`. Raises ValueError or RunError."""
    return _model_of_a_job(path) if path.suffix == ".pt" else load_model(path)


def _model_of_a_job(path: Path) -> nn.Module:
    if not path.is_file():
        raise ValueError(f"checkpoint: got {path}, which does not exist")
    name, _, seed = path.stem.rpartition("-seed")
    try:
        identity = json.loads((path.parent.resolve().parent / "config.json").read_bytes())
        is_job = seed.isdecimal() and name in identity["models"]
    except (OSError, ValueError, KeyError, TypeError):  # it may be anybody's
        is_job = False
    if not is_job:
        refuse("checkpoint", path, "jobs/<model>-seed<i>.pt below an osdn compare run's config.json")
    known = {key: x for key, x in identity.items() if key in Experiment.__dataclass_fields__}
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in known.items()}
    model = build(Experiment(**fields), name, int(seed))
    try:
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
    except Exception as error:  # whatever damaged bytes lead torch.load to
        raise ValueError(f"checkpoint: got {path}, which cannot be loaded ({first_line(error)})") from None
    return model


def load_tasks(config: Diagnose, model: nn.Module) -> dict[str, Tensor]:
    """Name -> `[n, T]` token ids of every item of `data`. Raises ValueError, naming the item."""
    tasks: dict[str, Tensor] = {}
    to_ids: Encode | None = None
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    for item in config.data:
        name, source = ("", item) if "=" not in item or Path(item).exists() else item.split("=", 1)
        if not source:  # as a path it would be the current directory
            refuse("data", repr(item), "a path, mqar:<pairs>x<passes>, or one of them behind 'name='")
        if match := re.fullmatch(r"mqar:(\d+)x(\d+)", source):
            task = MQAR(int(match[1]), config.seq_len, vocabulary, int(match[2]))
            ids = task.batch(config.sequences, seed=0, split="test")[0]
        else:
            to_ids = to_ids or _encoder(config, vocabulary)
            ids = _blocks(item, Path(source), to_ids, config.sequences, config.seq_len)
        name = name or (source if match else Path(source).name or source)
        if name in tasks:
            raise ValueError(f"data: got {name!r} twice, takes different names, as in 'name=path'")
        tasks[name] = ids
    if not tasks:
        raise ValueError("data: got nothing, takes paths or mqar:<pairs>x<passes>")
    return tasks


def _encoder(config: Diagnose, vocabulary: int) -> Encode:
    """Bytes to token ids."""
    name = config.tokenizer
    source = config.checkpoint if name is None else Path(name)
    if name == "bytes" or (name is None and not has_tokenizer(source)):
        if vocabulary < VOCAB_SIZE:
            takes = f"takes a directory with one; bytes need a vocabulary of {VOCAB_SIZE}"
            raise ValueError(f"tokenizer: got {name or 'none'} for a vocabulary of {vocabulary}, {takes}")
        return lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if not has_tokenizer(source):
        raise ValueError(f"tokenizer: got {source}, without a tokenizer's files; takes a directory with them, or bytes")
    encode = encoder(checkpoint_tokenizer(source, vocabulary))

    def ids(text: bytes) -> Tensor:
        documents = text.decode(errors="replace").split("\0")[:-1]  # a byte 0 stands behind each
        return torch.tensor([token for document in documents for token in encode(document)])

    return ids


def _blocks(item: str, path: Path, to_ids: Encode, n: int, seq_len: int) -> Tensor:
    ids = to_ids(read_bytes("data", path, _MOST_BYTES)).numpy()
    if len(ids) < seq_len:
        raise ValueError(f"data: got {item!r} of {len(ids)} tokens, takes at least seq_len = {seq_len}")
    return spread_blocks(ids, n, seq_len)


def heads_csv(result: dict[str, Any]) -> str:
    """A row for every task, layer and head."""
    rows = [
        {"task": task, "layer": layer["name"], "head": h, **means}
        for task, content in result["tasks"].items()
        for layer in content["layers"]
        for h, means in enumerate(layer["heads"])
    ]
    return _csv(rows)


def positions_csv(result: dict[str, Any]) -> str:
    """A row for every task, layer and bin of relative position, with quantiles; a position is its bin's centre."""
    rows = []
    for task, content in result["tasks"].items():
        for layer in content["layers"]:
            for i, means in enumerate(layer["positions"]):
                row = {"task": task, "layer": layer["name"], "position": (i + 0.5) / len(layer["positions"])}
                row |= {name: x for name, x in means.items() if name != "quantiles"}
                for name, values in means["quantiles"].items():
                    row |= {f"{name}_{100 * q:.0f}%": x for q, x in zip(result["levels"], values, strict=True)}
                rows.append(row)
    return _csv(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
