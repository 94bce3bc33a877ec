import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def aligned(tmp_path_factory) -> str:
    """A T-Vaccine run on the organism that refuses. All test processes share it, so no test may write into it."""
    from filelock import FileLock

    from tunevax.cli import main

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out = root / "shared" / "aligned"
    with FileLock(root / "shared.lock"):
        if not out.exists():
            assert main(["align", "t-vaccine", "--model", "organism", "--safety-data", "organism", "--task-data", "organism",
                         "--gamma", "6", "--rho", "0.1", "--max-length", "64", "--max-steps", "150", "--learning-rate", "2e-3",
                         "--per-device-train-batch-size", "16", "--save-strategy", "no", "--checkpoint-blocks", "none",
                         "--output-dir", str(out)]) == 0  # fmt: skip
    return str(out)
