"""Agents: their networks, what is trained, how it is kept, and how a training goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
from llmsched_env.errors import InputError

th = pytest.importorskip("torch")
pytest.importorskip("sb3_contrib")

from agents import evaluation, training  # noqa: E402
from agents.agent import Agent, describe, weights_of  # noqa: E402
from agents.cli import main  # noqa: E402
from agents.config import Config, preset_names  # noqa: E402
from agents.evaluation import random_policy  # noqa: E402
from agents.imitation import demonstrate, imitate  # noqa: E402
from agents.networks import NETWORKS, Spec, build  # noqa: E402
from agents.ppo import SchedulingPPO, estimate, leave_one_out  # noqa: E402
from agents.runs import Run  # noqa: E402
from agents.sb3 import SB3VecEnv  # noqa: E402
from agents.sb3_policies import NetPolicy  # noqa: E402

IDS = ("llmsched/Decision-v0", "llmsched/Batch-v0", "llmsched/Dispatch-v0")
SMALL = {"waiting_slots": 5, "running_slots": 3, "chunk_levels": (64,)}


def lanes(env_id: str = IDS[0], num_envs: int = 6, **options: Any) -> SB3VecEnv:
    return SB3VecEnv.make(env_id, num_envs, **{"scenario": "toy", "observation": "flat", **options})


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("env_id", IDS)
def test_numpy_computes_what_torch_does(kind: str, env_id: str) -> None:
    env = lanes(env_id, scenario="azure-conv", **SMALL)
    spec = Spec.of(env.venv, kind, width=24, slot_width=16)
    th.manual_seed(0)
    net = build(spec)
    for p in net.parameters():  # heads begin near zero, which would hide errors
        p.data += 0.2 * th.randn_like(p)
    agent = Agent("a", env_id, {}, list(getattr(env.action_space, "nvec", [])), "toy", "latency_s",
                  describe(spec), weights_of(net))  # fmt: skip
    env.seed(3)
    seen = env.reset()
    policy = NetPolicy(env.observation_space, env.action_space, lambda _: 1e-3, spec=spec)
    policy.net.load_state_dict(net.state_dict())
    for _ in range(30):
        masks = env.action_masks().copy()
        with th.no_grad():
            logits, values = net(th.as_tensor(seen))
        ours, worth = agent.forward(seen)
        np.testing.assert_allclose(ours, logits.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(worth, values.numpy(), rtol=1e-4, atol=1e-4)
        actions = agent(seen, masks)
        np.testing.assert_array_equal(
            actions, policy.predict(seen, deterministic=True, action_masks=masks)[0]
        )
        single = agent.act(seen[0], masks[0])
        np.testing.assert_array_equal(single, actions[0])
        seen = env.step(actions)[0]


@pytest.mark.parametrize("kind", ("pointer", "attention"))
def test_who_stands_where_does_not_matter(kind: str) -> None:
    env = lanes(scenario="azure-conv", **SMALL)
    spec = Spec.of(env.venv, kind)
    th.manual_seed(1)
    net = build(spec)
    for p in net.parameters():
        p.data += 0.2 * th.randn_like(p)
    seen = th.rand(4, spec.num_features)
    seen[:, 20::12] = 1.0  # all present
    order = np.random.default_rng(0).permutation(spec.waiting)
    rows = seen[:, 20 : 20 + 12 * spec.waiting].view(4, spec.waiting, 12)
    other = seen.clone()
    other[:, 20 : 20 + 12 * spec.waiting] = rows[:, order].reshape(4, -1)
    with th.no_grad():
        (logits, value), (moved, same) = net(seen), net(other)
    levels = spec.actions[1]
    at = slice(2, 2 + spec.waiting * levels)
    np.testing.assert_allclose(same, value, atol=1e-5)
    np.testing.assert_allclose(
        moved[:, at].view(4, spec.waiting, levels),
        logits[:, at].view(4, spec.waiting, levels)[:, order],
        atol=1e-5,
    )


def test_an_empty_slot_says_nothing() -> None:
    spec = Spec.of(lanes(scenario="azure-conv", **SMALL).venv)
    net = build(spec)
    seen = th.rand(2, spec.num_features)
    seen[:, 20] = 0.0  # nobody in the first waiting slot
    other = seen.clone()
    other[:, 21:32] = 0.9
    with th.no_grad():
        assert th.equal(net(seen)[1], net(other)[1])


def test_networks_that_do_not_fit_are_refused() -> None:
    env = lanes()
    with pytest.raises(InputError, match="did you mean 'pointer'"):
        Spec.of(env.venv, "ponter")
    with pytest.raises(InputError, match="unlike the environment"):
        NetPolicy(env.observation_space, env.action_space, lambda _: 1.0, spec=Spec.of(lanes(**SMALL).venv))
    with pytest.raises(InputError, match="flat"):
        Spec.of(lanes(observation="dict").venv)


# ---------------------------------------------------------------------- advantages


def plain_estimate(
    r: Any, v: Any, starts: Any, last: Any, over: Any, dt: Any, rate: float, fade: float
) -> Any:
    out = np.zeros_like(r)
    steps, n = r.shape
    for i in range(n):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for u in range(t, steps):
                ends = over[i] if u == steps - 1 else starts[u + 1, i]
                after = last[i] if u == steps - 1 else v[u + 1, i]
                discount = 0.0 if ends else np.exp(-rate * dt[u, i])
                total += weight * (r[u, i] + discount * after - v[u, i])
                weight *= discount * (fade if dt[u, i] > 0 else 1.0)
                if ends:
                    break
            out[t, i] = total
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 3))
def test_advantages_are_sums_of_errors(seed: int, steps: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    r, v = rng.normal(size=(2, steps, n)).astype(np.float32)
    starts = (rng.random((steps, n)) < 0.2).astype(np.float32)
    dt = np.where(rng.random((steps, n)) < 0.5, 0.0, rng.exponential(size=(steps, n)))
    last, over = rng.normal(size=n).astype(np.float32), rng.random(n) < 0.5
    out = np.zeros((steps, n), np.float32)
    estimate(r, v, starts, last, over, dt, 0.3, 0.9, out)
    np.testing.assert_allclose(
        out, plain_estimate(r, v, starts, last, over, dt, 0.3, 0.9), rtol=1e-4, atol=1e-5
    )


def plain_leave_one_out(a: Any, episodes: Any, clocks: Any, group: int) -> Any:
    out = a.copy()
    steps, n = a.shape
    for i in range(n):
        for t in range(steps):
            found = []
            for j in range(i // group * group, i // group * group + group):
                before = [
                    u
                    for u in range(steps)
                    if j != i and episodes[u, j] == episodes[t, i] and clocks[u, j] <= clocks[t, i]
                ]
                found += [a[before[-1], j]] if before else []
            out[t, i] -= np.mean(found) if found else 0.0
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 15), st.sampled_from([1, 2, 3]))
def test_the_baseline_is_what_the_others_had(seed: int, steps: int, group: int) -> None:
    rng = np.random.default_rng(seed)
    n = 6
    starts = rng.random((steps, n)) < 0.2
    episodes = np.cumsum(starts, axis=0)
    clocks = np.zeros((steps, n))
    for i in range(n):  # clocks go on within an episode, and begin again with the next
        for t in range(1, steps):
            clocks[t, i] = 0.0 if starts[t, i] else clocks[t - 1, i] + rng.choice([0.0, 0.5, 1.0])
    a = rng.normal(size=(steps, n)).astype(np.float32)
    out = a.copy()
    leave_one_out(a, episodes, clocks, group, out)
    np.testing.assert_allclose(out, plain_leave_one_out(a, episodes, clocks, group), atol=1e-5)


def test_lanes_of_a_group_share_their_requests() -> None:
    env = lanes(scenario="azure-conv", num_requests=8)
    model = SchedulingPPO(NetPolicy, env, group=3, n_steps=16, policy_kwargs={"spec": Spec.of(env.venv)})
    model.begin([5, 6])
    seeds = env.venv.unwrapped.episode_seeds  # type: ignore[attr-defined]
    assert len(set(seeds[:3])) == len(set(seeds[3:])) == 1 != len(set(seeds))
    with pytest.raises(InputError, match="groups of 4"):
        SchedulingPPO(NetPolicy, env, group=4, policy_kwargs={"spec": Spec.of(env.venv)})


def test_it_learns_as_sb3_has_it() -> None:
    env = lanes(num_envs=8)
    spec = dataclasses.asdict(Spec.of(env.venv))
    model = SchedulingPPO(NetPolicy, env, n_steps=64, batch_size=256, policy_kwargs={"spec": spec}).learn(
        2048
    )
    assert model.num_timesteps == 2048 and len(model.finished["latency_s"]) > 0
    assert model.shares.sum() == 2048


# ---------------------------------------------------------------------- configurations


def test_configurations_come_back_from_yaml(tmp_path: Path) -> None:
    config = Config("slo-mix", objective="goodput", curriculum=((0.0, 0.7), (0.5, 1.1))).replace(
        chunk_levels=(128, 512), load=0.9, learning_rate=1e-3
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    again = Config.from_yaml(tmp_path / "c.yaml")
    assert again.to_dict() == config.to_dict()
    assert again.env_options["load"] == 0.9


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_configurations(name: str) -> None:
    assert Config.preset(name).updates > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algo": "dqn"}, "unknown algo"),
        ({"env": "CartPole-v1"}, "unknown environment"),
        ({"scenario": "azure-con"}, "did you mean 'azure-conv'"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"num_envs": 10, "lanes_per_trace": 4}, "cannot be shared out"),
        ({"metric": "speed"}, "unknown metric"),
        ({"chunk_levels": (5, 1)}, "chunk_levels"),
        ({"curriculum": ((0.5, 1.0), (0.2, 1.0))}, "curriculum"),
        ({"env_options": {"objective": "goodput"}}, "settles that itself"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Config().replace(**changes)


@pytest.mark.parametrize("text", ("a: [", "- 1", "stepz: 3", "steps: many", "!!python/object:os.system {}"))
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml"):
        Config.from_yaml(tmp_path / "c.yaml")


# ---------------------------------------------------------------------- training

SIZES = {"num_envs": 8, "n_steps": 32, "batch_size": 64, "epochs": 2, "width": 16, "slot_width": 8}
TINY = Config("toy", steps=6 * 8 * 32).replace(**SIZES, segment=2, validation_episodes=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return training.train(TINY, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_what_it_did(whole: Run) -> None:
    rows = whole.read_rows("metrics")
    assert [int(row["steps"]) for row in rows] == [256 * (i + 1) for i in range(6)]
    assert all(float(row["time/decisions_per_s"]) > 0 for row in rows)
    assert [int(row["steps"]) for row in whole.read_rows("validation")] == [0, 512, 1024, 1536]
    assert len(whole.checkpoints()) == 2
    about = json.loads((whole.folder / "about.json").read_text())
    assert about["torch"] and "git_commit" in about
    assert any((whole.folder / "tensorboard").iterdir())
    agent = Agent.load(whole.folder)
    assert agent.about["config"]["scenario"] == "toy"
    assert agent.scenario == "toy"


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY.replace(stagger=20),
        TINY.replace(teacher="vllm-v1", teacher_rounds=1, lanes_per_trace=4, fresh=True),
        TINY.replace(
            reward_scale="trace", curriculum=((0.0, 0.5), (0.6, 1.0)), scenario="azure-conv", num_requests=12
        ),
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, config: Config) -> None:
    unbroken = training.train(config, tmp_path / "unbroken").load()

    def killed(progress: training.Progress) -> None:
        if progress.steps == 256 * 3:  # in the middle of the second segment
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(config, tmp_path / "broken", progress=killed)
    (tmp_path / "broken" / "checkpoints" / ".000000001024").mkdir()  # half of a checkpoint
    again = training.resume(tmp_path / "broken")
    assert not list((tmp_path / "broken" / "checkpoints").glob(".*"))
    resumed = again.load()
    assert unbroken is not None and resumed is not None
    assert {k: v for k, v in unbroken.state.items() if k != "sha256"} == {
        k: v for k, v in resumed.state.items() if k != "sha256"
    }
    for mine, other in (
        (unbroken.weights, resumed.weights),
        (unbroken.optimizer, resumed.optimizer),
        (unbroken.lanes, resumed.lanes),
    ):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name])
    assert [int(row["steps"]) for row in again.read_rows("metrics")] == [256 * (i + 1) for i in range(6)]


def test_a_damaged_checkpoint_is_passed_over(whole: Run, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    first, last = run.checkpoints()
    (last / "weights.npz").write_bytes((last / "weights.npz").read_bytes()[:-50])
    found = run.load()
    assert found is not None and found.state["steps"] == int(first.name)
    (first / "state.json").write_text("{")
    with pytest.raises(InputError, match="train anew"):
        run.load()


def test_a_run_is_not_written_over(whole: Run) -> None:
    with pytest.raises(InputError, match="--resume"):
        training.train(TINY, whole.folder)
    with pytest.raises(InputError, match="no config"):
        training.resume(whole.folder / "agent")


def test_a_run_that_failed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", TINY.replace(seed=1))
    (tmp_path / "run" / "metrics.csv").write_text("steps\n7\n")
    run = training.train(TINY.replace(steps=256), tmp_path / "run")
    assert Run.open(tmp_path / "run").config.seed == 0
    assert [int(row["steps"]) for row in run.read_rows("metrics")] == [256]


def test_two_do_not_train_in_one_folder(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", TINY)
    code = f"""
import agents.runs, sys
with agents.runs.Run.open({str(tmp_path / "run")!r}).claimed():
    print("mine", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "mine\n"
        for begin in (lambda: training.resume(run.folder), lambda: training.train(TINY, run.folder)):
            with pytest.raises(InputError, match="another process trains"):
                begin()
        other.stdin.close()
    with run.claimed():  # it let go
        pass


def test_a_full_disk_says_which_table_could_not_be_written(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", TINY)
    (run.folder / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write .*metrics\.csv: No space left"):
        run.write_row("metrics", {"steps": 1})


def test_a_folder_without_a_run_cannot_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--scenario", "toy", "--run", str(tmp_path), "--resume"]) == 2
    assert "is not the folder of a run: there is no config.yaml in it" in capsys.readouterr().err


def test_a_table_of_another_version_is_not_mixed_up(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", TINY)
    run.write_row("metrics", {"steps": 1, "gain": 2.0})
    with pytest.raises(InputError, match=r"metrics\.csv has other columns: another version began this run"):
        run.write_row("metrics", {"steps": 2, "ttft_s": 0.1, "gain": 3.0})
    assert run.read_rows("metrics") == [{"steps": "1", "gain": "2.0"}]
    run.drop_rows("metrics", 0)
    run.write_row("metrics", {"steps": 1, "ttft_s": 0.1, "gain": 2.0})


def test_divergence_stops_a_training(tmp_path: Path) -> None:
    wild = TINY.replace(learning_rate=1.0, value_weight=100.0, max_grad_norm=1e6, target_kl=0.0, segment=1)

    def poison(progress: training.Progress) -> None:
        trainer.model.policy.net.value.bias.data[:] = float("nan")  # type: ignore[union-attr]

    trainer = training.Trainer(wild)
    run = Run.create(tmp_path / "run", wild)
    with pytest.raises(training.Diverged, match="not finite; lower learning_rate"):
        trainer.run(run, poison)
    assert Agent.load(tmp_path / "run").name == "run"


def test_a_teacher_is_imitated() -> None:
    options: dict[str, Any] = {"scenario": "azure-conv", "num_requests": 20, **SMALL}
    shown = demonstrate("vllm-v1", IDS[0], num_episodes=8, seed=0, **options)
    assert len(shown.seen) == len(shown.returns) == len(shown.actions)
    assert np.take_along_axis(shown.masks, shown.actions[:, None], 1).all()  # it does what is legal
    env = lanes(**options)
    th.manual_seed(0)
    policy = NetPolicy(env.observation_space, env.action_space, lambda _: 1e-3, spec=Spec.of(env.venv))
    before = imitate(policy, shown, epochs=1, batch_size=10**6, seed=0)
    after = imitate(policy, shown, epochs=30, batch_size=64, seed=0)
    assert after > max(0.8, before)


CORRECTED: dict[str, Any] = {"scenario": "azure-conv", "num_requests": 20, "hold": "known", **SMALL}


@pytest.mark.parametrize("env_id", IDS[:2])
def test_a_teacher_says_what_it_would_do_where_its_student_is(env_id: str) -> None:
    def random() -> Any:
        return random_policy(gym.make(env_id, **CORRECTED).action_space)

    shown = demonstrate("sjf-prompt", env_id, num_episodes=3, seed=0, student=random(), **CORRECTED)
    teacher, student = baselines.expert("sjf-prompt", strict=False), random()
    env = evaluation.make(env_id, 3, observation="flat", **CORRECTED).unwrapped
    seen, _ = env.reset(seed=[0, 1, 2])
    at, over = 0, np.zeros(3, np.bool_)
    while not over.all():
        rows = slice(at, at + int((~over).sum()))
        np.testing.assert_array_equal(shown.seen[rows], seen[~over])
        np.testing.assert_array_equal(shown.actions[rows], np.asarray(teacher(env))[~over])
        actions = np.asarray(teacher(env))
        actions[~over] = student(seen[~over], env.action_masks()[~over])
        seen, _, terminated, truncated, _ = env.step(actions)
        over |= terminated | truncated
        at = rows.stop
    assert at == len(shown.seen) == len(shown.returns)
    options = {**CORRECTED, "most_steps": 7, "student": random()}
    assert len(demonstrate("sjf-prompt", env_id, num_episodes=3, seed=0, **options).seen) == 3 * 7


def test_a_student_takes_its_share_of_decisions() -> None:
    """Of 0 none, so the teacher plays; of a half some, which shows in where they get to."""

    def played(share: float) -> Any:
        student = random_policy(gym.make(IDS[0], **CORRECTED).action_space)
        return demonstrate(
            "sjf-prompt", IDS[0], num_episodes=3, seed=0, student=student, share=share, **CORRECTED
        )

    alone = demonstrate("sjf-prompt", IDS[0], num_episodes=3, seed=0, **CORRECTED)
    none, half, again, all_of_them = (played(share).seen for share in (0.0, 0.5, 0.5, 1.0))
    np.testing.assert_array_equal(none, alone.seen)
    np.testing.assert_array_equal(half, again)
    assert not np.array_equal(half, none) and not np.array_equal(half, all_of_them)


def test_rounds_of_corrections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[bool, int]] = []  # whether a student played, how much all was that was learned from
    shares = []

    def listen(*args: Any, student: Any = None, share: float, **options: Any) -> Any:
        told.append((student is not None, 0))
        shares.append(share)
        return demonstrate(*args, student=student, share=share, **options)

    def learn(policy: Any, shown: Any, **options: Any) -> float:
        told[-1] = (told[-1][0], len(shown.seen))
        return imitate(policy, shown, **options)

    monkeypatch.setattr(training, "demonstrate", listen)
    monkeypatch.setattr(training, "imitate", learn)
    config = TINY.replace(teacher="vllm-v1", teacher_episodes=2, teacher_rounds=2, steps=1)
    training.train(config, tmp_path / "run")
    assert [student for student, _ in told] == [False, True, True]
    assert shares[1:] == [0.5, 1.0]
    assert 0 < told[0][1] < told[1][1] < told[2][1]
    for refused in (
        lambda: demonstrate("optimum", IDS[0], "toy", 2, seed=0, student=lambda seen, masks: masks.argmax(1)),
        lambda: Config(teacher="optimum", teacher_rounds=1),
        lambda: Config(teacher_rounds=1),
    ):
        with pytest.raises(InputError, match="teacher_rounds=0"):
            refused()


def test_a_teacher_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    for teacher, complaint in (("orca", "make it with hold='model-len'"), ("vllm-v9", "unknown scheduler")):
        with pytest.raises(InputError, match=complaint):
            training.train(TINY.replace(teacher=teacher), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_optimum_can_teach() -> None:
    shown = demonstrate("optimum", IDS[0], "toy", 2, seed=0)
    assert len(shown.seen) > 4
    with pytest.raises(InputError, match="unknown scheduler"):
        demonstrate("vllm-v9", IDS[0], "toy", 2, seed=0)


# ---------------------------------------------------------------------- agents on disk


def test_agents_come_back(whole: Run, tmp_path: Path) -> None:
    agent = Agent.load(whole.folder)
    agent.save(tmp_path / "copy")
    again = Agent.load(tmp_path / "copy" / "agent.json")
    assert again.env_options == agent.env_options and again.network == agent.network
    for name in agent.weights:
        np.testing.assert_array_equal(agent.weights[name], again.weights[name])
    fresh = agent.untrained(3)
    assert any((fresh.weights[name] != agent.weights[name]).any() for name in agent.weights)


def damaged(folder: Path, how: str) -> None:
    said = json.loads((folder / "agent.json").read_text())
    with np.load(folder / "weights.npz") as arrays:
        weights = dict(arrays)
    name = next(iter(weights))
    if how == "cut":
        (folder / "weights.npz").write_bytes((folder / "weights.npz").read_bytes()[:100])
    elif how == "nan":
        weights[name] = np.full_like(weights[name], np.nan)
    elif how == "shape":
        weights[name] = weights[name][..., :1]
    elif how == "code":
        np.savez(folder / "weights.npz", **{**weights, name: np.array([print], object)})
    elif how == "missing":
        (folder / "weights.npz").unlink()
    elif how == "format":
        said["format"] = 99
    elif how == "lacks":
        del said["network"]
    elif how == "network":
        said["network"]["kind"] = "rnn"
    elif how == "json":
        (folder / "agent.json").write_text("{")
    if how in ("nan", "shape"):
        np.savez(folder / "weights.npz", **weights)
    if how in ("format", "lacks", "network"):
        (folder / "agent.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    "how", ("cut", "nan", "shape", "code", "missing", "format", "lacks", "network", "json")
)
def test_damaged_agents_are_refused(whole: Run, tmp_path: Path, how: str) -> None:
    shutil.copytree(whole.folder / "agent", tmp_path / "agent")
    damaged(tmp_path / "agent", how)
    with pytest.raises(InputError, match=r"agent"):
        Agent.load(tmp_path / "agent")


def test_what_is_no_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an agent"):
        Agent.load(tmp_path)
    with pytest.raises(InputError, match="unknown pretrained agent"):
        Agent.pretrained("nobody")


def test_an_agent_says_what_it_reads(whole: Run) -> None:
    with pytest.raises(InputError, match="flat observations of"):
        Agent.load(whole.folder)(np.zeros((1, 7), np.float32), np.ones((1, 3), np.bool_))


# ---------------------------------------------------------------------- the command line


def test_train_evaluate_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    small = ["--set", "num_envs=8", "--set", "n_steps=32", "--set", "segment=2", "--set", "width=16"]
    assert main(["train", "--scenario", "toy", "--steps", "512", "--run", run, *small, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 512 and said["metric"] == "latency_s"
    assert main(["train", "--run", run, "--resume"]) == 0  # there is nothing left to do
    capsys.readouterr()
    policies = ["--policy", "vllm-v1", "--policy", run, "--policy", f"untrained:{run}"]
    assert main(["evaluate", *policies, "--scenario", "toy", "--episodes", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["policies"]
    assert [row["policy"] for row in rows][:2] == ["vllm-v1", "run"] and len(rows) == 3
    assert main(["watch", run, "--output", str(tmp_path / "end.png")]) == 0
    assert (tmp_path / "end.png").read_bytes().startswith(b"\x89PNG")
    assert main(["train", "--run", run, "--resume", "--steps", "9"]) == 2
    assert main(["train", "--scenario", "toy", "--run", run]) == 2
    assert main(["train", "--scenario", "toy", "--set", "lerning_rate=1"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err
