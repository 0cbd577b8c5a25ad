"""What users of transformers expect of any model."""

import copy
import inspect
import warnings

import pytest
import torch
import torch._dynamo.testing
from conftest import ARCHITECTURES, LAYOUTS, for_those_that_have, others_slow, relative_error
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompileConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_rnn import byte_tokenizer


def training_arguments(folder, **settings):
    defaults = dict(max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no")
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, **defaults | settings)


def test_auto_classes(architecture, model):
    config = model.config
    assert type(AutoConfig.for_model(config.model_type)) is type(config)
    assert type(AutoModel.from_config(config)) is type(model.model)
    assert type(AutoModelForCausalLM.from_config(config)) is type(model)
    assert type(AutoModelForSequenceClassification.from_config(config)) is LAYOUTS[architecture][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["10GB", "4KB"])
def test_save_and_load(model, ids, tmp_path, dtype, shard):
    model = model.to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype and not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {"config.json", "generation_config.json", "modeling_hf_rnn.py"} <= {p.name for p in tmp_path.iterdir()}


def test_backbone_and_head_share_checkpoints(architecture, model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    expected = model.model(ids).last_hidden_state
    assert torch.equal(backbone(ids).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(classifier.model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("architecture, settings", for_those_that_have((dict(forget_bias=2.0, block_layout="paper"),)))
def test_initialisation_is_whole(architecture, settings, tmp_path):
    """Every parameter is initialised, also those that a checkpoint lacks. xLSTM's: test_xlstm.py."""
    config = LAYOUTS[architecture][0](hidden_size=32, num_hidden_layers=1, **settings)
    model = LAYOUTS[architecture][1](config)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and parameter.abs().max() < 3, name
    mixer = model.model.layers[0].mixer
    bias, gates = mixer.in_proj.bias, mixer.in_proj.bias.view(-1, 32)
    # The gate that keeps, of the projection's; minGRU's z forgets
    place, value = {"gru": (1, 2.0), "lstm": (1, 2.0), "mingru": (0, -2.0), "minlstm": (0, 2.0)}[architecture]
    assert set(gates[place].tolist()) == {value} and int((gates != 0).sum()) == 32
    for matrix in getattr(mixer, "recurrent_weight", torch.empty(0)).view(-1, 32, 32):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(32))
    model.model.save_pretrained(tmp_path)  # no lm_head in it
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.std().item() == pytest.approx(32**-0.5, rel=0.05), "1 / sqrt(inputs)"
    assert torch.equal(loaded.model.layers[0].mixer.in_proj.bias, bias)


@pytest.mark.parametrize(
    "architecture, settings", for_those_that_have((dict(forget_bias=2.0, learned_initial_state=False, conv_kernel=0),))
)
def test_initial_biases_without_a_learned_state(architecture, settings):
    config = LAYOUTS[architecture][0](hidden_size=32, num_hidden_layers=1, **settings)
    mixer = LAYOUTS[architecture][1](config).model.layers[0].mixer
    assert int((mixer.in_proj.bias.abs() == 2.0).sum()) == 64


@pytest.mark.parametrize("architecture", ["mingru", "minlstm"])
def test_the_papers_network(architecture):
    """Selective copying: 3 layers, width 64, expansion 6, RMS norms, dropout 0.1, no convolution, no feed-forward."""
    config_class, model_class, _ = LAYOUTS[architecture]
    config = config_class(
        vocab_size=16,
        hidden_size=64,
        num_hidden_layers=3,
        block_layout="paper",
        expansion_factor=6,
        hidden_dropout=0.1,
        conv_kernel=0,
        feed_forward_factor=0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    gates = 2 if architecture == "mingru" else 3
    inner = 6 * 64
    layer = (64 + 1) * gates * inner + inner + (inner + 1) * 64 + 64  # projections, initial state, output, norm
    assert model_class(config).num_parameters() == 2 * 16 * 64 + 3 * layer + 64
    block = model_class(config).model.layers[0]
    assert block.conv is None and block.ff is None and isinstance(block.mixer_norm, torch.nn.RMSNorm)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantized(model, ids):
    """torch's int8 linear layers, whose weights are no tensors."""
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    expected, logits = (m(ids, use_cache=False).logits for m in (model, quantized))
    assert 0 < relative_error(logits, expected) < 0.3
    generated = quantized.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated.shape == (3, ids.shape[1] + 3)


def test_tied_embeddings(make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_resize_token_embeddings(model, ids):
    before = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model(ids).logits.shape[-1] == 70
    torch.testing.assert_close(model(ids).logits[..., :61], before)


def test_labels_and_num_items_in_batch(model, ids):
    labels = ids.masked_fill(ids < 10, -100)
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].reshape(-1, 61), labels[:, 1:].reshape(-1), reduction="sum"
    )
    items = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(output.loss, expected / items)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=7).loss, expected / 7)


def test_logits_to_keep(model, ids):
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    index = torch.tensor([0, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=index).logits, whole[:, index])


def test_inputs_embeds(model, ids):
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_outputs(model, ids):
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and all(x.shape == (3, 17, 16) for x in output.hidden_states)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.logits(output.hidden_states[-1]), output.logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 17


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(make_model, ids, use_reentrant):
    model = make_model(hidden_dropout=0.0).train()
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # once more in the backward pass
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_dropout(make_model, ids):
    model = make_model(hidden_dropout=0.5).train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_tools_that_look_at_every_attribute(model):
    """A property that does not apply to a model is an attribute that it has not."""
    for thing in (model, model.model, model.config, model(torch.zeros(1, 2).long()).past_key_values):
        inspect.getmembers(thing)


def test_trace(make_model, ids):
    """torch.jit.trace, which wants tuples of tensors."""
    model = make_model(use_cache=False, return_dict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes and checks that become constants
        traced = torch.jit.trace(model, (ids[:2, :5],), check_trace=False)
        masked = torch.jit.trace(model, (ids[:2, :5], torch.ones_like(ids[:2, :5])), check_trace=False)
    torch.testing.assert_close(traced(ids[1:, :5]), model(ids[1:, :5]))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # not kept from the example, which had no padding
    torch.testing.assert_close(masked(ids[1:, :5], mask), model(ids[1:, :5], mask))


@pytest.mark.slow
def test_compile_without_graph_breaks(architecture, model, ids):
    torch._dynamo.reset()  # tests share transformers' wrappers, and so their limit of recompilations
    ids = ids[:, :4] if architecture == "memoryrnn" else ids  # its loop over time is the graph's
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch.testing.assert_close(
        compiled(ids, attention_mask=mask).logits[1:], model(ids, attention_mask=mask).logits[1:]
    )
    if architecture != "memoryrnn":  # lays packed sequences out as rows, by their lengths
        packed = dict(cu_seq_lens_q=torch.tensor([0, 5, 17], dtype=torch.int32))
        torch.testing.assert_close(compiled(ids[:1], **packed).logits, model(ids[:1], **packed).logits)
    model.train()
    loss = compiled(ids, labels=ids).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", others_slow(LAYOUTS, ("gru", "xlstm")), indirect=True)
def test_compiled_decoding_step(model, ids):
    """One graph serves every step, and no step compiles again."""
    torch._dynamo.reset()  # tests share transformers' wrappers, and so their limit of recompilations
    with torch.no_grad():
        state = model(ids).past_key_values
    expected = copy.deepcopy(state)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for t in range(6):
            logits = step(ids[:, t : t + 1], past_key_values=state).logits
            torch.testing.assert_close(logits, model(ids[:, t : t + 1], past_key_values=expected).logits)
    assert counter.frame_count <= 2  # seen_tokens becomes dynamic once


@pytest.mark.parametrize("architecture", others_slow(LAYOUTS, ("mingru", "xlstm")), indirect=True)
def test_generate_compiles_its_steps(model, ids):
    """With a `compile_config`: the same tokens, the prompt not compiled, one graph for all steps and later calls."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **settings)
    assert graphs["unique_graphs"] == 0
    assert torch.equal(model.generate(ids, compile_config=config, **settings), expected)
    compiled = graphs["unique_graphs"]
    assert 1 <= compiled <= 2  # seen_tokens becomes dynamic once
    model.generate(ids[:, 1:], compile_config=config, **settings)
    assert graphs["unique_graphs"] == compiled
    unused = CompileConfig(backend="no such backend")
    assert torch.equal(model.generate(ids, compile_config=unused, disable_compile=True, **settings), expected)


@pytest.mark.parametrize("architecture", others_slow(LAYOUTS, ("lstm", "minlstm", "xlstm")), indirect=True)
def test_export(model):
    with torch.no_grad():
        ids = torch.randint(0, 58, (3, 4))
        dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", min=2)}
        program = torch.export.export(
            model,
            (),
            {"input_ids": ids, "use_cache": False},
            dynamic_shapes={"input_ids": dynamic, "use_cache": None},
        )
        for shape in [(1, 2), (3, 17), (5, 40)]:
            x = torch.randint(0, 58, shape)
            torch.testing.assert_close(
                program.module()(input_ids=x, use_cache=False).logits, model(x, use_cache=False).logits
            )


@pytest.mark.parametrize("targets", ["all-linear", ["in_proj", "out_proj"]])
def test_lora(model, ids, tmp_path, targets):
    base = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(input_ids=ids, **options), adapted.generate(input_ids=ids, **options))
    merged = loaded.merge_and_unload()(ids).logits  # rounds differently
    torch.testing.assert_close(merged, adapted(input_ids=ids).logits, rtol=1e-4, atol=2e-4)


def test_trainer_in_default_settings(model, ids, tmp_path):
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(
        model,
        training_arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.train()
    assert any(not torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert trainer.evaluate()["eval_loss"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert trainer.predict(dataset).predictions.shape == (3, 17, 61)


@pytest.mark.parametrize("kind", [1, 2], ids=["causal", "classification"])
def test_accumulated_batches_make_the_step_of_a_whole_one(ids, tmp_path, kind):
    config_class, model_class = ARCHITECTURES["mingru"][0], ARCHITECTURES["mingru"][kind]
    labels = ids.tolist() if kind == 1 else [0, 1, 1]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})
    weights = []
    for rows in (3, 1):
        torch.manual_seed(0)
        model = model_class(config_class(vocab_size=61, hidden_size=16, num_hidden_layers=1, pad_token_id=None))
        options = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1)
        batches = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=3 // rows)
        Trainer(model, training_arguments(tmp_path, **options | batches), train_dataset=dataset).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("offsets", [False, True])
def test_trainer_with_packing(model, tmp_path, offsets):
    """The packed batch's loss is that of its sequences one by one."""
    rows = [torch.randint(0, 58, (n,)).tolist() for n in (5, 9, 1, 7)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=offsets, return_position_ids=not offsets)
    trainer = Trainer(
        model,
        training_arguments(tmp_path, per_device_eval_batch_size=4),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=collator,
    )
    sums = [model(torch.tensor([r]), labels=torch.tensor([r]), num_items_in_batch=1).loss for r in rows if len(r) > 1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(sums).detach()) / 18, rel=1e-5)
    trainer.train()


def test_pipeline(make_model, tmp_path):
    model, tokenizer = (
        make_model(vocab_size=259, pad_token_id=256, bos_token_id=257, eos_token_id=258),
        byte_tokenizer(),
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    together = pipe(["Hello", "A longer prompt"], batch_size=2, **options)
    alone = [pipe(text, **options) for text in ["Hello", "A longer prompt"]]
    assert together == alone


def test_classifier(architecture, ids, tmp_path):
    config_class, _, classifier_class = LAYOUTS[architecture]
    torch.manual_seed(0)
    model = classifier_class(config_class(vocab_size=61, hidden_size=16, num_labels=4, pad_token_id=58)).eval()
    expected = model(ids).logits
    assert expected.shape == (3, 4)
    for side in ("left", "right"):
        padding, ones = torch.full((3, 5), 58), torch.ones_like(ids)
        parts = (padding, ids) if side == "left" else (ids, padding)
        masks = (torch.zeros_like(padding), ones) if side == "left" else (ones, torch.zeros_like(padding))
        logits = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(torch.cat([ids, padding], 1)).logits, expected, rtol=1e-5, atol=1e-6)
    assert model(ids, labels=torch.tensor([0, 3, 1])).loss > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits, expected)


def test_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    text = "Grüße 你好 \n\t\x00 <|x|>  two  spaces\r\n 👩‍🚀 end"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text and len(tokenizer) == 259
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [256, 257, 258]
    assert tokenizer(["a", "bcd"], padding=True)["input_ids"] == [[256, 256, 97], [98, 99, 100]]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == ids and loaded.decode(ids) == text and loaded.padding_side == "left"
