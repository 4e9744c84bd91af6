import pytest
import torch

from llmsys.infer import Sampler, generate
from llmsys.models import Llama, LlamaConfig

TINY = LlamaConfig(
    vocab_size=128, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16, max_sequence_length=8
)


class Ascii:
    def encode(self, text):
        return list(text.encode("ascii"))

    def decode(self, tokens):
        return bytes(tokens).decode("ascii")


def test_greedy_text_is_the_likeliest_token_of_each_window():
    model = Llama(TINY, seed=3)
    text = generate(model, Ascii(), "some", max_tokens=12, sampler=Sampler(temperature=0))
    tokens = Ascii().encode("some")
    for _ in range(12):  # past the eighth token the window slides
        tokens.append(int(model(torch.tensor([tokens[-8:]]))[0, -1].argmax()))
    assert text == Ascii().decode(tokens[4:])


def test_the_seed_decides():
    model = Llama(TINY, seed=3)
    a, b, c = (generate(model, Ascii(), "x", max_tokens=20, seed=seed) for seed in (1, 1, 2))
    assert a == b != c
    assert len(a) == 20


def test_stops_before_the_stop_token():
    model = Llama(TINY, seed=3)
    text = generate(model, Ascii(), "x", max_tokens=20, seed=1)
    stop = text[5]
    assert generate(model, Ascii(), "x", max_tokens=20, seed=1, stop_token=ord(stop)) == text[: text.index(stop)]


def test_bad_input():
    with pytest.raises(ValueError, match="prompt '' of no tokens"):
        generate(Llama(TINY), Ascii(), "")
    with pytest.raises(ValueError, match="max_tokens=0, expected at least 1"):
        generate(Llama(TINY), Ascii(), "x", max_tokens=0)
