"""What the client for served models costs beside the server: python tests/benchmarks/bench_llm.py

A server in a process of its own answers at once; one line for each number of calls at a time, then the cache.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from servers import LLMServer  # noqa: E402

from dreamgym.core.ledger import ReplyCache  # noqa: E402
from dreamgym.core.llm import Request  # noqa: E402
from dreamgym.core.served import ServedClient, Server  # noqa: E402


def measure(client: ServedClient, requests: list[Request], what: str) -> None:
    """One batch: replies per second, and CPU of this process for each."""
    began, cpu = time.perf_counter(), time.process_time()
    replies = client.complete(requests)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert all(reply.text == request.prompt.upper() for request, reply in zip(requests, replies, strict=True))
    n = len(requests)
    print(f"{what:28} n={n}: {n / wall:7.0f} replies/s, {1000 * cpu / n:.2f} ms CPU each, {client.ledger.calls} calls")


def main(n: int = 300) -> None:
    """Measures without and with the cache."""
    command = [sys.executable, __file__, "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, TemporaryDirectory() as folder:
        assert process.stdout is not None
        server = Server("m", process.stdout.readline().strip())
        requests = [Request(f"open drawer {i}") for i in range(n)]
        for concurrency in (1, 16, 64):
            client = ServedClient(server, concurrency=concurrency)
            client.complete(requests[:64])
            measure(client, requests, f"{concurrency} at a time")
        for what in ("cache, first run", "cache, rerun"):
            measure(ServedClient(server, cache=ReplyCache(Path(folder) / "r.sqlite")), requests, what)
        process.kill()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        server = LLMServer()
        print(server.base_url, flush=True)
        server.serve_forever()
    main()
