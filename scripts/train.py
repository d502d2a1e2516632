"""Train an agent in ten lines, as `llmsched train --scenario toy` does."""

from agents.agent import Agent
from agents.config import Config
from agents.evaluation import evaluate
from agents.training import train

config = Config.of_scenario("toy").replace(steps=200_000)
run = train(config, "runs/train-py", progress=lambda now: print(f"{now.steps:,}", now.metric))
agent = Agent.load(run.folder)
for policy in ("vllm-v1", agent):
    found = evaluate(
        policy, scenario="toy", num_episodes=64, **(agent.env_options if policy is agent else {})
    )
    print(policy if policy == "vllm-v1" else agent.name, found["latency_s"].mean(), "s")
