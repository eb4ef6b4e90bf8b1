"""Weights & Biases and trackio get what `metrics.jsonl` gets, offline; the thinking format goes through the whole trainer."""

from __future__ import annotations

import json
import sqlite3
import struct

import pytest
from test_trainer import metrics, trainer

from dreamgym.training import trainer as room
from dreamgym.training.checkpoints import load_policy, newest_checkpoint


def fit(folder, **more):
    t = trainer(folder, training__num_iterations=1, **more)
    t.fit(t.prepare(dream=False), "real")
    return metrics(folder / "real")


def numbers(row):
    return {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "iteration"}


def records(data):
    """Parts of a log in LevelDB's format: blocks of 32 kB; checksum, length and kind before each fragment."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # all of it, or its last fragment
            yield whole
            whole = b""


def wandb_rows(folder):
    """What a run kept offline, row by row."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = [Record.FromString(data) for data in records(file.read_bytes())]
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'dreamgym[wandb]'")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(room, "project_path", lambda path: tmp_path / path)
    (tmp_path / "logs").mkdir()
    written = fit(tmp_path / "run", training__use_wandb=True)
    told = wandb_rows(tmp_path / "logs")
    assert [row["_step"] for row in told] == [0, 1]
    for a, b in zip(written, told, strict=True):
        assert numbers(a).items() <= b.items()


def test_trackio_is_local(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    written = fit(tmp_path / "run", training__use_trackio=True)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        told = [
            (step, json.loads(row)) for step, row in database.execute("SELECT step, metrics FROM metrics ORDER BY step")
        ]
    assert [step for step, _ in told] == [0, 1]
    for a, (_, b) in zip(written, told, strict=True):
        assert numbers(a).items() <= b.items()


def test_thoughts_go_through_the_whole_trainer(tmp_path):
    """Demonstrations teach the tags; what the policy then writes is read by them, scored, and trained on."""
    more = {"response_format": "think", "max_new_tokens": 24, "bc_epochs": 12}
    start, row = fit(tmp_path, **{f"policy_model__{key}": value for key, value in more.items()})
    assert row["rollout/unparsed"] < 1 and row["policy/mismatch_max"] < 1e-4 and row["policy/updates"] > 0
    found = newest_checkpoint(tmp_path / "real" / "checkpoints")
    policy = load_policy(found[0])
    assert (
        policy.codec.response_format == "think" and policy.codec.parse(policy.codec.response("look")).action == "look"
    )
