"""What a card holds, and how it is laid out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_rnn_kernels.packed_linear import PackedLinear, PackedMatrix
from hf_rnn_trainers.model_card.papers import ARCHITECTURES, BIBTEX, FORECASTERS, Architecture

TEMPLATE = Path(__file__).with_name("template.md")
NO_LICENCE = "no licence is stated here; ask who shared them"
CODE_LICENCE = "The code of hf_rnn is under the Apache License, Version 2.0."
PACKAGES = ("hf-rnn", "torch", "transformers", "accelerate", "huggingface_hub", "numba", "triton")

_SNIPPETS = {
    "text-generation": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))""",
    "text-classification": """from transformers import pipeline

print(pipeline("text-classification", "{name}", top_k=None)("The text"))""",
    "token-classification": """from transformers import pipeline

print(pipeline("token-classification", "{name}", aggregation_strategy="simple")("The text"))""",
    "fill-mask": """from transformers import pipeline

fill = pipeline("fill-mask", "{name}")
print(fill("The te" + fill.tokenizer.mask_token + "t"))""",
    "question-answering": """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

model = AutoModelForQuestionAnswering.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The question?", "The text", return_tensors="pt")
output = model(**inputs)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))""",
    "automatic-speech-recognition": """from transformers import AutoModelForCTC, AutoTokenizer

model = AutoModelForCTC.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
print(model(**tokenizer("The text", return_tensors="pt")).logits.argmax(-1))""",
    "time-series-forecasting": """import numpy as np
from transformers import AutoModelForTimeSeriesPrediction

model = AutoModelForTimeSeriesPrediction.from_pretrained("{name}")
values = np.sin(np.arange(200) / 4)  # (T,), NaN where one is missing; or a list of such, or a frame
print(model.predict(values, horizon=8).full_predictions)  # (horizon, quantiles)""",
    "feature-extraction": """from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
print(model(**tokenizer("The text", return_tensors="pt")).last_hidden_state)""",
}

# What reads numbers instead of tokens
_SNIPPET_OF_FEATURES = """import torch
from transformers import {auto}

model = {auto}.from_pretrained("{name}")
values = torch.randn(1, 64, {features})  # (B, T, features); observed_mask=, zeros where one is missing
print(model(input_features=values)[0])"""

# The Hub's names for what is asked of a model, by the end of its class's name
_TASKS = {
    "ForCTC": "automatic-speech-recognition",
    "ForMaskedLM": "fill-mask",
    "ForPrediction": "time-series-forecasting",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}

FORECASTS = _TASKS["ForPrediction"]

_NOTE = (
    "Without hf_rnn installed a checkpoint that was pushed or bundled (`hf-rnn bundle`) loads with "
    "`from_pretrained(..., trust_remote_code=True)`, and runs more slowly."
)
_NOTE_PACKED = (
    "The weight matrices are stored and used as integers of {bits} bits (`hf_rnn.WeightOnlyConfig`); import hf_rnn to "
    "load them. To train all weights, call `model.dequantize()` first; LoRA works on the model as it is."
)
_NOTE_CODED = "The weights are stored in a compressed form: transformers loads them only after `import hf_rnn`."


@dataclass
class Training:
    """How a model came to be.

    Attributes:
        text: data and method, in sentences.
        arguments: the method's arguments, by name.
        papers: keys of the method's papers in `papers.BIBTEX`.
        dataset: where the data is a dataset on the Hub, its name there.
    """

    text: str = "How it was trained is not known here: this card was made without the trainer."
    arguments: dict[str, Any] = field(default_factory=dict)
    papers: tuple[str, ...] = ()
    dataset: str | None = None


@dataclass
class Evaluation:
    """A table of what was measured: rows of cells below a header, and what it is in `text`."""

    title: str
    text: str
    header: Sequence[str]
    rows: Iterable[Sequence[Any]]

    def table(self) -> str:
        cells = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(_written(cell) for cell in row)} |" for row in cells)


def _written(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def task(model: PreTrainedModel) -> str:
    """The Hub's name for what a model does."""
    if model.can_generate():
        return "text-generation"
    return next((what for head, what in _TASKS.items() if head in type(model).__name__), "feature-extraction")


def snippet_of(model: PreTrainedModel, name: str) -> str:
    """How a model is used that is loaded by `name`."""
    features = getattr(model.config, "num_input_features", None)
    if features is None or task(model) == FORECASTS:
        return _SNIPPETS[task(model)].format(name=name)
    head = next((head for head in _TASKS if head in type(model).__name__), "")
    return _SNIPPET_OF_FEATURES.format(auto=f"AutoModel{head}", name=name, features=features)


def reads(model: PreTrainedModel) -> str:
    if task(model) == FORECASTS:
        return f"series as input, up to {model.config.prediction_length:,} steps ahead"
    if (features := getattr(model.config, "num_input_features", None)) is None:
        return f"a vocabulary of {model.config.get_text_config().vocab_size:,} tokens"
    return f"{features:,} values a step as input"


def architecture_of(model: PreTrainedModel) -> Architecture:
    """What is known of a model's architecture; of those outside the package the name alone."""
    known = ARCHITECTURES | FORECASTERS
    return known.get(model.config.model_type) or Architecture(str(model.config.model_type), "", ())


def count_parameters(model: PreTrainedModel) -> int:
    """Packed ones as well, of which transformers knows nothing."""
    packed = (m for m in model.modules() if isinstance(m, PackedLinear | PackedMatrix))
    return model.num_parameters() + sum(m.packed.numel() * 8 // m.bits for m in packed)  # type: ignore[operator, union-attr]


def citations(keys: Iterable[str]) -> str:
    """BibTeX, each paper once."""
    return "\n\n".join(BIBTEX[key] for key in dict.fromkeys(keys))


def installed_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # numba and triton are optional
            continue
    return versions


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def make_card(
    name: str,
    model: PreTrainedModel,
    training: Training | None = None,
    evaluations: Sequence[Evaluation] = (),
    licence: str | None = None,
    languages: str | list[str] | None = None,
    tags: Iterable[str] = (),
    base_model: str | None = None,
    processes: int = 1,
    coded: bool = False,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        name: by which it is loaded: on the Hub, or a folder.
        model: a model of the package, or any other of transformers'.
        training: how it was trained; None where nobody knows.
        licence: of the weights, as the Hub writes it ("apache-2.0"); None: the card says that none is stated.
        languages: of the text, as ISO codes.
        tags: beside those by which the Hub finds the package's models.
        base_model: what it was fine-tuned from, on the Hub.
        processes: that trained it.
        coded: whether its weights are those of `hf_rnn.save_compressed`.

    Raises:
        ValueError: metadata that the Hub does not take.
    """
    training, known, what = training or Training(), architecture_of(model), task(model)
    ours = model.config.model_type in ARCHITECTURES | FORECASTERS
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=what,
        license=licence,
        language=languages,
        base_model=base_model,
        datasets=None if training.dataset is None else [training.dataset],
        tags=list(dict.fromkeys([*["hf_rnn", "recurrent"] * ours, model.config.model_type, *tags])),
    )
    snippet = snippet_of(model, name)
    bits = next((module.bits for module in model.modules() if isinstance(module, PackedLinear)), None)
    where = f"{processes} processes, each on " if processes > 1 else ""
    return render(
        data,
        name.rstrip("/").split("/")[-1],
        known,
        f"{known.name} for {what.replace('-', ' ')}: {count_parameters(model):,} parameters, {reads(model)}.",
        f"# pip install hf-rnn\nimport hf_rnn\n{snippet}" if ours or coded else snippet,
        _NOTE_PACKED.format(bits=bits) if bits else _NOTE_CODED if coded else _NOTE if ours else "",
        training,
        evaluations,
        where + hardware(),
        installed_versions(),
        limits(training, what),
        f"{CODE_LICENCE} Weights: {licence or NO_LICENCE}.",
        bool(getattr(model.config, "bidirectional", False)),
        what == FORECASTS,
    )


def render(
    data: ModelCardData,
    title: str,
    architecture: Architecture,
    summary: str,
    snippet: str,
    note: str,
    training: Training,
    evaluations: Sequence[Evaluation],
    hardware: str,
    versions: dict[str, str],
    limits: str,
    licence: str,
    bidirectional: bool = False,
    forecasts: bool = False,
) -> ModelCard:
    """Fill in the template: metadata, then the sections in the order of the arguments, then what is to be cited."""
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=title,
        summary=summary,
        equations=architecture.equations,
        snippet=snippet,
        note=note,
        training=training,
        evaluations=evaluations,
        hardware=hardware,
        versions=versions,
        limits=limits,
        licence=licence,
        bidirectional=bidirectional,
        forecasts=forecasts,
        citations=citations([*architecture.papers, *training.papers]),
    )


def limits(training: Training, what: str) -> str:
    """What the model is not."""
    if what == FORECASTS:
        return (
            "It has learned only from the series above, and forecasts others as if they were of the same kind. Its "
            "quantiles are only as well calibrated as the measurements show."
        )
    known = "the text above" if training.arguments else "the text that it was trained on"
    return (
        f"It has learned only from {known}, with its errors and biases, and its output is what is likely, not what is "
        "true. It remembers earlier text only as far as its state can hold it."
    )


def write_first_card(model: PreTrainedModel, folder: str | Path, repository: str, token: str | bool | None) -> None:
    """Put a card of the model in the place of transformers' in `folder`, if the repository has none to keep."""
    if not HfApi().file_exists(repository, "README.md", token=token):
        path = Path(folder) / "README.md"
        tags = (ModelCard.load(path).data.tags or []) if path.exists() else []
        make_card(repository, model, tags=tags).save(path)
