import random

import pytest

from llmsys.data import TokenFile, Tokenizer


def sentences(num_documents, seed=0):
    """Documents of made-up words that repeat, so that there are pairs to merge."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeioubdgklmnrst", k=rng.randint(2, 8))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) + ".\n" for _ in range(num_documents)]


@pytest.fixture(scope="session")
def texts():
    return sentences(100)


@pytest.fixture(scope="session")
def tokenizer(texts):
    return Tokenizer.train(texts, vocab_size=400)


@pytest.fixture(scope="session")
def token_file(texts, tokenizer, tmp_path_factory):
    return TokenFile.write(tmp_path_factory.mktemp("tokens") / "corpus.tokens", texts, tokenizer)
