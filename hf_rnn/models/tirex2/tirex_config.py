"""The config.json of the `tirex-2` package (NX-AI/TiRex-2) from and to ours."""

from typing import Any

# Settings that ours have under another name
_NAMES = {
    "num_blocks": "num_hidden_layers",
    "embedding_dim": "hidden_size",
    "input_patch_size": "patch_size",
    "quantiles": "quantiles",
    "context_len": "context_length",
    "future_len": "prediction_length",
    "input_ff_dim": "patch_intermediate_size",
}
_OPTIONS = {"use_qk_norm": ("qk_norm", True), "tta_sign_flip": ("sign_flip", False), "tta_diff": ("differencing", True)}
_ACTIVATIONS = {"SiLU": "silu", "GELU": "gelu", "ReLU": "relu", "Tanh": "tanh"}
# What says how it is computed, or nothing
_PASSED_OVER = {"device", "matmul_precision", "postprocessor_cfg"}
_READ = {"stack_config", "output_patch_size", "tokenizer_cfg", "scaler_cfg", "h_expand", "act_func", "dropout"}
_READ |= {"stack_out_norm_config", *_NAMES, *_OPTIONS}


def swiglu_size(width: int) -> int:
    """Channels of the feed-forward behind a recurrence of so many."""
    return -(-int(2.6667 * width) // 64) * 64


def from_tirex_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config of `tirex-2` as the settings of one of ours.

    Raises:
        ValueError: a setting that is missing, or that changes what the model computes and that ours does not have.
    """
    if unknown := [name for name in config if name not in _READ | _PASSED_OVER and not name.startswith("_")]:
        raise ValueError(f"{unknown[0]}: not a setting of tirex-2 0.4.0, got {config[unknown[0]]!r}")
    try:
        return _settings(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"config: expected that of a tirex-2 model, which has {error}") from error


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    patch, scaler, norm = config["input_patch_size"], config["scaler_cfg"], config.get("stack_out_norm_config")
    tokenizer = config["tokenizer_cfg"]
    for name in ("input_patch_size", "output_patch_size", "input_patch_stride"):
        if (got := tokenizer[name]) != patch:
            raise ValueError(f"tokenizer_cfg: expected {name} to be input_patch_size, {patch}, got {got}")
    if config["output_patch_size"] != patch:
        raise ValueError(f"output_patch_size: expected input_patch_size, {patch}, got {config['output_patch_size']}")
    activation = str(config["act_func"]).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"act_func: expected one of {', '.join(_ACTIVATIONS)}, got {config['act_func']!r}")
    return {
        **{ours: config[theirs] for theirs, ours in _NAMES.items()},
        **{ours: config.get(theirs, default) for theirs, (ours, default) in _OPTIONS.items()},
        **_blocks(config["stack_config"], config["embedding_dim"]),
        "hidden_act": _ACTIVATIONS[activation],
        "head_intermediate_size": int(config["embedding_dim"] * config["h_expand"]),
        "output_norm_eps": None if norm is None else norm.get("eps", 1e-7),
        "use_arcsinh": scaler.get("use_arcsinh", False),
        "binary_aware": scaler.get("binaryaware", False),
        "scale_eps": scaler.get("eps", 1e-8),
    }


def _blocks(stack: dict[str, Any], width: int) -> dict[str, Any]:
    """What the templates of blocks say, which must be the same of all that are used but for the recurrence."""
    templates = {name: stack["templates"][name] for name in stack["recipe"]}
    said: dict[str, list] = {}
    for template in templates.values():
        time, variates = template["time_mixer"], template["variate_mixer"]
        if time["model_type"] not in ("bi-mlstm", "bi-slstm"):
            raise ValueError(f"time_mixer: expected 'bi-mlstm' or 'bi-slstm', got {time['model_type']!r}")
        own = {"num_heads": time.get("num_heads", 4), "num_attention_heads": variates.get("num_heads", 4)}
        own |= {"embedding_dim": time["embedding_dim"], "hidden_dropout": template["dropout"] or 0.0}
        if time["model_type"] == "bi-slstm":
            own["num_slstm_heads"] = time.get("num_slstm_heads") or own["num_heads"]
        for name, value in own.items():
            said.setdefault(name, []).append(value)
    if several := [name for name, values in said.items() if len(set(values)) > 1]:
        raise ValueError(f"stack_config: expected one {several[0]} for all blocks, got {said[several[0]]}")
    settings = {name: values[0] for name, values in said.items()}
    if settings.pop("embedding_dim") != width:
        raise ValueError(f"stack_config: expected embedding_dim {width} for all blocks")
    kinds = [templates[name]["time_mixer"]["model_type"] for name in stack["recipe"]]
    return settings | {"slstm_at": [index for index, kind in enumerate(kinds) if kind == "bi-slstm"]}


def to_tirex_config(config: Any) -> dict[str, Any]:
    """The config with which `tirex-2` has the same model.

    Raises:
        ValueError: a model that it does not have.
    """
    if config.intermediate_size not in (None, size := swiglu_size(config.hidden_size)):
        raise ValueError(f"intermediate_size: tirex-2 has {size} at this hidden_size, got {config.intermediate_size}")
    if config.norm_eps != 1e-6:
        raise ValueError(f"norm_eps: tirex-2 has 1e-6 alone, got {config.norm_eps}")
    if config.hidden_act not in _ACTIVATIONS.values():
        raise ValueError(f"hidden_act: expected one of {', '.join(_ACTIVATIONS.values())}, got {config.hidden_act!r}")
    width, patch, dropout = config.hidden_size, config.patch_size, config.hidden_dropout

    def template(kind):
        heads = {"embedding_dim": width, "num_heads": config.num_heads, "num_slstm_heads": config.slstm_heads}
        variates = {"embedding_dim": width, "num_heads": config.num_attention_heads}
        return dict(time_mixer={"model_type": kind, **heads}, variate_mixer=variates, dropout=dropout, eps=1e-6)

    recipe = ["slstm" if n in config.slstm_blocks else "mlstm" for n in range(config.num_hidden_layers)]
    sizes = dict(input_patch_size=patch, output_patch_size=patch)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _NAMES.items()},
        **{theirs: getattr(config, ours) for theirs, (ours, _) in _OPTIONS.items()},
        "stack_config": dict(templates={kind: template(f"bi-{kind}") for kind in ("mlstm", "slstm")}, recipe=recipe),
        "output_patch_size": patch,
        "tokenizer_cfg": sizes | {"input_patch_stride": patch},
        "scaler_cfg": dict(use_arcsinh=config.use_arcsinh, binaryaware=config.binary_aware, eps=config.scale_eps),
        "h_expand": config.quantile_head_size / width,
        "act_func": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.hidden_act),
        "dropout": dropout,
        "stack_out_norm_config": None if config.output_norm_eps is None else {"eps": config.output_norm_eps},
    }
