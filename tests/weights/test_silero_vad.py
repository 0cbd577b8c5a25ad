"""Probabilities of speech by silero-vad's network: convolutions over each chunk of sound, an LSTM over the chunks.

silero-vad 6.2.3 by the Silero Team, MIT. Two of its ONNX files are run by onnxruntime beside ours, on sounds made here.
"""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor, nn

import hf_rnn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.weights

RATE, CHUNK, CONTEXT = 16_000, 512, 64


def vowels(samples: int) -> np.ndarray:
    """Four syllables a second: the pulses of a voice of about 120 Hz through three resonances each."""
    time = np.arange(samples) / RATE
    cycles = np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * time)) / RATE
    pulses = lfilter([1], [1, -0.97], np.diff(np.floor(cycles), prepend=0))
    formants = [(700, 1200, 2500), (300, 2300, 3000), (400, 800, 2400), (500, 1800, 2500)]
    syllables = []
    for number, sound in enumerate(np.split(pulses, 4 * samples // RATE)):
        for frequency in formants[number % 4]:
            radius = np.exp(-np.pi * 90 / RATE)
            sound = lfilter([1 - radius], [1, -2 * radius * np.cos(2 * np.pi * frequency / RATE), radius**2], sound)
        syllables.append(sound * np.hanning(len(sound)))
    sounds = np.concatenate(syllables)
    return 0.3 * sounds / np.abs(sounds).max()


def chunks() -> Tensor:
    """(sounds, chunks, CONTEXT + CHUNK): of each sound its chunks, each behind the end of the one before."""
    samples = 2 * RATE
    time = np.arange(samples) / RATE
    sounds = {
        "vowels": vowels(samples),
        "silence": np.zeros(samples),
        "noise": 0.1 * np.random.default_rng(0).standard_normal(samples),
        "chirp": 0.3 * np.sin(2 * np.pi * (100 * time + 900 * time**2)),
        "clicks": 0.5 * (np.arange(samples) % 4000 < 3),
    }
    padded = torch.tensor(np.stack(list(sounds.values())), dtype=torch.float32)
    return nn.functional.pad(padded, (CONTEXT, 0)).unfold(1, CONTEXT + CHUNK, CHUNK)


class Network(nn.Module):
    """The network of one of the files, with an LSTM of this package.

    Its convolutions are the file's, one after another: of waves with 129 frequencies, four with a ReLU, and the last,
    of the LSTM's output, to a number.
    """

    def __init__(self, file, lstm: hf_rnn.LSTMModel):
        super().__init__()
        self.lstm, self.convolutions = lstm, []
        weights = initializers(file)
        for node in file.graph.node:
            if node.op_type == "Conv":
                told = {attribute.name: list(attribute.ints) for attribute in node.attribute}
                options = dict(stride=told["strides"], padding=told["pads"][:1])
                self.convolutions.append(([weights[name] for name in node.input[1:]], options))
        assert len(self.convolutions) == 6

    def features(self, sounds: Tensor) -> Tensor:
        """(N, CONTEXT + CHUNK) to (N, features)."""
        (waves, options), *others, _ = self.convolutions
        x = nn.functional.pad(sounds[:, None], (0, CONTEXT), mode="reflect")
        real, imaginary = nn.functional.conv1d(x, *waves, **options).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for parameters, options in others:
            x = nn.functional.conv1d(x, *parameters, **options).relu()
        return x.squeeze(2)

    @torch.no_grad()
    def forward(self, sounds: Tensor, state: hf_rnn.RecurrentCache | None = None):
        """(B, T, CONTEXT + CHUNK) chunks to their probabilities (B, T) and the state after them."""
        features = self.features(sounds.flatten(0, 1)).unflatten(0, sounds.shape[:2])
        outputs = self.lstm(inputs_embeds=features, past_key_values=state, use_cache=True)
        weight, bias = self.convolutions[-1][0]
        logits = outputs.last_hidden_state.relu() @ weight[0, :, 0] + bias
        return logits.sigmoid(), outputs.past_key_values


def initializers(file) -> dict[str, Tensor]:
    return {x.name: torch.tensor(onnx.numpy_helper.to_array(x)) for x in file.graph.initializer}


@pytest.fixture(scope="module")
def read(wheel):
    """One of its files, as ONNX's message and as a session of onnxruntime."""

    def read(name: str):
        data = wheel("silero_vad").read(f"silero_vad/data/{name}.onnx")
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return onnx.load_model_from_string(data), session

    return read


def as_model(rnn: nn.LSTM) -> hf_rnn.LSTMModel:
    return hf_rnn.LSTMModel.from_torch(rnn.eval())


def test_chunk_by_chunk_all_at_once_and_in_pieces(read):
    """The file that takes a chunk and a state; its LSTM's weights lie in torch's order."""
    file, session = read("silero_vad_16k_op15")
    weights = {k.rsplit(".", 1)[1]: v for k, v in initializers(file).items() if k.startswith("model.decoder.rnn.")}
    rnn = nn.LSTM(weights["weight_ih"].shape[1], weights["weight_hh"].shape[1])
    rnn.load_state_dict({f"{name}_l0": weight for name, weight in weights.items()})
    model, sounds = Network(file, as_model(rnn)), chunks()
    expected, state = [], np.zeros((2, len(sounds), rnn.hidden_size), np.float32)
    for chunk in sounds.unbind(1):
        probability, state = session.run(None, {"input": chunk.numpy(), "state": state, "sr": np.array(RATE)})
        expected.append(torch.from_numpy(probability))
    expected = torch.cat(expected, 1)
    assert expected[0].max() > 0.5 > 0.2 > expected[1:].max()  # it hears a voice, and only there
    found, last = model(sounds)
    assert (found - expected).abs().max() <= 1e-4
    for ours, theirs in zip(last[0], state, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-4, rtol=1e-4)
    pieces, carried = [], None
    for piece in sounds.split([1, 1, 7, 1, sounds.shape[1] - 10], 1):
        found, carried = model(piece, carried)
        pieces.append(found)
    assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4


def test_the_node_of_a_sequence(read):
    """The file that takes all chunks of a sound, in which the LSTM is ONNX's own."""
    file, session = read("silero_vad_16k_sequence")
    (node,) = [node for node in file.graph.node if node.op_type == "LSTM"]
    W, R, B = (initializers(file)[name] for name in node.input[1:4])
    rnn = nn.LSTM(W.shape[2], R.shape[2])
    rnn.load_state_dict(hf_rnn.from_onnx_node(W, R, B))
    model = Network(file, as_model(rnn))
    assert all(torch.equal(a, b) for a, b in zip(hf_rnn.to_onnx_node(model.lstm.to_torch()), (W, R, B), strict=True))
    zeros = np.zeros((1, 1, rnn.hidden_size), np.float32)
    for sound in chunks():
        probabilities, h, c = session.run(None, {"input": sound.numpy(), "h": zeros, "c": zeros})
        found, state = model(sound[None])
        assert (found - torch.from_numpy(probabilities).view(1, -1)).abs().max() <= 1e-4
        for ours, theirs in zip(state[0], (h, c), strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs[0]), atol=1e-4, rtol=1e-4)
