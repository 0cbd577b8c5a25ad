"""On a GPU: every architecture against float64 on a CPU, generate(), compiled steps, and a run of every trainer.

The kernels' own tests on a GPU are beside their others, in tests/ops. `make gpu DRY=1` runs those of this file on a
CPU, where Triton's interpreter takes the place of the GPU.
"""

import copy
import math
import os

import pytest
import torch
from conftest import relative_error
from runs import TRAINERS, make_trainer
from transformers import CompileConfig

from hf_rnn_kernels import SequenceLayout, perturbed_embedding

pytest.importorskip("triton")

DRY = os.environ.get("HF_RNN_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
HIDDEN, LENGTH = (16, 5) if DRY else (128, 137)
RANGE = 1.2 / math.sqrt(HIDDEN)  # every part of a model matters, and no recurrence is chaotic
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a GPU"),
]
if DRY:
    from benchmarks import interpreter

    interpreter.use()


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """cuDNN's recurrences would round float32 to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def made(architecture, make_model):
    """A model on the device, of two heads where it has any: one head may be cuDNN's."""
    heads = {} if architecture in ("mingru", "minlstm", "memoryrnn") else dict(num_heads=2)
    return make_model(hidden_size=HIDDEN, initializer_range=RANGE, **heads).to(DEVICE)


def random_ids(rows=3, length=LENGTH):
    return torch.randint(0, 58, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def padding():
    """On the left, on the right, and inside."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, : LENGTH // 3] = 0
    mask[1, -2:] = 0
    mask[2, LENGTH // 2] = 0
    return mask.to(DEVICE)


LAYOUTS = {
    "plain": lambda: (random_ids(), {}),
    "padded": lambda: (random_ids(), dict(attention_mask=padding())),
    "packed": lambda: (random_ids(1), dict(cu_seq_lens_q=torch.tensor([0, 2, LENGTH - 1, LENGTH], device=DEVICE))),
}


def logits_and_gradients(model, ids, settings):
    """Logits of real tokens, and every parameter's gradient, of a loss that is not normalised."""
    logits = model(ids, use_cache=False, **settings).logits
    if "attention_mask" in settings:
        logits = logits[settings["attention_mask"].bool()]
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    loss = (logits * cotangent.to(logits)).sum()
    return {"logits": logits, **dict(zip(*_named(model, loss), strict=True))}


def _named(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return names, torch.autograd.grad(loss, parameters, materialize_grads=True)


def exact(model, ids, settings):
    """The same in float64 on a CPU."""
    on_cpu = {name: x.cpu() for name, x in settings.items()}
    return logits_and_gradients(copy.deepcopy(model).cpu().double(), ids.cpu(), on_cpu)


def assert_close(actual, expected):
    """Relative errors; a gradient that is next to nothing beside the others is measured by them. A sum over tokens that
    nearly cancels loses two digits in float32, whatever computes it."""
    size = max(x.pow(2).mean().sqrt() for name, x in expected.items() if name != "logits")
    for name, x in expected.items():
        error, own = (actual[name].detach().cpu().double() - x).pow(2).mean().sqrt(), x.pow(2).mean().sqrt()
        assert error <= (1e-4 * own if name == "logits" else 1e-3 * max(own, 1e-2 * size)), (name, error / own)


class TestModels:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_values_and_gradients(self, made, layout):
        ids, settings = LAYOUTS[layout]()
        expected = exact(made, ids, settings)
        assert_close(logits_and_gradients(made, ids, settings), expected)

    @pytest.mark.parametrize("architecture", ["gru", "lstm"])
    def test_one_head(self, make_model, architecture):
        """cuDNN's, or on a CPU torch's own."""
        model = make_model(hidden_size=HIDDEN, initializer_range=RANGE).to(DEVICE)
        for layout in ("plain", "padded"):
            ids, settings = LAYOUTS[layout]()
            assert_close(logits_and_gradients(model, ids, settings), exact(model, ids, settings))

    @pytest.mark.parametrize("architecture", ["xlstm"])
    def test_slstm_blocks(self, make_model, architecture):
        settings = dict(hidden_size=HIDDEN, initializer_range=RANGE, num_heads=2, block_layout="neurips")
        model = make_model(**settings, slstm_at=[1]).to(DEVICE)
        for layout in ("plain", "packed"):
            ids, settings = LAYOUTS[layout]()
            assert_close(logits_and_gradients(model, ids, settings), exact(model, ids, settings))

    def test_autocast(self, made, bfloat16_dot):
        """In bfloat16, as near to float64 as a CPU comes in bfloat16."""
        ids, settings = LAYOUTS["padded"]()
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = logits_and_gradients(made, ids, settings)
        assert all(actual[name].dtype == parameter.dtype for name, parameter in made.named_parameters())
        expected, on_cpu = exact(made, ids, settings), {name: x.cpu() for name, x in settings.items()}
        with torch.autocast("cpu", torch.bfloat16):
            other = logits_and_gradients(copy.deepcopy(made).cpu(), ids.cpu(), on_cpu)

        def distance(results):
            return sum((results[name].detach().cpu().double() - x).pow(2).sum() for name, x in expected.items()).sqrt()

        assert distance(actual) <= 2 * distance(other)

    def test_in_two_pieces(self, made):
        ids = random_ids()
        with torch.no_grad():
            whole = made(ids).logits
            first = made(ids[:, :3], use_cache=True)
            second = made(ids[:, 3:], past_key_values=first.past_key_values).logits
        assert all(state.device == ids.device for layer in first.past_key_values.states for state in layer)
        torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=1e-4, atol=1e-4)


class TestGenerate:
    settings = dict(max_new_tokens=2 if DRY else 12, do_sample=False, eos_token_id=None)

    def without_cache(self, model, ids, mask):
        for _ in range(self.settings["max_new_tokens"]):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return ids

    def test_greedy(self, made):
        """Padded on the left; the same tokens as by reading the whole text again for each."""
        ids, mask = random_ids(), torch.ones_like(random_ids())
        mask[0, :3] = 0
        with torch.no_grad():
            expected = self.without_cache(made, ids, mask)
        assert torch.equal(made.generate(ids, attention_mask=mask, **self.settings), expected)

    def test_compiled(self, architecture, made):
        """transformers' own mode, which captures CUDA graphs; twice, since the second call finds them."""
        if DRY:
            pytest.skip("the interpreter's kernels do not compile")
        torch._dynamo.reset()
        ids = random_ids()
        expected = made.generate(ids, **self.settings)
        for _ in range(2):
            assert torch.equal(made.generate(ids, compile_config=CompileConfig(), **self.settings), expected)

    def test_in_bfloat16(self, made, bfloat16_dot):
        """States stay in float32; a step comes as near to float64 as a CPU's in bfloat16."""
        ids, double = random_ids(), copy.deepcopy(made).cpu().double()
        with torch.no_grad():
            expected = double(torch.cat([ids, ids[:, :1]], 1).cpu()).logits[:, -1:]
            errors = []
            for device in (DEVICE, "cpu"):
                half = copy.deepcopy(made).to(device, torch.bfloat16)
                state = half(ids.to(device), use_cache=True).past_key_values
                step = half(ids[:, :1].to(device), past_key_values=state).logits
                errors.append(relative_error(step.cpu(), expected))
                assert all(x.dtype == torch.float32 for layer in state.states for x in layer)
        assert errors[0] <= 2 * errors[1]


class TestTrainers:
    def run(self, folder, name, on_cpu, **settings):
        trainer = make_trainer(folder, name, max_steps=2, save_steps=2, use_cpu=on_cpu, **settings)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = copy.deepcopy(trainer.model).cpu().state_dict()
        trainer.train()
        return trainer, before, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    @pytest.mark.parametrize("name", TRAINERS)
    def test_runs_as_on_a_cpu(self, name, tmp_path):
        trainer, before, losses = self.run(tmp_path / "here", name, on_cpu=DRY)
        assert trainer.model.device.type == DEVICE
        after = trainer.model.state_dict()
        assert all(after[key].isfinite().all() for key in before)
        assert any(not torch.equal(after[key].cpu(), before[key]) for key in before)
        _, _, expected = self.run(tmp_path / "there", name, on_cpu=True)
        assert math.isclose(losses[0], expected[0], rel_tol=2e-2), (losses, expected)

    def test_goes_on_from_a_checkpoint(self, tmp_path):
        """With dropout, whose random numbers are the device's."""
        settings = dict(max_steps=3, save_steps=2, gradient_accumulation_steps=1, use_cpu=DRY)
        whole, again = (make_trainer(tmp_path / "run", **settings) for _ in range(2))
        whole.train()
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def test_bfloat16_training_with_zero_order(self, tmp_path, bfloat16_dot):
        """Perturbed weights beside autocast, in a model of two heads."""
        _, _, losses = self.run(tmp_path, "zo", on_cpu=DRY, bf16=True)
        assert all(map(math.isfinite, losses))


def test_perturbed_embedding():
    torch.manual_seed(0)
    ids = torch.randint(0, 19, (6, 5))
    weight, left, right = torch.randn(19, 8), torch.randn(3, 19, 2), torch.randn(3, 8, 2)
    expected = perturbed_embedding(ids, *(x.double() for x in (weight, left, right)))
    actual = perturbed_embedding(*(x.to(DEVICE) for x in (ids, weight, left, right)))
    assert relative_error(actual.cpu(), expected) <= 1e-6


@pytest.mark.skipif(DRY, reason="a CPU has no device to wait for")
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_no_block_waits_for_the_device(made, layout):
    """Neither for values of a mask nor for offsets: they are looked at once, before the blocks."""
    if layout == "packed" and made.config.model_type == "hf_rnn_memory":
        pytest.skip("lays packed sequences out as rows, whose lengths the host must know")
    ids, settings = LAYOUTS[layout]()
    mask = settings.get("attention_mask")
    given = SequenceLayout.of(*ids.shape, mask, settings.get("cu_seq_lens_q"))
    x = made.model.embed_tokens(ids)
    with torch.no_grad():
        made.model.layers[0](x, layout=given)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.model.layers[0](x, layout=given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
