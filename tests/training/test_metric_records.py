# SPDX-License-Identifier: MIT
"""Lines of metric files, and the hash that says which network a value is of."""

from __future__ import annotations

import copy
import json

import torch
from torch import nn

from training.metric_records import MetricRecord, metric_file, network_hash


def make_network() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7)
    return network


def test_equal_networks_have_equal_hashes_and_others_have_not() -> None:
    network = make_network()
    found = network_hash(network)
    assert len(found) == 64 and found == network_hash(copy.deepcopy(network))
    assert found == network_hash(copy.deepcopy(network).to(memory_format=torch.contiguous_format))
    for change in (
        lambda other: other[0].weight.data.view(-1)[5].add_(1e-7),
        lambda other: other[1].running_mean.add_(1e-30),  # a buffer
        lambda other: other[1].num_batches_tracked.add_(1),  # no float, of no dimension
        lambda other: other.double(),
        lambda other: setattr(other[0].weight, "data", other[0].weight.data.reshape(3, 2)),
    ):
        other = copy.deepcopy(network)
        change(other)
        assert network_hash(other) != found


def test_a_transposed_layout_is_the_same_network() -> None:
    network, other = make_network(), make_network()
    other[0].weight.data = other[0].weight.data.t().contiguous().t()
    assert not other[0].weight.is_contiguous() and network_hash(other) == network_hash(network)


def test_a_line_has_the_official_keys_and_what_the_value_depends_on() -> None:
    record = MetricRecord(
        "pr50k3_full",
        {"pr50k3_full_precision": 0.7, "pr50k3_full_recall": 0.5},
        cur_nimg=8000,
        network="network-snapshot.safetensors",
        network_sha256="f00",
        seconds=75.0,
        settings={"seed": 1, "classes": "uniform"},
    )
    text = record.to_json()
    line = json.loads(text)
    official = ["results", "metric", "total_time", "total_time_str", "num_gpus", "snapshot_pkl", "timestamp"]
    assert list(line)[:7] == official and "\n" not in text
    assert line["results"]["pr50k3_full_recall"] == 0.5 and line["num_gpus"] == 1
    assert line["total_time_str"] == "1m15s" and line["cur_nimg"] == 8000
    assert line["network_sha256"] == "f00" and line["settings"]["classes"] == "uniform"
    assert "details" not in line
    detailed = MetricRecord("m", {}, None, None, None, 0.0, details={"class_0": 3.0})
    assert json.loads(detailed.to_json())["details"] == {"class_0": 3.0}
    assert metric_file("is50k") == "metric-is50k.jsonl"
