import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsys.models import Llama, LlamaConfig, load_weights, save_weights

TINY = LlamaConfig(vocab_size=31, dim=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=12, hidden_dim=40)


@pytest.fixture
def path(tmp_path):
    save_weights(Llama(TINY, seed=1), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_round_trip_and_dtype_of_the_model(path):
    same, lower = Llama(TINY, seed=2), Llama(TINY, seed=2, dtype=torch.bfloat16)
    load_weights(same, path)
    load_weights(lower, path)
    for name, weight in Llama(TINY, seed=1).named_parameters():
        assert torch.equal(same.get_parameter(name), weight)
        assert torch.equal(lower.get_parameter(name), weight.bfloat16())


def refused(path, match, config=TINY):
    """Loading says `match`, and changes nothing."""
    model = Llama(config, seed=2)
    with pytest.raises(ValueError, match=match):
        load_weights(model, path)
    for name, weight in Llama(config, seed=2).named_parameters():
        assert torch.equal(model.get_parameter(name), weight)


def test_names_are_checked(path):
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("norm.weight")
    save_file(tensors, path)
    refused(path, r"weights without norm.weight and with extra, expected exactly the 12 names")


def test_shapes_and_kinds_are_checked(path):
    refused(path, r"wk.weight of shape \(12, 24\), expected \(24, 24\)", dataclasses.replace(TINY, num_kv_heads=2))
    tensors = load_file(path)
    tensors["norm.weight"] = torch.ones(24, dtype=torch.int64)
    save_file(tensors, path)
    refused(path, r"norm.weight of dtype I64, expected one of F64, F32, BF16, F16")


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_cut_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, r"expected a whole safetensors file")


def test_a_header_that_points_outside_is_refused(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    end = str(len(content) - 8 - size).encode()
    assert end in header
    path.write_bytes(content[:8] + header.replace(end, b"9" * len(end)) + content[8 + size :])
    refused(path, r"expected a whole safetensors file")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such: no such file"):
        load_weights(Llama(TINY), tmp_path / "no-such")
