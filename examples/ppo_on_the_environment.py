"""Any Gymnasium agent on autoprune's environment: Stable-Baselines3's PPO learns which units a network can spare.

python examples/ppo_on_the_environment.py
"""

from stable_baselines3 import PPO

import autoprune
from autoprune.evaluate import Scoring
from autoprune.tasks import fashion_mnist_resnet20

task = fashion_mnist_resnet20.make_task(data="shipped")
env = autoprune.environment(task, budget="flops_50pct", scoring=Scoring(images=300))
agent = PPO("MlpPolicy", env, n_steps=5 * len(env.space.groups), batch_size=12, gamma=1.0, seed=0, device="cpu")
agent.learn(total_timesteps=20 * len(env.space.groups))

seen, _ = env.reset()
done = False
while not done:
    action, _ = agent.predict(seen, deterministic=True)
    seen, reward, done, _, info = env.step(action)
print(f"accuracy {reward:.4f} on the search split, BN recalibrated only, at half the MACs")
for group, ratio in env.space.named(info["ratios"]).items():
    print(f"{group:16} {ratio:.2f}")
