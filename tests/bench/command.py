"""A command as benches run it, but in this process: a fresh one imports torch for seconds."""

from __future__ import annotations

import contextlib
import io
import json
import time

from crepe_deploy.bench.run.processes import Finished

from crepe_deploy.cli import run


def in_this_process(*arguments: str) -> Finished:
    """`crepe-deploy ARGUMENTS --json`, with the processor time that it took; the other figures stand for some."""
    output, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(output):
        code = run([*arguments, "--json"])
    assert code == 0, arguments
    return Finished(json.loads(output.getvalue()), 1.0, 1_000_000, time.process_time() - began)
