"""What Prometheus reads of an editor's counters: scraped as text, and parsed by its own parser."""

from __future__ import annotations

import builtins
import importlib
import sys

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

import grace_fast as gf
from grace_fast.errors import LookupWarning
from grace_fast.lookup.prepared import Prepared
from grace_fast.tools import prometheus

WIDTH = 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, inputs_embeds):
        return self.head(self.layer(inputs_embeds))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def edited(model, layer="layer", name=None):
    grace = gf.attach(model, layer, name=name, replacement="replace_last")
    book = grace.codebook
    book.append(torch.eye(WIDTH)[:3], torch.ones(3, book.value_dim), torch.full((3,), 0.1))
    return grace


def ask(model, count):
    """Ask for the first key so often, and for something far off once in the same batch."""
    queries = torch.cat([torch.eye(WIDTH)[:1].expand(count, -1), torch.full((1, WIDTH), 9.0)])
    with torch.no_grad():
        model(queries[:, None].expand(-1, 2, -1))


def scrape(registry):
    """Return every sample by name and labels, as Prometheus would read it."""
    text = generate_latest(registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_says_what_the_counters_say(model):
    grace, registry = edited(model), CollectorRegistry()
    prometheus.register(grace, registry=registry)
    ask(model, 2)
    found, counters = scrape(registry), grace.counters
    labels = (("layer", "layer"), ("name", ""))
    for name, count in {
        "lookups": 1,
        "queries": 3,
        "hits": 2,
        "certified_misses": counters.certified_misses,
        "rechecks": counters.rechecks,
        "versions": 1,
    }.items():
        assert found[(f"grace_fast_{name}_total", *labels)] == count, name
    assert found[("grace_fast_keys", *labels)] == 3
    assert found[("grace_fast_lookup_seconds_count", *labels)] == 1
    assert found[("grace_fast_lookup_seconds_sum", *labels)] == counters.latency.seconds
    ask(model, 1)  # nothing is kept from one scrape to the next
    assert scrape(registry)[("grace_fast_queries_total", *labels)] == 5


def test_buckets_are_cumulative_and_end_with_all(model):
    grace, registry = edited(model), CollectorRegistry()
    prometheus.register(grace, registry=registry)
    for count in range(1, 5):
        ask(model, count)
    buckets = {
        float(dict(labels)["le"]): value
        for (name, *labels), value in scrape(registry).items()
        if name == "grace_fast_lookup_seconds_bucket"
    }
    counts = [buckets[end] for end in sorted(buckets)]
    assert len(counts) == len(grace.counters.latency.counts)
    assert counts == sorted(counts)
    assert counts[-1] == buckets[float("inf")] == 4


def test_failures_are_told_by_their_error(model, monkeypatch):
    grace, registry = edited(model), CollectorRegistry()
    prometheus.register(grace, registry=registry)

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(Prepared, "__call__", fail)
    with pytest.warns(LookupWarning):
        ask(model, 1)
    wanted = ("grace_fast_failures_total", ("error", "MemoryError"), ("layer", "layer"))
    assert scrape(registry)[(*wanted, ("name", ""))] == 1


def test_several_editors_are_told_apart(model):
    registry = CollectorRegistry()
    one, two = edited(model), edited(model, "head", name='ten"ant\\')
    collector = prometheus.register(one, two, registry=registry)
    with gf.using('ten"ant\\'):
        ask(model, 1)
    found = scrape(registry)
    assert found[("grace_fast_queries_total", ("layer", "layer"), ("name", ""))] == 2
    assert found[("grace_fast_queries_total", ("layer", "head"), ("name", 'ten"ant\\'))] == 2
    registry.unregister(collector)
    assert not scrape(registry)


def test_models_are_told_apart_by_labels_of_their_own(model):
    registry, other = CollectorRegistry(), Model().eval()
    prometheus.register(edited(model), labels={"model": "a"}, registry=registry)
    prometheus.register(edited(other), labels={"model": "b"}, registry=registry)
    ask(other, 3)
    found = scrape(registry)
    labels = (("layer", "layer"), ("model", "b"), ("name", ""))
    assert found[("grace_fast_queries_total", *labels)] == 4
    with pytest.raises(ValueError, match="give them names in attach"):
        prometheus.register(edited(Model()), edited(Model()), registry=registry)


def test_what_is_not_told_is_left_out(model, monkeypatch):
    grace, registry = edited(model), CollectorRegistry()
    prometheus.register(grace, registry=registry)
    usual = Prepared.__call__

    def silent(self, queries):
        found = usual(self, queries)
        return gf.Match(found.hits, fields=(found.hit, found.row, found.squared_distance))

    monkeypatch.setattr(Prepared, "__call__", silent)
    ask(model, 1)
    names = {name for name, *_ in scrape(registry)}
    assert "grace_fast_queries_total" in names
    assert not names & {"grace_fast_certified_misses_total", "grace_fast_rechecks_total"}


def test_without_the_package_it_says_what_to_install(monkeypatch):
    usual = builtins.__import__

    def importing(name, *rest):
        if name.startswith("prometheus_client"):
            raise ModuleNotFoundError(name, name="prometheus_client")
        return usual(name, *rest)

    monkeypatch.delitem(sys.modules, "grace_fast.tools.prometheus")
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ModuleNotFoundError, match=r"grace_fast\[prometheus\]"):
        importlib.import_module("grace_fast.tools.prometheus")
