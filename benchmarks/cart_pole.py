"""CartPole in NumPy for several episodes at once, by the equations of `dl_jax.control.environments.cart_pole`."""

from typing import Any

import numpy as np

from dl_jax.control.environments import Transition

LIMIT = 500  # steps of an episode


class CartPoles:
    """Episodes [E] that begin anew where one ends."""

    def __init__(self, episodes: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.state = self.fresh(episodes)  # [E, 4]
        self.steps = np.zeros(episodes, np.int32)
        self.total = np.zeros(episodes, np.float32)

    def fresh(self, n: int) -> np.ndarray:
        return self.random.uniform(-0.05, 0.05, (n, 4)).astype(np.float32)

    def step(self, action: np.ndarray) -> Transition:  # int [E] -> leaves [E, ...]
        before, following = self.state, moved(self.state, action)
        self.steps, self.total = self.steps + 1, self.total + 1
        terminated = (abs(following[:, 0]) > 2.4) | (abs(following[:, 2]) > np.radians(12))
        truncated = (self.steps >= LIMIT) & ~terminated
        reward = np.ones(len(action), np.float32)
        seen: Any = before, action, reward, following, terminated, truncated, self.total
        ended = terminated | truncated
        self.state = np.where(ended[:, None], self.fresh(len(action)), following)
        self.steps, self.total = np.where(ended, 0, self.steps), np.where(ended, np.float32(0), self.total)
        return Transition(*seen)


def moved(state: np.ndarray, action: np.ndarray) -> np.ndarray:  # [E, 4], int [E] -> [E, 4]
    """A step of Euler's method of 0.02 s."""
    _, speed, angle, turning = state.T
    sin, cos = np.sin(angle), np.cos(angle)
    push = (np.where(action == 1, np.float32(10), np.float32(-10)) + 0.05 * turning**2 * sin) / 1.1
    twist = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    return state + 0.02 * np.stack([speed, push - 0.05 * twist * cos / 1.1, turning, twist], 1).astype(np.float32)
