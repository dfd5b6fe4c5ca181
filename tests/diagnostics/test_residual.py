import pytest
import torch

from osdn import DeltaState, OSDNConfig, online_scaled_delta_rule
from osdn.diagnostics.residual import residual_ratio, token_residuals
from osdn.nn import layer


@pytest.mark.parametrize("preset", ["deltanet", "osdn", "osdn-apf", "beta2", "os-gdn", "os-kda"])
def test_against_the_states_themselves(preset, monkeypatch):
    """The ratio of the losses of the states before and after each token, by the definition."""
    from osdn import OSDNForCausalLM

    torch.manual_seed(0)
    size = {
        "vocab_size": 11,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "head_dim": 6,
        "num_v_heads": 4,
    }
    model = OSDNForCausalLM(OSDNConfig.preset(f"{preset}-tiny", **size)).double()
    attn = model.model.layers[0].attn
    with torch.no_grad():
        attn.b_proj.weight.normal_()
        if hasattr(attn, "d0"):
            attn.d0.uniform_(0.2, 2)
    calls = []

    def record(*args, **options):
        calls.append((args, options))
        return online_scaled_delta_rule(*args, **options)

    monkeypatch.setattr(layer, "online_scaled_delta_rule", record)
    ids = torch.randint(0, 11, (2, 9))
    [ratios] = token_residuals(model, ids)
    assert not attn._write_hooks
    [((q, k, v, beta), options)] = calls
    unit = (k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(2, 2)

    S = torch.zeros(2, 4, 6, 6, dtype=torch.float64)
    d = options["initial_state"].d
    for t in range(9):
        now = {name: None if options[name] is None else options[name][:, t : t + 1] for name in ("g", "forget")}
        decay = torch.ones(1) if now["g"] is None else now["g"][:, 0].exp()
        before = S * decay.reshape(*decay.shape, *[1] * (4 - decay.ndim))
        part = [x[:, t : t + 1] for x in (q, k, v, beta)]
        state = DeltaState(S, d)
        _, state = online_scaled_delta_rule(
            *part, **now, preconditioner=options["preconditioner"], initial_state=state, output_final_state=True
        )
        S, d = state.S, state.d
        loss = [(v[:, t] - torch.einsum("nhkv,nhk->nhv", s, unit[:, t])).square().sum(-1) for s in (S, before)]
        torch.testing.assert_close(ratios[:, t], loss[0] / loss[1], rtol=1e-9, atol=1e-12)
    assert ratios.shape == (2, 9, 4)

    summary = residual_ratio(model, ids)
    assert summary["mean"] == pytest.approx(float(ratios.mean()))
    assert summary["geometric"] == pytest.approx(float(ratios.log().mean().exp()))
    assert summary["layers"] == [{"mean": summary["mean"], "geometric": summary["geometric"]}]
