"""Pictures and videos of an agent at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.agent import Agent
from agents.evaluation import MOST_STEPS
from llmsched_env.errors import InputError, unknown
from llmsched_env.files import require_writable_file, writing
from llmsched_env.simulation import Result

_KINDS = (".mp4", ".gif", ".png")


def record(
    agent: Agent,
    path: str | Path,
    *,
    scenario: Any = None,
    seed: int,
    most_frames: int = 300,
    fps: int = 15,
) -> dict[str, float]:
    """Play an episode and draw it.

    Args:
        path: of an .mp4 or .gif of the whole episode, or a .png of its end.
        scenario: None: that it was trained on. seed: of the episode, as `reset(seed=...)`.
        most_frames: pictures at most, spread evenly over the decisions. fps: pictures a second.

    Returns:
        The episode's metrics.

    Raises:
        InputError: another kind of file, or one that cannot be written.
    """
    path = Path(path)
    if path.suffix not in _KINDS:
        raise unknown("kind of picture", path.suffix, _KINDS)
    if most_frames < 1 or fps < 1:
        raise InputError("most_frames and fps must be 1 or more")
    require_writable_file(path)
    scenario = agent.scenario if scenario is None else scenario
    if path.suffix == ".png":
        frames, metrics = play(agent, scenario, seed, lambda step: False)
    else:
        # How long the episode is shows when it has been played; what is drawn does not change it.
        steps = len(play(agent, scenario, seed, None)[1]["steps"])
        every = max(1, -(-steps // most_frames))
        frames, metrics = play(agent, scenario, seed, lambda step: step % every == 0)
    _write(path, frames, fps)
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def play(
    agent: Agent, scenario: Any, seed: int, drawn: Any
) -> tuple[list[NDArray[np.uint8]], dict[str, Any]]:
    """The pictures before the steps for which `drawn(step)` and at the end, none if that is None; and the
    metrics, `steps` being the actions."""
    env: Any = gym.make(
        agent.env_id,
        scenario=scenario,
        render_mode=None if drawn is None else "rgb_array",
        max_steps=MOST_STEPS,
        **{name: value for name, value in agent.env_options.items() if name != "max_steps"},
    ).unwrapped
    seen, info = env.reset(seed=seed)
    frames: list[NDArray[np.uint8]] = []
    actions: list[Any] = []
    over = False
    while not over:
        if drawn is not None and drawn(len(actions)):
            frames.append(env.render())
        actions.append(agent.act(seen, env.action_masks()))
        seen, _, terminated, truncated, info = env.step(actions[-1])
        over = terminated or truncated
    if drawn is not None:
        frames.append(env.render())
    env.close()
    return frames, {**info["metrics"], "steps": actions}


def episode(agent: Agent, *, scenario: Any = None, seed: int) -> Result:
    """An episode as an agent plays it, with all decisions recorded.

    Args:
        scenario: None: that it was trained on. seed: of the episode, as `reset(seed=...)`.
    """
    env: Any = gym.make(
        agent.env_id,
        scenario=agent.scenario if scenario is None else scenario,
        record=True,
        max_steps=MOST_STEPS,
        **{name: value for name, value in agent.env_options.items() if name != "max_steps"},
    ).unwrapped
    seen, _ = env.reset(seed=seed)
    over = False
    while not over:
        seen, _, terminated, truncated, _ = env.step(agent.act(seen, env.action_masks()))
        over = terminated or truncated
    result: Result = env.result()
    env.close()
    return result


def _write(path: Path, frames: list[NDArray[np.uint8]], fps: int) -> None:
    with writing(path) as temporary:
        if path.suffix == ".png":
            import matplotlib.image

            matplotlib.image.imsave(temporary, frames[-1])
            return
        try:
            from moviepy import ImageSequenceClip
        except ImportError:
            raise InputError(
                'videos need "llmsched-env[render]"; a picture of the end (--output FILE.png) does not'
            ) from None
        frames = [*frames, *frames[-1:] * fps]  # the end is seen for a second
        clip = ImageSequenceClip(frames, fps=fps)
        if path.suffix == ".gif":
            clip.write_gif(str(temporary), logger=None)
        else:
            clip.write_videofile(str(temporary), logger=None, audio=False)
        clip.close()
