"""Small policies and episodes made by hand, for the tests of estimators, losses and updates; two ranks to run them on."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from dreamgym.core.data_structures import Task, Trajectory, Turn
from dreamgym.core.language_model import LanguageModel, build_model, train_tokenizer
from dreamgym.training.policy import Policy
from dreamgym.training.ppo import TokenRow, score_rows
from dreamgym.training.scale import leave

DOORS = ["door 1", "door 2", "door 3"]
LONG = " ".join(["nothing here"] * 9)
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def run_two_ranks(script, out, **environment):
    """Runs a test file as a program in two processes; `out` is where it leaves what it found."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split(), script, str(out)]
    root, here = Path(__file__).resolve().parents[2], Path(__file__).parent
    environment = os.environ | environment | {"PYTHONPATH": f"{root}:{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def end_rank(accelerator):
    """Ends one of two ranks without Python's own finish: what is tested is done, and see `leave` for what may abort there."""
    leave(accelerator)
    sys.stderr.flush()
    os._exit(0)


def new_policy(seed=1, hidden=32, family="SmallLM", **options):
    """As after some training: a critic that says something, layers that do something."""
    tokenizer = train_tokenizer([*DOORS, "nothing here"], "merged" if family == "SmallLM" else "split")
    model = build_model(tokenizer, family, hidden_size=hidden, layers=1, seed=seed, **options)
    policy = Policy(LanguageModel(model, tokenizer))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in policy.parameters():
            weights += 0.05 * torch.randn_like(weights)
    return policy


def score(policy, prompt, response, temperature=1.0):
    """Log-probabilities and values of one response."""
    row = TokenRow([*prompt, *response], [(len(prompt), len(prompt) + len(response))])
    return score_rows(policy, [row], temperature)


def turn_of(policy, prompt, response, reward=0.0, penalty=0.0, logprobs=None, state="", shift=0.0):
    """A turn as the policy would have sampled it; `shift` makes its behaviour log-probabilities stale."""
    if logprobs is None:
        logprobs = (score(policy, prompt, response)[0] + shift).tolist()
    return Turn(prompt, response, logprobs, reward, state, "", "", penalty=penalty)


def turn(policy, state, action, reward=0.0, penalty=0.0, **how):
    (prompt,), response = policy.codec.prompts([state]), policy.codec.response(action)
    return turn_of(policy, prompt, response, reward, penalty, state=state, **how)


def episode(policy, turns, terminated=True, truncated=False, final="door 1", group=0, task="t"):
    (final_prompt,) = policy.codec.prompts([final])
    prompt = final_prompt if truncated else ()
    return Trajectory(turns, Task(task, "i"), group, "real", 0, terminated, truncated, None, None, final, prompt)


def conversation(policy, states, actions, reward=1.0, **how):
    """Turns of which each prompt is everything before it and one state more."""
    turns, history = [], []
    for i, (state, action) in enumerate(zip(states, actions, strict=True)):
        history = [*history, *policy.codec.prompts([state])[0]]
        response = policy.codec.response(action)
        turns.append(turn_of(policy, history, response, reward * (i == len(states) - 1), state=state, **how))
        history = [*history, *response]
    return turns


def mixed(policy, shift=0.0):
    """Episodes of 1 to 3 turns with prompts and responses of different lengths; one of them was cut off."""
    return [
        episode(policy, [turn(policy, "door 1", "door 2", 1.0, shift=shift)]),
        episode(policy, [turn(policy, LONG, "door 3 door 3"), turn(policy, "door 2", "door 1", 0.3, 0.1)]),
        episode(policy, [turn(policy, s, "door 1", shift=-shift) for s in (*DOORS[:2], LONG)], False, True, LONG),
    ]


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def gradient(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def as_trl_sees_it(batch):
    """Left-padded prompts, right-padded completions, one advantage per row."""
    rows, counts = batch.rows, batch.counts.tolist()
    prompts = [row.ids[: row.spans[0][0]] for row in rows]
    responses = [row.ids[row.spans[0][0] :] for row in rows]
    before, after = max(map(len, prompts)), max(counts)

    def right(column):
        return torch.stack([torch.nn.functional.pad(x, (0, after - len(x))) for x in column.split(counts)])

    return {
        "prompt_ids": torch.tensor([[0] * (before - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (before - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([r + [0] * (after - len(r)) for r in responses]),
        "completion_mask": torch.tensor([[1] * len(r) + [0] * (after - len(r)) for r in responses]),
        "advantages": torch.stack([a[0] for a in batch.advantages.split(counts)]),
        "old_per_token_logps": right(batch.old_logprobs),
        "ref_per_token_logps": right(batch.ref_logprobs),
        "num_items_in_batch": torch.tensor(float(sum(counts))),
    }
