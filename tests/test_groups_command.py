"""`graphopt groups`: the table, the JSON, and `prune` in the pipeline of `graphopt optimize`."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

import graphopt
from graphopt.cli import OK, WRONG, main

MODEL = str(Path(__file__).resolve().parent.parent / "models" / "fmnist_mbv2.onnx")


def test_the_table_shows_groups_sizes_and_reasons(capsys):
    assert main(["groups", MODEL]) == OK
    shown = capsys.readouterr().out
    assert "12 channel groups, 11 that can be cut" in shown
    assert "/4/layers/layers.0/" in shown
    assert "stays: it is the" in shown


def test_json_holds_every_group_with_its_members(capsys):
    assert main(["groups", MODEL, "--json"]) == OK
    groups = json.loads(capsys.readouterr().out)
    assert len(groups) == 12
    last = groups[-1]
    assert last["frozen"] == "it is the graph output output"
    assert {"tensor", "axis", "positions"} == set(last["members"][0])


def test_a_wrong_pipeline_is_one_line(capsys):
    assert main(["groups", MODEL, "--passes", "fold,nothing"]) == WRONG
    assert capsys.readouterr().err.startswith("error: no pass is called 'nothing'")


def test_the_library_finds_the_same_groups():
    groups = graphopt.channel_groups(MODEL)
    assert len(groups.groups) == 12
    assert graphopt.channel_groups(MODEL, passes="fold,prune:ratio=0.5").count < groups.count


def test_prune_runs_in_a_pipeline_and_writes_a_smaller_model(tmp_path, capsys):
    out = tmp_path / "pruned.onnx"
    command = ["optimize", MODEL, "--passes", "fold,prune:macs=0.7:exclude=*0/Conv", "-o", str(out), "--json"]
    assert main(command) == OK
    report = json.loads(capsys.readouterr().out)
    pruned = report["passes"][1]
    assert pruned["failure"] is None
    assert pruned["rewrites"] > 0
    assert any(skip["reason"] == "it is excluded by *0/Conv" for skip in pruned["skipped"])
    assert sum(len(each.raw_data) for each in onnx.load(out).graph.initializer) < Path(MODEL).stat().st_size * 0.8


def test_a_budget_that_cannot_be_met_is_one_line(tmp_path, capsys):
    command = ["optimize", MODEL, "--passes", "fold,prune:macs=0.01", "-o", str(tmp_path / "out.onnx")]
    assert main(command) == WRONG
    assert "prune:macs=0.01 cannot be met" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
