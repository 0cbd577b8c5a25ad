"""What differs between the versions of transformers that the package supports, with the versions each line is for."""

from dataclasses import dataclass, fields

from transformers import modeling_outputs

# The state's name in outputs and in generate()'s arguments: `cache` from 5.24 on, where `past_key_values` is an alias
# that warns; `past_key_values` alone from 5.17 to 5.23.
STATE_NAMES = ("cache", "past_key_values")
STATE = "cache" if "cache" in {f.name for f in fields(modeling_outputs.BaseModelOutputWithPast)} else "past_key_values"


def _alias() -> property:
    return property(lambda self: self.past_key_values, doc="The state, as transformers calls it from 5.24 on.")


@dataclass
class BaseModelOutput(modeling_outputs.BaseModelOutputWithPast):
    """transformers' output, whose state is `cache` on every version."""

    if STATE != "cache":  # 5.17 to 5.23
        cache = _alias()


@dataclass
class CausalLMOutput(modeling_outputs.CausalLMOutputWithPast):
    """transformers' output, whose state is `cache` on every version."""

    if STATE != "cache":  # 5.17 to 5.23
        cache = _alias()


@dataclass
class SequenceClassifierOutput(modeling_outputs.SequenceClassifierOutputWithPast):
    """transformers' output, whose state is `cache` on every version."""

    if STATE != "cache":  # 5.17 to 5.23
        cache = _alias()
