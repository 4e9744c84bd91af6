import json

import pytest
import tokenizers

from llmsys import env
from llmsys.data import Tokenizer, documents


def test_any_text_comes_back(tokenizer, texts):
    for text in [*texts[:10], "", " ", "\r\n\t\0", "grün 🦙 漢字", " <|endoftext|> as text", "é́" * 1000]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        assert tokenizer.end_of_text not in ids


def test_merges_shorten_text(tokenizer, texts):
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode(texts[0])) < 0.7 * len(texts[0].encode())


def test_batch_is_each_text(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(["<|endoftext|>"]) == [tokenizer.encode("<|endoftext|>")]


def test_end_of_text_and_broken_bytes_decode(tokenizer):
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("🦙")[:-1]) == "\ufffd"


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    for id in (-1, 400):
        with pytest.raises(ValueError, match=rf"id {id}, expected 0 to 399"):
            tokenizer.decode([1, id])


def test_save_and_load(tokenizer, texts, tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert tokenizers.Tokenizer.from_file(str(path)).encode(texts[0]).ids == tokenizer.encode(texts[0])


def test_loaded_truncation_and_padding_are_lifted(tokenizer, texts, tmp_path):
    tokenizer.save(tmp_path / "a.json")
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "a.json"))
    engine.enable_truncation(4)
    engine.enable_padding(length=100)
    engine.save(str(tmp_path / "b.json"))
    assert Tokenizer.load(tmp_path / "b.json").encode_batch(texts[:3]) == tokenizer.encode_batch(texts[:3])


def test_bad_files_are_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_bytes()
    unknown_merge = json.loads(whole)
    unknown_merge["model"]["merges"].append(["not there", "either"])
    for data in (b"", b"{}", b"[1, 2]", b"\x80\x04pickle", whole[:-10], json.dumps(unknown_merge).encode()):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"cannot read .*tokenizer\.json \(.*\), expected a file of the tokenizers"
        ):
            Tokenizer.load(path)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token <\|endoftext\|>, expected one"):
        Tokenizer.load(path)
    with pytest.raises(ValueError, match=r"cannot read .*absent\.json"):
        Tokenizer.load(tmp_path / "absent.json")


def test_vocab_size_is_kept_or_refused(texts):
    assert Tokenizer.train(texts, vocab_size=257).vocab_size == 257
    with pytest.raises(ValueError, match="vocab_size=256, expected at least 257"):
        Tokenizer.train(texts, vocab_size=256)
    with pytest.raises(ValueError, match="vocab_size=300, but the text has pairs for 259 only"):
        Tokenizer.train(["abc"], vocab_size=300)


def test_a_reading_error_stops_training(texts, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + '{"text": "cut o')
    with pytest.raises(ValueError, match="line 101 is not JSON"):
        Tokenizer.train(documents(path), vocab_size=300)


def test_missing_library_is_named(monkeypatch, texts):
    monkeypatch.setattr(env, "has", lambda package: package != "tokenizers")
    with pytest.raises(RuntimeError, match="tokenizers package is missing.*pip install tokenizers"):
        Tokenizer.train(texts, vocab_size=300)
