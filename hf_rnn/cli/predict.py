"""`hf-rnn predict CHECKPOINT ...`: print a trained model's answer to each text as a JSON object."""

import argparse
import bisect
import json
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig, pipeline

from hf_rnn.cli.device import add_device, find_device
from hf_rnn.cli.tasks import read_rows
from hf_rnn.tokenization.reading import read_tokenizer

# transformers' pipeline for each head, and what it is told
_PIPELINES: dict[str, tuple[str, dict]] = {
    "ForTokenClassification": ("token-classification", {"ignore_labels": []}),
    "ForSequenceClassification": ("text-classification", {"top_k": None}),
    "ForMaskedLM": ("fill-mask", {}),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-rnn predict", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("texts", nargs="*", help="texts to answer; or --data")
    parser.add_argument(
        "--data",
        help="a text file with a text on each line, a csv, json, jsonl or parquet file, a folder or a Hub dataset",
    )
    parser.add_argument("--split", default="test", help="split of a dataset")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--output", metavar="FILE", help="write the answers to this file instead of the terminal")
    parser.add_argument("--batch_size", type=int, default=16)
    add_device(parser)
    arguments = parser.parse_args(argv)
    if bool(arguments.texts) == bool(arguments.data):
        raise ValueError("texts, data: expected either texts on the command line or --data")
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {arguments.batch_size}")
    device = find_device(arguments.device)
    task, options = find_task(arguments.checkpoint)
    texts = arguments.texts or read_texts(arguments.data, arguments.split, arguments.text_column)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("texts, data: expected texts, got one that is empty or missing")
    tokenizer = read_tokenizer(arguments.checkpoint)
    if task == "token-classification" and not tokenizer.is_fast:
        raise ValueError("tokenizer: labelling words needs a fast tokenizer, which gives offsets")
    if task == "fill-mask" and (unmasked := [text for text in texts if str(tokenizer.mask_token) not in text]):
        raise ValueError(f"texts, data: expected {tokenizer.mask_token} in each, got {unmasked[0][:40]!r}")
    answer = pipeline(task, arguments.checkpoint, tokenizer=tokenizer, device=device, **options)  # type: ignore[call-overload]
    given = answer((text for text in texts), batch_size=arguments.batch_size)
    out = open(arguments.output, "w") if arguments.output else sys.stdout  # noqa: SIM115
    try:
        for text, found in zip(texts, tqdm(given, total=len(texts), disable=not arguments.output), strict=True):
            if task == "token-classification":
                found = entities(answer, text, of_words(text, found))
            print(json.dumps({"text": text, "answer": found}, default=float, ensure_ascii=False), file=out)
    finally:
        if arguments.output:
            out.close()


def find_task(checkpoint: str) -> tuple[str, dict]:
    """The pipeline for a checkpoint's head, and its options.

    Raises:
        ValueError: a head that answers to no texts, a model that reads none.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if getattr(config, "num_input_features", None) is not None:
        raise ValueError("checkpoint: expected a model of texts, got one that reads input_features")
    names = config.architectures or ["a model without a head"]
    for head, found in _PIPELINES.items():
        if names[0].endswith(head):
            return found
    hint = "; hf-rnn generate continues a text" if names[0].endswith("ForCausalLM") else ""
    raise ValueError(f"checkpoint: expected a model with one of the heads {sorted(_PIPELINES)}, got {names[0]}{hint}")


def of_words(text: str, tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pipeline's answer for each word of a text, of its answers for tokens: that of the token which a word ends
    with. In training a token has the label of the word that it ends in; spaces have none."""
    ends, found = [token["end"] for token in tokens], []
    for word in re.finditer(r"\S+", text):
        last = bisect.bisect_right(ends, word.end()) - 1
        if last >= 0 and ends[last] > word.start():  # else: behind where the text was cut
            own = {"word": word.group(), "start": word.start(), "end": word.end()}
            found.append({name: tokens[last][name] for name in ("entity", "score")} | own)
    return found


def entities(answer: Any, text: str, words: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Words that make a name of several together, as transformers' `answer` groups them, where labels are "B-...",
    "I-..." and "O" alone; else the words, each for itself."""
    labels = set(answer.model.config.id2label.values()) - {"O"}
    if not labels or not all(label.startswith(("B-", "I-")) for label in labels):
        return words
    groups = [group for group in answer.group_entities(words) if group["entity_group"] != "O"]
    return [group | {"word": text[group["start"] : group["end"]]} for group in groups]


def read_texts(data: str, split: str, column: str) -> list[str]:
    """Lines of a text file that are not empty, or a column of a dataset; words become a text with spaces between."""
    if Path(data).is_file() and Path(data).suffix in ("", ".txt"):
        rows = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        rows = [" ".join(x) if isinstance(x, list) else x for x in read_rows(data, split, (column,))[column]]
    if not rows:
        raise ValueError(f"data: {data} holds no text")
    return rows
