"""Proximal policy optimisation with a clipped surrogate (Schulman et al. 2017, arXiv:1707.06347).

`step` is a whole iteration: a rollout, the advantages of its transitions, and some epochs of updates on minibatches of
them. What the paper leaves open is as in CleanRL's ppo.py (Huang et al. 2022, "CleanRL", JMLR 23(274)).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dl_jax.control.environments import Environment, Episode, Transition, begin, rollout
from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Batch, Metrics, State, Step, Tree, init_state
from dl_jax.models.vision.mlp import MLP


class Agent(NamedTuple):
    """A policy and a value function: functions of parameters and observations [B, D]."""

    logits: Callable[[Tree, Array], Array]  # -> [B, A]
    value: Callable[[Tree, Array], Array]  # -> [B]


class Rule(NamedTuple):
    """The settings of an iteration."""

    rollout: int = 128  # steps of each episode
    epochs: int = 4
    minibatches: int = 4  # of an epoch
    discount: float = 0.99  # γ
    decay: float = 0.95  # λ of generalised advantage estimation
    clip: float = 0.2  # ε, for the ratio of probabilities and for how far values move
    entropy: float = 0.01  # weight of the policy's entropy
    value: float = 0.5  # weight of the values' loss
    bootstrap: bool = True  # whether a truncated episode's last state has its value, and not 0


def networks(environment: Environment, hidden: int) -> tuple[Agent, Callable[[Array], Tree]]:
    """An agent of two networks with two layers of tanh units each, and a function from a key to their parameters.

    Kernels are orthogonal at the start, scaled by √2, and by 0.01 and 1 in the last layer of policy and value.
    """
    state = jax.eval_shape(environment.reset, jax.random.key(0))
    seen = jax.eval_shape(environment.observe, state).shape
    orthogonal = jax.nn.initializers.orthogonal(2**0.5)
    policy, value = (
        MLP((hidden, hidden), outputs, activation=jnp.tanh, kernel_init=orthogonal)
        for outputs in (environment.actions, 1)
    )

    def initial(net: MLP, key: Array, scale: float) -> Tree:
        params: Any = net.init(key, jnp.zeros((1, *seen)), train=False)["params"]
        last = params["Dense_2"]
        return {**params, "Dense_2": {**last, "kernel": last["kernel"] * (scale / 2**0.5)}}

    def init(key: Array) -> Tree:
        key_policy, key_value = jax.random.split(key)
        return {"policy": initial(policy, key_policy, 0.01), "value": initial(value, key_value, 1.0)}

    of = lambda net, name: lambda params, x: jnp.asarray(net.apply({"params": params[name]}, x, train=False))
    logits, scalar = of(policy, "policy"), of(value, "value")
    return Agent(logits, lambda params, x: scalar(params, x)[:, 0]), init


def start(environment: Environment, tx: optax.GradientTransformation, episodes: int, params: Tree, key: Array) -> State:
    """The state of one seed at step 0, with so many episodes at a time."""
    key, key_reset = jax.random.split(key)
    running = jax.vmap(functools.partial(begin, environment))(jax.random.split(key_reset, episodes))
    return init_state(key, {"params": params, "episodes": running._asdict()}, tx)


def step(environment: Environment, agent: Agent, tx: optax.GradientTransformation, rule: Rule) -> Step:
    """An iteration as a step, for a state as `start` gives it. It reads nothing of the batch, which may be {}.

    Metrics are those of `improved`, the sum of the returns of episodes that ended with their number, and this number.
    """

    def of(state: State, batch: Batch) -> tuple[State, Metrics]:
        key_rollout, key_improve = jax.random.split(jax.random.fold_in(state.key, state.step))
        policy = lambda observation, key: jax.random.categorical(key, agent.logits(state.params, observation))
        running = Episode(**state.extra["episodes"])
        running, seen = rollout(environment, policy, running, key_rollout, rule.rollout)
        params, opt_state, metrics = improved(agent, tx, rule, state.params, state.opt_state, seen, key_improve)
        ended = seen.ended.sum().astype(jnp.float32)
        metrics |= {"return": (jnp.where(seen.ended, seen.total, 0).sum(), ended), "episodes": ended}
        extra = {**state.extra, "episodes": running._asdict()}
        return State(state.step + 1, params, extra, opt_state, state.key), metrics

    return of


def improved(
    agent: Agent,
    tx: optax.GradientTransformation,
    rule: Rule,
    params: Tree,
    opt_state: Tree,
    seen: Transition,
    key: Array,
) -> tuple[Tree, Tree, dict[str, Array]]:
    """Parameters and the optimiser's state after the epochs on a rollout, leaves [T, E, ...], and the mean losses.

    Raises InputError where the minibatches do not divide the T E transitions, or have a single one, whose advantage
    has no deviation.
    """
    shape = seen.reward.shape
    n = shape[0] * shape[1]
    if n % rule.minibatches or n == rule.minibatches:
        raise InputError(
            f"minibatches is {rule.minibatches} and a rollout of {shape[0]} steps of {shape[1]} episodes has {n} "
            "transitions, expected a divisor that leaves each two or more; change one of them"
        )
    flat = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), seen)
    value, following = agent.value(params, jnp.concatenate([flat.observation, flat.following])).reshape(2, *shape)
    advantage = advantages(seen, value, following, rule)
    rows = Rows(
        flat.observation,
        flat.action,
        log_probability(agent.logits(params, flat.observation), flat.action),
        value.ravel(),
        advantage.ravel(),
    )
    loss = jax.value_and_grad(functools.partial(objective, agent, rule), has_aux=True)

    def update(carry: tuple[Tree, Tree], index: Array) -> tuple[tuple[Tree, Tree], dict[str, Array]]:
        params, opt_state = carry
        (_, metrics), grads = loss(params, jax.tree.map(lambda x: x[index], rows))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    orders = jax.random.uniform(key, (rule.epochs, n)).argsort(-1)
    parts = orders.reshape(rule.epochs * rule.minibatches, n // rule.minibatches)
    (params, opt_state), metrics = jax.lax.scan(update, (params, opt_state), parts)
    return params, opt_state, jax.tree.map(jnp.mean, metrics)


class Rows(NamedTuple):
    """Transitions [B, ...] as the objective needs them, with what the policy before the epochs said."""

    observation: Array
    action: Array
    log_probability: Array  # of the action
    value: Array
    advantage: Array


def objective(agent: Agent, rule: Rule, params: Tree, rows: Rows) -> tuple[Array, dict[str, Array]]:
    """What an update lowers: equation 9, with advantages standardised and moves of the values clipped."""
    logits = agent.logits(params, rows.observation)
    advantage = (rows.advantage - rows.advantage.mean()) / (rows.advantage.std(ddof=1) + 1e-8)
    ratio = jnp.exp(log_probability(logits, rows.action) - rows.log_probability)
    policy = -surrogate(ratio, advantage, rule.clip).mean()
    target = rows.value + rows.advantage
    value = value_loss(agent.value(params, rows.observation), rows.value, target, rule.clip).mean()
    entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
    metrics = {"policy_loss": policy, "value_loss": value, "entropy": entropy}
    return policy + rule.value * value - rule.entropy * entropy, metrics


def advantages(seen: Transition, value: Array, following: Array, rule: Rule) -> Array:  # all [T, E]
    """Generalised advantage estimation: Σ_k (γλ)^k δ_{t+k} within an episode (Schulman et al. 2016, arXiv:1506.02438).

    δ_t = r_t + γ V(s'_t) − V(s_t), where `value` is V(s_t) and `following` is V(s'_t), of the state after the step in
    the same episode. V(s'_t) counts as 0 where the episode is terminated, and, without `rule.bootstrap`, truncated.
    """
    over = seen.terminated if rule.bootstrap else seen.ended
    delta = seen.reward + rule.discount * jnp.where(over, 0, following) - value

    def back(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, ended = now
        advantage = delta + rule.discount * rule.decay * jnp.where(ended, 0, later)
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, seen.ended), reverse=True)[1]


def surrogate(ratio: Array, advantage: Array, clip: float) -> Array:  # [B] each
    """min(r A, clip(r, 1 − ε, 1 + ε) A) for each transition: equation 7."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def value_loss(value: Array, before: Array, target: Array, clip: float) -> Array:  # [B] each
    """Half the squared error of a value, or, if that is larger, of one that moves by at most ε from what it was."""
    near = before + jnp.clip(value - before, -clip, clip)
    return jnp.maximum((value - target) ** 2, (near - target) ** 2) / 2


def log_probability(logits: Array, action: Array) -> Array:  # [B, A], int [B] -> [B]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
