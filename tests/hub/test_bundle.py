"""A bundled checkpoint in a virtual environment without the package: the same outputs, tokens and gradients."""

import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES, make_head, relative_error
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_rnn
from hf_rnn.cli.main import main
from hf_rnn.hub.bundle import bundle
from hf_rnn.remote_code.bundle import bundle_source

CASES: dict[str, dict] = {name: {} for name in ARCHITECTURES} | {
    "gru": {"num_heads": 2},
    "lstm": {"tie_word_embeddings": True},
    "mingru": {"expansion_factor": 1.5},
    "minlstm": {"normalize_gates": False, "learned_initial_state": False},
    "xlstm": {"num_heads": 2},
    "lstm attention": {"layer_types": ["linear_attention", "sliding_attention"], "sliding_window": 5},
    "minlstm paper": {"block_layout": "paper"},
    "lstm projected": {"block_layout": "paper", "projection_size": 8, "learned_initial_state": False},
    "xlstm gated": {"num_heads": 2, "block_layout": "gated", "slstm_at": [0]},
    "xlstm neurips": {"num_heads": 2, "block_layout": "neurips", "slstm_at": [1]},
    "memoryrnn": {"num_memory_tokens": 3},
}
# What both processes run: `folder` to tensors
COMPUTE = """
def compute(folder, causal, masked, classifier, base):
    ids = torch.randint(0, 58, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, -3:] = 0, 0
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    results = {"greedy": causal.generate(ids[:2], attention_mask=mask[:2], max_new_tokens=20, do_sample=False)}
    results["beams"] = causal.generate(ids[:2], max_new_tokens=8, do_sample=False, num_beams=3)
    lookup = dict(prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False)
    results["candidates"] = causal.generate(ids[:1], **lookup)
    with torch.no_grad():
        results["logits"] = causal(ids, attention_mask=mask).logits * mask[..., None]
        results["packed"] = causal(ids[:1], position_ids=positions).logits
        first = causal(ids[:, :7], use_cache=True)
        results["split"] = causal(ids[:, 7:], past_key_values=first.past_key_values).logits
        results["hidden"] = base(ids).last_hidden_state
        results["masked"] = masked(ids, attention_mask=mask).logits * mask[..., None]
        results["score"] = classifier(ids, attention_mask=mask).logits
    loss = causal.train()(ids, attention_mask=mask, labels=ids.where(mask > 0, -100)).loss
    loss.backward()
    results["loss"] = loss.detach()
    results |= {f"gradient of {name}": p.grad for name, p in causal.named_parameters()}
    return {name: x.contiguous() for name, x in results.items()}
def transcribe(model):
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(3, 17, 4, generator=generator), torch.randint(0, 50, (3, 2), generator=generator)
    observed, mask = torch.rand(3, 17, 4, generator=generator) > 0.2, torch.ones(3, 17)
    mask[1, :5], mask[2, -3:] = 0, 0
    output = model(input_features=x, observed_mask=observed, attention_mask=mask, labels=labels)
    output.loss.backward()
    results = {"loss": output.loss, "logits": output.logits[0]}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: x.detach().contiguous() for name, x in results.items()}
"""
ALONE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForCTC, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification
{compute}
for case in {cases!r}:
    model = AutoModelForCausalLM.from_pretrained(case, trust_remote_code=True)
    base = AutoModel.from_pretrained(case, trust_remote_code=True)
    masked = AutoModelForMaskedLM.from_pretrained(case, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(case + "-score", trust_remote_code=True)
    save_file(compute(case, model, masked, classifier, base), case + ".safetensors")
    model.save_pretrained(case + "-again")
    assert not any(name.split(".")[0] in ("hf_rnn", "hf_rnn_kernels", "numba") for name in sys.modules)
model = AutoModelForCTC.from_pretrained("features", trust_remote_code=True)
save_file(transcribe(model), "features.safetensors")
"""
namespace: dict = {"torch": torch}
exec(COMPUTE, namespace)


FEW = ("gru", "minlstm paper", "xlstm gated")  # in `make test`
OTHERS = tuple(case for case in CASES if case not in FEW)


@pytest.fixture(scope="module", params=[FEW, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["few", "others"])
def results(request, tmp_path_factory, bare_python):
    """A folder and cases in it, computed with the package and by their bundles alone, in one process each."""
    folder, cases = tmp_path_factory.mktemp("bundles"), request.param
    for case in cases:
        settings = CASES[case]
        config_class, causal_class, classifier_class = ARCHITECTURES[case.split()[0]]
        base = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)
        tokens = dict(pad_token_id=58, bos_token_id=59, eos_token_id=60, num_labels=3)
        torch.manual_seed(0)
        config = config_class(**base | tokens | settings)
        causal, classifier = causal_class(config).eval(), classifier_class(config).eval()
        masked_class = getattr(hf_rnn, causal_class.__name__.replace("Causal", "Masked"))
        with torch.no_grad():
            for name, parameter in causal.named_parameters():
                if "initial_state" in name or "bias" in name:
                    parameter.normal_()
        for model, suffix in ((causal, ""), (classifier, "-score")):
            model.save_pretrained(folder / (case + suffix))
            bundle(folder / (case + suffix))
        found = namespace["compute"](
            None, causal, masked_class.from_pretrained(folder / case), classifier, causal.model
        )
        save_file(found, folder / f"{case}-package.safetensors")
    features = make_head("gru", "ForCTC", num_input_features=4, patch_size=2)
    features.save_pretrained(folder / "features")
    bundle(folder / "features")
    save_file(namespace["transcribe"](features), folder / "features-package.safetensors")
    result = bare_python(ALONE.format(compute=COMPUTE, cases=cases), folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, cases


def test_same_as_with_the_package(results):
    folder, cases = results
    for case in (*cases, "features"):
        expected, alone = (load_file(folder / f"{case}{who}.safetensors") for who in ("-package", ""))
        assert expected.keys() == alone.keys()
        for name in expected.keys() & {"greedy", "beams", "candidates"}:
            assert torch.equal(alone[name], expected[name]), (case, name)
        for name in expected.keys() - {"greedy", "beams", "candidates"}:
            assert relative_error(alone[name], expected[name]) < 1e-5, (case, name)


def test_saved_again_it_is_whole(results):
    """What the bundle saves is the same checkpoint, its code included."""
    folder, cases = results
    for case in cases:
        for name in ("config.json", "model.safetensors", "modeling_hf_rnn.py"):
            before, after = ((folder / checkpoint / name).read_bytes() for checkpoint in (case, f"{case}-again"))
            assert before == after, (case, name)


@pytest.mark.parametrize("stem", hf_rnn.ARCHITECTURES)
def test_reads_like_code(stem, tmp_path):
    """No name undefined, none imported in vain, no long lines; and nothing of the package or its compilers."""
    text = bundle_source(getattr(hf_rnn, f"{stem}Config"))
    (tmp_path / "bundle.py").write_text(text)
    command = ["ruff", "check", "--isolated", "--select", "E,F,I", "--line-length", "120", "bundle.py"]
    result = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert not {"import hf_rnn\n", "from hf_rnn", "triton", "numba", "torch.library", "custom_op"} & set(text.split())
    assert f"hf-rnn {hf_rnn.__version__}" in text[:500] and "Apache License, Version 2.0" in text[:500]
    assert text == bundle_source(getattr(hf_rnn, f"{stem}Config"))


def test_beside_the_package(results):
    """One process holds both: the package imported and the bundle's classes."""
    folder, cases = results
    case = str(folder / cases[0])
    name = ARCHITECTURES[cases[0]][1].__name__
    alone = get_class_from_dynamic_module(f"modeling_hf_rnn.{name}", case).from_pretrained(case)
    package = getattr(hf_rnn, name).from_pretrained(case)
    assert type(alone).__module__ != type(package).__module__
    ids = torch.arange(11)[None]
    assert relative_error(alone(ids).logits, package(ids).logits) < 1e-5


def test_refuses_what_it_cannot_bundle(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        bundle(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2"):
        bundle(tmp_path)
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1))
    hf_rnn.save_compressed(model, tmp_path / "coded", step=2**-8)
    with pytest.raises(ValueError, match="only hf_rnn reads them"):
        bundle(tmp_path / "coded")


def test_command(tmp_path, capsys):
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    assert "from hf_rnn import" in (tmp_path / "modeling_hf_rnn.py").read_text()
    assert main(["bundle", str(tmp_path)]) == 0
    assert (tmp_path / "modeling_hf_rnn.py").read_text() == bundle_source(hf_rnn.GRUConfig)
    assert main(["bundle", str(tmp_path / "nowhere")]) == 1
    assert "config.json" in capsys.readouterr().err
