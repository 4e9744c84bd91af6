"""Byte-level BPE: any text in, token ids out, and back without loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsys import env
from llmsys.data.atomic import replacing

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256


class Tokenizer:
    """A byte-level BPE vocabulary. Make one with `train` or `load`.

    `vocab_size` ids; `end_of_text` is the id that follows every document. A document that spells `<|endoftext|>` gets
    that spelling as ordinary text.
    """

    def __init__(self, engine: tokenizers.Tokenizer):
        self._engine = engine
        engine.encode_special_tokens = True
        vocabulary = engine.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[END_OF_TEXT]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges of `documents`: the same ones give the same vocabulary.

        Errors  ValueError if vocab_size < 257 (the bytes and end-of-text), or if the text has too few pairs to merge
        Source  Sennrich et al. 2016, arXiv:1508.07909; over bytes, Radford et al. 2019 (GPT-2), section 2.2
        """
        library = _library()
        if vocab_size < NUM_BYTES + 1:
            raise ValueError(f"llmsys.data.Tokenizer.train: vocab_size={vocab_size}, expected at least {NUM_BYTES + 1}")
        engine = library.Tokenizer(library.models.BPE())
        engine.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        engine.train_from_iterator(documents, trainer)
        tokenizer = cls(engine)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"llmsys.data.Tokenizer.train: vocab_size={vocab_size}, but the text has pairs for "
                f"{tokenizer.vocab_size} only, expected at most that; give a smaller vocab_size or more text"
            )
        return tokenizer

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file of the `tokenizers` library that holds `<|endoftext|>`: one of `save`, GPT-2's, Qwen's, …"""
        library = _library()
        path = Path(path)
        try:
            engine = library.Tokenizer.from_buffer(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"llmsys.data.Tokenizer.load: cannot read {path} ({error}), expected a file of the tokenizers library"
            ) from error
        if END_OF_TEXT not in engine.get_vocab():
            raise ValueError(f"llmsys.data.Tokenizer.load: {path} has no token {END_OF_TEXT}, expected one")
        engine.no_truncation()
        engine.no_padding()
        return cls(engine)

    def save(self, path: str | Path) -> None:
        """Write the `tokenizers` library's own JSON format."""
        with replacing(Path(path)) as file:
            file.write(self._engine.to_str(pretty=True).encode())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added at either end."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"llmsys.data.Tokenizer.decode: id {id}, expected 0 to {self.vocab_size - 1}")
        return self._engine.decode(ids, skip_special_tokens=False)


def _library():
    if not env.has("tokenizers"):
        raise RuntimeError(
            "llmsys.data.Tokenizer: the tokenizers package is missing, expected it; pip install tokenizers"
        )
    import tokenizers

    return tokenizers
