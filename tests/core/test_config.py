"""dreamgym.core.config: sections, precedence, and what is said about a mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dreamgym.core import config as config_module
from dreamgym.core.config import (
    SECTIONS,
    BufferConfig,
    Config,
    config_hash,
    config_keys,
    config_template,
    load_config,
    parse_overrides,
    parse_value,
    project_path,
    project_root,
    resolve_preset,
    save_config,
)
from dreamgym.core.errors import ConfigError
from dreamgym.core.served import served_client
from dreamgym.training.policy import is_prompted

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
KEYS_IN_USE = """
    buffer.capacity buffer.quality_threshold buffer.synthetic_ratio buffer.top_k buffer.same_world buffer.action_weight
    curriculum.difficulty_increment curriculum.synthetic_fraction_max curriculum.seed_tasks
    reasoning_model.name reasoning_model.reasoning reasoning_model.history reasoning_model.temperature
    policy_model.name policy_model.context rl.algorithm rl.lr rl.clip rl.gamma rl.gae_lambda rl.kl_coef
    training.num_iterations training.batch_size training.seed training.eval_every training.save_every
    training.keep_every training.use_wandb training.out_dir environment.name environment.data_dir environment.engine
    environment.size environment.max_episode_steps environment.offline_data environment.mapper
""".split()


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- keys and files


def test_keys_that_users_have():
    assert set(KEYS_IN_USE) <= set(config_keys())
    assert list(SECTIONS) == "reasoning_model policy_model buffer curriculum rl training environment".split()


def test_every_key_has_a_description_with_its_source():
    for name, section in SECTIONS.items():
        for key, info in section.model_fields.items():
            sources = ("[paper]", "[verl-agent]", "[ours]")
            assert info.description and any(s in info.description for s in sources), f"{name}.{key}"


def test_default_yaml_is_the_template():
    text = (ROOT / "configs" / "default.yaml").read_text(encoding="utf-8")
    assert text == config_template(), "rewrite configs/default.yaml with config_template()"
    assert load_config() == Config()


def test_the_template_says_which_words_a_key_takes():
    lines = config_template().splitlines()
    choices = {line.split(":")[0].strip(): line.split("  # ")[1] for line in lines if " | " in line}
    assert choices["provider"] == "local | openai | anthropic" and choices["engine"] == "native | textworld"
    for name, section in SECTIONS.items():
        for key, info in section.model_fields.items():
            if key in choices and isinstance(info.default, str):
                for word in choices[key].split(" | "):
                    assert getattr(section(**{key: word}), key) == word, f"{name}.{key}"
    assert {"annotation", "eviction", "pessimism", "context", "mode", "algorithm", "size", "domain"} <= set(choices)


def test_the_readme_names_keys_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.[a-z_]+", text))
    assert len(named) > 30 and named <= set(config_keys())


def test_the_readme_serves_a_model_of_ones_own():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for provider in ("openai", "anthropic"):
        served = text[text.index("**Your own language model") : text.index("Without a server")]
        asked = re.findall(r"reasoning_model\.(?!annotation)\w+=[^\s`]+", served)
        section = load_config(None, "alfworld", "cpu", [*asked, f"reasoning_model.provider={provider}"]).reasoning_model
        client = served_client(section.model_copy(update={"cache": None}))
        assert section.instructed and client.server.model == "NAME" and client.ledger.cost_limit == 5
    told = re.findall(
        r"(?:policy_model|rl)\.\w+=[^\s`]+", text[text.index("--preset gpu --set policy_model.name=FOLDER") :]
    )
    config = load_config(None, "alfworld", "gpu", told)
    assert is_prompted(config) and config.policy_model.response_format == "think" and config.rl.lr == 1e-6


def test_five_files_and_three_presets():
    names = {str(path.relative_to(ROOT / "configs")) for path in FILES}
    assert {f"{name}.yaml" for name in ("default", "alfworld", "webarena", "taubench", "webshop")} <= names
    assert {f"presets/{name}.yaml" for name in ("smoke", "cpu", "gpu")} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_committed_files_load(path):
    config = load_config(path)
    if path.parent.name == "configs" and path.stem != "default":
        assert config.environment.name == path.stem


# ---- precedence


def test_default_file_preset_override(tmp_path):
    path = write(tmp_path, "rl: {lr: 0.1, clip: 0.3, gamma: 0.5}\ntraining: {num_iterations: 77}\n")
    assert load_config(path).rl.lr == 0.1
    config = load_config(path, preset="smoke", overrides="rl.lr=0.2")
    assert (config.rl.lr, config.rl.clip, config.rl.gamma) == (0.2, 0.3, 0.5)
    assert config.training.num_iterations == load_config(preset="smoke").training.num_iterations != 77


def test_env_names_the_file_and_the_environment(tmp_path):
    assert load_config(env="webshop").environment.max_episode_steps == 15
    assert load_config(env="my_package:build").environment.name == "my_package:build"
    path = write(tmp_path, "environment: {size: full}\n")
    config = load_config(path, env="webarena")
    assert (config.environment.name, config.environment.size) == ("webarena", "full")


def test_a_file_names_its_environment(tmp_path):
    path = write(tmp_path, "environment: {name: webshop}\n")
    assert load_config(path, "webshop", "cpu") == load_config(path, preset="cpu") != load_config(path)
    said = message(load_config, path, "alfworld")
    assert "is for the environment 'webshop', env says 'alfworld'" in said


def test_unclosed_quotations_and_patterns_are_told_in_words():
    assert "No closing quotation" in message(load_config, overrides="environment.data_dir=it's")
    assert "buffer.encoder: expected 'hashing'" in message(load_config, overrides="buffer.encoder=bert")


def test_without_files_the_defaults_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "project_root", lambda start=None: tmp_path)
    assert load_config() == Config()
    assert "unknown preset 'cpu'" in message(load_config, preset="cpu")


def test_auto_preset(monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert resolve_preset("auto") == "smoke"
    monkeypatch.delenv("IN_TEST")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_preset("auto") == "gpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_preset("auto") == "cpu"


def test_overrides_in_every_form():
    expected = {"rl": {"lr": 1e-3}, "policy_model": {"name": "a b"}}
    assert parse_overrides("rl.lr=1e-3 policy_model.name='a b'") == expected
    assert parse_overrides(["rl.lr=1e-3", "policy_model.name=a b"]) == expected
    assert parse_overrides({"rl.lr": 1e-3, "policy_model": {"name": "a b"}}) == expected
    assert parse_overrides("") == parse_overrides(None) == {}
    assert load_config(overrides="environment.offline_data=null").environment.offline_data is None


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("buffer: {capcity: 3}", ["mine.yaml", "'buffer.capcity'", "did you mean 'buffer.capacity'"]),
        ("bufer: {capacity: 3}", ["mine.yaml", "'bufer'", "did you mean 'buffer'"]),
        ("lr: 3", ["mine.yaml", "'lr'", "rl.lr"]),
        ("buffer: {lr: 3}", ["mine.yaml", "'buffer.lr'", "rl.lr"]),
        ("rl: {lr: fast}", ["mine.yaml", "rl.lr", "expected a valid number", "'fast' (str)"]),
        ("rl: {epochs: 1.5}", ["mine.yaml", "rl.epochs", "expected a valid integer", "1.5 (float)"]),
        ("buffer: {top_k: true}", ["mine.yaml", "buffer.top_k", "expected a valid integer", "True (bool)"]),
        ("reasoning_model: {reasoning: 1}", ["reasoning_model.reasoning", "expected a valid boolean", "1 (int)"]),
        ("rl: {gamma: 1.5}", ["mine.yaml", "rl.gamma", "less than or equal to 1", "1.5"]),
        ("rl: {gamma: .nan}", ["mine.yaml", "rl.gamma", "finite number"]),
        ("rl: {algorithm: dqn}", ["mine.yaml", "rl.algorithm", "'ppo'", "'dpo'", "'dqn'"]),
        ("rl: 3", ["mine.yaml", "'rl'", "must map keys to values"]),
        ("- rl", ["mine.yaml", "expected sections", "list"]),
        ("rl: {lr: 1", ["mine.yaml", "expected a readable YAML file", "line"]),
        ("rl: {lr: !!python/name:os.system ''}", ["mine.yaml", "readable YAML"]),
        ("rl: {1: 2}", ["mine.yaml", "'rl.1'"]),
    ],
)
def test_one_clear_error(tmp_path, text, parts):
    said = message(load_config, write(tmp_path, text))
    assert all(part in said for part in parts), said
    assert len(said.splitlines()) == 1


def test_mistakes_outside_files():
    assert "no.yaml" in message(load_config, "no.yaml")
    assert "did you mean 'smoke'" in message(load_config, preset="smoek")
    assert "overrides: rl.lr: expected a valid number" in message(load_config, overrides="rl.lr=fast")
    assert "did you mean 'rl.gamma'" in message(load_config, overrides={"rl.gama": 1.0})
    assert "expected section.key=value" in message(load_config, overrides="lr=3")
    assert "expected section.key=value" in message(load_config, overrides="rl.lr 3")
    assert "did you mean 'buffer.capacity'" in message(BufferConfig, capcity=3)
    assert "buffer.capacity" in message(Config, buffer={"capacity": "many"})


def test_all_mistakes_of_a_section_at_once():
    assert len(message(BufferConfig, capacity=0, top_k=-1, encoder="bert").splitlines()) == 3


def test_sections_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        Config().rl.lr = 1.0


@pytest.mark.parametrize(
    ("text", "name"),
    [("rl:\n  lr: 1e-3\nbuffer:\n  top_k: 2\nrl:\n  clip: 0.1\n", "rl"), ("rl:\n  lr: 1e-3\n  lr: 1e-4\n", "lr")],
)
def test_what_is_given_twice_is_refused(tmp_path, text, name):
    said = message(load_config, write(tmp_path, text))
    assert f"key '{name}' is given twice" in said and "line " in said and "mine.yaml" in said
    assert parse_value("{a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}}")["b"] == {"x": 3, "y": 2}, "merged keys may be changed"


def test_scientific_numbers():
    assert parse_value("1e-3") == 1e-3 and parse_value("-2.5E+2") == -250 and parse_value("1e5") == 100_000
    assert isinstance(parse_value("1e5"), int) and isinstance(parse_value("2.0"), float)
    assert parse_value("e5") == "e5" and parse_value("1e") == "1e" and parse_value("'1e5'") == "1e5"
    assert load_config(overrides="buffer.capacity=1e4").buffer.capacity == 10_000


# ---- saving, paths


def test_save_and_load(tmp_path):
    config = load_config(env="alfworld", preset="cpu", overrides="rl.lr=1e-6 environment.offline_data=null")
    path = tmp_path / "a" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config and [p.name for p in path.parent.iterdir()] == ["config.yaml"]
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(SECTIONS)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    said = message(save_config, Config(), tmp_path / "file" / "config.yaml")
    assert "cannot write" in said and "training.out_dir" in said


def test_hash_is_of_the_run_not_of_its_place():
    base = config_hash(load_config())
    assert len(base) == 12 and base == config_hash(load_config(overrides="training.out_dir=elsewhere"))
    assert base != config_hash(load_config(overrides="rl.lr=1e-3"))


def test_project_root_from_anywhere(tmp_path, monkeypatch):
    for folder in (ROOT, ROOT / "nbs" / "core", tmp_path):
        monkeypatch.chdir(folder)
        assert project_root() == ROOT
    assert project_path("runs") == ROOT / "runs" and project_path(tmp_path) == tmp_path


def test_import_is_light():
    code = "import sys, dreamgym.core.config; assert not {'torch', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ)).returncode == 0
