"""The registry: names that lead nowhere, functions that build nothing, settings that are not heeded."""

import sys

import pytest

from dreamgym.core.config import EnvironmentConfig
from dreamgym.core.errors import ConfigError
from dreamgym.environments.base_env import Environment, TranscriptMapper, make_environment
from dreamgym.environments.household_state import HouseholdMapper

OWN = """
from dreamgym.environments.base_env import CountingEnv, Environment, TranscriptMapper
from dreamgym.environments.household_state import HouseholdMapper

N = 3

def deaf(config):
    return Environment("toy", HouseholdMapper(), 6, lambda split: [], CountingEnv)

def build(config):
    mapper = HouseholdMapper() if config.mapper else TranscriptMapper()
    return Environment("toy", mapper, config.max_episode_steps or 6, lambda split: [], CountingEnv)

def bare(config):
    return Environment("toy", None, 6, lambda split: [], CountingEnv)

def several(config):
    return [build(config)]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Modules `own_toy`, and `own_broken`, which misses another one."""
    (tmp_path / "own_toy.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import own_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("own_toy", "own_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nosuch:build", "environment 'nosuch:build': no module 'nosuch'; run from its folder or set PYTHONPATH"),
        ("nosuch.deep:build", "no module 'nosuch'"),
        ("own_toy.deep:build", "no module 'own_toy.deep'"),
        ("own_toy:nosuch", "module 'own_toy' has no function 'nosuch'"),
        ("own_toy:N", "module 'own_toy' has int instead of a function 'N'"),
        ("own_toy:several", "'own_toy:several': expected a function that returns an Environment, got [Environment("),
        ("a:b:c", "unknown environment 'a:b:c'"),
        ("own_toy:", "Own environments are written module:function."),
        (":build", "Own environments are written module:function."),
        (".own_toy:build", "Own environments are written module:function."),
        ("own_toy.build", "Own environments are written module:function."),
        ("alfwold", "did you mean 'alfworld'"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(name, said, own):
    with pytest.raises(ConfigError) as caught:
        make_environment(name, EnvironmentConfig())
    assert said in str(caught.value)
    assert ("Own environments" in str(caught.value)) == (
        name in (*"a:b:c own_toy: :build".split(), ".own_toy:build", "own_toy.build")
    )


def test_what_a_module_of_ones_own_lacks_is_no_setting(own):
    with pytest.raises(ModuleNotFoundError, match="own_missing"):
        make_environment("own_broken:build", EnvironmentConfig())


def test_a_setting_that_a_builder_does_not_heed_is_refused(own):
    for asked, said in (({"max_episode_steps": 5}, "built with 6 turns"), ({"mapper": False}, "HouseholdMapper")):
        with pytest.raises(ConfigError, match=f"environment.{next(iter(asked))} .*own_toy:deaf.*{said}"):
            make_environment("own_toy:deaf", EnvironmentConfig(name="own_toy:deaf", **asked))
    assert make_environment("own_toy:deaf", EnvironmentConfig(max_episode_steps=6)).max_turns == 6
    assert make_environment("own_toy:bare", EnvironmentConfig(mapper=False)).mapper is None  # raw enough
    made = make_environment("own_toy:build", EnvironmentConfig(max_episode_steps=5, mapper=False))
    assert isinstance(made, Environment) and made.max_turns == 5 and isinstance(made.mapper, TranscriptMapper)
    plain = make_environment("own_toy:build")  # without a config: its defaults
    assert plain.max_turns == 6 and isinstance(plain.mapper, HouseholdMapper)


@pytest.mark.parametrize("name", ["alfworld", "webshop", "taubench"])
def test_built_in_environments_heed_both(name):
    made = make_environment(name, EnvironmentConfig(name=name, data_dir="generated", max_episode_steps=4, mapper=False))
    assert made.max_turns == 4 and made.mapper.raw
    assert not hasattr(make_environment(name, EnvironmentConfig(name=name, data_dir="generated")).mapper, "raw")
