"""Small models in which the preconditioner matters: at their initial values, tiny models hardly use their state."""

import pytest
import torch

import osdn

ACTIVE = {"d_max": 2.0, "d_init": 0.4, "forget_bias": 2.0}
MODELS = {
    "deltanet": ("deltanet", {}),
    "apf": ("osdn-apf", {"preconditioner": ACTIVE}),
    "osdn": ("osdn", {}),
    "os-gdn": ("os-gdn", {"preconditioner": {"d_init": 0.4}}),
    "os-kda": ("os-kda", {"num_v_heads": 4, "expand_v": 0.5}),
}


@pytest.fixture
def make_model():
    def make(name="apf", double=True, **overrides):
        preset, options = MODELS.get(name, (name, {}))
        torch.manual_seed(0)
        size = {"vocab_size": 53, "hidden_size": 24, "num_heads": 2, "head_dim": 12, "intermediate_size": 32}
        config = osdn.OSDNConfig.preset(f"{preset}-tiny", **{**size, **options, **overrides})
        model = osdn.OSDNForCausalLM(config).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("d0"):
                    p.uniform_(0.2, 2)
                elif p.ndim > 1 or key.endswith("g_proj.1.bias"):
                    p.normal_(std=1.0 if "embeddings" in key else 0.4)
        return model.double() if double else model

    return make


@pytest.fixture
def assert_d_moved():
    def check(model, cache):
        """The trap (docs/math.md, 3): where d stays at d_0, a test of the preconditioner proves nothing."""
        for layer, state in zip(model.model.layers, cache.layers):
            p = layer.attn.preconditioner
            if p is not None:
                d = state.recurrent_states[1]
                d_0 = layer.attn.d0 if p.learn_d_init else torch.full_like(d, p.d_init)
                assert (d - d_0).abs().amax(-1).min() > 0.05

    return check


@pytest.fixture
def tokens():
    return torch.randint(0, 53, (3, 13), generator=torch.Generator().manual_seed(1))
