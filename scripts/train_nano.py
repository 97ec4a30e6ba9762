"""Trains the embedded model `nano`, a tiny Kimi-VL, on generated pictures and questions.

The network is transformers' own ``Kimi_K25ForConditionalGeneration``, trained by one process of one thread per core
with averaged gradients. Everything is seeded and every schedule counts steps, so a second run gives the same model up
to rounding in floating point. A step takes each process about 0.75 seconds, the whole about 50 minutes on two cores.

    python scripts/train_nano.py nano-run            # train, then write nano-run/model
    python scripts/train_nano.py nano-run --resume   # continue after an interruption
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from nano_kit.chat import generator, load_vocabulary, make_batch, train_vocabulary
from nano_kit.evaluation import held_out, jobs, right_answers
from nano_kit.lesson import Lesson
from nano_kit.network import CONFIG, new_network, run
from nano_kit.pictures import LABELS
from nano_kit.publish import write_model
from nano_kit.questions import KINDS, SIDES, converse

CHECKPOINT, VOCABULARY_FILE = "checkpoint.pt", "tiktoken.model"
ADAM_LR, MUON_LR, BIAS_STEP = 3e-3, 4e-3, 2e-3
RATE_STEPS, RATES = (-1, 99, 1800, 3000, 3050, 3700), (0.0, 1.0, 1.0, 0.0, 0.35, 0.0)  # linear between
STEPS = RATE_STEPS[-1]
EASY = 360  # until this step, few shapes and digits
FULL = 3000  # from this step on, more shapes, and descriptions come first
LABEL_WEIGHT = 0.3  # of the loss that asks the tower's output what begins at each patch
LESSON_FROM = 1500  # from this step on, when it can see, two attention heads are taught where to look
LESSON_WEIGHT = 0.1  # of that loss
TELLING_WEIGHT = 3.0  # of the tokens that an answer turns on
CLIP = 1.0


class Muon:
    """Momentum steps made orthogonal by Newton-Schulz iteration, scaled by 0.2 sqrt(longer side) as for Moonlight.

    Matrices of equal shape, those of stacked experts among them, are handled as one batch.
    """

    def __init__(self, parameters: Iterable[Tensor], momentum: float = 0.95, decay: float = 0.02):
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for p in parameters:
            self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
        self.state = {
            shape: torch.zeros(sum(p.numel() for p in ps) // (shape[0] * shape[1]), *shape)
            for shape, ps in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Each process makes its share of the matrices orthogonal, and one message hands the results around."""
        rank, processes = dist.get_rank(), dist.get_world_size()
        updates = []
        for shape, parameters in self.groups.items():
            gradient = torch.cat([p.grad.reshape(-1, *shape) for p in parameters if p.grad is not None])
            running = self.state[shape].lerp_(gradient, 1 - self.momentum)
            mine = gradient.lerp(running, self.momentum)[rank::processes]
            update = torch.zeros_like(gradient)
            update[rank::processes] = _orthogonal(mine) * (0.2 * max(shape) ** 0.5)
            updates.append(update.flatten())
        flat = torch.cat(updates)
        dist.all_reduce(flat)
        everyone = [p for parameters in self.groups.values() for p in parameters]
        for p, update in zip(everyone, flat.split([p.numel() for p in everyone])):
            p.mul_(1 - lr * self.decay).sub_(update.view_as(p), alpha=lr)


def _orthogonal(x: Tensor) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Trainer:
    """One of several equal processes: each draws its share of a batch, all apply the mean gradient."""

    def __init__(self, args: argparse.Namespace, rank: int):
        self.args, self.rank, self.step = args, rank, 0
        self.encode = load_vocabulary(args.out / VOCABULARY_FILE)
        self.network = new_network(args.seed)
        self.lesson = Lesson(self.network)
        self.labeller = torch.nn.Linear(CONFIG["vision_config"]["hidden_size"], sum(LABELS))
        self.gates: list[Any] = [layer.mlp.gate for layer in self.network.model.language_model.layers[1:]]
        for gate in self.gates:
            gate.register_forward_hook(_note_load)
        by_adam = ("embed_tokens", "lm_head", "patch_embed", "gate.weight")
        matrices = [
            p
            for name, p in self.network.named_parameters()
            if p.ndim >= 2 and not any(part in name for part in by_adam)
        ]
        self.parameters = [*self.network.parameters(), *self.labeller.parameters()]
        taken = set(map(id, matrices))
        self.muon = Muon(matrices)
        others = [p for p in self.parameters if id(p) not in taken]
        self.adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01)
        self.class_weights = [torch.tensor([0.1] + [1.0] * (n - 1)) for n in LABELS]

    def train(self) -> None:
        started, first = time.time(), self.step
        while self.step < STEPS:
            losses = self.update()
            if self.step % 100 == 0:
                rate = (self.step - first) * self.args.batch / (time.time() - started)
                self.say(f"step {self.step}  {rate:.0f}/s  loss " + "  ".join(f"{x:.4f}" for x in losses))
            if self.step % self.args.every == 0 or self.step == STEPS:
                self.save()
                self.say(json.dumps(self.accuracy(4)))

    def update(self) -> list[float]:
        """One step of the optimisers; the mean losses of answers, labels and looks."""
        args = self.args
        grid_rng = generator(
            "grid", args.seed, self.step
        )  # one for all processes, so that none waits for another
        grid = grid_rng.choice(SIDES), grid_rng.choice(SIDES)
        rng = generator("training", args.seed, self.step, self.rank)
        level = "easy" if self.step < EASY else "usual" if self.step < FULL else "full"
        chats = [converse(rng, grid, level=level) for _ in range(args.batch // args.processes)]
        batch = make_batch(self.encode, chats, TELLING_WEIGHT)
        weights = F.pad(torch.from_numpy(batch.weights)[:, 1:], (0, 1))
        targets = F.pad(torch.from_numpy(batch.ids)[:, 1:], (0, 1))
        where = weights > 0
        self.lesson.give(batch.looks if self.step >= LESSON_FROM else ())
        logits, seen = run(self.network, batch, where)
        sheets = () if seen is None else self.labeller(seen).split(LABELS, dim=-1)
        each = F.cross_entropy(logits, targets[where], reduction="none")
        answers = (each * weights[where]).sum() / weights.sum()
        labels = torch.zeros(())
        for plane, sheet in enumerate(sheets):
            wanted = torch.from_numpy(batch.labels[:, plane])
            labels = labels + F.cross_entropy(sheet, wanted, self.class_weights[plane])
        looks = self.lesson.loss
        (answers + LABEL_WEIGHT * labels + LESSON_WEIGHT * looks).backward()
        loads, losses = self._average(torch.stack([answers, labels, looks]).detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        factor = float(np.interp(self.step, RATE_STEPS, RATES))
        self.adam.param_groups[0]["lr"] = factor * ADAM_LR
        self.adam.step()
        self.muon.step(factor * MUON_LR)
        self.adam.zero_grad()
        self.network.zero_grad()
        for gate, load in zip(self.gates, loads):  # balance without a loss: the bias moves against the load
            gate.e_score_correction_bias += BIAS_STEP * factor * torch.sign(load.mean() - load)
        self.step += 1
        return losses.tolist()

    def _average(self, losses: Tensor) -> tuple[list[Tensor], Tensor]:
        """Averages gradients, the experts' loads and `losses` over the processes, in one message."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        parts = [*gradients, *(gate.load for gate in self.gates), losses]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        *means, losses = (flat / self.args.processes).split([part.numel() for part in parts])
        for p, gradient in zip(self.parameters, means):
            p.grad = gradient.view_as(p)
        return means[len(self.parameters) :], losses

    def accuracy(self, each: int) -> dict[str, float]:
        """Exact answers per kind on `each` held-out questions per picture size, the work shared by all processes."""
        hits = torch.zeros(len(KINDS), 2)
        self.lesson.give(())
        for kind, grid in jobs()[self.rank :: self.args.processes]:
            right = right_answers(self.network, self.encode, held_out(kind, grid, each))
            hits[KINDS.index(kind)] += torch.tensor([right.sum(), right.size])
        dist.all_reduce(hits)
        return {kind: round((right / n).item(), 3) for kind, (right, n) in zip(KINDS, hits)}

    def save(self) -> None:
        """Everything that a resumed run needs; the file is there only when it is whole."""
        if self.rank == 0:
            part = self.args.out / (CHECKPOINT + ".part")
            state = {name: getattr(self, name).state_dict() for name in ("network", "labeller", "adam")}
            torch.save(state | {"muon": self.muon.state, "step": self.step}, part)
            os.replace(part, self.args.out / CHECKPOINT)

    def resume(self) -> None:
        state = torch.load(self.args.out / CHECKPOINT)
        for name in ("network", "labeller", "adam"):
            getattr(self, name).load_state_dict(state[name])
        self.muon.state, self.step = state["muon"], state["step"]
        self.say(f"continuing after step {self.step}")

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


def _note_load(gate: Any, args: tuple, out: tuple[Tensor, Tensor, Tensor]) -> None:
    gate.load = torch.bincount(out[2].flatten(), minlength=gate.e_score_correction_bias.numel()).float()


def work(rank: int, args: argparse.Namespace) -> None:
    """One process, of one thread: small operators gain little from a second thread, and stall under load."""
    torch.set_num_threads(1)
    meeting = f"file://{args.out.resolve()}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    trainer = Trainer(args, rank)
    if args.resume:
        trainer.resume()
    trainer.train()
    if rank == 0:
        write_model(args.out / "model", trainer.network.state_dict(), args.out / VOCABULARY_FILE)
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for the checkpoint and the finished model")
    parser.add_argument("--batch", type=int, default=32, help="conversations per step, over all processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps from one checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUT")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        train_vocabulary(args.out / VOCABULARY_FILE)
    (args.out / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(work, (args,), args.processes)


if __name__ == "__main__":
    main()
