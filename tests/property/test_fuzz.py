"""The coverage-guided fuzzer, over every decoder: `tests/fuzz.py` for a while each."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from decoders import DECODERS

SCRIPT = Path(__file__).parents[1] / "fuzz.py"
SECONDS = 15
LIMITS = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-seed=1"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris has no release for this machine"),
]


def fuzz(name: str, seconds: int, folder: Path) -> tuple[int, str]:
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={folder}/", *LIMITS]
    command = [sys.executable, str(SCRIPT), name, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_nothing_gets_past_a_decoder(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, output = fuzz(name, SECONDS, tmp_path)
    assert code == 0, output[-3000:]
    (executed,) = re.findall(r"stat::number_of_executed_units: (\d+)", output)
    covered = re.findall(r"cov: (\d+)", output)[-1]
    (memory,) = re.findall(r"stat::peak_rss_mb: +(\d+)", output)
    assert int(executed) > 1000
    with capsys.disabled():
        print(f"\n{name}: {executed} inputs, {covered} edges of tacit's code, at most {memory} MB")


def test_the_fuzzer_finds_a_planted_fault(tmp_path: Path) -> None:
    code, output = fuzz("planted", 120, tmp_path)
    assert code != 0
    assert "ValueError: the planted fault" in output
