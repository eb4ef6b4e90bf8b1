"""Generator back ends: the batch, the cache, the turn before and the server change no token and no log-probability."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dreamgym.core.errors import ConfigError, MissingExtra
from dreamgym.core.generators import (
    SamplingParams,
    ServerError,
    TransformersGenerator,
    VLLMGenerator,
    VLLMServerGenerator,
    call_server,
    derive_seed,
    empty_cache,
    request_json,
    require_generator,
    sample_token,
    uniforms,
)
from dreamgym.core.language_model import LanguageModel, PromptEncoder, build_model, train_tokenizer
from dreamgym.core.llm import GeneratorClient

OPTIONS = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Qwen2": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 8},
}
CARRIED = ("SmallLM", "Llama", "Qwen2")
REREAD = ("Lfm2", "Mistral")


def shaken(model, size=0.1):
    """As after some training: no weight is zero."""
    with torch.no_grad():
        for weights in model.parameters():
            weights += size * torch.randn_like(weights)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    kinds = ["mug", "cup", "desk", "drawer", "cabinet", "shelf"]
    return train_tokenizer(
        [" ".join(f"{kind} {i}" for kind in kinds for i in range(1, 8)), "open close take put in on"]
    )


@pytest.fixture(scope="module", params=[*CARRIED, *REREAD])
def model(request, tokenizer):
    options = OPTIONS.get(request.param, {})
    built = build_model(tokenizer, request.param, hidden_size=32, layers=2, seed=3, **options)
    return LanguageModel(shaken(built), tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return LanguageModel(shaken(build_model(tokenizer, "Llama", hidden_size=32, layers=2, seed=3)), tokenizer)


def prompts_of(tokenizer, lengths=(3, 40, 17, 1, 90, 41), seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(6, len(tokenizer), (n,), generator=random).tolist() for n in lengths]


# ---- one response


def test_batched_generation_equals_a_naive_loop(model, tokenizer):
    """Left padding, the cache and dropped rows leave tokens and log-probabilities as they are."""
    prompts, budget = prompts_of(tokenizer), 12
    stops = tuple(
        range(6, len(tokenizer), 4)
    )  # a quarter of the vocabulary ends a response: rows end at different times
    replies = TransformersGenerator(model).generate(prompts, SamplingParams(budget, 0.0, stop_ids=stops))
    assert len({len(reply.ids) for reply in replies}) > 1
    for prompt, reply in zip(prompts, replies, strict=True):
        ids, ends = list(prompt), {*stops, tokenizer.eos_token_id}
        for token, logprob in zip(reply.ids, reply.logprobs, strict=True):
            with torch.no_grad():
                logprobs = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert int(logprobs.argmax()) == token and abs(float(logprobs[token]) - logprob) < 1e-5
            ids.append(token)
        assert reply.stop_reason == ("stop" if reply.ids[-1] in ends else "length")
        assert not ends & set(reply.ids[:-1]) and (reply.stop_reason == "stop" or len(reply.ids) == budget)


def test_chunks_change_nothing(model, tokenizer):
    prompts = prompts_of(tokenizer)
    whole, parts = (TransformersGenerator(model, chunk).generate(prompts, SamplingParams(6, 0.0)) for chunk in (128, 2))
    assert [r.ids for r in whole] == [r.ids for r in parts]


def test_seeds_repeat_and_differ(model, tokenizer):
    prompts, generator = prompts_of(tokenizer), TransformersGenerator(model)
    one, same, other = (generator.generate(prompts, SamplingParams(6, 1.0, seed)) for seed in (1, 1, 2))
    assert [r.ids for r in one] == [r.ids for r in same] != [r.ids for r in other]


def test_logprobs_are_those_of_the_sampling_temperature(model, tokenizer):
    prompts = prompts_of(tokenizer)
    for reply, prompt in zip(
        TransformersGenerator(model).generate(prompts, SamplingParams(4, 0.5, 0)), prompts, strict=True
    ):
        with torch.no_grad():
            logits = model.model(torch.tensor([[*prompt, *reply.ids]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.5).log_softmax(-1).gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        assert torch.allclose(expected, torch.tensor(reply.logprobs), atol=1e-5)


def test_a_seed_belongs_to_its_prompt(model, tokenizer):
    """A response depends on its prompt and its seed, not on order, neighbours or chunks."""
    prompts = prompts_of(tokenizer)
    together = TransformersGenerator(model).generate(prompts, SamplingParams(8, 1.0, list(range(6))))
    backwards = TransformersGenerator(model, 2).generate(prompts[::-1], SamplingParams(8, 1.0, list(range(6))[::-1]))
    assert [r.ids for r in together] == [r.ids for r in backwards[::-1]]
    assert len({tuple(r.ids) for r in TransformersGenerator(model).generate(prompts[:1] * 8, SamplingParams(8))}) > 4


def test_seeds_of_neighbouring_iterations_do_not_overlap():
    seeds = [[derive_seed(seed, turn) for turn in range(50)] for seed in range(50)]
    assert len({s for row in seeds for s in row}) == 2500
    assert all(0 <= s < 2**63 for row in seeds for s in row)


def test_without_a_seed_the_global_generator_decides(llama, tokenizer):
    prompts, generator = prompts_of(tokenizer), TransformersGenerator(llama)

    def draw(seed):
        torch.manual_seed(seed)
        return [r.ids for r in generator.generate(prompts, SamplingParams(8))]

    assert draw(0) == draw(0) != draw(1)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).repeat(30_000, 1)
    tokens, logprobs = sample_token(logits, 0.7, uniforms(range(30_000), 3)[:, 2])
    share, expected = tokens.bincount(minlength=4) / len(tokens), (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(share, expected, atol=0.01) and share[2] == 0
    assert torch.allclose(logprobs.exp(), expected[tokens])


def test_random_numbers_never_leave_the_interval():
    """The largest and smallest numbers still choose a token that has probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    edge = torch.tensor([0.5 / 2**52, 1 - 0.5 / 2**52], dtype=torch.float64)
    assert sample_token(logits, 1.0, edge)[0].tolist() == [1, 2]


def test_dropout_is_off_while_sampling(tokenizer):
    built = build_model(tokenizer, "Llama", hidden_size=32, layers=1, attention_dropout=0.9)
    generator, prompts = TransformersGenerator(LanguageModel(shaken(built), tokenizer)), prompts_of(tokenizer)
    calm = [r.logprobs for r in generator.generate(prompts, SamplingParams(3, 0.0))]
    built.train()
    assert [r.logprobs for r in generator.generate(prompts, SamplingParams(3, 0.0))] == calm and built.training


def test_checklist_05_end_tokens_are_the_union(tokenizer):
    """The tokenizer's and the generation config's end tokens both stop, and the reason is stored."""
    built = shaken(build_model(tokenizer, hidden_size=32, layers=1))
    built.generation_config.eos_token_id = [9, 10]
    generator = TransformersGenerator(LanguageModel(built, tokenizer))
    assert generator.end_ids == sorted({9, 10, tokenizer.eos_token_id})
    replies = generator.generate(prompts_of(tokenizer) * 40, SamplingParams(8, 1.5, 0))
    assert {r.ids[-1] for r in replies if r.stop_reason == "stop"} == {9, 10, tokenizer.eos_token_id}
    assert all(set(generator.end_ids).isdisjoint(r.ids) for r in replies if r.stop_reason == "length")
    assert all(set(generator.end_ids).isdisjoint(r.ids[:-1]) for r in replies)


def test_checklist_16_left_padding_and_positions_from_the_mask(model, tokenizer):
    """A prompt beside a much longer one has the log-probabilities that it has alone."""
    short, long = prompts_of(tokenizer, (5, 200))
    pair = TransformersGenerator(model).generate([short, long], SamplingParams(6, 0.0))
    (alone,) = TransformersGenerator(model).generate([short], SamplingParams(6, 0.0))
    assert pair[0].ids == alone.ids and pair[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_checklist_19_a_weight_sync_flushes_what_was_read(llama, tokenizer):
    """After a sync the next turn is that of the new weights, read from its start."""
    generator = TransformersGenerator(llama)
    (prompt,) = prompts_of(tokenizer, (20,))
    (first,) = generator.generate([prompt], SamplingParams(4, 0.0), sessions=["a"])
    longer = [*prompt, *first.ids, 7, 8]
    other = LanguageModel(shaken(build_model(tokenizer, "Llama", hidden_size=32, layers=2, seed=8)), tokenizer)
    generator.sync(other.model, 7)
    (reply,) = generator.generate([longer], SamplingParams(4, 0.0), sessions=["a"])
    assert generator.conversations.reused == 0 and (first.version, reply.version) == (0, 7)
    assert reply.logprobs == TransformersGenerator(other).generate([longer], SamplingParams(4, 0.0))[0].logprobs


def test_no_prompts_no_replies(model):
    assert TransformersGenerator(model).generate([], SamplingParams()) == []
    assert TransformersGenerator(model).generate([], SamplingParams(), sessions=[]) == []


def test_a_text_level_client_is_refused(llama):
    with pytest.raises(ConfigError, match="token ids and log-probabilities.*GeneratorClient"):
        require_generator(GeneratorClient(llama))
    assert require_generator(generator := TransformersGenerator(llama)) is generator


# ---- conversations


def talk(generator, tokenizer, turns=5, sessions=True, temperature=1.0, seed=0):
    """Ragged conversations: they begin late, end early, and say more or less each turn. Yields prompts and replies."""
    random = torch.Generator().manual_seed(seed)
    running, stops = {}, tuple(range(6, len(tokenizer), 5))
    for turn in range(turns):
        for name in [name for name in running if (name + turn) % 6 == 5]:
            del running[name]
        for name in range(4 * turn, 4 * turn + (4 if turn < 3 else 0)):
            running[name] = prompts_of(tokenizer, (1 + 13 * (name % 4),), seed=name)[0]
        names, prompts = list(running), list(running.values())
        sampling = SamplingParams(6, temperature, [derive_seed(name, turn) for name in names], stops)
        replies = generator.generate(prompts, sampling, names) if sessions else generator.generate(prompts, sampling)
        yield prompts, replies
        for name, reply in zip(names, replies, strict=True):
            more = torch.randint(6, len(tokenizer), (1 + name % 7,), generator=random).tolist()
            running[name] = [*running[name], *reply.ids, *more]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_carried_cache_equals_reading_again(model, tokenizer, temperature):
    """Tokens are equal and log-probabilities within 1e-6 (float64), whatever began, ended or stopped early meanwhile."""
    exact = LanguageModel(model.model.double(), tokenizer)
    carried, afresh = TransformersGenerator(exact), TransformersGenerator(exact)
    try:
        pairs = zip(
            talk(carried, tokenizer, temperature=temperature),
            talk(afresh, tokenizer, sessions=False, temperature=temperature),
            strict=True,
        )
        for (prompts, replies), (same, expected) in pairs:
            assert prompts == same and [r.ids for r in replies] == [r.ids for r in expected]
            assert [r.stop_reason for r in replies] == [r.stop_reason for r in expected]
            for reply, other in zip(replies, expected, strict=True):
                assert reply.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    finally:
        model.model.float()
    kept = empty_cache(model.model) is not None
    assert kept == (model.model.config.model_type in ("dreamgym_small", "llama", "qwen2"))
    assert (carried.conversations.reused > 500) == kept and afresh.conversations.reused == 0


@pytest.mark.parametrize("family", CARRIED)
def test_carried_cache_in_single_precision(tokenizer, family):
    """With weights of the size that stock families start with, log-probabilities differ by 1e-6 at most."""
    built = shaken(build_model(tokenizer, family, layers=3, seed=1, initializer_range=0.02), 0.02)
    fresh = LanguageModel(built, tokenizer)
    pairs = zip(
        talk(TransformersGenerator(fresh), tokenizer),
        talk(TransformersGenerator(fresh), tokenizer, sessions=False),
        strict=True,
    )
    worst = 0.0
    for (_, replies), (_, expected) in pairs:
        assert [r.ids for r in replies] == [r.ids for r in expected]
        for reply, other in zip(replies, expected, strict=True):
            worst = max(worst, *(abs(a - b) for a, b in zip(reply.logprobs, other.logprobs, strict=True)))
    assert worst <= 1e-6


def test_ended_sessions_are_dropped(llama, tokenizer):
    generator = TransformersGenerator(llama)
    for prompts, _ in talk(generator, tokenizer):
        assert len(generator.conversations.read_so_far) == len(prompts) == generator.conversations.state.mask.shape[0]
    generator.generate([], SamplingParams(), sessions=[])
    assert generator.conversations.state is None


def test_what_was_read_is_what_was_said(llama, tokenizer):
    """The cache holds each prompt and response but for the last token, and no hole between them."""
    generator = TransformersGenerator(llama)
    for prompts, replies in talk(generator, tokenizer):
        state, known = generator.conversations.state, generator.conversations.read_so_far
        expected = sorted([*prompt, *reply.ids[:-1]] for prompt, reply in zip(prompts, replies, strict=True))
        assert sorted(ids for _, ids in known.values()) == expected
        for row, ids in known.values():
            assert state.lengths[row] == len(ids) == state.mask[row].sum() and state.mask[row, -len(ids) :].all()


def test_a_changed_history_is_read_again(llama, tokenizer):
    generator, (prompt,) = TransformersGenerator(llama), prompts_of(tokenizer, (20,))
    generator.generate([prompt], SamplingParams(4, 0.0), sessions=["a"])
    changed = [*prompt[:10], 9, *prompt[11:], 7, 8, 9, 7, 8]
    (reply,) = generator.generate([changed], SamplingParams(4, 0.0), sessions=["a"])
    assert generator.conversations.reused == 0
    assert reply == TransformersGenerator(llama).generate([changed], SamplingParams(4, 0.0))[0]


def test_two_prompts_cannot_share_a_session(llama, tokenizer):
    with pytest.raises(ValueError, match="a session of its own"):
        TransformersGenerator(llama).generate(prompts_of(tokenizer, (3, 4)), SamplingParams(2), sessions=["a", "a"])


# ---- vLLM's protocol


class Served(ThreadingHTTPServer):
    """Speaks the part of vLLM's HTTP protocol that we use, and samples from a model of ours."""

    def __init__(self, language_model, broken=(), mode="processed_logprobs"):
        super().__init__(("127.0.0.1", 0), Answer)
        self.generator, self.lock, self.calls = TransformersGenerator(language_model), threading.Lock(), []
        self.broken, self.mode, self.hidden = list(broken), mode, ()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, body):
        stops = tuple(body["stop_token_ids"])
        sampling = SamplingParams(body["max_tokens"], body["temperature"], [body["seed"]], stops)
        with self.lock:
            (reply,) = self.generator.generate([body["prompt"]], sampling)
        assert body["return_token_ids"] is True and body["logprobs"] == 0
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
        choice = {"index": 0, "text": "", "finish_reason": reply.stop_reason, "token_ids": reply.ids}
        choice |= {"logprobs": {"tokens": [], "token_logprobs": reply.logprobs, "top_logprobs": []}}
        return {"model": "tiny", "choices": [{k: v for k, v in choice.items() if k not in self.hidden}]}

    def reload(self, path):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.generator.sync(model, 0)


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args): ...

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/v1/models":
            return self.reply(200, {"data": [{"id": "tiny"}]})
        if self.server.mode and self.path == "/server_info?config_format=json":
            return self.reply(200, {"vllm_config": {"model_config": {"logprobs_mode": self.server.mode}}})
        return self.reply(404, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.calls.append(self.path)
        if self.server.broken:
            return self.reply(self.server.broken.pop(), {"error": "busy"})
        if self.path == "/v1/completions":
            if len(body["prompt"]) > 300:
                return self.reply(400, {"error": "longer than max_model_len"})
            return self.reply(200, self.server.complete(body))
        if self.path == "/collective_rpc" and body["method"] == "reload_weights":
            self.server.reload(body["kwargs"]["weights_path"])
            return self.reply(200, {"results": [None]})
        return self.reply(200 if self.path == "/reset_prefix_cache" else 404, {})


@pytest.fixture
def serve(llama, tokenizer, tmp_path):
    """Starts a server and connects a generator to it."""
    servers = []

    def start(**options):
        servers.append(Served(llama, **options))
        ends = [tokenizer.eos_token_id]
        return servers[-1], VLLMServerGenerator(servers[-1].url, ends, tmp_path / "weights", 8, retries=2, pause=0.0)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_server_gives_what_the_process_gives(serve, llama, tokenizer, temperature):
    """Ids are equal and log-probabilities within 1e-5, over real HTTP, many requests at once."""
    (_, remote), local = serve(), TransformersGenerator(llama)
    prompts = prompts_of(tokenizer) * 4
    sampling = SamplingParams(8, temperature, list(range(24)), stop_ids=(7, 8, 9))
    for reply, expected in zip(remote.generate(prompts, sampling), local.generate(prompts, sampling), strict=True):
        assert reply.ids == expected.ids and reply.stop_reason == expected.stop_reason
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_server_takes_new_weights(serve, tokenizer, tmp_path):
    server, remote = serve()
    other = LanguageModel(shaken(build_model(tokenizer, "Llama", hidden_size=32, layers=2, seed=8)), tokenizer)
    prompts, sampling = prompts_of(tokenizer), SamplingParams(6, 0.0)
    before = remote.generate(prompts, sampling)
    remote.sync(other.model, 3)
    assert server.calls[-2:] == ["/collective_rpc", "/reset_prefix_cache"]
    after, expected = remote.generate(prompts, sampling), TransformersGenerator(other).generate(prompts, sampling)
    assert [r.ids for r in after] == [r.ids for r in expected] != [r.ids for r in before]
    assert {r.version for r in before} == {0} and {r.version for r in after} == {3}
    assert list((tmp_path / "weights").iterdir()) == []  # nothing is left behind


def test_a_busy_server_is_asked_again(serve, tokenizer):
    server, remote = serve(broken=[503, 429])
    (reply,) = remote.generate(prompts_of(tokenizer, (5,)), SamplingParams(4, 0.0))
    assert reply.ids and server.calls == ["/v1/completions"] * 3


def test_a_broken_server_is_named(serve, tokenizer):
    server, remote = serve(broken=[500] * 9)
    with pytest.raises(ServerError, match="HTTP status 500 after 3 tries.*busy"):
        remote.generate(prompts_of(tokenizer, (5,)), SamplingParams(4))
    with pytest.raises(ServerError, match="after 3 tries.*is the server up"):
        VLLMServerGenerator._call(SimpleNamespace(url="http://127.0.0.1:9", retries=2, pause=0.0), "/v1", {})


def test_a_refused_request_is_not_repeated(serve, tokenizer):
    server, remote = serve()
    with pytest.raises(ServerError, match="refused with HTTP status 400.*max_model_len"):
        remote.generate(prompts_of(tokenizer, (400,)), SamplingParams(4))
    assert len(server.calls) == 1


@pytest.mark.parametrize("hidden", ["token_ids", "logprobs"])
def test_ids_and_logprobs_are_mandatory(serve, tokenizer, hidden):
    server, remote = serve()
    server.hidden = (hidden,)
    with pytest.raises(ConfigError, match="no 'token_ids' with a 'token_logprobs'.*0.10.2"):
        remote.generate(prompts_of(tokenizer, (5,)), SamplingParams(4))


def test_a_server_that_cannot_serve_a_policy_is_refused(serve):
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        serve(mode="raw_logprobs")
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        serve(mode=None)


# ---- vLLM in this process


class FakeLLM:
    """The part of `vllm.LLM` that we use, over a model of ours."""

    def __init__(self, model, logprobs_mode, **options):
        assert logprobs_mode == "processed_logprobs"
        self.generator, self.options, self.resets = TransformersGenerator(FakeLLM.language_model), options, 0

    def generate(self, prompts, params, use_tqdm):
        for prompt, p in zip(prompts, params, strict=True):
            sampling = SamplingParams(p.max_tokens, p.temperature, [p.seed], tuple(p.stop_token_ids))
            (reply,) = self.generator.generate([prompt["prompt_token_ids"]], sampling)
            scores = [{i: SimpleNamespace(logprob=s)} for i, s in zip(reply.ids, reply.logprobs, strict=True)]
            output = SimpleNamespace(token_ids=tuple(reply.ids), logprobs=scores, finish_reason=reply.stop_reason)
            yield SimpleNamespace(outputs=[output])

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.generator.sync(AutoModelForCausalLM.from_pretrained(kwargs["weights_path"]).eval(), 0)

    def reset_prefix_cache(self):
        self.resets += 1


def test_vllm_in_process(monkeypatch, llama, tokenizer, tmp_path):
    FakeLLM.language_model = llama
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SimpleNamespace))
    generator = VLLMGenerator("tiny", [tokenizer.eos_token_id], tmp_path, gpu_memory_utilization=0.4)
    assert generator.llm.options == {"gpu_memory_utilization": 0.4}
    prompts, sampling = prompts_of(tokenizer), SamplingParams(8, 0.7, 5, stop_ids=(7, 8))
    expected = TransformersGenerator(llama).generate(prompts, sampling)
    for reply, other in zip(generator.generate(prompts, sampling), expected, strict=True):
        assert (reply.ids, reply.stop_reason, reply.version) == (other.ids, other.stop_reason, 0)
        assert reply.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    other = shaken(build_model(tokenizer, "Llama", hidden_size=32, layers=2, seed=8))
    generator.sync(other, 4)
    expected = TransformersGenerator(LanguageModel(other, tokenizer)).generate(prompts, sampling)
    assert [r.ids for r in generator.generate(prompts, sampling)] == [r.ids for r in expected]
    assert generator.llm.resets == 1 and generator.generate(prompts[:1], sampling)[0].version == 4


def test_vllm_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match="pip install vllm"):
        VLLMGenerator("tiny", [1], ".")


# ---- follow-up prompts


def test_follow_ups_never_encode_history_again(tokenizer):
    """A template that strips thoughts from earlier answers would change ids; glued suffixes only append."""
    stripping = train_tokenizer(["open mug 1 think take cup 2"])
    stripping.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'].split('think')[-1] if m['role'] == 'assistant' else m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = PromptEncoder(stripping)
    (prompt,), (suffix,) = encoder(["open"]), encoder.follow_ups(["cup 2"])
    answer = stripping.encode("take mug 1 think open", add_special_tokens=False)
    assert stripping.decode([*prompt, *answer, *suffix]) == (
        "<|user|>open<|end|><|assistant|>take mug 1 think open<|end|><|user|>cup 2<|end|><|assistant|>"
    )


def test_a_torn_answer_is_no_answer_and_no_proxy_stands_before_this_machine(monkeypatch):
    class Torn(BaseHTTPRequestHandler):
        def log_message(self, *args): ...

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "99")
            self.end_headers()
            self.wfile.write(b'{"half')

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Torn)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        status, said = request_json(f"http://127.0.0.1:{server.server_port}/v1/models")
        with pytest.raises(ServerError, match="no usable answer after 2 tries: IncompleteRead"):
            call_server(f"http://127.0.0.1:{server.server_port}/v1/models", retries=1, pause=0.01)
    finally:
        server.shutdown()
        server.server_close()
    assert status == 0 and "IncompleteRead" in said
