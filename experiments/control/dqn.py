"""A deep Q-network (DQN) balances a pole, from a replay buffer that is part of the train state.

Mnih et al. 2015, "Human-level control through deep reinforcement learning" (Nature 518), here in CartPole-v1 in place
of the paper's games, so that the bar is our own.

    python experiments/control/dqn.py --preset paper --seeds 10 --workdir runs/dqn

Expected: a mean return of 265 or more after 100,000 frames. Ten seeds took 20 seconds of a core of a Xeon.
CleanRL's DQN, with other settings, has 489 ± 16 after 500,000 frames.

A step is Algorithm 1 of the paper: every episode goes on by one action, the best one or with a falling probability any;
the transitions are written to the replay buffer; and the network learns from a batch that is drawn from it, against a
target network that is a copy of it from time to time. There are four episodes at a time, so that an update comes after
four frames, as in the paper. The buffer is an array on the device, and together with target, environments and running
episodes a part of the state, so that a run that was killed goes on with the same bits.

Sizes and rates aside, five things differ. Adam, with a rate that falls to 0, takes the place of RMSProp. The error is
not clipped to [-1, 1], with which the values of pilots grew to thousands, where 100 is the most; we suspect that the
few large errors at falls then count for too little. Learning begins at once, from what the buffer holds, and not after
50,000 frames. A state is a single observation, and not the last four. An episode that is truncated after 500 steps is
bootstrapped from its last state.

`greedy` is the mean return of 100 episodes after the last step without random actions, `return` that of the training
episodes that ended in the last 500 steps, of which one action in twenty is random. The figure `return` shows it over
the frames, and in its legend the interquartile mean of the last ones over the seeds with its bootstrap interval.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dl_jax.control import environments, replay
from dl_jax.control.environments import Environment, Episode, Transition
from dl_jax.control.returns import labelled
from dl_jax.core.evaluate import evaluator
from dl_jax.core.fit import fit
from dl_jax.core.step import Array, Batch, Metrics, State, Step, Tree, init_state, per_seed
from dl_jax.core.stream import no_data
from dl_jax.harness import Claim, Fraction, Positive, Probability, Run, curves_figure, launch
from dl_jax.models.vision.mlp import MLP


@dataclasses.dataclass(frozen=True)
class Config:
    steps: Positive[int] = 25_000  # train steps: a step of each episode, and one update
    episodes: Positive[int] = 4  # that a seed plays at a time
    size: Positive[int] = 20_000  # transitions that the replay buffer holds
    batch_size: Positive[int] = 64  # transitions in an update of a seed
    hidden: Positive[int] = 64  # units of each of two layers
    learning_rate: Positive[float] = 1e-3  # learning rate of Adam at the first step, falling to 0
    discount: Probability = 0.99  # γ, of the rewards of a step later
    copy_every: Positive[int] = 50  # steps between copies of the network to the target
    explore: Fraction = 0.2  # part of the steps in which the share of random actions falls
    least: Probability = 0.05  # share of random actions after that
    tested: Positive[int] = 100  # episodes of the greedy policy at the end
    scan_steps: Positive[int] = 250  # steps per call of the compiled program
    report_every: Positive[int] = 500  # steps between reports


PRESETS = {
    "paper": Config(),
    "quick": Config(steps=5000),
    "smoke": Config(steps=500, episodes=2, size=40, batch_size=4, hidden=4, tested=4),
}

RULE = "Pushing to the side to which the pole turns: 200."
CLAIMS = (
    Claim("greedy", paper="our bar", locator="CartPole-v1 after 100,000 frames", at_least=265, seeds=10,
          note="Pilots of three other seeds: 326 ± 30. " + RULE),
    Claim("greedy", paper="our bar", locator="CartPole-v1 after 20,000 frames", at_least=212, preset="quick",
          note="Pilots of three other seeds: 292 ± 40. " + RULE),
)  # fmt: skip
KEEPS = ("return.png",)  # files in the run's folder

Values = Callable[[Tree, Array], Array]  # (params, observations [B, D]) -> the values of the actions [B, A]


def main(cfg: Config, run: Run) -> Mapping[str, np.ndarray]:
    environment = environments.cart_pole()
    environments.require_reports(environment, cfg.steps, cfg.report_every)
    model, tx = MLP((cfg.hidden, cfg.hidden), environment.actions), adam(cfg)
    values: Values = lambda params, seen: jnp.asarray(model.apply({"params": params}, seen, train=False))
    key_init, key, key_test = run.keys(3)  # [S] each

    def start(keys: tuple[Array, Array]) -> State:
        params = model.init(keys[0], jnp.zeros((1, 4)), train=False)["params"]
        return begin(cfg, environment, tx, params, keys[1])

    states = fit(
        per_seed(q_learning(cfg, environment, values, tx)),
        jax.jit(jax.vmap(start))((key_init, key)),
        no_data,
        steps=cfg.steps,
        run=run,
        scan=cfg.scan_steps,
        every=cfg.report_every,
    )
    steps, returns = run.history("return")
    run.figure("return", cfg.steps, lambda: curves_figure(
        {labelled("with random actions", returns[-1]): (steps * cfg.episodes, returns)},
        xlabel="frames", ylabel="mean return of the training episodes"))  # fmt: skip
    measure = functools.partial(environments.greedy_returns, environment, values)
    test_of = evaluator(measure, {"episode": np.arange(cfg.tested)}, cfg.tested, key_test)
    return {"greedy": test_of({"params": states.params})["return"], "return": returns[-1]}


def begin(cfg: Config, environment: Environment, tx: optax.GradientTransformation, params: Tree, key: Array) -> State:
    """The state of one seed at step 0, with an empty buffer."""
    key, key_reset = jax.random.split(key)
    running = jax.vmap(functools.partial(environments.begin, environment))(jax.random.split(key_reset, cfg.episodes))
    one = jax.tree.map(lambda x: x[0], running)
    _, seen = jax.eval_shape(functools.partial(environments.step, environment), one, jnp.int32(0))
    held = replay.empty(cfg.size, remembered(seen))
    collections = {"episodes": running._asdict(), "replay": held._asdict(), "target": params}
    return init_state(key, {"params": params, **collections}, tx)


def remembered(seen: Transition) -> dict[str, Array]:
    """What the buffer keeps of transitions."""
    return {name: getattr(seen, name) for name in ("observation", "action", "reward", "following", "terminated")}


def q_learning(cfg: Config, environment: Environment, values: Values, tx: optax.GradientTransformation) -> Step:
    """A step: every episode goes on by one action, and the network learns from rows of the buffer (Algorithm 1)."""

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key_play, key_rows = jax.random.split(jax.random.fold_in(state.key, state.step))
        policy = lambda seen, key: explored(values(state.params, seen), random_share(cfg, state.step), key)
        running = Episode(**state.extra["episodes"])
        running, seen = environments.rollout(environment, policy, running, key_play, 1)
        seen = jax.tree.map(lambda x: x[0], seen)  # of the only step, [E, ...]
        held = replay.pushed(replay.Replay(**state.extra["replay"]), remembered(seen))
        rows = replay.drawn(held, key_rows, cfg.batch_size)
        loss, grads = jax.value_and_grad(q_loss, 1)(values, state.params, state.extra["target"], rows, cfg.discount)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params, count = optax.apply_updates(state.params, updates), state.step + 1
        target = jax.tree.map(functools.partial(jnp.where, count % cfg.copy_every == 0), params, state.extra["target"])
        extra = {"episodes": running._asdict(), "replay": held._asdict(), "target": target}
        returns = jnp.where(seen.ended, seen.total, 0).sum(), seen.ended.sum().astype(jnp.float32)
        return State(count, params, extra, opt_state, state.key), {"loss": loss, "return": returns}

    return step


def q_loss(values: Values, params: Tree, target: Tree, rows: Mapping[str, Array], discount: float) -> Array:
    """Half the mean squared error of Q(s, a) against r + γ max_a' Q⁻(s', a'), or r alone where it is terminated.

    Q⁻ is the target network. A truncated episode's last state has its value.
    """
    best = values(target, rows["following"]).max(-1)
    wanted = rows["reward"] + discount * jnp.where(rows["terminated"], 0, best)
    chosen = jnp.take_along_axis(values(params, rows["observation"]), rows["action"][:, None], 1)[:, 0]
    return optax.l2_loss(chosen, wanted).mean()


def explored(values: Array, share: Array, key: Array) -> Array:  # [E, A], [] -> int [E]
    """The best action, or with probability `share` any."""
    key_whether, key_action = jax.random.split(key)
    anything = jax.random.randint(key_action, (len(values),), 0, values.shape[1])
    return jnp.where(jax.random.uniform(key_whether, (len(values),)) < share, anything, values.argmax(-1))


def random_share(cfg: Config, step: Array) -> Array:
    """The share of random actions: from 1 linearly to the least."""
    return jnp.maximum(cfg.least, 1 - (1 - cfg.least) * step / (cfg.explore * cfg.steps))


def adam(cfg: Config) -> optax.GradientTransformation:
    return optax.adam(optax.linear_schedule(cfg.learning_rate, 0, cfg.steps))


if __name__ == "__main__":
    launch(main, PRESETS, CLAIMS)
