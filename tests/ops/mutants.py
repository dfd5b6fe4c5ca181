"""Wrong-but-plausible implementations: one edit each, of the kind that review overlooks."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType

from osdn.ops import chunked, reference, scans

_serial = itertools.count()


def _load(module: ModuleType, old: str | None = None, new: str = "") -> ModuleType:
    """The module's source with its only occurrence of `old` replaced, as a module of its own."""
    source, serial = Path(module.__file__).read_text(), next(_serial)
    if old is not None:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
        source = source.replace(old, new)
    mutant = ModuleType(f"{module.__name__}_mutant_{serial}")
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    exec(compile(source.replace('"osdn::', f'"osdn_mutant_{serial}::'), mutant.__name__, "exec"), mutant.__dict__)
    return mutant


def mutate(module: ModuleType, old: str, new: str) -> ModuleType:
    """A backend with one edit in `module`; an edit of the scans is wrapped in an unchanged chunked backend."""
    mutant = _load(module, old, new)
    if module is not scans:
        return mutant
    backend = _load(chunked)
    for name in ("delta_scan", "precondition_scan", "segment_sums"):
        setattr(backend, name, getattr(mutant, name))
    return backend


MUTANTS = {
    # The definition; caught by the independent closed forms and the hand-worked case.
    "read with the write key": (reference, '"bhkv,bhk->bhv", S, k[:, t]', '"bhkv,bhk->bhv", S, w[:, t]'),
    "write with the read key": (reference, '"bhk,bhv->bhkv", w[:, t]', '"bhk,bhv->bhkv", k[:, t]'),
    "residual on the undecayed state": (
        reference,
        """exp() * S
            r = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])""",
        """exp() * (old := S)
            r = v[:, t] - torch.einsum("bhkv,bhk->bhv", old, k[:, t])""",
    ),
    "lambda dropped": (reference, "kept = d if forget is None else", "kept = d if True else"),
    "d after its own update": (
        reference,
        "            used.append(d)\n            s = k[:, t] ** 2",
        "            s = k[:, t] ** 2",
    ),
    "aware without the outer beta": (reference, "e = beta[:, t] * (1 - beta[:, t] * x)", "e = 1 - beta[:, t] * x"),
    "residual against the forgotten d": (
        reference,
        "            x = (d * s).sum(-1)",
        "            d = d if forget is None else forget[:, t, :, None].exp() * d\n            x = (d * s).sum(-1)",
    ),
    "no box": (reference, "p.d_min, p.d_max)", "-1e9, 1e9)"),
    "no scale": (reference, "o.append(scale * ", "o.append("),
    # The chunked forms; caught by the definition.
    "clip at chunk ends only": (
        scans,
        "            _finish_by_tokens(",
        "            after[:, -1].clamp_(d_min, d_max)\n            0 and _finish_by_tokens(",
    ),
    "clip on read only": (
        scans,
        "            _finish_by_tokens(",
        "            after.clamp_(d_min, d_max)\n            0 and _finish_by_tokens(",
    ),
    "one token late into the scan": (scans, "(t < first)[:, None]", "(t <= first)[:, None]"),
    "clip passes its gradient": (scans, "solved | (raw == clipped)", "solved | (raw == raw)"),
    "solve without the decay between": (scans, "return L if R is None else L.mul_(R)", "return L"),
    "decay between off by one": (scans, "else L.mul_(R)", "else L.mul_(R.roll(-1, 1))"),
    "first token sees lambda": (
        scans,
        "torch.cat([torch.zeros_like(forget[:, :1]), forget[:, :-1]], 1).cumsum(1)",
        "forget.cumsum(1)",
    ),
    "d shifted by one": (
        scans,
        "    return torch.cat([torch.zeros_like(R[:, :1]), R[:, :-1]], 1)",
        "    return R",
    ),
    "last update of a chunk lost": (scans, "torch.addcmul(last, e[:, -1], s_[:, -1])", "last"),
    "adjoint without the feedback term": (scans, "- back[:, 0]", ""),
    "adjoint without lambda": (scans, "lam[i, :1] * u_[:, 0]", "u_[:, 0]"),
    "scan adjoint without lambda": (scans, "lam[i, t, None] * u_", "u_"),
    "decays as differences of sums": (
        scans,
        "    return x.cumsum(1).masked_fill(~ones.tril(), -torch.inf)",
        "    c = f.cumsum(1)\n    return (c[:, :, None] - c[:, None]).masked_fill(~ones.tril(), -torch.inf)",
    ),
    "decay to the end as a difference": (
        chunked,
        "    return torch.cat([x[:, 1:].flip(1).cumsum(1).flip(1), torch.zeros_like(x[:, :1])], 1)",
        "    return x.sum(1, keepdim=True) - x.cumsum(1)",
    ),
    "wave order not undone": (chunked, "state[self.order.argsort()]", "state[self.order]"),
    "write key in the triangle's rows": (chunked, "kb, vb = k *", "kb, vb = w *"),
    "state decay of the next token": (chunked, "_sum_after(g).exp()", "g.flip(1).cumsum(1).flip(1).exp()"),
    "beta-free denominators unsquared": (chunked, "(b / n, b * b / n)", "(b / n, b * b)"),
    "output misses its own write": (chunked, "(q @ w.mT) * _lower(q)", "(q @ w.mT) * _lower(q).tril(-1)"),
    "cotangent of the final state dropped": (scans, "dS = grad_S.clone()", "dS = torch.zeros_like(grad_S)"),
    "adjoint of the state undecayed": (
        scans,
        "                dS_ *= kept[i, :, None]\n            dS_",
        "            dS_",
    ),
}
