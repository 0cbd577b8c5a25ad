"""What differs between the supported versions of transformers and huggingface_hub, with the versions each is for."""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers import modeling_outputs
from transformers.quantizers import HfQuantizer

# The state's name in outputs and in generate()'s arguments: `cache` from 5.24 on, where `past_key_values` is an alias
# that warns; `past_key_values` alone from 5.17 to 5.23.
STATE_NAMES = ("cache", "past_key_values")
STATE = "cache" if "cache" in {f.name for f in fields(modeling_outputs.BaseModelOutputWithPast)} else "past_key_values"


def mask_length(generation_config: Any, attention_mask: Tensor | None, input_ids: Tensor) -> int:
    """Of the mask that generate() got or made; since 5.17 one of ones alone is left out, and its length remembered."""
    if attention_mask is not None:
        return attention_mask.shape[1]
    return getattr(generation_config, "_mask_length", input_ids.shape[1])


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


class AssignablePlan:
    """For a config whose `base_model_tp_plan` follows from its other settings: transformers 5.17 to 5.20 assign to it
    what they add for tied embeddings."""

    def tensor_parallel_plan(self) -> dict[str, str]:
        """How the backbone's matrices lie over processes, by their names, in transformers' terms; {}: whole on each, as
        those of bidirectional models are."""
        return {}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        plan = {} if self.bidirectional else self.tensor_parallel_plan()  # type: ignore[attr-defined]
        return vars(self).get("base_model_tp_plan", plan)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        vars(self)["base_model_tp_plan"] = plan


def refuse_bools(config: Any) -> None:
    """Raise ValueError for a True or False that should be a number: huggingface_hub before 2 takes it for one."""
    for setting in fields(config):
        value = getattr(config, setting.name, None)
        if isinstance(value, bool) and "bool" not in str(setting.type):
            raise ValueError(f"{setting.name}: expected {setting.type}, got {value}")


class QuantizerHooks(HfQuantizer):
    """The hooks of a quantizer that are not called alike. The one with the config before files are looked for is
    `update_tp_plan` in 5.17, `update_attn_implementation` since; conversions come without the model before 5.21."""

    def before_files(self, config: Any) -> Any:
        """The config to go on with."""
        return config

    def update_tp_plan(self, config):
        return self.before_files(config)

    def update_attn_implementation(self, config):
        return self.before_files(config)

    def update_weight_conversions(self, weight_conversions, model=None):
        return weight_conversions + self.get_weight_conversions()
