"""mythos_ds: trains recurrent-depth mixture-of-experts language models on DeepSpeed.

Its public names are those of `mythos_ds.api`, which is imported when one of them is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos_ds.api import (
        Callback,
        ModelConfig,
        MythosModel,
        RunConfig,
        Tokenizer,
        convert,
        evaluate,
        generate,
        load_config,
        plan_run,
        pretrain,
    )

__version__ = "0.2.0"

__all__ = [
    "Callback",
    "ModelConfig",
    "MythosModel",
    "RunConfig",
    "Tokenizer",
    "convert",
    "evaluate",
    "generate",
    "load_config",
    "plan_run",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mythos_ds import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
