"""Models for transformers: `import osdn` registers model_type "osdn" with its Auto classes."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from osdn.models.configuration import OSDNConfig

if TYPE_CHECKING:
    from osdn.models.hybrid import load_preconditioned, precondition_model
    from osdn.models.modeling import OSDNCache, OSDNForCausalLM, OSDNModel, OSDNPreTrainedModel

__all__ = [
    "OSDNCache",
    "OSDNConfig",
    "OSDNForCausalLM",
    "OSDNModel",
    "OSDNPreTrainedModel",
    "load_preconditioned",
    "precondition_model",
]

AutoConfig.register("osdn", OSDNConfig, exist_ok=True)


def __getattr__(name: str) -> Any:
    # transformers' model classes take seconds to import; see also OSDNConfig.__post_init__.
    if name in __all__:
        from osdn.models import hybrid, modeling

        return getattr(hybrid if hasattr(hybrid, name) else modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
