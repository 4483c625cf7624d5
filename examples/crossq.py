"""CrossQ swings a pendulum up: batch renorm beside batch norm and no norm, three seeds each.

python examples/crossq.py            returns of all episodes, printed and drawn: crossq.png

CrossQ (Bhatt et al. 2024) is soft actor-critic without target networks: the critic reads (s, a) and
(s', a') in one batch, so that its norms see both. The task is Gymnasium's Pendulum-v1, written in
JAX here: a torque of at most 2 must swing up and balance a pole that needs 5 to be held sideways.
The torques of the first two episodes are random.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jbn.linen
from jbn.plot import COLORS

EPISODE, BATCH, WIDTH, DISCOUNT, WARMUP = 200, 128, 128, 0.99, 1000
NORMS = ("batch renorm", "batch norm", "none")


def dynamics(state, torque):
    """The pendulum's next state after 0.05 s, and the reward; the angle is 0 when it stands."""
    angle, speed = state
    folded = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(folded**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
    return jnp.stack([angle + 0.05 * speed, speed]), reward


def observe(state):
    angle, speed = state[..., 0], state[..., 1]
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed], -1)


def reset(key):
    return jax.random.uniform(key, (2,), minval=-1) * jnp.array([jnp.pi, 1])


class Network(nn.Module):
    """Two hidden layers; the norm comes before every dense layer, the first one included."""

    norm: str
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        x = self.normalized(x, train)
        for _ in range(2):
            x = self.normalized(nn.relu(nn.Dense(WIDTH)(x)), train)
        return nn.Dense(self.outputs)(x)

    def normalized(self, x, train):
        if self.norm == "none":
            return x
        options = {"use_running_average": not train, "momentum": 0.99, "epsilon": 1e-3}
        if self.norm == "batch norm":
            return jbn.linen.BatchNorm(**options)(x)
        return jbn.linen.BatchRenorm(warmup_steps=WARMUP, **options)(x)


def networks(norm):
    """The actor (mean and log std of the torque) and two critics that share nothing."""
    axes = {"params": 0, "batch_stats": 0}
    critics = nn.vmap(
        Network, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=2
    )
    return Network(norm, 2), critics(norm, 1)


def act(actor, variables, observation, key, train=False):
    """(torque / 2, its log probability, new statistics) of a Gaussian through tanh."""
    out, new = actor.apply(variables, observation, train, mutable=["batch_stats"])
    mean, log_std = out[..., 0], jnp.clip(out[..., 1], -10, 2)
    sample = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    log_prob = -0.5 * ((sample - mean) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    squeeze = 2 * (np.log(2) - sample - jax.nn.softplus(-2 * sample))  # log(1 - tanh^2)
    return jnp.tanh(sample), log_prob - squeeze, new


class Learner(NamedTuple):
    actor: Any  # {"params": ..., "batch_stats": ...}
    critic: Any
    log_alpha: jax.Array  # () log of the entropy's weight
    optimizers: Any  # the states of the three
    buffer: jax.Array  # [steps, 8] observation, action, reward, next observation
    pendulum: jax.Array  # (2,) angle and speed


OPTIMIZER = optax.adam(1e-3, b1=0.5)


def init(key, norm, steps):
    actor, critic = networks(norm)
    keys = jax.random.split(key, 3)
    variables = (
        actor.init(keys[0], jnp.zeros((2, 3)), False),
        critic.init(keys[1], jnp.zeros((2, 4)), False),
    )
    learned = (variables[0]["params"], variables[1]["params"], jnp.zeros(()))
    states = tuple(map(OPTIMIZER.init, learned))
    return Learner(*variables, jnp.zeros(()), states, jnp.zeros((steps, 8)), reset(keys[2]))


def descend(loss, variables, state):
    """One step of `loss` of {"params", "batch_stats"}, which gives (value, (new stats, extra))."""
    of_params = lambda params: loss({**variables, "params": params})
    gradients, (new, extra) = jax.grad(of_params, has_aux=True)(variables["params"])
    updates, state = OPTIMIZER.update(gradients, state)
    params = optax.apply_updates(variables["params"], updates)
    return {**variables, **new, "params": params}, state, extra


def update(learner, key, filled, norm, train_actor):
    """One step of the critics, and where `train_actor` of the actor and the entropy's weight."""
    actor, critic = networks(norm)
    keys = jax.random.split(key, 3)
    rows = learner.buffer[jax.random.randint(keys[0], (BATCH,), 0, filled)]
    s, a, reward, s_next = rows[:, :3], rows[:, 3:4], rows[:, 4], rows[:, 5:]
    alpha = jnp.exp(learner.log_alpha)
    a_next, log_prob, _ = act(actor, learner.actor, s_next, keys[1])

    def critic_loss(variables):
        both = jnp.concatenate([jnp.c_[s, a], jnp.c_[s_next, a_next]])
        q, new = critic.apply(variables, both, True, mutable=["batch_stats"])
        q, q_next = q[:, :BATCH, 0], q[:, BATCH:, 0].min(0) - alpha * log_prob
        return jnp.square(q - jax.lax.stop_gradient(reward + DISCOUNT * q_next)).mean(), (new, None)

    def actor_loss(variables):
        a, log_prob, new = act(actor, variables, s, keys[2], train=True)
        q = critic.apply(critics, jnp.c_[s, a], False)[..., 0].min(0)
        return (alpha * log_prob - q).mean(), (new, -log_prob.mean())

    of_actor, of_critic, of_alpha = learner.optimizers
    critics, of_critic, _ = descend(critic_loss, learner.critic, of_critic)
    learner = learner._replace(critic=critics, optimizers=(of_actor, of_critic, of_alpha))

    def improve(learner):
        new_actor, new_state, entropy = descend(actor_loss, learner.actor, of_actor)
        step, alpha_state = OPTIMIZER.update(alpha * (entropy + 1), of_alpha)  # the target is -1
        return learner._replace(
            actor=new_actor,
            log_alpha=learner.log_alpha + step,
            optimizers=(new_state, of_critic, alpha_state),
        )

    return jax.lax.cond(train_actor, improve, lambda learner: learner, learner)


@functools.partial(jax.jit, static_argnames=("norm", "learn"), donate_argnums=0)
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None))
def episode(learner, key, start, norm, learn):
    """One episode from step `start`, an update after each step where `learn`; and its return."""
    actor, _ = networks(norm)
    key, first = jax.random.split(key)

    def step(learner, index):
        keys = jax.random.split(jax.random.fold_in(key, index), 2)
        s = observe(learner.pendulum)
        if learn:
            a = act(actor, learner.actor, s[None], keys[0])[0][0]
        else:
            a = jax.random.uniform(keys[0], minval=-1)
        pendulum, reward = dynamics(learner.pendulum, 2 * a)
        row = jnp.concatenate([s, jnp.stack([a, reward]), observe(pendulum)])
        learner = learner._replace(pendulum=pendulum, buffer=learner.buffer.at[index].set(row))
        if learn:
            learner = update(learner, keys[1], index + 1, norm, index % 3 == 0)
        return learner, reward

    learner = learner._replace(pendulum=reset(first))
    learner, rewards = jax.lax.scan(step, learner, start + jnp.arange(EPISODE))
    return learner, rewards.sum()


def train(norm, steps, seeds, progress):
    """The return of each episode, [seeds, episodes]; the first two act at random."""
    keys = jax.random.split(jax.random.key(0), seeds)
    learner = jax.vmap(lambda key: init(key, norm, steps))(keys)
    returns = []
    for start in range(0, steps, EPISODE):
        episode_keys = jax.vmap(lambda key, s=start: jax.random.fold_in(key, s))(keys)
        learner, total = episode(learner, episode_keys, start, norm, start >= 2 * EPISODE)
        returns.append(np.asarray(total))
        progress.set_postfix_str(f"{norm}: return {np.mean(returns[-1]):.0f}")
        progress.update()
    return np.stack(returns, 1)


def draw(returns, path):
    import matplotlib.pyplot as plt

    colors = {"batch renorm": COLORS["jbn"], "batch norm": COLORS["other"]}
    _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for norm, values in returns.items():
        steps = EPISODE * np.arange(1, values.shape[1] + 1)
        color = colors.get(norm, COLORS["without"])
        axes.plot(steps, values.mean(0), label=norm, color=color)
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=color)
    last = {norm: values[:, -5:].mean() for norm, values in returns.items()}
    axes.set(
        xlabel="environment steps",
        ylabel="return of the episode",
        title="CrossQ on a pendulum, return of the last 5 episodes:\n"
        + ", ".join(f"{norm} {value:.0f}" for norm, value in last.items()),
    )
    axes.legend(title=f"mean and range of {len(values)} seeds")
    plt.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6000, help="rounded up to whole episodes")
    parser.add_argument("--seeds", type=int, default=3)
    temporary = pathlib.Path(tempfile.gettempdir())
    parser.add_argument("--out", type=pathlib.Path, default=temporary, help="folder of the picture")
    arguments = parser.parse_args(arguments)
    episodes = -(-arguments.steps // EPISODE)
    start = time.process_time()
    with tqdm(total=len(NORMS) * episodes, unit="episode") as progress:
        returns = {
            norm: train(norm, episodes * EPISODE, arguments.seeds, progress) for norm in NORMS
        }
    for norm, values in returns.items():
        last = values[:, -5:].mean(1)
        each = " ".join(f"{value:.0f}" for value in last)
        print(f"{norm:12} return of the last 5 episodes {last.mean():.0f} (seeds: {each})")
    print(f"processor time {time.process_time() - start:.0f} s")
    arguments.out.mkdir(exist_ok=True)
    draw(returns, arguments.out / "crossq.png")
    print(f"wrote {arguments.out / 'crossq.png'}")


if __name__ == "__main__":
    main()
