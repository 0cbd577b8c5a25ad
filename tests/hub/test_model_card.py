"""Cards: what trainers write of their runs, and the committed ones of the architectures."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_head
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, default_data_collator

import hf_rnn
from hf_rnn.hub.sharing import check_card, prepare
from hf_rnn_trainers.model_card import make_card
from hf_rnn_trainers.model_card.papers import ARCHITECTURES, BIBTEX

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, pad_token_id=58, bos_token_id=59, eos_token_id=60)
TRAINERS = {
    "backpropagation": (
        hf_rnn.RecurrentTrainer,
        TrainingArguments,
        {},
        "werbos1990bptt",
        "backpropagation through time",
    ),
    "zo": (hf_rnn.ZOTrainer, hf_rnn.ZOConfig, {"num_directions": 2}, "chaubard2025zero", "2 low_rank directions"),
    "rate": (
        hf_rnn.RateConstrainedTrainer,
        hf_rnn.RateConstrainedConfig,
        {"rate_shrink": 0.03},
        "wu2025backslash",
        "rate term",
    ),
    "smt": (hf_rnn.SMTTrainer, hf_rnn.SMTConfig, {}, "kumar2026smt", "Supervised Memory Training"),
}
METHODS = {"werbos1990bptt", "chaubard2025zero", "wu2025backslash"}


@pytest.mark.parametrize("name", TRAINERS)
def test_of_a_run(name, tmp_path):
    trainer_class, config_class, options, paper, words = TRAINERS[name]
    ids = torch.arange(24).view(2, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = hf_rnn.LSTMForCausalLM(hf_rnn.LSTMConfig(**SMALL, conv_kernel=0))
    settings = dict(max_steps=1, learning_rate=0.125, seed=7, use_cpu=True, report_to="none", save_strategy="no")
    args = config_class(tmp_path / "run", per_device_train_batch_size=2, **settings, **options)
    trainer = trainer_class(model, args, train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card(dataset="numbers", dataset_tags="me/numbers", license="mit", language="en", tags="test")

    check_card(tmp_path / "run" / "README.md")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": "en",
        "datasets": ["me/numbers"],
        "tags": ["hf_rnn", "recurrent", "hf_rnn_lstm", "test"],
    }
    text = card.text
    assert words in text and f"`{trainer_class.__name__}`" in text and "Data: numbers." in text
    assert f"{model.num_parameters():,} parameters" in text and "sigmoid(f) c_{t-1}" in text
    assert "| `learning_rate` | 0.125 |" in text and "| `seed` | 7 |" in text
    for option, value in options.items():
        assert f"| `{option}` | {value} |" in text
    assert f"| eval_loss | {loss:.5g} |" in text and f"torch {torch.__version__}" in text
    assert {paper, "hochreiter1997lstm", "gers2000forget"} <= set(re.findall(r"@\w+\{(\w+),", text))
    assert not (METHODS - {paper}) & set(re.findall(r"@\w+\{(\w+),", text))
    results = parse_eval_result_entries(yaml.safe_load((tmp_path / "run/.eval_results/hf_rnn.yaml").read_text()))
    assert [(r.dataset_id, r.value) for r in results if r.notes == "eval_loss"] == [("me/numbers", loss)]


def test_of_other_models(tmp_path):
    """No claims about what is not known, and no import that is not needed."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61, n_positions=32))
    card = make_card("me/gpt", gpt2)
    assert (
        "import hf_rnn" not in card.text and "Citation" not in card.text and "state has the same size" not in card.text
    )
    assert card.data.tags == ["gpt2"] and "not known here" in card.text and "no licence is stated" in card.text
    assert "import hf_rnn" in make_card("me/gpt", gpt2, coded=True).text
    classifier = hf_rnn.MinGRUForSequenceClassification(
        hf_rnn.MinGRUConfig(hidden_size=16, num_hidden_layers=1, num_labels=3)
    )
    classifier.save_pretrained(tmp_path)
    hf_rnn.byte_tokenizer().save_pretrained(tmp_path)
    card = make_card(str(tmp_path), classifier)
    assert card.data.pipeline_tag == "text-classification" and "state has the same size" in card.text
    assert run(card).count("'label': 'LABEL_") == 3


@pytest.mark.parametrize(
    "head, task, said",
    [
        ("ForTokenClassification", "token-classification", "'entity_group': 'LABEL_"),
        ("ForMaskedLM", "fill-mask", "'token_str'"),
        ("ForQuestionAnswering", "question-answering", ""),
        ("ForCTC", "automatic-speech-recognition", "tensor([["),
        ("Model", "feature-extraction", "tensor([[["),
    ],
)
def test_of_every_head(head, task, said, tmp_path):
    """Its card's snippet runs; that of a model that reads numbers as well."""
    tokenizer = hf_rnn.byte_tokenizer("<|mask|>")
    settings = dict(vocab_size=len(tokenizer), pad_token_id=256, bos_token_id=257, eos_token_id=258)
    for reads in ({}, dict(num_input_features=5)):
        if reads and head == "ForMaskedLM":
            continue
        model = make_head("gru", head, **settings | reads)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        card = make_card(str(tmp_path), model)
        assert card.data.pipeline_tag == task
        assert ("5 values a step as input" if reads else "a vocabulary of 260 tokens") in card.text
        assert ("tensor(" if reads else said) in run(card)


@pytest.mark.parametrize("stem", ["LSTM", "TiRex2"])
def test_of_forecasters(stem, tmp_path):
    sizes = dict(SMALL, patch_size=4, prediction_length=8, num_input_features=1)
    model = getattr(hf_rnn, f"{stem}ForPrediction")(getattr(hf_rnn, f"{stem}Config")(**sizes))
    model.save_pretrained(tmp_path)
    card = make_card(str(tmp_path), model)
    assert card.data.pipeline_tag == "time-series-forecasting" and "series as input, up to 8 steps ahead" in card.text
    assert "text" not in re.sub(r"(?s)```.*?```", "", card.text) and run(card).count("[") == 9


def test_of_both_directions():
    text = make_card("me/tagger", make_head("gru", "ForTokenClassification", bidirectional=True)).text
    assert "in both directions" in text and "state has the same size" not in text


def run(card: ModelCard) -> str:
    """What a card's snippet prints."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet, {})
    return out.getvalue()


@pytest.mark.parametrize(
    "damage", ["no metadata", "---\nlicense: [\n---\n", "---\nlicense: mit\nmodel-index: 3\n---\n"]
)
def test_a_folder_with_a_bad_card(damage, tmp_path):
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(**SMALL)).save_pretrained(tmp_path)
    assert "README.md" in prepare(tmp_path, "me/gru")
    (tmp_path / "README.md").write_text(damage)
    with pytest.raises(ValueError, match="README.md is no model card"):
        prepare(tmp_path, "me/gru")


@pytest.fixture(scope="module")
def model_cards():
    """The command's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("model_cards")


def test_committed_cards_are_what_the_command_makes(model_cards, tmp_path, monkeypatch):
    monkeypatch.setattr(model_cards, "CARDS", tmp_path)
    model_cards.main()
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {p.name: p.read_text() for p in (ROOT / "model_cards").glob("*.md") if p.name != "README.md"}
    assert made == committed, "make model-cards"
    assert {f"hf_rnn_{name.removesuffix('.md')}" for name in made} == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_committed_card(model_type):
    path = ROOT / "model_cards" / f"{model_type.removeprefix('hf_rnn_')}.md"
    check_card(path)
    card = ModelCard.load(path)
    assert model_type in card.data.tags and card.data.license == "apache-2.0"
    assert set(ARCHITECTURES[model_type].papers) <= set(re.findall(r"@\w+\{(\w+),", card.text))
    for link in re.findall(r"\]\((\.\./[^)]+)\)", card.text):
        assert (path.parent / link).resolve().is_file(), link
    printed = run(card)
    if measured := re.search(r"Measured with ([\d,]+ parameters)", card.text):
        assert printed.strip() == measured[1]


def test_papers():
    for key, entry in BIBTEX.items():
        assert re.match(rf"@(article|inproceedings)\{{{key},", entry) and entry.count("{") == entry.count("}")
        assert all(re.search(rf"\b{name} = \{{.+\}}", entry, re.DOTALL) for name in ("title", "author", "year"))


def test_a_run_s_card_is_pushed_under_its_name_on_the_hub(tmp_path):
    """The snippet then loads the repository, and a licence that is given is stated in both places."""
    rows = [{"input_ids": torch.arange(12), "labels": torch.arange(12)}]
    args = TrainingArguments(tmp_path / "run", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = hf_rnn.RecurrentTrainer(hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(**SMALL)), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = tmp_path / "run" / "README.md"
    assert 'from_pretrained("run"' in card.read_text()
    prepare(tmp_path / "run", "me/mine", "mit")
    text = card.read_text()
    assert 'from_pretrained("me/mine"' in text and "\n# mine\n" in text and '"run"' not in text
    assert ModelCard.load(card).data.license == "mit" and "Weights: mit." in text
    assert "nats per token" in text


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForSequenceClassification", "ForMaskedLM"])
def test_a_pipeline_s_card_is_pushed_under_its_name_on_the_hub(head, tmp_path):
    folder = tmp_path / "run"
    model = make_head("gru", head)
    model.save_pretrained(folder)
    make_card("run", model).save(folder / "README.md")
    prepare(folder, "me/mine")
    text = (folder / "README.md").read_text()
    assert '", "me/mine"' in text and '"run"' not in text
