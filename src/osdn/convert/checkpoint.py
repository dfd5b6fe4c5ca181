"""Reading a checkpoint of another kind, giving it a preconditioner, measuring what that changes, writing it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
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
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors'
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
    needed = (path for pattern in (*_COMPANIONS, "*.safetensors", "*.bin") for path in source.glob(pattern))
    if broken := [path.name for path in needed if not path.exists()]:
        raise ValueError(f"source: got {source}, where {broken[0]} is a link to nothing; takes whole checkpoints")
    PreconditionerOptions.parse(options)  # refuses what is wrong before any weight is read
    model = _load(source, config)
    numbers = {name: x for name, x in model.state_dict().items() if x.is_floating_point() and x.dtype.itemsize > 1}
    if strange := [name for name, x in numbers.items() if not bool(x.isfinite().all())]:
        raise ValueError(f"source: got {source}, whose {strange[0]} is not finite")
    tokens = _probe_tokens(source, model, probe)
    before = _logits(model, tokens)
    precondition_model(model, options)
    change = _change(before, _logits(model, tokens))
    dropped = _keep(model, source, config)
    _write(model, source, out)
    new = sum(p.numel() for name, p in model.named_parameters() if is_preconditioner_parameter(name))
    where = "random tokens" if probe is None else f"tokens of {probe}"
    left = f"left out, as {type(model).__name__} has no such weights: {', '.join(dropped)}\n" if dropped else ""
    return left + (
        f"wrote {out}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {new:,} new\n"
        f"logits on {tokens.shape[1]:,} {where}: {change}"
    )


def _load(source: Path, config: dict[str, Any], dtype: str = "auto") -> PreTrainedModel:
    """The model as it is; refuses what cannot take a preconditioner before it reads a weight."""
    if is_fla(config):
        return load_whole(OSDNForCausalLM.from_pretrained, source, dtype=dtype, config=translate(config))
    name = (config.get("architectures") or ["none"])[0]
    host = OSDNForCausalLM if config["model_type"] == "osdn" else getattr(transformers, name, None)
    if host is None:
        kinds = "flash-linear-attention's delta_net, gated_deltanet, kda, or a hybrid of transformers"
        raise ValueError(f"source: got model_type {config['model_type']} of class {name}, takes {kinds}")
    if is_preconditioned(config):
        raise ValueError(f"source: got {source}, which has its preconditioner already")
    with torch.device("meta"):
        find_hosts(host(AutoConfig.from_pretrained(source)))
    return load_whole(host.from_pretrained, source, dtype=dtype)


def _keep(model: PreTrainedModel, source: Path, config: dict[str, Any]) -> list[str]:
    """Give parameters that were rounded on loading, to the dtype of the whole, what `source` holds of them. Returns
    patterns of what transformers leaves out of it without a word."""
    saved = dict(_saved(source))
    silent = [x for x in model._keys_to_ignore_on_load_unexpected or [] if any(re.search(x, name) for name in saved)]
    widest = max(saved.values(), key=lambda dtype: dtype.itemsize, default=model.dtype)
    if widest.is_floating_point and widest.itemsize > model.dtype.itemsize:
        exact = _load(source, config, str(widest).removeprefix("torch."))
        parameters = dict(model.named_parameters())
        for name, p in exact.named_parameters():
            if not torch.equal(p, p.to(parameters[name].dtype).to(p.dtype)):
                parameters[name].data = p.data
    return sorted(x.removeprefix("^") for x in silent)


def _saved(source: Path) -> Iterator[tuple[str, torch.dtype]]:
    """Names and dtypes in the files that transformers reads weights from."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        files, index = [name] * (source / name).exists(), source / f"{name}.index.json"
        if not files and index.exists():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        for file in files:
            if file.endswith(".bin"):
                tensors = torch.load(source / file, map_location="meta", weights_only=True)
                yield from ((key, x.dtype) for key, x in tensors.items())
                continue
            with safe_open(source / file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118, no mapping
                    yield key, _DTYPES.get(weights.get_slice(key).get_dtype(), torch.bool)
        if files:
            return


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
