"""The config of transformers' own `xlstm` (NX-AI/xLSTM-7b) from and to ours."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import xLSTMConfig

# transformers' settings that we have under another name
_NAMES = {"gate_soft_cap": "gate_soft_cap", "output_logit_soft_cap": "logit_soft_cap", "norm_eps": "norm_eps"}
_SAME = ["vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "tie_word_embeddings", "use_cache"]
_SAME += ["pad_token_id", "bos_token_id", "eos_token_id"]
# and such that change what the model computes and have no counterpart
_REQUIRED = {"add_out_norm": True, "weight_mode": "single", "eps": 1e-6, "use_bias": False}
_SIZES = ["qk_dim_factor", "v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of"]


def from_transformers_config(config: dict[str, Any]) -> dict[str, Any]:
    """A transformers `xlstm` config.json as the settings of one of ours.

    Raises:
        ValueError: a setting that changes what the model computes and that ours does not have.
    """
    from transformers import xLSTMConfig  # imports the xlstm package where there is one

    config = dict(config)
    for name, other in (
        ("hidden_size", "embedding_dim"),
        ("num_hidden_layers", "num_blocks"),
        ("dtype", "torch_dtype"),
    ):
        if config.get(name) is None and config.get(other) is not None:
            config[name] = config[other]
    # only what is read: other settings, such as kernels, are valid or not by what is installed
    read = [*_SAME, *_NAMES, *_REQUIRED, *_SIZES]
    full = xLSTMConfig(**{name: config[name] for name in read if name in config})
    for name, value in _REQUIRED.items():
        if getattr(full, name) != value:
            raise ValueError(
                f"{name}: expected {value!r} in the config of this xlstm checkpoint, got {getattr(full, name)!r}"
            )
    size = full.ffn_round_up_to_multiple_of
    return {
        "block_layout": "7b",
        **{name: getattr(full, name) for name in _SAME},
        **{ours: getattr(full, theirs) for theirs, ours in _NAMES.items()},
        "qk_size": int(full.hidden_size * full.qk_dim_factor),
        "v_size": int(full.hidden_size * full.v_dim_factor),
        "intermediate_size": int((full.hidden_size * full.ffn_proj_factor + size - 1) // size * size),
        **({"dtype": config["dtype"]} if "dtype" in config else {}),
    }


def to_transformers_config(config: Any) -> "xLSTMConfig":
    """The config with which transformers' `xlstm` is the same model.

    Raises:
        ValueError: a model it cannot be.
    """
    if not config.is_7b:
        raise ValueError(f"block_layout: transformers' xlstm has the '7b' blocks alone, got {config.block_layout!r}")
    if config.has_attention:
        raise ValueError("layer_types: transformers' xlstm has recurrent layers alone, got attention")
    if config.use_bias:
        raise ValueError("use_bias: in transformers' xlstm the norms then have biases, too, which ours have not")
    if config.gate_soft_cap is None or config.logit_soft_cap is None:
        raise ValueError("gate_soft_cap, logit_soft_cap: transformers' xlstm has both, got None")
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings: transformers' xlstm does not tie them; untie the weights first")
    from transformers import xLSTMConfig

    sizes = config.sizes
    return xLSTMConfig(
        **{name: getattr(config, name) for name in _SAME},
        **{theirs: getattr(config, ours) for theirs, ours in _NAMES.items() if ours != "norm_eps"},
        norm_eps=config.epsilon,
        qk_dim_factor=_factor(sizes["qk_size"], config.hidden_size),
        v_dim_factor=_factor(sizes["v_size"], config.hidden_size),
        ffn_proj_factor=_factor(sizes["intermediate_size"], config.hidden_size),
        ffn_round_up_to_multiple_of=1,
        architectures=["xLSTMForCausalLM"],
    )


def _factor(size: int, width: int) -> float:
    """What times `width` is `size` or, where rounding would make it less, at most half more: it is rounded down."""
    factor = size / width
    return factor if int(factor * width) == size else (size + 0.5) / width
