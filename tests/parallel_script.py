"""Run by test_distributed.py under torchrun: a small run of which a rank may be killed.

parallel_script.py OUT --way hand|fsdp --checkpoint FOLDER [--at STEP --victim RANK]
parallel_script.py OUT --fit ddp|fsdp
"""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch import nn

from ftbook.distributed import train_parallel
from ftbook.train import Settings, fit, is_main


def whole(model):
    """The weights, put together by all processes where they are cut."""
    return {k: getattr(v, "full_tensor", v.clone)() for k, v in model.state_dict().items()}


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)).double()
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(44, 6, generator=draws, dtype=torch.float64)
    return net, (x, torch.randint(0, 3, (44,), generator=draws))


def fitted(parallel):
    """The weights after three epochs without dropout, which is drawn for each process."""
    net, data = problem()
    net[2].p = 0.0
    plan = Settings(parallel=parallel, precision="fp32", progress=False, device="cpu")
    history = fit(net, data, epochs=3, batch_size=11, lr=0.05, settings=plan)
    return whole(net), history["train_loss"], history.settings["processes"]


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--fit")
    parser.add_argument("--way", default="hand")
    parser.add_argument("--checkpoint")
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--victim", type=int, default=0)
    args = parser.parse_args(argv)
    if args.fit:
        weights, losses, ranks = fitted(args.fit)
        if is_main():
            torch.save({"weights": weights, "losses": losses, "ranks": ranks}, args.out)
        return
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def watch(step):
        if (attempt, step, dist.get_rank()) == ("0", args.at, args.victim):
            os.kill(os.getpid(), signal.SIGKILL)

    about = {"steps": 6, "batch_size": 11, "lr": 0.05, "checkpoint": args.checkpoint, "every": 2, "watch": watch}
    found = train_parallel(*problem(), parallel=args.way, **about)
    if is_main():
        told = {"weights": found.weights, "start": found.start}
        torch.save(told | {"ranks": dist.get_world_size(), "attempt": int(attempt)}, args.out)


if __name__ == "__main__":
    main()
