"""`hf-rnn generate CHECKPOINT --prompt ...`: continue a prompt, streamed to the terminal."""

import argparse

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hf_rnn.cli.device import add_device, find_device
from hf_rnn.tokenization.reading import read_tokenizer


def stream(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options) -> None:
    """Print the prompt and its continuation as it is generated. `options` go to `generate()`."""
    inputs = tokenizer(prompt or tokenizer.bos_token, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, **options)  # type: ignore[operator]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn generate", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("--prompt", default="", help="text to continue; default: begin a new one")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=None)
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ValueError("temperature, top_p: expected a temperature of at least 0 and top_p in (0, 1]")
    device = find_device(arguments.device)
    if arguments.seed is not None:
        from transformers import set_seed

        set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).to(device)  # type: ignore[arg-type]
    tokenizer = read_tokenizer(arguments.checkpoint)
    options = {"do_sample": False}
    if arguments.temperature > 0:
        options = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    stream(model, tokenizer, arguments.prompt, max_new_tokens=arguments.max_new_tokens, **options)
