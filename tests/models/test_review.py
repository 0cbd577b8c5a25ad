"""Mistakes that were once answered with wrong numbers, or worse."""

import os

import pytest
import torch
from conftest import ARCHITECTURES, skip_if_not_its_settings

from hf_rnn import MinGRUConfig, MinLSTMConfig, MinLSTMForCausalLM
from hf_rnn_kernels import linear_scan, min_gru_scan, rms_norm


def test_wrong_offsets_under_compile_are_an_error():
    scan = torch.compile(lambda a, c: linear_scan(a, a, None, c), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="rise from 0 to T = 8"):
        scan(torch.ones(1, 8, 4), torch.tensor([0, 3, 100000]))


def test_forward_mode_is_refused():
    x = torch.randn(1, 300, 256)  # a small norm is torch's own, and may; so is a large one under torch.func
    scan, norm = lambda x: min_gru_scan(x, x)[0], lambda x: rms_norm(x, torch.ones(256), 1e-6)
    for f in (scan, norm):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(scan, (x,), (torch.ones_like(x),))
    y, dy = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(y + 1e-3 * dy, norm(x + 1e-3), atol=1e-4, rtol=1e-4)


def test_rms_norm_weight():
    with pytest.raises(ValueError, match="weight: expected the last dimension"):
        rms_norm(torch.ones(2, 8), torch.ones(4, requires_grad=True), 1e-6)


def test_the_state_holds_nothing_else(model, ids):
    with torch.no_grad():
        state = model(ids.repeat(1, 20)).past_key_values
    for layer in state.states:
        for x in layer:
            assert x.untyped_storage().nbytes() == x.nbytes


def test_the_state_of_a_float64_model_is_float64(model, ids):
    model = model.double()
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7])
        rest = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-12)


def test_checkpointing_does_not_drop_a_state(model, ids):
    state = model(ids, use_cache=True).past_key_values.detach()
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cache: gradient checkpointing"):
        model(ids, past_key_values=state)


def test_masks(model, ids):
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        model(ids, attention_mask=torch.ones(3, 30))
    with pytest.raises(ValueError, match="attention_mask: expected zeros"):
        model(ids, attention_mask=torch.zeros(3, 17) - 1e4)
    state = model(ids, use_cache=True).past_key_values
    model(ids[:, :3], attention_mask=torch.ones(3, 20), past_key_values=state)


def test_masks_of_any_dtype_at_any_length():
    for time in (1, 4):
        x = torch.randn(2, time, 3)
        x[0, 0] = float("nan")
        mask = torch.ones(2, time)
        mask[0, 0] = 0
        for dtype in (torch.float32, torch.float64):
            outputs = [
                min_gru_scan(x.to(dtype), x.to(dtype), torch.ones(2, 3, dtype=dtype), m)[1]
                for m in (mask, mask.long(), mask.bool())
            ]
            assert all(torch.isfinite(y).all() and torch.equal(y, outputs[0]) for y in outputs)


def test_a_cache_of_another_architecture(ids):
    settings = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2)
    gru = ARCHITECTURES["mingru"][1](MinGRUConfig(**settings)).eval()
    with pytest.raises(ValueError, match="expected the state of a hf_rnn_minlstm"):
        MinLSTMForCausalLM(MinLSTMConfig(**settings)).eval()(ids, past_key_values=gru(ids).past_key_values)


def test_labels_of_another_shape(model, ids):
    with pytest.raises(ValueError, match="labels: expected the shape"):
        model(ids, labels=ids.t().contiguous())
    with pytest.raises(ValueError, match="logits_to_keep=0"):
        model(ids, labels=ids, logits_to_keep=1)
    torch.testing.assert_close(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)])
def test_beams_and_samples_from_a_returned_cache(model, ids, options):
    turn = torch.cat([ids, ids[:, :4].flip(1)], 1)
    options = dict(max_new_tokens=6, eos_token_id=None) | options
    state = model(ids, use_cache=True).past_key_values
    torch.manual_seed(0)
    output = model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=state, **options)
    torch.manual_seed(0)
    assert torch.equal(output, model.generate(turn, attention_mask=torch.ones_like(turn), **options))


def test_positions_of_a_padded_batch_are_no_packing(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    assert output.past_key_values.batch_size == 3
    torch.testing.assert_close(output.logits[0, 5:], model(ids[:1, 5:]).logits[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="use_cache: packed"):
        model(ids, position_ids=torch.arange(17)[None] % 5, use_cache=True)


def test_inference_mode_states_go_on_elsewhere(model, ids):
    with torch.inference_mode():
        state = model(ids).past_key_values
    with torch.no_grad():
        expected = model(torch.cat([ids, ids], 1)).logits[:, 17:]
        torch.testing.assert_close(model(ids, past_key_values=state).logits, expected, rtol=1e-5, atol=1e-5)


def test_inherited_cache_methods(model, ids):
    state = model(ids, use_cache=True).past_key_values
    assert state.is_sliding == [] and state.get_mask_sizes(1, 0) == (18, 0)


def test_classifier_rows(architecture, ids):
    config_class, _, classifier_class = ARCHITECTURES[architecture]
    model = classifier_class(config_class(vocab_size=61, hidden_size=16, pad_token_id=58)).eval()
    with pytest.raises(ValueError, match="row of padding only"):
        model(torch.full_like(ids, 58))
    with pytest.raises(ValueError, match="one sequence a row"):
        model(ids, position_ids=torch.arange(17)[None] % 5)
    left = torch.cat([torch.full((3, 4), 58), ids], 1)
    torch.testing.assert_close(model(left).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_after_a_fork():
    """OpenMP's threads do not survive it: the child computes in plain torch instead of being killed."""
    x = torch.randn(1, 5, 4)
    expected = min_gru_scan(x, x)[0]
    child = os.fork()
    if child == 0:
        same = torch.allclose(min_gru_scan(x, x)[0], expected, atol=1e-6)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "settings, message", [(dict(norm_eps=-1.0), "norm_eps"), (dict(forget_bias=float("nan")), "forget_bias")]
)
def test_config_numbers(architecture, settings, message):
    skip_if_not_its_settings(architecture, settings)
    with pytest.raises(Exception, match=message):
        ARCHITECTURES[architecture][0](**settings)
