"""Corpora in, packed token batches out.

corpus = documents(["notes/", "web.jsonl", "books.parquet"])  # or python_corpus(max_bytes=4 << 20), no download
tokenizer, tokens = prepare(corpus, "runs/cache", vocab_size=4096)  # done once, then found again by content
batches = PackedBatches(tokens, batch_size=8, sequence_length=512, seed=0)
input, target = next(batches)  # int64 (8, 512) each; state_dict() resumes exactly here
"""

from llmsys.data.corpus import Corpus, documents
from llmsys.data.packed import PackedBatches
from llmsys.data.prepare import prepare
from llmsys.data.python_corpus import python_corpus
from llmsys.data.token_file import TokenFile
from llmsys.data.tokenizer import Tokenizer

__all__ = ["Corpus", "PackedBatches", "TokenFile", "Tokenizer", "documents", "prepare", "python_corpus"]
