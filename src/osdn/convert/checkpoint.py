"""Reading a checkpoint of another kind, giving it a preconditioner, measuring what that changes, writing it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from osdn.convert.fla import is_fla, translate
from osdn.data.text import read_text
from osdn.data.tokenizer import checkpoint_tokenizer
from osdn.generate.text import Codec
from osdn.models.checkpoint import is_preconditioned, load_whole, quiet, read_config
from osdn.models.hybrid import find_hosts, precondition_model
from osdn.models.modeling import OSDNForCausalLM
from osdn.nn.layer import is_preconditioner_parameter
from osdn.nn.options import PreconditionerOptions
from osdn.runs import RunError
from osdn.runs.store import open_up

_PROBE = 1024  # tokens
_WIDE = {"F32": 4, "F64": 8}  # bytes, by safetensors' names
# What may stand beside config and weights and goes along.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*", "*processor_config.json", "tokenization_*.py", "*.tiktoken"),
    *("bpe.codes", "*.vocab", "LICENSE*"),
)


def convert(source: Path, out: Path, options: dict[str, Any], *, probe: Path | None = None) -> str:
    """Write the checkpoint in `source` to `out` with a preconditioner of these `options`; what was done, in words.

    options: fields of `osdn.nn.PreconditionerOptions`; those not named are `osdn.models.hybrid.upgrade_options`'.
    probe: text to compare logits on, before and after; None takes random tokens.

    Nothing in `source` is touched, and `out` is there as a whole or not at all. Raises ValueError for what cannot be
    converted, by name, and RunError where files cannot be read or written.
    """
    config = read_config(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: got {out}, which is {'not empty' if out.is_dir() else 'a file'}, takes a new directory")
    if broken := [path.name for path in source.iterdir() if not path.exists()]:
        raise ValueError(f"source: got {source}, where {broken[0]} is a link to nothing; takes whole checkpoints")
    PreconditionerOptions.parse(options)  # refuses what is wrong before any weight is read
    model = _load(source, config)
    if strange := [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]:
        raise ValueError(f"source: got {source}, whose {strange[0]} is not finite")
    tokens = _probe_tokens(source, model, probe)
    before = _logits(model, tokens)
    precondition_model(model, options)
    change = _change(before, _logits(model, tokens))
    dropped = _keep(model, source)
    _write(model, source, out)
    new = sum(p.numel() for name, p in model.named_parameters() if is_preconditioner_parameter(name))
    where = "random tokens" if probe is None else f"tokens of {probe}"
    left = f"left out, as {type(model).__name__} has no such weights: {', '.join(dropped)}\n" if dropped else ""
    return left + (
        f"wrote {out}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {new:,} new\n"
        f"logits on {tokens.shape[1]:,} {where}: {change}"
    )


def _load(source: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The model as it is; refuses what cannot take a preconditioner before it reads a weight."""
    if is_fla(config):
        return load_whole(OSDNForCausalLM.from_pretrained, source, config=translate(config))
    name = (config.get("architectures") or ["none"])[0]
    host = OSDNForCausalLM if config["model_type"] == "osdn" else getattr(transformers, name, None)
    if host is None:
        kinds = "flash-linear-attention's delta_net, gated_deltanet, kda, or a hybrid of transformers"
        raise ValueError(f"source: got model_type {config['model_type']} of class {name}, takes {kinds}")
    if is_preconditioned(config):
        raise ValueError(f"source: got {source}, which has its preconditioner already")
    with torch.device("meta"):
        find_hosts(host(AutoConfig.from_pretrained(source)))
    return load_whole(host.from_pretrained, source)


@torch.no_grad()
def _keep(model: PreTrainedModel, source: Path) -> list[str]:
    """Give parameters that transformers has rounded to the dtype of most, as decays, what `source` holds of them.
    Returns the names of what transformers leaves out without a word, numbers as *."""
    parameters, silent = dict(model.named_parameters()), model._keys_to_ignore_on_load_unexpected or []
    dropped = set[str]()
    for file in _weights(source):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, no mapping
                if any(re.search(pattern, name) for pattern in silent):
                    dropped.add(re.sub(r"\d+", "*", name))
                if name not in parameters:
                    continue
                p, saved = parameters[name], weights.get_slice(name)
                if list(p.shape) == saved.get_shape() and _WIDE.get(saved.get_dtype(), 0) > p.dtype.itemsize:
                    p.data = weights.get_tensor(name)
    return sorted(dropped)


def _weights(source: Path) -> list[Path]:
    """The safetensors files that transformers reads."""
    index, one = source / "model.safetensors.index.json", source / "model.safetensors"
    if one.exists() or not index.exists():
        return [one] if one.exists() else []
    return [source / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


def _probe_tokens(source: Path, model: PreTrainedModel, probe: Path | None) -> Tensor:
    """[1, T]"""
    size = model.config.get_text_config().vocab_size
    if probe is None:
        return torch.randint(size, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    tokens = Codec(checkpoint_tokenizer(source, size)).encode(read_text("probe", probe))
    return torch.tensor([tokens[:_PROBE]])


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits[0].float()


def _change(before: Tensor, after: Tensor) -> str:
    """[T, vocabulary] both; the divergence of float32 logits this close has to be summed in float64."""
    relative, most = (after - before).norm() / before.norm(), (after - before).abs().max()
    divergence = 0.0
    for a, b in zip(before.split(64), after.split(64)):
        p, q = (y.double().log_softmax(-1) for y in (a, b))
        divergence += float((p.exp() * (p - q)).sum()) / len(before)
    return (
        f"they differ by {relative:.1e} of their norm, at most {most:.1e}; "
        f"divergence from the source {divergence:.1e} nats a token"
    )


def _write(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Weights, config and the source's tokenizer, written beside `out` and then renamed to it."""
    beside = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        with quiet():
            model.save_pretrained(beside)
        for path in {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}:
            copy = beside / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
        open_up(beside)
        beside.replace(out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
