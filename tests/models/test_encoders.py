"""Encoders: hashing is exact and repeatable, a server's vectors are checked, sentence encoders fit where installed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from dreamgym.core.config import BufferConfig
from dreamgym.core.data_structures import Experience
from dreamgym.core.errors import ConfigError, DataError, DreamGymError, MissingExtra
from dreamgym.models.encoders import HashingEncoder, SentenceEncoder, ServedEncoder, make_encoder
from dreamgym.models.replay_buffer import ExperienceReplayBuffer, RetrievalQuery

KEY = "canary-secret-of-an-embedding-server"


class Embeddings(BaseHTTPRequestHandler):
    """Answers with the hashing encoder's vectors, in reverse order; fails as often as it was told."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append((self.path, self.headers.get("Authorization"), body))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        vectors = HashingEncoder(32).encode(body["input"]).tolist()
        data = [{"index": i, "embedding": v} for i, v in enumerate(vectors)][::-1]
        status, text = 200, json.dumps({"data": data})
        if fault.isdigit():
            status, text = int(fault), f"no: {self.headers.get('Authorization')}"
        elif fault:
            text = {
                "html": "<html>",
                "few": json.dumps({"data": data[1:]}),
                "nan": text.replace("[", "[NaN, ", 2).replace("[NaN, ", "[", 1),
            }[fault]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("dreamgym.models.encoders.pause", lambda *args: 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Embeddings)
    http.calls, http.faults = [], []
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_hashing_is_the_same_alone_in_a_batch_and_after_forgetting():
    texts = [f"mug {i} on desk {i % 7} | drawer {i} closed" for i in range(300)]
    whole, small = HashingEncoder(64).encode(texts), HashingEncoder(64, cache_size=10)
    assert np.array_equal(whole, np.concatenate([small.encode([text]) for text in texts]))
    assert small.encode([]).shape == (0, 64) and whole.dtype == np.float32 and small.encode([""]).sum() == 0


def test_served_vectors_are_those_of_the_server(server):
    encoder, texts = ServedEncoder("m", server.url, batch_size=4), [f"mug {i % 6} on desk" for i in range(20)] + [""]
    server.calls.clear()
    assert np.array_equal(encoder.encode(texts), HashingEncoder(32).encode(texts)) and encoder.dim == 32
    assert [len(body["input"]) for *_, body in server.calls] == [4, 3]  # each distinct text once
    assert {(path, key) for path, key, _ in server.calls} == {("/v1/embeddings", f"Bearer {KEY}")}
    assert encoder.encode([]).shape == (0, 32)


def test_a_server_on_this_machine_is_asked_without_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert ServedEncoder("m", server.url, attempts=1).encode(["mug 1"]).shape == (1, 32)


def test_faults_of_a_server_are_repeated_then_errors(server):
    encoder, text = ServedEncoder("m", server.url, attempts=3), ["mug 1"]
    for fault in ("429", "500", "html", "few", "nan"):
        server.faults = [fault] * 2
        assert np.array_equal(encoder.encode(text), HashingEncoder(32).encode(text))
        server.faults = [fault] * 3
        with pytest.raises(DataError, match="call 3") as caught:
            encoder.encode(text)
        assert KEY not in str(caught.value)
    server.faults = ["401"]
    before = len(server.calls)
    with pytest.raises(DreamGymError, match="401") as caught:
        encoder.encode(text)
    assert len(server.calls) == before + 1 and KEY not in str(caught.value)


def test_a_buffer_retrieves_with_a_served_encoder(server):
    rows = [Experience(f"mug {i} on desk", f"take mug {i}", 0.0, "hold", False) for i in range(9)]
    queries = [RetrievalQuery(e.state, e.action) for e in rows]
    config = BufferConfig(encoder="served:m", encoder_url=server.url, top_k=2)
    served, hashing = ExperienceReplayBuffer(config), ExperienceReplayBuffer(BufferConfig(encoder_dim=32, top_k=2))
    for buffer in (served, hashing):
        buffer.add_many(rows)
    assert served.retrieve(queries) == hashing.retrieve(queries)


def test_encoders_by_name():
    assert isinstance(make_encoder(BufferConfig()), HashingEncoder)
    for name in ("bert", "sentence:", "served: m", "Hashing"):
        with pytest.raises(ConfigError, match="buffer.encoder"):
            BufferConfig(encoder=name)
    with pytest.raises(ConfigError, match="base_url"):
        ServedEncoder("m", "ftp://somewhere")


def test_sentence_encoder_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"dreamgym\[sentence\]"):
        SentenceEncoder("any")


def test_sentence_encoder(tmp_path):
    """The real package with a tiny random model, made here."""
    package = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate("[PAD] [UNK] [CLS] [SEP] mug desk take on".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(tmp_path)
    encoder = make_encoder(BufferConfig(encoder=f"sentence:{tmp_path}"))
    vectors = encoder.encode(["take mug", "mug on desk", "take mug"])
    assert vectors.shape == (3, encoder.dim) == (3, 16) and np.array_equal(vectors[0], vectors[2]) and package
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
