"""What importing the ops loads."""

import subprocess
import sys


def test_importing_the_ops_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import prunelm, prunelm.ops\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'triton', 'sympy'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
