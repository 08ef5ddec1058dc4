"""Train the demo model: a checkpoint in the official layout (or none) enters, a better one leaves.

    python demo/train.py --out run --minutes 180               # from nothing; the same command resumes a run
    python demo/train.py --out more --init edge_runtime/demo   # starts from trained files, or from a checkpoint
    python demo/train.py --out quick --quick                   # tests the code, learns nothing

Other processes draw pictures while this one computes. The schedule follows the clock: a short rise, a plateau, and a
linear decay over the last quarter, which is worth a great deal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.batches import HEADS, IGNORED, PATCH_HEADS, RECIPES, SKELETON, Batch, BatchMaker
from demo.initialise import new_model
from demo.model import DemoModel, load_model, save_model
from demo.optimise import make_optimisers, set_rate
from demo.ramp import add_ramp, has_ramp, hold_ramp

MIXTURE = {
    "text": 0.15,
    "text vision": 0.10,
    "slices": 0.28,
    "shape": 0.04,
    "absent": 0.02,
    "followup": 0.01,
    "count": 0.08,
    "filter": 0.24,
    "shape slices": 0.01,
    "count slices": 0.02,
    "video": 0.045,
    "chat": 0.005,
}
"""Share of the batches of each kind."""
FILTER_BEGIN, FILTER_END = 0.62, 0.74
"""Before and after these fractions of the run, "filter" trains the vision alone, and the decoder, too. A decoder
asked for one kind before the visual tokens hold it only unlearns to give the total."""
DENSE_ONLY, DENSE_SHARE, EASE_END = 0.07, 0.5, 0.65
"""From scratch: first only pictures full of characters, then this share of them and easy text, both falling to none
at a fraction of the run."""
RISE = 100  # steps until the full learning rate
HEADS_ALONE = 60  # first steps of a run from a trained network: gradients of untrained heads would harm it
HEAD_WEIGHT = 0.3  # of the auxiliary losses in batches that also train the decoder
LOG_EVERY, SAVE_EVERY_S, QUICK_STEPS = 25, 240, 8  # 8 steps of 2 batches go through all kinds


class Heads(nn.Module):
    """Linear readers of single visual tokens and of patches; dropped after training."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim = config["hidden_size"]
        self.readers = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Linear(dim, classes) for _ in queries)
                for name, (queries, classes) in HEADS.items()
            }
        )
        width = config["vision_config"]["hidden_size"]
        self.patches = nn.ModuleDict({name: nn.Linear(width, count + 1) for name, count in PATCH_HEADS.items()})

    def forward(self, tokens: Tensor, facts: dict[str, Any]) -> Tensor:
        """Mean loss; tokens : (B, queries, dim) of the overview."""
        losses = []
        for name, wanted in facts.items():
            target = torch.from_numpy(wanted).to(tokens.device)
            pairs = enumerate(zip(HEADS[name][0], self.readers[name], strict=True))
            loss = torch.stack(
                [F.cross_entropy(reader(tokens[:, query]), target[:, i]) for i, (query, reader) in pairs]
            )
            # Most shapes and colours are absent, which is learnt at once; in a plain mean they would hide the rest.
            losses.append(loss.sum() if name in ("shapes", "colors") else loss.mean())
        return torch.stack(losses).mean() if losses else tokens.new_zeros(())

    def read_patches(self, features: list[Tensor], named: dict[str, Any]) -> Tensor:
        """Mean loss of what patches show; the background, which is most of them, counts a tenth."""
        losses = []
        for name, (part, wanted) in named.items():
            weight = torch.ones(PATCH_HEADS[name] + 1, device=features[part].device)
            weight[-1] = 0.1
            logits, target = self.patches[name](features[part]), torch.from_numpy(wanted).to(weight.device)
            losses.append(F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight))
        return torch.stack(losses).mean()


@dataclass
class Run:
    """Everything a run needs to resume."""

    model: DemoModel
    heads: Heads
    optimisers: list[torch.optim.Optimizer]
    seed: int
    scratch: bool
    step: int = 0
    samples: int = 0
    spent_s: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def save(self, out: Path) -> None:
        """Write checkpoint, log and state; each replaces the old one atomically."""
        save_model(self.model, out / "checkpoint.new", SKELETON)
        log = {
            "seed": self.seed,
            "steps": self.step,
            "samples": self.samples,
            "minutes": round(self.spent_s / 60, 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "quick_steps": QUICK_STEPS,
            "mixture": MIXTURE,
            "curve": self.curve,
        }
        (out / "log.json").write_text(json.dumps(log, indent=1), "utf-8")
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "numbers": [self.seed, self.scratch, self.step, self.samples, self.spent_s],
            "curve": self.curve,
        }
        torch.save(state, out / "state.new")
        (out / "state.new").replace(out / "state.pt")
        (out / "checkpoint").mkdir(exist_ok=True)
        for file in (out / "checkpoint.new").iterdir():
            file.replace(out / "checkpoint" / file.name)
        (out / "checkpoint.new").rmdir()

    def load(self, state: dict[str, Any]) -> None:
        """Resume from what `save` wrote."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.seed, self.scratch, self.step, self.samples, self.spent_s = state["numbers"]
        self.curve = state["curve"]


def mixture(progress: float, scratch: bool) -> dict[str, float]:
    """Shares of the kinds at a fraction of the run."""
    if scratch and progress < DENSE_ONLY:
        return {"dense": 1.0}
    decoded = min(1.0, max(0.0, (progress - FILTER_BEGIN) / (FILTER_END - FILTER_BEGIN))) if scratch else 1.0
    share = MIXTURE["filter"]
    dense = {"dense": DENSE_SHARE * max(0.0, 1 - progress / EASE_END)} if scratch else {}
    return MIXTURE | dense | {"filter": share * decoded, "filter vision": share * (1 - decoded)}


def ease(progress: float, scratch: bool) -> float:
    """Share of easy text at a fraction of the run."""
    return max(0.0, 1 - progress / EASE_END) if scratch else 0.0


def draw_batches(seed: int, scratch: bool, quick: bool, steps: Any, progress: Any, queue: Any) -> None:
    """Body of a drawing process: each takes the next step in turn; `quick` goes through all kinds."""
    os.nice(5)
    torch.set_num_threads(1)
    maker, parent = BatchMaker(seed), os.getppid()
    while os.getppid() == parent:
        with steps.get_lock():
            step = steps.value
            steps.value += 1
        kinds = {list(RECIPES)[step % len(RECIPES)]: 1.0} if quick else mixture(progress.value, scratch)
        batch = maker.make(step, kinds, ease(progress.value, scratch))
        while os.getppid() == parent:
            try:
                queue.put(batch, timeout=5)
                break
            except Full:
                continue


def forward(run: Run, batch: Batch, device: str) -> tuple[Tensor, float]:
    """Loss of a batch, and the share of answers that greedy decoding would get right."""
    features, parts = [], []
    for patches, tgt_size in batch.parts:
        features.append(run.model.features(torch.from_numpy(patches).to(device), tgt_size))
        if batch.kind != "dense":
            times = None if batch.times is None else torch.from_numpy(batch.times).to(device)
            parts.append(run.model.visual_tokens(features[-1], tgt_size, times))
    extra = torch.zeros((), device=device)
    if batch.named:
        extra = extra + run.heads.read_patches(features, batch.named)
    if batch.facts and batch.kind != "slices":  # text is not legible in the overview
        extra = extra + run.heads(parts[0][:, 0], batch.facts)
    if batch.kind == "dense" or batch.kind.endswith("vision"):
        return extra, float("nan")
    labels = torch.from_numpy(batch.labels).to(device)
    wanted = labels != IGNORED
    tokens = torch.cat(parts, dim=1).flatten(1, 2) if parts else None
    holes = torch.from_numpy(batch.holes).to(device)
    logits = run.model.logits(torch.from_numpy(batch.ids).to(device), tokens, holes, wanted)
    loss = F.cross_entropy(logits, labels[wanted])
    # If every token is the most probable one after the right ones, greedy decoding writes this answer.
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(1) == labels[wanted]
    return loss + HEAD_WEIGHT * extra, right.all(1).float().mean().item()


def rate(run: Run, limit_s: float, decay_s: float) -> float:
    """Fraction of the peak learning rates at this moment."""
    left = limit_s - run.spent_s
    return max(0.0, min(1.0, (run.step + 1) / RISE, left / decay_s))


def train(run: Run, out: Path, options: argparse.Namespace) -> None:
    """Train until the time is up, saving now and then."""
    limit_s = options.minutes * 60
    decay_s = options.decay * 60 if options.decay else limit_s / 4
    context = mp.get_context("spawn")
    queue, steps = context.Queue(6), context.Value("q", run.step * options.streams)
    progress = context.Value("d", run.spent_s / limit_s)
    workers = [
        context.Process(
            target=draw_batches, args=(run.seed, run.scratch, options.quick, steps, progress, queue), daemon=True
        )
        for _ in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    seen: dict[str, list[float]] = defaultdict(list)
    parameters = [*run.model.parameters(), *run.heads.parameters()]
    saved_at = started = time.monotonic()
    spent_before = run.spent_s
    pool = ThreadPoolExecutor(options.streams)

    def work(_: int) -> tuple[str, int, float, tuple[Tensor | None, ...]]:
        batch = queue.get()
        loss, right = forward(run, batch, options.device)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return batch.kind, len(batch.ids), right if right == right else -loss.item(), gradients

    while run.spent_s < limit_s and run.step < options.steps:
        set_rate(run.optimisers, options.rate * rate(run, limit_s, decay_s))
        results = list(pool.map(work, range(options.streams)))
        for parameter, *gradients in zip(parameters, *(result[3] for result in results), strict=True):
            known = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = torch.stack(known).sum(0) / options.streams if known else None
        if not run.scratch and run.step < HEADS_ALONE:
            run.model.zero_grad()
        hold_ramp(run.model.resampler)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in run.optimisers:
            optimiser.step()
        for kind, count, right, _ in results:
            seen[kind].append(right)
            run.samples += count
        run.step += 1
        run.spent_s = spent_before + time.monotonic() - started
        progress.value = run.spent_s / limit_s
        if run.step % LOG_EVERY == 0:
            _log(run, seen)
            seen = defaultdict(list)
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            run.save(out)
            saved_at = time.monotonic()
    for worker in workers:
        worker.terminate()
    run.save(out)


def _log(run: Run, seen: dict[str, list[float]]) -> None:
    """Print one line: share of right answers in new batches (for `vision` kinds the negative loss)."""
    means = {kind: round(sum(values) / len(values), 3) for kind, values in sorted(seen.items())}
    entry = {"step": run.step, "samples": run.samples, "minutes": round(run.spent_s / 60, 2), "right": means}
    run.curve.append(entry)
    print(json.dumps(entry), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--init", type=Path, help="trained checkpoint or files to start from; default nothing")
    parser.add_argument("--minutes", type=float, default=60, help="of training in all, breaks not counted")
    parser.add_argument("--decay", type=float, help="minutes of decay at the end; default a quarter")
    parser.add_argument("--rate", type=float, default=1, help="factor on all learning rates")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=2, help="batches per step, worked on side by side")
    parser.add_argument("--threads", type=int, default=1, help="of torch for each batch")
    parser.add_argument("--workers", type=int, default=1, help="drawing processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    state = options.out / "state.pt"
    saved = torch.load(state, weights_only=False) if state.exists() else None
    model = load_model(options.init, SKELETON) if options.init and not saved else new_model(options.seed)
    if not saved and not has_ramp(model.resampler):
        add_ramp(model.resampler)
    model = model.to(options.device)
    heads = Heads(model.config).to(options.device)
    run = Run(model, heads, make_optimisers(model, heads), options.seed, options.init is None)
    if saved:
        run.load(saved)
    if options.quick:
        options.steps, options.minutes = min(options.steps, run.step + QUICK_STEPS), 1e3
    train(run, options.out, options)


if __name__ == "__main__":
    main()
