"""What a card says of an architecture, and whom it cites: BibTeX by key."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """An architecture's name, its equations in a sentence, the keys of its papers."""

    name: str
    equations: str
    papers: tuple[str, ...]


ARCHITECTURES = {
    "hf_rnn_lstm": Architecture(
        "LSTM",
        "`i, f, g, o = W x_t + R h_{t-1} + b`, `c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)`, "
        "`h_t = sigmoid(o) tanh(c_t)`.",
        ("hochreiter1997lstm", "gers2000forget"),
    ),
    "hf_rnn_gru": Architecture(
        "GRU",
        "`r, z = sigmoid(W x_t + R h_{t-1} + b)`, `n = tanh(W x_t + b + r (R h_{t-1} + b'))`, "
        "`h_t = (1 - z) n + z h_{t-1}`.",
        ("cho2014gru",),
    ),
    "hf_rnn_mingru": Architecture(
        "minGRU",
        "`z_t = sigmoid(W_z x_t)`, `h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t)`. The gate depends only on the input, so "
        "that training is a parallel scan over time.",
        ("feng2024rnns",),
    ),
    "hf_rnn_minlstm": Architecture(
        "minLSTM",
        "`f_t = sigmoid(W_f x_t)`, `i_t = sigmoid(W_i x_t)`, `h_t = f'_t h_{t-1} + i'_t g(W_h x_t)`, where f' and i' "
        "are f and i, by default divided by their sum. The gates depend only on the input, so that training is a "
        "parallel scan over time.",
        ("feng2024rnns",),
    ),
    "hf_rnn_xlstm": Architecture(
        "xLSTM",
        "mLSTM, whose memory is a matrix: `C_t = f_t C_{t-1} + i_t k_t v_t^T`, `n_t = f_t n_{t-1} + i_t k_t`, "
        "`h_t = o_t norm(C_t^T q_t / max(|n_t q_t|, 1))`. sLSTM, whose gates depend on its state: "
        "`c_t = f_t c_{t-1} + i_t tanh(z_t)`, `n_t = f_t n_{t-1} + i_t`, `h_t = norm(sigmoid(o_t) c_t / n_t)`. i_t is "
        "exponential in both.",
        ("beck2024xlstm", "beck2025xlstm7b"),
    ),
    "hf_rnn_memory": Architecture(
        "memory RNN",
        "`m_t = norm(update(m_{t-1}, norm(x_t)))`, `y_t = read(m_t)`, where m_t are K vectors of length sqrt(D) and "
        "update is a small network.",
        ("kumar2026smt",),
    ),
}
# Those that forecast alone
FORECASTERS = {
    "hf_rnn_tirex2": Architecture(
        "TiRex-2",
        "Patches of series pass through mLSTMs and sLSTMs, and attention over the variates of a series "
        "(arXiv 2607.01204).",
        ("beck2024xlstm",),
    ),
}

BIBTEX = {
    "hochreiter1997lstm": """@article{hochreiter1997lstm,
  title = {Long Short-Term Memory},
  author = {Hochreiter, Sepp and Schmidhuber, J{\\"u}rgen},
  journal = {Neural Computation},
  volume = {9},
  number = {8},
  pages = {1735--1780},
  year = {1997}
}""",
    "gers2000forget": """@article{gers2000forget,
  title = {Learning to Forget: Continual Prediction with {LSTM}},
  author = {Gers, Felix A. and Schmidhuber, J{\\"u}rgen and Cummins, Fred},
  journal = {Neural Computation},
  volume = {12},
  number = {10},
  pages = {2451--2471},
  year = {2000}
}""",
    "cho2014gru": """@inproceedings{cho2014gru,
  title = {Learning Phrase Representations using {RNN} Encoder-Decoder for Statistical Machine Translation},
  author = {Cho, Kyunghyun and van Merri{\\"e}nboer, Bart and Gulcehre, Caglar and Bahdanau, Dzmitry and
            Bougares, Fethi and Schwenk, Holger and Bengio, Yoshua},
  booktitle = {Empirical Methods in Natural Language Processing},
  year = {2014},
  eprint = {1406.1078},
  archivePrefix = {arXiv}
}""",
    "feng2024rnns": """@article{feng2024rnns,
  title = {Were {RNNs} All We Needed?},
  author = {Feng, Leo and Tung, Frederick and Ahmed, Mohamed Osama and Bengio, Yoshua and Hajimirsadeghi, Hossein},
  journal = {arXiv preprint arXiv:2410.01201},
  year = {2024}
}""",
    "beck2024xlstm": """@inproceedings{beck2024xlstm,
  title = {{xLSTM}: Extended Long Short-Term Memory},
  author = {Beck, Maximilian and P{\\"o}ppel, Korbinian and Spanring, Markus and Auer, Andreas and
            Prudnikova, Oleksandra and Kopp, Michael and Klambauer, G{\\"u}nter and Brandstetter, Johannes and
            Hochreiter, Sepp},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2405.04517},
  archivePrefix = {arXiv}
}""",
    "beck2025xlstm7b": """@article{beck2025xlstm7b,
  title = {{xLSTM} 7B: A Recurrent {LLM} for Fast and Efficient Inference},
  author = {Beck, Maximilian and P{\\"o}ppel, Korbinian and Lippe, Phillip and Kurle, Richard and
            Blies, Patrick M. and Klambauer, G{\\"u}nter and B{\\"o}ck, Sebastian and Hochreiter, Sepp},
  journal = {arXiv preprint arXiv:2503.13427},
  year = {2025}
}""",
    "kumar2026smt": """@article{kumar2026smt,
  title = {Pretraining Recurrent Networks without Recurrence},
  author = {Kumar, Akarsh and Isola, Phillip},
  journal = {arXiv preprint arXiv:2606.06479},
  year = {2026}
}""",
    "werbos1990bptt": """@article{werbos1990bptt,
  title = {Backpropagation Through Time: What It Does and How to Do It},
  author = {Werbos, Paul J.},
  journal = {Proceedings of the IEEE},
  volume = {78},
  number = {10},
  pages = {1550--1560},
  year = {1990}
}""",
    "chaubard2025zero": """@article{chaubard2025zero,
  title = {Scaling Recurrent Neural Networks to a Billion Parameters with Zero-Order Optimization},
  author = {Chaubard, Francois and Kochenderfer, Mykel J.},
  journal = {arXiv preprint arXiv:2505.17852},
  year = {2025}
}""",
    "wu2025backslash": """@inproceedings{wu2025backslash,
  title = {{BackSlash}: Rate Constrained Optimized Training of Large Language Models},
  author = {Wu, Jun and Wen, Jiangtao and Han, Yuxing},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  eprint = {2504.16968},
  archivePrefix = {arXiv}
}""",
}
