"""Compressed checkpoints: written, read by from_pretrained, damaged; searches; pruning; the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_rnn import (
    CorruptPayloadError,
    GRUConfig,
    GRUForSequenceClassification,
    compress,
    prune,
    save_compressed,
    weight_curvature,
)
from hf_rnn.cli.main import main
from hf_rnn.compression.search import choose_exponents, coded_parameters
from hf_rnn_kernels.coding import decode_tensor, dequantize, entropy, quantize, read_header, row_exponents


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
    return LlamaForCausalLM(LlamaConfig(**sizes | settings)).eval()


def assert_same(a, b) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype, name


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(make_model, architecture, tied, tmp_path):
    model = make_model(tie_word_embeddings=tied)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = save_compressed(model, tmp_path, step=2.0**-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    for name, p in loaded.named_parameters():
        coded = p.dim() > 1 and "norm" not in name and "bias" not in name
        expected = dequantize(quantize(plain[name], -5, 0.1), -5) if coded else plain[name]
        assert torch.equal(p, expected), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert all(n.endswith(".coded") for n in file.keys()) and len(result.payloads) < len(file.keys())  # noqa: SIM118


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
@pytest.mark.slow
def test_another_process_writes_the_same(model, ids, tmp_path):
    save_compressed(model, tmp_path)
    expected = model.generate(ids[:1], max_new_tokens=12, do_sample=False).tolist()
    code = (
        f"import json, torch, hf_rnn; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"ids = model.generate(torch.tensor({ids[:1].tolist()}), max_new_tokens=12, do_sample=False)\n"
        f"print(json.dumps(ids.tolist()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == expected


class TestLoaded:
    def test_is_an_ordinary_model(self, tmp_path):
        """It trains in the stock Trainer, and saves plainly."""
        model = llama()
        save_compressed(model, tmp_path / "coded")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
        assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded, "hf_quantizer")
        rows = [{"input_ids": torch.arange(9), "labels": torch.arange(9)}] * 4
        args = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        Trainer(loaded, args, train_dataset=rows).train()
        loaded.save_pretrained(tmp_path / "plain")
        assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), loaded)

    def test_shards(self, tmp_path):
        model = llama()
        save_compressed(model, tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype, tmp_path):
        model = llama().to(dtype)
        save_compressed(model, tmp_path / "a")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype), model)
        wide = llama()
        save_compressed(wide, tmp_path / "b")
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=dtype), wide.to(dtype))

    def test_another_head(self, tmp_path):
        model = llama()
        save_compressed(model, tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        assert_same(base, model.model)

    def test_any_flipped_bit_is_named(self, tmp_path):
        """In coded tensors, in those stored as they are, and in the names of the file's header."""
        save_compressed(llama(), tmp_path)
        path = tmp_path / "model.safetensors"
        whole = path.read_bytes()
        body = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:body])
        places = {name: sum(header[name]["data_offsets"]) // 2 + body for name in header if name != "__metadata__"}
        for name, at in [*places.items()][::4]:
            for where in (at, whole.index(name.encode()) + len(name) // 2):
                damaged = bytearray(whole)
                damaged[where] ^= 1
                path.write_bytes(damaged)
                with pytest.raises(CorruptPayloadError, match=name.removesuffix(".coded")):
                    AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_buffers_and_what_is_tied_by_hand(self, tmp_path):
        model = llama()
        model.register_buffer("seen", torch.arange(5))
        model.register_buffer("flag", torch.tensor(True))
        save_compressed(model, tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert torch.equal(decode_tensor(file.get_tensor("seen.coded")), torch.arange(5))
            assert decode_tensor(file.get_tensor("flag.coded")).item() is True

    def test_not_quantised_on_the_fly(self, tmp_path):
        from hf_rnn.compression.quantizer import CodedConfig

        llama().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="save_compressed"):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CodedConfig())


class TestChoices:
    def test_error_bound(self):
        """The coarsest power of two within the bound."""
        model = llama()
        parameters = coded_parameters(model, "norm|bias")
        exponents = choose_exponents(parameters, max_error=0.1, rate=0.0)
        for name, p in parameters.items():
            error = [
                float((dequantize(quantize(p, e), e) - p).square().mean().sqrt() / p.square().mean().sqrt())
                for e in (exponents[name], exponents[name] + 1)
            ]
            assert error[0] <= 0.1 < error[1]

    def test_loss_bound(self):
        """Held, and with fewer bits than one step for all tensors at a loss as good."""
        model = llama(initializer_range=0.3)
        x = torch.randint(61, (8, 33), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = model(x).logits.argmax(-1)

            def loss() -> float:
                return float(torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()))

            kept = {name: p.clone() for name, p in model.state_dict().items()}
            start = loss()
            found = compress(model, evaluate=loss, max_loss_increase=0.05)
            assert loss() <= 1.05 * start
            same = {}
            for e in range(-12, 0):
                model.load_state_dict(kept)
                bits = compress(model, step=2.0**e).bits
                if loss() <= 1.05 * start:
                    same[e] = bits
            assert found.bits <= min(same.values()) + 1e-9

    def test_the_search_leaves_weights_alone(self):
        model = llama()
        kept = {name: p.clone() for name, p in model.state_dict().items()}
        choose_exponents(coded_parameters(model, ""), evaluate=lambda: 1.0)
        assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())

    def test_what_is_reported(self):
        model = llama()
        result = compress(model, step=2.0**-6, rate=0.0)
        coded = coded_parameters(model, "norm|bias")
        count = sum(p.numel() for p in coded.values())
        ideal = sum(entropy(quantize(p, -6)) * p.numel() for p in coded.values()) / count
        assert ideal < result.bits < ideal + 0.6  # headers and tables, of small tensors
        assert result.float_bytes == 4 * model.num_parameters()
        assert "bits a coded weight" in str(result)

    @pytest.mark.parametrize(
        "options, match",
        [
            (dict(step=0.3), "step: expected a power of two"),
            (dict(step=-1.0), "step"),
            (dict(step={}), "step: expected an exponent for each"),
            (dict(max_error=0.0), "max_error"),
            (dict(step=0.5, max_error=0.1), "step, max_error: .*give one"),
            (dict(evaluate=lambda: float("nan")), "evaluate"),
            (dict(evaluate=lambda: 1.0, max_loss_increase=0.0), "max_loss_increase"),
            (dict(coder="zip"), "coder"),
            (dict(curvature={}), "curvature: .*evaluate"),
            (dict(curvature={}, evaluate=lambda: 1.0), "curvature: expected one for"),
            (dict(step=2.0**-27, coder="trellis"), "below 2\\^22"),
            (dict(exclude="."), "exclude"),
            (dict(exclude="("), "exclude.*regular"),
            (dict(rate=-1.0), "rate"),
            (dict(step=float("inf")), "step"),
            (dict(max_error=1e-9), "max_error"),
            (dict(evaluate=lambda: -1.0), "evaluate"),
        ],
    )
    def test_bad_input(self, options, match):
        with pytest.raises(ValueError, match=match):
            compress(llama(), **options)

    def test_refused_models_are_as_before(self, tmp_path):
        from peft import LoraConfig, get_peft_model

        model = llama()
        kept = {name: p.clone() for name, p in model.state_dict().items()}
        losses = iter([1.0, 1.0])
        for options in (dict(coder="zip"), dict(evaluate=lambda: next(losses)), dict(step=2.0**-40)):
            with pytest.raises((ValueError, StopIteration)):
                compress(model, **options)
            assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items()), options
        model.hf_quantizer = quantizer = object()
        with pytest.raises(ValueError, match="model: .*quantizer of their own"):
            save_compressed(model, tmp_path)
        assert model.hf_quantizer is quantizer and not any(tmp_path.iterdir())
        del model.hf_quantizer
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="folder: .*weights already"):
            save_compressed(model, tmp_path)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            compress(model)
        with pytest.raises(ValueError, match="adapters"):
            save_compressed(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "peft")

    def test_a_bound_that_cannot_be_held(self):
        model = llama()
        start = model.lm_head.weight.detach().clone()
        with pytest.raises(ValueError, match="max_loss_increase"):
            compress(model, evaluate=lambda: 1.0 + float((model.lm_head.weight - start).abs().sum() > 0))


def test_prune():
    model = llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = iter([2.0, 3.0])
    found = prune(model, 0.6, evaluate=lambda: next(values))
    assert found == {"before": 2.0, "after": 3.0, "zeros": pytest.approx(0.6, abs=1e-3)}
    assert [name for name, _ in model.named_parameters()] == list(before)
    magnitudes = torch.cat([before[name].abs().flatten() for name in coded_parameters(model, "norm|bias")])
    threshold = magnitudes.quantile(0.6)
    for name, p in coded_parameters(model, "norm|bias").items():
        kept = before[name].abs() > threshold + 1e-6
        assert torch.equal(p[kept], before[name][kept]) and not p[before[name].abs() < threshold - 1e-6].any()
    with pytest.raises(ValueError, match="ratio"):
        prune(model, 1.5)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 1.0])
def test_prune_equal_weights(ratio):
    """Of weights of two magnitudes, or of one, exactly the ratio, smaller ones first, as many of each matrix."""
    model = llama()
    parameters = coded_parameters(model, "norm|bias")
    total = sum(p.numel() for p in parameters.values())
    for small in (0.0, 0.25):
        with torch.no_grad():
            for p in parameters.values():
                p.copy_(torch.where(torch.arange(p.numel()) % 4 < 4 * small, -1.0, 2.0).view_as(p))
        assert prune(model, ratio)["zeros"] == round(ratio * total) / total
        left = sum(int((p == -1).sum()) for p in parameters.values())
        assert left == max(0, small * total - round(ratio * total))
        for p in parameters.values():
            assert float((p == 0).float().mean()) == pytest.approx(ratio, abs=2 / p.shape[0])


def test_command_line(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    run = tmp_path / "run"
    options = ["--config", "hidden_size=16,num_hidden_layers=1", "--block_size", "32", "--max_steps", "4"]
    main(["train", "--trainer", "rate", "--model", "gru", "--data", str(text), "--output_dir", str(run), *options])
    assert (run / "rate.png").exists() and "rate term" in (run / "README.md").read_text()
    assert main(["compress", str(run), str(tmp_path / "coded"), "--data", str(text), "--tokens", "200"]) == 0
    assert "bits a coded weight" in capsys.readouterr().out
    assert main(["compress", str(run), str(tmp_path / "plain"), "--coder", "ans"]) == 0
    assert main(["inspect", str(tmp_path / "plain")]) == 0
    table = capsys.readouterr().out
    assert "model.layers.0.mixer.recurrent_weight" in table and "2^-" in table and "ans" in table
    assert main(["inspect", str(run)]) == 0
    assert "float32" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "coded"), "--prompt", "to be", "--max_new_tokens", "4"]) == 0
    assert main(["compress", str(run), str(tmp_path / "coded")]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["inspect", str(text.parent / "nothing")]) == 1
    coded = tmp_path / "coded" / "model.safetensors"
    data = bytearray(coded.read_bytes())
    data[-3] ^= 1
    coded.write_bytes(data)
    assert main(["inspect", str(tmp_path / "coded")]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "coded"), "--prompt", "to be"]) == 1
    config = GRUConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_labels=3, pad_token_id=0)
    GRUForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    assert main(["compress", str(tmp_path / "classifier"), str(tmp_path / "coded classifier")]) == 0
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "coded classifier", output_loading_info=True
    )
    assert type(again) is GRUForSequenceClassification and not info["missing_keys"]
    assert os.listdir(tmp_path / "coded")


class TestCurvature:
    """Steps of rows, by squared gradients."""

    def test_squared_gradients(self):
        model, x = llama(), torch.randint(61, (3, 1, 9), generator=torch.Generator().manual_seed(1))
        found = weight_curvature(model.train(), ({"input_ids": row, "labels": row} for row in x))
        assert model.training and all(p.grad is None for p in model.parameters())
        assert found.keys() == coded_parameters(model, "norm|bias").keys()
        expected = 0
        for row in x:
            logits = model.eval()(row).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, row[0, 1:])
            expected += torch.autograd.grad(loss, model.lm_head.weight)[0] ** 2
        torch.testing.assert_close(found["lm_head.weight"], expected)
        with pytest.raises(ValueError, match="batches"):
            weight_curvature(model, [])

    def test_fewer_bits_than_steps_of_tensors(self, tmp_path):
        """Within the bound, by ten evaluations; rows that are of no use have coarse steps; read as any other."""
        model = llama(hidden_size=64, num_hidden_layers=1)
        x = (torch.arange(8 * 33).reshape(8, 33) ** 2 * 7 % 30).long()  # half of the embedding is in use
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(30):
            model(x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        curvature = weight_curvature(model, ({"input_ids": row[None], "labels": row[None]} for row in x))
        kept, losses = {name: p.clone() for name, p in model.state_dict().items()}, []

        @torch.no_grad()
        def evaluate() -> float:
            losses.append(float(model(x, labels=x).loss))
            return losses[-1]

        settings = dict(evaluate=evaluate, max_loss_increase=0.05)
        with pytest.raises(ValueError, match="max_loss_increase: 3 evaluations"):
            compress(model, **settings | dict(max_loss_increase=1e-7), curvature=curvature, evaluations=3)
        assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
        losses.clear()
        rows = save_compressed(model, tmp_path, **settings, curvature=curvature, coder="trellis")
        assert len(losses) <= 10 and evaluate() <= 1.05 * losses[0]
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
        exponents = row_exponents(read_header(rows.payloads["model.embed_tokens.weight"])[0])
        assert exponents[30:].min() == exponents.max() > exponents.min()
        model.load_state_dict(kept)
        rounded = compress(model, step=2.0**-7, coder="trellis")  # the coarsest one for all within the bound
        assert float(model(x, labels=x).loss) <= 1.05 * losses[0]
        assert rows.bits < 0.9 * rounded.bits

    def test_equal_importance_where_gradients_say_nothing(self):
        """All that matters is said not to: one step for all is found, as without."""
        model, ids = llama(), torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(1))
        evaluate = torch.no_grad()(lambda: float(model(ids, labels=ids).loss))
        wrong = {
            name: torch.where(torch.arange(c.numel()).view_as(c) % c.shape[-1] < 2, 1e6, 1e-6)
            for name, c in ones(model).items()
        }
        settings = dict(evaluate=evaluate, max_loss_increase=0.01, coder="trellis")
        kept = {name: p.clone() for name, p in model.state_dict().items()}
        found = compress(model, **settings, curvature=wrong).bits
        model.load_state_dict(kept)
        assert found <= 1.1 * compress(model, **settings, curvature=ones(model)).bits

    def test_which_choices(self):
        for change in (dict(evaluations=2), dict(max_loss_increase=0.0), dict(evaluate=lambda: -1.0)):
            settings = dict(evaluate=lambda: 1.0, curvature=ones(llama())) | change
            with pytest.raises(ValueError, match=next(iter(change))):
                compress(llama(), **settings)


def ones(model):
    return {name: torch.ones_like(p) for name, p in coded_parameters(model, "norm|bias").items()}


class TestDifferences:
    """A fine-tune as what was added to a checkpoint."""

    @staticmethod
    def tuned(folder, dtype=torch.float32, **settings):
        """A base in `folder`, and a model that moved away from it: but for one matrix and the norms."""
        model = llama(**settings).to(dtype)
        model.save_pretrained(folder)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1 and "q_proj" not in name:
                    p.add_(1e-3 * torch.randn_like(p, dtype=torch.float32).to(dtype))
        return model

    @pytest.mark.parametrize("dtype, coded_base", [(torch.float32, True), (torch.bfloat16, False)])
    def test_there_and_back(self, dtype, coded_base, tmp_path, monkeypatch):
        """Both folders may move; what the base has is not stored again."""
        here = tmp_path / "here"
        model = self.tuned(here / "base", dtype)
        if coded_base:
            save_compressed(AutoModelForCausalLM.from_pretrained(here / "base"), here / "coded", step=2.0**-9)
        base = "coded" if coded_base else "base"
        monkeypatch.chdir(here)
        plain = {name: p.detach().clone() for name, p in model.named_parameters()}
        result = save_compressed(model, "tuned", base=base, step=2.0**-10, rate=0.0)
        monkeypatch.chdir(tmp_path)
        there = here.rename(tmp_path / "there")
        loaded = AutoModelForCausalLM.from_pretrained(there / "tuned")
        assert_same(model, loaded)
        assert loaded.dtype == dtype and not hasattr(loaded.config, "quantization_config")
        before = AutoModelForCausalLM.from_pretrained(there / base).state_dict()
        for name, p in loaded.named_parameters():
            exact = before[name].float() + ((plain[name].float() - before[name].float()) * 2**10).round() / 2**10
            assert torch.equal(p, (exact if p.dim() > 1 else plain[name]).to(dtype)), name
        assert_same(AutoModel.from_pretrained(there / "tuned"), model.model)
        if not coded_base:
            assert result.bits < 4 and result.bytes < 0.3 * result.float_bytes
            assert result.payloads["model.norm.weight"].numel() < 100
            assert result.payloads["model.layers.0.self_attn.q_proj.weight"].numel() < 100

    def test_a_new_head_is_coded_whole(self, tmp_path):
        self.tuned(tmp_path / "base")
        settings = dict(num_labels=5, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **settings)
        save_compressed(model, tmp_path / "tuned", base=tmp_path / "base", step=2.0**-9)
        assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned"), model)
        with safe_open(tmp_path / "tuned" / "model.safetensors", "pt") as file:
            assert {n for n in file.keys() if n.endswith(".coded")} == {"score.weight.coded"}  # noqa: SIM118

    def test_by_the_loss(self, tmp_path):
        model = self.tuned(tmp_path / "base")
        x = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            start = float(model(x, labels=x).loss)
            save_compressed(
                model,
                tmp_path / "tuned",
                base=tmp_path / "base",
                evaluate=lambda: float(model(x, labels=x).loss),
                max_loss_increase=0.001,
            )
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
            assert float(loaded(x, labels=x).loss) <= 1.001 * start

    def test_no_base_or_another_one(self, tmp_path):
        model = self.tuned(tmp_path / "base")
        save_compressed(model, tmp_path / "tuned", base=tmp_path / "base")
        assert main(["inspect", str(tmp_path / "tuned")]) == 0
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(ValueError, match="base: cannot read '../base'.*config.json") as caught:
            AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        assert str(caught.value).count("base: cannot read") == 1
        llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match="base: '../base' is not what this.* differs"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        path = tmp_path / "tuned" / "config.json"
        path.write_text(path.read_text().replace("../base", "../moved"))
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), model)
        with torch.no_grad():
            other = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
            other.lm_head.weight[3, 2] += 1e-6
            other.save_pretrained(tmp_path / "moved")
        with pytest.raises(ValueError, match="base: '../moved' is not what this.*lm_head.weight differs"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        with pytest.raises(OSError, match="nothing"):
            save_compressed(llama(), tmp_path / "b", base=tmp_path / "nothing")
