import subprocess
import sys

import pytest

from llmsys.data import documents, prepare


@pytest.fixture
def corpus(texts, tmp_path):
    (tmp_path / "a.txt").write_text("".join(texts))
    return documents(tmp_path / "a.txt")


def test_second_time_is_read_from_the_cache(corpus, texts, tmp_path):
    cache = tmp_path / "cache"
    tokenizer, tokens = prepare(corpus, cache, vocab_size=300)
    assert tokenizer.decode(tokens.tokens[:-1].tolist()) == "".join(texts)
    assert int(tokens.tokens[-1]) == tokenizer.end_of_text
    made = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(made) == 2
    again_tokenizer, again_tokens = prepare(corpus, cache, vocab_size=300)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == made
    assert again_tokens.sha256 == tokens.sha256
    assert again_tokenizer.encode(texts[0]) == tokenizer.encode(texts[0])


def test_changed_text_or_vocabulary_is_prepared_anew(corpus, tmp_path):
    cache = tmp_path / "cache"
    hashes = {prepare(corpus, cache, vocab_size=300)[1].sha256, prepare(corpus, cache, vocab_size=310)[1].sha256}
    (tmp_path / "a.txt").write_text((tmp_path / "a.txt").read_text() + "more")
    hashes.add(prepare(corpus, cache, vocab_size=300)[1].sha256)
    assert len(hashes) == 3 and len(list(cache.iterdir())) == 6


def test_a_damaged_cache_is_refused(corpus, tmp_path):
    cache = tmp_path / "cache"
    _, tokens = prepare(corpus, cache, vocab_size=300)
    tokens.path.write_bytes(tokens.path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="bytes where its header promises"):
        prepare(corpus, cache, vocab_size=300)


def test_processes_may_prepare_at_once_and_agree(corpus, tmp_path):
    program = (
        "import sys; from llmsys.data import documents, prepare;"
        "print(prepare(documents(sys.argv[1]), sys.argv[2], vocab_size=300)[1].sha256)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert printed == {prepare(corpus, tmp_path / "here", vocab_size=300)[1].sha256}, "training depends on the process"
