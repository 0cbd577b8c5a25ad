"""transformers' pipelines, batches of unequal texts. Generation: tests/models/test_transformers_stack.py."""

import pytest
import torch
from conftest import ARCHITECTURES, LAYOUTS, make_head
from transformers import pipeline

from hf_rnn import byte_tokenizer

TEXTS = ["Hello", "A much longer text than the one before", "x"]


def test_text_classification(architecture, tmp_path):
    torch.manual_seed(0)
    config_class, _, classifier_class = LAYOUTS[architecture]
    config = config_class(hidden_size=16, num_hidden_layers=1, initializer_range=0.3, num_labels=3)
    classifier_class(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pipe = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    together, alone = pipe(TEXTS, batch_size=3), [pipe(text)[0] for text in TEXTS]
    for ours, theirs in zip(together, alone, strict=True):
        scores, expected = ({x["label"]: x["score"] for x in row} for row in (ours, theirs))
        assert scores == pytest.approx(expected, abs=1e-5) and set(scores) == {"LABEL_0", "LABEL_1", "LABEL_2"}


def saved(architecture, head, folder, **settings):
    """A checkpoint of bytes, one of which is the mask."""
    tokenizer = byte_tokenizer("<|mask|>")
    special = dict(vocab_size=len(tokenizer), pad_token_id=256, bos_token_id=257, eos_token_id=258)
    make_head(architecture, head, **special | settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_token_classification(architecture, tmp_path):
    """Tokens, and words put together of them, in a batch as alone."""
    folder = saved(architecture, "ForTokenClassification", tmp_path)
    for aggregation in (None, "simple", "first", "max") if architecture == "gru" else (None,):
        pipe = pipeline("token-classification", model=folder, device="cpu", aggregation_strategy=aggregation or "none")
        together, alone = pipe(TEXTS, batch_size=3), [pipe(text) for text in TEXTS]
        for text, ours, theirs in zip(TEXTS, together, alone, strict=True):
            assert [(x["start"], x["end"]) for x in ours] == [(x["start"], x["end"]) for x in theirs]
            name = "entity" if aggregation is None else "entity_group"
            assert [x[name] for x in ours] == [x[name] for x in theirs]
            assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-5)
            assert "".join(text[x["start"] : x["end"]] for x in ours) == text
            if aggregation in ("first", "max"):
                ends = {x["end"] for x in ours}
                assert ends <= {len(text), *(i for i, character in enumerate(text) if character == " ")}, "whole words"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_fill_mask(architecture, tmp_path):
    pipe = pipeline("fill-mask", model=saved(architecture, "ForMaskedLM", tmp_path), device="cpu")
    texts = [f"{text}<|mask|> and more" for text in TEXTS]
    together, alone = pipe(texts, batch_size=3), [pipe(text) for text in texts]
    for ours, theirs in zip(together, alone, strict=True):
        assert [x["token"] for x in ours] == [x["token"] for x in theirs]
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_feature_extraction(architecture, tmp_path):
    """A batch is padded, on the left here, and padding's vectors come with it."""
    pipe = pipeline("feature-extraction", model=saved(architecture, "Model", tmp_path), device="cpu")
    together = pipe(TEXTS, batch_size=3, return_tensors=True)
    for text, found in zip(TEXTS, together, strict=True):
        alone = pipe(text, return_tensors=True)[0]
        torch.testing.assert_close(found[0, -len(text) :], alone, rtol=1e-4, atol=1e-5)
