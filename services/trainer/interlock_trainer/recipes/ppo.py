"""PPO with a policy and a value network on gymnasium's vectorised CartPole, written on torch and the SDK; nothing here knows the service.

Shape suffixes: E environments, T time steps of a rollout, N = T x E samples, O observation, A actions.

A step of the run is one optimizer update of one minibatch, so a checkpoint can fall in the middle of a rollout's epochs: the collector
saves its buffers, the order of minibatches, every environment's state and generator, and goes on bit for bit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from interlock.training import Run, ServeSpec
from interlock.training.capture import seed_everything
from interlock_trainer.recipes import PpoParameters

OBSERVATION, ACTIONS = 4, 2
NUM_RETURNS = 64  # episodes behind the reward metric


class Policy(nn.Module):
    """Observation to action logits."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(OBSERVATION, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, ACTIONS)
        nn.init.orthogonal_(self.head.weight, 0.01)

    def forward(self, x_NO: Tensor) -> Tensor:
        """Logits, one row per observation."""
        logits_NA: Tensor = self.head(self.body(x_NO))
        return logits_NA


class Value(nn.Module):
    """Observation to expected return."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(OBSERVATION, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )

    def forward(self, x_NO: Tensor) -> Tensor:
        """One value per observation."""
        value_N: Tensor = self.body(x_NO).squeeze(-1)
        return value_N


class Collector:
    """Plays the environments and hands out minibatches; all of its state can be saved at any step."""

    def __init__(self, parameters: PpoParameters, policy: Policy, value: Value) -> None:
        self._parameters = parameters
        self._policy, self._value = policy, value
        self._env: Any = gymnasium.make_vec(
            "CartPole-v1", num_envs=parameters.num_envs, vectorization_mode="vector_entry_point"
        )
        observation_EO, _ = self._env.reset(seed=parameters.seed)
        self._core: Any = self._env.unwrapped
        self._observation_EO = torch.from_numpy(observation_EO.copy())
        self._returns_E = np.zeros(parameters.num_envs)
        self._recent: deque[float] = deque(maxlen=NUM_RETURNS)
        self._batch: dict[str, Tensor] = {}
        self._order_N = torch.empty(0, dtype=torch.int64)
        self._next = self._num_updates()
        self.reward_factor = 1.0
        self.explained_variance = 0.0

    def _num_updates(self) -> int:
        return self._parameters.epochs * self._parameters.minibatches

    @property
    def reward(self) -> float | None:
        """Mean return of the last finished episodes; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def minibatch(self) -> dict[str, Tensor]:
        """The next minibatch; plays a new rollout when the old one is used up."""
        if self._next >= self._num_updates():
            self._collect()
            self._next = 0
        position = self._next % self._parameters.minibatches
        num_samples = self._parameters.num_envs * self._parameters.horizon
        if position == 0:
            self._order_N = torch.randperm(num_samples)
        self._next += 1
        size = num_samples // self._parameters.minibatches
        chosen = self._order_N[position * size : (position + 1) * size]
        return {name: tensor[chosen] for name, tensor in self._batch.items()}

    @torch.no_grad()
    def _collect(self) -> None:
        rows: dict[str, list[Tensor]] = {}
        for _ in range(self._parameters.horizon):
            for name, tensor in self._play().items():
                rows.setdefault(name, []).append(tensor)
        steps = {name: torch.stack(tensors) for name, tensors in rows.items()}
        steps["advantage"] = self._advantages(steps)
        steps["return"] = steps["advantage"] + steps["value"]
        kept = steps["valid"].bool()
        spread = steps["return"][kept].var() + 1e-8
        self.explained_variance = float(1 - (steps["return"] - steps["value"])[kept].var() / spread)
        wanted = ("observation", "action", "logp", "advantage", "return", "valid")
        self._batch = {name: steps[name].flatten(0, 1) for name in wanted}

    def _play(self) -> dict[str, Tensor]:
        """One step of every environment. The step after an episode's end only resets: it is not valid."""
        observation_EO = self._observation_EO
        logits_EA = self._policy(observation_EO)
        probabilities_EA = torch.softmax(logits_EA, -1)
        action_E = torch.multinomial(torch.nan_to_num(probabilities_EA, nan=0.5), 1).squeeze(-1)
        valid_E = torch.from_numpy(~self._core.prev_done)
        following_EO, reward_E, terminated_E, truncated_E, _ = self._env.step(action_E.numpy())
        self._finish(reward_E, terminated_E | truncated_E)
        self._observation_EO = torch.from_numpy(following_EO.copy())
        return {
            "observation": observation_EO,
            "action": action_E,
            "logp": torch.log_softmax(logits_EA, -1).gather(1, action_E[:, None]).squeeze(-1),
            "value": self._value(observation_EO),
            "following": self._value(self._observation_EO),
            "reward": torch.from_numpy(reward_E).float() * 0.1 * self.reward_factor,
            "terminated": torch.from_numpy(terminated_E).float(),
            "ended": torch.from_numpy(terminated_E | truncated_E).float(),
            "valid": valid_E.float(),
        }

    def _finish(self, reward_E: Any, ended_E: Any) -> None:
        self._returns_E += reward_E
        for index in np.flatnonzero(ended_E):
            self._recent.append(float(self._returns_E[index]))
            self._returns_E[index] = 0.0

    def _advantages(self, steps: dict[str, Tensor]) -> Tensor:
        """Generalised advantage estimates; a truncated episode is bootstrapped from its last observation."""
        gamma, decay = self._parameters.gamma, self._parameters.gamma * self._parameters.gae_lambda
        delta_TE = steps["reward"] + gamma * steps["following"] * (1 - steps["terminated"]) - steps["value"]
        running_E = torch.zeros(self._parameters.num_envs)
        out: list[Tensor] = []
        for step in reversed(range(self._parameters.horizon)):
            running_E = delta_TE[step] + decay * (1 - steps["ended"][step]) * running_E
            running_E = running_E * steps["valid"][step]
            out.append(running_E)
        return torch.stack(out[::-1])

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""
        return {
            "env": {
                "state": np.array(self._core.state),
                "steps": self._core.steps.copy(),
                "prev_done": self._core.prev_done.copy(),
                "generator": self._core.np_random.bit_generator.state,
            },
            "observation": self._observation_EO.clone(),
            "returns": self._returns_E.copy(),
            "recent": list(self._recent),
            "batch": dict(self._batch),
            "order": self._order_N,
            "next": self._next,
            "reward_factor": self.reward_factor,
            "explained_variance": self.explained_variance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a saved state."""
        env = state["env"]
        self._core.state, self._core.steps, self._core.prev_done = env["state"], env["steps"], env["prev_done"]
        self._core.np_random.bit_generator.state = env["generator"]
        self._observation_EO, self._returns_E = state["observation"], state["returns"]
        self._recent = deque(state["recent"], maxlen=NUM_RETURNS)
        self._batch, self._order_N, self._next = state["batch"], state["order"], state["next"]
        self.reward_factor, self.explained_variance = state["reward_factor"], state["explained_variance"]


def losses(parameters: PpoParameters, policy: Policy, value: Value, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The clipped surrogate, the value loss and what to watch about them. Invalid samples weigh nothing."""
    weight_N = batch["valid"] / batch["valid"].sum().clamp(min=1)
    logits_NA = torch.log_softmax(policy(batch["observation"]), -1)
    log_ratio_N = logits_NA.gather(1, batch["action"][:, None]).squeeze(-1) - batch["logp"]
    ratio_N = log_ratio_N.exp()
    mean = (batch["advantage"] * weight_N).sum()
    deviation = (((batch["advantage"] - mean) ** 2) * weight_N).sum().sqrt()
    advantage_N = (batch["advantage"] - mean) / (deviation + 1e-8)
    clipped_N = ratio_N.clamp(1 - parameters.clip, 1 + parameters.clip)
    policy_loss = -(torch.min(ratio_N * advantage_N, clipped_N * advantage_N) * weight_N).sum()
    value_loss = 0.5 * (((value(batch["observation"]) - batch["return"]) ** 2) * weight_N).sum()
    entropy = (-(logits_NA.exp() * logits_NA).sum(-1) * weight_N).sum()
    loss = policy_loss + parameters.value_coefficient * value_loss - parameters.entropy_coefficient * entropy
    with torch.no_grad():
        kl = ((ratio_N - 1 - log_ratio_N) * weight_N).sum()
        clip_fraction = (((ratio_N - 1).abs() > parameters.clip).float() * weight_N).sum()
    return {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "kl": kl,
        "clip_fraction": clip_fraction,
    }


def train(
    parameters: PpoParameters, attach: Callable[..., Run], *, go_on: Callable[[object], bool] = lambda _supervisor: True
) -> Run:
    """Trains until `max_steps`, or until the run is stopped or `go_on` says no; returns the run, not closed."""
    seed_everything(parameters.seed)
    policy, value = Policy(parameters.hidden), Value(parameters.hidden)
    optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=parameters.learning_rate, eps=1e-5)
    collector = Collector(parameters, policy, value)
    run = attach(model=policy, value=value, optimizer=optimizer, extra={"collector": collector})

    def change(name: str, amount: float, _num_steps: int) -> bool:
        if name != "reward_sign":
            return False
        collector.reward_factor = amount
        return True

    run.on_change(change)
    began = time.perf_counter()
    for _ in run.steps(until=parameters.max_steps):
        _update(parameters, policy, value, optimizer, collector, run)
        _drill(parameters, run)
        now = time.perf_counter()
        rest = parameters.pace_ms / 1e3 - (now - began)
        if rest > 0:
            time.sleep(rest)
            now = time.perf_counter()
        run.log(steps_per_second=1.0 / max(now - began, 1e-9))
        began = now
        if not go_on(run.supervisor):
            break
    return run


def _update(
    parameters: PpoParameters,
    policy: Policy,
    value: Value,
    optimizer: torch.optim.Optimizer,
    collector: Collector,
    run: Run,
) -> None:
    terms = losses(parameters, policy, value, collector.minibatch())
    optimizer.zero_grad()
    terms["loss"].backward()  # type: ignore[no-untyped-call]  # torch's own
    norm = nn.utils.clip_grad_norm_([*policy.parameters(), *value.parameters()], parameters.max_gradient_norm)
    optimizer.step()
    run.log(**terms, gradient_norm=norm, explained_variance=collector.explained_variance)
    if collector.reward is not None:
        run.log(reward=collector.reward)


def _drill(parameters: PpoParameters, run: Run) -> None:
    if parameters.fault and run.step + 1 == parameters.fault_step and run.attempt == 1:
        run.drill(parameters.fault, parameters.fault_value, parameters.fault_steps)


def serve_spec(model: str, metric: str, better: str, min_improvement: float, min_interval_seconds: float) -> ServeSpec:
    """How this recipe's policy is served: observation in, action logits out."""
    from interlock.core.retention import Better

    return ServeSpec(
        model=model,
        example={"obs": torch.zeros(1, OBSERVATION)},
        outputs=("logits",),
        metric=metric,
        better=Better(better),
        min_improvement=min_improvement,
        min_interval_seconds=min_interval_seconds,
    )
