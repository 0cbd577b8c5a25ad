"""lm-evaluation-harness through its `hf` model type, on a task made here."""

import json
import math

import pytest
import torch

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, byte_tokenizer
from hf_rnn.tasks.evaluation import stream_loss

lm_eval = pytest.importorskip("lm_eval", exc_type=ImportError)
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = MinGRUForCausalLM(MinGRUConfig(hidden_size=16, num_hidden_layers=1, forget_bias=8.0, initializer_range=0.3))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model", model.eval()


def task(folder, rows, **settings) -> ConfigurableTask:
    path = folder / "rows.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = dict(dataset_path="json", dataset_kwargs={"data_files": {"test": str(path)}, "cache_dir": str(folder)})
    return ConfigurableTask(config=data | dict(task="local", test_split="test") | settings)


def evaluate(model, local, **options):
    """Without the harness's own tasks, whose thousands of files it would read first."""
    tasks = dict(tasks=[local], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    return lm_eval.simple_evaluate(model, **tasks, **options)


def test_a_long_text_is_read_whole(checkpoint, tmp_path):
    """The perplexity of 3,000 tokens is that of our own evaluation; cut at 2,048 it would be another."""
    folder, model = checkpoint
    text = "".join(chr(97 + i * i % 23) for i in range(3000))
    settings = dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    settings["metric_list"] = [{"metric": "bits_per_byte"}]
    local = task(tmp_path, [{"text": text}], **settings)
    arguments = f"pretrained={folder},device=cpu"
    found = evaluate("hf", local, model_args=arguments, batch_size=1)["results"]["local"]
    ids = torch.tensor([model.config.bos_token_id, *byte_tokenizer()(text)["input_ids"]])
    assert found["bits_per_byte,none"] == pytest.approx(stream_loss(model, ids) / math.log(2) / 3000, rel=1e-5)
    cut = stream_loss(model, torch.cat([ids[:1], ids[953:]])) + stream_loss(model, ids[:953])
    assert cut != pytest.approx(stream_loss(model, ids), rel=1e-4), "the text's halves have to matter to each other"


def test_choices_and_generation(checkpoint, tmp_path):
    """Unequal choices and prompts, batched (padded on the left) and one by one, score the same."""
    folder, _ = checkpoint
    rows = [{"q": "x" * n, "choices": ["a", "bcd", "e" * 9], "answer": 1} for n in (3, 40, 2100)]
    chosen = task(
        tmp_path, rows, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="choices",
        doc_to_target="answer",
    )  # fmt: skip
    model = HFLM(pretrained=str(folder), device="cpu")
    scores = []
    for size in (1, 4):
        model.batch_size_per_gpu = size
        logged = evaluate(model, chosen)["samples"]["local"]
        scores.append([float(score) for sample in logged for ((score, _),) in sample["resps"]])
    assert len(scores[0]) == 9 and scores[1] == pytest.approx(scores[0], rel=1e-4)
    generated = task(
        tmp_path, rows, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    logged = evaluate(model, generated)["samples"]["local"]
    assert len(logged) == 3 and all(isinstance(sample["resps"][0][0], str) for sample in logged)
