"""What the server did and does, as Prometheus metrics: one registry per server, filled from the outcomes of calls.

Counters of tokens and seconds give rates, the histogram gives quantiles of the time to the first token; state
(queue, memory, caches) and the rates of the last answers (`recent_rates`) are read when they are asked for. Labels
are names of models on this server, at most `MAX_NAMES` of them: a client may give a model as many names as it likes
(/api/copy).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.answers import Answer
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.server.batches.runner import Batches
from edge_runtime.server.errors import problem_of
from edge_runtime.server.inference import Inference, Outcome
from edge_runtime.server.recent_rates import WHAT, Rates
from edge_runtime.server.registry.loaded import ModelRegistry

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
"""Upper bounds of the histogram: from the demo model to a full-size one with ten slices on a small processor."""

MAX_NAMES = 100
"""Models with counters of their own, the first ones used; the others are counted together."""
OTHERS = "(others)"


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (RssAnon): what can leak. All of it if the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


class Metrics:
    """The numbers of one server.

    Parameters
    ----------
    inference : source of the calls to count.
    batches : source of the lines to count.
    """

    def __init__(self, inference: Inference, batches: Batches) -> None:
        self.registry = CollectorRegistry()
        name: dict[str, Any] = {"registry": self.registry, "namespace": "edge_runtime"}
        self._requests = Counter("requests", "Calls that ended, by status.", ["model", "status"], **name)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts, visual tokens included.", ["model"], **name)
        self._cached = Counter("cached_prompt_tokens", "Of these, those that needed no prefill.", ["model"], **name)
        self._visual = Counter("visual_tokens", "Of these, those that stand for pictures.", ["model"], **name)
        self._answer = Counter("completion_tokens", "Tokens generated.", ["model"], **name)
        self._drafts = Counter(
            "draft_tokens",
            "Guessed tokens that were checked, by source and result.",
            ["model", "source", "result"],
            **name,
        )
        self._seconds = Counter("work_seconds", "Seconds of requests, by stage.", ["model", "stage"], **name)
        self._first = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to the first token of its answer.",
            ["model"],
            buckets=FIRST_TOKEN_S,
            **name,
        )
        self._names: set[str] = set()
        """Models with counters of their own."""
        self._rates: dict[str, Rates] = {}
        self.registry.register(_State(inference))
        self.registry.register(_Recent(self._rates))
        self.registry.register(_Batches(batches))
        ProcessCollector(registry=self.registry)
        inference.on_end.append(self.record)

    def record(self, outcome: Outcome) -> None:
        """Count a call that ended."""
        status = "ok" if outcome.answers else "cancelled"
        if outcome.error is not None:
            # Other errors were logged where they were answered.
            status = str(problem_of(outcome.error).status) if isinstance(outcome.error, EdgeRuntimeError) else "500"
        model = self._label(outcome.model)
        self._requests.labels(model, status).inc()
        for number, answer in enumerate(outcome.answers):
            self._record_answer(model, answer, counts_prompt=number == 0)
            if answer.timings_s.get("first_token") and not outcome.in_background:
                self._first.labels(model).observe(answer.timings_s["first_token"])

    def _label(self, model: str) -> str:
        """The label under which a model is counted."""
        if model in self._names or len(self._names) < MAX_NAMES:
            self._names.add(model)
            return model
        return OTHERS

    def _record_answer(self, model: str, answer: Answer, *, counts_prompt: bool) -> None:
        timings = answer.timings_s
        self._rates.setdefault(model, Rates()).record(answer, counts_prompt=counts_prompt)
        if counts_prompt:  # the answers to one request share its prompt
            self._prompt.labels(model).inc(answer.prompt_tokens)
            self._cached.labels(model).inc(answer.cached_tokens)
            self._visual.labels(model).inc(answer.visual_tokens)
        self._answer.labels(model).inc(answer.completion_tokens)
        for source, counts in answer.drafts.items():
            self._drafts.labels(model, source, "accepted").inc(counts["accepted"])
            self._drafts.labels(model, source, "rejected").inc(counts["checked"] - counts["accepted"])
        for stage in ("image", "encode", "prefill", "decode"):
            self._seconds.labels(model, stage).inc(timings.get(stage, 0.0))

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)


class _Recent(Collector):
    """Rates of the last answers, by model.

    Parameters
    ----------
    rates : by label; models are added to it meanwhile.
    """

    def __init__(self, rates: dict[str, Rates]) -> None:
        self._rates = rates

    def collect(self) -> Iterator[Metric]:
        found = {
            name: GaugeMetricFamily(f"edge_runtime_last_{name}", what, labels=["model"])
            for name, what in WHAT.items()
        }
        for model, rates in [*self._rates.items()]:
            for name, value in rates.gauges():
                found[name].add_metric([model], value)
        yield from found.values()


class _Batches(Collector):
    """What is done while nobody waits for an answer."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def collect(self) -> Iterator[Metric]:
        found = GaugeMetricFamily("edge_runtime_batches", "Batches that are kept, by status.", labels=["status"])
        for status, n in self._batches.counts().items():
            found.add_metric([status], n)
        done = CounterMetricFamily("edge_runtime_batch_lines", "Lines of batches that ended.", labels=["result"])
        for is_answer, n in self._batches.n_answered.items():
            done.add_metric(["answer" if is_answer else "error"], n)
        n_bytes = self._batches.files.n_bytes
        yield from (found, done, GaugeMetricFamily("edge_runtime_file_bytes", "Files for batches.", n_bytes))


class _State(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    def collect(self) -> Iterator[Metric]:
        registry: ModelRegistry = self._inference.registry
        yield GaugeMetricFamily("edge_runtime_open_requests", "Calls that wait or run.", self._inference.n_open)
        most = self._inference.settings.max_queue
        yield GaugeMetricFamily("edge_runtime_max_requests", "Open calls above which others are refused.", most)
        yield GaugeMetricFamily("edge_runtime_anonymous_memory_bytes", "RssAnon of the process.", anonymous_bytes())
        waiting = GaugeMetricFamily("edge_runtime_queue", "Requests of a model that wait.", labels=["model"])
        running = GaugeMetricFamily("edge_runtime_running", "Requests of a model at work.", labels=["model"])
        n_bytes = GaugeMetricFamily("edge_runtime_model_bytes", "Estimated memory of a model.", labels=["model"])
        lookups = CounterMetricFamily(
            "edge_runtime_picture_lookups", "Groups of slices that requests needed.", labels=["model"]
        )
        hits = CounterMetricFamily(
            "edge_runtime_picture_hits", "Of these, those whose visual tokens were known.", labels=["model"]
        )
        kept = GaugeMetricFamily(
            "edge_runtime_picture_cache_bytes",
            "Visual tokens and features of slices kept in memory.",
            labels=["model"],
        )
        for slot in registry.loaded():
            model, name = slot.model, [slot.listed.name]
            if model is None:
                continue
            activity = model.activity
            waiting.add_metric(name, activity.waiting)
            running.add_metric(name, activity.running)
            n_bytes.add_metric(name, slot.n_bytes)
            lookups.add_metric(name, activity.picture_lookups)
            hits.add_metric(name, activity.picture_hits)
            kept.add_metric(name, activity.picture_bytes)
        yield from (waiting, running, n_bytes, lookups, hits, kept)
