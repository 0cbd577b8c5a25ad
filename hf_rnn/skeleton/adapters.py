"""What PEFT is told about the package's models."""

import sys


def register_lora_targets(model_type: str) -> None:
    """Let `LoraConfig()` without `target_modules` adapt every linear layer but the head.

    PEFT has a table of what to adapt by model type, for transformers' own models. Before it looks there, it asks the
    model's config for its dict, which calls this: PEFT is imported then, and not here for everybody else.
    """
    if (constants := sys.modules.get("peft.utils.constants")) is not None:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(model_type, "all-linear")
