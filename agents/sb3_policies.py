"""Policies for Stable-Baselines3 that choose among many actions fast.

With a hundred actions or more, SB3's PPO and MaskablePPO spend most of their time on the distribution: it is
normalised up to three times, sampled through exponential variates, and differentiated step by step.
`Policy` (for PPO and A2C) and `MaskablePolicy` (for MaskablePPO) are SB3's own networks with the same
distribution, computed once:

    model = MaskablePPO(MaskablePolicy, env)

They take observations of all forms; action spaces of other kinds than the environments have are left to SB3.
`NetPolicy` (for MaskablePPO) has the networks of `agents.networks` in place of SB3's:

    spec = Spec.of(env, "pointer")
    model = MaskablePPO(NetPolicy, SB3VecEnv(env), policy_kwargs={"spec": spec})
"""

from __future__ import annotations

from typing import Any

import torch as th
from gymnasium import spaces

from agents.networks import Spec, build
from llmsched_env.errors import InputError

try:
    from sb3_contrib.common.maskable.distributions import (
        MaskableCategoricalDistribution,
        MaskableMultiCategoricalDistribution,
    )
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.torch_layers import CombinedExtractor
except ImportError:
    raise ImportError('agents.sb3_policies needs sb3-contrib; pip install "llmsched-env[train]"') from None

_ILLEGAL = 1e8  # less of a logit, as in sb3-contrib: a probability of 0, and a finite logarithm


class _LogProb(th.autograd.Function):
    """Logarithm of the probability of an action, with its derivative by the logits."""

    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, logs: th.Tensor, shares: th.Tensor, actions: th.Tensor) -> Any:
        ctx.save_for_backward(shares, actions)
        return logs.gather(1, actions)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        shares, actions = ctx.saved_tensors
        (slope,) = slopes
        return (shares * -slope).scatter_add_(1, actions, slope), None, None, None


class _Entropy(th.autograd.Function):
    """Entropy, with its derivative by the logits; none is taken where it has no weight."""

    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, logs: th.Tensor, shares: th.Tensor) -> Any:
        entropy = -th.linalg.vecdot(shares, logs)
        ctx.save_for_backward(logs, shares, entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        logs, shares, entropy = ctx.saved_tensors
        (slope,) = slopes
        if not slope.any():
            return None, None, None
        return (logs + entropy[:, None]).mul_(shares).mul_(-slope[:, None]), None, None


class _Masked:
    """Masks, by logits so low that nothing comes of them."""

    _logits: Any

    def apply_masking(self, masks: Any) -> None:
        if masks is None:
            return
        legal = th.as_tensor(masks, dtype=self._logits.dtype, device=self._logits.device)
        self.proba_distribution(self._logits + (legal.view(self._logits.shape) - 1.0).mul_(_ILLEGAL))  # type: ignore[attr-defined]


class QuickCategorical(_Masked, MaskableCategoricalDistribution):
    """sb3-contrib's categorical distribution, each of whose parts is computed once and only if asked for."""

    def proba_distribution(self, action_logits: th.Tensor) -> QuickCategorical:
        self._logits = action_logits.view(-1, self.action_dim)
        self._logs: Any = None
        self._shares: Any = None
        return self

    def _normalise(self) -> None:
        if self._logs is None:
            with th.no_grad():
                self._logs = th.log_softmax(self._logits, 1)
                self._shares = th.softmax(self._logits, 1)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        self._normalise()
        chosen: th.Tensor = _LogProb.apply(self._logits, self._logs, self._shares, actions.long().view(-1, 1))
        return chosen.view(-1)

    def entropy(self) -> th.Tensor:
        self._normalise()
        entropy: th.Tensor = _Entropy.apply(self._logits, self._logs, self._shares)
        return entropy

    def sample(self) -> th.Tensor:
        """The first action at which the probabilities add up to more than a uniform number."""
        self._normalise()
        sums = self._shares.cumsum(1)
        at = th.rand(len(sums), 1, dtype=sums.dtype, device=sums.device) * (sums[:, -1:] * (1.0 - 1e-6))
        return th.searchsorted(sums, at, right=True).view(-1).clamp_(max=self.action_dim - 1)

    def mode(self) -> th.Tensor:
        return self._logits.argmax(1)


class QuickMultiCategorical(_Masked, MaskableMultiCategoricalDistribution):
    """sb3-contrib's distribution of actions with several entries, without its checks and repetitions."""

    def proba_distribution(self, action_logits: th.Tensor) -> QuickMultiCategorical:
        self._logits = action_logits.view(-1, sum(self.action_dims))
        self._logs: Any = None
        return self

    def _parts(self) -> list[th.Tensor]:
        """Logarithms of the probabilities, by entry."""
        if self._logs is None:
            self._logs = [th.log_softmax(part, 1) for part in self._logits.split(self._sizes, 1)]
        parts: list[th.Tensor] = self._logs
        return parts

    @property
    def _sizes(self) -> list[int]:
        return [int(n) for n in self.action_dims]

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        chosen = actions.long().view(-1, len(self._sizes)).split(1, 1)
        logs = [part.gather(1, of) for part, of in zip(self._parts(), chosen, strict=True)]
        return th.cat(logs, 1).sum(1)

    def entropy(self) -> th.Tensor:
        entropies = [-(part.exp() * part).sum(1) for part in self._parts()]
        return th.stack(entropies, 1).sum(1)

    def sample(self) -> th.Tensor:
        """Where a Gumbel variate more makes a logit the largest (of its entry)."""
        noise = th.rand_like(self._logits).clamp_(1e-10).log_().neg_().log_().neg_()
        return self._largest(self._logits + noise)

    def mode(self) -> th.Tensor:
        return self._largest(self._logits)

    def _largest(self, logits: th.Tensor) -> th.Tensor:
        return th.stack([part.argmax(1) for part in logits.split(self._sizes, 1)], 1)


def _quick(action_space: Any, own: Any) -> Any:
    """The quick distribution for a space, else the one that there is."""
    if isinstance(action_space, spaces.Discrete):
        return QuickCategorical(int(action_space.n))
    if isinstance(action_space, spaces.MultiDiscrete):
        return QuickMultiCategorical(list(action_space.nvec))
    return own


def _with_extractor(observation_space: spaces.Space[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a policy, with SB3's extractor for observations in parts where they come in parts."""
    if isinstance(observation_space, spaces.Dict):
        keywords.setdefault("features_extractor_class", CombinedExtractor)
    return keywords


class Policy(ActorCriticPolicy):
    """SB3's ActorCriticPolicy, quick."""

    def __init__(
        self, observation_space: Any, action_space: Any, lr_schedule: Any, *args: Any, **kwargs: Any
    ) -> None:
        kwargs = _with_extractor(observation_space, kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self.action_dist = _quick(action_space, self.action_dist)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        if isinstance(self.action_dist, QuickCategorical | QuickMultiCategorical):
            return self.action_dist.proba_distribution(self.action_net(latent_pi))
        return super()._get_action_dist_from_latent(latent_pi)


class MaskablePolicy(MaskableActorCriticPolicy):
    """sb3-contrib's MaskableActorCriticPolicy, quick."""

    def __init__(
        self, observation_space: Any, action_space: Any, lr_schedule: Any, *args: Any, **kwargs: Any
    ) -> None:
        kwargs = _with_extractor(observation_space, kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self.action_dist = _quick(action_space, self.action_dist)


class NetPolicy(MaskablePolicy):
    """A policy with one of the networks of `agents.networks`, for flat observations.

    Attributes:
        net: the network, (n, D) -> logits (n, A), values (n,).
    """

    def __init__(
        self, observation_space: Any, action_space: Any, lr_schedule: Any, *, spec: Spec, **kwargs: Any
    ) -> None:
        """
        Args:
            spec: the network, or its fields as a dict.

        Raises:
            InputError: a network that does not fit the spaces.
        """
        self.spec = spec if isinstance(spec, Spec) else Spec(**spec)
        parts = [action_space.n] if isinstance(action_space, spaces.Discrete) else action_space.nvec
        if observation_space.shape != (self.spec.num_features,) or sum(parts) != self.spec.num_logits:
            raise InputError(
                f"the network reads {self.spec.num_features} numbers and has {self.spec.num_logits} actions, "
                f"unlike the environment, {observation_space} and {action_space}"
            )
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        self.net = build(self.spec)
        make: Any = self.optimizer_class
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "spec": self.spec}

    def _distribution(self, logits: th.Tensor, masks: Any) -> Any:
        distribution = self.action_dist.proba_distribution(logits)
        distribution.apply_masking(masks)
        return distribution

    def forward(self, obs: Any, deterministic: bool = False, action_masks: Any = None) -> Any:
        logits, values = self.net(obs)
        distribution = self._distribution(logits, action_masks)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        shape: Any = self.action_space.shape
        return actions.reshape(-1, *shape), values[:, None], log_prob

    def evaluate_actions(self, obs: Any, actions: th.Tensor, action_masks: Any = None) -> Any:
        logits, values = self.net(obs)
        distribution = self._distribution(logits, action_masks)
        return values[:, None], distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Any:
        return self._distribution(self.net(obs)[0], action_masks)

    def predict_values(self, obs: Any) -> th.Tensor:
        values: th.Tensor = self.net(obs)[1][:, None]
        return values
