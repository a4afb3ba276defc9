"""One of two processes that share a tiny Llama: `two_ranks.py FOLDER`.

Looks prompts up in a codebook that a process alone filled, and writes what it saw: with the model
split by hand, and by the plan that transformers has for it.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import grace_fast as gf

LAYER = "model.layers.1.mlp.down_proj"


class Rowwise(torch.nn.Linear):
    """A linear layer of which this process has a slice of the input."""

    def take(self, rank):
        width = self.in_features // 2
        part = self.weight[:, rank * width : (rank + 1) * width].clone()
        self.weight = torch.nn.Parameter(part)

    def forward(self, hidden):
        output = torch.nn.functional.linear(hidden, self.weight)
        dist.all_reduce(output)
        return output


def shared(folder: Path, how: str, rank: int) -> LlamaForCausalLM:
    """Return a model whose MLPs are split over the processes."""
    if how == "tp_plan":
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_plan="auto", tp_size=2)
        return LlamaForCausalLM.from_pretrained(folder, distributed_config=config)
    model = LlamaForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.down_proj.__class__ = Rowwise
        mlp.down_proj.take(rank)
        for name in ("gate_proj", "up_proj"):
            weight = getattr(mlp, name).weight
            half = len(weight) // 2
            getattr(mlp, name).weight = torch.nn.Parameter(weight[rank * half : (rank + 1) * half])
    return model


def look_up(folder: Path, how: str, rank: int) -> None:
    model = shared(folder / "model", how, rank).eval()
    stored = load_file(folder / "codebook.safetensors")
    grace = gf.attach(model, LAYER, epsilon=0.1, replacement="replace_all", iterations=0)
    grace.codebook.append(stored["keys"], stored["values"], stored["radii"])
    with torch.no_grad():
        answer = model(stored["prompts"], use_cache=False).logits
    hits = torch.tensor([grace.hits[0], grace.hits[1]])
    query = grace.query_of({"input_ids": stored["prompts"][3:]})
    seen = {"logits": answer.contiguous(), "hits": hits, "query": query.contiguous()}
    save_file(seen, folder / f"{how}-{rank}.safetensors")


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for how in ("by_hand", "tp_plan"):
        look_up(folder, how, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at the interpreter's end (pytorch/pytorch#179291)
