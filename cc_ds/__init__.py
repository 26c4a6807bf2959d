"""CC-Tuning at DeepSpeed scale: an English prompt read beside a target prompt, connected by a trained gate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cc_ds.config import CCConfig
    from cc_ds.connection.model import CCModelForCausalLM

__version__ = "0.1.0"
__all__ = ["CCConfig", "CCModelForCausalLM"]

_HOMES = {"CCConfig": "cc_ds.config", "CCModelForCausalLM": "cc_ds.connection.model"}


def __getattr__(name: str):
    # Lazy: `import cc_ds` must not cost the seconds that importing transformers takes.
    if name not in _HOMES:
        raise AttributeError(f"module 'cc_ds' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
