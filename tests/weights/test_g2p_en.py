"""Phonemes of English words by g2p_en's network: a GRU reads the letters, another one writes the phonemes.

g2p_en 2.1.0 by Kyubyong Park and Jongseok Kim, Apache-2.0. Its weights lie in torch's order, in a numpy file.
"""

import io
import string

import numpy as np
import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn

import hf_rnn

pytestmark = pytest.mark.weights

LETTERS = ["<pad>", "<unk>", "</s>", *string.ascii_lowercase]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
_SOUNDS = [*CONSONANTS.split(), "UW", *(vowel + stress for vowel in VOWELS.split() for stress in "012")]
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted(_SOUNDS)]
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
STEPS = 20

# As dictionaries have them, in ARPAbet with stress
KNOWN = {
    "cat": "K AE1 T",
    "thought": "TH AO1 T",
    "knight": "N AY1 T",
    "queue": "K Y UW1",
    "garden": "G AA1 R D AH0 N",
    "elephant": "EH1 L AH0 F AH0 N T",
    "translation": "T R AE0 N S L EY1 SH AH0 N",
    "psychology": "S AY0 K AA1 L AH0 JH IY0",
    "strength": "S T R EH1 NG K TH",
    "activationist": "AE2 K T IH0 V EY1 SH AH0 N IH0 S T",
}


@pytest.fixture(scope="module")
def weights(wheel) -> dict[str, np.ndarray]:
    return dict(np.load(io.BytesIO(wheel("g2p_en").read("g2p_en/checkpoint20.npz"))))


class Phonemizer(nn.Module):
    """Encoder and decoder as models of this package; the decoder goes on from the state that the encoder leaves."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        of = {name: torch.from_numpy(array) for name, array in weights.items()}
        self.encoder, self.decoder = self.gru(of, "enc"), self.gru(of, "dec")
        self.fc = nn.Linear(*of["fc_w"].T.shape)
        self.fc.load_state_dict({"weight": of["fc_w"], "bias": of["fc_b"]})

    @staticmethod
    def gru(of: dict[str, Tensor], name: str) -> hf_rnn.GRUModel:
        rnn = nn.GRU(of[f"{name}_w_ih"].shape[1], of[f"{name}_w_hh"].shape[1])
        kinds = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
        rnn.load_state_dict({f"{kind}_l0": of[f"{name}_{short}"] for kind, short in kinds.items()})
        return hf_rnn.GRUModel.from_torch(rnn.eval(), nn.Embedding.from_pretrained(of[f"{name}_emb"]))

    @torch.no_grad()
    def forward(self, words: list[str], side: str = "right") -> tuple[list[list[str]], Tensor]:
        """The likeliest phoneme at each step, and all logits (words, steps, phonemes); words padded on a side."""
        ids = [[LETTERS.index(c) for c in word] + [LETTERS.index("</s>")] for word in words]
        longest = max(map(len, ids))
        padding = [[0] * (longest - len(row)) for row in ids]
        pairs = [(row, pad) if side == "right" else (pad, row) for row, pad in zip(ids, padding, strict=True)]
        batch = torch.tensor([a + b for a, b in pairs])
        state = self.encoder(batch, attention_mask=batch != 0, use_cache=True).past_key_values
        token, chosen, logits = torch.full((len(words), 1), START), [], []
        for _ in range(STEPS):
            logits.append(self.fc(self.decoder(token, past_key_values=state).last_hidden_state))
            token = logits[-1].argmax(-1)
            chosen.append(token)
        return [spelled(row) for row in torch.cat(chosen, 1).tolist()], torch.cat(logits, 1)


def spelled(phonemes: list[int]) -> list[str]:
    return [PHONEMES[p] for p in (phonemes[: phonemes.index(END)] if END in phonemes else phonemes)]


def equations(weights: dict[str, np.ndarray], word: str) -> tuple[list[str], np.ndarray]:
    """The same for one word, in float64."""
    of = {name: array.astype(np.float64) for name, array in weights.items()}

    def step(name: str, x: int, h: np.ndarray) -> np.ndarray:
        """r, z = sigmoid(W x + b + R h + b'); n = tanh(W x + b + r (R h + b')); (1 - z) n + z h."""
        r, z, n = (of[f"{name}_w_ih"] @ of[f"{name}_emb"][x] + of[f"{name}_b_ih"]).reshape(3, -1)
        r_h, z_h, n_h = (of[f"{name}_w_hh"] @ h + of[f"{name}_b_hh"]).reshape(3, -1)
        r, z = 1 / (1 + np.exp(-r - r_h)), 1 / (1 + np.exp(-z - z_h))
        return (1 - z) * np.tanh(n + r * n_h) + z * h

    h = np.zeros(of["enc_w_hh"].shape[1])
    for letter in [*word, "</s>"]:
        h = step("enc", LETTERS.index(letter), h)
    phonemes, logits = [START], []
    for _ in range(STEPS):
        h = step("dec", phonemes[-1], h)
        logits.append(of["fc_w"] @ h + of["fc_b"])
        phonemes.append(int(logits[-1].argmax()))
    return spelled(phonemes[1:]), np.stack(logits)


@pytest.fixture(scope="module")
def model(weights) -> Phonemizer:
    return Phonemizer(weights).eval()


def test_known_pronunciations(model):
    assert model.fc.out_features == len(PHONEMES)
    for word, phonemes in KNOWN.items():
        assert " ".join(model([word])[0][0]) == phonemes


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_what_the_equations_say_of_each_word(model, weights, side):
    random = np.random.default_rng(0)
    words = [*KNOWN, *("".join(random.choice(LETTERS[3:], n)) for n in random.integers(1, 15, 20))]
    found, logits = model(words, side)
    for word, phonemes, ours in zip(words, found, logits, strict=True):
        expected, exact = equations(weights, word)
        assert phonemes == expected, word
        assert relative_error(ours, torch.from_numpy(exact)) <= 1e-5, word


def test_the_weights_go_back_as_they_came(model, weights):
    for name, part in (("enc", model.encoder), ("dec", model.decoder)):
        rnn = part.to_torch()
        for kind, short in (("weight_ih", "w_ih"), ("weight_hh", "w_hh"), ("bias_ih", "b_ih"), ("bias_hh", "b_hh")):
            assert np.array_equal(getattr(rnn, f"{kind}_l0").detach().numpy(), weights[f"{name}_{short}"])
