"""The state a sequence carries between calls."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class DeltaState:
    """Recurrent state of the online scaled delta rule, one object for decode, resume and snapshot.

    S: `[N, HV, K, V]` matrix memory, key dimension first (`o = S^T q`); None stands for 0.
    d: `[N, HV, K]` diagonal preconditioner before the next token; None stands for 1.

    N counts sequences (the batch, or the sequences of a packed batch), HV value heads. float32, or float64 when the
    inputs are. Both are differentiable; `online_scaled_delta_step` alone modifies them in place.
    """

    S: Tensor | None = None
    d: Tensor | None = None

    def detach(self) -> DeltaState:
        """The same values, cut from the graph: truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def clone(self) -> DeltaState:
        """A snapshot that shares no memory with this state."""
        return self._map(Tensor.clone)

    def index_select(self, sequences: Tensor) -> DeltaState:
        """The states of the given sequences (`[M]` integers), in that order: beams, ragged batches."""
        return self._map(lambda x: x.index_select(0, sequences))

    def _map(self, f) -> DeltaState:  # type: ignore[no-untyped-def]
        return DeltaState(*(None if x is None else f(x) for x in (self.S, self.d)))
