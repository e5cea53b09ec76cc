"""Stochastic gradient Hamiltonian Monte Carlo: draws from the posterior by a noisy, heavy ball."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import Inference
from .posterior import SampledPosterior


if TYPE_CHECKING:
    from ..trainer import PriorTrainer


class Sghmc(Inference):
    """Chen et al. (2014), with the cyclical step sizes of Zhang et al. (2020); Langevin dynamics at `friction=1`.

    The learning rate is the standard deviation of a step in prior standard deviations. Each cycle begins with large steps
    without noise, which find a mode, and ends with small ones with noise, of which draws are kept, evenly spaced.

    Args:
        num_samples: Draws kept over all cycles, >= 1.
        cycles: >= 1, at most `num_samples`.
        friction: Share of the momentum lost in a step, in (0, 1].
        exploration: Share of each cycle without noise, in [0, 1).

    Raises:
        ValueError: A setting is out of range.
    """

    samples, alone = True, True
    prior_weight = 0.1
    learning_rate = 0.03

    def __init__(
        self, num_samples: int = 16, cycles: int = 2, friction: float = 0.1, exploration: float = 0.5
    ) -> None:
        if not isinstance(num_samples, int) or not isinstance(cycles, int) or not 1 <= cycles <= num_samples:
            raise ValueError(f"cycles must be an integer in [1, num_samples={num_samples}], got {cycles}")
        if not 0 < friction <= 1:
            raise ValueError(f"friction must be in (0, 1], got {friction}")
        if not 0 <= exploration < 1:
            raise ValueError(f"exploration must be in [0, 1), got {exploration}")
        self.num_samples, self.cycles = num_samples, cycles
        self.friction, self.exploration = friction, exploration

    def optimizer(self, trainer: "PriorTrainer") -> Optimizer:
        encoder = trainer.model.prompt_encoder[trainer.adapter_names[0]]
        # The loss is an energy in nats per supervised token: times N / T it is −log p(z | data).
        scale = trainer.num_supervised_tokens / trainer.model.active_peft_config.prior_weight

        def is_noisy() -> bool:
            return self._position(trainer.state.global_step, trainer.state.max_steps)[1] >= self.exploration

        args = trainer.args
        return HamiltonianMonteCarlo(
            [encoder.coordinate], args.learning_rate, self.friction, scale, is_noisy, args.seed
        )

    def schedule(self, step: int, steps: int) -> float:
        # Of the step's variance, as Zhang et al. have it.
        return math.sqrt((math.cos(math.pi * self._position(step, steps)[1]) + 1) / 2)

    def step(self, trainer: "PriorTrainer") -> None:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        if step not in self.kept_steps(steps):
            return
        encoder = trainer.model.prompt_encoder[trainer.adapter_names[0]]
        draw = encoder.coordinate.detach().clone()[None]
        draws = draw if encoder.posterior is None else torch.cat([encoder.posterior.draws, draw])
        encoder.posterior = SampledPosterior(draws)

    def finish(self, trainer: "PriorTrainer") -> None:
        encoder = trainer.model.prompt_encoder[trainer.adapter_names[0]]
        if encoder.posterior is not None:
            with torch.no_grad():
                encoder.coordinate.copy_(encoder.posterior.draws.mean(0))

    def kept_steps(self, steps: int) -> set[int]:
        """The steps after which a draw is kept: the last of each cycle, and others of its noisy part, evenly spaced."""
        kept = set()
        for cycle in range(self.cycles):
            start, end = (round(steps * place / self.cycles) for place in (cycle, cycle + 1))
            count = (cycle + 1) * self.num_samples // self.cycles - cycle * self.num_samples // self.cycles
            span = (end - start) * (1 - self.exploration)
            kept |= {round(end - span * number / count) for number in range(count)}
        return kept

    def _position(self, step: int, steps: int) -> tuple[int, float]:
        """The cycle that a step belongs to, and how much of it has gone by, in [0, 1)."""
        progress = self.cycles * step / max(1, steps)
        return int(progress), progress % 1.0


class HamiltonianMonteCarlo(Optimizer):
    r"""v ← (1 − α) v − η ∇U(z) + N(0, 2 α η), z ← z + v: equation 15 of Chen et al. (2014), with β̂ = 0.

    Args:
        params: z.
        lr: √η, about the standard deviation of a step.
        friction: α in (0, 1]; 1 is Langevin dynamics with step η.
        scale: What the gradient is multiplied by to become ∇U, in nats.
        is_noisy: Whether a step has noise; always if None.
        seed: Of the noise, which is the same on all processes and in a run that is resumed.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        friction: float,
        scale: float = 1.0,
        is_noisy: Callable[[], bool] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "friction": friction, "step": 0})
        # None of a checkpoint's: a chain that goes on with another temperature or other data has its own energy.
        self._scale, self._is_noisy, self._seed = scale, is_noisy, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        noisy = self._is_noisy is None or self._is_noisy()
        for group in self.param_groups:
            variance, friction = group["lr"] ** 2, group["friction"]
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + group["step"])
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                velocity: Tensor = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(1 - friction).sub_(parameter.grad, alpha=variance * self._scale)
                if noisy:
                    noise = torch.randn(velocity.shape, generator=generator).to(velocity)
                    velocity.add_(noise, alpha=math.sqrt(2 * friction * variance))
                parameter.add_(velocity)
        return loss
