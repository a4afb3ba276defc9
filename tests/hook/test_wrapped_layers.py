"""Layers that other libraries stand in or around: LoRA, packed weights, device maps, shards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from models import FAMILIES, with_lora
from safetensors.torch import load_file, save_file

import grace_fast as gf

FAMILY = FAMILIES["llama"]
PROMPTS = models.prompts(4, shortest=6, longest=6)
SETTINGS = {"epsilon": 0.1, "replacement": "replace_all", "iterations": 0}


def logits(model, rows=PROMPTS):
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), use_cache=False).logits


def attach_then_lora():
    model = models.build("llama")
    grace = gf.attach(model, FAMILY.layer, **SETTINGS)
    return with_lora(model), grace


def lora_then_attach():
    model = with_lora(models.build("llama"))
    return model, gf.attach(model, f"base_model.model.{FAMILY.layer}", **SETTINGS)


def lora_then_attach_to_the_layer_beneath():
    model = with_lora(models.build("llama"))
    return model, gf.attach(model, f"base_model.model.{FAMILY.layer}.base_layer", **SETTINGS)


def lora_then_attach_to_the_model_beneath():
    model = with_lora(models.build("llama"))
    return model, gf.attach(model.get_base_model(), FAMILY.layer, **SETTINGS)


ORDERS = (
    attach_then_lora,
    lora_then_attach,
    lora_then_attach_to_the_layer_beneath,
    lora_then_attach_to_the_model_beneath,
)


@pytest.mark.parametrize("order", ORDERS)
def test_beside_lora_hits_are_replaced_and_misses_are_loras(order):
    lora = logits(with_lora(models.build("llama")))
    model, grace = order()
    assert torch.equal(logits(model), lora)
    models.remember(grace, PROMPTS[:2])
    edited = logits(model)
    assert dict(grace.hits) == {0: 1, 1: 1}
    assert torch.equal(edited[2:], lora[2:])
    assert not torch.isclose(edited[:2], lora[:2]).all(dim=2).any()
    with grace.disable_adapter():
        assert torch.equal(logits(model), lora)
    said = model.generate(
        input_ids=torch.tensor(PROMPTS[:1]), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    whole = model.generate(
        input_ids=torch.tensor(PROMPTS[:1]),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        use_cache=False,
    )
    assert torch.equal(said, whole)
    assert grace.hits[0] == 3
    grace.unload()
    assert torch.equal(logits(model), lora)


@pytest.mark.parametrize("order", ORDERS)
def test_an_edit_beside_lora_is_learnt_with_it(order, tmp_path):
    model, probe = order()
    layer, owner = probe.settings.layer, probe.model
    probe.unload()
    settings = SETTINGS | {"iterations": 60, "learning_rate": 0.3}
    name = layer if order is not attach_then_lora else f"{layer}.base_layer"
    grace = gf.attach(owner, name, **settings)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert grace.edit(models.edit_batch(FAMILY, PROMPTS[:1], [[10]])).correct
    assert int(logits(model)[0, -1].argmax()) == 10
    assert grace.verify().ok
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    grace.save_pretrained(tmp_path)
    answer = logits(model)
    grace.unload()
    gf.from_pretrained(owner, tmp_path)
    assert torch.equal(logits(model), answer)


class Packed(torch.nn.Module):
    """A linear layer of 4-bit weights, two in a byte, as quantisers keep them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax() / 7
        whole = (linear.weight / scale).round().to(torch.int8) + 8
        packed = whole[:, ::2].to(torch.uint8) * 16 + whole[:, 1::2].to(torch.uint8)
        self.weight = torch.nn.Parameter(packed.reshape(-1, 1), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, hidden):
        packed = self.weight.view(self.out_features, -1)
        halves = torch.stack([packed // 16, packed % 16], dim=2).flatten(1).to(hidden.dtype) - 8
        return torch.nn.functional.linear(hidden, halves * self.scale.to(hidden.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_packed_layer_has_the_widths_it_declares_and_the_type_of_its_input(dtype, tmp_path):
    def build():
        model = models.build("llama", dtype)
        mlp = model.get_submodule(FAMILY.layer.rpartition(".")[0])
        mlp.down_proj = Packed(mlp.down_proj)
        return model

    model = build()
    grace = gf.attach(model, FAMILY.layer, **SETTINGS | {"iterations": 60, "learning_rate": 0.3})
    assert grace.edit(models.edit_batch(FAMILY, PROMPTS[:1], [[10]])).correct
    book = grace.codebook
    assert (book.key_dim, book.value_dim, book.dtype) == (64, 32, dtype)
    answer = logits(model)
    assert int(answer[0, -1].argmax()) == 10
    grace.save_pretrained(tmp_path)
    again = build()
    assert gf.from_pretrained(again, tmp_path).codebook.dtype == dtype
    assert torch.equal(logits(again), answer)


def test_offloaded_weights_are_edited_where_they_compute():
    accelerate = pytest.importorskip("accelerate")
    model = models.build("llama")
    before = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_submodule(FAMILY.layer).weight.is_meta
    grace = gf.attach(model, FAMILY.layer, **SETTINGS)
    models_query = grace.query_of(models.prompt_batch(PROMPTS[:1]))
    assert models_query.shape == (1, 64)
    assert torch.equal(logits(model), before)
    grace.edit(models.edit_batch(FAMILY, PROMPTS[:1], [[10]]))
    edited = logits(model)
    assert dict(grace.hits) == {0: 1}
    assert torch.equal(edited[1:], before[1:])
    assert not torch.allclose(edited[0], before[0])


def test_a_model_over_a_device_map_is_edited():
    accelerate = pytest.importorskip("accelerate")
    model = models.build("llama")
    before = logits(model)
    places = {name: "cpu" for name, _ in model.named_children()}
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    grace = gf.attach(model, FAMILY.layer, **SETTINGS)
    models.remember(grace, PROMPTS[:1])
    edited = logits(model)
    assert dict(grace.hits) == {0: 1}
    assert torch.equal(edited[1:], before[1:])
    assert not torch.allclose(edited[0], before[0])


def test_a_part_of_a_layer_is_recognised():
    model = models.build("llama")
    layer = model.get_submodule(FAMILY.layer)
    grace = gf.attach(model, FAMILY.layer, **SETTINGS)
    models.remember(grace, PROMPTS[:1])
    part = torch.nn.Linear(32, 32, bias=False)
    layer.weight = part.weight  # half of the input, as a row-wise shard has; 64 are declared
    with pytest.raises(ValueError, match=r"takes 64 numbers a token and was given 32.*split by"):
        layer(torch.zeros(1, 3, 32))


def test_a_layer_over_two_processes_decides_as_on_one(tmp_path):
    script = Path(__file__).parents[1] / "two_ranks.py"
    model = models.build("llama")
    model.save_pretrained(tmp_path / "model")
    grace = gf.attach(model, FAMILY.layer, **SETTINGS)
    models.remember(grace, PROMPTS[:2])
    book = grace.codebook
    stored = {"keys": book.keys, "values": book.values, "radii": book.radii}
    stored = {name: tensor.clone() for name, tensor in stored.items()}
    save_file(stored | {"prompts": torch.tensor(PROMPTS)}, tmp_path / "codebook.safetensors")
    expected, query = logits(model), grace.query_of(models.prompt_batch(PROMPTS[3:]))
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    for how in ("by_hand", "tp_plan"):
        for rank in range(2):
            found = load_file(tmp_path / f"{how}-{rank}.safetensors")
            torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["query"], query, rtol=1e-4, atol=1e-4)
            assert found["hits"].tolist() == [1, 1]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
