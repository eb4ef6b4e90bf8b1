"""Shared fixtures. Tests run offline, on one thread of the CPU, and find their data through `test_data`."""

import os
import sys
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"})
os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"})
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("DREAMGYM_TEST_GPU", "")  # equal to the digit holds on a CPU

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # tests import from each other


def data_folder() -> Path:
    """Recorded official data: $DREAMGYM_TEST_DATA, else a sibling folder of the repository."""
    return Path(os.environ.get("DREAMGYM_TEST_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of recorded official data; tests that need it are skipped without it."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set DREAMGYM_TEST_DATA")
    return folder


@pytest.fixture
def tmp_run(tmp_path, monkeypatch) -> Path:
    """A fresh current folder with runs/, outside the repository."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Tiny tensors on shared cores are fastest on one thread; torch is not imported for this."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


if __name__ == "__main__":
    print(data_folder())
