"""Servers for tests, over real HTTP: one that misbehaves as told, and `transformers serve` with a small trained model."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HTML = "<html><body>502 Bad Gateway</body></html>"
# What goes wrong, and what the client calls it.
FAULTS = {
    "429": "rate limit",
    "500": "server error",
    "503": "server error",
    "drop": "dropped",
    "hang": "timeout",
    "html": "no JSON",
    "half": "no JSON",
    "empty choices": "no choices",
    "wrong shape": "wrong shape",
    "one megabyte": "too long",
}
# Good answers whose text is not what was asked for.
TEXTS = {"bad json": '{"reward": 0, "state', "wrong schema": '{"reward": 7}', "nan reward": '{"reward": NaN}'}
TEXT_FAULTS = {"bad json": "bad JSON", "wrong schema": "wrong schema", "nan reward": "bad JSON"}


class Handler(BaseHTTPRequestHandler):
    """Chat completions and messages."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: "LLMServer"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.arrived(self, body)
        try:
            self.respond(body, fault)
        finally:
            self.server.left()

    def respond(self, body: dict[str, Any], fault: str) -> None:
        time.sleep(self.server.delay)
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "hang":
            self.server.released.wait(30)
            self.close_connection = True
        elif fault.isdigit():
            said = self.server.says or f"status {fault}"
            self.send(int(fault), said.format(**self.headers), {"Retry-After": self.server.retry_after})
        elif fault == "one megabyte":
            self.send(200, self.completion(body, "mug " * 250_000))
        else:
            wrong = {"html": HTML, "empty choices": '{"choices": []}', "wrong shape": '{"object": "list", "data": []}'}
            answer = self.completion(body, self.server.texts.get(fault) or self.server.answer(body))
            self.send(200, answer[: len(answer) // 2] if fault == "half" else wrong.get(fault, answer))

    def completion(self, body: dict[str, Any], text: str) -> str:
        prompt, written = sum(len(m["content"].split()) for m in body["messages"]), len(text.split())
        if self.path.endswith("/messages"):
            usage = {"input_tokens": prompt, "output_tokens": written}
            return json.dumps({"content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "usage": usage})
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": prompt, "completion_tokens": written}
        return json.dumps(
            {"choices": [{"index": 0, "message": message, "finish_reason": self.server.finish}], "usage": usage}
        )

    def send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:  # the client has seen enough
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class LLMServer(ThreadingHTTPServer):
    """Answers by a function of the body; goes wrong at a rate, by a seeded draw, in turn through the given kinds."""

    daemon_threads, request_queue_size = True, 256

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = lambda body: body["messages"][-1]["content"].upper(),
        faults: tuple[str, ...] = (),
        rate: float = 1.0,
        only: str = "",  # faults meet only prompts that hold this
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.kinds, self.rate, self.only, self.random = answer, faults, rate, only, random.Random(0)
        self.texts, self.says, self.retry_after, self.delay, self.finish = dict(TEXTS), "", "0", 0.0, "stop"
        self.faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock, self.released = threading.Lock(), threading.Event()  # the end of hangs
        self.flying = self.most_flying = 0
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def arrived(self, handler: Handler, body: dict[str, Any]) -> str:
        """Notes a call; the fault that it meets, or ''."""
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.flying += 1
            self.most_flying = max(self.most_flying, self.flying)
            spared = self.only not in body["messages"][-1]["content"] or self.random.random() >= self.rate
            if not self.kinds or spared:
                return ""
            fault = self.kinds[self.faults.total() % len(self.kinds)]
            self.faults[fault] += 1
            return fault

    def left(self) -> None:
        with self.lock:
            self.flying -= 1


@contextmanager
def running(server: LLMServer) -> Iterator[LLMServer]:
    """Serves until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        for connection in server.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                pass


# ---- transformers serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def byte_tokenizer() -> Any:
    """Every byte a token, so that it can write JSON; the chat template is that of our own tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from dreamgym.core.language_model import CHAT_TEMPLATE, END, PAD, ROLES, UNKNOWN

    words = [PAD, END, UNKNOWN, *ROLES, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
    fast.add_special_tokens({"additional_special_tokens": list(ROLES)})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_small_model(folder: Path, rows: list[tuple[str, str]], steps: int = 150) -> float:  # loss of the last step
    """A small Llama that has learnt (prompt, reply) rows by heart, saved in a folder."""
    from dreamgym.core.language_model import PromptEncoder

    tokenizer = byte_tokenizer()
    prompts = PromptEncoder(tokenizer)([prompt for prompt, _ in rows])
    return learn_by_heart(folder, tokenizer, prompts, [reply for _, reply in rows], steps)


def learn_by_heart(
    folder: Path,
    tokenizer: Any,
    prompts: list[list[int]],
    replies: list[str],
    steps: int,
    longest: int = 512,  # positions
) -> float:  # loss of the last step
    """Train a small Llama on a few prompts and replies, and save it in a folder."""
    import torch

    from dreamgym.core.language_model import LanguageModel, build_model

    model = build_model(tokenizer, "Llama", hidden_size=64, layers=2, max_position_embeddings=longest)
    texts = [p + tokenizer(reply)["input_ids"] + [tokenizer.eos_token_id] for p, reply in zip(prompts, replies)]
    ids = torch.full((len(texts), max(map(len, texts))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        ids[i, : len(text)] = torch.tensor(text)
        labels[i, len(prompt) : len(text)] = torch.tensor(text[len(prompt) :])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    LanguageModel(model.eval(), tokenizer).save(folder)
    return loss.item()


def serving_problem() -> str:
    """Why `transformers serve` cannot run here, or ''."""
    from transformers.utils.import_utils import is_serve_available

    return "" if is_serve_available() else "transformers serve needs pip install 'transformers[serving]'"


@contextmanager
def transformers_serve(
    folder: Path, patience: float = 240.0
) -> Iterator[str]:  # base_url; the model's name is the folder
    """A `transformers serve` process with one model, offline, until the block ends."""
    from urllib.request import urlopen

    port, log = free_port(), folder / "serve.log"
    (folder / "hub").mkdir(exist_ok=True)
    flags = f"--device cpu --host 127.0.0.1 --port {port} --default-seed 0".split()
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, "serve", str(folder), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                alive = process.poll() is None and time.monotonic() < deadline
                assert alive, f"transformers serve did not start: {log.read_text()[-2000:]}"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
