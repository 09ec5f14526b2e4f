"""Environments as pure functions, and episodes in them: CartPole and Acrobot, rollouts, and the returns of policies.

An episode ends in one of two ways, which learning has to tell apart. It is terminated where a state is final, after
which there is no more reward. It is truncated where the limit of steps cuts it off, and its last state would still have
a value. A rollout begins the next episode at once; the last observation of the old one is `Transition.following`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dl_jax.core.errors import InputError
from dl_jax.core.step import Array, Batch, Tree


class Environment(NamedTuple):
    """A Markov decision process with finitely many actions. All functions are of a single state, and can be mapped."""

    reset: Callable[[Array], Tree]  # key -> the first state of an episode
    move: Callable[[Tree, Array], Tree]  # (state, action int []) -> the next state
    observe: Callable[[Tree], Array]  # state -> [D], what a policy sees
    reward: Callable[[Tree], Array]  # the state that is entered -> []
    final: Callable[[Tree], Array] | None  # state -> bool [], whether the episode terminates there; None where none is
    actions: int  # A, which are 0 to A - 1
    limit: int | None  # steps after which an episode is truncated; None for no limit


class Episode(NamedTuple):
    """An episode that goes on."""

    state: Tree
    steps: Array  # int32 [], taken so far
    total: Array  # float32 [], the sum of the rewards so far


class Transition(NamedTuple):
    """What one step of an episode has shown."""

    observation: Array  # [D], before the step
    action: Array  # int32 []
    reward: Array  # float32 []
    following: Array  # [D], after the step, and of the same episode also where it ends
    terminated: Array  # bool []
    truncated: Array  # bool []; never both
    total: Array  # float32 [], the sum of the episode's rewards up to this one

    @property
    def ended(self) -> Array:
        return self.terminated | self.truncated


Policy = Callable[[Array, Array], Array]  # (observations [E, D], key) -> actions int [E]


def begin(environment: Environment, key: Array) -> Episode:
    """A new episode. Raises InputError for an environment in which no episode would end."""
    if environment.limit is None and environment.final is None:
        raise InputError(
            "the environment has neither a limit of steps nor final states, so that no episode would end; give it one"
        )
    if environment.limit is not None and environment.limit < 1:
        raise InputError(f"the limit of an episode is {environment.limit} steps, expected 1 or more; None is no limit")
    return Episode(environment.reset(key), jnp.zeros([], jnp.int32), jnp.zeros([]))


def step(environment: Environment, episode: Episode, action: Array) -> tuple[Episode, Transition]:
    """The episode one step later, also where it has ended, and what was seen."""
    state = environment.move(episode.state, action)
    reward = jnp.asarray(environment.reward(state), jnp.float32)
    later = Episode(state, episode.steps + 1, episode.total + reward)
    terminated = environment.final(state) if environment.final else jnp.zeros([], bool)
    over = later.steps >= environment.limit if environment.limit else jnp.zeros([], bool)
    before, after = environment.observe(episode.state), environment.observe(state)
    return later, Transition(before, action, reward, after, terminated, over & ~terminated, later.total)


def rollout(
    environment: Environment, policy: Policy, episodes: Episode, key: Array, steps: int
) -> tuple[Episode, Transition]:
    """Goes on with E episodes, every leaf [E, ...], for some steps, and begins anew where one ends.

    Every leaf of the transitions is [steps, E, ...].
    """

    def one(episodes: Episode, key: Array) -> tuple[Episode, Transition]:
        key_action, key_reset = jax.random.split(key)
        action = policy(jax.vmap(environment.observe)(episodes.state), key_action)
        later, seen = jax.vmap(functools.partial(step, environment))(episodes, action)
        fresh = jax.vmap(functools.partial(begin, environment))(jax.random.split(key_reset, len(action)))
        return select(seen.ended, fresh, later), seen

    return jax.lax.scan(one, episodes, jax.random.split(key, steps))


def returns(environment: Environment, policy: Policy, keys: Array, key: Array) -> Array:  # [E], [] -> float32 [E]
    """The sums of the rewards of E whole episodes, of which each begins with its own key; `key` is the policy's.

    Raises InputError for an environment without a limit of steps.
    """
    if environment.limit is None:
        raise InputError("the environment has no limit of steps, so that an episode might never end; give it a limit")
    episodes = jax.vmap(functools.partial(begin, environment))(keys)

    def one(carry: tuple[Episode, Array], i: Array) -> tuple[tuple[Episode, Array], None]:
        episodes, ended = carry
        action = policy(jax.vmap(environment.observe)(episodes.state), jax.random.fold_in(key, i))
        later, seen = jax.vmap(functools.partial(step, environment))(episodes, action)
        return (select(ended, episodes, later), ended | seen.ended), None

    (episodes, _), _ = jax.lax.scan(one, (episodes, jnp.zeros(len(keys), bool)), jnp.arange(environment.limit))
    return episodes.total


def greedy_returns(
    environment: Environment, scores: Callable[[Tree, Array], Array], variables: Tree, batch: Batch, key: Array
) -> dict[str, tuple[Array, Array]]:
    """The metric `return` of episodes in which the action with the highest score is taken, for `evaluator`.

    `scores` is a function (params, observations [E, D]) -> [E, A], such as a policy's logits. The column `episode` of
    the batch numbers the episodes.
    """
    policy = lambda observation, key: scores(variables["params"], observation).argmax(-1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["episode"])
    total = returns(environment, policy, keys, key)  # the policy draws nothing
    return {"return": ((batch["mask"] * total).sum(), batch["mask"].sum())}


def select(which: Array, these: Episode, others: Episode) -> Episode:  # bool [E], leaves [E, ...]
    """`these` episodes where `which` is true, and the others elsewhere."""
    choose = lambda which, *two: jax.tree.map(functools.partial(jnp.where, which), *two)
    return jax.vmap(choose)(which, these, others)


def require_reports(environment: Environment, steps: int, every: int, rollout: int = 1) -> None:
    """Raises InputError unless every report of `fit` sees the end of an episode.

    That takes reports after as many steps of each episode as one may have, up to the last of the train steps, each of
    which is a `rollout` of so many steps.
    """
    if steps % every:
        raise InputError(f"report_every is {every}, expected a divisor of the {steps} steps; change one of them")
    if environment.limit and every * rollout < environment.limit:
        raise InputError(
            f"report_every is {every}, of steps that are {rollout} of each episode, expected {environment.limit} steps "
            "of an episode or more, as many as it may have; raise it"
        )


def cart_pole(limit: int | None = 500) -> Environment:
    """A pole on a cart that is pushed left or right; each step until it falls is worth 1. Gymnasium's CartPole-v1.

    Barto, Sutton & Anderson 1983, "Neuronlike adaptive elements that can solve difficult learning control problems",
    with steps of Euler's method of 0.02 s and without friction. State and observation are the cart's place (m) and
    speed and the pole's angle from upright (radians) and its speed. The episode is terminated where the place is beyond
    2.4 m or the angle beyond 12 degrees.
    """
    gravity, mass_pole, mass, half, force, time = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02  # mass: of cart and pole

    def move(state: Array, action: Array) -> Array:
        _, speed, angle, turning = state
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        push = (jnp.where(action == 1, force, -force) + mass_pole * half * turning**2 * sin) / mass
        twist = (gravity * sin - cos * push) / (half * (4 / 3 - mass_pole * cos**2 / mass))
        return state + time * jnp.stack([speed, push - mass_pole * half * twist * cos / mass, turning, twist])

    return Environment(
        reset=lambda key: jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05),
        move=move,
        observe=lambda state: state,
        reward=lambda state: jnp.ones([]),
        final=lambda state: (abs(state[0]) > 2.4) | (abs(state[2]) > math.radians(12)),
        actions=2,
        limit=limit,
    )


def acrobot(limit: int | None = 500) -> Environment:
    """Two links that hang from a joint and are to swing up by a torque between them. Gymnasium's Acrobot-v1.

    Sutton 1996, "Generalization in reinforcement learning: Successful examples using sparse coarse coding", with the
    equations of Sutton & Barto's book: a step is one of Runge-Kutta's of order 4 of 0.2 s. The state is the angle of
    the first link from hanging, that of the second relative to the first, and their speeds. The observation has cosine
    and sine of each angle instead. A step is worth -1, but for one into a state with the tip above the height of one
    link, which is final.
    """
    gravity, centre = 9.8, 0.5  # m/s², and m to the centre of a link of 1 m, 1 kg and 1 kg m²
    fastest = np.array([4 * math.pi, 9 * math.pi], np.float32)  # NumPy's: a JAX array would start the devices

    def slope(state: Array, torque: Array) -> Array:
        first, second, speed, other = state
        both = 2 + 1 + 2 * centre**2 + 2 * centre * jnp.cos(second)  # inertia about the joint
        mixed = centre**2 + centre * jnp.cos(second) + 1
        weight = centre * gravity * jnp.sin(first + second)
        pull = (centre + 1) * gravity * jnp.sin(first) + weight
        pull = pull - centre * jnp.sin(second) * (other**2 + 2 * other * speed)
        twist = torque + mixed / both * pull - centre * speed**2 * jnp.sin(second) - weight
        twist = twist / (centre**2 + 1 - mixed**2 / both)
        return jnp.stack([speed, other, -(mixed * twist + pull) / both, twist])

    def move(state: Array, action: Array) -> Array:
        time, of = 0.2, functools.partial(slope, torque=action - 1.0)
        k1 = of(state)
        k2 = of(state + time / 2 * k1)
        k3 = of(state + time / 2 * k2)
        k4 = of(state + time * k3)
        angles, speeds = jnp.split(state + time / 6 * (k1 + 2 * k2 + 2 * k3 + k4), 2)
        wrapped = (angles + math.pi) % (2 * math.pi) - math.pi
        return jnp.concatenate([wrapped, jnp.clip(speeds, -fastest, fastest)])

    final = lambda state: -jnp.cos(state[0]) - jnp.cos(state[0] + state[1]) > 1
    return Environment(
        reset=lambda key: jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1),
        move=move,
        observe=lambda s: jnp.stack([jnp.cos(s[0]), jnp.sin(s[0]), jnp.cos(s[1]), jnp.sin(s[1]), s[2], s[3]]),
        reward=lambda state: jnp.where(final(state), 0.0, -1.0),
        final=final,
        actions=3,
        limit=limit,
    )
