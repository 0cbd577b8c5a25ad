"""transformers' pipelines, batches of unequal texts. Generation: tests/models/test_transformers_stack.py."""

import pytest
import torch
from conftest import LAYOUTS
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
