"""A corpus made ready for training once, and found again by its content."""

import hashlib
from pathlib import Path

from llmsys.data.corpus import Corpus
from llmsys.data.token_file import TokenFile
from llmsys.data.tokenizer import Tokenizer


def prepare(corpus: Corpus, cache: str | Path, vocab_size: int) -> tuple[Tokenizer, TokenFile]:
    """The tokenizer trained on `corpus` and the file of its tokens, from the directory `cache` where they are there.

    Names in the cache are hashes of the corpus, of `vocab_size` and of the tokenizer, so changed text never meets old
    tokens. Several processes may call this at once: each file appears whole. Reads the corpus once, or three times when
    nothing is cached yet. Errors: those of Corpus, Tokenizer and TokenFile.
    """
    cache = Path(cache)
    corpus_hash = corpus.digest()[:16]
    tokenizer_path = cache / f"{corpus_hash}-{vocab_size}.tokenizer.json"
    if not tokenizer_path.exists():
        Tokenizer.train(corpus, vocab_size).save(tokenizer_path)
    tokenizer = Tokenizer.load(tokenizer_path)
    tokenizer_hash = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()[:16]
    tokens_path = cache / f"{corpus_hash}-{tokenizer_hash}.tokens"
    if not tokens_path.exists():
        TokenFile.write(tokens_path, corpus, tokenizer)
    return tokenizer, TokenFile(tokens_path)
