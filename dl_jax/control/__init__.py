"""Control: environments as pure functions, policies that learn in them by PPO, and a replay buffer."""
