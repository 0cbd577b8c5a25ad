"""Loading, saving, sharing and initialisation: what every model has of transformers' `PreTrainedModel`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hf_rnn.compression.weight_only import packed_from_coded, packed_room
from hf_rnn.layers import CausalConv, Mixer
from hf_rnn.remote_code.loader import write_remote_code
from hf_rnn.skeleton.block import RecurrentBlock
from hf_rnn.skeleton.configuration_recurrent import RecurrentConfig
from hf_rnn.skeleton.integrity import check_files, find_damaged_file, find_wrong_shape
from hf_rnn.skeleton.versions import STATE_NAMES
from hf_rnn_kernels.packed_linear import PackedLinear


class RecurrentPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation. The state is a `RecurrentCache` under the names of `STATE_NAMES`."""

    config: RecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentBlock"]
    _skip_keys_device_placement = list(STATE_NAMES)
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": RecurrentBlock}

    def __init__(self, config: RecurrentConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.num_input_features is not None:
            self.main_input_name = "input_features"

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing to register: every config carries the auto_map, and saving writes the module it names."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As for transformers' own models. For others it passes by modules without parameters of their own, such as
        mixers that initialise those of their projections, in case they overwrite loaded ones; ours do not."""
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Mixer):
            module.init_weights()
        elif isinstance(module, nn.Linear) and std is None:
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, CausalConv):
            if std is None:  # torch's convolutions
                bound = module.kernel_size**-0.5
                init.uniform_(module.weight, -bound, bound)
            else:
                init.normal_(module.weight, std=std)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', with errors that name file and tensor where something is damaged.

        Raises:
            ValueError: weights are missing, but for a head on another's backbone (with `output_loading_info` or a
                `state_dict` that is the caller's to judge); an index of shards names files elsewhere.
            OSError: a file that is no safetensors file, or no JSON.
            RuntimeError: a tensor of another shape.
        """
        source = Path(str(pretrained_model_name_or_path)) / kwargs.get("subfolder", "")
        if pretrained_model_name_or_path is not None:
            check_files(source)
        coded_as, kwargs = packed_from_coded(cls, pretrained_model_name_or_path, kwargs)
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            file = find_damaged_file(source)
            raise OSError(f"{file}: the weights cannot be read ({error}); copy or download the file again") from error
        except (AttributeError, KeyError, TypeError) as error:
            if (file := find_damaged_file(source)) == source:
                raise
            raise OSError(f"{file}: expected a JSON object ({error}); copy or download the file again") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            config: Any = kwargs.get("config") or cls.config_class.from_pretrained(  # type: ignore[union-attr]
                pretrained_model_name_or_path, **kwargs
            )
            with torch.device("meta"):
                raise RuntimeError(find_wrong_shape(source, packed_room(cls(config))) or str(error)) from error
        if coded_as is not None:
            coded_as.pack_exactly(loaded[0])
        if output_loading_info:
            return loaded
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if cls.__name__ not in (model.config.architectures or []) and hasattr(model, cls.base_model_prefix):
            missing = [name for name in missing if name.startswith(f"{cls.base_model_prefix}.")]  # else: a new head
        if missing and kwargs.get("state_dict") is None:
            stored, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore
            told = _told_otherwise(model.config, stored)
            reason = (
                f"the config was told otherwise than the checkpoint's: {told}. Leave it as it is, or train a new model"
                if told
                else "the checkpoint is damaged, or another model's"
            )
            raise ValueError(f"{source}: {len(missing)} of the weights are missing, {missing[0]!r} the first; {reason}")
        return model

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As transformers', plus the file by which `trust_remote_code=True` finds this package.

        `save_original_format` is off: weights that came under other names are saved under this package's.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False} | kwargs)
        write_remote_code(self.config, save_directory)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As transformers'.

        Raises:
            ValueError: a head of packed integers, of which no rows can be added; a model that reads no tokens.
        """
        if self.config.num_input_features is not None:
            raise ValueError("resize_token_embeddings: this model reads input_features and embeds no tokens")
        if isinstance(self.get_output_embeddings(), PackedLinear):
            raise ValueError("resize_token_embeddings: the head is packed; dequantize() the model first")
        return super().resize_token_embeddings(*args, **kwargs)

    def write_code(self, folder: str) -> None:
        """Write the code by which a checkpoint of this model in `folder` loads without this package."""
        from hf_rnn.remote_code.bundle import write_bundle

        write_bundle(type(self.config), folder)

    def _upload_modified_files(self, working_dir, repo_id, *args, token=None, **kwargs):
        """As transformers', to which every push comes: with the code and, where the repository has none, a card."""
        from hf_rnn_trainers.model_card import write_first_card

        self.write_code(working_dir)
        write_first_card(self, working_dir, repo_id, token)
        return super()._upload_modified_files(working_dir, repo_id, *args, token=token, **kwargs)


def _told_otherwise(config: RecurrentConfig, stored: dict[str, Any]) -> str:
    """Settings of an architecture that are not those of a config.json: "bidirectional=True, there False"."""
    common = {field.name for field in fields(PreTrainedConfig)}
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in common}
    other = {name: value for name, value in values.items() if name in stored and stored[name] != value}
    return "; ".join(f"{name}={value!r}, there {stored[name]!r}" for name, value in other.items())
