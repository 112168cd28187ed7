"""Say what a run would need on a cluster, and train its smallest relative in this process.

The corpus is made of the Python installation's own text, once, in the folder `data`. That takes processes of its own,
which read this file again: what trains stands below `if __name__ == "__main__"`.
"""

import mythos_ds

ONE_PROCESS = ["parallel.ep_size=1", "parallel.zero_stage=0", "deepspeed.zero_optimization=null"]
SHORT = ["training.max_steps=3", "training.warmup_steps=1", "training.eval_batches=1", "monitor.sample_tokens=4"]

if __name__ == "__main__":
    plan = mythos_ds.plan_run("10b")
    print(plan)
    print("fits:", plan.fits, "days:", [round(cost["days"], 1) for cost in plan.numbers["costs"]])

    config = mythos_ds.load_config("tiny", ONE_PROCESS)
    run = mythos_ds.pretrain(config, run_dir="run", overrides=SHORT)
    print(mythos_ds.generate(run, "def main(", new_tokens=16))
