"""`hf-rnn generate [CHECKPOINT] --prompt ...`: continue a prompt, printed as it is generated."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils.logging import disable_progress_bar

from hf_rnn.checkpoints import DEFAULT, find_checkpoint, pretrained
from hf_rnn.cli.device import add_device, find_device
from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.tokenization.reading import read_tokenizer

PIECE = 4096  # tokens of a prompt that are read at once, and for which memory is needed


def stream(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options) -> None:
    """Print the prompt and its continuation as it is generated. `options` go to `generate()`."""
    inputs = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **options)  # type: ignore[operator]


def stream_on(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, file: Path | None, shown: bool = True, **options
) -> None:
    """As `stream`, from the state in `file` where there is one; the state after it takes its place. A prompt of any
    length is read in pieces. Where it is not `shown`, what is new alone is printed.

    The last token generated is in no state yet: it lies beside it, and is read first the next time.

    Raises:
        ValueError: no folder for the file; no file of this command, or of another model.
    """
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"state: expected a file in a folder that is there, got {file}")
    if file is not None and file.exists():
        state = RecurrentCache.load(file, model)
        if state.batch_size != 1 or "tokens" not in state.beside:
            raise ValueError(f"{file}: expected the state of one text, as hf-rnn generate writes it")
        if shown:
            print(prompt, end="", flush=True)  # without the token before it, which has been printed
        new = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        ids, shown = torch.cat([state.beside["tokens"], new.long()], 1), False
    else:
        state = model.new_cache()
        ids = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt").input_ids.to(model.device)
    long, ids = (ids[:, :-1], ids[:, -1:]) if ids.shape[1] > PIECE else (ids[:, :0], ids)
    with torch.no_grad():
        for piece in long.split(PIECE, 1) if long.shape[1] else ():
            model.model(piece, cache=state)
    # The past is in the state, and no text or mask as long is needed
    seen, state.seen_tokens = state.seen_tokens, 0
    if shown and long.shape[1]:
        print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=not shown or bool(long.shape[1]), skip_special_tokens=True)
    tokens = model.generate(ids, cache=state, streamer=streamer, **options)
    state.seen_tokens += seen
    state.beside["tokens"] = tokens[:, -1:]
    if file is not None:
        state.save(file, model)


def read_text(file: str) -> str:
    """
    Raises:
        ValueError: no UTF-8.
    """
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file: {file}: expected UTF-8, {error}") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn generate", description=__doc__)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT,
        help="a checkpoint's folder, its name on the Hub, or one that comes with the package "
        f"({', '.join(pretrained())}); default: {DEFAULT}",
    )
    parser.add_argument("--prompt", default="", help="text to continue; default: start a new text")
    parser.add_argument(
        "--prompt_file", help="a file with the text instead, of any length, which is not printed; -: standard input"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--state",
        type=Path,
        help="a file with the state to continue from, if it exists; the new state is written there",
    )
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ValueError("temperature, top_p: expected a temperature of at least 0 and top_p in (0, 1]")
    if arguments.prompt and arguments.prompt_file is not None:
        raise ValueError("prompt, prompt_file: expected one of them")
    text = None if arguments.prompt_file is None else read_text(arguments.prompt_file)
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
    if arguments.state is None and text is None:
        stream(model, tokenizer, arguments.prompt, **options)
    else:
        prompt = arguments.prompt if text is None else text
        stream_on(model, tokenizer, prompt, arguments.state, shown=text is None, **options)
