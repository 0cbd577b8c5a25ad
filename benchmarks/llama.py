"""llama.cpp's Mamba with random weights, by llama-cpp-python's bindings of its C interface."""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from models import LAYERS

STATE, TAPS = 16, 4


def mamba_sizes(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's tensors, rows first, as transformers' Mamba has them."""
    inner, rank = 2 * width, -(-width // 16)
    return {
        "attn_norm.weight": (width,),
        "ssm_in.weight": (2 * inner, width),
        "ssm_conv1d.weight": (inner, TAPS),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * STATE, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, STATE),
        "ssm_d": (inner,),
        "ssm_out.weight": (width, inner),
    }


def width_of(parameters: int, vocabulary: int) -> int:
    """A multiple of 512, so that every row is whole blocks of a quantised format, nearest to so many parameters."""

    def count(width: int) -> int:
        return LAYERS * sum(int(np.prod(shape)) for shape in mamba_sizes(width).values()) + 2 * vocabulary * width

    step = 512 if parameters > 50_000_000 else 32
    return min(range(step, 6000, step), key=lambda width: abs(count(width) - parameters))


def write_gguf(path: Path, parameters: int, kind: str, vocabulary: int = 256) -> int:
    """A file in one of llama.cpp's formats; returns its number of parameters."""
    import gguf

    width, quantized = width_of(parameters, vocabulary), getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(str(path), "mamba")
    for name, value in (
        ("context_length", 2**20), ("embedding_length", width), ("feed_forward_length", 0), ("block_count", LAYERS),
        ("head_count", 0), ("vocab_size", vocabulary),
    ):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_ssm_conv_kernel(TAPS)
    writer.add_ssm_inner_size(2 * width)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(-(-width // 16))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    generator, total = np.random.default_rng(0), 0
    tensors = {
        "token_embd.weight": (vocabulary, width),
        "output_norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    tensors |= {f"blk.{n}.{name}": shape for n in range(LAYERS) for name, shape in mamba_sizes(width).items()}
    for name, shape in tensors.items():
        x = generator.standard_normal(shape, np.float32) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        x, total = (-np.abs(x) - 0.1 if name.endswith("ssm_a") else x).astype(np.float32), total + x.size
        matrix = len(shape) == 2 and shape[-1] % 32 == 0 and "conv1d" not in name and not name.endswith("ssm_a")
        if matrix and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(x, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


@cache
def _silent():
    """Its log is long; kept, since llama.cpp calls it later on."""
    from llama_cpp import llama_log_callback

    return llama_log_callback(lambda level, text, data: None)


def llama_step(folder: Path, parameters: int, kind: str) -> Callable[[], None]:
    """A call decodes one more token and reads its logits.

    Raises:
        RuntimeError: llama.cpp does not take the file.
    """
    import llama_cpp

    path = folder / f"mamba-{kind}.gguf"
    count = write_gguf(path, parameters, kind)
    print(f"llama.cpp, {kind}: {count:,} parameters, {path.stat().st_size:,} bytes", flush=True)
    llama_cpp.llama_log_set(_silent(), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch = 2**16, 8
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = llama_cpp.llama_init_from_model(model, settings)
    tokens = (llama_cpp.llama_token * 1)(65)

    def run() -> None:
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 1)):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits(context)[0]

    run()
    return run
