"""Run folders: one writer, metrics that survive a kill, files that are whole, clear errors."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dreamgym.core.errors import CheckpointError, ConfigError, DataError
from dreamgym.utils.statistics import wilson_interval
from dreamgym.utils.tracking import RunDir, read_metrics, write_json, write_text

HOLD = "import sys, time; from dreamgym.utils.tracking import RunDir; run = RunDir(sys.argv[1]); print(1, flush=True); "
OPEN = "import sys, time; from dreamgym.utils.tracking import RunDir; t = time.perf_counter()\n"
OPEN += "try: RunDir(sys.argv[1])\nexcept Exception as e: print(time.perf_counter() - t, type(e).__name__, e)"


def start(code: str, path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


def test_second_process_is_refused_within_a_second_and_a_killed_one_leaves_no_lock(tmp_path):
    owner = start(HOLD + "time.sleep(60)", tmp_path / "run")
    try:
        assert owner.stdout.readline() == "1\n"
        message = start(OPEN, tmp_path / "run").communicate()[0]
        took, kind, text = message.split(maxsplit=2)
        assert float(took) < 1 and kind == "ConfigError" and f"process {owner.pid}; wait for it" in text
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    RunDir(tmp_path / "run").close()


def test_same_process_is_told_to_close(tmp_path):
    with RunDir(tmp_path):
        with pytest.raises(ConfigError, match="in use by this process; close its RunDir") as found:
            RunDir(tmp_path)
    assert "wait" not in str(found.value)
    RunDir(tmp_path).close()


def test_metrics_round_trip_and_resume(tmp_path):
    with RunDir(tmp_path) as run:
        run.log({"iteration": 0, "eval/success": np.float32(0.5), "rollout/per_type": {"look": np.int64(3)}})
        offset = run.offset()
        run.log({"iteration": 1, "policy/loss": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_bytes()
    assert b"NaN" not in text and b"Infinity" not in text and len(text) > offset
    with RunDir(tmp_path) as run:
        run.truncate(offset)
        run.log({"iteration": 1, "policy/loss": 2.0})
    rows = read_metrics(tmp_path)
    assert rows == [
        {"iteration": 0, "eval/success": 0.5, "rollout/per_type": {"look": 3}},
        {"iteration": 1, "policy/loss": 2.0},
    ]
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    with RunDir(tmp_path) as run, pytest.raises(CheckpointError, match="recorded"):
        run.truncate(10**9)


def test_keys_need_a_prefix(tmp_path):
    with RunDir(tmp_path) as run:
        for key in ("loss", "evaluation/success", "eval"):
            with pytest.raises(ValueError, match=key):
                run.log({"iteration": 0, key: 1.0})
    assert read_metrics(tmp_path) == []


def test_torn_last_line_is_left_out_and_garbage_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1}\n{"itera')
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1]
    path.write_text('{"iteration": 0}\ngarbage\n{"iteration": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"success": wilson_interval(1, 2), "folder": tmp_path})
    assert json.loads(path.read_text())["success"]["n"] == 2
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udce4")
    assert json.loads(path.read_text())["folder"] == str(tmp_path) and os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("place", ["/proc/run", "file/run", "read_only/run", 300 * "x"])
def test_places_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "read_only").mkdir(mode=0o555)
    if place.startswith("read_only") and os.access(tmp_path / "read_only", os.W_OK):
        pytest.skip("this user may write to a read-only folder")
    with pytest.raises(ConfigError, match="cannot write .*free there; choose another out_dir"):
        RunDir(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "read_only"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk_names_path_and_free_bytes(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with RunDir(tmp_path) as run, pytest.raises(ConfigError, match=r"metrics\.jsonl: No space left.*bytes free"):
        run.log({"iteration": 0})
    (tmp_path / "episodes.jsonl").symlink_to("/dev/full")
    (tmp_path / "metrics.jsonl").unlink()
    with RunDir(tmp_path) as run, pytest.raises(ConfigError, match=r"episodes\.jsonl"):
        run.append("episodes.jsonl", [{"task": "x"}])


def test_killed_writer_loses_at_most_the_last_row(tmp_path):
    code = HOLD + "\nfor i in range(10**7): run.log({'iteration': i, 'eval/x': 1.0}); print(i, flush=True)"
    writer = start(code, tmp_path)
    assert writer.stdout.readline() == "1\n"
    time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    logged = writer.stdout.read().split("\n")[:-1]
    writer.wait()
    rows = [row["iteration"] for row in read_metrics(tmp_path)]
    assert rows == list(range(len(rows))) and len(rows) >= len(logged) > 0


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunDir(tmp_path / "run", tensorboard=tmp_path / "logs") as run:
        run.log({"iteration": 7, "eval/success": 0.25, "eval/kind": "greedy", "eval/none": float("nan")})
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert events.Tags()["scalars"] == ["eval/success"]
    assert [(e.step, e.value) for e in events.Scalars("eval/success")] == [(7, 0.25)]
