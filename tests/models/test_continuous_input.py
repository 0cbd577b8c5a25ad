"""Sequences of numbers instead of tokens: values that are missing, patches, padding, pieces, and what is refused."""

import copy

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_head, relative_error
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import hf_rnn
from hf_rnn.layers import ContinuousInput

F, T = 3, 17


@pytest.fixture
def features():
    return torch.randn(2, T, F, generator=torch.Generator().manual_seed(1))


def make(architecture="gru", head="Model", **settings):
    settings = dict(num_input_features=F, initializer_range=0.3) | settings
    return make_head(architecture, head, **settings)


def output(model, features, **arguments):
    return model(input_features=features, **arguments).last_hidden_state


@pytest.mark.parametrize("time", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_equation(size, time):
    """W [x * observed, missing] + b, step by step in float64; what is missing or padding may hold anything."""
    layer = ContinuousInput(F, 5, size).double()
    x = torch.randn(2, time, F, dtype=torch.float64)
    observed = torch.rand(2, time, F) > 0.3
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[1, : time // 2] = False
    there = observed & mask[..., None]
    found = layer(torch.where(there, x, torch.nan), observed.int(), mask)
    count = -(-time // size)
    for row, first in ((0, 0), (1, (time // 2) % size if time > 1 else 0)):
        for token in range(count):
            values, missing = torch.zeros(size, F).double(), torch.ones(size, F).double()
            for step in range(size):
                t = first + token * size + step
                if t < time:
                    values[step] = torch.where(there[row, t], x[row, t], 0.0)
                    missing[step] = 1.0 - there[row, t].double()
            expected = layer.proj(torch.cat([values, missing], -1).flatten())
            torch.testing.assert_close(found[row, token], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_padding_changes_nothing(architecture, size, features):
    """On either side, by any number of steps, whatever stands there."""
    model = make(architecture, patch_size=size)
    expected = output(model, features[:, :14])
    count = expected.shape[1]
    for front in (0, 1, 3, 4, 6):
        padded = torch.full((2, 14 + front + 5, F), torch.nan)
        padded[:, front : front + 14] = features[:, :14]
        mask = torch.zeros(2, 14 + front + 5).long()
        mask[:, front : front + 14] = 1
        found = output(model, padded, attention_mask=mask)
        assert found.shape[1] == -(-mask.shape[1] // size)
        torch.testing.assert_close(found[:, front // size :][:, :count], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "ends"])
def test_sequences_of_unequal_lengths_together_and_alone(pooling, features):
    model = make("mingru", "ForSequenceClassification", patch_size=4, classifier_pooling=pooling)
    lengths, together = [17, 6], features.clone()
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    together[~mask] = torch.inf
    logits = model(input_features=together, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = model(input_features=features[row, None, :length]).logits
        torch.testing.assert_close(logits[row, None], alone, rtol=1e-4, atol=1e-5)


def test_missing_is_not_zero(features):
    model = make()
    observed = torch.ones_like(features)
    observed[:, 5, 1] = 0
    zero = features.masked_fill(observed == 0, 0.0)
    assert torch.equal(output(model, features, observed_mask=observed), output(model, zero, observed_mask=observed))
    assert relative_error(output(model, zero, observed_mask=observed), output(model, zero)) > 1e-3


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("architecture", ["lstm", "mingru", "xlstm"])
def test_pieces(architecture, size, features):
    """A stream in pieces of whole patches, the mask with the past in front or without."""
    model = make(architecture, patch_size=size)
    mask = torch.ones(2, T).long()
    mask[0, -6:] = 0
    whole, state, parts = output(model, features, attention_mask=mask), None, []
    for start, stop in ((0, 4), (4, 12), (12, T)):
        shown = mask[:, :stop] if start == 4 else mask[:, start:stop]
        out = model(input_features=features[:, start:stop], attention_mask=shown, cache=state, use_cache=True)
        state = out.cache
        parts.append(out.last_hidden_state)
    assert state.get_seq_length() == -(-T // size)
    real = mask[0].unfold(0, size, size).any(-1).sum() if size > 1 else 11
    torch.testing.assert_close(torch.cat(parts, 1)[0, :real], whole[0, :real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 1)[1], whole[1], rtol=1e-4, atol=1e-5)


def test_nothing_follows_a_part_of_a_patch(features):
    """Neither steps that would belong to it, nor those behind padding that moved it."""
    model = make("mingru", patch_size=4)
    padded = torch.ones(2, 8).long()
    padded[1, :3] = 0
    for piece, mask in ((features[:, :6], None), (features[:, :8], padded)):
        state = model(input_features=piece, attention_mask=mask, use_cache=True).cache
        for cache in (state, copy.deepcopy(state)):
            with pytest.raises(ValueError, match="cache: the steps before it end inside a patch"):
                model(input_features=features[:, 8:12], cache=cache)
        state.reset()
        assert model(input_features=features[:, :4], cache=state).cache.get_seq_length() == 1
    padded[1, 3] = 0
    state = model(input_features=features[:, :8], attention_mask=padded, use_cache=True).cache
    assert model(input_features=features[:, 8:12], cache=state).cache.get_seq_length() == 3


def test_packed(features):
    model = make("lstm")
    alone = torch.cat([output(model, x[None]) for x in features[0].split([5, 12])], 1)
    torch.testing.assert_close(output(model, features[:1], cu_seq_lens_q=torch.tensor([0, 5, 17])), alone)
    patched = make("lstm", patch_size=2)  # positions are of tokens there
    alone = torch.cat([output(patched, x[None]) for x in features[0].split([6, 11])], 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    torch.testing.assert_close(output(patched, features[:1], position_ids=positions), alone)


def test_gradients_in_float64(features):
    """Of values that are there, and of nothing else."""
    model = make("gru", num_hidden_layers=1, patch_size=2).double()
    observed = torch.rand(2, T, F) > 0.3
    x = features.double().requires_grad_()
    torch.autograd.gradcheck(lambda x: output(model, x, observed_mask=observed)[:, -1], x, fast_mode=True)
    output(model, x, observed_mask=observed).sum().backward()
    assert (x.grad[observed] != 0).all() and not x.grad[~observed].any()


@pytest.mark.parametrize("head", ["Model", "ForCTC", "ForQuestionAnswering", "ForTokenClassification"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_and_head(architecture, head, features, tmp_path):
    model = make(architecture, head, patch_size=2)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModel if head == "Model" else getattr(transformers, f"AutoModel{head}")
    loaded = auto.from_pretrained(tmp_path)
    expected = model(input_features=features, use_cache=False)[0]
    assert torch.equal(loaded(input_features=features, use_cache=False)[0], expected)
    assert loaded.main_input_name == "input_features" and expected.shape[1] == 9
    embeds = loaded.get_input_embeddings()(features)
    assert isinstance(loaded.get_input_embeddings(), ContinuousInput) and embeds.shape == (2, 9, 16)
    assert torch.equal(loaded(inputs_embeds=embeds, use_cache=False)[0], expected)


def test_other_dtypes(features):
    model = make().bfloat16()
    assert output(model, features).dtype == torch.bfloat16  # features come as they come
    assert torch.equal(output(model, features.double()), output(model, features))
    with pytest.raises(ValueError, match="input_features: expected finite values .* got -?inf"):
        output(model.half(), features * 1e5)  # of what float16 can hold


def test_torch_lstm_on_features(features):
    """A torch.nn network of sensors, its projection in front."""
    rnn = torch.nn.LSTM(8, 8, num_layers=2, batch_first=True)
    model = hf_rnn.LSTMModel.from_torch(rnn, num_input_features=F)
    expected = rnn(model.embed_features(features))[0]
    torch.testing.assert_close(output(model, features), expected)
    assert isinstance(model.to_torch(), torch.nn.LSTM)


def test_compiled_and_exported(features):
    torch._dynamo.reset()
    model = make("mingru", num_hidden_layers=1, patch_size=4, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask, observed = torch.ones(2, T).long(), torch.rand(2, T, F) > 0.2
    mask[0, :3], mask[1, -6:] = 0, 0
    inputs = dict(attention_mask=mask, observed_mask=observed)
    found, expected = output(compiled, features, **inputs), output(model, features, **inputs)
    for row, real in ((0, slice(0, 4)), (1, slice(0, 3))):
        torch.testing.assert_close(found[row, real], expected[row, real])
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=5)}
    inputs = dict(input_features=features, attention_mask=mask)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    x, mask = torch.randn(3, 41, F), torch.ones(3, 41).long()
    mask[:, :3] = 0
    found = output(program.module(), x, attention_mask=mask)
    torch.testing.assert_close(found, output(model, x, attention_mask=mask))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer(features, gradient_checkpointing, tmp_path):
    """Columns are found by their names, missing values among them; checkpointing needs no token embedding."""
    model = make("mingru", "ForTokenClassification", num_hidden_layers=1)
    values, observed = features.clone(), torch.rand(2, T, F) > 0.2
    values[~observed] = torch.nan
    columns = dict(input_features=values.tolist(), observed_mask=observed.tolist(), labels=[[1] * T, [2] * T])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=0.1, gradient_checkpointing=gradient_checkpointing, include_num_input_tokens_seen="all",
    )  # fmt: skip
    before = model.model.embed_features.proj.weight.clone()
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict(columns))
    trainer.train()
    assert not torch.equal(before, model.model.embed_features.proj.weight)


@pytest.mark.parametrize(
    "settings", [{}, dict(target_modules=["in_proj"], modules_to_save=["embed_features", "score"])]
)
def test_lora(features, settings, tmp_path):
    """The embedding of values adapted or trained whole."""
    model = make("gru", "ForTokenClassification", num_hidden_layers=1)
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    adapted.train()(input_features=features, labels=torch.ones(2, T).long()).loss.backward()
    assert any("embed_features" in name and p.grad is not None for name, p in adapted.named_parameters())
    torch.optim.SGD(adapted.parameters(), lr=0.1).step()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(input_features=features).logits, adapted.eval()(input_features=features).logits)


NAN = torch.full((2, T, F), torch.nan)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(input_features=torch.zeros(2, T, 4)), ValueError, r"input_features: expected shape \(B, T, 3\), got \("),
        (dict(input_features=torch.zeros(T, F)), ValueError, r"input_features: expected shape \(B, T, 3\), got \("),
        (dict(input_features=torch.zeros(2, T, F).long()), TypeError, "input_features: expected floating numbers"),
        (dict(input_features=NAN), ValueError, "input_features: expected finite values .* nan in row 0, step 0, feat"),
        (dict(input_features=1 / torch.zeros(2, T, F)), ValueError, "input_features: expected finite values .* inf in"),
        (
            dict(input_features=NAN, attention_mask=torch.arange(T).expand(2, T) > 3),
            ValueError,
            "input_features: .*nan in row 0, step 4",
        ),
        (dict(input_features=NAN, observed_mask=NAN[..., :1]), ValueError, r"observed_mask: .*\(2, 17, 3\), got \(2, "),
        (dict(input_features=NAN, observed_mask=NAN), ValueError, "observed_mask: expected zeros where a value is mi"),
        (dict(input_features=torch.zeros(2, T, F), attention_mask=torch.ones(2, 16)), ValueError, "attention_mask: ex"),
        (dict(input_ids=torch.zeros(2, T).long()), ValueError, "input_ids: this model reads input_features or inputs_"),
        (dict(), ValueError, "input_features, inputs_embeds: pass exactly one"),
        (dict(inputs_embeds=torch.zeros(2, T, 16), observed_mask=NAN), ValueError, "observed_mask: expected with inp"),
    ],
)
def test_wrong_input(arguments, error, message):
    for head in ("Model", "ForTokenClassification", "ForSequenceClassification"):
        with pytest.raises(error, match=message):
            make("gru", head)(**arguments)


def test_what_reads_tokens(features):
    for head in ("ForCausalLM", "ForMaskedLM"):
        with pytest.raises(ValueError, match="num_input_features: a language model predicts the tokens that it reads"):
            make("gru", head)
    for head in ("Model", "ForCausalLM", "ForTokenClassification"):
        with pytest.raises(ValueError, match="input_features: this model reads input_ids or inputs_embeds"):
            make_head("gru", head)(input_features=features)
    with pytest.raises(ValueError, match="resize_token_embeddings: this model reads input_features"):
        make("gru", "ForTokenClassification").resize_token_embeddings(70)
