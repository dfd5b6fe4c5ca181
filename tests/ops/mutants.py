"""Wrong-but-plausible implementations: one edit each, of the kind that review overlooks."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from pathlib import Path
from types import ModuleType

import osdn
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
    "one token late into the scan": (
        scans,
        "solved.cummin(1).values",
        "torch.cat([solved[:, :1] | True, solved[:, :-1]], 1).cummin(1).values",
    ),
    "solve trusted behind a clip": (scans, "solved.cummin(1).values", "solved"),
    "clip passes its gradient": (scans, "torch.eq(raw, now, out=inside)", "torch.eq(raw, raw, out=inside)"),
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
    "adjoint without lambda": (scans, "lam_[:, :1] * u[:, 0]", "u[:, 0]"),
    "scan without lambda": (scans, "now if keep is None else keep * now", "now"),
    "scan adjoint without lambda": (scans, "m if lam is None else m * lam[..., None]", "m"),
    "scan adjoint with a token's own mask": (
        scans,
        "torch.cat([torch.ones_like(s[:, :1]), inside[:, :-1].to(s.dtype)], 1)",
        "inside.to(s.dtype)",
    ),
    "scan adjoint without the feedback": (scans, ".addcmul_(torch.bmm(u, pull_), s_)", ""),
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


def mutate_kernels(edit: tuple[str, str, str] | None, folder: Path, module: str = "function") -> ModuleType:
    """A module of the Triton backend, in a copy of its package with one edit: of that file, old for new."""
    package = f"kernels_mutant_{next(_serial)}"
    shutil.copytree(Path(osdn.__file__).parent / "ops" / "triton", folder / package)
    for path in (folder / package).glob("*.py"):
        source = path.read_text().replace("osdn.ops.triton", package).replace('"osdn::', f'"{package}::')
        if edit is not None and path.stem == edit[0]:
            _, old, new = edit
            assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {path.name}"
            source = source.replace(old, new)
        path.write_text(source)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(f"{package}.{module}")
    finally:
        sys.path.remove(str(folder))


# Of the Triton kernels, by file; caught by the definition.
KERNEL_MUTANTS = {
    "read with the write key": ("delta", "A = tl.dot(kr, wt,", "A = tl.dot(wd, wt,"),
    "write with the read key": ("precondition", "        D *= x\n", "        D = x\n"),
    "steps of keys as they are stored": ("precondition", "x *= per_token(rk,", "x *= 1.0  # (rk,"),
    "inverse of the wrong half": ("shared", "tl.dot(tl.dot(second, B", "tl.dot(tl.dot(first, B"),
    "residual on the undecayed state": ("delta", "fk *= upto", "fk *= 1.0"),
    "state undecayed": ("delta", " S *= kept[:, None]", " S *= 1.0"),
    "state of a channel undecayed": (
        "delta",
        "kept = tl.load(decay + cell * K + i, i < K, 0.0)",
        "kept = tl.full([BK], 1.0, tl.float32)",
    ),
    "output misses its own write": ("delta", "below(PP, C, True)", "below(PP, C, False)"),
    "decay of a write includes its own token": ("delta", "at = ((first + r + 1) * HV", "at = ((first + r) * HV"),
    "adjoint of the state undecayed": ("delta", "dS *= tl.expand_dims(kept, ROW)", "dS *= 1.0"),
    "adjoint of the read without beta": ("delta", "expand_dims(b * fk, ROW)", "expand_dims(fk, ROW)"),
    "adjoint of the own write dropped": ("delta", "dP = below(dP, C, True)", "dP = below(dP, C, False)"),
    "cotangent of the final state dropped": ("delta", "dS = tl.load(dS_end", "dS = 0.0 * tl.load(dS_end"),
    "gradient of the decay without the write": (
        "delta",
        "dg_row += along_q + b * along_k - along_w",
        "dg_row += along_q + b * along_k",
    ),
    "d shifted by one": ("precondition", "return below(R, C, False)", "return below(R, C, True)"),
    "d shifted by one where clips fire": ("precondition", "tl.where(r[:, None] == j,", "tl.where(r[:, None] == j + 1,"),
    "lambda dropped": ("precondition", "e, kept * d + total(", "e, d + total("),
    "lambda dropped where clips fire": (
        "precondition",
        "raw += tl.exp(log_kept) * d",
        "raw += d",
    ),
    "first token sees lambda": (
        "precondition",
        "c2 *= G",
        "c2 *= G * tl.exp(per_token(forget, first, end, h, HV, C))",
    ),
    "aware feedback without the inner beta": ("precondition", "c2 = b * b", "c2 = b"),
    "no box": ("precondition", "if free == 0:\n            tl.atomic", "if False:\n            tl.atomic"),
    "no upper bound": ("precondition", " & (high <= d_max)", ""),
    "bound without lambda": ("precondition", "low = tl.minimum(d, kept * d) +", "low = d +"),
    "quick bound without lambda": ("precondition", "low = tl.minimum(d, kept * d) -", "low = d -"),
    "walk without the box": ("precondition", "clip(raw_t, d_min, d_max), new)", "raw_t, new)"),
    "walk from a chunk later": (
        "precondition",
        "begun = tl.load(stops + n * HV + h)",
        "begun = tl.load(stops + n * HV + h) + 1",
    ),
    "first clip a token late": ("precondition", "inside, C, j[:, None])", "inside, C, j[:, None] + 1)"),
    "no step before the first clip": ("precondition", "after = steps[:, None] * s", "after = 0.0 * s"),
    "first clip without lambda": ("precondition", "after + kept * start", "after + start"),
    "walk begins with d of the chunk": ("precondition", "r[:, None] == C - tail, D", "r[:, None] == 0, D"),
    "a step more before the first clip": ("precondition", "j[:, None] == count - 1", "j[:, None] == count"),
    "last clip forgotten": ("precondition", "latest = m", "latest = begun"),
    "adjoint of d without the feedback": (
        "precondition",
        "new = rest + kept * adj - total(xx, (eta * c2 * ps)[:, None])",
        "new = rest + kept * adj",
    ),
    "adjoint of d without lambda": ("precondition", "new = rest + kept * adj", "new = rest + adj"),
    "clip passes its gradient": ("precondition", "(((bits >> (v + o)) & 1) == 1, new, 0.0)", "(sq >= 0, new, 0.0)"),
    "adjoint of d without lambda where clips fire": (
        "precondition",
        "through *= tl.exp(log_kept)",
        "through *= 1.0",
    ),
    "segments on the way back by the map itself": (
        "delta",
        "S_map_T + at + i[None, :] + (u[:, None] - V) * K",
        "S_map_T + at + i[None, :] * K + u[:, None] - V",
    ),
    "d of segments on the way back by the map itself": (
        "precondition",
        "maps_T + at + i[None, :] + u[:, None] * K",
        "maps_T + at + i[None, :] * K + u[:, None]",
    ),
    "segments begin with what they alone make": ("shared", "        x += y\n", "        x = y\n"),
    "segments pass on what S begins with unchanged": ("shared", "y = tl.dot(E", "y = 0.0 * tl.dot(E"),
    "segments pass on what d begins with unchanged": ("shared", "y = total(E", "y = 0.0 * total(E"),
    "every segment begins with S_0": ("delta", "if S_0 is not None and n % split == 0:", "if S_0 is not None:"),
    "every segment ends with the cotangent of S": (
        "delta",
        "dB is not None else tl.where(n % split == split - 1, V, 0)))",
        "dB is not None else V))",
    ),
    "S behind the first segment given for the last": (
        "delta",
        "inside = (u < tl.where(n % split == split - 1, V, 0))",
        "inside = (u < tl.where(n % split == 0, V, 0))",
    ),
    "every segment begins with d_0": (
        "precondition",
        "+ i, i < tl.where(g == 0, K, 0), 0.0)",
        "+ i, i < K, 0.0)",
    ),
    "every segment ends with the cotangent of d": (
        "precondition",
        "d_adj_end + of_sequence, i < tl.where(n % split == split - 1, K, 0), 0.0)",
        "d_adj_end + of_sequence, i < K, 0.0)",
    ),
    "d behind the first segment given for the last": (
        "precondition",
        "live = i < tl.where(n % split == split - 1, K, 0)",
        "live = i < tl.where(n % split == 0, K, 0)",
    ),
    "adjoint of d before the last segment given for the first": (
        "precondition",
        "live = i < tl.where(n % split == 0, K, 0)",
        "live = i < tl.where(n % split == split - 1, K, 0)",
    ),
    "maps of segments in the order of the forward pass": (
        "shared",
        "split - 2 - step if BACK else step - 1",
        "step - 1 if BACK else step - 1",
    ),
    "segment with a clip passed on": (
        "precondition",
        "until - skipped, 0",
        "until, 0",
    ),
    "clip of the token before": ("precondition", "<< tl.minimum(v + u,", "<< tl.minimum(v + u + 1,"),
    "gradients where clips fire by no adjoint": (
        "precondition",
        "U = rows(u, first, end, h, HV, K, C, BK).to(tl.float32)",
        "U = 0.0 * s",
    ),
    "gradient without the feedback's x": ("precondition", "dc2 = -ps * total(D, s, 1)", "dc2 = 0.0 * ps"),
    "gradient of lambda, not of its logarithm": (
        "precondition",
        "total(U, D, 1) * tl.exp(f)",
        "total(U, D, 1)",
    ),
}

# Of the short convolution's; caught by its definition.
CONVOLUTION_MUTANTS = {
    "taps of the sequence before": ("conv", "(t >= begin) & (t < end)", "(t >= 0) & (t < end)"),
    "taps of the sequence behind": ("conv", "(t >= begin) & (t < end)", "(t >= begin) & (t <= end)"),
    "weights in the other order": ("conv", "weight + c * W + (W - 1 - j), c", "weight + c * W + j, c"),
    "the token itself left out": (
        "conv",
        "tap(x, t - j, c, begin, end, row, D)\n    out",
        "tap(x, t - j - 1, c, begin, end, row, D)\n    out",
    ),
    "no activation": ("conv", "out = (a * tl.sigmoid(a))", "out = (a)"),
    "gradient of the sigmoid alone": ("conv", "(1.0 + a * (1.0 - s))", "a * (1.0 - s)"),
    "activation computed of the token itself": ("conv", "tap(x, t + (i - j), c", "tap(x, t - j, c"),
    "gradients of x by the weights in the other order": (
        "conv",
        "factor(weight, c, i, D, W) * da",
        "factor(weight, c, W - 1 - i, D, W) * da",
    ),
    "gradients of the weights in the other order": ("conv", "* W + (W - 1 - j), part", "* W + j, part"),
    "every part from the first one's channels": (
        "conv",
        "_launch(conv_fwd_kernel, x.shape[2], table, part,",
        "_launch(conv_fwd_kernel, x.shape[2], table, x,",
    ),
}
