"""`hf-rnn generate [CHECKPOINT] --prompt ...`: continue a prompt, streamed to the terminal."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from hf_rnn.checkpoints import DEFAULT, find_checkpoint, pretrained
from hf_rnn.cli.device import add_device, find_device
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.tokenization.reading import read_tokenizer


def stream(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options) -> None:
    """Print the prompt and its continuation as it is generated. `options` go to `generate()`."""
    inputs = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **options)  # type: ignore[operator]


def stream_on(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, file: Path, **options) -> None:
    """As `stream`, from the state in `file` where there is one; the state after it takes its place.

    The last token generated is in no state yet: it lies beside it, and is read first the next time.
    """
    goes_on, seen = file.exists(), 0
    if goes_on:
        print(prompt, end="", flush=True)  # without the token before it, which has been printed
        state = RecurrentCache.load(file, model)
        if state.batch_size != 1 or "tokens" not in state.beside:
            raise ValueError(f"{file}: expected the state of one text, as hf-rnn generate writes it")
        new = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        ids = torch.cat([state.beside["tokens"], new.long()], 1)
        # The past is in the state, and no text or mask as long is needed
        seen, state.seen_tokens = state.seen_tokens, 0
    else:
        state = model.new_cache()
        ids = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt").input_ids.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=goes_on, skip_special_tokens=True)
    tokens = model.generate(ids, cache=state, streamer=streamer, **options)
    state.seen_tokens += seen
    state.beside["tokens"] = tokens[:, -1:]
    state.save(file, model)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn generate", description=__doc__)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT,
        help="a checkpoint's folder, its name on the Hub, or one that comes with the package: "
        f"{', '.join(pretrained())}; default: {DEFAULT}",
    )
    parser.add_argument("--prompt", default="", help="text to continue; default: begin a new one")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--state",
        type=Path,
        help="a file: where it is there, its state is what came before the prompt; the state after it is written there",
    )
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ValueError("temperature, top_p: expected a temperature of at least 0 and top_p in (0, 1]")
    device = find_device(arguments.device)
    if arguments.seed is not None:
        from transformers import set_seed

        set_seed(arguments.seed)
    disable_progress_bar()  # of loading, beside the text
    checkpoint = find_checkpoint(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).to(device)  # type: ignore[arg-type]
    tokenizer = read_tokenizer(checkpoint)
    options: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        options = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    options["max_new_tokens"] = arguments.max_new_tokens
    if arguments.state is None:
        stream(model, tokenizer, arguments.prompt, **options)
    else:
        stream_on(model, tokenizer, arguments.prompt, arguments.state, **options)
